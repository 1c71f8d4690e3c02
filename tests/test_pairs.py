"""Sentence pairs from files to batches: nothing lost, nothing misaligned, bad files refused."""
import gzip
import shutil

import numpy as np
import pytest
import torch
from conftest import WORDS
from test_scripts import refused

from data import parallel
from data.batches import NO_POSITION, Buckets, positions_of
from data.common import UserError
from data.iwslt14 import prepare as iwslt14
from data.multi30k import prepare as multi30k
from data.pairs import prepare

DE = ["ein hund und eine katze", "und ein mann", "eine frau und ein kind"] * 4
EN = ["a dog and a cat", "and a man", "a woman and a child"] * 4
VAL = {"dev.de": ["und ein hund", "ein kind"], "dev.en": ["and a dog", "a child"]}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_bytes("".join(f"{line}\n" for line in lines).encode())
    return folder


def test_a_set_comes_back_as_it_was(pairs):
    """Sentences joined or shifted against their translations; originals changed."""
    data = parallel.load_pairs(pairs)
    assert set(data.splits) == {"train", "val", "test"} and data.meta["languages"] == ["aa", "bb"]
    for split, sides in data.splits.items():
        assert len(sides["aa"]) == len(sides["bb"]) == data.meta["splits"][split]["pairs"]
        texts = {language: [parallel.sentence(data.encoding, ids.tolist()) for ids in rows]
                 for language, rows in sides.items()}
        assert texts["bb"] == [" ".join(WORDS[w] for w in line.split()) for line in texts["aa"]]
        if split != "train":
            for language, lines in texts.items():
                file = parallel.read_lines(pairs.parent / f"{split}.{language}")
                assert lines == data.originals(split, language) == file


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
    assert parallel.read_lines(tmp_path / "b") == parallel.read_lines(tmp_path / "b.gz") == ["x", "y"]


@pytest.mark.parametrize("a, b, words, said", [
    ("train.de", "short", "", "has 12 lines|short has 11"), ("train.de", "same", "", "the same text"),
    ("empty", "empty", "", "are empty"), ("blank", "blank", "", "are empty"),
    ("train.en", "train.de", "", "does not look like 'de'"), ("train.de", "latin", "", "latin is not UTF-8"),
    ("train.de", "nowhere", "", "cannot read|nowhere"), ("train.de", "broken.gz", "", "cannot read|broken"),
    ("train.de", "train.en", "--languages de de", "two different names"),
    ("train.de", "train.en", "--vocab-size 4000", "yields only"),
    ("train.de", "train.en", "--tokenize 13b", "13b: sacrebleu has|13a"),
    ("train.de", "train.en", "--val train.de gap", "gap: line 2 is blank"),
    ("train.de", "train.en", "--test gap train.en", "gap: line 2 is blank"),
    ("train.de", "train.en", "--val blank blank", "blank: line 1 is blank"),
    ("train.de", "train.en", "--val train.de train.en", "are left to train on")])
def test_files_that_do_not_belong_together_are_refused(tmp_path, capsys, monkeypatch, a, b, words, said):
    """Training on misaligned, swapped or identical texts without a word; scoring against nothing."""
    write(tmp_path, {"train.de": DE, "train.en": EN, "short": EN[:-1], "empty": [], "same": DE,
                     "blank": [" "] * 3, "gap": [EN[0], " ", *EN[2:]]})
    (tmp_path / "latin").write_bytes("käse\n".encode("latin-1") * 12)
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"x\n" * 1000)[:-9])
    monkeypatch.chdir(tmp_path)
    words = ["--source", a, b, "--languages", "de", "en", "--out", "out", *words.split()]
    error = refused(capsys, prepare.main, *words)
    assert all(part in error for part in said.split("|")) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, dev", [(multi30k, "val"), (iwslt14, "valid")])
def test_the_official_layouts_from_a_folder(tmp_path, capsys, script, dev):
    """--source DIR of files that the user has, plain or .gz; a missing one is named."""
    tests = ["test_2016_flickr", "test_2017_flickr"] if script is multi30k else ["test"]
    folder = write(tmp_path / "d", {f"{name}.{language}": VAL[f"dev.{language}"] for name in (dev, *tests)
                                    for language in ("de", "en")} | {"train.en": EN})
    (folder / "train.de.gz").write_bytes(gzip.compress("\n".join(DE).encode()))
    script.main(["--source", str(folder), "--vocab-size", "265", "--out", str(tmp_path / "out")])
    data = parallel.load_pairs(tmp_path / "out")
    assert list(data.splits) == ["train", "val", *tests] and len(data.splits["train"]["en"]) == 12
    assert data.originals(tests[0], "en") == data.originals("val", "en") == VAL["dev.en"]
    assert data.meta["tokenize"] == ("13a" if script is multi30k else "none")
    (folder / f"{dev}.en").unlink()
    error = refused(capsys, script.main, "--source", folder, "--out", tmp_path / "o2")
    assert "cannot read" in error and f"{dev}.en" in error


