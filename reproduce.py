"""Reproduce a result, point by point: python reproduce.py exits --scale cpu --source DIR

A point is one training run and its evaluation. A point whose JSON is there is never run again, and one that
was interrupted goes on from its checkpoint: give the same command again. Kept in results/NAME-SCALE/:

    POINT.json      numbers, options, command, commit, hardware, seconds
    table.md, figure.png        drawn from the JSON files alone
    POINT.SPLIT.RULE.txt        what was translated

    exits           BLEU of every exit of a translator trained with aligned exits [DAT 2.1, 2.2; table 1]
"""
import importlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

import run
from data.common import UserError, command, is_prepared

# ----------------------------------------------------------------------------- experiments


class Point(NamedTuple):
    """Words for train.py and for evaluate.py after it."""
    name: str
    train: list
    evaluate: list


def exits_points(scale):
    """One model for each direction, every exit of it scored on the test sets."""
    sets = {"iwslt14": ["test"], "multi30k": ["test_2016_flickr", "test_2017_flickr"]}
    name, directions = ("iwslt14", ["de-en"]) if scale == "paper" else ("multi30k", ["en-de", "de-en"])
    more = {"cpu": [], "paper": [], "gpu": "--n_embd 256 --enc_embd 512 --embeddings separate --n_inner 1024 "
            "--enc_layer 6 --dropout 0.3 --batch_tokens 8192 --steps 6000 --warmup 1000".split()}[scale]
    return name, [Point(d, [name, "--translate", d, *more], ["--bleu", *sets[name]]) for d in directions]


def exits_table(found):
    """{point: its JSON} -> Markdown."""
    lines = []
    for name, point in found.items():
        splits = point["evaluation"]["translated"]
        lines += [f"\n{name}\n", "| rule | " + " | ".join(f"BLEU {s}" for s in splits)
                  + " | exit | blocks | MFLOPs a sentence: paper | needed | seconds |",
                  "|---" * (len(splits) + 6) + "|"]
        for rows in zip(*splits.values(), strict=True):
            r, bleu = rows[0], " | ".join(f"{row['bleu']:.2f}" for row in rows)
            lines.append(f"| {r['rule']} | {bleu} | {r['exit']:.2f} | {r['blocks']:.2f} | "
                         f"{r['mflops_paper']:.0f} | {r['mflops_needed']:.0f} | {r['seconds']:.1f} |")
        lines.append(f"\nexit, FLOPs and seconds on {next(iter(splits))}; {r['signature']}")
    return "\n".join(lines)


