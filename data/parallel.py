"""Sets of sentence pairs: read aligned files, write a prepared set, load it back.

A prepared set of pairs is one folder (XX and YY being its languages, such as de and en):

    train.XX.bin, train.YY.bin   token ids, little-endian uint16, EOT after each sentence; so every split
    val.XX.txt, test.YY.txt ...  the original lines of every split but train, for scoring
    tokenizer.json               one BPE for both languages
    meta.json                    written last: present = complete
"""

import gzip
import json
import os
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from data.common import (
    UserError,
    is_prepared,
    load_tokenizer,
    save_tokenizer,
    to_uint16,
    train_tokenizer,
)

# A frequent word that the other languages do not have: tells swapped files from right ones.
TELLTALE = {"de": "und", "en": "and", "fr": "et", "es": "el", "cs": "na"}


def sentence_ids(encoding, line):
    """One sentence -> list of ids that ends with EOT. Its first word is cut like any other, after a space."""
    return [*encoding.encode_ordinary(" " + line.strip()), encoding.eot_token]


def source_ids(encoding, lines, longest, where):
    """Sentences to translate -> their ids. UserError for one that is empty or longer than the model reads."""
    found = [sentence_ids(encoding, line) for line in lines]
    for n, (line, ids) in enumerate(zip(lines, found, strict=True), 1):
        if not line.strip():
            raise UserError(f"{where}: line {n} is empty, give a sentence to translate")
        if len(ids) > longest:
            raise UserError(f"{where}: line {n} has {len(ids)} tokens, the model reads at most {longest}")
    return found


def sentence(encoding, ids):
    """The inverse: ids, with or without EOT -> one line of text."""
    text = encoding.decode([i for i in ids if i != encoding.eot_token])
    return " ".join(text.split())


# ---- reading


def read_lines(path):
    """A UTF-8 file, also .gz -> its lines without line ends. UserError when it cannot be read."""
    try:
        content = Path(path).read_bytes()
        if Path(path).suffix == ".gz":
            content = gzip.decompress(content)
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return lines[:-1] if lines[-1] == "" else lines     # not splitlines: U+2028 ends no line here


def find_file(folder, names):
    """The first of `names` that is in the folder, plain or .gz. UserError naming what was expected."""
    for name in names:
        for path in (Path(folder) / name, Path(folder) / f"{name}.gz"):
            if path.is_file():
                return path
    raise UserError(f"{folder} has no {' or '.join(names)} (plain or .gz)")


def read_pairs(files):
    """{language: path} -> {language: lines}. UserError for unequal line counts, for the same text twice, and
    for files that look swapped."""
    lines = {language: read_lines(path) for language, path in files.items()}
    (a, b), counts = files, {language: len(text) for language, text in lines.items()}
    if counts[a] != counts[b]:
        raise UserError(f"{files[a]} has {counts[a]:,} lines and {files[b]} has {counts[b]:,}: line n of one "
                        f"must translate line n of the other")
    same = sum(x == y for x, y in zip(lines[a], lines[b], strict=True))
    if counts[a] == 0 or same > counts[a] / 2:
        raise UserError(f"{files[a]} and {files[b]} are {'the same text' if counts[a] else 'empty'}")
    for one, other in ((a, b), (b, a)):
        if {one, other} <= set(TELLTALE):
            words = " ".join(lines[one]).lower().split()
            own, foreign = words.count(TELLTALE[one]), words.count(TELLTALE[other])
            if foreign > own:
                raise UserError(f"{files[one]} does not look like '{one}': it has the word "
                                f"'{TELLTALE[other]}' {foreign} times and '{TELLTALE[one]}' {own} times")
    return lines


def drop_empty(pairs):
    """{language: lines} without the pairs of which a side is empty -> (pairs, how many were dropped)."""
    a, b = pairs
    kept = [(x, y) for x, y in zip(pairs[a], pairs[b], strict=True) if x.strip() and y.strip()]
    if not kept:
        raise UserError("every pair has an empty side: nothing is left to train on")
    texts = dict(zip((a, b), map(list, zip(*kept, strict=True)), strict=True))
    return texts, len(pairs[a]) - len(kept)


# ---- writing


