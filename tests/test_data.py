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
from test_scripts import refused

from data import common
from data.batches import open_data
from data.common import UserError
from data.pairs import prepare as pairs
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


def run(script, tmp_path, *words, vocab_size=300):
    """Prepare a set with the real script -> its folder."""
    script.main([*map(str, words), "--vocab-size", str(vocab_size), "--out", str(tmp_path / "set")])
    return tmp_path / "set"


def decoded(data, split):
    """The documents of a split."""
    return data.encoding.decode(getattr(data, split).tolist()).split(common.EOT)[:-1]


@pytest.fixture
def prepared(tmp_path):
    """A small complete data set made from a folder."""
    return run(pysource, tmp_path, "--source", write_files(tmp_path / "src", sources()))


@pytest.fixture(scope="module")
def encoding():
    """300 tokens, some of them one character of several bytes."""
    return common.train_tokenizer([*sources().values(), "日本語 " * 500], 300)


# ---- tokenizer


@pytest.mark.parametrize("string", [*ODD, "日本語 日本"], ids=range(len(ODD) + 1))
def test_every_string_survives(encoding, string):
    """Fault: a character that no alternative of the split pattern matches is dropped without a word; bits per
    byte with a wrong denominator: characters instead of bytes, or EOT counted."""
    ids, sizes = encoding.encode_ordinary(string), common.token_bytes(encoding)
    assert encoding.decode(ids) == string and sizes[ids].sum() == len(string.encode())
    assert sizes.shape == (300,) and sizes[encoding.eot_token] == 0


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


def test_ids_that_do_not_fit_are_refused():
    """Fault: numpy's astype(uint16) turns 70000 into 4464 and -1 into 65535; the writer's array must not."""
    for wrong in 70000, -1:
        with pytest.raises(OverflowError):
            np.array([wrong], "<u2")


# ---- texts


def test_reading_a_folder(tmp_path, capsys):
    """Fault: BOM or CR in the tokens, a crash on a binary file, hidden files, a document counted twice."""
    write_files(tmp_path, {
        "b/x.txt": b"\xef\xbb\xbfone\r\ntwo\r\n", "a.txt": "three\n", "copy.txt": "one\ntwo\n",
        "latin.txt": b"caf\xe9", "binary.txt": b"a\0b", "empty.txt": " \n", "note.md": "four",
        ".git/config.txt": "five", "skip/y.txt": "six"})
    texts = common.read_texts([tmp_path], suffixes=[".txt"], skip=["skip"])
    assert texts == [("a.txt", "three\n"), ("b/x.txt", "one\ntwo\n")]
    out = capsys.readouterr().out
    assert "2 not UTF-8 text" in out and "1 empty" in out and "1 duplicate" in out


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_archive_reads_as_its_folder(tmp_path, suffix, monkeypatch):
    """Fault: names or order of an archive differ from the folder, and with them the split; an archive without
    an upper limit fills the memory."""
    folder = write_files(tmp_path / "src", sources(5))
    with tarfile.open(tmp_path / f"x.{suffix}", "w:" + suffix[4:]) as archive:
        archive.add(folder, arcname=".")
    texts = common.read_texts([folder])
    monkeypatch.setattr(common, "ARCHIVE_LIMIT", sum(len(text) for _, text in texts))
    assert common.read_texts([tmp_path / f"x.{suffix}"]) == texts
    monkeypatch.setattr(common, "ARCHIVE_LIMIT", common.ARCHIVE_LIMIT - 1)
    with pytest.raises(UserError, match=f"x.{suffix} holds over .* bytes: unpack it"):
        common.read_texts([tmp_path / f"x.{suffix}"])


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
    data, split = common.load_set(prepared), common.split_by_document(sorted(sources().items()))
    for name, tokens in ("train", data.train), ("val", data.val):
        assert tokens.dtype == np.uint16 and not tokens.flags.writeable
        assert decoded(data, name) == split[name] and tokens[-1] == 299
        assert data.meta["splits"][name] == {"documents": (tokens == 299).sum(), "tokens": len(tokens),
                                             "bytes": sum(len(text.encode()) for text in split[name])}


