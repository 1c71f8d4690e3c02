"""Sets of sentence pairs: read aligned files, write a prepared set (see common.py), load it back."""
import gzip
from pathlib import Path

import numpy as np

from data.common import UserError, load_set, reading, write_set


def sentence_ids(encoding, line):
    """One sentence -> list of ids with EOT. A space precedes it: its first word is cut like any other."""
    return [*encoding.encode_ordinary(" " + line.strip()), encoding.eot_token]


def source_ids(encoding, lines, longest, where):
    """Sentences to translate -> their ids. UserError for an empty one or one longer than `longest` ids."""
    rows = [sentence_ids(encoding, line) for line in lines]
    for n, (line, ids) in enumerate(zip(lines, rows, strict=True), 1):
        if not line.strip():
            raise UserError(f"{where}: line {n} is empty, give a sentence to translate")
        if len(ids) > longest:
            raise UserError(f"{where}: line {n} has {len(ids)} tokens, the model reads at most {longest}")
    return rows


def sentence(encoding, ids):
    """The inverse: ids, with or without EOT -> one line of text."""
    text = encoding.decode([i for i in ids if i != encoding.eot_token])
    return " ".join(text.split())


def read_lines(path):
    """The UTF-8 file, or path.gz if there is none -> lines without line ends. UserError if unreadable."""
    zipped = Path(f"{path}.gz")
    path = zipped if zipped.is_file() and not Path(path).is_file() else Path(path)
    with reading(path):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines     # not splitlines: U+2028 ends no line here


def read_pairs(paths, split):
    """Two aligned files -> list of pairs of lines; pairs with a blank line are left out of train. UserError
    for a blank line in another split, unequal line counts, the same text twice."""
    texts = [[line.strip() for line in read_lines(path)] for path in paths]
    (a, b), count = paths, len(texts[0])
    if count != len(texts[1]):
        raise UserError(f"{a} has {count:,} lines and {b} has {len(texts[1]):,}: line n of one must "
                        f"translate line n of the other")
    for path, lines in zip(paths, texts, strict=True):
        if split != "train" and "" in lines:
            raise UserError(f"{path}: line {lines.index('') + 1} is blank, so its pair cannot be scored")
    pairs = [pair for pair in zip(*texts, strict=True) if all(pair)]
    same = sum(x == y for x, y in pairs)
    if not pairs or same > len(pairs) / 2:
        raise UserError(f"{a} and {b} are {'the same text' if pairs else 'empty'}")
    if len(pairs) < count:
        print(f"left out of {split}: {count - len(pairs):,} pairs with an empty side")
    return pairs


def write_pairs(out, splits, vocab_size, *, languages, name, source, tokenize="13a"):
    """write_set of {split: pairs of lines}, with one tokenizer for both languages. tokenize: sacrebleu's
    tokenisation for scoring, "none" for text that is tokenised already."""
    write_set(out, splits, vocab_size, prefix=" ", name=name, source=source, languages=languages,
              tokenize=tokenize, prompt=dict(zip(languages, splits["val"][0], strict=True)))


def load_pairs(folder):
    """Folder -> DataSet, each split {language: list of (T,) arrays, EOT the last id of each}. UserError as in
    load_set."""
    data = load_set(folder, "pairs")
    for split, ids in data.splits.items():
        sentences = np.split(ids, np.flatnonzero(ids == data.encoding.eot_token) + 1)[:-1]
        data.splits[split] = {language: sentences[n::2] for n, language in enumerate(data.meta["languages"])}
    return data


def originals(data, split, language):
    """The lines of a split, for scoring."""
    return [data.encoding.decode(ids[:-1].tolist()).strip() for ids in data.splits[split][language]]


def direction(data, translate):
    """"de-en" -> ("de", "en"), checked against the set's languages."""
    source, _, target = translate.partition("-")
    if {source, target} != set(data.meta["languages"]):
        a, b = data.meta["languages"]
        raise UserError(f"--translate {translate}: {data.folder} has the languages {a} and {b}; "
                        f"use {a}-{b} or {b}-{a}")
    return source, target
