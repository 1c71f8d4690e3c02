"""Reproduce a result, point by point: python reproduce.py dat --scale cpu --source DIR

A point is one training run and its evaluation. results/NAME-SCALE/ gets POINT.json (numbers, options,
command, commit, hardware), translations, table.md and figure.png, drawn from the JSON files alone. A point
that has its JSON is not run again, an interrupted one goes on from its checkpoint: give the same command.

    dat             every exit of an aligned model, models of fewer blocks, mixed training, learned exits and
                    confidence, copied and computed states [DAT 2, 3; table 1]
    mod-isoflop     equal training FLOPs: a dense model, MoD at several capacities, the random control, each
                    in several sizes; three seeds for the best of each arm [MoD 4.1, figure 3]
    mod-sampling    what decides when top-k cannot, and how well; goes on from mod-isoflop [MoD 3.5, 4.2]
"""
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro

import cost
import run
from data.common import UserError, command, is_prepared
from model import GPTConfig
from options import kind_of, parse, read_options


class Point(NamedTuple):
    """Arguments of train.py and of evaluate.py after it. start: the point whose weights it starts from, or
    whose run it evaluates if train is empty."""
    name: str
    train: str
    evaluate: str = ""
    start: str = ""


def markdown(head, rows):
    """Column names and rows of strings -> a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


plt.switch_backend("Agg")
plt.rcParams.update({"axes.grid": True, "grid.color": "#e6e6e6", "legend.frameon": False})

FIXED = "fixed:1 fixed:2 fixed:3 fixed:4 fixed:5"
CONFIDENCE = "confidence:0.3 confidence:0.5 confidence:0.7 confidence:0.9"
THRESHOLDS = "learned:0.3 learned:0.5 learned:0.7 learned:0.8 learned:0.9 learned:0.95"
ORACLES = "oracle:correctness:0.1 oracle:likelihood:0.02 oracle:likelihood:0.1 oracle:likelihood:0.3"
# predictor-oracle[-exit_cost]; "into": trained with the trunk, which otherwise stays as it is
LEARNED = """geometric-correctness geometric-likelihood geometric-likelihood-0.02 geometric-likelihood-0.3
    geometric-correctness-into geometric-likelihood-into binary-correctness binary-likelihood
    token-correctness token-likelihood sequence-likelihood-1.0"""


def dat_data(scale):
    """-> the folder under data/, the set that it is prepared as, and arguments of its prepare.py."""
    name = "iwslt14" if scale == "paper" else "multi30k"
    return name, name, []


def dat_points(scale, found):
    """The thresholds of a learned exit are operating points of one predictor; vectors of confidence
    thresholds are searched on the validation set, and the test set is read once."""
    train, bleu = f"{dat_data(scale)[0]} --translate en-de", "--bleu test_2016_flickr --rules"
    if scale == "gpu":
        train += " --n_embd 256 --enc_embd 512 --embeddings separate --d_ff 1024 --enc_layer 6" \
            " --dropout 0.3 --batch_tokens 8192 --steps 6000 --warmup 1000"
    if scale == "paper":
        train, bleu = "iwslt14 --translate de-en", "--bleu test --rules"
    points = [Point("aligned", train, f"--search 10000 {bleu} {FIXED} full random {ORACLES} {CONFIDENCE}"),
              Point("2-blocks", f"{train} --exits last --n_layer 2", f"{bleu} full"),
              Point("6-blocks", f"{train} --exits last", f"{bleu} full"),
              Point("mixed", f"{train} --objective mixed", f"{bleu} {FIXED} full random")]
    second = "--steps 300 --warmup 20 --batch_tokens 4096 --eval_every 300 --save_every 300"
    stages = {"frozen": f"{second} --objective exit_predictor --lr 1e-2",
              "into": f"{train} {second} --lr 5e-4 --average 1"}
    for name in LEARNED.split():
        kind, oracle, *rest = name.split("-")
        stage = stages["into" if "into" in rest else "frozen"]
        exit_cost = [f"--exit_cost={value}" for value in rest if value != "into"]
        arguments = " ".join([stage, "--exit_predictor", kind, "--oracle", oracle, *exit_cost])
        rules = THRESHOLDS if kind in ("geometric", "binary") else "learned"
        points.append(Point(name, arguments, f"{bleu} {rules}", "aligned"))
    return [*points, Point("computed", "", f"--exited_kv compute {bleu} {CONFIDENCE}", "aligned")]


def dat_table(found):
    """{point: its JSON} -> Markdown."""
    rows = []
    for name, point in found.items():
        [(split, translated)] = point["evaluation"]["translated"].items()
        for r in translated:
            rows.append([name, r["rule"], *(f"{r[k]:.2f}" for k in ("bleu", "exit", "blocks")),
                         *(f"{r[k]:.1f}" for k in ("mflops_paper", "mflops_needed", "seconds"))])
    head = ["model", "rule", f"BLEU {split}", "exit", "blocks", "MFLOPs a sentence, all hypotheses: paper",
            "needed", "seconds"]
    return markdown(head, rows) + f"\n\nbeam {point['evaluation']['options']['beam']}; {r['signature']}"


def dat_figure(found):
    """BLEU against mean exit and against FLOPs: a line for the fixed exits of each model and for each kind
    of rule, with thresholds; learned exits in a second row of panels."""
    lines = {}          # (row of panels, label) -> rows of the table
    for name, point in found.items():
        for r in next(iter(point["evaluation"]["translated"].values())):
            kind = kind_of(r["rule"])
            label = name if kind in ("fixed", "learned") else f"{name}, {kind}"
            lines.setdefault((int(kind == "learned"), label), []).append(r)
    if (0, "aligned") in lines:
        lines[1, "aligned"] = lines[0, "aligned"]       # to compare with
    fig, axes = plt.subplots(2, 2, figsize=(14, 10), sharey=True)
    colors = [iter(plt.cm.tab20(range(20))), iter(plt.cm.tab20(range(20)))]
    for (row, label), rows in sorted(lines.items(), key=lambda line: line[0]):
        kind, rows = kind_of(rows[0]["rule"]), sorted(rows, key=lambda r: r["exit"])
        color = "#888888" if label == "aligned" else next(colors[row])
        for ax, x in zip(axes[row], ("exit", "mflops_needed"), strict=True):
            ax.plot([r[x] for r in rows], [r["bleu"] for r in rows], "o-" if kind == "fixed" else "s:", ms=5,
                    mfc="none", color=color, label=label)
            for r in rows if kind in ("confidence", "learned") else []:
                ax.annotate(r["rule"].partition(":")[2], (r[x], r["bleu"]), (4, -9), color=color,
                            textcoords="offset points", fontsize=7)
    for left, right in axes:
        left.set(xlabel="exit (mean over output tokens)", ylabel="BLEU")
        right.set(xlabel="decoder MFLOPs a sentence, all hypotheses, copies counted where needed")
        if right.lines:
            right.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


ARMS = {        # name -> arguments of train.py [MoD 3.2, 4.1]; half: without the blocks that MoD routes
    "dense": "--routed none", "half": "--routed none --n_layer {half}", "mod": "", "mod-50": "--capacity 0.5",
    "mod-every": "--routed all", "random": "--router random"}
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
    points, more = [], []
    for arm, arguments in ARMS.items():
        for L, heads, C in {"dense": sizes[:-1], "mod-every": sizes[2:]}.get(arm, sizes[1:-1]):
            train = f"--data {isoflop_data(scale)[0]} --exits last --n_layer {L} --n_head {heads} " \
                f"--n_embd {C} --block_size {T} --batch_size {tokens // T} --lr {0.3 / C:.6f} " \
                + arguments.format(half=L // 2)
            model = read_options(train.split(), run.stored_options).model
            steps = round(budget / (cost.training(model, vocab, T) * tokens / T))
            train += f" --steps {steps} --warmup {max(1, steps // 20)} --eval_every {steps} --log_every 1 " \
                f"--save_every {max(1, steps // 5)} --eval_windows 256"
            points.append(Point(f"{arm}-{L}x{C}", train))
    for arm in ARMS if all(p.name in found for p in points) else []:
        best = min((p for p in points if arm_of(p.name) == arm), key=lambda p: held_out(found[p.name]))
        more += [Point(f"{best.name}-seed{n}", f"{best.train} --seed {1000 + n}") for n in (1, 2)]
    return points + more


def arm_of(name):
    """ARM-LxC or ARM-LxC-seedN, the name of a point -> ARM."""
    return re.match(r"(.+?)-\d+x\d+", name)[1]


def held_out(point):
    """Held-out loss as it would be sampled from: under the causal rule if blocks are routed."""
    loss = point["metrics"][-1]["loss"]
    return (loss.get("causal") or loss["top_k"])[-1]


def isoflop_rows(found):
    """{point: its JSON} -> {arm: rows by size}; FLOPs and step times relative to the best dense model's."""
    rows = []
    for name, p in found.items():
        o = p["options"]
        config = GPTConfig(**{field: o[field] for field in GPTConfig.__dataclass_fields__ if field in o})
        rows.append({"name": name, "arm": arm_of(name), "first": "-seed" not in name, "steps": o["steps"],
                     "parameters": p["parameters"], "training": p["training_loss"],
                     "top_k": p["metrics"][-1]["loss"]["top_k"][-1], "held_out": held_out(p),
                     "epochs": o["steps"] * o["batch_size"] * o["block_size"] / p["tokens"],
                     "relative": cost.forward(config, p["vocab_size"], o["block_size"]),
                     "time": p["step_seconds"]})
    rows.sort(key=lambda r: (r["parameters"], r["name"]))
    unit = min([r for r in rows if r["arm"] == "dense"] or rows, key=lambda r: r["held_out"]).copy()
    for r in rows:
        r |= {x: r[x] / unit[x] for x in ("relative", "time")}
    return {arm: [r for r in rows if r["arm"] == arm] for arm in ARMS if arm in {r["arm"] for r in rows}}


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
    form = "{name}|{parameters:,}|{steps}|{epochs:.1f}|{training:.3f}|{top_k:.3f}|{held_out:.3f}|" \
        "{relative:.2f}|{time:.2f}"
    for arm, rows in arms.items():
        first = [r for r in rows if r["first"]]
        size = min(first, key=lambda r: r["held_out"])["parameters"]
        losses, lowest = [r["held_out"] for r in rows if r["parameters"] == size], parabola(first)[0]
        best.append([arm, f"{size:,}", f"{np.mean(losses):.3f}",
                     f"{np.ptp(losses):.3f}" if len(losses) > 1 else "", str(len(losses)),
                     f"{lowest:,.0f}" if lowest else "none between"])
    return markdown(["model", "parameters", "steps", "epochs", "loss: training", "held out, top-k",
                     "held out, causal", "forward FLOPs / best dense", "measured step / best dense"],
                    [form.format(**r).split("|") for rows in arms.values() for r in rows]) + "\n\n" \
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
            axes[0].plot(N, np.polyval(fit, np.log(N)), "-", color=color)
    axes[0].set(xscale="log", xlabel="parameters", ylabel="held-out loss (nats; MoD: causal routing)")
    axes[1].set(xlabel="FLOPs of a forward pass / best dense model's")
    axes[2].set(xlabel="measured training step / best dense model's")
    axes[1].legend()
    return fig


