"""Shared by the lessons: small models, trained once and kept in runs/lessons.

LESSON_STEPS and LESSON_DATA in the environment change how long and on what: the tests use a few steps."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import run  # noqa: E402
import train  # noqa: E402
from data.batches import batches_of, open_data  # noqa: E402

SMALL = "--n_layer 6 --n_embd 64 --n_head 4 --block_size 128 --batch_size 8 --lr 3e-3 --warmup 20"
FIGURES = Path("lessons/figures")       # below the current folder


def trained(words="", steps=200):
    """Train SMALL with further options, or find it trained -> model in eval mode, its options, data set,
    validation batches."""
    steps = int(os.environ.get("LESSON_STEPS", steps))
    name = "_".join(words.replace("--", "").split()) or "default"
    out = Path("runs") / "lessons" / f"{name}-{steps}"
    if not (out / "001" / "ckpt.pt").exists():
        data = ["--data", os.environ.get("LESSON_DATA", "pysource"), "--out", str(out)]
        train.main([*SMALL.split(), *words.split(), *data, f"--steps={steps + 1}", f"--stop_at={steps}"])
    _, o, _, model = run.open_run(out / "001")
    data = open_data(o.data, o.translate)[1]
    return model, o, data, batches_of(data, "val", o).fixed(o.eval_windows)


def save(figure, name):
    """Write a figure into lessons/figures."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=80)
    print(f"wrote {FIGURES / name}.png")


def exercise(check, mine):
    """Run a checker on the reader's function, which begins as NotImplementedError."""
    try:
        print("exercise:", "right" if check(mine) else "not yet right")
    except NotImplementedError:
        print("exercise: not begun")


torch.manual_seed(0)
