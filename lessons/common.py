"""Shared by the lessons: small models, trained once and kept in runs/lessons.

LESSON_STEPS, LESSON_PYSOURCE and LESSON_HOPS in the environment change how long and on what. The tests set
them, and then all is written below the current folder."""
import contextlib
import io
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import run  # noqa: E402
import train  # noqa: E402
from data.batches import batches_of, open_data  # noqa: E402

SMALL = "--n_layer 6 --n_embd 64 --n_head 4 --block_size 128 --batch_size 8 --lr 0.01 --warmup 20"
HERE = Path() if "LESSON_STEPS" in os.environ else ROOT
RUNS = HERE / "runs" / "lessons"


def trained(words="", steps=150, base=SMALL, data="pysource", name=""):
    """Train a model by `base` and further options, or find it trained -> model in eval mode, its options,
    data set, validation batches. name: of its folder in runs/lessons; left out: made of the options."""
    data = os.environ.get(f"LESSON_{data.upper()}", data)
    steps = int(os.environ.get("LESSON_STEPS", steps))
    out = RUNS / (name or "_".join([Path(data).name, *words.replace("--", "").split(), str(steps)]))
    with contextlib.suppress(Exception):        # none yet, or not to its end
        if run.load(run.find("last", out), "cpu")["step"] == steps:
            return opened(out)
    print(f"training a small model for {steps} steps ({name or words or 'default'}) ...", flush=True)
    options = f"{base} {words} --data {data} --out {out} --steps {steps + 1} --stop_at {steps}"
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(options.split())
    return opened(out)


def opened(out):
    _, o, _, model = run.open_run("last", out)
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
