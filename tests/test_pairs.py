"""Sentence pairs from files to batches: nothing lost, nothing misaligned, bad files refused."""
import gzip

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS
from test_data import write_files
from test_scripts import refused

from data import parallel
from data.batches import NO_POSITION, Buckets
from data.multi30k import prepare as multi30k
from data.pairs import prepare
from model import position_ids

DE = "ein hund und eine katze\nund ein mann\neine frau und ein kind\n" * 4
EN = "a dog and a cat\nand a man\na woman and a child\n" * 4
VAL = {"de": "und ein hund\nein kind\n", "en": "and a dog\na child\n"}


def test_a_set_comes_back_as_it_was(pairs):
    """Sentences joined or shifted, originals changed, a rarer token for the word that begins a sentence."""
    data = parallel.load_pairs(pairs)
    for split in data.splits:
        aa, bb = (parallel.originals(data, split, language) for language in data.meta["languages"])
        assert len(aa) == data.meta["splits"][split]["pairs"]
        assert bb == [" ".join(map(WORDS.get, line.split())) for line in aa]
    assert parallel.originals(data, "test", "aa") == parallel.read_lines(pairs.parent / "test.aa")
    one, two = (parallel.sentence_ids(data.encoding, line) for line in ("otter", "otter otter "))
    assert two == [*one[:-1], *one] and two[-1] == data.encoding.eot_token
    assert data.splits["test"]["aa"][0].tolist() == parallel.sentence_ids(data.encoding, aa[0])


@pytest.mark.parametrize("words, said", [
    ("de short", "has 12 lines|short has 11"), ("de de", "the same text"), ("blank blank", "are empty"),
    ("de latin", "cannot read latin"), ("one two", "cannot be split"),
    ("de nowhere", "nowhere"), ("de broken.gz", "cannot read broken"), ("de en --vocab-size 4000", "yields"),
    ("de en --languages de de", "two different names"), ("de en --tokenize 13b", "13b|13a"),
    ("de en --val de gap", "gap: line 2 is blank"), ("de en --test gap en", "gap: line 2 is blank")])
def test_files_that_do_not_belong_together_are_refused(tmp_path, capsys, monkeypatch, words, said):
    """Training on misaligned or identical texts without a word; scoring against nothing."""
    monkeypatch.chdir(write_files(tmp_path, {
        "de": DE, "en": EN, "short": EN[EN.index("\n") + 1:], "blank": " \n" * 3, "one": "1\n", "two": "2\n",
        "gap": EN.replace("and a man", " "), "latin": ("käse\n" * 12).encode("latin-1"),
        "broken.gz": gzip.compress(b"x\n" * 1000)[:-9]}))
    error = refused(capsys, prepare.main, *f"--languages de en --out out --source {words}".split())
    assert all(part in error for part in said.split("|")) and not (tmp_path / "out").exists()


def test_the_official_layout_from_a_folder(tmp_path, capsys):
    """--source DIR of files that the user has, plain or .gz; a missing one is named."""
    tests = ["test_2016_flickr", "test_2017_flickr"]
    files = {f"{name}.{language}": VAL[language] for name in ("val", *tests) for language in VAL}
    write_files(tmp_path, files | {"train.en": EN, "train.de.gz": gzip.compress(DE.encode())})
    multi30k.main(["--source", str(tmp_path), "--vocab-size", "265", "--out", str(tmp_path / "out")])
    data = parallel.load_pairs(tmp_path / "out")
    assert list(data.splits) == ["train", "val", *tests] and len(data.splits["train"]["en"]) == 12
    held_out = [parallel.originals(data, split, "en") for split in ("val", tests[0])]
    assert held_out == [["and a dog", "a child"]] * 2
    assert data.meta["tokenize"] == "13a"
    (tmp_path / "val.en").unlink()
    assert "val.en" in refused(capsys, multi30k.main, "--source", tmp_path, "--out", tmp_path / "o2")


def test_pairs_with_an_empty_side_or_in_another_split_are_left_out(tmp_path, capsys, monkeypatch):
    """A test set that is also trained on; a pair is the same only if both sides are; a line that ends at
    U+2028, CRLF, a byte order mark, a missing last line end, gzip."""
    a, b = DE + "\nx\u2028x\nein kind \nein kind\nund ein hund", EN + "y\n \na child\na kid\nand a dog\n"
    monkeypatch.chdir(write_files(tmp_path, VAL | {
        "a": "\ufeff" + a.replace("\n", "\r\n"), "b.gz": gzip.compress(b.encode())}))
    prepare.main("--source a b.gz --val de en --languages de en --vocab-size 260 --out out".split())
    said, data = capsys.readouterr().out, parallel.load_pairs("out")
    assert "2 pairs with an empty side" in said and "train: 2 pairs that another split has too" in said
    assert parallel.read_lines("a") == a.split("\n")
    assert parallel.originals(data, "train", "en") == [*EN.splitlines(), "a kid"]


def test_an_epoch_has_every_pair_once_and_batches_stay_under_their_limit():
    """Pairs lost at the ends of buckets, batches that overflow the memory, epochs that are all alike; a
    decoder that sees its target, or padding that has a position."""
    draw = np.random.default_rng(0)
    pairs = [tuple((*draw.integers(0, 90, length).tolist(), 99) for length in draw.integers(1, 20, 2))
             for _ in range(300)]
    data = Buckets(*zip(*pairs, strict=True), 99, 128, 18)

    def rows(t):
        batch = data.step(7, t)
        assert batch.ids.numel() <= 128 and batch.source[0].numel() <= 128
        assert batch.count == batch.live.sum() and torch.equal(batch.live, batch.targets >= 0)
        assert torch.equal(batch.ids, F.pad(batch.targets, (1, -1), value=99).where(batch.live, 0))
        for ids, pos in (batch.ids, batch.pos), batch.source:
            present = pos < NO_POSITION
            assert torch.equal(pos, position_ids(pos).where(present, NO_POSITION)) and not ids[~present].any()
        return [(tuple(s[p < NO_POSITION].tolist()), tuple(y[y >= 0].tolist())) for s, p, y in
                zip(*batch.source, batch.targets, strict=True)]
    n = len(data.cuts)
    epochs = [[rows(t) for t in range(e * n, (e + 1) * n)] for e in (0, 1)]
    kept = sorted(pair for pair in pairs if max(map(len, pair)) <= 18)
    assert data.left_out == 300 - len(kept) > 0
    assert all(sorted(sum(epoch, [])) == kept for epoch in epochs)
    assert {frozenset(b) for b in epochs[0]} != {frozenset(b) for b in epochs[1]}
    assert rows(5) == epochs[0][5] and sorted(map(len, epochs[0])) == sorted(map(len, epochs[1]))
    assert sum(len(b.ids) for b in data.fixed(10**6, 3)) == len(kept)
    lengths = [max(b.ids.size(1), b.source[0].size(1)) for b in data.fixed(3)]      # not short ones only
    assert len(lengths) == 3 and lengths[0] < lengths[1] < lengths[2] == 18
