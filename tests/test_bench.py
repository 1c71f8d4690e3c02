"""bench.py: no time is asserted, only that what is counted is right and that every part runs."""
import json

import numpy as np
import pytest
import torch

import bench

SMALL = ["--n_layer", "6", "--n_head", "2", "--n_embd", "32", "--vocab", "64", "--block_size", "192",
         "--repeats", "1", "--device", "cpu"]


def test_parts_run_and_are_drawn(finished, tmp_path, capsys):
    """A part that no longer fits the model; a row whose ideal is missing; a figure without its lines."""
    out = tmp_path / "bench.json"
    bench.main([*SMALL, "--parts", "exits", "mod", "run", "--run", str(finished), "--out", str(out),
                "--figures", str(tmp_path)])
    stored = json.loads(out.read_text("utf-8"))
    rows = {r["what"]: r for r in stored["rows"]}
    assert stored["threads"] == torch.get_num_threads() and stored["options"]["n_layer"] == 6
    assert all(r["time"][0] <= r["time"][1] <= r["time"][2] for r in rows.values())
    assert all(r["share"] == pytest.approx(r[r["ideal"]] / r["time"][1]) for r in rows.values() if r["ideal"])
    half = rows["all exit at 3: over full depth"]
    assert half["layers"] == 0.5 < half["flops"] and abs(half["bytes"] - half["flops"]) < 0.1
    assert sum("drafted with" in what for what in rows) == 6 and any("unmixed" in what for what in rows)
    assert (tmp_path / "speed.png").stat().st_size > 5000
    assert "| all exit at 3: over full depth | 0.500 |" in capsys.readouterr().out


def test_work_is_of_one_token():
    """The prefix charged to the token after it, or forgotten."""
    o = bench.Options(n_layer=3, n_head=2, n_embd=32, vocab=64, block_size=64)
    model = bench.gpt(o, torch.device("cpu"))
    layers, flops, size = bench.work_of(model, 10, 2)
    assert layers == 2 and flops == 2 * (24 * 32 * 32 + 4 * 11 * 32) + 2 * 64 * 32
    whole = bench.work_of(model, 0, 2, np.arange(3) < np.full((5, 1), 2))
    assert whole == pytest.approx(sum(bench.work_of(model, t, 2) for t in range(5)))


def test_a_run_is_needed_for_its_part(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*SMALL, "--parts", "run"])
    assert stop.value.code == 2 and "--run runs/001" in capsys.readouterr().err
