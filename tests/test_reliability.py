"""A run that cannot be lost, a file that cannot lie: random configurations, damaged files, kills, locks."""
import contextlib
import io
import os
import random
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from test_scripts import no_figures, refused  # noqa: F401
from test_train import equal, lines, weights

import evaluate
import plot
import run
import sample
import train as script
from options import Options, as_dict

SLOW = pytest.mark.slow
SPACE = {       # values to draw from, now and then a bad one
    "n_layer": [1, 2, 4, 5], "n_head": [1, 2, 3], "n_embd": [12, 16, 24], "d_ff": [0, 8, 40],
    "block_size": [2, 8, 32], "dropout": [0, 0.2], "exits": ["all", "last"],
    "classifier": ["tied", "separate"],
    "exit_predictor": ["none", "sequence", "token", "geometric", "binary"],
    "routed": ["none", "odd", "even", "all", "0", "1,3", "9"], "capacity": [0.01, 0.125, 0.5, 1.0],
    "router": ["learned", "random"], "gate": ["raw", "sigmoid", "one"],
    "causal_logit": ["predictor", "router"],
    "predictor_width": [0.5, 0.01], "experts": [0, 1, 3], "noops": [0, 2], "expert_capacity": [0.1, 1.25],
    "enc_layer": [1, 2], "enc_head": [2], "enc_embd": [12, 16], "embeddings": ["tied", "separate"],
    "batch_size": [1, 2, 4], "batch_tokens": [16, 64, 256], "grad_accum_steps": [1, 2, 3], "lr": [1e-3, 1e6],
    "warmup": [0, 2], "lr_end": [0, 1], "weight_decay": [0, 0.1], "beta2": [0.5, 0.99],
    "grad_clip": [1, 1e-12],
    "label_smoothing": [0, 0.1], "objective": ["aligned", "mixed"], "exit_weights": ["1", "n", "1/n"],
    "gradient_scale": [0, 1.0], "paths": [1, 3], "oracle": ["correctness", "likelihood"],
    "exit_cost": [0, 0.3], "sigma": [0, 2.0], "alpha": [0, 1.0], "predictor_loss": [0, 0.01],
    "balance_loss": [0, 1], "route": ["top_k", "causal"], "seed": [0, 5], "dtype": ["float32", "bfloat16"],
    "rule": ["auto", "full", "random", "fixed:2", "confidence:0.1", "learned"], "eval_every": [1, 2],
    "eval_windows": [1, 3], "save_every": [1, 2]}
FAIR = "leaves no room|reads at most|no run|ckpt.pt|not finite"     # refusals of what could be trained
ELSEWHERE = {"data", "translate", "out", "init_from", "resume", "steps", "stop_at", "device", "compile"}


