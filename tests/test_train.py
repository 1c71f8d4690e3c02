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
from conftest import ROOT, TINY

import run
import train as script
from data.batches import Batch, Windows
from data.common import UserError
from model import positions


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


def val_lines(folder):
    return [m for m in run.read_metrics(folder) if m["kind"] == "val"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Training ends without starting sample.py and plot.py (test_scripts.py has them)."""
    monkeypatch.setattr(script, "finish", lambda *a: None)


@pytest.mark.parametrize("k", [1, 3, 4, 8])
def test_stopping_and_resuming_changes_no_bit(train, tmp_path, k):
    """Data replayed from step 0, a lost optimiser, random numbers that depend on the process. k = 1, in the
    middle, at an evaluation, at the end; with dropout and accumulation."""
    extra = ["--dropout", "0.1", "--accumulate", "2"]
    whole = train(*extra, out=tmp_path / "a")
    part = train(*extra, "--stop_at", k, out=tmp_path / "b")
    script.main(["--resume", str(part)])
    assert equal(weights(whole), weights(part)) and weights(part)["step"] == 8
    assert val_lines(whole) == val_lines(part)

    def steps(folder):
        return [(m["step"], m["loss"]) for m in run.read_metrics(folder) if m["kind"] == "train"]
    assert steps(whole) == steps(part) and [s for s, _ in steps(part)] == list(range(1, 9))


@pytest.mark.parametrize("fault", ["optimiser", "data", "dropout"])
def test_the_resume_test_can_fail(train, tmp_path, monkeypatch, fault):
    """Negative controls: a resume that loses the optimiser, the place in the data or the random numbers."""
    whole = train("--dropout", "0.1", out=tmp_path / "a")
    part = train("--dropout", "0.1", "--stop_at", 3, out=tmp_path / "b")
    if fault == "optimiser":
        monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *a: None)
    if fault == "data":
        honest = Windows.step
        monkeypatch.setattr(Windows, "step", lambda self, seed, t: honest(self, seed, abs(t - 3)))
    if fault == "dropout":
        monkeypatch.setattr(torch, "manual_seed", lambda s: None)
    script.main(["--resume", str(part)])
    assert not equal(weights(whole)["model"], weights(part)["model"])


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(train, tmp_path):
    """Hidden state between runs in one process."""
    a, b = train(out=tmp_path / "a"), train(out=tmp_path / "b")
    other = train("--seed", 1, out=tmp_path / "c")
    assert equal(weights(a), weights(b)) and not equal(weights(a)["model"], weights(other)["model"])


def test_evaluation_does_not_change_training(train, tmp_path):
    """Evaluation drawing from the training random numbers, or leaving gradients or another mode behind."""
    often = train("--dropout", "0.1", "--eval_every", 1, out=tmp_path / "a")
    never = train("--dropout", "0.1", "--eval_every", 100, out=tmp_path / "b")
    assert equal(weights(often), weights(never))
    assert val_lines(often)[-1] == val_lines(never)[-1]


def test_accumulation_and_batch_give_the_same_step(train, tmp_path):
    """Fault 11: a loss, main or auxiliary, that is not divided by the accumulation."""
    a = train("--steps", 1, "--accumulate", 1, out=tmp_path / "a")
    b = train("--steps", 1, "--accumulate", 4, out=tmp_path / "b")
    norms = [[m["norm"] for m in run.read_metrics(folder) if m["kind"] == "train"][0] for folder in (a, b)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)       # before Adam, which forgives any factor
    a, b = weights(a)["model"], weights(b)["model"]
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=2e-6)


def test_gradients_are_clipped_before_the_step(train, monkeypatch):
    """Fault 11: clipping after the optimiser has used the gradients."""
    norms, honest = [], torch.optim.AdamW.step

    def step(self, *a, **k):
        grads = [p.grad.flatten() for g in self.param_groups for p in g["params"]]
        norms.append(torch.cat(grads).norm().item())
        return honest(self, *a, **k)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    folder = train("--clip", 0.01)
    assert len(norms) == 8 and max(norms) <= 0.0101
    assert all(m["norm"] > 0.0101 for m in run.read_metrics(folder) if m["kind"] == "train")


def test_the_learning_rate(train):
    """A schedule that never warms up, or ends elsewhere than lr * lr_end."""
    options = run.read_options(["--steps", "100", "--warmup", "10", "--lr", "0.5", "--lr_end", "0.1"])
    rates = [script.learning_rate(t, options) for t in range(101)]
    assert rates[0] == 0.05 and rates[9] == rates[10] == 0.5 and rates[100] == pytest.approx(0.05)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_only_matrices_decay():
    """Decay on norms, biases or routers."""
    from conftest import tiny
    model = tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, free = (
        {names[id(p)] for p in g["params"]} for g in script.optimizer_of(model, run.Options()).param_groups)
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


def test_a_gradient_that_is_not_finite_stops_before_the_step(train, monkeypatch, capsys):
    """A run saved at 4, nan at 5, running for ever; or a checkpoint full of nan."""
    honest = script.aligned

    def broken(model, batch, scale, options):
        sums = honest(model, batch, scale, options)
        if model.calls == 6:
            model.wte.weight.grad[0, 0] = float("nan")
        model.calls += 1
        return sums
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: steps.append(1) or step(self, *a))
    monkeypatch.setattr(run.GPT, "calls", 0, raising=False)
    monkeypatch.setitem(script.OBJECTIVES, "aligned", broken)
    with pytest.raises(SystemExit) as stop:
        train()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "step 6" in said and "step 4" in said and "--lr" in said
    assert len(steps) == 6


def test_nan_router_scores_stop_training(train, monkeypatch, capsys):
    """Fault 6: a nan score wins torch.topk and training goes on."""
    honest = script.begin

    def poisoned(options):
        found = honest(options)
        with torch.no_grad():
            found[3].blocks[1].router.weight[0, 0] = float("nan")
        return found
    monkeypatch.setattr(script, "begin", poisoned)
    with pytest.raises(SystemExit):
        train()
    assert "step 0" in capsys.readouterr().err


def test_metrics_after_the_checkpoint_are_cut(tmp_path):
    """Lines after the last checkpoint standing twice, or a half-written last line breaking the file."""
    lines = [{"kind": "val", "step": 0}, {"kind": "train", "step": 1}, {"kind": "train", "step": 2},
             {"kind": "val", "step": 2}, {"kind": "train", "step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines) + '{"kind": "tr')
    run.Metrics(tmp_path, 2)
    assert run.read_metrics(tmp_path) == lines[:3]


def start(dataset, out, *words):
    """train.py as a process of its own."""
    command = [sys.executable, ROOT / "train.py", "--data", dataset, "--out", out, *TINY, *words]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_a_kill_at_any_moment_leaves_a_readable_checkpoint(dataset, tmp_path):
    """torch.save onto the path itself: a kill -9 in a save leaves a file that nothing can read."""
    process = start(dataset, tmp_path, "--steps", "100000", "--save_every", "1", "--eval_every", "100000")
    wait_for((tmp_path / "001" / "ckpt.pt").exists)
    time.sleep(0.5)
    process.kill()
    process.wait()
    first = run.load(tmp_path / "001", "cpu")["step"]
    script.main(["--resume", str(tmp_path / "001"), "--stop_at", str(first + 2)])
    assert run.load(tmp_path / "001", "cpu")["step"] == first + 2


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_saves_and_leaves_cleanly(dataset, tmp_path, sent):
    """A preempted job losing its work, or a traceback on Ctrl-C."""
    process = start(dataset, tmp_path, "--steps", "100000", "--save_every", "100000")
    folder = tmp_path / "001"
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(run.read_metrics(folder)) > 6)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    assert "--resume" in out and run.load(folder, "cpu")["step"] > 0


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


def test_evaluation_polls_the_interrupt(train, monkeypatch):
    """A signal during a long evaluation that nobody looks at until its end."""
    came = []

    class Later:
        def __bool__(self):
            came.append(1)
            return len(came) > 2
    monkeypatch.setattr(run, "interrupts", lambda: contextlib.nullcontext(Later()))
    folder = train("--batch", 1)
    assert weights(folder)["step"] == 0 and val_lines(folder) == []
    monkeypatch.undo()
    monkeypatch.setattr(script, "finish", lambda *a: None)
    script.main(["--resume", str(folder)])
    assert [m["step"] for m in val_lines(folder)] == [0, 4, 8]


def test_a_full_disk_keeps_the_old_checkpoint(train, capsys):
    """The only checkpoint replaced by half a new one."""
    resource = pytest.importorskip("resource")      # not on Windows
    folder = train("--stop_at", 4)
    before = (folder / "ckpt.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            script.main(["--resume", str(folder)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert stop.value.code == 2 and "disk full" in capsys.readouterr().err
    assert (folder / "ckpt.pt").read_bytes() == before and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "flipped"])
def test_a_damaged_checkpoint_is_noticed(train, damage):
    """Truncation raises three kinds of error by place; one flipped byte loads with none."""
    folder = train("--stop_at", 1)
    path, content = folder / "ckpt.pt", bytearray((folder / "ckpt.pt").read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
    shorter = {"cut": content[:-9], "half": content[: len(content) // 2], "empty": b""}
    path.write_bytes(shorter.get(damage, content))
    with pytest.raises(UserError, match="damaged"):
        run.load(folder, "cpu")


def test_a_checkpoint_of_another_shape_is_refused(train, capsys):
    """A wall of state_dict keys."""
    folder = train("--stop_at", 1)
    stored = json.loads((folder / "options.json").read_text("utf-8"))
    stored["options"]["n_embd"] = 32
    (folder / "options.json").write_text(json.dumps(stored), "utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(["--resume", str(folder)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "does not fit" in said and len(said) < 500


@pytest.mark.parametrize("content", [[1, 2], {"step": 1}, run.UserError("x")])
def test_a_checkpoint_that_is_something_else_is_refused(train, content):
    """A KeyError, or an object that weights_only refuses with an error of its own kind."""
    folder = train("--stop_at", 1)
    torch.save(content, folder / "ckpt.pt")
    with pytest.raises(UserError, match="damaged"):
        run.load(folder, "cpu")


def test_resume_refuses_other_data(train, dataset, tmp_path, capsys):
    """A folder prepared again from other texts, with a vocabulary of equal size."""
    folder = train("--stop_at", 1)
    moved = shutil.copytree(dataset, tmp_path / "moved")
    script.main(["--resume", str(folder), "--data", str(moved), "--stop_at", "2"])      # the same, elsewhere
    meta = json.loads((moved / "meta.json").read_text("utf-8"))
    (moved / "meta.json").write_text(json.dumps(meta | {"source": "other"}), "utf-8")
    with pytest.raises(SystemExit):
        script.main(["--resume", str(folder), "--data", str(moved)])
    assert "not the data" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_device_and_its_options(train):
    """A run begun with --device cpu that goes on somewhere else."""
    folder = train("--stop_at", 1)
    options = run.read_options(["--resume", str(folder)])
    assert options.device == "cpu" and options.stop_at == 0 and options.steps == 8


def test_stopping_before_the_start_is_refused(train, capsys):
    """An error about a variable that was never set."""
    folder = train("--stop_at", 3)
    with pytest.raises(SystemExit):
        script.main(["--resume", str(folder), "--stop_at", "2"])
    assert "is at step 3" in capsys.readouterr().err


def test_an_interrupt_in_the_last_evaluation_is_one(train, monkeypatch):
    """Ctrl-C at the very end that is answered with a sample and figures."""
    finished = []
    monkeypatch.setattr(script, "finish", lambda *a: finished.append(1))
    honest = script.evaluate

    def slow(model, windows, context, stop):
        found = honest(model, windows, context)
        if len(found["loss"]["causal"]) and slow.calls == 2:
            stop.append(True)
        slow.calls += 1
        return None if stop else found
    slow.calls = 0
    monkeypatch.setattr(script, "evaluate", slow)
    folder = train()
    assert not finished and weights(folder)["step"] == 8


def test_backward_keeps_the_types_of_forward(dataset):
    """Backward inside autocast: gradients of fp32 routers rounded to bfloat16."""
    torch.manual_seed(0)
    options = run.read_options(TINY)
    model = run.build(options, 300)
    ids = torch.randint(0, 300, (2, 4, 32))
    with run.autocast(torch.device("cpu"), "bfloat16"):
        script.aligned(model, Batch(*ids, positions(ids[0])), 1 / 128, options)
    g = model.blocks[1].router.weight.grad
    assert not torch.equal(g, g.bfloat16().float())


def test_a_machine_without_git_can_train(train, monkeypatch):
    """The first command of a newcomer ending in FileNotFoundError."""
    def missing(*a, **k):
        raise FileNotFoundError("git")
    monkeypatch.setattr(run.subprocess, "run", missing)
    folder = train("--stop_at", 1)
    assert json.loads((folder / "options.json").read_text("utf-8"))["commit"] == "unknown"


def test_a_second_run_gets_a_new_number(train, tmp_path):
    """A run that overwrites the one before."""
    out = tmp_path / "numbered"
    assert [train("--steps", 1, out=out).name for _ in range(3)] == ["001", "002", "003"]
    (out / "041").mkdir()
    assert run.new_folder(out).name == "042"


def test_what_is_logged(train):
    """Losses of every exit under both rules, and the causal rule beside its base rate."""
    folder = train()
    line = val_lines(folder)[-1]
    assert set(line["loss"]) == {"top_k", "causal"} and all(len(v) == 4 for v in line["loss"].values())
    assert set(line["imitation"]) == {"accuracy", "base_rate", "precision", "recall"}
    assert line["imitation"]["base_rate"] == 0.875      # 4 of 32 tokens
    assert 0 < line["bits_per_byte"] < 20 and 0 <= line["causal_share"] <= 1
    dense = val_lines(train("--routed", "none"))[-1]
    assert set(dense["loss"]) == {"top_k"} and "imitation" not in dense


def test_training_learns(train):
    """Everything runs and nothing is learnt."""
    folder = train("--steps", 60, "--lr", 0.01, "--eval_every", 60)
    first, last = (m["loss"]["causal"][-1] for m in (val_lines(folder)[0], val_lines(folder)[-1]))
    assert last < 0.6 * first