def sampling_points(scale, found):
    """The middle size of mod-isoflop (run that first), routed by whatever can decide without the future."""
    mod, control = ([p for p in isoflop_points(scale, {}) if arm_of(p.name) == arm][2]
                    for arm in ("mod", "random"))
    size, start, rules = mod.name.removeprefix("mod"), f"../mod-isoflop-{scale}/", "--rules full"
    return [Point("predictor", "", rules, f"{start}mod{size}"),
            Point("router", f"{mod.train} --causal_logit router", rules),
            Point("sigmoid", f"{mod.train} --gate sigmoid", rules),
            Point("random", "", rules, f"{start}random{size}"),
            Point("random-one", f"{control.train} --gate one", rules),
            Point("dense", "", rules, f"{start}dense{size}")]


def sampling_table(found):
    L, rows = next(iter(found.values()))["options"]["n_layer"], []
    for name, p in found.items():
        last, [row] = p["metrics"][-1], p["evaluation"]["forced"]
        predictor = last.get("predictor", {})
        shares = [f"{predictor[k]:.1%}" if k in predictor else ""
                  for k in ("accuracy", "base_rate", "precision", "recall")]
        rows.append([name, str(p["options"]["steps"]), f"{last['loss']['top_k'][-1]:.4f}",
                     f"{held_out(p):.4f}", *shares, f"{row['blocks']:.2f}", f"{row['cache']:.0%}"])
    return markdown(["model", "steps", "loss: top-k", "causal", "right about top-k", "always no",
                     "precision", "recall", f"blocks run of {L}", "cache / dense"], rows)


