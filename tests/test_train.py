"""Training can be trusted: exact resume, atomic checkpoints, clean stops, fixed evaluation, correct steps."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, tiny
from test_scripts import no_figures, refused  # noqa: F401

import run
import train as script
from data.batches import Batch, Windows
from data.common import UserError
from model import position_ids
from options import Options, read_options


def weights(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def equal(a, b):
    """Every tensor and number of two nested states is equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def lines(folder, kind):
    return [m for m in run.read_metrics(folder) if m["kind"] == kind]


def val_lines(folder):
    return lines(folder, "val")


def resume(folder, *words):
    script.main(["--resume", str(folder), *map(str, words)])


@pytest.mark.parametrize("k, fault", [(1, ""), (3, ""), (4, ""), (8, ""), (3, "optimiser"), (3, "data"),
                                      (3, "dropout")])
def test_stopping_and_resuming_changes_no_bit(train, tmp_path, monkeypatch, k, fault):
    """Data replayed from step 0, a lost optimiser, random numbers that depend on the process: k = 1, in the
    middle, at an evaluation, at the end; with dropout and accumulation. With a fault the bits must differ."""
    extra = ["--dropout", "0.1", "--grad_accum_steps", "2"]
    whole = train(*extra, out=tmp_path / "a")
    part = train(*extra, "--stop_at", k, out=tmp_path / "b")
    honest = Windows.step
    if fault == "optimiser":
        monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *a: None)
    if fault == "data":
        monkeypatch.setattr(Windows, "step", lambda self, seed, t: honest(self, seed, abs(t - 3)))
    if fault == "dropout":
        monkeypatch.setattr(torch, "manual_seed", lambda s: None)
    resume(part)
    assert equal(weights(whole)["model"], weights(part)["model"]) == (not fault)
    if not fault:
        assert equal(weights(whole), weights(part)) and weights(part)["step"] == 8
        assert val_lines(whole) == val_lines(part)
        steps = [[(m["step"], m["loss"]) for m in lines(folder, "train")] for folder in (whole, part)]
        assert steps[0] == steps[1] and [s for s, _ in steps[1]] == list(range(1, 9))


@pytest.mark.parametrize("words, same", [
    ([], True), (["--eval_every", 1], True), (["--eval_every", 100], True), (["--seed", 1], False)])
def test_only_the_seed_changes_the_bits(train, tmp_path, words, same):
    """Hidden state between runs in one process; evaluation that draws from the random numbers of training, or
    leaves gradients or another mode behind."""
    a = train("--dropout", "0.1", out=tmp_path / "a")
    b = train("--dropout", "0.1", *words, out=tmp_path / "b")
    assert equal(weights(a)["model"], weights(b)["model"]) == same
    assert not same or equal(weights(a), weights(b)) and val_lines(a)[-1] == val_lines(b)[-1]


def test_accumulation_and_batch_give_the_same_step(train, tmp_path):
    """A loss, main or auxiliary, that is not divided by the accumulation."""
    a = train("--steps", 1, "--grad_accum_steps", 1, out=tmp_path / "a")
    b = train("--steps", 1, "--grad_accum_steps", 4, out=tmp_path / "b")
    norms = [lines(folder, "train")[0]["norm"] for folder in (a, b)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)       # before Adam, which forgives any factor
    a, b = weights(a)["model"], weights(b)["model"]
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=2e-6)


def test_gradients_are_clipped_before_the_step(train, monkeypatch):
    """Clipping after the optimiser has used the gradients."""
    norms, honest = [], torch.optim.AdamW.step

    def step(self, *a, **k):
        grads = [p.grad.flatten() for g in self.param_groups for p in g["params"]]
        norms.append(torch.cat(grads).norm().item())
        return honest(self, *a, **k)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    folder = train("--grad_clip", 0.01)
    assert len(norms) == 8 and max(norms) <= 0.0101
    assert all(m["norm"] > 0.0101 for m in lines(folder, "train"))


def test_the_learning_rate():
    """A schedule that never warms up, or ends elsewhere than lr * lr_end."""
    options = read_options(["--steps", "100", "--warmup", "10", "--lr", "0.5", "--lr_end", "0.1"], None)
    rates = [script.learning_rate(t, options) for t in range(101)]
    assert rates[0] == 0.05 and rates[9] == rates[10] == 0.5 and rates[100] == pytest.approx(0.05)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_only_matrices_decay():
    """Decay on norms, biases or routers."""
    model = tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, free = (
        {names[id(p)] for p in g["params"]} for g in script.optimizer_of(model, Options()).param_groups)
    assert "blocks.0.attn.qkv.weight" in decayed and "wte.weight" in decayed
    assert {"blocks.1.router.weight", "blocks.0.ln1.weight", "blocks.0.mlp.fc.bias"} <= free
    assert len(decayed) + len(free) == len(names) and not decayed & free