def test_eot_written_out_in_a_document_is_text(tmp_path):
    """Fault: a document that talks about <|endoftext|> ends early, or makes tiktoken refuse it."""
    documents = {"train": list(sources().values()), "val": [f"x = '{common.EOT}'\n"]}
    common.write_set(tmp_path, documents, 300, name="n", source="s", prompt="x")
    val = common.load_set(tmp_path).val
    assert (val == 299).sum() == 1 and val[-1] == 299


def rewrite(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


DAMAGE = {
    "meta.json missing": lambda folder: (folder / "meta.json").unlink(),
    "meta.json no JSON": rewrite("meta.json", lambda _: b"{"),
    "meta.json no counts": rewrite("meta.json", lambda _: b'{"vocab_size": 300}'),
    "tokenizer missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "other tokenizer": lambda folder: common.save_tokenizer(
        folder / "tokenizer.json", common.train_tokenizer(sources().values(), 310)),
    "val missing": lambda folder: (folder / "val.bin").unlink(),
    "val empty": rewrite("val.bin", lambda _: b""),
    "train odd": rewrite("train.bin", lambda old: old + b"\0"),
    "train cut": rewrite("train.bin", lambda old: old[:-2]),
    "token 300": rewrite("train.bin", lambda old: np.full(len(old) // 2, 300, "<u2").tobytes()),
    "one text less": rewrite("train.bin", lambda old: old[:-2] + b"\0\0"),
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
    write_files(prepared, {"meta.json": json.dumps(meta), "val.bin": b""})
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
    with pytest.raises(OSError, match="disk full"):
        common.write_set(prepared, {"train": texts, "val": texts[:1]}, 300, name="n", source="s", prompt="x")
    assert not common.is_prepared(prepared) and not list(prepared.glob("*.part"))


@pytest.mark.parametrize("script, words", [(text, ["--source", "a"]),
                                           (pairs, ["--source", "a", "b", "--languages", "xx", "yy"])])
def test_files_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch, script, words):
    """Fault: a power cut leaves names without content; two processes write into one temporary file."""
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_size) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append((str(a), str(b))) or replace(a, b))
    code = "".join(sources().values())
    monkeypatch.chdir(write_files(tmp_path, {"a": code, "b": code.upper()}))
    run(script, tmp_path, *words)
    files = ["train.bin", "val.bin", "tokenizer.json", "meta.json"]
    paths = [str(tmp_path / "set" / file) for file in files]
    assert calls[1::2] == [(f"{path}.{os.getpid()}.part", path) for path in paths]
    assert calls[::2] == [os.path.getsize(path) for path in paths]


def test_duplicates_across_the_splits_are_dropped_from_train(tmp_path, capsys):
    """Fault: a test set that is also trained on; the same test set twice in a folder; --val is ignored."""
    files = sources()
    test = dict(list(files.items())[:3])
    write_files(tmp_path / "train", files)
    write_files(tmp_path / "test", test | {f"copy/{name}": content for name, content in test.items()})
    data = common.load_set(run(text, tmp_path, "--source", tmp_path / "train", "--val", tmp_path / "test"))
    said = capsys.readouterr().out
    assert "3 duplicate" in said and "left out of train: 3 documents that another split has too" in said
    assert sorted(decoded(data, "val")) == sorted(test.values())
    assert sorted(decoded(data, "train")) == sorted(set(files.values()) - set(test.values()))


# ---- opening a set by its name


OWN = '''"""Mine: python data/mine/prepare.py"""
from data.common import script, write_set


@script(source="the text")
def main(source: str = "x = 1\\n", vocab_size: int = 258, out: str = __file__.removesuffix("prepare.py")):
    splits = {"train": [source * 9], "val": [source]}
    write_set(out, splits, vocab_size, name="mine", source="s", prompt="x", code=True)
'''