def write_pairs(out, splits, vocab_size, *, name, source, tokenize="13a"):
    """Train a joint tokenizer on splits["train"] and write the prepared set into the folder out.

    splits: {"train": {language: lines}, "val": ..., any others}; tokenize: sacrebleu's tokenisation for
    scoring, "none" for text that is tokenised already. out never holds half a set."""
    start, out, splits = time.perf_counter(), Path(out), dict(splits)
    splits["train"], dropped = drop_empty(splits["train"])
    languages = sorted(splits["train"])
    encoding = train_tokenizer([line for text in splits["train"].values() for line in text], vocab_size)
    prompt = {language: splits["val"][language][0] for language in languages}
    meta = {"name": name, "source": source, "vocab_size": vocab_size, "languages": languages,
            "tokenize": tokenize, "prompt": prompt, "splits": {}}
    print(f"{name}: {source}, joint vocabulary {vocab_size}")
    if dropped:
        print(f"left out of train: {dropped} pairs with an empty side")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=out) as part:
            for split, texts in splits.items():
                meta["splits"][split] = _write_split(Path(part), split, texts, encoding)
            save_tokenizer(Path(part) / "tokenizer.json", encoding)
            text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
            (Path(part) / "meta.json").write_text(text, encoding="utf-8", newline="\n")
            (out / "meta.json").unlink(missing_ok=True)
            for path in sorted(Path(part).iterdir(), key=lambda p: p.name == "meta.json"):
                os.replace(path, out / path.name)
    except OSError as error:
        raise UserError(f"cannot write the data set: {error}") from None
    print(f"wrote {out} in {time.perf_counter() - start:.1f} s")


def _write_split(folder, split, texts, encoding):
    """Token files, and originals unless it is train -> the split's part of meta.json; prints a line."""
    found = {"pairs": len(next(iter(texts.values()))), "tokens": {}, "bytes": {}}
    for language, lines in texts.items():
        ids = to_uint16([i for line in lines for i in sentence_ids(encoding, line)], encoding.n_vocab)
        ids.tofile(folder / f"{split}.{language}.bin")
        found["tokens"][language] = len(ids)
        found["bytes"][language] = sum(len(line.encode()) for line in lines)
        if split != "train":
            text = "".join(line + "\n" for line in lines)
            (folder / f"{split}.{language}.txt").write_text(text, encoding="utf-8", newline="\n")
    each = ", ".join(f"{lang} {n:,} tokens" for lang, n in found["tokens"].items())
    print(f"{split:>17}: {found['pairs']:,} pairs, {each}")
    return found


# ---- loading


class PairSet(NamedTuple):
    folder: Path
    splits: dict  # {split: {language: list of (T,) uint16 arrays, EOT at the end of each}}
    encoding: tiktoken.Encoding
    meta: dict  # meta.json

    def originals(self, split, language):
        """The split's lines as they were, for scoring."""
        return read_lines(self.folder / f"{split}.{language}.txt")


def load_pairs(folder):
    """Folder -> PairSet, fully checked. UserError says what is wrong."""
    folder, splits = Path(folder), {}
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        encoding = load_tokenizer(folder / "tokenizer.json")
        if meta["vocab_size"] != encoding.n_vocab:
            raise ValueError(f"meta.json says {meta['vocab_size']} tokens, tokenizer.json {encoding.n_vocab}")
        for split, found in meta["splits"].items():
            splits[split] = {}
            for language in meta["languages"]:
                file = f"{split}.{language}.bin"
                tokens = np.fromfile(folder / file, dtype="<u2")
                ends = np.flatnonzero(tokens == encoding.eot_token) + 1
                if len(tokens) != found["tokens"][language] or len(ends) != found["pairs"]:
                    raise ValueError(f"{file} has {len(ends)} sentences in {len(tokens)} tokens")
                if tokens.max(initial=0) >= encoding.n_vocab:
                    raise ValueError(f"{file} has token {tokens.max()}, the vocabulary is {encoding.n_vocab}")
                splits[split][language] = np.split(tokens, ends)[:-1]
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        script = folder / "prepare.py"
        again = script if script.is_file() else f"data/pairs/prepare.py --out {folder}"
        problem = "is damaged" if is_prepared(folder) else "is not prepared"
        raise UserError(f"the data set {folder} {problem} ({error}): run python {again}") from None
    return PairSet(folder, splits, encoding, meta)


def direction(data, translate):
    """"de-en" -> ("de", "en"), checked against the set's languages."""
    source, _, target = translate.partition("-")
    if {source, target} != set(data.meta["languages"]):
        a, b = data.meta["languages"]
        raise UserError(f"--translate {translate}: {data.folder} has the languages {a} and {b}; "
                        f"use {a}-{b} or {b}-{a}")
    return source, target
