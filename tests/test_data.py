"""data/: preparing a set, reading it back, and what happens when the input or the files are bad."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data import common
from data.common import UserError
from data.pysource import prepare as pysource
from data.shakespeare import prepare as shakespeare
from data.text import prepare as text

ODD = [
    "", " ", "\n", "a\r\nb\rc", "\t\tx\n\t y  z ", "\n\n    \n  if x:\n        pass",
    "snake_case __init__ a->b!=c ...",
    "\0\x1b\x7f\x85\xa0\u2028\u3000", "naïve e\u0301 e\u0301\u0302", "हिन्दी ไทย עברית 漢字かな",
    "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈",
    "½ Ⅷ ٣٤٥٦ 1234567", "\ufeff\ue000\uffff\U0010ffff", common.EOT, "x" * 5000 + " " * 5000,
    "".join(map(chr, range(0x3000))),
]


def sources(n=40):
    """n different small Python files: {name: text}."""
    return {
        f"part{i % 3}/mod_{i}.py": f'"""Module {i}."""\n\n\nclass Thing{i}:\n    def value(self, x):\n'
        f"        if x is None:\n            return {i * i}\n        return self.value(x - {i}) + {i * 37}\n"
        for i in range(n)
    }


def write_files(folder, files):
    """{name: str or bytes} -> files below folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def prepared(tmp_path):
    """A small complete data set made by the real script from a folder."""
    write_files(tmp_path / "src", sources())
    pysource.main(["--source", str(tmp_path / "src"), "--vocab-size", "300", "--out", str(tmp_path / "set")])
    return tmp_path / "set"


@pytest.fixture(scope="module")
def encoding():
    """300 tokens, some of them one character of several bytes."""
    return common.train_tokenizer([*sources().values(), "日本語 " * 500], 300)


# ---- tokenizer


@pytest.mark.parametrize("string", ODD, ids=range(len(ODD)))
def test_every_string_survives(encoding, string):
    """Fault: a character that no alternative of the split pattern matches is dropped without a word."""
    assert encoding.decode(encoding.encode_ordinary(string)) == string


def test_indentation_is_one_token(encoding):
    """Fault: line end and indentation cut apart, or a space taken away for the next word."""
    pieces = [encoding.decode([i]) for i in encoding.encode_ordinary("\n        return self.x")]
    assert pieces[:2] == ["\n        ", "return"]


def test_tokenizer_is_the_same_every_time_and_after_reading(tmp_path):
    """Fault: a vocabulary that differs from run to run, ids that move when saved, EOT not the last id."""
    first, second = (common.train_tokenizer(sources().values(), 350) for _ in range(2))
    common.save_tokenizer(tmp_path / "a.json", first)
    common.save_tokenizer(tmp_path / "b.json", second)
    again = common.load_tokenizer(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert again.n_vocab == first.n_vocab == 350 and again.eot_token == first.eot_token == 349
    for string in ODD:
        assert again.encode_ordinary(string) == first.encode_ordinary(string)


BYTES = [chr(b) for b in range(256)]
DAMAGED_TOKENIZERS = [{}, [], {"pattern": "x", "tokens": [1]}, {"pattern": "(", "tokens": BYTES},
                      {"pattern": "x", "tokens": BYTES[1:]}, {"pattern": "x", "tokens": [*BYTES, "ab", "ab"]}]


@pytest.mark.parametrize("content", ["", "{", *map(json.dumps, DAMAGED_TOKENIZERS)], ids=range(8))
def test_damaged_tokenizer(tmp_path, content):
    """Fault: KeyError, or a panic inside tiktoken at the first encode, instead of a message."""
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="prepare the data set again"):
        common.load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("vocab_size, message", [(0, "out of range"), (257, "out of range"),
                                                 (65537, "out of range"), (5000, "yields only 262 tokens")])
def test_vocabulary_that_cannot_be(vocab_size, message):
    """Fault: a panic below 256, ids beyond 16 bits, or quietly fewer tokens than asked for."""
    with pytest.raises(UserError, match=message):
        common.train_tokenizer(["hello hello hello"], vocab_size)


