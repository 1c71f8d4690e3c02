"""What all data sets share: read texts, train a tokenizer on them, write token files, load them back.

A prepared data set is one folder with four files:

    train.bin, val.bin   token ids, little-endian uint16, documents one after another, EOT after each
    tokenizer.json       the split pattern and all tokens in order of id
    meta.json            where the text came from and how much there is; written last: present = complete
"""

import collections
import functools
import hashlib
import http.client
import json
import lzma
import os
import sys
import tarfile
import tempfile
import time
import urllib.request
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import rustbpe
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"  # the one special token, id V-1, after every document
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")

# Text is cut into these pieces before BPE, and no token reaches over a cut. Every character matches one line,
# so nothing is lost; without look-ahead the matching takes linear time on any input.
PIECES = (
    r" ?[\p{L}\p{M}]+",            # a word, with one space before it
    r"\p{N}{1,3}",                 # up to three digits
    r" ?[^\s\p{L}\p{M}\p{N}]+",    # a run of punctuation, with one space before it
    r"[\r\n]+[ \t]*",              # line ends with the indentation that follows: one token per code line
    r"[^\S\r\n]+",                 # any other white space
)


class UserError(Exception):
    """Something the user can put right; the message says how. Scripts print it without a traceback."""


def command(main):
    """Decorate a script's `main(argv=None)`: a UserError, or a file or memory that cannot be had, prints its
    message on stderr, exit status 2."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except (UserError, OSError, MemoryError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run


# ---- tokenizer

def _encoding(pattern, tokens):
    """Tokens (list of bytes, index = id, all single bytes among them) -> Encoding with EOT as the last id."""
    if len(set(tokens)) != len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens):
        raise ValueError("tokens are repeated or single bytes are missing")
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding("nanodepth", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={EOT: len(tokens)})


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE on an iterable of str -> Encoding with exactly vocab_size ids (256 bytes, merges, EOT).

    The same texts give the same tokenizer. UserError: vocab_size out of range, or too much for the texts."""
    if not 258 <= vocab_size <= 65536:
        raise UserError(f"--vocab-size {vocab_size} is out of range: use 258 (256 bytes, a merge, "
                        f"{EOT}) to 65536 (ids are stored in 16 bits)")
    pattern = "|".join(PIECES)
    bpe = rustbpe.Tokenizer()
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
    Path(path).write_text(json.dumps(content, indent=0), encoding="utf-8", newline="\n")


