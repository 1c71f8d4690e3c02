"""Reproduce a result, point by point: python reproduce.py dat --scale cpu --source DIR

A point is one training run and its evaluation. A point whose JSON is there is never run again, and one that
was interrupted goes on from its checkpoint: give the same command again. Kept in results/NAME-SCALE/:

    POINT.json      numbers, options, command, commit, hardware, seconds
    table.md, figure.png        drawn from the JSON files alone
    POINT.SPLIT.RULE.txt        what was translated

    dat         Depth-Adaptive Transformer: every exit of an aligned model, models of fewer blocks, mixed
                training, learned exits and confidence, copied and computed states [DAT 2, 3; table 1]
    mod-isoflop Mixture-of-Depths: equal training FLOPs for a dense model, MoD at several capacities and the
                random control, in several sizes; three seeds for the best of each arm [MoD 4.1, figure 3]
    mod-sampling    what decides when top-k cannot, and how well; goes on from mod-isoflop [MoD 3.5, 4.2]
"""
import dataclasses
import importlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

import cost
import run
from data.common import UserError, command, is_prepared
from model import GPTConfig

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


def markdown(head, rows):
    """Column names and rows of strings -> a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def dat_data(scale):
    """-> the folder under data/, the set that it is prepared as, and words for its prepare.py."""
    name = "iwslt14" if scale == "paper" else "multi30k"
    return name, name, []


def dat_points(scale, found):
    """The thresholds of a learned exit are operating points of one predictor; vectors of confidence
    thresholds are searched on the validation set, and the test set is read once."""
    name, direction, tests = dat_data(scale)[0], "en-de", ["test_2016_flickr"]
    if scale == "paper":
        direction, tests = "de-en", ["test"]
    more = "--n_embd 256 --enc_embd 512 --embeddings separate --n_inner 1024 --enc_layer 6 --dropout 0.3 " \
        "--batch_tokens 8192 --steps 6000 --warmup 1000".split() if scale == "gpu" else []
    train = [name, "--translate", direction, *more]
    fixed, bleu = [f"fixed:{e}" for e in range(1, 6)], ["--bleu", *tests]
    points = [Point("aligned", train, [*bleu, "--rules", *fixed, "full", "random", *ORACLES, *CONFIDENCE,
                                       "--search", "10000"]),
              Point("2-blocks", [*train, "--exits", "last", "--n_layer", "2"], [*bleu, "--rules", "full"]),
              Point("6-blocks", [*train, "--exits", "last"], [*bleu, "--rules", "full"]),
              Point("shared", [*train, "--share_blocks", "True"], [*bleu, "--rules", *fixed, "full"]),
              Point("mixed", [*train, "--objective", "mixed"], [*bleu, "--rules", *fixed, "full", "random"])]
    second = "--steps 300 --warmup 20 --batch_tokens 4096 --eval_every 300 --save_every 300".split()
    stages = {"frozen": [*second, "--objective", "halting", "--lr", "1e-2"],
              "into": [*train, *second, "--lr", "5e-4", "--average", "1"]}
    for kind, oracle, stage, *price in LEARNED:
        rules = [f"learned:{t}" for t in THRESHOLDS] if kind in ("geometric", "binary") else ["learned"]
        words = [*stages[stage], "--halting", kind, "--oracle", oracle, *(f"--exit_cost={p}" for p in price)]
        name_ = "-".join([kind, oracle, *map(str, price)] + ["into"] * (stage == "into"))
        points.append(Point(name_, words, [*bleu, "--rules", *rules], "aligned"))
    points.append(Point("computed", [], [*bleu, "--missing", "compute", "--rules", *CONFIDENCE], "aligned"))
    return points


def dat_table(found):
    """{point: its JSON} -> Markdown."""
    rows, splits = [], []
    for name, point in found.items():
        translated = point["evaluation"]["translated"]
        splits = splits or list(translated)
        for each in zip(*translated.values(), strict=True):
            r = each[0]
            rows.append([name, r["rule"], *(f"{row['bleu']:.2f}" for row in each), f"{r['exit']:.2f}",
                         f"{r['blocks']:.2f}", *(f"{r[k]:.1f}" for k in ("mflops_paper", "mflops_needed",
                                                                        "seconds"))])
    head = ["model", "rule", *(f"BLEU {s}" for s in splits), "exit", "blocks",
            "MFLOPs a sentence, all hypotheses: paper", "needed", "seconds"]
    return markdown(head, rows) + f"\n\nexit, blocks, FLOPs and seconds (beam " \
        f"{point['evaluation']['options']['beam']}) on {splits[0]}; {r['signature']}"


def dat_figure(found):
    """BLEU on the first test set against mean exit and against FLOPs: a line for the fixed exits of each
    model and for each kind of rule, its threshold beside every point; learned exits in a row of their own."""
    lines = {}          # (row of panels, label) -> rows of the table
    for name, point in found.items():
        for r in next(iter(point["evaluation"]["translated"].values())):
            kind = run.kind_of(r["rule"])
            label = name + f", {kind}" * (kind not in ("fixed", "learned"))
            lines.setdefault((int(kind == "learned"), label), []).append(r)
    if "aligned" in found:
        lines[1, "aligned"] = lines[0, "aligned"]
    fig, axes = plt.subplots(2, 2, figsize=(14, 10), sharey=True, squeeze=False)
    for row, pair in enumerate(axes):
        colors = iter(plt.cm.tab20(range(20)))
        for (_, label), rows in sorted((line for line in lines.items() if line[0][0] == row),
                                       key=lambda line: line[0][1]):
            rows, fixed = sorted(rows, key=lambda r: r["exit"]), run.kind_of(rows[0]["rule"]) == "fixed"
            color = "#888888" if label == "aligned" else next(colors)
            for ax, x in zip(pair, ("exit", "mflops_needed"), strict=True):
                ax.plot([r[x] for r in rows], [r["bleu"] for r in rows], "o-" if fixed else "s:", ms=5,
                        mfc="none", color=color, label=label)
                for r in rows if run.kind_of(rows[0]["rule"]) in ("confidence", "learned") else []:
                    ax.annotate(r["rule"].partition(":")[2], (r[x], r["bleu"]), (4, -9), color=color,
                                textcoords="offset points", fontsize=7)
        pair[0].set(xlabel="exit (mean over output tokens)", ylabel="BLEU")
        pair[1].set(xlabel="decoder MFLOPs a sentence, all hypotheses, copies counted where needed")
        if pair[1].lines:
            pair[1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    for ax in axes.flat:
        ax.grid(color="#e6e6e6")
    return fig


ARMS = {        # name -> words for train.py [MoD 3.2, 4.1]; half: without the blocks that MoD routes
    "dense": ["--routed", "none"],
    "half": ["--routed", "none", "--n_layer", "{half}"],
    "mod": [],
    "mod-50": ["--capacity", "0.5"],
    "mod-every": ["--routed", "all"],
    "random": ["--router", "random"]}
SIZES = {       # scale -> budget in FLOPs, vocabulary, block_size, tokens a step, (blocks, heads, width)
    "cpu": (3e13, 1024, 256, 4096,
            ((4, 1, 32), (4, 2, 64), (4, 3, 96), (6, 4, 128), (8, 5, 160), (10, 6, 192))),
    "gpu": (1e16, 1024, 1024, 65536,
            ((4, 3, 192), (6, 4, 256), (8, 6, 384), (10, 8, 512), (12, 10, 640), (14, 12, 768))),
    "paper": (6e18, 32768, 2048, 262144,
              ((6, 4, 256), (8, 6, 384), (10, 8, 512), (12, 12, 768), (16, 16, 1024), (20, 20, 1280)))}


def isoflop_data(scale):
    """At scale cpu the default text; larger budgets would read it too often: give your own with --source."""
    vocab = SIZES[scale][1]
    return (f"pysource-{vocab}" if scale == "cpu" else f"isoflop-{vocab}",
            "pysource" if scale == "cpu" else "text", ["--vocab-size", str(vocab)])


def isoflop_points(scale, found):
    """Every arm in sizes around its best, each for equal FLOPs, as many steps as those pay for. One
    learning rate for all, 0.3 / width, tuned for no arm. Two more seeds for the best size of each arm."""
    budget, vocab, T, tokens, sizes = SIZES[scale]
    points, best = [], {}
    for arm, words in ARMS.items():
        for L, heads, C in {"dense": sizes[:-1], "mod-every": sizes[2:]}.get(arm, sizes[1:-1]):
            name = f"{arm}-{L}x{C}"
            train = f"--data {isoflop_data(scale)[0]} --exits last --n_layer {L} --n_head {heads} --n_embd " \
                f"{C} --block_size {T} --batch {tokens // T} --lr {0.3 / C:.6f}".split()
            train += [word.format(half=L // 2) for word in words]
            steps = round(budget / (cost.training(run.read_options(train).model, vocab, T) * tokens / T))
            train += f"--steps {steps} --warmup {max(1, steps // 20)} --eval_every {steps} --log_every 1 " \
                f"--save_every {max(1, steps // 5)} --eval_windows 256".split()
            points.append(Point(name, train, []))
            if name in found:
                loss = held_out(found[name])
                best[arm] = min(best.get(arm, (math.inf, None)), (loss, points[-1]), key=lambda b: b[0])
    if all(p.name in found for p in points):
        points += [Point(f"{p.name}-seed{seed}", [*p.train, "--seed", str(1000 + seed)], [])
                   for _, p in best.values() for seed in (1, 2)]
    return points


def held_out(point):
    """Held-out loss as it would be sampled from: under the causal rule if blocks are routed."""
    loss = point["metrics"][-1]["loss"]
    return (loss.get("causal") or loss["top_k"])[-1]


def isoflop_rows(found):
    """{point: its JSON} -> {arm: rows by size}; FLOPs and step times relative to the best dense model's."""
    arms = {}
    for name, p in found.items():
        o = p["options"]
        config = GPTConfig(**{f.name: o[f.name] for f in dataclasses.fields(GPTConfig) if f.name in o})
        forward = cost.forward(config, p["vocab_size"], o["block_size"])
        arm = next(a for a in sorted(ARMS, key=len, reverse=True) if name.startswith(a + "-"))
        arms.setdefault(arm, []).append(
            {"name": name, "parameters": p["parameters"], "forward": forward, "training": p["training_loss"],
             "top_k": p["metrics"][-1]["loss"]["top_k"][-1], "held_out": held_out(p), "steps": o["steps"],
             "epochs": o["steps"] * o["batch"] * o["block_size"] / p["tokens"], "step": p["step_seconds"],
             "first": "-seed" not in name})
    unit = min(arms.get("dense") or sum(arms.values(), []), key=lambda r: r["held_out"])
    for rows in arms.values():
        rows.sort(key=lambda r: (r["parameters"], r["name"]))
        for r in rows:
            r |= {"relative": r["forward"] / unit["forward"], "time": r["step"] / unit["step"]}
    return arms