def exits_figure(found):
    """BLEU against the exit and against FLOPs, a line for each test set; rings: the exit rule."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for name, point in found.items():
        for split, rows in point["evaluation"]["translated"].items():
            fixed = [r for r in rows if "confidence" not in r["rule"]]
            for ax, x in zip(axes, ("exit", "mflops_paper"), strict=True):
                line, = ax.plot([r[x] for r in fixed], [r["bleu"] for r in fixed], "o-", ms=4,
                                label=f"{name} {split}")
                for r in rows[len(fixed):]:
                    ax.plot(r[x], r["bleu"], "o", ms=9, mfc="none", color=line.get_color())
                    ax.annotate(r["rule"].removeprefix("exit at "), (r[x], r["bleu"]), (6, -12),
                                textcoords="offset points", fontsize=8, color=line.get_color())
    axes[0].set(xlabel="exit (mean over output tokens)", ylabel="BLEU")
    axes[1].set(xlabel="decoder MFLOPs a sentence (the paper's accounting)")
    axes[1].legend(frameon=False, fontsize=9)
    for ax in axes:
        ax.grid(color="#e6e6e6")
    return fig


EXPERIMENTS = {"exits": (exits_points, exits_table, exits_figure)}


# ----------------------------------------------------------------------------- running them


@dataclass
class Options:
    """Run the points of an experiment that are not there yet, then draw its table and figure."""
    name: tyro.conf.Positional[Literal[tuple(EXPERIMENTS)]]
    scale: Literal["cpu", "gpu", "paper"] = "cpu"
    source: Path | None = None      # the data set's files, if you have them; otherwise they are downloaded
    points: tuple[str, ...] = ()    # only these; left out: all
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    out: Path = run.HERE / "results"    # NAME-SCALE is made here
    runs: Path = run.HERE / "runs"      # the training runs themselves: NAME-SCALE/POINT is made here


def script(name, *words):
    """Run a script of ours to its end. -> seconds. UserError if it fails."""
    began = time.perf_counter()
    print(f"$ python {name} {' '.join(map(str, words))}", flush=True)
    if subprocess.run([sys.executable, run.HERE / name, *map(str, words)], check=False).returncode:
        raise UserError(f"{name} failed: the points that are done are kept, the same command goes on")
    return time.perf_counter() - began


def finish_training(point, folder, o):
    """Train the point in folder, or go on where it was stopped. -> (run folder, seconds of all attempts)."""
    spent = folder / "seconds.txt"
    seconds = float(spent.read_text("utf-8")) if spent.exists() else 0.0
    started = sorted(folder.glob("*/ckpt.pt"))
    words = ["--device", o.device] if started else \
        [*point.train, "--seed", o.seed, "--device", o.device, "--dtype", o.dtype]
    if not started or not (started[-1].parent / "evaluation.json").exists():
        more = ["--resume", started[-1].parent] if started else ["--out", folder]
        seconds += script("train.py", *words, *more)
        run.write_text(spent, f"{seconds}\n")
    made = max(folder.glob("*/ckpt.pt")).parent
    if not (made / "evaluation.json").exists():
        raise UserError(f"{made} was stopped before its end: the same command goes on")
    return made, seconds


def measure(point, results, o):
    """Train, evaluate, and write the point's JSON and translations."""
    folder = Path(o.runs) / f"{o.name}-{o.scale}" / point.name
    folder.mkdir(parents=True, exist_ok=True)
    made, training = finish_training(point, folder, o)
    evaluating = script("evaluate.py", "--run", made, "--device", o.device, *point.evaluate)
    stored = json.loads((made / "options.json").read_text("utf-8"))
    found = {"point": point.name, "train": ["train.py", *point.train],
             "evaluate": ["evaluate.py", *point.evaluate], **stored,
             "training_seconds": round(training), "evaluation_seconds": round(evaluating),
             "metrics": [m for m in run.read_metrics(made) if m["kind"] == "val"],
             "evaluation": json.loads((made / "evaluation.json").read_text("utf-8"))}
    results.mkdir(parents=True, exist_ok=True)
    for path in sorted((made / "outputs").glob("*.txt")):
        shutil.copy(path, results / f"{point.name}.{path.name}")
    run.write_text(results / f"{point.name}.json", json.dumps(found, indent=1) + "\n")


def draw(name, results, points):
    """table.md and figure.png from the JSON files that are there."""
    _, table, figure = EXPERIMENTS[name]
    paths = [results / f"{p.name}.json" for p in points]
    found = {p.stem: json.loads(p.read_text("utf-8")) for p in paths if p.exists()}
    if found:
        heading = ["- {point}: `python {words}`, seed {seed}, {dtype}, commit {commit}, {device}, {threads} "
                   "threads, torch {torch}, {minutes:.0f} min of training".format(
                       **f, **{k: f["options"][k] for k in ("seed", "dtype")}, words=" ".join(f["train"]),
                       minutes=f["training_seconds"] / 60) for f in found.values()]
        run.write_text(results / "table.md", "\n".join([*heading, table(found), ""]))
        fig = figure(found)
        fig.savefig(results / "figure.png", dpi=110, bbox_inches="tight")
        plt.close(fig)
        print(f"wrote {results}/table.md and {results}/figure.png from {len(found)} points")


@command
def main(argv=None):
    o = run.parse(argv, Options)
    dataset, points = EXPERIMENTS[o.name][0](o.scale)
    unknown = set(o.points) - {p.name for p in points}
    if unknown:
        raise UserError(f"--points {min(unknown)}: there are {', '.join(p.name for p in points)}")
    results = Path(o.out) / f"{o.name}-{o.scale}"
    if not is_prepared(run.HERE / "data" / dataset):
        words = ["--source", str(o.source)] if o.source else []
        importlib.import_module(f"data.{dataset}.prepare").main(words)
    todo = [p for p in points if p.name in (o.points or {q.name for q in points})]
    missing, began = [p for p in todo if not (results / f"{p.name}.json").exists()], time.perf_counter()
    print(f"{o.name} at scale {o.scale}: {len(todo)} points, {len(todo) - len(missing)} are there")
    for n, point in enumerate(missing):
        gone = time.perf_counter() - began
        left = f", about {gone / n * (len(missing) - n) / 60:.0f} min left" if n else ""
        print(f"\npoint {n + 1} of {len(missing)}: {point.name} ({gone / 60:.0f} min gone{left})", flush=True)
        measure(point, results, o)
        draw(o.name, results, points)
    if not missing:
        draw(o.name, results, points)


if __name__ == "__main__":
    main()