def test_bytes_of_tokens_add_up(encoding):
    """Fault: bits per byte with a wrong denominator: characters instead of bytes, or EOT counted."""
    sizes = common.token_bytes(encoding)
    assert sizes.shape == (300,) and sizes[encoding.eot_token] == 0
    for string in (*ODD, "日本語 日本"):
        assert sizes[encoding.encode_ordinary(string)].sum() == len(string.encode())


def test_ids_that_do_not_fit_are_refused():
    """Fault: numpy's astype(uint16) turns 70000 into 4464 and -1 into 65535."""
    assert common.to_uint16([0, 299], 300).tolist() == [0, 299]
    assert common.to_uint16([], 300).dtype == np.uint16
    for ids, vocab_size in ([70000], 100_000), ([-1], 300), ([300], 300):
        with pytest.raises(UserError, match="do not fit"):
            common.to_uint16(ids, vocab_size)


# ---- texts


def test_reading_a_folder(tmp_path, capsys):
    """Fault: BOM or CR in the tokens, a crash on a binary file, hidden files, a document counted twice."""
    files = {"b/x.txt": b"\xef\xbb\xbfone\r\ntwo\r\n", "a.txt": "three\n", "copy.txt": "one\ntwo\n",
             "latin.txt": b"caf\xe9", "binary.txt": b"a\0b", "empty.txt": " \n", "note.md": "four",
             ".git/config.txt": "five", "skip/y.txt": "six"}
    write_files(tmp_path, files)
    found = common.read_texts([tmp_path], suffixes=[".txt"], skip=["skip"])
    assert found == [("a.txt", "three\n"), ("b/x.txt", "one\ntwo\n")]
    out = capsys.readouterr().out
    assert "2 not UTF-8 text" in out and "1 empty" in out and "1 duplicate" in out


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_archive_reads_as_its_folder(tmp_path, suffix):
    """Fault: names or order of an archive differ from the folder, and with them the split."""
    folder = write_files(tmp_path / "src", sources(5))
    with tarfile.open(tmp_path / f"x.{suffix}", "w:" + suffix[4:]) as archive:
        archive.add(folder, arcname=".")
    assert common.read_texts([tmp_path / f"x.{suffix}"]) == common.read_texts([folder])


def test_sources_that_give_nothing(tmp_path):
    """Fault: FileNotFoundError, a decompressor's error, or an empty data set."""
    write_files(tmp_path, {"bad.tar.gz": b"no archive", "empty.txt": "", "folder/a.bin": b"\0"})
    for name in ("missing", "bad.tar.gz", "empty.txt", "folder"):
        with pytest.raises(UserError, match=name):
            common.read_texts([tmp_path / name])


def test_split_is_by_document_and_does_not_move():
    """Fault: Python's hash() (differs per process), order of input matters, one file on both sides."""
    named = sorted(sources(100).items())
    split = common.split_by_document(named)
    assert split == common.split_by_document(named[::-1])
    assert len(split["val"]) == 5 and sorted(split["train"] + split["val"]) == sorted(t for _, t in named)
    assert [name for name, text in named if text in split["val"]] == [
        "part0/mod_0.py", "part0/mod_21.py", "part0/mod_27.py", "part0/mod_57.py", "part1/mod_7.py"
    ]
    assert all(common.split_by_document(named[:2]).values())


@pytest.mark.parametrize("string, tail_size", [
    ("line line\n" * 103, 50), ("line line\n" * 97, 50), ("no end " * 100, 35),
    ("short\n" + "x" * 994, 50), ("ab", 1), ("a\n", 1),
])
def test_single_document_is_cut(string, tail_size):
    """Fault: an empty side, lost text, a cut within a line where a line end is near, or far from 5 %."""
    split = common.split_by_document([("book.txt", string)])
    [head], [tail] = split["train"], split["val"]
    assert head and head + tail == string and len(tail) == tail_size


# ---- the prepared set