def parabola(rows):
    """Least squares of held-out loss in log N -> (best N, None if it is outside the sizes or a maximum;
    coefficients, None for fewer than three sizes)."""
    x, y = np.log([r["parameters"] for r in rows]), [r["held_out"] for r in rows]
    if len({*x}) < 3:
        return None, None
    fit = np.polyfit(x, y, 2)
    best = -fit[1] / 2 / fit[0]
    return (math.exp(best) if fit[0] > 0 and x.min() <= best <= x.max() else None), fit


def isoflop_table(found):
    arms, best = isoflop_rows(found), []
    head = ["model", "parameters", "steps", "epochs", "loss: training", "held out, top-k", "held out, causal",
            "forward FLOPs / best dense", "measured step / best dense"]
    form = "{name}|{parameters:,}|{steps}|{epochs:.1f}|{training:.3f}|{top_k:.3f}|{held_out:.3f}|" \
        "{relative:.2f}|{time:.2f}"
    for arm, rows in arms.items():
        first = [r for r in rows if r["first"]]
        size = min(first, key=lambda r: r["held_out"])["parameters"]
        losses, at = [r["held_out"] for r in rows if r["parameters"] == size], parabola(first)[0]
        spread = f"{np.ptp(losses):.3f}" if len(losses) > 1 else ""
        best.append([arm, f"{size:,}", f"{np.mean(losses):.3f}", spread, str(len(losses)),
                     f"{at:,.0f}" if at else "none between"])
    return markdown(head, [form.format(**r).split("|") for rows in arms.values() for r in rows]) + "\n\n" \
        + markdown(["arm", "best size measured", "held-out loss, mean of seeds (the first chose the size)",
                    "max - min", "seeds", "best size by the parabola"], best)