@pytest.mark.parametrize("name, translate, arguments", [
    ("mine", "", None), ("text", "", "text/prepare.py --source FILE_OR_FOLDER"),
    ("nowhere", "", "text/prepare.py --source FILE_OR_FOLDER --out "),
    ("iwslt14", "de-en", "iwslt14/prepare.py --source DIR"),
    ("nowhere", "de-en", "pairs/prepare.py --source FILE.de FILE.en --languages de en --out "),
])
def test_a_set_prepares_itself_or_is_asked_for(tmp_path, monkeypatch, name, translate, arguments):
    """Fault: batches.py lists the sets that need no argument; Python source is known by its set;
    a command without the arguments that are required."""
    write_files(tmp_path, {f"{path.parent.name}/prepare.py": path.read_bytes()
                           for path in common.HERE.glob("*/prepare.py")} | {"mine/prepare.py": OWN})
    monkeypatch.setattr("data.batches.HERE", tmp_path)
    monkeypatch.setattr("data.__path__", [str(common.HERE), str(tmp_path)])
    if arguments:
        with pytest.raises(UserError, match=f"is not prepared .*: run python data/{arguments}"):
            open_data(name, translate)
    else:
        folder, data = open_data(name, translate)
        assert folder == tmp_path / "mine" and data.meta["code"] is True


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
        def read(self):
            raise OSError("connection reset")

    monkeypatch.setattr(common.urllib.request, "urlopen", lambda url, timeout: Broken())
    with pytest.raises(UserError, match="connection reset"):
        common.download(["https://mirror.example/input.txt"], tmp_path / "input.txt", "0" * 64)
    assert not list(tmp_path.iterdir())


# ---- scripts


def test_shakespeare_split_is_contiguous(tmp_path):
    """Fault: --source ignored (network), shuffled lines, or a cut far from 90 %."""
    play = "".join(f"SPEAKER {i % 7}:\nWhat says line {i} of {i * i}?\n\n" for i in range(300))
    write_files(tmp_path, {"input.txt": play.replace("\n", "\r\n")})
    data = common.load_set(run(shakespeare, tmp_path, "--source", tmp_path / "input.txt"))
    [head], [tail] = decoded(data, "train"), decoded(data, "val")
    assert head + tail == play and head.endswith("\n") and abs(len(tail) / len(play) - 0.1) < 0.01


def test_pysource_leaves_tests_out_and_knows_stdlib(tmp_path, monkeypatch, capsys):
    """Fault: the default set needs a path or takes test folders, other suffixes and site-packages in."""
    files = sources() | {"lib/tests/test_a.py": "a = 1", "site-packages/p.py": "b = 1", "readme.txt": "c"}
    write_files(tmp_path / "lib", files)
    monkeypatch.setattr(pysource.sysconfig, "get_path", {"stdlib": str(tmp_path / "lib")}.__getitem__)
    meta = common.load_set(run(pysource, tmp_path)).meta
    assert sum(split["documents"] for split in meta["splits"].values()) == len(sources()) and meta["code"]
    out = capsys.readouterr().out
    assert "38 documents" in out and "bytes per token" in out and str(tmp_path / "set") in out


@pytest.mark.parametrize("argv, said", [
    ("--source nowhere.txt", "nowhere.txt"), ("--source a.txt --vocab-size 60000", "yields only"),
    ("--source a.txt --out a.txt", "a.txt"), ("--source latin.txt", "no UTF-8 text files in latin.txt"),
    ("--source a.txt --val no.txt", "no.txt"), ("--source a.txt --val a.txt", "are left to train on")])
def test_user_mistake_is_a_message_not_a_traceback(tmp_path, monkeypatch, capsys, argv, said):
    """Fault: a traceback, or exit status 0 after a failure, so that a shell script goes on."""
    files = {"a.txt": "\n".join(sources().values()), "latin.txt": b"caf\xe9"}
    monkeypatch.chdir(write_files(tmp_path, files))
    err = refused(capsys, text.main, "--vocab-size", "300", *argv.split())
    assert err.startswith("error: ") and said in err


def test_script_runs_from_any_folder(tmp_path):
    """Fault: `python path/to/prepare.py` cannot import its own project outside the repository root."""
    write_files(tmp_path / "src", sources())
    script = Path(text.__file__)
    argv = [sys.executable, str(script), "--source", "src", "--vocab-size", "300", "--out", "novels"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert common.load_set(tmp_path / "novels").meta["name"] == "novels"
