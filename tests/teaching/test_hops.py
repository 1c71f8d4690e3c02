"""data/hops: the answers are those of a naive walk, none is read, and every script runs on such a set."""
import shutil

import numpy as np
import pytest
from conftest import TINY, finished_run
from test_scripts import refused

import cost
import decode
import evaluate
import plot
import reproduce
import run
import sample
import train
from data.batches import batches_of, open_data
from data.hops import prepare
from options import read_options


@pytest.fixture(scope="module")
def hops(tmp_path_factory):
    """A small prepared set."""
    folder = tmp_path_factory.mktemp("data") / "hops"
    words = "--symbols 7 --cycle 4 --hops 3 --questions 5 --documents 1000"
    prepare.main([*words.split(), "--out", str(folder)])
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_answer_is_as_many_steps_away_as_the_question_says(hops, split):
    """Another cycle, a step too many, a listing that differs from the answers, an answer that is read."""
    data = open_data(hops, "")[1]
    words = f"--data {hops} --block_size 14 --batch_size 6 --routed none"
    o = read_options(words.split(), run.stored_options)
    batches = batches_of(data, split, o)
    seen = set()
    for batch in [batches.step(3, 5), *batches.fixed(10**6)]:
        assert batch.ids.shape[1] == 14 and batch.count == 5 * len(batch.ids)
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            words = [data.encoding.decode([i]).strip() for i in ids]
            leads = dict(words[:4])
            assert len(leads) == 4 and {*leads} == {*leads.values()} and targets[:5] == [-1] * 5
            for k, start, nothing, answer in zip(words[4::2], words[5::2], targets[4::2], targets[5::2],
                                                 strict=True):
                for _ in range(int(k)):
                    start = leads[start]
                assert nothing == -1 and data.encoding.decode([answer]) == f" {start}"
                seen.add(k)
    assert seen == {*"0123"} and batches.step(3, 5).ids.equal(batches.step(3, 5).ids)


def test_one_cycle_and_every_document_once(hops):
    """Two cycles where one was promised, the same documents over and over, train and val that overlap."""
    data = open_data(hops, "")[1]
    texts = {split: data.encoding.decode(data.splits[split].tolist()).split("<|endoftext|>")[:-1]
             for split in ("train", "val")}
    assert len({*texts["train"], *texts["val"]}) == 1000 and len(texts["val"]) == 500
    for text in texts["val"]:
        leads, start = dict(text[:12].split()), text[1]
        for n in range(1, 5):
            start = leads[start]
            assert (start == text[1]) == (n == 4)


def test_two_stages_and_every_script(hops, tmp_path, capsys):
    """Exits that cannot be added to a model of one; FLOPs of the answers alone; a map without the listing."""
    words = "--block_size 14 --routed none --steps 4 --eval_windows 6"
    first = finished_run(hops, tmp_path / "a", f"{words} --exits last --rule auto")
    words += f" --init_from {first} --exits all --rule random"
    second = finished_run(hops, tmp_path / "b", words)
    rows = {r["rule"]: r for r in run.read_json(second / "evaluation.json", "forced")}
    whole = run.read_json(first / "evaluation.json", "forced")[0]
    assert rows["fixed:2"]["exit"] == 2 and rows["full"]["mflops_paper"] == whole["mflops_paper"] > 0
    depth, tokens = plot.read_depth(second / "depth.npz")
    assert depth["present"].all() and len(tokens["exit_at"]) == 5 * len(depth["ids"])
    row, blocks = rows["random"], tokens["visited"].sum(-1)
    assert row["exit"] == pytest.approx(tokens["exit_at"].mean())
    assert row["blocks"] == pytest.approx(blocks.mean())
    for kind, table in row["kinds"].items():
        here = depth["ids"][:, 4::2].ravel() == ord(kind[0])        # questions are read as k, start
        assert kind in ("0 hops", "1 hops", "2 hops", "3 hops") and here.any()
        assert table["exits"] == [int((tokens["exit_at"][here] == n).sum()) for n in range(1, 5)]
        assert table["blocks"] == [int((blocks[here] == n).sum()) for n in range(5)]
    counted = [{name: depth[name][w] for name in decode.COUNTED} for w in range(len(depth["ids"]))]
    config = run.open_run(second, device="cpu")[3].config
    flops = [cost.decoding(config, 306, **text)["flops"] for text in counted]
    assert row["mflops_paper"] == pytest.approx(np.mean(flops) / 1e6)
    plot.main(["--run", str(second), "--html"])
    assert (second / "page.html").stat().st_size > 10000
    sample.main(["--run", str(second), "--max_new_tokens", "1", "--prompt", " ab bc cd da2 a"])
    evaluate.main(["--run", str(second), "--rules", "oracle:correctness", "oracle:likelihood:0.1:2"])
    separate = ["--data", hops, "--out", tmp_path / "c", "--init_from", first, "--classifier", "separate"]
    assert "another model" in refused(capsys, train.main, *separate)      # its matrix would be a new one
    assert "block_size" in refused(capsys, train.main, "--data", hops, *TINY, "--block_size", 13)