def isoflop_figure(found):
    """Held-out loss against parameters with parabolas, FLOPs of a forward pass, and measured step time."""
    fig, axes = plt.subplots(1, 3, figsize=(15, 5), sharey=True)
    for color, (arm, rows) in zip(plt.cm.tab10(range(10)), isoflop_rows(found).items(), strict=False):
        line = [r for r in rows if r["first"]]
        for ax, x in zip(axes, ("parameters", "relative", "time"), strict=True):
            ax.plot([r[x] for r in rows], [r["held_out"] for r in rows], "o", color=color, ms=5, mfc="none")
            if x != "parameters":
                ax.plot([r[x] for r in line], [r["held_out"] for r in line], "-", color=color, label=arm)
        _, fit = parabola(line)
        if fit is not None:
            N = np.geomspace(line[0]["parameters"], line[-1]["parameters"], 50)
            axes[0].plot(N, np.polyval(fit, np.log(N)), "-", color=color, label=arm)
    axes[0].set(xscale="log", xlabel="parameters", ylabel="held-out loss (nats; MoD: causal routing)")
    axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0].xaxis.set_minor_formatter(NullFormatter())
    axes[1].set(xlabel="FLOPs of a forward pass / best dense model's")
    axes[2].set(xlabel="measured training step / best dense model's")
    axes[1].legend(frameon=False)
    for ax in axes:
        ax.grid(color="#e6e6e6")
    return fig