def outcome(main, *words):
    """Run a script in this process -> its exit status and what it said on stderr. A traceback fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            return (end.code, said.getvalue()) if isinstance(end.code, int) else (1, end.code)
    return 0, said.getvalue()


def content(*folders):
    """{path: bytes} of all files below some folders."""
    return {p: p.read_bytes() for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(n, marks=SLOW) for n in range(30, 300))])
def test_a_random_configuration_works_or_is_refused(dataset, pairs, tmp_path, seed):
    """A traceback, a run that resumes as another or cannot be sampled or measured; a refusal that has
    written something. Exit status 1 is a loss or a gradient that is not finite, and says so."""
    assert SPACE.keys() | ELSEWHERE == as_dict(Options()).keys()
    draw, out, again = random.Random(seed), tmp_path / "whole", tmp_path / "part"
    given = {"n_layer": 4, "n_head": 2, "n_embd": 16, "block_size": 32, "data": dataset, "eval_windows": 2}
    if draw.random() < 0.4:
        given |= {"data": pairs, "translate": "aa-bb", "enc_head": 2, "enc_embd": 16}
    given |= {name: draw.choice(SPACE[name]) for name in draw.sample(sorted(SPACE), draw.randint(1, 4))}
    words = [*(f"--{name}={value}" for name, value in given.items()), "--steps=5", "--device=cpu", "--out"]
    code, said = outcome(script.main, *words, out)
    if code == 2:
        assert not out.exists() and re.search(r"^error: .*\n$|(-|─){9}", said), said
        return
    assert code == 0 or code == 1 and "is not finite" in said
    first, _ = outcome(script.main, *words, again, "--stop_at=3")
    folder, other = again / "001", out / "001"
    if code == first == 0:
        assert outcome(script.main, "--resume", folder)[0] == 0
        assert equal(weights(folder), weights(other)) and weights(folder)["step"] == 5
        for kind in "train", "val":
            assert [m["loss"] for m in lines(folder, kind)] == [m["loss"] for m in lines(other, kind)]
    scripts = (sample.main, []), (evaluate.main, ["--rules", "full"]), (plot.main, [])
    for main, more in scripts if seed % 10 == 0 else scripts[seed % 2:][:1]:
        code, said = outcome(main, "--run", folder, *more)
        assert code == 0 or code == 2 and re.search(FAIR, said), said


DAMAGES = {
    "missing": None, "empty": lambda old: b"", "half": lambda old: old[:len(old) // 2],
    "one byte": lambda old: old[:len(old) // 2] + bytes([old[len(old) // 2] ^ 255]) + old[len(old) // 2 + 1:],
    "not UTF-8": lambda old: b"\xff\xfe" + old, "a zero": lambda old: old + b"\0"}
OTHER_JSON = {"a list": lambda old: b"[3]\n", "null": lambda old: b"null\n", "a number": lambda old: b"7\n",
              "no keys": lambda old: b"{}\n", "other rows": lambda old:
              b'{"forced": [3], "translated": {}, "texts": [3], "n_layer": 4}\n'}
READ_BY = {     # a file of a run or, with "data/", of a data set -> what reads it
    "options.json": "resume init sample evaluate", "meta.json": "resume init sample evaluate",
    "tokenizer.json": "resume init sample evaluate plot", "ckpt.pt": "resume init sample evaluate",
    "metrics.jsonl": "resume plot", "depth.npz": "plot", "sample.json": "plot",
    "evaluation.json": "plot evaluate", "data/meta.json": "train resume init evaluate",
    "data/tokenizer.json": "train resume init evaluate", "data/train.bin": "train resume init evaluate",
    "data/val.bin": "train resume init evaluate"}
FIGURES = {"metrics.jsonl", "depth.npz", "sample.json", "evaluation.json"}     # what plot.py draws, if there
FINE = {("metrics.jsonl", "plot", "half"), ("evaluation.json", "evaluate", "missing"),      # as after a crash
        *((file, "plot", "missing") for file in FIGURES),
        *((file, reader, "a zero") for file in ("metrics.jsonl", "ckpt.pt", "depth.npz")
          for reader in READ_BY[file].split())}         # half a line; a zip file may have more after its end


@pytest.mark.parametrize("file, reader", [(f, r) for f, readers in READ_BY.items() for r in readers.split()])
def test_a_damaged_file_is_refused_by_name(folder, dataset, tmp_path, file, reader):
    """A traceback, an answer from half a file, another file's name, something overwritten."""
    data = shutil.copytree(dataset, tmp_path / "data")
    use_data = ["--data", data] if file.startswith("data/") else []
    main, *words = {
        "train": (script.main, "--out", tmp_path / "new", *TINY), "resume": (script.main, "--resume", folder),
        "init": (script.main, "--init_from", folder, "--out", tmp_path / "new", *TINY[8:]),
        "sample": (sample.main, "--run", folder), "evaluate": (evaluate.main, "--run", folder),
        "plot": (plot.main, "--run", folder)}[reader]
    path = tmp_path / file if use_data else folder / file
    if reader == "plot":        # the files drawn before it
        for other in FIGURES - {file, "depth.npz" if file == "tokenizer.json" else file}:
            (folder / other).unlink()
    whole = path.read_bytes()
    for damage, change in (DAMAGES | (OTHER_JSON if "json" in file else {})).items():
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(whole))
        before = content(tmp_path)
        code, said = outcome(main, *words, *use_data)
        if (file, reader, damage) in FINE:
            assert code == 0, said
        else:
            assert code == 2 and path.name in said and content(tmp_path) == before, (damage, code, said)
        path.write_bytes(whole)


@pytest.mark.parametrize("old, new", [('layer": 4', 'layer": 0'), ('head": 2', 'head": 0'), ("16", "9" * 8),
                                      ('"lr": 0.01', '"lr": 0.02'), ('"seed": 0', '"seed": null')])
def test_edited_options_are_refused_by_name(folder, capsys, old, new):
    """A run that goes on with another rate than it began; a division by zero, a network of any size."""
    path = folder / "options.json"
    path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")
    for main, word in (script.main, "--resume"), (sample.main, "--run"):
        assert "options.json" in refused(capsys, main, word, folder)


class Code:
    """A pickle that runs code when it is read."""
    def __reduce__(self):
        return exec, ("raise KeyboardInterrupt",)


CHECKPOINTS = {     # state s -> another
    "a list": lambda s: [1, 2], "code": lambda s: Code(), "a part alone": lambda s: {"step": 1},
    "a step in words": lambda s: s | {"step": "4"}, "a step below 0": lambda s: s | {"step": -1},
    "no weights": lambda s: s | {"model": None}, "words": lambda s: s | {"model": {"wte.weight": "x"}},
    "another shape": lambda s: s | {"model": s["model"] | {"wte.weight": torch.zeros(2, 2)}},
    "a weight more": lambda s: s | {"model": s["model"] | {"wte.bias": torch.zeros(2)}},
    "no moments": lambda s: s | {"optimizer": 3}, "a list of moments": lambda s: s | {"optimizer": [1]},
    "moments of another shape": lambda s: s | {"optimizer": {
        n: m | dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros(3)) for n, m in s["optimizer"].items()}},
    "other files": lambda s: s | {"files": {}}}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_other_content_is_refused(folder, capsys, name):
    """A crash of the fused optimiser, which compares no shapes; a KeyError; code in a pickle."""
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    torch.save(CHECKPOINTS[name](state), folder / "ckpt.pt")
    before = content(folder)
    assert f"{folder}/ckpt.pt" in refused(capsys, script.main, "--resume", folder) or name == "other files"
    assert content(folder) == before