def test_batches_are_windows_and_targets_are_next_tokens():
    """Inputs and targets out of step, the last window unreachable, windows that differ between runs."""
    tokens = np.arange(100, dtype=np.uint16)
    data = Windows(tokens, 8, 64)
    batch = data.step(0, 3)
    assert torch.equal(batch.ids + 1, batch.targets) and batch.ids.shape == (64, 8) and batch.live is None
    assert torch.equal(batch.ids, data.step(0, 3).ids) and not torch.equal(batch.ids, data.step(1, 3).ids)
    assert len({tuple(data.step(0, t).ids[:, 0].tolist()) for t in range(20)}) == 20
    seen = torch.cat([data.step(0, t).targets.flatten() for t in range(30)])
    assert seen.max() == 99 and seen.min() == 1
    fixed = Windows(tokens, 8, 2).fixed(5)
    assert [len(b.ids) for b in fixed] == [2, 2, 1]
    assert torch.cat([b.ids[:, 0] for b in fixed]).tolist() == [0, 22, 45, 68, 91]
    assert fixed[-1].targets[-1, -1] == 99 and sum(len(b.ids) for b in data.fixed(500)) == 12


@pytest.mark.parametrize("place", ["router", "gradient"])
def test_what_is_not_finite_stops_before_the_step(train, monkeypatch, capsys, place):
    """A nan router weight that wins torch.topk, a run that goes on with nan, or a checkpoint full of it."""
    honest, steps, step = script.aligned, [], torch.optim.AdamW.step

    def broken(model, *a):
        if place == "router" and len(steps) == 6:
            model.blocks[1].router.weight.data[0, 0] = float("nan")
        sums = honest(model, *a)
        if place == "gradient" and len(steps) == 6:
            model.wte.weight.grad[0, 0] = float("nan")
        return sums
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: steps.append(1) or step(self, *a))
    monkeypatch.setitem(script.OBJECTIVES, "aligned", broken)
    said = refused(capsys, lambda _: train())
    assert "step 6" in said and "step 4" in said and "--lr" in said and len(steps) == 6


def test_metrics_after_the_checkpoint_are_cut(tmp_path):
    """Lines after the last checkpoint standing twice, or a half-written last line breaking the file."""
    logged = ("val", 0), ("train", 1), ("train", 2), ("val", 2), ("train", 3)
    before = [{"kind": kind, "step": step} for kind, step in logged]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in before) + '{"kind": "tr')
    run.start_metrics(tmp_path, 2)
    assert run.read_metrics(tmp_path) == before[:3]


@pytest.mark.parametrize("sent", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_signal_leaves_a_readable_checkpoint(dataset, tmp_path, sent):
    """A kill in the middle of a save that leaves half a file; a preempted job that loses its work, or a
    traceback on Ctrl-C."""
    save_every = "1" if sent == "SIGKILL" else "100000"
    words = ["--steps", "100000", "--eval_every", "100000", "--save_every", save_every]
    command = [sys.executable, ROOT / "train.py", "--data", dataset, "--out", tmp_path, *TINY, *words]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    folder, end = tmp_path / "001", time.monotonic() + 60
    while len(lines(folder, "train")) < 6:
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
    process.send_signal(getattr(signal, sent))
    out, err = process.communicate(timeout=60)
    if sent != "SIGKILL":
        assert process.returncode == 0 and "Traceback" not in err and "--resume" in out
    step = run.load(folder, "cpu")["step"]
    resume(folder, "--stop_at", step + 2)
    assert step > 0 and run.load(folder, "cpu")["step"] == step + 2


def test_a_second_interrupt_ends_at_once():
    """Ctrl-C that is noted again and again, or for ever after."""
    before = signal.getsignal(signal.SIGINT)
    with run.interrupts() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("steps, evaluated", [(0, []), (8, [0, 4])])
def test_evaluation_polls_the_interrupt(train, tmp_path, monkeypatch, steps, evaluated):
    """A signal during an evaluation that is seen only at its end, or, in the last one, that is answered with
    a sample and figures."""
    finished, polled, folder = [], [], tmp_path / "runs" / "001"

    class Later:
        def __bool__(self):
            polled.extend([1] * (len(lines(folder, "train")) == steps))
            return len(polled) > 2
    monkeypatch.setattr(script, "finish", lambda *a: finished.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(run, "interrupts", lambda: contextlib.nullcontext(Later()))
        train("--batch_size", 1)
    assert weights(folder)["step"] == steps and [m["step"] for m in val_lines(folder)] == evaluated
    assert not finished
    resume(folder)
    assert [m["step"] for m in val_lines(folder)] == [0, 4, 8] and finished == [1]


def test_a_full_disk_keeps_the_old_checkpoint(train, capsys):
    """The only checkpoint replaced by half a new one."""
    resource = pytest.importorskip("resource")      # not on Windows
    folder = train("--stop_at", 4)
    before = (folder / "ckpt.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        said = refused(capsys, script.main, "--resume", folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "disk full" in said
    assert (folder / "ckpt.pt").read_bytes() == before and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "flipped", [1, 2], {"step": 1}, UserError("x")])
def test_a_damaged_checkpoint_is_refused(train, damage):
    """Truncation raises three kinds of error by place, one flipped byte loads with none, and what is no
    checkpoint raises a KeyError or an error of weights_only."""
    path = train("--stop_at", 1) / "ckpt.pt"
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1:]
    changed = {"cut": content[:-9], "half": content[:middle], "empty": b"", "flipped": flipped}
    if isinstance(damage, str):
        path.write_bytes(changed[damage])
    else:
        torch.save(damage, path)
    with pytest.raises(UserError, match="damaged"):
        run.load(path.parent, "cpu")