def sampling_points(scale, found):
    """The middle size of mod-isoflop (run that first), routed by whatever can decide without the future."""
    mod, control = ([p for p in isoflop_points(scale, {}) if p.name.startswith(arm)][2]
                    for arm in ("mod-", "random-"))
    size, rules, there = mod.name.removeprefix("mod"), ["--rules", "full"], f"../mod-isoflop-{scale}/"
    return [Point("predictor", [], rules, f"{there}mod{size}"),
            Point("router", [*mod.train, "--causal", "router"], rules),
            Point("sigmoid", [*mod.train, "--gate", "sigmoid"], rules),
            Point("random", [], rules, f"{there}random{size}"),
            Point("random-one", [*control.train, "--gate", "one"], rules),
            Point("dense", [], rules, f"{there}dense{size}")]


def sampling_table(found):
    L, rows = next(iter(found.values()))["options"]["n_layer"], []
    for name, p in found.items():
        last, [row] = p["metrics"][-1], p["evaluation"]["forced"]
        how = last.get("imitation")
        told = [f"{how[k]:.1%}" if how else "" for k in ("accuracy", "base_rate", "precision", "recall")]
        losses = [f"{loss:.4f}" for loss in (last["loss"]["top_k"][-1], held_out(p))]
        rows.append([name, str(p["options"]["steps"]), *losses, *told,
                     f"{row['blocks']:.2f}", f"{row['cache']:.0%}"])
    return markdown(["model", "steps", "loss: top-k", "causal", "right about top-k", "always no", "precision",
                     "recall", f"blocks run of {L}", "cache / dense"], rows)


