"""Training can be trusted: exact resume, atomic checkpoints, clean stops, fixed evaluation, correct steps."""
import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, texts, tiny, with_other_words
from test_scripts import no_figures, refused  # noqa: F401

import run
import train as script
from data.batches import Batch, Windows
from model import position_ids
from options import Options, read_options


def weights(folder):
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    return {part: state[part] for part in ("step", "model", "optimizer")}


def equal(a, b):
    """Every tensor and number of two nested states is equal, bit for bit."""
    try:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


def lines(folder, kind):
    return [m for m in run.read_metrics(folder) if m["kind"] == kind]


def val_lines(folder):
    return lines(folder, "val")


@pytest.mark.parametrize("k", [1, 3, 4, 8])
def test_stopping_and_resuming_changes_no_bit(train, tmp_path, k):
    """Data replayed from step 0, a lost optimiser, random numbers that depend on the process; evaluation that
    draws from the random numbers of training, or leaves gradients or another mode behind; lines after the
    checkpoint that stand twice, a half-written one that breaks the file."""
    extra = ["--dropout", "0.1", "--grad_accum_steps", "2"]
    whole = train(*extra, out=tmp_path / "a")
    part = train(*extra, "--stop_at", k, "--eval_every", 1, out=tmp_path / "b")
    with open(part / "metrics.jsonl", "a", encoding="utf-8") as file:       # as if killed after a checkpoint
        file.write('{"kind": "val", "step": 9, "loss": [1]}\n{"kind": "tr')
    script.main(["--resume", str(part)])
    assert equal(weights(whole), weights(part)) and weights(part)["step"] == 8
    assert val_lines(whole) == val_lines(part)[::4] and len(val_lines(part)) == 9
    steps = [[(m["step"], m["loss"]) for m in lines(folder, "train")] for folder in (whole, part)]
    assert steps[0] == steps[1] and [s for s, _ in steps[1]] == list(range(1, 9))


def test_a_step_is_clipped_and_finite_or_not_taken(train, tmp_path, monkeypatch, capsys):
    """Clipping after the optimiser has used the gradients; a nan in the gradient alone, a run that goes on
    with it, or a checkpoint full of it."""
    norms, aligned, step = [], script.aligned, torch.optim.AdamW.step

    def broken(model, *a):
        sums = aligned(model, *a)
        if len(norms) == 6:
            model.wte.weight.grad[0, 0] = float("nan")
        return sums

    def noted(self, *a):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(grads).norm().item())
        return step(self, *a)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    monkeypatch.setitem(script.OBJECTIVES, "aligned", broken)
    said = pytest.raises(SystemExit, train, "--grad_clip", 0.01).value.code     # printed, with exit status 1
    assert "step 6" in said and "step 4" in said and "--lr" in said and len(norms) == 6
    assert max(norms) <= 0.0101 < min(m["norm"] for m in lines(tmp_path / "runs" / "001", "train"))


def test_the_learning_rate():
    """A schedule that never warms up, or ends elsewhere than lr * lr_end."""
    options = read_options(["--steps", "100", "--warmup", "10", "--lr", "0.5", "--lr_end", "0.1"], None)
    rates = [script.learning_rate(t, options) for t in range(101)]
    assert rates[0] == 0.05 and rates[9] == rates[10] == 0.5 and rates[100] == pytest.approx(0.05)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_every_piece_of_every_step_draws_anew(train, monkeypatch):
    """The same dropout at every step, for every piece, or for every seed."""
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or seed(n))
    monkeypatch.setattr(script, "evaluate_loss", lambda *a: None)
    for number in 0, 1:
        train("--grad_accum_steps", 2, "--seed", number, "--stop_at", 4)
    assert len(set(seeds)) == len(seeds) == 2 * (1 + 4 * 2)


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
    """Inputs and targets out of step, the last window unreachable, windows that repeat."""
    tokens = np.arange(100, dtype=np.uint16)
    data = Windows(tokens, 8, 64)
    batch = data.step(0, 3)
    assert torch.equal(batch.ids + 1, batch.targets) and batch.ids.shape == (64, 8) and batch.live is None
    assert len({tuple(data.step(*at).ids[:, 0].tolist()) for at in np.ndindex(2, 20)}) == 40
    seen = torch.cat([data.step(0, t).targets.flatten() for t in range(30)])
    assert seen.max() == 99 and seen.min() == 1
    fixed = Windows(tokens, 8, 2).fixed(5)
    assert [b.ids[:, 0].tolist() for b in fixed] == [[0, 22], [45, 68], [91]]
    assert fixed[-1].targets[-1, -1] == 99 and sum(len(b.ids) for b in data.fixed(500)) == 12


@pytest.mark.parametrize("name, call, sent, step, evaluated", [
    ("step_once", 6, signal.SIGTERM, 6, [0, 4]), ("evaluate_loss", 1, signal.SIGINT, 0, []),
    ("evaluate_loss", 3, signal.SIGINT, 8, [0, 4])])
