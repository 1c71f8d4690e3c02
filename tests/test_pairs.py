"""Sentence pairs from files to batches: nothing lost, nothing misaligned, bad files refused."""
import gzip
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import WORDS
from test_scripts import refused

from data import parallel
from data.batches import Buckets, places
from data.common import UserError
from data.iwslt14 import prepare as iwslt14
from data.multi30k import prepare as multi30k
from data.pairs import prepare
from routing import FAR


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        (folder / name.replace("__", ".")).write_bytes("".join(f"{line}\n" for line in lines).encode())
    return folder


DE = ["ein hund und eine katze", "und ein mann", "eine frau und ein kind"] * 4
EN = ["a dog and a cat", "and a man", "a woman and a child"] * 4


def test_a_set_comes_back_as_it_was(pairs):
    """Sentences joined or shifted against their translations; originals changed."""
    data = parallel.load_pairs(pairs)
    assert set(data.splits) == {"train", "val", "test"} and data.meta["languages"] == ["aa", "bb"]
    for split, sides in data.splits.items():
        assert len(sides["aa"]) == len(sides["bb"]) == data.meta["splits"][split]["pairs"]
        if split != "train":
            for language in ("aa", "bb"):
                texts = [parallel.sentence(data.encoding, ids.tolist()) for ids in sides[language]]
                assert texts == data.originals(split, language)
    for a, b in zip(data.splits["train"]["aa"], data.splits["train"]["bb"], strict=True):
        words = parallel.sentence(data.encoding, a.tolist()).split()
        assert parallel.sentence(data.encoding, b.tolist()).split() == [WORDS[w] for w in words]


def test_the_first_word_is_cut_like_any_other(pairs):
    """Two tokens for one word, the rarer one at the beginning of sentences."""
    encoding = parallel.load_pairs(pairs).encoding
    ids, one = parallel.sentence_ids(encoding, "otter otter "), parallel.sentence_ids(encoding, "otter")
    assert ids == [*one[:-1], *one] and ids[-1] == encoding.eot_token
    assert parallel.sentence(encoding, ids) == "otter otter"


def test_lines_end_where_the_file_says(tmp_path):
    """splitlines, which ends a line at U+2028; CRLF, a byte order mark, a missing last line end, gzip."""
    (tmp_path / "a").write_bytes("\ufeffeins\u2028zwei\r\n\r\ndrei".encode())
    assert parallel.read_lines(tmp_path / "a") == ["eins\u2028zwei", "", "drei"]
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"x\ny\n"))
    assert parallel.read_lines(parallel.find_file(tmp_path, ["b"])) == ["x", "y"]


def test_files_that_do_not_belong_together_are_refused(tmp_path, capsys):
    """Training on misaligned, swapped or identical texts without a word."""
    folder = write(tmp_path / "d", train__de=DE, train__en=EN, short=EN[:-1], empty=[], same=DE)
    (folder / "latin").write_bytes("käse\n".encode("latin-1") * 12)
    (folder / "broken.gz").write_bytes(gzip.compress(b"x\n" * 1000)[:-9])

    def no(a, b, *words):
        return refused(capsys, prepare.main, "--source", folder / a, folder / b, "--languages", "de", "en",
                       "--out", tmp_path / "out", *words)
    assert "12 lines and" in no("train.de", "short") and "has 11" in no("train.de", "short")
    assert "the same text" in no("train.de", "same") and "are empty" in no("empty", "empty")
    assert "does not look like 'de'" in no("train.en", "train.de")
    assert "not UTF-8" in no("train.de", "latin") and "cannot read" in no("train.de", "nowhere")
    assert "cannot read" in no("train.de", "broken.gz")
    assert "two different names" in no("train.de", "train.en", "--languages", "de", "de")
    assert "yields only" in no("train.de", "train.en", "--vocab-size", "4000")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, dev", [(multi30k, "val"), (iwslt14, "valid")])
def test_the_official_layouts_from_a_folder(tmp_path, capsys, script, dev):
    """--source DIR of files that somebody already has, plain or .gz; a missing one is named."""
    tests = ["test_2016_flickr", "test_2017_flickr"] if script is multi30k else ["test"]
    names = ["train", dev, *tests]
    folder = write(tmp_path / "d", **{f"{n}__{lang}": text for n in names
                                      for lang, text in (("de", DE), ("en", EN))})
    plain = (folder / "train.de").read_bytes()
    (folder / "train.de.gz").write_bytes(gzip.compress(plain))
    (folder / "train.de").unlink()
    script.main(["--source", str(folder), "--vocab-size", "265", "--out", str(tmp_path / "out")])
    data = parallel.load_pairs(tmp_path / "out")
    assert list(data.splits) == ["train", "val", *tests] and len(data.splits["val"]["en"]) == 12
    assert data.originals(tests[0], "en") == EN
    assert data.meta["tokenize"] == ("13a" if script is multi30k else "none")
    (folder / f"{dev}.en").unlink()
    assert f"has no {dev}.en" in refused(capsys, script.main, "--source", folder, "--out", tmp_path / "o2")