def sampling_figure(found):
    """Held-out loss, top-k beside causal."""
    fig, ax = plt.subplots(figsize=(7, 3.5))
    place, top_k = np.arange(len(found)), [p["metrics"][-1]["loss"]["top_k"][-1] for p in found.values()]
    ax.plot(top_k, place - 0.1, "o", mfc="none", label="top-k, which sees the future")
    ax.plot([held_out(p) for p in found.values()], place + 0.1, "s", label="causal, as sampled")
    ax.set(yticks=place, yticklabels=list(found), xlabel="held-out loss (nats a token)")
    ax.invert_yaxis()
    ax.grid(color="#e6e6e6")
    ax.legend(frameon=False)
    return fig


class Experiment(NamedTuple):
    """data(scale); points(scale, {point: its JSON} so far); table and figure of the JSON files."""
    data: Callable
    points: Callable
    table: Callable
    figure: Callable


EXPERIMENTS = {"dat": Experiment(dat_data, dat_points, dat_table, dat_figure),
               "mod-isoflop": Experiment(isoflop_data, isoflop_points, isoflop_table, isoflop_figure),
               "mod-sampling": Experiment(isoflop_data, sampling_points, sampling_table, sampling_figure)}


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
    """Train the point in folder, or go on where it was stopped. -> run folder."""
    started = sorted(folder.glob("*/ckpt.pt"))
    if not started or not (started[-1].parent / "evaluation.json").exists():
        words = [*point.train, "--dtype", o.dtype, "--out", folder]
        if "--seed" not in point.train:
            words += ["--seed", o.seed]
        if point.start:
            words += ["--init", run_of(folder.parent / point.start)]
        if started:
            words = ["--resume", started[-1].parent]
        script("train.py", *words, "--device", o.device)
    made = run_of(folder)
    if not (made / "evaluation.json").exists():
        raise UserError(f"{made} was stopped before its end: the same command goes on")
    return made


def run_of(folder):
    """The run that a point made. UserError if there is none."""
    found = sorted(folder.glob("*/ckpt.pt"))
    if not found:
        raise UserError(f"{folder} holds no run: make that point of {folder.parent.name} first (and remove "
                        "its JSON if that is there without the run)")
    return found[-1].parent


def measure(point, results, o):
    """Train, evaluate, and write the point's JSON and translations."""
    folder = Path(o.runs) / f"{o.name}-{o.scale}" / point.name
    if point.train:
        folder.mkdir(parents=True, exist_ok=True)
        made = finish_training(point, folder, o)
    else:
        made = run_of((folder.parent / point.start).resolve())
    evaluating = 0
    if point.evaluate:
        shutil.rmtree(made / "outputs", ignore_errors=True)
        evaluating = script("evaluate.py", "--run", made, "--device", o.device, *point.evaluate)
    stored = run.read_json(made / "options.json")
    found = {"point": point.name, "train": ["train.py", *point.train] if point.train else [],
             "evaluate": ["evaluate.py", *point.evaluate], "start": point.start, **stored,
             "evaluation_seconds": round(evaluating), **trained_how(made),
             "evaluation": run.read_json(made / "evaluation.json")}
    if not point.train:
        found["training_seconds"] = 0
    for options in (found["options"], found["evaluation"]["options"]):
        for place in ("out", "run", "init", "resume"):      # paths of this machine
            options.pop(place, None)
    results.mkdir(parents=True, exist_ok=True)
    for path in sorted((made / "outputs").glob("*.txt")):
        shutil.copy(path, results / f"{point.name}.{path.name}")
    run.write_text(results / f"{point.name}.json", json.dumps(found, indent=1) + "\n")