def sampling_figure(found):
    """Held-out loss, top-k beside causal."""
    fig, ax = plt.subplots(figsize=(7, 3.5))
    place, top_k = np.arange(len(found)), [p["metrics"][-1]["loss"]["top_k"][-1] for p in found.values()]
    ax.plot(top_k, place - 0.1, "o", mfc="none", label="top-k, which sees the future")
    ax.plot([held_out(p) for p in found.values()], place + 0.1, "s", label="causal, as sampled")
    ax.set(yticks=place, yticklabels=list(found), xlabel="held-out loss (nats a token)")
    ax.invert_yaxis()
    ax.legend()
    return fig


# ----------------------------------------------------------------------------- running the points

# name -> data(scale), points(scale, {point: its JSON} so far), table and figure of {point: its JSON}
EXPERIMENTS = {
    "dat": (dat_data, dat_points, dat_table, dat_figure),
    "mod-isoflop": (isoflop_data, isoflop_points, isoflop_table, isoflop_figure),
    "mod-sampling": (isoflop_data, sampling_points, sampling_table, sampling_figure)}


@dataclass
class Options:
    """Run the points of an experiment that are not done yet, then draw its table and figure."""
    name: tyro.conf.Positional[Literal[tuple(EXPERIMENTS)]]
    scale: Literal["cpu", "gpu", "paper"] = "cpu"
    source: Path | None = None      # the data set's files, if you have them; otherwise they are downloaded
    points: tuple[str, ...] = ()    # only these; left out: all
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    out: Path = run.HERE / "results"    # NAME-SCALE is made here
    runs: Path = run.HERE / "runs"      # the training runs themselves: NAME-SCALE/POINT is made here