@pytest.mark.parametrize("words", ["--cycle 1", "--cycle 17", "--symbols 27", "--hops 10", "--questions 0",
                                   "--documents 999"])
def test_a_set_that_cannot_be_is_refused(tmp_path, capsys, words):
    """A symbol that leads to itself, a number of two digits, another tokenizer than the questions need."""
    assert "cycle" in refused(capsys, prepare.main, *words.split(), "--out", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_runs_side_by_side(finished, tmp_path, capsys):
    """A run that is left out, options of one run that would do nothing, a file that is missing."""
    runs = [shutil.copytree(finished, tmp_path / name) for name in ("001", "002")]
    plot.main(["--run", "1", "2", "--out", str(tmp_path)])
    assert (tmp_path / "compare.png").stat().st_size > 10000
    [training, shares, frontier] = plot.compare({"1": runs[0], "2": runs[1]}).axes
    assert len(training.lines) == len(frontier.lines) == len(shares.lines) == 2
    assert "--html" in refused(capsys, plot.main, "--run", *runs, "--html")
    (runs[1] / "depth.npz").unlink()
    assert "002/depth.npz" in refused(capsys, plot.main, "--run", *runs)


def test_rank_correlation_of_a_table(hops, tmp_path):
    """Ranks without ties, another sign, a constant that is not nan."""
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 4, 200), draw.integers(0, 3, 200)
    y += x
    ranks = [[np.mean([*np.flatnonzero(np.sort(v) == value)]) for value in v] for v in (x, y)]
    counts = np.array([np.bincount(y[x == n], minlength=8) for n in range(4)])
    assert reproduce.rank_correlation(counts) == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert reproduce.rank_correlation(counts[:, ::-1]) == pytest.approx(-np.corrcoef(ranks)[0, 1])
    assert np.isnan(reproduce.rank_correlation(np.array([[5, 0], [7, 0]])))
    kinds = {f"{n} hops": {"blocks": row.tolist(), "exits": row[1:].tolist(), "right": n / 4}
             for n, row in enumerate(counts)}
    rows = reproduce.by_kind({"a": {"evaluation": {"forced": [{"rule": "full", "kinds": kinds}]}}})
    assert [row["tokens"] for row in rows] == counts.sum(1).tolist()
    assert [row["exit"] for row in rows] == pytest.approx(
        [y[(x == n) & (y > 0)].mean() for n in range(4)])       # nothing exits after block 0
    assert [row["blocks"] for row in rows] == pytest.approx([y[x == n].mean() for n in range(4)])
    assert [row["right"] for row in rows] == [0, 0.25, 0.5, 0.75]
    assert [row["kind"] for row in rows] == [f"{n} hops" for n in range(4)]
    assert rows[0]["rho"] == reproduce.rank_correlation(counts)
    [row] = reproduce.ROWS["by_rule"]({"a": {"evaluation": {"forced": [{"rule": "full", "kinds": kinds}]}}})
    assert [row["of"][f"{n} hops"]["blocks"] for n in range(4)] == [row["blocks"] for row in rows]
