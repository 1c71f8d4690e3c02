"""data/: preparing a set, reading it back, and what happens when the input or the files are bad."""
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import ROOT
from test_scripts import refused

from data import common
from data.batches import open_data
from data.common import UserError
from data.pysource import prepare as pysource
from data.text import prepare as text

ODD = [
    "", "a\r\nb\rc", "\t\tx\n\t y  z ", "\n\n    \n  if x:\n        pass", "__init__ a->b!=c ...", common.EOT,
    "naïve e\u0301 e\u0301\u0302", "हिन्दी ไทย 漢字かな 日本語", "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈",
    "½Ⅷ٣ 1234567", "\ufeff\ue000\uffff\U0010ffff", "x" * 5000 + " " * 5000, "".join(map(chr, range(0x3000))),
]
FILES = {       # a hundred small Python files
    f"part{i % 3}/mod_{i}.py": f"class Thing{i}:\n    def value(self, x):\n        if x is None:\n"
    f"            return {i * i}\n        return self.value(x - {i}) + {i * 37}\n" for i in range(100)}
CODE = list(FILES.values())


def write_files(folder, files):
    """{name: str or bytes} -> files below folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def documents(data, split):
    return data.encoding.decode(data.splits[split].tolist()).split(common.EOT)[:-1]


def test_every_string_survives_and_the_tokenizer_is_the_same_every_time(tmp_path):
    """Fault: a character that no part of the split pattern matches is dropped; bits per byte with a wrong
    denominator: characters instead of bytes, or EOT counted; a vocabulary that differs from run to run, ids
    that move when saved; line end and indentation cut apart, or a space taken away for the next word."""
    texts = [*CODE, "日本語 " * 500]        # some tokens are one character of several bytes
    trained = common.train_tokenizer(texts, 300)
    common.save_tokenizer(tmp_path / "a.json", trained)
    common.save_tokenizer(tmp_path / "b.json", common.train_tokenizer(texts, 300))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    again = common.load_tokenizer(tmp_path / "a.json")
    sizes = common.token_bytes(again)
    assert again.n_vocab == trained.n_vocab == 300 and again.eot_token == trained.eot_token == 299
    assert sizes.shape == (300,) and sizes[299] == 0
    for string in ODD:
        ids = again.encode_ordinary(string)
        assert ids == trained.encode_ordinary(string) and sizes[ids].sum() == len(string.encode())
        assert again.decode(ids) == string
    ids = again.encode_ordinary("\n        return self.x")
    assert [again.decode([i]) for i in ids[:2]] == ["\n        ", "return"]


@pytest.mark.parametrize("packed", ["", "gz", "xz"])
def test_reading_a_folder_and_an_archive_of_it(tmp_path, capsys, monkeypatch, packed):
    """Fault: BOM or CR in the tokens, a crash on a binary file, hidden files, a document counted twice; other
    names or another order in an archive than in its folder, no upper limit of its size."""
    folder, path = tmp_path / "src", tmp_path / f"x.tar.{packed}".rstrip(".")
    write_files(folder, {
        "b/x.txt": b"\xef\xbb\xbfone\r\ntwo\r\n", "a.txt": "three\n", "copy.txt": "one\ntwo\n",
        "latin.txt": b"caf\xe9", "binary.txt": b"a\0b", "empty.txt": " \n", "note.md": "four",
        ".git/config.txt": "five", "skip/y.txt": "six"})
    with tarfile.open(path, f"w:{packed}") as archive:
        archive.add(folder, arcname=".")
    monkeypatch.setattr(common, "ARCHIVE_LIMIT", 36)       # bytes of the first six files
    for source in folder, path:
        texts = common.read_texts([source], suffixes=[".txt"], skip=["skip"])
        out = capsys.readouterr().out
        assert texts == [("a.txt", "three\n"), ("b/x.txt", "one\ntwo\n")]
        assert "2 not UTF-8 text" in out and "1 empty" in out and "1 duplicate" in out
    monkeypatch.setattr(common, "ARCHIVE_LIMIT", 35)
    with pytest.raises(UserError, match="holds over 35 bytes: unpack it"):
        common.read_texts([path], suffixes=[".txt"], skip=["skip"])


def test_split_is_by_document_and_does_not_move():
    """Fault: Python's hash() (differs per process), order of input matters, one file on both sides; of a
    single document an empty side, lost text, a cut within a line or far from 5 %."""
    named = sorted(FILES.items())
    split = common.split_by_document(named)
    assert split == common.split_by_document(named[::-1])
    assert sorted(split["train"] + split["val"]) == sorted(CODE)
    assert sorted(split["val"]) == sorted(CODE[n] for n in (0, 7, 21, 27, 57))
    assert all(common.split_by_document(named[:2]).values())
    for string, size in (("line line\n" * 103, 60), ("line line\n" * 97, 50), ("no end " * 100, 35),
                         ("short\n" + "x" * 994, 50), ("ab", 1), ("a\n", 1)):
        split = common.split_by_document([("book.txt", string)])
        [head], [tail] = split["train"], split["val"]
        assert head and head + tail == string and len(tail) == size


def test_prepared_set_holds_the_texts(tmp_path, monkeypatch):
    """Fault: the default set needs a path or takes test folders, other suffixes and site-packages in; text
    lost or moved between the splits, EOT missing, wrong counts in meta.json; a document that has
    <|endoftext|> in its text ends early, or makes tiktoken refuse it."""
    files = FILES | {"part0/eot.py": f"x = '{common.EOT}'\n"}
    more = {"tests/test_a.py": "a = 1", "site-packages/p.py": "b = 1", "readme.txt": "c"}
    folder = write_files(tmp_path / "lib", files | more)
    monkeypatch.setattr(pysource.sysconfig, "get_path", {"stdlib": str(folder)}.__getitem__)
    pysource.main(["--vocab-size", "300", "--out", str(tmp_path / "set")])
    data = common.load_set(tmp_path / "set")
    for name, texts in common.split_by_document(sorted(files.items())).items():
        ids = data.splits[name]
        assert ids.dtype == np.uint16 and not ids.flags.writeable
        assert data.encoding.decode(ids.tolist()) == "".join(text + common.EOT for text in texts)
        assert data.meta["splits"][name] == {"documents": len(texts), "tokens": len(ids),
                                             "bytes": sum(len(text.encode()) for text in texts)}


TOKENS = [*map(chr, range(256)), *(f"xx{n}" for n in range(43))]
TOKENIZERS = [{}, [], {"pattern": "x", "tokens": [1]}, {"pattern": "(", "tokens": TOKENS},
              {"pattern": "x", "tokens": TOKENS[1:]}, {"pattern": "x", "tokens": [*TOKENS, "y"]}]
@pytest.mark.parametrize("content", TOKENIZERS, ids=range(len(TOKENIZERS)))
def test_a_tokenizer_of_other_content_is_refused(tmp_path, content):
    """Fault: KeyError, a panic in tiktoken, tokens that repeat."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match="cannot read .*tokenizer"):
        common.load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("change", [{"vocab_size": 310}, {"splits": {}}, {"languages": ["aa", "bb"]}])
