"""bench.py: no time is asserted, only that what is counted is right and that every part runs."""
import pytest
import torch
from test_scripts import refused

import bench
import run
from exits import fixed_exit

SMALL = "--n_layer 4 --n_head 2 --n_embd 32 --vocab_size 64 --block_size 544 --repeats 1 --device cpu".split()


def test_parts_run(tmp_path, capsys):
    """A part that no longer fits the model; a row without its bound; counted ratios of something else; more
    repeats than the block has room for: a traceback after minutes."""
    assert "fit into --block_size 544" in refused(capsys, bench.main, *SMALL, "--repeats", 2)
    bench.main([*SMALL, *f"--parts train exits mod --out {tmp_path}/bench.json".split()])
    rows = {r["what"]: r for r in run.read_json(tmp_path / "bench.json", "rows")}
    assert all(r["ratio"][0] <= r["ratio"][1] <= r["ratio"][2] for r in rows.values())
    half = rows["all exit at 2: over full depth"]
    assert half["layers"] == 0.5 < half["flops"] and abs(half["bytes"] - half["flops"]) < 0.1
    mod = rows["next 16, 12.5 % of every other block: over dense"]
    assert mod["at_most"] == pytest.approx(1.15 * mod["bytes"]) and 0.5 < mod["layers"] < 0.7
    routed = rows["step, 4 x 544 tokens, 12.5 % of every other block: over dense"]
    assert routed["at_most"] == pytest.approx(1.06 * routed["flops"]) and routed["layers"] == 0.5625
    assert "| all exit at 2: over full depth | 0.500 |" in capsys.readouterr().out


def test_counts_are_of_the_tokens_after_the_prefix():
    """The prefix charged to the token after it, or forgotten."""
    model = bench.gpt(bench.Options(n_layer=3, n_head=2, n_embd=32, vocab_size=64, device="cpu"))
    ids = torch.randint(0, 64, (2, 11))
    _, flops, _ = bench.counts(model, fixed_exit(model, 2), ids, 10)
    assert flops == 2 * (24 * 32 * 32 + 4 * 11 * 32) + 2 * 64 * 32
    parts = [bench.counts(model, fixed_exit(model, 2), ids[:, :t + 1], t) for t in range(11)]
    assert bench.counts(model, fixed_exit(model, 2), ids, 0) == pytest.approx(sum(parts))
