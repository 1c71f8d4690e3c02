"""Reproduce a result, point by point: python reproduce.py dat-table1 --scale cpu --source DIR

A point is one training run and its evaluation; experiments.toml has the points of every experiment.
results/NAME-SCALE/ gets POINT.json (numbers, options, command, commit, hardware), and table.md and figure.png
drawn from the JSON files alone. A point that has its JSON is not run again, an interrupted one
goes on from its checkpoint: give the same command.
"""
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
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

EXPERIMENTS = tomllib.loads((run.HERE / "experiments.toml").read_text("utf-8"))
SCALES = EXPERIMENTS.pop("scales")
plt.switch_backend("Agg")
plt.rcParams.update({"axes.grid": True, "grid.color": "#e6e6e6", "legend.frameon": False, "savefig.dpi": 110})
LOOKS = list(zip(plt.cm.tab20.colors[::2] + plt.cm.tab20.colors[1::2], "osD^v<>pXh" * 2, strict=True))


class Point(NamedTuple):
    """Arguments of train.py and evaluate.py. start: the point whose weights, run or JSON it uses."""
    name: str
    train: str
    evaluate: str = ""
    start: str = ""


def filled(text, words):
    """Replace {word} by words until none is left."""
    while "{" in text:
        text = text.format(**words)
    return text