def test_other_words_about_a_set_are_refused(dataset, tmp_path, change):
    """Fault: an IndexError, hours later; a KeyError; a text that is read as sentence pairs."""
    folder = shutil.copytree(dataset, tmp_path / "set")
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | change), "utf-8")
    said = r"is damaged \(.*meta.*run python .*prepare\.py"
    with pytest.raises(UserError, match="sentence pairs" if "languages" in change else said):
        common.load_set(folder)


@pytest.mark.parametrize("fail_at", [1, 5, 7, 9])
def test_writing_is_whole_or_not_at_all(dataset, tmp_path, monkeypatch, fail_at):
    """Fault: an old set lost to a full disk; half a set that passes for a whole; files without content."""
    folder = shutil.copytree(dataset, tmp_path / "set")
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    synced, named, sync, replace = [], [], os.fsync, os.replace

    def name(part, path):
        named.append(os.path.basename(path))
        if len(named) == fail_at:
            raise OSError("disk full")
        assert len(named) > 4 or synced[-1] == os.path.getsize(part)
        replace(part, path)

    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or sync(fd))
    monkeypatch.setattr(os, "replace", name)
    with pytest.raises((UserError, OSError), match="disk full") if fail_at < 9 else contextlib.nullcontext():
        common.write_set(folder, {"train": CODE, "val": CODE[:1]}, 300, name="n", source="s", prompt="x")
    now = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert now.keys() == old.keys() and (now == old) == (fail_at <= 5) and len(synced) == min(fail_at, 4)
    assert fail_at < 8 or named[3] == named[7] == "meta.json"
    with pytest.raises(UserError, match="damaged") if fail_at == 7 else contextlib.nullcontext():
        assert common.load_set(folder).meta["name"] == ("n" if fail_at == 9 else "tiny")