def script(name, *arguments):
    """Run train.py or evaluate.py to its end -> seconds. UserError if it fails."""
    began = time.perf_counter()
    print(f"$ python {name} {' '.join(map(str, arguments))}", flush=True)
    if subprocess.run([sys.executable, run.HERE / name, *map(str, arguments)], check=False).returncode:
        raise UserError(f"{name} failed: the points that are done are kept, the same command goes on")
    return time.perf_counter() - began


def run_of(folder):
    """The run that a point made in its folder. UserError if there is none."""
    checkpoints = sorted(folder.glob("*/ckpt.pt"))
    if not checkpoints:
        raise UserError(f"{folder} holds no run: make that point of {folder.parent.name} first (and remove "
                        "its JSON if that is there without the run)")
    return checkpoints[-1].parent


def trained(point, folder, o):
    """Train the point in folder, or go on where that was stopped -> its run."""
    arguments = [*point.train.split(), "--dtype", o.dtype, "--out", folder]
    if "--seed" not in arguments:
        arguments += ["--seed", o.seed]
    if point.start:
        arguments += ["--init_from", run_of(folder.parent / point.start)]
    if any(folder.glob("*/ckpt.pt")):
        arguments = ["--resume", run_of(folder)]        # of a finished run: evaluated again
    script("train.py", *arguments, "--device", o.device)
    made = run_of(folder)
    if run.load(made, "cpu")["step"] < run.read_json(made / "options.json", "options")["steps"]:
        raise UserError(f"{made} was stopped before its end: the same command goes on")
    return made


def measure(point, results, o):
    """Train, evaluate, and write the point's JSON and translations."""
    folder, seconds = o.runs / f"{o.name}-{o.scale}" / point.name, 0
    made = trained(point, folder, o) if point.train else run_of((folder.parent / point.start).resolve())
    if point.evaluate or not (made / "evaluation.json").exists():
        (made / "evaluation.json").unlink(missing_ok=True)      # or the rows of other rules would stay in it
        shutil.rmtree(made / "outputs", ignore_errors=True)
        seconds = script("evaluate.py", "--run", made, "--device", o.device, *point.evaluate.split())
    table = {"point": point.name, "train": f"train.py {point.train}" if point.train else "",
             "evaluate": f"evaluate.py {point.evaluate}", "start": point.start,
             **run.read_json(made / "options.json"), "evaluation_seconds": round(seconds),
             **how_trained(made), "evaluation": run.read_json(made / "evaluation.json")}
    for options in (table["options"], table["evaluation"]["options"]):
        for place in ("out", "run", "init_from", "resume"):     # paths of this machine
            options.pop(place, None)
    results.mkdir(parents=True, exist_ok=True)
    for path in sorted((made / "outputs").glob("*.txt")):
        shutil.copy(path, results / f"{point.name}.{path.name}")
    run.write_atomically(results / f"{point.name}.json", json.dumps(table, indent=1) + "\n")