def test_other_data_is_refused(train, dataset, tmp_path, capsys):
    """A folder prepared again from other texts, with a vocabulary of equal size: the ids mean other words."""
    folder = train("--stop_at", 1)
    moved = shutil.copytree(dataset, tmp_path / "moved")
    resume(folder, "--data", moved, "--stop_at", 2)             # the same data at another place
    from_run = ["--init_from", folder, "--data", moved, "--out", tmp_path / "new", *TINY[8:]]
    script.main([*map(str, from_run), "--stop_at", "1"])
    for name, change in (("meta", lambda meta: meta | {"source": "other"}),
                         ("tokenizer", lambda t: t | {"tokens": t["tokens"][:-2] + t["tokens"][:-3:-1]})):
        content = (moved / f"{name}.json").read_text("utf-8")
        (moved / f"{name}.json").write_text(json.dumps(change(json.loads(content))), "utf-8")
        assert f"{name}.json" in refused(capsys, script.main, "--resume", folder, "--data", moved)
        if name == "tokenizer":
            assert "another tokenizer" in refused(capsys, script.main, *from_run)
        (moved / f"{name}.json").write_text(content, "utf-8")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["001"]


def test_backward_keeps_the_types_of_forward(dataset):
    """Backward inside autocast: gradients of fp32 routers rounded to bfloat16."""
    torch.manual_seed(0)
    options = read_options(TINY, None)
    model = run.build(options, 300)
    ids = torch.randint(0, 300, (2, 4, 32))
    with run.autocast(torch.device("cpu"), "bfloat16"):
        script.aligned(model, Batch(*ids, position_ids(ids[0])), 1 / 128, options)
    g = model.blocks[1].router.weight.grad
    assert not torch.equal(g, g.bfloat16().float())


def test_every_run_has_a_folder_and_a_commit(train, tmp_path, monkeypatch):
    """A run that overwrites the one before; FileNotFoundError on a machine without git."""
    def missing(*a, **k):
        raise FileNotFoundError("git")
    monkeypatch.setattr(run.subprocess, "run", missing)
    folders = [train("--steps", 1, out=tmp_path / "numbered") for _ in range(3)]
    assert [folder.name for folder in folders] == ["001", "002", "003"]
    assert run.read_json(folders[0] / "options.json", "commit") == "unknown"
    (tmp_path / "numbered" / "041").mkdir()
    assert run.new_folder(tmp_path / "numbered").name == "042"


def test_training_learns_and_what_is_logged(train):
    """Everything runs and nothing is learnt; losses of an exit or a routing rule that are missing, or the
    causal logit without its base rate."""
    folder = train("--steps", 60, "--lr", 0.01, "--eval_every", 60)
    first, last = val_lines(folder)
    assert set(last["loss"]) == {"top_k", "causal"} and all(len(v) == 4 for v in last["loss"].values())
    assert last["loss"]["causal"][-1] < 0.6 * first["loss"]["causal"][-1]
    assert set(last["predictor"]) == {"accuracy", "base_rate", "precision", "recall"}
    assert last["predictor"]["base_rate"] == 0.875      # 4 of 32 tokens
    assert 0 < last["bits_per_byte"] < 20 and 0 <= last["causal_share"] <= 1
    dense = val_lines(train("--routed", "none"))[-1]
    assert set(dense["loss"]) == {"top_k"} and "predictor" not in dense