def test_prepared_set_holds_the_texts(prepared):
    """Fault: text lost or moved between the splits, EOT missing, wrong counts in meta.json."""
    found = common.load_set(prepared)
    split = common.split_by_document(common.read_texts([prepared.parent / "src"]))
    sizes = common.token_bytes(found.encoding)
    for name, tokens in ("train", found.train), ("val", found.val):
        assert tokens.dtype == np.uint16 and not tokens.flags.writeable
        assert found.encoding.decode(tokens.tolist()) == "".join(t + common.EOT for t in split[name])
        counts = found.meta["splits"][name]
        assert counts["documents"] == len(split[name]) == (tokens == 299).sum()
        assert counts["tokens"] == len(tokens) and counts["bytes"] == sizes[tokens].sum()


def test_eot_written_out_in_a_document_is_text(tmp_path):
    """Fault: a document that talks about <|endoftext|> ends early, or makes tiktoken refuse it."""
    documents = {"train": list(sources().values()), "val": [f"x = '{common.EOT}'\n"]}
    common.write_set(tmp_path, documents, 300, name="n", source="s", prompt="x")
    val = common.load_set(tmp_path).val
    assert (val == 299).sum() == 1 and val[-1] == 299


DAMAGE = {
    "meta.json missing": lambda f: (f / "meta.json").unlink(),
    "meta.json no JSON": lambda f: (f / "meta.json").write_text("{", encoding="utf-8"),
    "meta.json no counts": lambda f: (f / "meta.json").write_text('{"vocab_size": 300}', encoding="utf-8"),
    "tokenizer missing": lambda f: (f / "tokenizer.json").unlink(),
    "other tokenizer": lambda f: common.save_tokenizer(
        f / "tokenizer.json", common.train_tokenizer(sources().values(), 310)
    ),
    "val missing": lambda f: (f / "val.bin").unlink(),
    "val empty": lambda f: (f / "val.bin").write_bytes(b""),
    "train odd": lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes() + b"\0"),
    "train cut": lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-2]),
    "token 300": lambda f: np.full(os.path.getsize(f / "train.bin") // 2, 300, "<u2").tofile(f / "train.bin"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_set_is_refused(prepared, damage):
    """Fault: IndexError in the embedding, a device assert or training on half the data, hours later."""
    DAMAGE[damage](prepared)
    with pytest.raises(UserError, match=r"run python .*prepare\.py"):
        common.load_set(prepared)


def test_empty_file_is_refused_even_if_meta_agrees(prepared):
    """Fault: numpy cannot map an empty file, and a set without validation text is of no use."""
    meta = json.loads((prepared / "meta.json").read_text(encoding="utf-8"))
    meta["splits"]["val"]["tokens"] = 0
    (prepared / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    (prepared / "val.bin").write_bytes(b"")
    with pytest.raises(UserError, match="val.bin has 0 bytes"):
        common.load_set(prepared)


@pytest.mark.parametrize("fail_at", [1, 3])
def test_interrupted_writing_leaves_no_half_set(prepared, monkeypatch, fail_at):
    """Fault: new tokens with an old tokenizer pass for a complete set; temporary files pile up."""
    calls, replace = [], os.replace

    def failing(src, dst):
        calls.append(dst)
        if len(calls) == fail_at:
            raise OSError("disk full")
        replace(src, dst)

    monkeypatch.setattr(os, "replace", failing)
    texts = list(sources(30).values())
    with pytest.raises(UserError, match="disk full"):
        common.write_set(prepared, {"train": texts, "val": texts[:1]}, 300, name="n", source="s", prompt="x")
    assert not common.is_prepared(prepared) and not list(prepared.glob(".part*"))


# ---- download


def test_download_takes_the_mirror_that_works(tmp_path):
    """Fault: a dead first link ends everything, a wrong file is accepted, a message without what to do."""
    good, wrong, path = tmp_path / "good", tmp_path / "wrong", tmp_path / "input.txt"
    good.write_bytes(b"good" * 40000)
    wrong.write_bytes(b"<html>404</html>")
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    urls = [(tmp_path / "dead").as_uri(), wrong.as_uri(), good.as_uri()]
    with pytest.raises(UserError) as error:
        common.download(urls[:2], path, digest)
    for part in (*urls[:2], "input.txt", digest, "wrong content", "--source", str(path)):
        assert part in str(error.value)
    assert not list(tmp_path.glob("input*"))
    common.download(urls, path, digest)
    assert path.read_bytes() == good.read_bytes() and not list(tmp_path.glob("*.part"))
    common.download([], path, digest)  # there already: no URL is asked


def test_download_that_breaks_off(tmp_path, monkeypatch):
    """Fault: half a file under the final name, which the next run takes for the whole."""

    class Broken(io.BytesIO):
        headers = {"Content-Length": "1000"}

        def read(self, size):
            if chunk := super().read(size):
                return chunk
            raise OSError("connection reset")

    monkeypatch.setattr(common.urllib.request, "urlopen", lambda url, timeout: Broken(b"first half"))
    with pytest.raises(UserError, match="connection reset"):
        common.download(["https://mirror.example/input.txt"], tmp_path / "input.txt", "0" * 64)
    assert not list(tmp_path.iterdir())


# ---- scripts


def test_shakespeare_split_is_contiguous(tmp_path):
    """Fault: --source ignored (network), shuffled lines, or a cut far from 90 %."""
    play = "".join(f"SPEAKER {i % 7}:\nWhat says line {i} of {i * i}?\n\n" for i in range(300))
    (tmp_path / "input.txt").write_bytes(play.replace("\n", "\r\n").encode())
    argv = ["--source", str(tmp_path / "input.txt"), "--vocab-size", "300", "--out", str(tmp_path / "set")]
    shakespeare.main(argv)
    found = common.load_set(tmp_path / "set")
    head, tail = (found.encoding.decode(t.tolist()[:-1]) for t in (found.train, found.val))
    assert head + tail == play and head.endswith("\n") and abs(len(tail) / len(play) - 0.1) < 0.01


def test_pysource_leaves_tests_out_and_knows_stdlib(tmp_path, monkeypatch, capsys):
    """Fault: the default set needs a path or takes test folders, other suffixes and site-packages in."""
    files = sources() | {"lib/tests/test_a.py": "a = 1", "site-packages/p.py": "b = 1", "readme.txt": "c"}
    write_files(tmp_path / "lib", files)
    monkeypatch.setattr(pysource.sysconfig, "get_path", {"stdlib": str(tmp_path / "lib")}.__getitem__)
    pysource.main(["--vocab-size", "300", "--out", str(tmp_path / "set")])
    meta = common.load_set(tmp_path / "set").meta
    assert sum(split["documents"] for split in meta["splits"].values()) == len(sources())
    out = capsys.readouterr().out
    assert "38 documents" in out and "bytes per token" in out and str(tmp_path / "set") in out


@pytest.mark.parametrize("argv", [["--source", "nowhere.txt"], ["--source", ".", "--vocab-size", "60000"],
                                  ["--source", ".", "--out", "a.txt"]])
def test_user_mistake_is_a_message_not_a_traceback(tmp_path, monkeypatch, capsys, argv):
    """Fault: a traceback, or exit status 0 after a failure, so that a shell script goes on."""
    monkeypatch.chdir(write_files(tmp_path, {"a.txt": "\n".join(sources().values()), "b.txt": "more text"}))
    with pytest.raises(SystemExit) as stop:
        text.main(["--vocab-size", "300", *argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and "Traceback" not in err


def test_script_runs_from_any_folder(tmp_path):
    """Fault: `python path/to/prepare.py` cannot import its own project outside the repository root."""
    write_files(tmp_path / "src", sources())
    script = Path(text.__file__)
    argv = [sys.executable, str(script), "--source", "src", "--vocab-size", "300", "--out", "novels"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert common.load_set(tmp_path / "novels").meta["name"] == "novels"
