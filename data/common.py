"""Shared by all data sets: read texts, train a tokenizer, write a prepared set and read it back.

A prepared set is one folder:

    train.bin, val.bin ...   token ids, little-endian uint16, EOT after each text; the two of a pair in turn
    tokenizer.json           the split pattern and all tokens in order of id
    meta.json                name, source, sizes, prompt, "languages" of sentence pairs, "sha256" of the other
                             files; written last: present = complete
"""
import contextlib
import functools
import hashlib
import http.client
import inspect
import itertools
import json
import os
import re
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import rustbpe
import tiktoken
import tyro

HERE = Path(__file__).resolve().parent
EOT = "<|endoftext|>"       # the one special token, id V-1
VAL_SHARE = 0.05            # of the documents, or of a single one
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
ARCHIVE_LIMIT = 2 << 30     # bytes taken from one archive: a small one can unpack to more than the memory

# Text is cut into these pieces before BPE, and no token crosses a cut. Every character matches one of them,
# so nothing is lost; without look-ahead the time to match is linear on any input.
PIECES = (
    r" ?[\p{L}\p{M}]+",            # a word, with one space before it
    r"\p{N}{1,3}",                 # up to three digits
    r" ?[^\s\p{L}\p{M}\p{N}]+",    # a run of punctuation, with one space before it
    r"[\r\n]+[ \t]*",              # line ends with the indentation that follows: one token per code line
    r"[^\S\r\n]+",                 # any other white space
)


class UserError(ValueError):
    """A fault that the user can correct. Scripts print the message, which says how, without a traceback."""


def command(main):
    """Decorate a script's `main(argv=None)`: an error is one message on stderr and exit status 2."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            result = main(argv)
            sys.stdout.flush()
            return result
        except BrokenPipeError:     # the reader of the output, such as head, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except (MemoryError, RuntimeError) as error:    # of a CPU torch says it in words only
            if isinstance(error, RuntimeError) and not re.search("(of|ate|enough) memory", str(error)):
                raise
            raise SystemExit("error: out of memory, double --grad_accum_steps or halve --batch_size, "
                             f"--batch_tokens, --block_size or --samples ({str(error):.200})") from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run


def script(**explained):
    """Decorate the last function of a prepare.py -> main(argv=None), called at once if the file is run as a
    script; options are the function's parameters, `explained` here and by the docstring of the file."""
    explained |= {"vocab_size": "number of tokens, the 256 bytes and the end of text included",
                  "out": "folder to write to"}

    def decorate(prepare):
        lines = "".join(f"\n    {name}: {text}" for name, text in explained.items())
        prepare.__doc__ = f"{sys.modules[prepare.__module__].__doc__}\nArgs:{lines}"

        @command
        @functools.wraps(prepare)
        def main(argv=None):
            argv = sys.argv[1:] if argv is None else argv
            if "" in argv:      # which is the current folder to Path
                raise UserError("an option has an empty value; is a variable of the shell not set?")
            return tyro.cli(prepare, args=argv)

        parameters = inspect.signature(prepare).parameters.values()
        main.automatic = all(p.default is not p.empty for p in parameters)      # runs without options
        if prepare.__module__ == "__main__":
            main()
        return main

    return decorate


def _encoding(pattern, tokens):
    """Tokens (list of bytes, index = id, every single byte included) -> Encoding with EOT as the last id."""
    if len(set(tokens)) != len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens):
        raise ValueError("tokens are repeated or single bytes are missing")
    return tiktoken.Encoding("nanodepth", pat_str=pattern, special_tokens={EOT: len(tokens)},
                             mergeable_ranks={token: i for i, token in enumerate(tokens)})


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE on an iterable of str -> Encoding with vocab_size ids (256 bytes, merges, EOT).
    The same texts give the same tokenizer. UserError: vocab_size out of range or too large for the texts."""
    if not 258 <= vocab_size <= 65536:
        raise UserError(f"--vocab-size {vocab_size} is out of range: use 258 (256 bytes, a merge, "
                        f"{EOT}) to 65536 (ids are stored in 16 bits)")
    pattern, bpe = "|".join(PIECES), rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(texts), vocab_size - 1, pattern=pattern)
    tokens = list(dict.fromkeys(bytes(token) for token, _ in bpe.get_mergeable_ranks()))
    if len(tokens) < vocab_size - 1:
        raise UserError(f"the training text yields only {len(tokens) + 1} tokens, not {vocab_size}: "
                        f"give more text or a smaller --vocab-size (258 or more)")
    return _encoding(pattern, tokens)


def save_tokenizer(path, encoding):
    """Write an Encoding of train_tokenizer as JSON; one character per byte (latin-1), one token per line."""
    tokens = [encoding.decode_single_token_bytes(i).decode("latin-1") for i in range(encoding.n_vocab - 1)]
    content = {"pattern": encoding._pat_str, "eot": EOT, "tokens": tokens}
    write_file(path, json.dumps(content, indent=0).encode())


def load_tokenizer(path):
    """Read what save_tokenizer wrote -> tiktoken.Encoding. UserError when missing or damaged."""
    with reading(path):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return _encoding(content["pattern"], [token.encode("latin-1") for token in content["tokens"]])


def token_bytes(encoding):
    """Encoding -> (V,) int64, the number of UTF-8 bytes of every token, 0 for EOT."""
    sizes = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab - 1)]
    return np.array([*sizes, 0], dtype=np.int64)


@contextlib.contextmanager
def reading(path):
    """Whatever its content makes go wrong in here means: this file is damaged. UserError with its name."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:      # numpy, zipfile, zlib, json and torch raise a dozen kinds
        raise UserError(f"cannot read {path}: it is missing, damaged or does not fit ({e!r:.200})") from None


