"""Reproduce a result, point by point: python reproduce.py dat --scale cpu --source DIR

A point is one training run and its evaluation. results/NAME-SCALE/ gets POINT.json (numbers, options,
command, commit, hardware), translations, table.md and figure.png, drawn from the JSON files alone. A point
that has its JSON is not run again, an interrupted one goes on from its checkpoint: give the same command.

    dat             exits of one model, smaller models, learned exits, copied states [DAT 2, 3; table 1]
    mod-isoflop     arms in several sizes for equal training FLOPs, seeds for the best [MoD 4.1, figure 3]
    mod-sampling    what decides when top-k cannot, and how well; after mod-isoflop [MoD 3.5, 4.2]
"""
import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro

import cost
import run
from data.common import UserError, command, is_prepared, reading, write_file
from model import GPTConfig
from options import kind_of, parse, read_options

plt.switch_backend("Agg")
plt.rcParams.update({"axes.grid": True, "grid.color": "#e6e6e6", "legend.frameon": False})
COLORS = plt.cm.tab20.colors[::2] + plt.cm.tab20.colors[1::2]        # strong, then light


class Point(NamedTuple):
    """Arguments of train.py, then of evaluate.py. start: the point whose weights (no train: run) it uses."""
    name: str
    train: str
    evaluate: str = ""
    start: str = ""


TRANSLATORS = {     # scale -> arguments of train.py
    "cpu": "multi30k --translate en-de",
    "gpu": "multi30k --translate en-de --n_embd 256 --enc_embd 512 --embeddings separate --d_ff 1024 "
           "--enc_layer 6 --dropout 0.3 --batch_tokens 8192 --steps 6000 --warmup 1000",
    "paper": "iwslt14 --translate de-en"}
FIXED = "fixed:1 fixed:2 fixed:3 fixed:4 fixed:5"
CONFIDENCE = "confidence:0.3 confidence:0.5 confidence:0.7 confidence:0.9"
THRESHOLDS = "learned:0.3 learned:0.5 learned:0.7 learned:0.8 learned:0.9 learned:0.95"
ORACLES = "oracle:correctness:0.1 oracle:likelihood:0.02 oracle:likelihood:0.1 oracle:likelihood:0.3"
# predictor-oracle[-exit_cost]; "into": trained with the trunk, which otherwise stays as it is
LEARNED = """geometric-correctness geometric-likelihood geometric-likelihood-0.02 geometric-likelihood-0.3
    geometric-correctness-into geometric-likelihood-into binary-correctness binary-likelihood
    token-correctness token-likelihood sequence-likelihood-1.0"""


def dat_points(scale, found):
    """Thresholds are operating points of one model; vectors of them are searched on the validation set."""
    train, bleu = TRANSLATORS[scale], f"--bleu {'test' if scale == 'paper' else 'test_2016_flickr'} --rules"
    points = [Point("aligned", train, f"--search 10000 {bleu} {FIXED} full random {ORACLES} {CONFIDENCE}"),
              Point("2-blocks", f"{train} --exits last --n_layer 2", f"{bleu} full"),
              Point("6-blocks", f"{train} --exits last", f"{bleu} full"),
              Point("mixed", f"{train} --objective mixed", f"{bleu} {FIXED} full random")]
    second = "--steps 300 --warmup 20 --batch_tokens 4096 --eval_every 300 --save_every 300"
    frozen, into = f"{second} --objective exit_predictor --lr 1e-2", f"{train} {second} --lr 5e-4"
    for name in LEARNED.split():
        kind, oracle, *rest = name.split("-")
        stage = into if "into" in rest else frozen
        exit_cost = "".join(f" --exit_cost={value}" for value in rest if value != "into")
        rules = THRESHOLDS if kind in ("geometric", "binary") else "learned"
        points.append(Point(name, f"{stage} --exit_predictor {kind} --oracle {oracle}{exit_cost}",
                            f"{bleu} {rules}", "aligned"))
    return [*points, Point("computed", "", f"--exited_kv compute {bleu} {CONFIDENCE}", "aligned")]