def load_tokenizer(path):
    """Read what save_tokenizer wrote -> tiktoken.Encoding. UserError when missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return _encoding(content["pattern"], [token.encode("latin-1") for token in content["tokens"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the tokenizer {path} ({error!r}): prepare the data set again") from None


def token_bytes(encoding):
    """Encoding -> (V,) int64, the UTF-8 bytes each token stands for, 0 for EOT.

    Bits per byte of some tokens = sum of their losses in nats / ln 2 / sum of token_bytes[tokens]."""
    sizes = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab - 1)]
    return np.array([*sizes, 0], dtype=np.int64)


def to_uint16(ids, vocab_size):
    """Sequence of int -> (T,) little-endian uint16. Checks 0 <= id < vocab_size first: astype would wrap."""
    ids = np.asarray(ids, dtype=np.int64)
    limit = min(vocab_size, 65536)
    if ids.size and not 0 <= ids.min() <= ids.max() < limit:
        raise UserError(f"token ids {ids.min()}..{ids.max()} do not fit a vocabulary of {limit} (16-bit ids)")
    return ids.astype("<u2")


# ---- texts

def _files(source, suffixes, skip):
    """Yield (relative name, bytes) of a file, of a folder, or of a tar archive; hidden files are left out."""
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
            for member in archive:
                if member.isfile() and wanted(member.name):
                    yield str(PurePosixPath(member.name)), archive.extractfile(member).read()
    else:
        yield source.name, source.read_bytes()


def read_texts(sources, suffixes=(), skip=()):
    """Paths (files, folders, tar archives) -> list of (relative name, text), sorted by name.

    suffixes: take only file names that end so, () = all; skip: names of folders to leave out, at any depth.
    Binary and non-UTF-8 files are skipped and counted, a byte order mark is removed, CRLF becomes LF, empty
    texts and exact duplicates are dropped. UserError when a source cannot be read or nothing is left."""
    texts, seen, left_out = [], set(), collections.Counter()
    for source in map(Path, sources):
        try:
            files = sorted(_files(source, tuple(suffixes), set(skip)))
        except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"cannot read the source {source}: {error}") from None
        for name, content in files:
            try:
                text = content.decode("utf-8-sig").replace("\r\n", "\n")
            except UnicodeDecodeError:
                text = "\0"  # like a binary file
            if "\0" in text:
                left_out["not UTF-8 text"] += 1
            elif not text.strip():
                left_out["empty"] += 1
            elif text in seen:
                left_out["duplicate"] += 1
            else:
                seen.add(text)
                texts.append((name, text))
    if left_out:
        print("files left out: " + ", ".join(f"{n} {reason}" for reason, n in left_out.items()))
    if not texts:
        places = ", ".join(map(str, sources))
        raise UserError(f"no UTF-8 text files {' '.join(suffixes)} found in {places}: check --source")
    return sorted(texts)


def cut_at_line(text, val_share):
    """text -> {"train": [head], "val": [tail]}, the tail being val_share of it, cut at the nearest line end.

    Without a line end near enough (either side would vanish) the cut is within a line."""
    if len(text) < 2:
        raise UserError("the text is too small to split into train and val: give more text")
    target = min(max(1, round(len(text) * (1 - val_share))), len(text) - 1)
    ends = text.rfind("\n", 0, target) + 1, text.find("\n", target) + 1
    near = [end for end in ends if abs(end - target) < min(target, len(text) - target)]
    cut = min(near, key=lambda end: abs(end - target), default=target)
    return {"train": [text[:cut]], "val": [text[cut:]]}


def split_by_document(named_texts, val_share=0.05):
    """[(name, text)] -> {"train": [text], "val": [text]}, whole documents, chosen by a hash of the name.

    Neither side is empty: a single document is cut at a line end instead."""
    if len(named_texts) == 1:
        return cut_at_line(named_texts[0][1], val_share)
    by_hash = sorted(named_texts, key=lambda item: hashlib.sha256(item[0].encode()).digest())
    texts = [text for _, text in by_hash]
    n_val = max(1, round(len(texts) * val_share))
    return {"train": texts[n_val:], "val": texts[:n_val]}


def download(urls, path, checksum):
    """Fetch path from the first of urls that answers with the expected content; nothing to do if it is there.

    checksum: a sha256, or "md5:..." where nothing better is published. UserError when all fail, saying what
    to do by hand; path then does not exist or is unchanged."""
    path, kind = Path(path), "md5" if checksum.startswith("md5:") else "sha256"
    checksum = checksum.removeprefix("md5:")
    if path.is_file() and hashlib.new(kind, path.read_bytes()).hexdigest() == checksum:
        return
    part, failures = path.with_name(path.name + ".part"), []
    for url in urls:
        try:
            digest = hashlib.new(kind)
            with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                    while chunk := response.read(1 << 16):
                        file.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
            if digest.hexdigest() != checksum:
                raise ValueError(f"wrong content, {kind} {digest.hexdigest()}")
            return os.replace(part, path)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"  {url}\n    {error}")
        finally:
            part.unlink(missing_ok=True)
    raise UserError(f"cannot download {path.name} ({kind} {checksum}):\n" + "\n".join(failures) + "\n"
                    f"Fetch it by hand and put it at {path}, or name it with --source FILE")


# ---- token files

def _encode(encoding, texts, label):
    """list of str -> (T,) uint16, EOT after each; EOT written out in a text is ordinary text there."""
    parts, batch = [], 32
    for i in tqdm(range(0, len(texts), batch), desc=f"encode {label}", disable=None):
        for ids in encoding.encode_ordinary_batch(texts[i : i + batch]):
            parts.append(to_uint16([*ids, encoding.eot_token], encoding.n_vocab))
    return np.concatenate(parts)


def write_set(out, documents, vocab_size, *, name, source, prompt):
    """Train a tokenizer on documents["train"] and write the prepared set into the folder out.

    documents: {"train": [text], "val": [text]}; source: one line about the origin; prompt: text to sample
    from. All files are written beside their place and moved at the end, so out never holds half a set."""
    start, out = time.perf_counter(), Path(out)
    encoding = train_tokenizer(documents["train"], vocab_size)
    meta = {"name": name, "source": source, "vocab_size": vocab_size, "prompt": prompt, "splits": {}}
    print(f"{name}: {source}, vocabulary {vocab_size}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=out) as part:
            part = Path(part)
            for split, texts in documents.items():
                tokens, size = _encode(encoding, texts, split), sum(len(text.encode()) for text in texts)
                tokens.tofile(part / f"{split}.bin")
                meta["splits"][split] = {"documents": len(texts), "tokens": len(tokens), "bytes": size}
                print(f"{split:>6}: {len(texts):,} documents, {size:,} bytes, {len(tokens):,} tokens, "
                      f"{size / len(tokens):.2f} bytes per token")
            save_tokenizer(part / "tokenizer.json", encoding)
            (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8", newline="\n")
            (out / "meta.json").unlink(missing_ok=True)
            for file in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
                os.replace(part / file, out / file)
    except OSError as error:
        raise UserError(f"cannot write the data set: {error}") from None
    out = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    print(f"wrote {out} in {time.perf_counter() - start:.1f} s")


class DataSet(NamedTuple):
    train: np.ndarray  # (T,) read-only memory map of uint16 token ids
    val: np.ndarray
    encoding: tiktoken.Encoding
    meta: dict  # meta.json


def is_prepared(folder):
    """True when the folder holds a complete data set."""
    return (Path(folder) / "meta.json").is_file()


def load_set(folder):
    """Folder -> DataSet, fully checked, so that training need not: UserError says what is wrong."""
    folder, tokens = Path(folder), {}
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        encoding = load_tokenizer(folder / "tokenizer.json")
        if not isinstance(meta["prompt"], str) or meta["vocab_size"] != encoding.n_vocab:
            raise ValueError(f"meta.json says {meta['vocab_size']} tokens, tokenizer.json {encoding.n_vocab}")
        for split in ("train", "val"):
            path, length = folder / f"{split}.bin", meta["splits"][split]["tokens"]
            size = path.stat().st_size
            if size == 0 or size != 2 * length:
                raise ValueError(f"{path.name} has {size} bytes, meta.json says {length} tokens of 2 bytes")
            tokens[split] = np.memmap(path, dtype="<u2", mode="r")
            if (largest := tokens[split].max()) >= encoding.n_vocab:
                raise ValueError(f"{path.name} has a token {largest}, the vocabulary is {encoding.n_vocab}")
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        script = folder / "prepare.py"
        again = script if script.is_file() else f"data/text/prepare.py --source PATH --out {folder}"
        problem = "is damaged" if is_prepared(folder) else "is not prepared"
        raise UserError(f"the data set {folder} {problem} ({error}): run python {again}") from None
    return DataSet(tokens["train"], tokens["val"], encoding, meta)