def digests(folder, names):
    """{name: sha256} of files in a folder."""
    return {name: hashlib.sha256(Path(folder, name).read_bytes()).hexdigest() for name in names}


def unchanged(folder, expected):
    """UserError unless the files of a folder have the digests {name: sha256} that they were written with."""
    for name, digest in expected.items():
        with reading(Path(folder, name)):
            if digests(folder, [name])[name] != digest:
                raise ValueError("not the file that was written")


def write_file(path, content):
    """Write bytes, a string, or what content(file) writes: under a name of this process, synced to the disk,
    then renamed, so that `path` is the old file or all of the new. UserError if the disk is full."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path} ({error}); is the disk full? What was there is kept") from error
    finally:
        part.unlink(missing_ok=True)


def download(urls, path, sha256):
    """Fetch path from the first of urls that answers with the expected content, unless path has it -> path.
    UserError when all fail, saying what to do by hand; path is then as it was."""
    path, failures = Path(path), []
    if path.is_file() and digests(path.parent, [path.name])[path.name] == sha256:
        return path
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
            if (digest := hashlib.sha256(content).hexdigest()) != sha256:
                raise ValueError(f"wrong content, sha256 {digest}")
            write_file(path, content)
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"  {url}\n    {error}\n")
    raise UserError(f"cannot download {path.name} (sha256 {sha256}):\n{''.join(failures)}"
                    f"Fetch it by hand and put it at {path}, or name it with --source FILE")


def _files(source, suffixes, skip):
    """Yield (relative name, bytes) of a file, of a folder or of a tar archive, without hidden files."""
    def wanted(name):
        *folders, file = PurePosixPath(name).parts
        hidden = any(part.startswith(".") for part in (*folders, file))
        return not hidden and skip.isdisjoint(folders) and (not suffixes or file.endswith(suffixes))

    if source.is_dir():
        for path in source.rglob("*"):
            name = path.relative_to(source).as_posix()
            if wanted(name) and path.is_file():
                yield name, path.read_bytes()
    elif source.name.endswith(ARCHIVES):
        with tarfile.open(source) as archive:
            members = [member for member in archive if member.isfile() and wanted(member.name)]
            if sum(member.size for member in members) > ARCHIVE_LIMIT:
                raise UserError(f"{source} holds over {ARCHIVE_LIMIT:,} bytes: unpack it, give the folder")
            for member in members:
                yield str(PurePosixPath(member.name)), archive.extractfile(member).read()
    else:
        yield source.name, source.read_bytes()


def read_texts(sources, suffixes=(), skip=()):
    """Paths (files, folders, tar archives) -> list of (relative name, text), sorted by name.
    suffixes: take only file names with these ends, () = all; skip: names of folders to leave out. Binary,
    non-UTF-8 and empty files and exact duplicates are left out and counted; a byte order mark is removed,
    CRLF becomes LF. UserError when a source cannot be read or nothing is left."""
    names, left_out = {}, Counter()     # {text: name}
    for source in map(Path, sources):
        with reading(source):
            files = sorted(_files(source, tuple(suffixes), set(skip)))
        for name, content in files:
            try:
                text = content.decode("utf-8-sig").replace("\r\n", "\n")
            except UnicodeDecodeError:
                text = "\0"     # treated like a binary file
            if "\0" in text:
                left_out["not UTF-8 text"] += 1
            elif not text.strip():
                left_out["empty"] += 1
            elif text in names:
                left_out["duplicate"] += 1
            else:
                names[text] = name
    if left_out:
        print("files left out: " + ", ".join(f"{n} {reason}" for reason, n in left_out.items()))
    if not names:
        raise UserError(f"no UTF-8 text files {' '.join((*suffixes, 'in'))} {', '.join(map(str, sources))}")
    return sorted((name, text) for text, name in names.items())


def cut_at_line(text):
    """text -> {"train": [head], "val": [tail]}, cut at the last line end of the first 95 %; within a line if
    that end is in the first half."""
    if len(text) < 2:
        raise UserError("the text is too small to split into train and val: give more text")
    target = min(max(1, round(len(text) * (1 - VAL_SHARE))), len(text) - 1)
    end = text.rfind("\n", 0, target) + 1
    cut = end if end > len(text) / 2 else target
    return {"train": [text[:cut]], "val": [text[cut:]]}


def split_by_document(named_texts):
    """[(name, text)] -> {"train": [text], "val": [text]}, whole documents, chosen by a hash of the name.
    Neither side is empty: a single document is cut at a line end instead."""
    if len(named_texts) == 1:
        return cut_at_line(named_texts[0][1])
    by_hash = sorted(named_texts, key=lambda item: hashlib.sha256(item[0].encode()).digest())
    texts = [text for _, text in by_hash]
    n_val = max(1, round(len(texts) * VAL_SHARE))
    return {"train": texts[n_val:], "val": texts[:n_val]}


def write_set(out, splits, vocab_size, *, prefix="", **meta):
    """Train a tokenizer on splits["train"] and write the prepared set into the folder out.
    splits: {split: list of texts, or of pairs of texts}; prefix + text is encoded. Examples of train that
    another split has too are dropped. meta: name, source and other entries of meta.json, which has the
    digests of the others, so that half a set is noticed. OSError when out cannot be written."""
    start, out, unit = time.perf_counter(), Path(out), "pairs" if "languages" in meta else "documents"
    print(f"{meta['name']}: {meta['source']}, vocabulary {vocab_size}")
    held_out = {example for split in splits if split != "train" for example in splits[split]}
    train = [example for example in splits["train"] if example not in held_out]
    if dropped := len(splits["train"]) - len(train):
        print(f"left out of train: {dropped:,} {unit} that another split has too")
    if not train:
        raise UserError(f"no {unit} are left to train on: give others to validate or test on")
    flat = list if unit == "documents" else itertools.chain.from_iterable
    encoding = train_tokenizer(flat(train), vocab_size)
    files, meta = {}, meta | {"vocab_size": vocab_size, "splits": {}}
    for split, examples in (splits | {"train": train}).items():
        ids = np.concatenate([np.array([*encoding.encode_ordinary(prefix + text), encoding.eot_token], "<u2")
                              for text in flat(examples)])      # OverflowError beyond 16 bits, never wrapped
        files[split], size = ids, int(token_bytes(encoding)[ids].sum())
        meta["splits"][split] = {unit: len(examples), "tokens": len(ids), "bytes": size}
        print(f"{split:>{max(map(len, splits)) + 1}}: {len(examples):,} {unit}, {size:,} bytes, "
              f"{len(ids):,} tokens, {size / len(ids):.2f} bytes per token")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as new:       # all new files, or the old set
        for split, ids in files.items():
            write_file(Path(new, f"{split}.bin"), ids.tobytes())
        save_tokenizer(Path(new, "tokenizer.json"), encoding)
        meta["sha256"] = digests(new, names := sorted(os.listdir(new)))
        write_file(Path(new, "meta.json"), json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
        for name in [*names, "meta.json"]:
            os.replace(Path(new, name), out / name)
    out = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    print(f"wrote {out} in {time.perf_counter() - start:.1f} s")


def is_prepared(folder):
    """True when the folder holds a complete data set."""
    return (Path(folder) / "meta.json").is_file()


class DataSet(NamedTuple):
    folder: Path
    splits: dict                # {split: (T,) read-only memory map of uint16 token ids}
    encoding: tiktoken.Encoding
    meta: dict                  # meta.json


def load_set(folder, kind="text"):
    """Folder -> DataSet, checked in full. kind: text or pairs. UserError when the set is missing, damaged or
    of the other kind; the message has the command that prepares it, the first one in the docstring of
    prepare.py."""
    folder, splits = Path(folder), {}
    try:
        with reading(folder / "meta.json"):
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            languages, files = meta.get("languages"), {split: f"{split}.bin" for split in meta["splits"]}
            expected = {name: meta["sha256"][name] for name in ("tokenizer.json", *files.values())}
            unchanged(folder, expected)
            encoding = load_tokenizer(folder / "tokenizer.json")
            a, b = languages or "ab"
            if meta["vocab_size"] != encoding.n_vocab or not {"train", "val"} <= files.keys():
                raise ValueError("another vocabulary, or no train and val")
        for split, name in files.items():
            splits[split] = np.asarray(np.memmap(folder / name, "<u2", "r"))
    except UserError as error:
        problem = "damaged" if is_prepared(folder) else "not prepared"
        own = (folder / "prepare.py").is_file()
        doc = (folder if own else HERE / kind).joinpath("prepare.py").read_text(encoding="utf-8")
        usage = doc[doc.index("python data/"):].partition("\n")[0] + ("" if own else f" --out {folder}")
        raise UserError(f"the data set {folder} is {problem} ({error}): run {usage}") from None
    if languages and kind == "text":
        raise UserError(f"{folder} holds sentence pairs: say what to --translate, {a}-{b} or {b}-{a}")
    if kind == "pairs" and not languages:
        raise UserError(f"{folder} is a text, there is nothing to --translate; use a set of sentence pairs")
    return DataSet(folder, splits, encoding, meta)