def how_trained(made):
    """What a run's files say about its training: loss of the last exit over the last tenth of the steps."""
    metrics, meta = run.read_metrics(made), run.read_json(made / "meta.json")
    steps = [m for m in metrics if m["kind"] == "train"]
    seconds = [m["seconds"] for m in steps]
    return {"parameters": run.read_json(made / "evaluation.json", "parameters"),
            "vocab_size": meta["vocab_size"], "tokens": meta["splits"]["train"]["tokens"],
            "training_loss": float(np.mean([m["loss"][-1] for m in steps[-max(1, len(steps) // 10):]])),
            "step_seconds": float(np.quantile(seconds, 0.1)),       # as on a machine that does nothing else
            "training_seconds": round(float(np.median(seconds)) * steps[-1]["step"], 1),
            "metrics": [m for m in metrics if m["kind"] == "val"]}


RENAMED = {"batch": "batch_size", "n_inner": "d_ff", "halting": "exit_predictor", "causal": "causal_logit",
           "imitation": "predictor"}        # what is read under these names, in the JSON of older versions


def read_point(path):
    """A point's JSON, also of an older version."""
    point = run.read_json(path)
    if "point" not in point:
        raise UserError(f"{path} is not what a point left behind")
    for table in (point["options"], *point["metrics"]):
        for old in RENAMED.keys() & table.keys():
            table[RENAMED[old]] = table.pop(old)
    for script in ("train", "evaluate"):
        if isinstance(point[script], list):
            point[script] = " ".join(point[script])
    return point


def read_points(name, scale, results):
    """-> the experiment's points, {point: its JSON} of those that are done, in the same order, and last of
    those that an earlier version made."""
    found = {path.stem: read_point(path) for path in results.glob("*.json")}
    points = EXPERIMENTS[name][1](scale, found)
    return points, {**{p.name: found[p.name] for p in points if p.name in found}, **found}


def draw(name, results, found):
    """table.md and figure.png from {point: its JSON}."""
    _, _, table, figure = EXPERIMENTS[name]
    heading = "- {point}: `python {arguments}`{after}, seed {seed}, {dtype}, commit {commit}, {device}, " \
        "{threads} threads, torch {torch}, {minutes:.0f} min of training"
    lines = [heading.format(**{**p["options"], **p}, arguments=p["train"] or p["evaluate"],
                            after=f" after {p['start']}" if p["start"] else "",
                            minutes=p["training_seconds"] / 60 if p["train"] else 0) for p in found.values()]
    run.write_atomically(results / "table.md", "\n".join([*lines, "", table(found), ""]))
    figure(found).savefig(results / "figure.png", dpi=110, bbox_inches="tight")
    plt.close()
    print(f"wrote {results}/table.md and {results}/figure.png from {len(found)} points")


@command
def main(argv=None):
    o = parse(argv, Options)
    results, (data, *_) = o.out / f"{o.name}-{o.scale}", EXPERIMENTS[o.name]
    points, found = read_points(o.name, o.scale, results)
    unknown = set(o.points) - {p.name for p in points}
    if unknown:
        raise UserError(f"--points {min(unknown)}: there are {', '.join(p.name for p in points)}")
    folder, dataset, arguments = data(o.scale)
    if not is_prepared(run.HERE / "data" / folder):
        if dataset == "text" and not o.source:
            raise UserError(f"--scale {o.scale} needs a long text: give a file or folder with --source")
        arguments += ["--source", str(o.source)] if o.source else []
        arguments += ["--out", str(run.HERE / "data" / folder)]
        importlib.import_module(f"data.{dataset}.prepare").main(arguments)
    while True:
        wanted = [p for p in points if not o.points or p.name in o.points]
        missing = [p for p in wanted if p.name not in found]
        print(f"\n{o.name} at scale {o.scale}: {len(wanted)} points, {len(missing)} to do", flush=True)
        if found:
            draw(o.name, results, found)
        if not missing:
            return
        measure(missing[0], results, o)
        points, found = read_points(o.name, o.scale, results)


if __name__ == "__main__":
    main()