def dat_rows(found):
    """{point: its JSON} -> rows by rule, on the one split translated; learned exits in panels below."""
    rows = []
    for name, point in found.items():
        beam = point["evaluation"]["options"]["beam"]
        [(split, translated)] = point["evaluation"]["translated"].items()
        for r in translated:
            kind, value = kind_of(r["rule"]), r["rule"].partition(":")[2]
            line = name if kind in ("fixed", "learned") else f"{name}, {kind}"
            rows.append({**r, "model": name, "split": split, "line": line, "again": False,
                         "panels": (0, 1) if line == "aligned" else (int(kind == "learned"),),
                         "style": "o-" if kind == "fixed" else "s:",
                         "mark": value if kind in ("confidence", "learned") else "",
                         "note": f"beam {beam}, FLOPs of {r['flops_of']}; {r['signature']}"})
    return rows


ARMS = {        # name -> arguments of train.py [MoD 3.2, 4.1]; above: in the upper half of the blocks alone
    "dense": "--routed none", "mod": "", "random": "--router random", "mod-25": "--capacity 0.25",
    "mod-50": "--capacity 0.5", "mod-above": "--routed {above}"}
SIZES = {   # scale -> FLOPs paid, data, vocabulary, block_size, tokens a step, head size, blocks x width;
    # larger budgets would read the default text too often: give your own with --source
    "cpu": (3e13, "pysource-1024", 1024, 256, 4096, 32, "8x64 4x64 6x64 12x48 8x48 6x80 4x96 8x80"),
    "gpu": (1e16, "text-1024", 1024, 1024, 65536, 64, "4x192 6x256 8x384 10x512 12x640 14x768"),
    "paper": (6e18, "text-32768", 32768, 2048, 262144, 64, "6x256 8x384 10x512 12x768 16x1024 20x1280")}