def test_the_talks_are_taken_out_of_their_archive(tmp_path):
    """Tags left in the text, a line dropped on one side only, the wrong talks for testing."""
    with tarfile.open(tmp_path / "t.tgz", "w:gz") as tar:
        talk = "<url>u</url>\n<title> Ein Titel</title>\nEin Satz. \n\n<keywords>k\n"
        files = {"train.tags.de-en.de": talk}
        for name in iwslt14.TESTS:
            files[f"IWSLT14.{name}.de-en.de.xml"] = f"<d>\n<seg id=\"1\"> {name} &amp; so’s </seg>\n</d>\n"
        for name, text in files.items():
            entry = tarfile.TarInfo(f"de-en/{name}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    found = iwslt14.texts_of(tmp_path / "t.tgz", "de")
    assert found["train"] == ["Ein Titel", "Ein Satz.", "", ""]
    assert found["test"] == [f"{name} & so's" for name in iwslt14.TESTS]
    assert iwslt14.fits(["a"] * 3, ["b"] * 2) and not iwslt14.fits(["a"] * 4, ["b"] * 2)
    assert not iwslt14.fits([], ["b"])


def test_pairs_with_an_empty_side_are_left_out_of_training(tmp_path, capsys):
    folder = write(tmp_path / "d", a=[*DE, "", "x"], b=[*EN, "y", " "])
    prepare.main(["--source", str(folder / "a"), str(folder / "b"), "--languages", "de", "en", "--vocab-size",
                  "260", "--val", str(folder / "a"), str(folder / "b"), "--out", str(tmp_path / "out")])
    assert "2 pairs with an empty side" in capsys.readouterr().out
    meta = json.loads((tmp_path / "out" / "meta.json").read_text("utf-8"))
    assert meta["splits"]["train"]["pairs"] == 12 and meta["splits"]["val"]["pairs"] == 14


@pytest.mark.parametrize("damage", ["missing", "cut", "one sentence less", "outside"])
def test_a_damaged_set_is_refused(pairs, tmp_path, damage):
    folder = shutil.copytree(pairs, tmp_path / "copy")
    path = folder / "val.bb.bin"
    tokens = np.fromfile(path, "<u2")
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        tokens[:-1].tofile(path)
    elif damage == "outside":
        np.where(tokens == 299, 299, 400).astype("<u2").tofile(path)
    else:
        tokens[np.flatnonzero(tokens == 299)[3]] = 5
        tokens.tofile(path)
    with pytest.raises(UserError, match="is damaged.*val.bb.bin"):
        parallel.load_pairs(folder)


def random_pairs(count=300, end=99):
    draw = np.random.default_rng(0)
    return [[np.append(draw.integers(0, 90, draw.integers(1, 20)), end).astype(np.uint16)
             for _ in range(count)] for _ in range(2)]


def test_an_epoch_has_every_pair_once_and_batches_stay_under_their_limit():
    """Pairs lost at the ends of buckets, batches that overflow the memory, epochs that are all alike."""
    source, target = random_pairs()
    data = Buckets(source, target, 99, 128, 18)
    fits = [n for n in range(300) if max(len(source[n]), len(target[n])) <= 18]
    assert data.left_out == 300 - len(fits) > 0

    def rows(t):
        batch = data.step(7, t)
        assert batch.ids.numel() <= 128 and batch.source[0].numel() <= 128
        assert batch.count == (batch.targets >= 0).sum() == batch.live.sum()
        return [(tuple(s[p < FAR].tolist()), tuple(y[y >= 0].tolist())) for s, p, y in
                zip(*batch.source, batch.targets, strict=True)]
    n = len(data.cuts)
    epochs = [[rows(t) for t in range(e * n, (e + 1) * n)] for e in (0, 1)]
    whole = sorted((tuple(source[i].tolist()), tuple(target[i].tolist())) for i in fits)
    for epoch in epochs:
        assert sorted(pair for batch in epoch for pair in batch) == whole
    assert {frozenset(b) for b in epochs[0]} != {frozenset(b) for b in epochs[1]}
    assert rows(5) == epochs[0][5] and sorted(map(len, epochs[0])) == sorted(map(len, epochs[1]))


def test_what_a_batch_of_pairs_holds():
    """A decoder that sees its target, or padding that has a position."""
    source, target = [np.array([5, 6, 9]), np.array([7, 9])], [np.array([1, 9]), np.array([2, 3, 4, 9])]
    batch = Buckets(source, target, 9, 100, 50).at([0, 1])
    assert batch.ids.tolist() == [[9, 1, 0, 0], [9, 2, 3, 4]]
    assert batch.targets.tolist() == [[1, 9, -1, -1], [2, 3, 4, 9]]
    assert batch.pos.tolist() == [[0, 1, FAR, FAR], [0, 1, 2, 3]]
    assert batch.source[0].tolist() == [[5, 6, 9], [7, 9, 0]]
    assert batch.source[1].tolist() == [[0, 1, 2], [0, 1, FAR]]
    assert [len(b.ids) for b in batch.cut(2)] == [1, 1] and len(batch.cut(5)) == 2
    assert torch.equal(batch.cut(2)[1].source[0], batch.source[0][1:])
    assert places([2, 1]).tolist() == [[0, 1], [0, FAR]]


def test_evaluation_takes_all_pairs_or_some_of_every_length():
    """A validation loss over short sentences only."""
    data = Buckets(*random_pairs(), 99, 128, 18)
    assert sum(len(b.ids) for b in data.fixed(10**6)) == 300 - data.left_out
    some = data.fixed(3)
    lengths = [max(b.ids.size(1), b.source[0].size(1)) for b in some]
    assert len(some) == 3 and lengths[0] < lengths[1] < lengths[2] == 18


def test_nothing_fits():
    with pytest.raises(UserError, match="at most 1 tokens"):
        Buckets(*random_pairs(), 99, 128, 1)
