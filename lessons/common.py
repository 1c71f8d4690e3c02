"""Shared by the lessons: small models, trained once and kept in runs/lessons.

For the tests: LESSON_STEPS in the environment sets how long, and then all is written below the current
folder; LESSON_PYSOURCE and LESSON_HOPS set on what."""
import contextlib
import io
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import plot  # noqa: E402, F401     figures look like those of the project
import run  # noqa: E402
import train  # noqa: E402
from data.batches import batches_of, open_data  # noqa: E402

SMALL = "--n_layer 6 --n_embd 64 --n_head 4 --block_size 128 --batch_size 8 --lr 0.01 --warmup 20"
HERE = Path() if "LESSON_STEPS" in os.environ else ROOT
RUNS = HERE / "runs" / "lessons"


def trained(options="", steps=150, base=SMALL, data="pysource", name="", start=""):
    """Train a model by `base` (a preset or options) and further options, or find it trained -> model on the
    CPU in eval mode, its options, data set, validation batches. name: of its folder in runs/lessons, left
    out: made of the options; start: the name of the one whose weights it begins with."""
    data = os.environ.get(f"LESSON_{data.upper()}", data)
    steps = int(os.environ.get("LESSON_STEPS", steps))
    out = RUNS / (name or "_".join([Path(data).name, *options.replace("--", "").split(), str(steps)]))
    folder, done = out / "001", -1
    with contextlib.suppress(Exception):        # there is none
        done = run.load(folder, "cpu")["step"]
    if done < steps:
        print(f"training a small model for {steps} steps ({name or options or 'default'}) ...", flush=True)
        # one step more is planned than is made, so that train.py does not evaluate and draw in the end
        words = [*base.split(), *options.split(), "--data", data, "--steps", steps + 1, "--out", out]
        words += ["--init_from", RUNS / start / "001"] if start else []
        if done >= 0:                           # it was interrupted
            words = ["--resume", folder]
        else:
            shutil.rmtree(out, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([*map(str, words), "--stop_at", str(steps)])
        if run.load(folder, "cpu")["step"] < steps:
            raise SystemExit("interrupted: the same lesson goes on from here")
    _, o, _, model, _ = run.open_run(folder, device="cpu")
    data = open_data(o.data, o.translate)[1]
    return model, o, data, batches_of(data, "val", o).fixed(o.eval_windows)


def save(figure, name):
    """Write a figure into lessons/figures."""
    path = HERE / "lessons" / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    print(f"wrote lessons/figures/{name}.png")


def exercise(check, mine):
    """Run a checker on the reader's function, which begins as NotImplementedError."""
    try:
        print("exercise:", "right" if check(mine) else "not yet right")
    except NotImplementedError:
        print("exercise: not begun")


torch.manual_seed(0)
