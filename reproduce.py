"""Reproduce a result, point by point: python reproduce.py dat --scale cpu --source DIR

A point is one training run and its evaluation. A point whose JSON is there is never run again, and one that
was interrupted goes on from its checkpoint: give the same command again. Kept in results/NAME-SCALE/:

    POINT.json      numbers, options, command, commit, hardware, seconds
    table.md, figure.png        drawn from the JSON files alone
    POINT.SPLIT.RULE.txt        what was translated

    dat     Depth-Adaptive Transformer: every exit of an aligned model, models of fewer blocks, mixed
            training, learned exits and confidence thresholds, copied and computed states [DAT 2, 3; table 1]
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
    """Words for train.py and for evaluate.py after it. start: the point whose weights it starts from, or
    whose run it evaluates if train is empty."""
    name: str
    train: list
    evaluate: list
    start: str = ""


CONFIDENCE = ("confidence:0.3", "confidence:0.5", "confidence:0.7", "confidence:0.9")
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
ORACLES = ["oracle:correctness:0.1", *(f"oracle:likelihood:{price}" for price in (0.02, 0.1, 0.3))]
LEARNED = [     # predictor, oracle, trunk: left as it is, or trained with it; exit_cost if not 0.1
    ("geometric", "correctness", "frozen"), ("geometric", "likelihood", "frozen"),
    ("geometric", "likelihood", "frozen", 0.02), ("geometric", "likelihood", "frozen", 0.3),
    ("geometric", "correctness", "into"), ("geometric", "likelihood", "into"),
    ("binary", "correctness", "frozen"), ("binary", "likelihood", "frozen"),
    ("token", "correctness", "frozen"), ("token", "likelihood", "frozen"),
    ("sequence", "likelihood", "frozen", 1.0)]


def dat_points(scale):
    """The thresholds of a learned exit are operating points of one predictor; vectors of confidence
    thresholds are searched on the validation set, and the test set is read once."""
    name, direction, tests = "multi30k", "en-de", ["test_2016_flickr"]
    if scale == "paper":
        name, direction, tests = "iwslt14", "de-en", ["test"]
    more = "--n_embd 256 --enc_embd 512 --embeddings separate --n_inner 1024 --enc_layer 6 --dropout 0.3 " \
        "--batch_tokens 8192 --steps 6000 --warmup 1000".split() if scale == "gpu" else []
    train = [name, "--translate", direction, *more]
    fixed, bleu = [f"fixed:{e}" for e in range(1, 6)], ["--bleu", *tests]
    found = [Point("aligned", train, [*bleu, "--rules", *fixed, "full", "random", *ORACLES, *CONFIDENCE,
                                      "--search", "10000"]),
             Point("2-blocks", [*train, "--exits", "last", "--n_layer", "2"], [*bleu, "--rules", "full"]),
             Point("6-blocks", [*train, "--exits", "last"], [*bleu, "--rules", "full"]),
             Point("shared", [*train, "--share_blocks", "True"], [*bleu, "--rules", *fixed, "full"]),
             Point("mixed", [*train, "--objective", "mixed"], [*bleu, "--rules", *fixed, "full", "random"])]
    second = "--steps 300 --warmup 20 --batch_tokens 4096 --eval_every 300 --save_every 300".split()
    stages = {"frozen": [*second, "--objective", "halting", "--lr", "1e-2"],
              "into": [*train, *second, "--lr", "5e-4", "--average", "1"]}
    for kind, oracle, stage, *cost in LEARNED:
        points = [f"learned:{t}" for t in THRESHOLDS] if kind in ("geometric", "binary") else ["learned"]
        words = [*stages[stage], "--halting", kind, "--oracle", oracle, *(f"--exit_cost={c}" for c in cost)]
        name_ = "-".join([kind, oracle, *map(str, cost)] + ["into"] * (stage == "into"))
        found.append(Point(name_, words, [*bleu, "--rules", *points], "aligned"))
    found.append(Point("computed", [], [*bleu, "--missing", "compute", "--rules", *CONFIDENCE], "aligned"))
    return name, found


def dat_table(found):
    """{point: its JSON} -> Markdown."""
    lines, named = [], []
    for name, point in found.items():
        splits = point["evaluation"]["translated"]
        named = named or list(splits)
        for rows in zip(*splits.values(), strict=True):
            r, bleu = rows[0], " | ".join(f"{row['bleu']:.2f}" for row in rows)
            lines.append(f"| {name} | {r['rule']} | {bleu} | {r['exit']:.2f} | {r['blocks']:.2f} | "
                         f"{r['mflops_paper']:.1f} | {r['mflops_needed']:.1f} | {r['seconds']:.1f} |")
    head = f"| model | rule | {' | '.join(f'BLEU {s}' for s in named)} | exit | blocks | " \
           "MFLOPs a sentence, all hypotheses: paper | needed | seconds |"
    return "\n".join(["", head, "|---" * head.count(" |") + "|", *lines, "",
                      f"exit, blocks, FLOPs and seconds (beam {point['evaluation']['options']['beam']}) on "
                      f"{named[0]}; {r['signature']}"])


def kind_of(rule):
    """The line of the figure that a rule belongs to."""
    kind, _, value = rule.partition(":")
    return "searched thresholds" if "," in value else "fixed" if kind == "full" else kind


def dat_figure(found):
    """BLEU on the first test set against mean exit and against FLOPs: a line for the fixed exits of each
    model and for each kind of rule, its threshold beside every point."""
    fig, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    colors = iter(plt.cm.tab20(range(20)))
    for name, point in found.items():
        rows = next(iter(point["evaluation"]["translated"].values()))
        for kind in dict.fromkeys(kind_of(r["rule"]) for r in rows):
            mine = sorted((r for r in rows if kind_of(r["rule"]) == kind), key=lambda r: r["exit"])
            style = {"fixed": "o-", "random": "x"}.get(kind, "s:")
            color = next(colors)
            for ax, x in zip(axes, ("exit", "mflops_needed"), strict=True):
                ax.plot([r[x] for r in mine], [r["bleu"] for r in mine], style, ms=5, mfc="none", color=color,
                        label=name + f", {kind}" * (kind != "fixed"))
                for r in mine if kind in ("confidence", "learned") else []:
                    ax.annotate(r["rule"].partition(":")[2], (r[x], r["bleu"]), (4, -10), color=color,
                                textcoords="offset points", fontsize=8)
    axes[0].set(xlabel="exit (mean over output tokens)", ylabel="BLEU")
    axes[1].set(xlabel="decoder MFLOPs a sentence, copies counted where needed")
    axes[1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    for ax in axes:
        ax.grid(color="#e6e6e6")
    return fig


EXPERIMENTS = {"dat": (dat_points, dat_table, dat_figure)}


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
    if not started or not (started[-1].parent / "evaluation.json").exists():
        words = [*point.train, "--seed", o.seed, "--dtype", o.dtype, "--out", folder]
        if point.start:
            words += ["--init", run_of(folder.parent / point.start)]
        if started:
            words = ["--resume", started[-1].parent]
        seconds += script("train.py", *words, "--device", o.device)
        run.write_text(spent, f"{seconds}\n")
    made = run_of(folder)
    if not (made / "evaluation.json").exists():
        raise UserError(f"{made} was stopped before its end: the same command goes on")
    return made, seconds


def run_of(folder):
    """The run that a point made. UserError if there is none."""
    found = sorted(folder.glob("*/ckpt.pt"))
    if not found:
        raise UserError(f"{folder} holds no run: make the point '{folder.name}' first (--points)")
    return found[-1].parent


def measure(point, results, o):
    """Train, evaluate, and write the point's JSON and translations."""
    folder = Path(o.runs) / f"{o.name}-{o.scale}" / point.name
    if point.train:
        folder.mkdir(parents=True, exist_ok=True)
        made, training = finish_training(point, folder, o)
    else:
        made, training = run_of(folder.parent / point.start), 0
    shutil.rmtree(made / "outputs", ignore_errors=True)
    evaluating = script("evaluate.py", "--run", made, "--device", o.device, *point.evaluate)
    stored = json.loads((made / "options.json").read_text("utf-8"))
    found = {"point": point.name, "train": ["train.py", *point.train] if point.train else [],
             "evaluate": ["evaluate.py", *point.evaluate], "start": point.start, **stored,
             "training_seconds": round(training), "evaluation_seconds": round(evaluating),
             "metrics": [m for m in run.read_metrics(made) if m["kind"] == "val"],
             "evaluation": json.loads((made / "evaluation.json").read_text("utf-8"))}
    for options in (found["options"], found["evaluation"]["options"]):
        for place in ("out", "run", "init", "resume"):      # paths of this machine
            options.pop(place, None)
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
        heading = ["- {point}: `python {words}`{after}, seed {seed}, {dtype}, commit {commit}, {device}, "
                   "{threads} threads, torch {torch}, {minutes:.0f} min of training".format(
                       **f, **{k: f["options"][k] for k in ("seed", "dtype")},
                       after=f" after {f['start']}" * bool(f["start"]),
                       words=" ".join(f["train"] or f["evaluate"]), minutes=f["training_seconds"] / 60)
                   for f in found.values()]
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