def sized(train, shape, words):
    """Arguments of train.py for a shape, depth x width as in "8x64", and for as many steps as the scale's
    FLOPs pay for. The learning rate is 0.3 / width, tuned for no arm."""
    L, C = map(int, shape.split("x"))
    above = ",".join(map(str, range(L // 2 | 1, L, 2)))
    train = filled(f"{words['text']} --exits last --n_layer {L} --n_head {round(C / words['head_size'])} "
                   f"--n_embd {C} --lr {0.3 / C:.6f} {train}", words | {"above": above})
    o = read_options(train.split(), run.stored_options)
    a_step = cost.training(o.model, words["vocab_size"], o.model.block_size) * o.batch_size
    steps = round(words["flops"] / a_step)
    return f"{train} --steps {steps} --warmup {max(1, steps // 20)} --eval_every {steps} " \
        f"--save_every {max(1, steps // 5)} --eval_windows 256"


def points_of(name, scale, found, asked=()):
    """The points of an experiment; more seeds of the best shape so far, by the mean of its seeds in found
    {point: its JSON}, or as asked."""
    table, points, seeds = EXPERIMENTS[name], [], []
    words = {"scale": scale} | table | SCALES["cpu"] | SCALES[scale]
    for entry in table["points"]:
        train, shapes = entry.get("train", ""), filled(entry.get("shapes", ""), words).split()
        evaluate, start = (filled(entry.get(key, ""), words) for key in ("evaluate", "start"))
        mine = [Point(f"{entry['name']}-{shape}", sized(train, shape, words), evaluate, start)
                for shape in shapes] or [Point(entry["name"], filled(train, words), evaluate, start)]
        points += mine
        whole = all(p.name in found for p in mine)      # only then is the best shape known
        best = min(mine, key=lambda p: final_loss(p.name, found)) if whole else None
        for n, p in itertools.product(range(1, entry.get("seeds", 1)), mine):
            if p is best or f"{p.name}-seed{n}" in asked:
                again = f"{p.train} --seed {1000 + n}" if p.train else ""
                seeds.append(Point(f"{p.name}-seed{n}", again, p.evaluate, p.start and f"{p.start}-seed{n}"))
    return points + seeds


def final_loss(name, found, route="causal"):
    """Held-out loss of the last exit under a routing rule, mean of a point's seeds in found. A dense model
    has that of top_k alone."""
    losses = [p["metrics"][-1]["loss"] for other, p in found.items()
              if other.split("-seed")[0] == name.split("-seed")[0]]
    return np.mean([loss.get(route, loss["top_k"])[-1] for loss in losses])


def arm(point):
    """The name of a point without its seed, shape and lambda: a line of a figure."""
    return re.sub(r"-seed\d+|-\d+x\d+|-lambda.*", "", point)


def rules(found):
    """{point: its JSON} -> rows by rule, translated or on validation texts. The lowest rank: the lowest mean
    exit within 0.1 validation BLEU of full depth."""
    rows = []
    for name, point in found.items():
        beam, translated = point["evaluation"]["options"]["beam"], point["evaluation"]["translated"]
        split, measured = [("val", point["evaluation"]["forced"]), *translated.items()][-1]
        on_val = {r["rule"]: r.get("bleu", 0) for r in translated.get("val", measured)}
        for r in measured:
            kind = kind_of(r["rule"])
            line = arm(name) if kind in ("fixed", "learned") else f"{arm(name)}, {kind}"
            rows.append({**r, "model": name, "split": split, "score": on_val[r["rule"]], "line": line,
                         "style": {"fixed": "-", "confidence": ":"}.get(kind, ""),
                         "note": f"beam {beam}, FLOPs of {r['flops_of']}; {r['signature']}" if "bleu" in r
                         else "held-out texts, teacher forcing"})
    rows.sort(key=lambda r: (list(found).index(r["model"]), r["line"], r["exit"]))  # as a line is drawn
    goal = max((r["score"] for r in rows if r["rule"] == "full"), default=0) - 0.1
    return [r | {"rank": (r["score"] < goal, r["exit"] if r["score"] >= goal else -r["score"])} for r in rows]


def models(found):
    """{point: its JSON} -> rows by arm and size; FLOPs and step times relative to the best dense model's."""
    rows = []
    for name, p in found.items():
        o, last, [full] = p["options"], p["metrics"][-1], p["evaluation"]["forced"]
        config = GPTConfig(**{field: o[field] for field in GPTConfig.__dataclass_fields__ if field in o})
        shares = dict.fromkeys(("accuracy", "base_rate", "precision", "recall"), "")
        shares |= {share: f"{value:.1%}" for share, value in last.get("predictor", {}).items()}
        rows.append({**o, **p, **full, **shares, "model": name, "line": arm(name), "style": "",
                     "shape": f"{o['n_layer']} x {o['n_embd']}", "score": final_loss(name, {name: p}),
                     "rank": final_loss(name, found), "top_k": final_loss(name, {name: p}, "top_k"),
                     "epochs": o["steps"] * o["batch_size"] * o["block_size"] / p["tokens"],
                     "forward": cost.forward(config, p["vocab_size"], o["block_size"])})
    unit = min([r for r in rows if r["line"] == "dense"] or rows, key=lambda r: r["rank"], default=None)
    pace = {r["device"]: r["step_seconds"] for r in rows
            if (r["line"], r["shape"]) == (unit["line"], unit["shape"])}
    for r in rows:
        r |= {"relative": r["forward"] / unit["forward"],
              "time": r["step_seconds"] / pace.get(r["device"], np.nan)}      # on the same machine
    return sorted(rows, key=lambda r: (r["line"], r["parameters"], r["model"]))


def best_of(rows):
    """Rows -> of each "line" the one with the lowest "rank"; the "score" of all of its shape."""
    best = []
    for line in dict.fromkeys(r["line"] for r in rows):
        row = min((r for r in rows if r["line"] == line), key=lambda r: r["rank"])
        scores = [r["score"] for r in rows if (r["line"], r.get("shape")) == (line, row.get("shape"))]
        best.append({**row, "mean": np.mean(scores), "tried": len(scores),
                     "each": " ".join(f"{score:.3f}" for score in scores)})
    return best


def pivot(rows, row, column, form):
    """Rows -> one for each value of `row`; at: {value of `column`: the cells of all that have both}."""
    table = {}
    for r in rows:
        table.setdefault(r[row], defaultdict(list))[r[column]].append(form.format(**r))
    return [{row: value, "at": defaultdict(str, {key: " ".join(cells) for key, cells in at.items()})}
            for value, at in table.items()]


@np.errstate(invalid="ignore")      # a correlation with a constant is nan
def rank_correlation(counts):
    """Spearman's, of the row and the column of a table of counts; equal values share their mean rank."""
    rows, columns = counts.sum(1), counts.sum(0)
    x, y = (np.cumsum(n) - (n - 1) / 2 for n in (rows, columns))
    x, y = x - x @ rows / rows.sum(), y - y @ columns / columns.sum()
    return x @ counts @ y / np.sqrt((x * x) @ rows * ((y * y) @ columns))


def by_kind(found):
    """{point: its JSON} -> rows by rule and kind of token or tenth of a text; "of": the rows of all kinds."""
    rows = []
    for name, p in found.items():
        for r, key in itertools.product(p["evaluation"]["forced"], ("kinds", "tenths")):
            of, counts = {}, dict(sorted(r.get(key, {}).items()))      # "0 hops", "1 hops", ...
            for kind, count in counts.items():
                exits, blocks = np.array(count["exits"]), np.array(count["blocks"])
                of[kind] = {"model": name, "rule": r["rule"], "line": f"{arm(name)}, {r['rule']}",
                            "kind": kind, "tokens": blocks.sum(), "right": count["right"],
                            "exit": exits @ np.arange(1, len(exits) + 1) / exits.sum(), "style": "",
                            "blocks": blocks @ np.arange(len(blocks)) / blocks.sum()}
            rho = rank_correlation(np.array([count["blocks"] for count in counts.values()])) if counts else 0
            rows += [row | {"rho": rho, "of": of} for row in of.values()]
    return rows


ROWS = {"rules": rules, "by_kind": by_kind, "models": models,
        "by_exit": lambda found: pivot([r | {"exit": "random" if r["rule"] == "random" else round(r["exit"])}
                                        for r in rules(found)], "model", "exit", "{score:.2f}"),
        "by_shape": lambda found: pivot(sorted(models(found), key=lambda r: (r["n_layer"], r["n_embd"])),
                                        "shape", "line", "{score:.3f}"),
        "by_rule": lambda found: [r for r in by_kind(found) if r["kind"] == min(r["of"])],
        "frontier": lambda found: best_of(rules({n: p for n, p in found.items() if "-seed" not in n})),
        "arms": lambda found: best_of(models(found))}


def draw_figure(found, rows, y, label, against):
    """{point: its JSON} -> a figure: y against each of {x: label}, a colour for each "line" of the rows."""
    rows = ROWS[rows](found)
    looks = dict(zip(dict.fromkeys(r["line"] for r in rows), itertools.cycle(LOOKS), strict=False))
    fig, (panels,) = plt.subplots(1, len(against), figsize=(6 * len(against), 5), sharey=True, squeeze=False)
    for ax, (x, below) in zip(panels, against.items(), strict=True):
        ax.set_xlabel(below)
        ax.tick_params("x", labelrotation=90 if isinstance(rows[0][x], str) else 0)
        for (line, _), group in itertools.groupby(rows, lambda r: (r["line"], r["model"])):
            curve, (color, marker) = list(group), looks[line]
            ax.plot([r[x] for r in curve], [r[y] for r in curve], marker + curve[0]["style"], color=color,
                    mfc="none", label=line)
    panels[0].set_ylabel(label)
    once = dict(zip(*panels[-1].get_legend_handles_labels()[::-1], strict=True))   # seeds look alike
    panels[-1].legend(once.values(), once, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def draw(name, results, found):
    """table.md and figure.png from {point: its JSON}."""
    heading = "- {point}: {commands}, seed {seed}, {dtype}, commit {commit}, {device}, {threads} threads, " \
        "torch {torch}, {training_seconds:.0f} s of training (steps x their median)"
    lines = [heading.format(**{**p["options"], **p}, commands=", ".join([
                *(f"`python {part}`" for part in (p["train"], p["evaluate"]) if " -" in part),
                *([f"from {p['start']}"] if p["start"] else [])])) for p in found.values()]
    for table in EXPERIMENTS[name]["tables"]:
        rows, columns = ROWS[table["rows"]](found), table["columns"]
        cells = [[head.format(**rows[-1]) for head in columns], ["---"] * len(columns)]
        cells += [[form.format(**r) for form in columns.values()] for r in rows]
        lines += ["", *(f"| {' | '.join(line)} |" for line in cells)]
        lines += dict.fromkeys(f"\n{r['note']}" for r in rows if "note" in r)
    write_file(results / "table.md", "\n".join([*lines, ""]))
    draw_figure(found, **EXPERIMENTS[name]["figure"]).savefig(results / "figure.png", bbox_inches="tight")
    plt.close()


@dataclass
class Options:
    """Run the points of an experiment that are not done yet, then draw its table and figure."""
    name: tyro.conf.Positional[Literal[tuple(EXPERIMENTS)]]
    scale: Literal[tuple(SCALES)] = "cpu"
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
    checkpoints = sorted(folder.resolve().glob("*/ckpt.pt"))
    if not checkpoints:
        raise UserError(f"{folder} holds no run: make that point first, without its JSON if it has one")
    return checkpoints[-1].parent


def trained(point, folder, o):
    """Train the point in folder, or go on where that was stopped -> its run."""
    if any(folder.glob("*/ckpt.pt")):
        arguments = ["--resume", run_of(folder)]        # of a finished run: evaluated again
    else:
        arguments = [*point.train.split(), "--dtype", o.dtype, "--out", folder]
        arguments += [] if "--seed" in arguments else ["--seed", o.seed]
        if point.start:
            arguments += ["--init_from", run_of(folder.parent / point.start)]
        else:
            prepare(read_options(point.train.split(), run.stored_options).data, o.source)
    script("train.py", *arguments, "--device", o.device)
    made = run_of(folder)
    if run.load(made, "cpu")["step"] < run.read_json(made / "options.json", "options")["steps"]:
        raise UserError(f"{made} was stopped before its end: the same command goes on")
    return made


def measured(point, results, o):
    """The JSON of a point: trained and evaluated, or with neither as another experiment has measured it."""
    if not (point.train or point.evaluate):
        known = run.read_json((results / f"{point.start}.json").resolve())
        return {**known, "point": point.name, "train": "", "start": point.start}
    folder = o.runs / f"{o.name}-{o.scale}" / point.name
    made = trained(point, folder, o) if point.train else run_of(folder.parent / point.start)
    if point.evaluate:      # otherwise as train.py has it evaluated in the end
        (made / "evaluation.json").unlink(missing_ok=True)      # or the rows of other rules would stay in it
        script("evaluate.py", "--run", made, "--device", o.device, *point.evaluate.split())
    stored, meta, evaluation = (run.read_json(made / f"{f}.json") for f in ("options", "meta", "evaluation"))
    for options in (stored["options"], evaluation["options"]):
        for place in ("out", "run", "init_from", "resume"):     # paths of this machine
            options.pop(place, None)
    steps, held_out = ([m for m in run.read_metrics(made) if m["kind"] == kind] for kind in ("train", "val"))
    seconds = [m["seconds"] for m in steps]
    tenths = [steps[i * len(steps) // 10:][:max(1, len(steps) // 10)] for i in range(10)]
    return {"point": point.name, "train": f"train.py {point.train}" if point.train else "",
            "evaluate": f"evaluate.py {point.evaluate}", "start": point.start, **stored,
            "parameters": evaluation["parameters"], "vocab_size": meta["vocab_size"],
            "tokens": meta["splits"]["train"]["tokens"],
            "training_loss": [float(np.mean([m["loss"][-1] for m in tenth])) for tenth in tenths],
            "step_seconds": float(np.quantile(seconds, 0.1)),      # other work slows the rest
            "training_seconds": round(float(np.median(seconds)) * steps[-1]["step"], 1),
            "metrics": held_out, "evaluation": evaluation}


@command
def main(argv=None):
    o = parse(argv, Options)
    results = o.out / f"{o.name}-{o.scale}"
    while True:
        with reading(results / "*.json"):
            done = {run.read_json(p, "point"): run.read_json(p) for p in sorted(results.glob("*.json"))}
            points = {p.name: p for p in points_of(o.name, o.scale, done, {*o.points, *done})}
            found = {name: done[name] for name in [*points, *done] if name in done}  # of older versions last
            if found:
                draw(o.name, results, found)
        wanted = o.points or points
        if not set(wanted) <= set(points):
            raise UserError(f"--points {' '.join(wanted)}: there are {', '.join(points)}")
        missing = [name for name in wanted if name not in found]
        print(f"\n{results}: {len(found)} points in table and figure, {len(missing)} to do", flush=True)
        if not missing:
            return
        table = json.dumps(measured(points[missing[0]], results, o), indent=1)
        results.mkdir(parents=True, exist_ok=True)
        write_file(results / f"{missing[0]}.json", table + "\n")


if __name__ == "__main__":
    main()