def trained_how(made):
    """What a run's files say about its training: loss of the last exit over the last tenth of the steps."""
    metrics = run.read_metrics(made)
    steps = [m for m in metrics if m["kind"] == "train"]
    losses = [m["loss"][-1] for m in steps]
    times = [m.get("seconds", math.nan) for m in steps]         # nan: of an older version
    splits = run.read_json(made / "meta.json", "splits")
    return {"parameters": run.read_json(made / "evaluation.json", "parameters"),
            "vocab_size": run.read_json(made / "meta.json", "vocab_size"),
            "training_loss": float(np.mean(losses[-max(1, len(losses) // 10):])),
            "tokens": splits["train"]["tokens"],
            "step_seconds": float(np.quantile(times, 0.1)),     # as on a machine that does nothing else
            "training_seconds": round(float(np.median(times)) * steps[-1]["step"], 1),
            "metrics": [m for m in metrics if m["kind"] == "val"]}


def draw(name, results, found):
    """table.md and figure.png from {point: its JSON}."""
    _, _, table, figure = EXPERIMENTS[name]
    if found:
        heading = ["- {point}: `python {words}`{after}, seed {seed}, {dtype}, commit {commit}, {device}, "
                   "{threads} threads, torch {torch}, {minutes:.0f} min of training".format(
                       **f, **{k: f["options"][k] for k in ("seed", "dtype")},
                       after=f" after {f['start']}" * bool(f["start"]),
                       words=" ".join(f["train"] or f["evaluate"]), minutes=f["training_seconds"] / 60)
                   for f in found.values()]
        run.write_text(results / "table.md", "\n".join([*heading, "", table(found), ""]))
        fig = figure(found)
        fig.savefig(results / "figure.png", dpi=110, bbox_inches="tight")
        plt.close(fig)
        print(f"wrote {results}/table.md and {results}/figure.png from {len(found)} points")


def read_points(experiment, scale, results):
    """-> the experiment's points, {point: its JSON} of those that are done, in the same order."""
    found = {p.stem: run.read_json(p) for p in results.glob("*.json")}
    odd = [name for name, point in found.items() if "point" not in point]
    if odd:
        raise UserError(f"{results / odd[0]}.json is not what a point left behind")
    points = experiment.points(scale, found)
    return points, {p.name: found[p.name] for p in points if p.name in found}


@command
def main(argv=None):
    o = run.parse(argv, Options)
    experiment, results = EXPERIMENTS[o.name], Path(o.out) / f"{o.name}-{o.scale}"
    points, found = read_points(experiment, o.scale, results)
    unknown = set(o.points) - {p.name for p in points}
    if unknown:
        raise UserError(f"--points {min(unknown)}: there are {', '.join(p.name for p in points)}")
    folder, dataset, words = experiment.data(o.scale)
    if not is_prepared(run.HERE / "data" / folder):
        words += ["--out", str(run.HERE / "data" / folder)]
        words += ["--source", str(o.source)] if o.source else []
        if dataset == "text" and not o.source:
            raise UserError(f"--scale {o.scale} needs a long text: give a file or folder with --source")
        importlib.import_module(f"data.{dataset}.prepare").main(words)
    began, made = time.perf_counter(), 0
    while True:
        wanted = [p for p in points if not o.points or p.name in o.points]
        missing = [p for p in wanted if p.name not in found]
        gone = (time.perf_counter() - began) / 60
        left = f", about {gone / made * len(missing):.0f} left" if made else ""
        print(f"\n{o.name} at scale {o.scale}: {len(wanted)} points, {len(missing)} to do "
              f"({gone:.0f} min gone{left})", flush=True)
        draw(o.name, results, found)
        if not missing:
            return
        measure(missing[0], results, o)
        made += 1
        points, found = read_points(experiment, o.scale, results)


if __name__ == "__main__":
    main()