def start(*words):
    """train.py in a process of its own."""
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, words)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def trains(process, lock):
    """Wait until a process holds the lock of a run."""
    while process.poll() is None and not (lock.exists() and lock.read_text("utf-8") == f"{process.pid}\n"):
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read()


def test_one_process_trains_a_run(folder, capsys):
    """Two that write into each other's metrics; a lock that stays when its holder has ended."""
    with run.locked(folder):
        assert f"by process {os.getpid()} " in refused(capsys, script.main, "--resume", folder)
    script.main(["--resume", str(folder)])


@SLOW
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_been(dataset, tmp_path):
    """kill -9 with a checkpoint at every step: one that cannot be read, a lost step, a lock that stays."""
    draw, out = random.Random(0), ["--data", dataset, "--out", tmp_path / "a"]
    words = [*TINY, "--steps", 10**6, "--save_every", 1, "--dropout", 0.1]
    folder, words_now = tmp_path / "a" / "001", [*words, *out]
    for _ in range(50):
        with start(*words_now) as process:
            trains(process, folder / "lock")
            while not (folder / "ckpt.pt").exists():
                time.sleep(0.01)
            time.sleep(draw.random() / 2)
            process.kill()
        step, words_now = run.load(folder, "cpu")["step"], ["--resume", folder]
    whole = [*words, "--data", dataset, "--out", tmp_path / "b"]
    for words in ["--resume", folder], whole:
        script.main([*map(str, words), "--stop_at", str(step + 3)])
    assert step and equal(weights(folder), weights(tmp_path / "b" / "001"))
    assert [m["step"] for m in lines(folder, "train")] == [*range(1, step + 4)]


CONTROLS = {    # what is lost on the way
    "moments": lambda state, training: state["optimizer"].clear(),
    "step": lambda state, training: state.update(step=0),
    "data": lambda state, training: training.append(1)}


@pytest.mark.parametrize("lost", [None, *CONTROLS])
def test_the_test_of_resuming_can_fail(train, tmp_path, monkeypatch, lost):
    """Equality that holds whatever is lost."""
    whole, part = train(out=tmp_path / "a"), train("--stop_at", 4, out=tmp_path / "b")
    honest, step, shifted = run.load, script.step_once, []

    def load(*a):
        state = honest(*a)
        if lost:
            CONTROLS[lost](state, shifted)
        return state
    monkeypatch.setattr(run, "load", load)
    monkeypatch.setattr(run, "start_metrics", lambda *a: None)
    monkeypatch.setattr(script, "step_once", lambda model, optimizer, data, *a: step(
        model, optimizer, SimpleNamespace(step=lambda seed, t: data.step(seed, t - 4 * len(shifted))), *a))
    script.main(["--resume", str(part)])
    assert equal(weights(whole), weights(part)) == (lost is None)


@pytest.mark.parametrize("full", [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory."), None])
def test_too_little_memory_is_one_line(train, monkeypatch, full):
    """A traceback of an allocator, without what to do about it."""
    def aligned(*a):
        if full:
            raise full
        return torch.empty(2**60)
    monkeypatch.setitem(script.OBJECTIVES, "aligned", aligned)
    with pytest.raises(SystemExit, match="error: out of memory, .*--grad_accum_steps"):
        train()
    monkeypatch.setitem(script.OBJECTIVES, "aligned", lambda *a: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):     # any other is a bug
        train()


@SLOW
def test_the_change_for_several_processes(train, dataset, tmp_path, monkeypatch, capsys):
    """Gradients, losses or draws other than those of one process; a second writer, a resume of something
    else; processes that train without the change, each for itself."""
    code = shutil.copytree(ROOT, tmp_path / "code", ignore=shutil.ignore_patterns(".*", "tests", "results"))
    words = ["--grad_accum_steps", 2, "--dropout", 0.1]
    alone, folder = train(*words, "--stop_at", 5), tmp_path / "together" / "001"

    def torchrun(*more):
        command = [sys.executable, *"-m torch.distributed.run --nproc_per_node 2 train.py".split()]
        subprocess.run([*command, *map(str, more)], cwd=code, capture_output=True, check=True)
    new = ["--data", dataset, "--out", folder.parent, *TINY, *words, "--stop_at", 3]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "trained by one process" in refused(capsys, script.main, *new) and not folder.parent.exists()
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    [diff] = re.findall(r"^```diff\n(.*?)^```", page, re.M | re.S)
    subprocess.run(["git", "apply", "-"], cwd=code, input=diff.encode("utf-8"), check=True)
    for more in new, ["--resume", folder, "--stop_at", 5]:
        torchrun(*more)
    torch.testing.assert_close(weights(folder)["model"], weights(alone)["model"], rtol=0, atol=1e-6)
    for kind in "train", "val":
        ours, theirs = ([(m["step"], m["loss"]) for m in lines(f, kind)] for f in (folder, alone))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert [p.name for p in folder.parent.iterdir()] == ["001"]