def isoflop_points(scale, found):
    """Every arm in sizes around its best, each for equal FLOPs, as many steps as those pay for. One
    learning rate for all, 0.3 / width, tuned for no arm. Two more seeds for the best size of each arm."""
    budget, data, vocab, T, tokens, hs, shapes = SIZES[scale]
    points, seeds, done = [], [], {r["model"]: r for r in mod_rows(found)}
    for arm, more in ARMS.items():
        mine = []
        for size in shapes.split():
            L, C = map(int, size.split("x"))
            above = ",".join(map(str, range(L // 2 | 1, L, 2)))
            train = f"--data {data} --exits last --n_layer {L} --n_head {C // hs} --n_embd {C} " \
                f"--block_size {T} --batch_size {tokens // T} --lr {0.3 / C:.6f} {more.format(above=above)}"
            model = read_options(train.split(), run.stored_options).model
            steps = round(budget / (cost.training(model, vocab, T) * tokens / T))
            train += f" --steps {steps} --warmup {max(1, steps // 20)} --eval_every {steps} " \
                f"--save_every {max(1, steps // 5)} --eval_windows 256"
            mine.append(Point(f"{arm}-{size}", train))
        if all(p.name in done for p in mine):
            best = min(mine, key=lambda p: done[p.name]["held_out"])
            seeds += [Point(f"{best.name}-seed{n}", f"{best.train} --seed {1000 + n}") for n in (1, 2)]
        points += mine
    return points + seeds


def mod_rows(found):
    """{point: its JSON} -> rows by arm and size; FLOPs and step times relative to the best dense model's."""
    rows = []
    for name, p in found.items():
        o, last, [full] = p["options"], p["metrics"][-1], p["evaluation"]["forced"]
        top_k, causal = last["loss"]["top_k"], last["loss"].get("causal", last["loss"]["top_k"])
        config = GPTConfig(**{field: o[field] for field in GPTConfig.__dataclass_fields__ if field in o})
        shares = dict.fromkeys(("accuracy", "base_rate", "precision", "recall"), "")
        shares |= {share: f"{value:.1%}" for share, value in last.get("predictor", {}).items()}
        rows.append({**o, **p, **full, **shares, "model": name, "line": re.sub(r"-\d+x\d+.*", "", name),
                     "again": "-seed" in name, "panels": (0,), "style": "o-", "mark": "",
                     "top_k": top_k[-1], "held_out": causal[-1],
                     "epochs": o["steps"] * o["batch_size"] * o["block_size"] / p["tokens"],
                     "forward": cost.forward(config, p["vocab_size"], o["block_size"])})
    unit = min([r for r in rows if r["line"] == "dense"] or rows, key=lambda r: r["held_out"], default=None)
    for r in rows:
        r |= {"relative": r["forward"] / unit["forward"], "time": r["step_seconds"] / unit["step_seconds"]}
    arms = [r["line"] for r in rows]
    return sorted(rows, key=lambda r: (arms.index(r["line"]), r["parameters"], r["model"]))


def parabola(rows):
    """Least squares of held-out loss in log N -> best N or None (outside the sizes), coefficients or None."""
    x, y = np.log([r["parameters"] for r in rows]), [r["held_out"] for r in rows]
    if len({*x}) < 3:
        return None, None
    fit = np.polyfit(x, y, 2)
    best = -fit[1] / 2 / fit[0]
    return (float(np.exp(best)) if fit[0] > 0 and x.min() <= best <= x.max() else None), fit


def arm_rows(found):
    """{point: its JSON} -> a row for each arm: its best size, the losses of all seeds there."""
    rows = []
    for _, runs in itertools.groupby(mod_rows(found), lambda r: r["line"]):
        runs = list(runs)
        first = [r for r in runs if not r["again"]]
        best, lowest = min(first, key=lambda r: r["held_out"]), parabola(first)[0]
        seeds = [r["held_out"] for r in runs if r["parameters"] == best["parameters"]]
        rows.append({**best, "mean": np.mean(seeds), "seeds": len(seeds),
                     "range": f"{np.ptp(seeds):.3f}" if len(seeds) > 1 else "",
                     "lowest": f"{lowest:,.0f}" if lowest else "none between"})
    return rows


def sampling_points(scale, found):
    """The middle size of mod-isoflop (run that first), routed by whatever can decide without the future."""
    size, start, rules = SIZES[scale][-1].split()[3], f"../mod-isoflop-{scale}/", "--rules full"
    train = {p.name: p.train for p in isoflop_points(scale, {})}
    return [Point("predictor", "", rules, f"{start}mod-{size}"),
            Point("router", train[f"mod-{size}"] + " --causal_logit router", rules),
            Point("sigmoid", train[f"mod-{size}"] + " --gate sigmoid", rules),
            Point("random", "", rules, f"{start}random-{size}"),
            Point("random-one", train[f"random-{size}"] + " --gate one", rules),
            Point("dense", "", rules, f"{start}dense-{size}")]


# column: format of its cells; both read a row
DAT_TABLE = dat_rows, {
    "model": "{model}", "rule": "{rule}", "BLEU {split}": "{bleu:.2f}", "exit": "{exit:.2f}",
    "blocks": "{blocks:.2f}", "MFLOPs a sentence: paper": "{mflops_paper:.1f}",
    "needed": "{mflops_needed:.1f}", "seconds": "{seconds:.1f}"}
ISOFLOP_TABLE = mod_rows, {
    "model": "{model}", "parameters": "{parameters:,}", "steps": "{steps}", "epochs": "{epochs:.1f}",
    "loss: training": "{training_loss:.3f}", "held out, top-k": "{top_k:.3f}",
    "held out, causal": "{held_out:.3f}", "forward FLOPs / best dense": "{relative:.2f}",
    "measured step / best dense": "{time:.2f}"}
ARM_TABLE = arm_rows, {
    "arm": "{line}", "best size measured": "{parameters:,}",
    "held-out loss, mean of seeds (the first chose the size)": "{mean:.3f}", "max - min": "{range}",
    "seeds": "{seeds}", "best size by the parabola": "{lowest}"}
SAMPLING_TABLE = mod_rows, {
    "model": "{model}", "steps": "{steps}", "loss: top-k": "{top_k:.4f}", "causal": "{held_out:.4f}",
    "right about top-k": "{accuracy}", "always no": "{base_rate}", "precision": "{precision}",
    "recall": "{recall}", "blocks run of {n_layer}": "{blocks:.2f}", "cache / dense": "{cache:.0%}"}
DAT_FIGURE = "bleu", "BLEU", {"exit": "exit (mean over output tokens)",
                              "mflops_needed": "decoder MFLOPs a sentence, copies counted where needed"}
ISOFLOP_FIGURE = "held_out", "held-out loss (nats; MoD: causal routing)", {"parameters": "parameters",
    "relative": "forward FLOPs / best dense", "time": "measured training step / best dense"}
SAMPLING_FIGURE = "held_out", "held-out loss (nats): causal, as sampled", {
    "top_k": "held-out loss (nats): top-k, which sees the future"}
EXPERIMENTS = {     # name -> points(scale, {point: its JSON} so far), tables, figure of the first table
    "dat": (dat_points, [DAT_TABLE], DAT_FIGURE),
    "mod-isoflop": (isoflop_points, [ISOFLOP_TABLE, ARM_TABLE], ISOFLOP_FIGURE),
    "mod-sampling": (sampling_points, [SAMPLING_TABLE], SAMPLING_FIGURE)}


def curve(ax, rows, x, y, color):
    """Rows of a line by x -> their marks, and a line through those of the first seed, or their parabola."""
    first, style = [r for r in rows if not r["again"]], rows[0]["style"]
    if x == "parameters":
        style, fit = style[0], parabola(first)[1]
        ax.set_xscale("log")
        if fit is not None:
            N = np.geomspace(first[0][x], first[-1][x], 50)
            ax.plot(N, np.polyval(fit, np.log(N)), color=color)
    for part, kind, label in (first, style, rows[0]["line"]), (rows, style[0], None):
        ax.plot([r[x] for r in part], [r[y] for r in part], kind, color=color, ms=5, mfc="none", label=label)
    for r in rows:
        ax.annotate(r["mark"], (r[x], r[y]), (4, -9), color=color, textcoords="offset points", fontsize=7)


def draw_figure(rows, y, y_label, xs):
    """Rows of a table -> a figure: y against each of xs {x: label}, a "line" in the "panels" of its rows."""
    height = 1 + max(max(r["panels"]) for r in rows)
    fig, grid = plt.subplots(height, len(xs), figsize=(6 * len(xs), 5 * height), sharey=True, squeeze=False)
    for n, axes in enumerate(grid):
        here = [r for r in rows if n in r["panels"]]
        for color, line in zip(COLORS, dict.fromkeys(r["line"] for r in here), strict=False):
            mine = sorted((r for r in here if r["line"] == line), key=lambda r: r[[*xs][0]])
            for ax, x in zip(axes, xs, strict=True):
                curve(ax, mine, x, y, color)
                ax.set_xlabel(xs[x])
        axes[0].set_ylabel(y_label)
        axes[-1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def draw(name, results, found):
    """table.md and figure.png from {point: its JSON}."""
    _, tables, axes = EXPERIMENTS[name]
    heading = "- {point}: `python {arguments}`{after}, seed {seed}, {dtype}, commit {commit}, {device}, " \
        "{threads} threads, torch {torch}, {minutes:.0f} min of training"
    lines = [heading.format(**{**p["options"], **p}, arguments=p["train"] or p["evaluate"],
                            after=f" after {p['start']}" if p["start"] else "",
                            minutes=p["training_seconds"] / 60 if p["train"] else 0) for p in found.values()]
    for rows_of, columns in tables:
        rows = rows_of(found)
        cells = [[name.format(**rows[-1]) for name in columns], ["---"] * len(columns)]
        cells += [[form.format(**r) for form in columns.values()] for r in rows]
        lines += ["", *(f"| {' | '.join(line)} |" for line in cells)]
        lines += dict.fromkeys(f"\n{r['note']}" for r in rows if "note" in r)
    write_file(results / "table.md", "\n".join([*lines, ""]))
    draw_figure(tables[0][0](found), *axes).savefig(results / "figure.png", dpi=110, bbox_inches="tight")
    plt.close()
    print(f"wrote {results}/table.md and {results}/figure.png from {len(found)} points")


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
    """Run a script of this project to its end. UserError if it fails."""
    print("$ python", name, *arguments, flush=True)
    if subprocess.run([sys.executable, run.HERE / name, *map(str, arguments)], check=False).returncode:
        raise UserError(f"{name} failed: the points that are done are kept, the same command goes on")


def prepare(data, source):
    """Make the data set data/NAME, or data/NAME-VOCABULARY, unless it is there."""
    folder, (name, _, vocabulary) = run.HERE / "data" / data, data.partition("-")
    more = ["--vocab-size", vocabulary] * bool(vocabulary) + ["--source", source] * bool(source)
    if not is_prepared(folder):
        script(f"data/{name}/prepare.py", *more, "--out", folder)


def run_of(folder):
    """The run that a point made in its folder. UserError if there is none."""
    checkpoints = sorted(folder.glob("*/ckpt.pt"))
    if not checkpoints:
        raise UserError(f"{folder} holds no run: make that point first, without its JSON if it has one")
    return checkpoints[-1].parent


def trained(point, folder, o):
    """Train the point in folder, or go on where that was stopped -> its run."""
    if any(folder.glob("*/ckpt.pt")):
        arguments = ["--resume", run_of(folder)]        # of a finished run: evaluated again
    else:
        arguments = [*point.train.split(), "--dtype", o.dtype, "--out", folder]
        if "--seed" not in arguments:
            arguments += ["--seed", o.seed]
        if point.start:
            arguments += ["--init_from", run_of(folder.parent / point.start)]
        else:
            prepare(read_options(point.train.split(), run.stored_options).data, o.source)
    script("train.py", *arguments, "--device", o.device)
    made = run_of(folder)
    if run.load(made, "cpu")["step"] < run.read_json(made / "options.json", "options")["steps"]:
        raise UserError(f"{made} was stopped before its end: the same command goes on")
    return made


def measure(point, results, o):
    """Train, evaluate, and write the point's JSON and translations."""
    folder = o.runs / f"{o.name}-{o.scale}" / point.name
    made = trained(point, folder, o) if point.train else run_of((folder.parent / point.start).resolve())
    if point.evaluate:      # otherwise as train.py has it evaluated in the end
        (made / "evaluation.json").unlink(missing_ok=True)      # or the rows of other rules would stay in it
        script("evaluate.py", "--run", made, "--device", o.device, *point.evaluate.split())
    stored, meta = run.read_json(made / "options.json"), run.read_json(made / "meta.json")
    evaluation = run.read_json(made / "evaluation.json")
    for options in (stored["options"], evaluation["options"]):
        for place in ("out", "run", "init_from", "resume"):     # paths of this machine
            options.pop(place, None)
    metrics = run.read_metrics(made)
    steps = [m for m in metrics if m["kind"] == "train"]
    seconds = [m["seconds"] for m in steps]
    last_tenth = [m["loss"][-1] for m in steps[-max(1, len(steps) // 10):]]
    table = {"point": point.name, "train": f"train.py {point.train}" if point.train else "",
             "evaluate": f"evaluate.py {point.evaluate}", "start": point.start, **stored,
             "parameters": evaluation["parameters"], "vocab_size": meta["vocab_size"],
             "tokens": meta["splits"]["train"]["tokens"], "training_loss": float(np.mean(last_tenth)),
             "step_seconds": float(np.quantile(seconds, 0.1)),      # as on a machine that does nothing else
             "training_seconds": round(float(np.median(seconds)) * steps[-1]["step"], 1),
             "metrics": [m for m in metrics if m["kind"] == "val"], "evaluation": evaluation}
    results.mkdir(parents=True, exist_ok=True)
    for r in itertools.chain(*evaluation["translated"].values()):
        write_file(results / f"{point.name}.{r['file']}", (made / "outputs" / r["file"]).read_bytes())
    write_file(results / f"{point.name}.json", json.dumps(table, indent=1) + "\n")


@command
def main(argv=None):
    o = parse(argv, Options)
    results = o.out / f"{o.name}-{o.scale}"
    while True:
        with reading(results / "*.json"):
            done = {run.read_json(p, "point"): run.read_json(p) for p in sorted(results.glob("*.json"))}
            points = {p.name: p for p in EXPERIMENTS[o.name][0](o.scale, done)}
            found = {name: done[name] for name in [*points, *done] if name in done}  # of older versions last
        wanted = o.points or points
        if not set(wanted) <= set(points):
            raise UserError(f"--points {' '.join(wanted)}: there are {', '.join(points)}")
        missing = [name for name in wanted if name not in found]
        print(f"\n{o.name} at scale {o.scale}: {len(wanted)} points, {len(missing)} to do", flush=True)
        if found:
            with reading(results / "*.json"):
                draw(o.name, results, found)
        if not missing:
            return
        measure(points[missing[0]], results, o)


if __name__ == "__main__":
    main()