def test_a_set_prepares_itself_or_is_asked_for(tmp_path, monkeypatch):
    """Fault: a list in batches.py of the sets that need no argument; a command that lacks required ones."""
    for path in common.HERE.glob("*/prepare.py"):
        name = "mine" if path.parent.name == "pysource" else path.parent.name
        write_files(tmp_path, {f"{name}/prepare.py": path.read_bytes()})
    monkeypatch.setattr("data.batches.HERE", tmp_path)
    monkeypatch.setattr("data.__path__", [str(common.HERE), str(tmp_path)])
    for name, translate, arguments in (
            ("text", "", "text/prepare.py --source FILE_OR_FOLDER"),
            ("nowhere", "", "text/prepare.py --source FILE_OR_FOLDER --out "),
            ("nowhere", "de-en", "pairs/prepare.py --source FILE.de FILE.en --languages de en --out ")):
        with pytest.raises(UserError, match=f"is not prepared .*: run python data/{arguments}"):
            open_data(name, translate)
    monkeypatch.setattr(pysource.sysconfig, "get_path", lambda name: str(ROOT / "tests"))
    assert open_data("mine", "")[0] == tmp_path / "mine" and common.is_prepared(tmp_path / "mine")


def test_download_takes_the_mirror_that_works(tmp_path, monkeypatch):
    """Fault: a dead first link ends everything, a wrong file is accepted, half a file under the final name,
    which the next run takes for the whole; a message without what to do."""
    honest = common.urllib.request.urlopen
    monkeypatch.setattr(common.urllib.request, "urlopen", lambda url, timeout: (
        open(os.devnull, "wb") if url == "broken:" else honest(url, timeout=timeout)))     # cannot be read
    urls = [(tmp_path / "dead").as_uri(), "broken:", "data:,404", "data:,good"]
    path, digest = tmp_path / "input.txt", hashlib.sha256(b"good").hexdigest()
    with pytest.raises(UserError) as error:
        common.download(urls[:3], path, digest)
    for part in (*urls[:3], digest, "wrong content", "--source", str(path)):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())
    common.download(urls, path, digest)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]
    common.download([], path, digest)  # there already: no URL is asked


def test_a_single_document_is_cut_at_a_line(tmp_path):
    """Fault: --source ignored (network), shuffled lines, or a cut far from 95 %."""
    play = "".join(f"SPEAKER {i % 7}:\nWhat says line {i} of {i * i}?\n\n" for i in range(300))
    write_files(tmp_path, {"a.txt": play})
    text.main(["--source", str(tmp_path / "a.txt"), "--vocab-size", "300", "--out", str(tmp_path)])
    data = common.load_set(tmp_path)
    [head], [tail] = documents(data, "train"), documents(data, "val")
    assert head + tail == play and head.endswith("\n") and abs(len(tail) / len(play) - 0.05) < 0.01


def test_own_text_from_any_folder(tmp_path):
    """Fault: a test set that is also trained on; the same test set twice in a folder; --val is ignored;
    `python path/to/prepare.py` cannot import its own project outside the repository root."""
    test = dict(list(FILES.items())[:3])
    write_files(tmp_path / "train", FILES)
    write_files(tmp_path / "test", test | {f"copy/{name}": content for name, content in test.items()})
    words = "--source train --val test --vocab-size 300 --out novels".split()
    out = subprocess.check_output([sys.executable, text.__file__, *words], cwd=tmp_path, encoding="utf-8")
    assert "3 duplicate" in out and "left out of train: 3 documents that another split has too" in out
    data = common.load_set(tmp_path / "novels")
    assert data.meta["name"] == "novels" and sorted(documents(data, "val")) == sorted(CODE[:3])
    assert sorted(documents(data, "train")) == sorted(CODE[3:])


@pytest.mark.parametrize("argv, said", [
    ("nowhere.txt", "nowhere.txt"), ("bad.tar.gz", "bad.tar.gz"), ("x.txt", "too small"),
    ("latin.txt", "no UTF-8 text files in latin.txt"), ("hello.txt --vocab-size 5000", "only 263 tokens"),
    ("a.txt --vocab-size 257", "out of range"), ("a.txt --vocab-size 65537", "out of range"),
    ("a.txt --out a.txt", "a.txt"), ("", "an empty value"), ("a.txt --val a.txt", "are left to train on")])
def test_user_mistake_is_a_message_not_a_traceback(tmp_path, monkeypatch, capsys, argv, said):
    """Fault: a traceback (of a decompressor; a panic below 256), or exit status 0 after a failure, so that a
    shell script goes on; an empty data set, ids beyond 16 bits, quietly fewer tokens than asked for."""
    monkeypatch.chdir(write_files(tmp_path, {"a.txt": "\n".join(CODE), "hello.txt": "hello hello hello",
                                             "latin.txt": b"caf\xe9", "x.txt": "x", "bad.tar.gz": b"x"}))
    err = refused(capsys, text.main, "--vocab-size", "300", "--source", *argv.split(" "))
    assert err.startswith("error: ") and said in err