def test_pairs_with_an_empty_side_or_in_another_split_are_left_out_of_training(tmp_path, capsys):
    """A test set that is also trained on; a pair is the same only if both sides are."""
    write(tmp_path, VAL | {"a": [*DE, "", "x", "ein kind ", "ein kind", "und ein hund"],
                           "b": [*EN, "y", " ", "a child", "a kid", "and a dog"]})
    a, b, *val = (str(tmp_path / name) for name in ("a", "b", *VAL))
    prepare.main(["--source", a, b, "--languages", "de", "en", "--vocab-size", "260", "--val", *val,
                  "--out", str(tmp_path / "out")])
    said, data = capsys.readouterr().out, parallel.load_pairs(tmp_path / "out")
    assert "2 pairs with an empty side" in said and "train: 2 pairs that another split has too" in said
    assert data.originals("train", "en") == [*EN, "a kid"] and data.originals("val", "de") == VAL["dev.de"]
    assert [data.meta["splits"][split]["pairs"] for split in ("train", "val")] == [13, 2]


@pytest.mark.parametrize("damage", ["missing", "cut", "one sentence less", "outside"])
def test_a_damaged_set_is_refused(pairs, tmp_path, damage):
    path = shutil.copytree(pairs, tmp_path / "copy") / "val.bin"
    tokens = np.fromfile(path, "<u2")
    if damage == "one sentence less":
        tokens[np.flatnonzero(tokens == 299)[3]] = 5
    if damage == "outside":
        tokens[tokens != 299] = 400
    tokens[:len(tokens) - (damage == "cut")].tofile(path)
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match="is damaged.*val.bin"):
        parallel.load_pairs(path.parent)


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
        return [(tuple(s[p < NO_POSITION].tolist()), tuple(y[y >= 0].tolist())) for s, p, y in
                zip(*batch.source, batch.targets, strict=True)]
    n = len(data.cuts)
    epochs = [[rows(t) for t in range(e * n, (e + 1) * n)] for e in (0, 1)]
    whole = sorted((tuple(source[i].tolist()), tuple(target[i].tolist())) for i in fits)
    for epoch in epochs:
        assert sorted(pair for batch in epoch for pair in batch) == whole
    assert {frozenset(b) for b in epochs[0]} != {frozenset(b) for b in epochs[1]}
    assert rows(5) == epochs[0][5] and sorted(map(len, epochs[0])) == sorted(map(len, epochs[1]))
    assert sum(len(b.ids) for b in data.fixed(10**6)) == 300 - data.left_out
    lengths = [max(b.ids.size(1), b.source[0].size(1)) for b in data.fixed(3)]      # not short ones only
    assert len(lengths) == 3 and lengths[0] < lengths[1] < lengths[2] == 18
    with pytest.raises(UserError, match="at most 1 tokens"):
        Buckets(source, target, 99, 128, 1)


def test_what_a_batch_of_pairs_holds():
    """A decoder that sees its target, or padding that has a position."""
    source, target = [np.array([5, 6, 9]), np.array([7, 9])], [np.array([1, 9]), np.array([2, 3, 4, 9])]
    batch = Buckets(source, target, 9, 100, 50).at([0, 1])
    assert batch.ids.tolist() == [[9, 1, 0, 0], [9, 2, 3, 4]]
    assert batch.targets.tolist() == [[1, 9, -1, -1], [2, 3, 4, 9]]
    assert batch.pos.tolist() == [[0, 1, NO_POSITION, NO_POSITION], [0, 1, 2, 3]]
    assert batch.source[0].tolist() == [[5, 6, 9], [7, 9, 0]]
    assert batch.source[1].tolist() == [[0, 1, 2], [0, 1, NO_POSITION]]
    assert [len(b.ids) for b in batch.cut(2)] == [1, 1] and len(batch.cut(5)) == 2
    assert torch.equal(batch.cut(2)[1].source[0], batch.source[0][1:])
    assert positions_of([2, 1]).tolist() == [[0, 1], [0, NO_POSITION]]