def test_a_signal_saves_and_stops(train, monkeypatch, capsys, name, call, sent, step, evaluated):
    """A preempted job that loses its work, a traceback on Ctrl-C; a signal during an evaluation that is seen
    only at its end or, in the last one, answered with a sample and figures."""
    calls, honest = iter(range(1, 20)), getattr(script, name)

    def interrupted(*a):
        if next(calls) == call:
            signal.raise_signal(sent)
        return honest(*a)
    monkeypatch.setattr(script, name, interrupted)
    folder = train()
    assert weights(folder)["step"] == step and [m["step"] for m in val_lines(folder)] == evaluated
    assert "--resume" in capsys.readouterr().out        # and not a sample and figures
    script.main(["--resume", str(folder)])
    assert [m["step"] for m in val_lines(folder)] == [0, 4, 8]


def test_a_second_interrupt_ends_at_once():
    """Ctrl-C that is noted again and again, or for ever after."""
    before = signal.getsignal(signal.SIGINT)
    with run.interrupts() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert stop
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_validation_loss_that_is_not_finite_ends_the_run(train, tmp_path, monkeypatch):
    """A last checkpoint of a model that has diverged, exit status 0, figures that cannot be drawn."""
    losses = iter([1.0, float("nan")])
    monkeypatch.setattr(script, "evaluate_loss", lambda *a: {"loss": {"top_k": [next(losses)]}})
    with pytest.raises(SystemExit, match="step 4: the validation loss is not finite.* holds step 0"):
        train("--routed", "none")
    assert weights(tmp_path / "runs" / "001")["step"] == 0


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_full_disk_keeps_the_old_checkpoint(train, capsys, monkeypatch, error):
    """The only checkpoint replaced by half a new one; an error of torch.save that is no OSError."""
    def full(state, file):
        file.write(b"half")
        raise error("no space")
    folder = train("--stop_at", 4)
    before = (folder / "ckpt.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    assert "disk full" in refused(capsys, script.main, "--resume", folder)
    assert (folder / "ckpt.pt").read_bytes() == before and not list(folder.glob("*.tmp"))


def test_other_data_is_refused(train, dataset, tmp_path, capsys):
    """A folder prepared again from other texts, with a vocabulary of equal size: the ids mean other words."""
    folder = train("--stop_at", 1)
    moved = shutil.copytree(dataset, tmp_path / "moved")
    script.main(["--resume", str(folder), "--data", str(moved), "--stop_at", "2"])      # the same data
    from_run = ["--init_from", folder, "--data", moved, "--out", tmp_path / "new", *TINY[8:]]
    script.main([*map(str, from_run), "--stop_at", "1"])
    meta = run.read_json(moved / "meta.json")
    (moved / "meta.json").write_text(json.dumps(meta | {"source": "other texts"}), "utf-8")
    assert "meta.json differs" in refused(capsys, script.main, "--resume", folder, "--data", moved)
    from_run[3] = with_other_words(dataset, tmp_path / "other")
    assert "tokenizer.json differs" in refused(capsys, script.main, *from_run)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["001"]


def test_backward_keeps_the_types_of_forward():
    """Backward inside autocast: gradients of fp32 routers rounded to bfloat16."""
    model, batch, kept = tiny().float(), Batch(texts(1), texts(2), position_ids(texts(1))), []
    keep = SimpleNamespace(param_groups=[], zero_grad=lambda set_to_none: None,
                           step=lambda: kept.append(model.blocks[1].router.weight.grad.clone()))
    data = SimpleNamespace(step=lambda seed, t: batch)
    script.step_once(model, keep, data, Options(), 0, run.autocast(torch.device("cpu"), "bfloat16"))
    assert not torch.equal(kept[0], kept[0].bfloat16().float())


def test_every_run_has_a_folder_a_commit_and_a_seed(train, tmp_path, monkeypatch):
    """A run that overwrites the one before; FileNotFoundError on a machine without git; an unused seed."""
    monkeypatch.setenv("PATH", "")
    (tmp_path / "041").mkdir()
    folders = [train("--steps", 1, "--seed", seed, out=tmp_path) for seed in (0, 1)]
    assert [folder.name for folder in folders] == ["042", "043"]
    assert run.read_json(folders[0] / "options.json", "commit") == "unknown"
    assert not equal(*(weights(folder)["model"] for folder in folders))


def test_training_learns_and_what_is_logged(finished):
    """Everything runs and nothing is learnt; losses of an exit or a routing rule that are missing, or the
    causal logit without its base rate."""
    first, *_, last = val_lines(finished)
    assert set(last["loss"]) == {"top_k", "causal"} and all(len(v) == 4 for v in last["loss"].values())
    assert last["loss"]["causal"][-1] < 0.6 * first["loss"]["causal"][-1]
    assert set(last["predictor"]) == {"accuracy", "base_rate", "precision", "recall"}
    assert last["predictor"]["base_rate"] == 0.875      # 4 of 32 tokens
    assert 0 < last["bits_per_byte"] < 20
