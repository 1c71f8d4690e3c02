"""Draw a run from its files alone: python plot.py --run 3; several side by side: --run 1 2 3

Each function draw_X makes figures/X.png in the run's folder; main removes it if the files do not suffice."""
import io
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, to_hex

import run
from data.common import EOT, UserError, command, load_tokenizer, reading, write_file
from options import from_file, kind_of, parse, refuse
from page import page_of

# Colours by Okabe and Ito, which colour-blind readers can tell apart; depth is a scale (viridis).
BLUE, GREY, EDGE = "#0072B2", "#D5D5D5", "#B0B0B0"
LINES = plt.cycler(color=[BLUE, "#D55E00", "#009E73", "#CC79A7", "black", "#E69F00"], marker=list("os^DXv"))
RAN, SKIPPED, COPIED, NOTHING = range(4)        # what a block did with a token
CELLS = ("ran", "skipped (MoD)", "exited: state copied", "exited: nothing")
CELL_COLORS = ListedColormap([BLUE, "#F2BE57", GREY, "white"])
MARKS = str.maketrans("\n\t ", "↵→␣")
plt.rcParams.update({"figure.dpi": 120, "figure.constrained_layout.use": True, "figure.titlesize": 10,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
                     "axes.titlesize": 12, "font.size": 11, "legend.frameon": False, "axes.prop_cycle": LINES,
                     "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#DDD"})


@dataclass
class Options:
    """Draw the figures of a run, or one figure that compares several."""
    run: tuple[str, ...] = ("last",)    # its folder or number, or "last"
    out: str = "runs"       # where numbered runs are
    window: int | None = None   # which validation window the map shows; left out: where depth changes most
    first: int = 0          # first token of the map
    tokens: int = 44        # tokens in the map
    html: bool = False      # also write page.html, which shows a text token by token


def depth_colors(L):
    """Colours for 0, 1, ..., L blocks: grey, then viridis from shallow to deep."""
    return [GREY, *plt.cm.viridis_r(np.linspace(0.08, 0.95, L))]


def read_depth(path):
    """depth.npz -> its arrays (W,T,...), and those of all tokens with a target (tokens,...). Both have
    "blocks", how many ran, and "cells" (...,L), what each did: an exited token leaves the keys and values of
    its copied state in a dense block [DAT 2] and nothing in a routed one [MoD 3.5]."""
    with np.load(path) as archive:
        depth = dict(archive)
    exited = np.arange(len(depth["routed"])) >= depth["exit_at"][..., None]
    depth["cells"] = np.select([depth["visited"], ~exited, ~depth["routed"]], [RAN, SKIPPED, COPIED], NOTHING)
    depth["blocks"] = depth["visited"].sum(-1)
    present = depth["targets"] >= 0
    tokens = {name: a[present] for name, a in depth.items() if a.shape[:2] == present.shape}
    depth["title"] = f"{present.sum():,} validation tokens, {depth['rule']}"
    return depth, tokens


def draw_loss(path):
    """Validation loss of each exit over training, a panel for each routing rule."""
    lines = [line for line in run.read_metrics(path.parent) if line["kind"] == "val"]
    lines = lines[len(lines) > 3:]      # beside the loss of the untrained model all exits look alike
    steps, rules = [line["step"] for line in lines], lines[-1]["loss"]
    fig, axes = plt.subplots(1, len(rules), figsize=(5 * len(rules) + 1, 3.8), sharey=True, squeeze=False)
    for ax, rule in zip(axes[0], rules, strict=True):
        loss = np.array([line["loss"][rule] for line in lines], float)                     # (evaluations, N)
        for n, color in enumerate(depth_colors(loss.shape[1])[1:]):
            width = 4 - 3 * n / loss.shape[1]       # lines that coincide stay visible
            ax.plot(steps, loss[:, n], "o-", ms=width + 1, lw=width, color=color, label=n + 1)
        name = f"{rule} routing" if len(rules) > 1 else "validation"
        ax.set(title=f"{name}: last exit {loss[-1, -1]:.3f} at step {steps[-1]}", xlabel="training step")
    axes[0, 0].set_ylabel("validation loss (nats per token)")
    ax.legend(title="exit", loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def piece_of(depth, options, tokens):
    """All arrays, for `tokens` tokens of one text: --window, or the one where depth changes most."""
    part = slice(options.first, options.first + tokens)
    changes = np.diff(depth["blocks"][:, part]).astype(bool).sum(1)
    window = changes.argmax() if options.window is None else options.window
    present = depth["present"][window:window + 1, part].ravel()
    if min(window, options.first, tokens - 1) < 0 or not present.any():
        last = len(changes) - 1
        raise UserError(f"--window must be from 0 to {last}, --first in its text and --tokens above 0")
    return {name: a[window, part][present] for name, a in depth.items()
            if np.shape(a)[:2] == depth["targets"].shape} | {"source": depth["sources"][window]}


def word(decode, i, longest=10):
    return decode([i]).replace(EOT, "</s>").replace("    ", "⇥").translate(MARKS)[:longest]


def draw_map(path, options):
    """What each block did with each token of a text, and a line where the token exited."""
    depth, decode = read_depth(path)[0], load_tokenizer(path.parent / "tokenizer.json").decode
    piece, L = piece_of(depth, options, options.tokens), len(depth["routed"])
    ids, exit_at, cells = (piece[name] for name in ("ids", "exit_at", "cells"))
    words = [word(decode, i) for i in ids]
    fig, ax = plt.subplots(figsize=(11, 2.1 + 0.3 * L))
    for code in np.unique(cells):
        ax.bar(0, 0, color=CELL_COLORS(code), ec=EDGE, label=CELLS[code])      # for the legend
    ax.pcolormesh(cells.T, cmap=CELL_COLORS, vmin=RAN, vmax=NOTHING, ec=EDGE, lw=0.5)
    ax.step(range(len(ids) + 1), [*exit_at, exit_at[-1]], "k", marker="", where="post", lw=2.5, label="exit")
    ax.set_yticks(np.arange(L) + 0.5, [f"{n}{' routed' * bool(r)}" for n, r in enumerate(depth["routed"], 1)])
    ax.set_xticks(np.arange(len(ids)) + 0.5, words, rotation=90, family="monospace", parse_math=False)
    ax.set(xlabel="token read", ylabel="block", xlim=(0, len(ids)))
    ax.legend(ncols=5, loc="lower left", bbox_to_anchor=(-0.01, 0.98))
    fig.suptitle(depth["title"], x=0.01, ha="left")
    return fig


def draw_lens(path, options):
    """What each exit would say after each token of a text, at full depth, and whether the last one agrees."""
    depth, decode = read_depth(path)[0], load_tokenizer(path.parent / "tokenizer.json").decode
    piece = piece_of(depth, options, min(18, options.tokens))
    said, T, N = piece["said"], *piece["said"].shape
    if N == 1:
        return None
    fig, ax = plt.subplots(figsize=(11, 1.8 + 0.4 * N))
    ax.pcolormesh((said != said[:, -1:]).T, cmap=ListedColormap(["#BFD9EA", "#F2BE57"]), ec="white", vmax=1)
    style = {"family": "monospace", "parse_math": False}
    for t, n in np.ndindex(T, N):
        ax.text(t + 0.5, n + 0.5, word(decode, said[t, n], 7), ha="center", va="center", size=9, **style)
    ax.set_xticks(np.arange(T) + 0.5, [word(decode, i) for i in piece["ids"]], rotation=90, **style)
    ax.set_yticks(np.arange(N) + 0.5, range(1, N + 1))
    ax.set(xlabel="token read", ylabel="exit", title="next token by exit (yellow: the last says another)")
    return fig


def draw_depth(path):
    """Histograms over tokens: the block after which a token exits, and the number of blocks that it runs."""
    depth, tokens = read_depth(path)
    colors = depth_colors(len(depth["routed"]))
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for ax, name, said in zip(axes, ("exit_at", "blocks"), ("exit after block", "blocks run"), strict=True):
        counts = np.arange(min(1, tokens[name].min()), len(colors))
        share = [(tokens[name] == n).mean() for n in counts]
        bars = ax.bar(counts, share, color=[colors[n] for n in counts])
        ax.bar_label(bars, [f"{s:.0%}" if s >= 0.005 else "" for s in share], fontsize=10)
        ax.set(title=f"{said} (mean {tokens[name].mean():.2f})", xlabel=said, xticks=counts)
    axes[0].set_ylabel("share of all tokens")
    fig.suptitle(depth["title"], x=0.01, ha="left")
    return fig


@np.errstate(invalid="ignore")      # a correlation with a constant is nan
def draw_when(path):
    """Shares of all tokens by what each block did with them; mean number of blocks run by decile of loss, by
    decile of entropy and by kind of the token read, in a translation of the one written."""
    depth, tokens = read_depth(path)
    cells, blocks, L = tokens["cells"], tokens["blocks"], len(depth["routed"])
    if len(np.unique(blocks)) == 1:
        return None
    fig, ((shares, by_loss, by_entropy), (by_count, *by_kind)) = plt.subplots(2, 3, figsize=(15, 7))
    tokens["count"] = np.log10(np.maximum(np.bincount(tokens["ids"]), 1))[tokens["ids"]]
    for code in np.unique(cells):
        shares.bar(range(1, L + 1), (cells == code).mean(0), bottom=(cells < code).mean(0), ec=EDGE,
                   color=CELL_COLORS(code), label=CELLS[code])
    shares.set(xlabel="block", ylabel="share of all tokens", xticks=range(1, L + 1))
    shares.legend(ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 0.98))
    mean_of = f"blocks run (mean, of {L})"
    for ax, key, name in ((by_loss, "loss", "-log p(next), nats"), (by_entropy, "entropy", "entropy, nats"),
                          (by_count, "count", "log10 of the token's count in all windows")):
        x = tokens[key]
        deciles = [i for i in np.array_split(np.argsort(x, kind="stable"), 10) if len(i)]
        ax.plot([x[i].mean() for i in deciles], [blocks[i].mean() for i in deciles], "o-", color=BLUE)
        ax.set(title=f"blocks run against {key} (correlation {np.corrcoef(x, blocks)[0, 1]:.2f})",
               xlabel=f"{name} (means of deciles)", ylabel=mean_of, ylim=(0, L + 0.2))
    kinds = {kind: tokens["kind"] == kind for kind in np.unique(tokens["kind"])}
    names = sorted(kinds, key=lambda kind: blocks[kinds[kind]].mean())
    for ax, counted, said in zip(by_kind, (blocks, tokens["exit_at"]), ("blocks run", "exit"), strict=True):
        bars = ax.barh(names, [counted[kinds[kind]].mean() for kind in names], color=BLUE)
        ax.bar_label(bars, [f" {kinds[kind].sum():,} tokens" for kind in names], fontsize=10)
        ax.grid(False)
        ax.set(title=f"{said} by kind of token", xlabel=f"{said} (mean, of {L})", xlim=(0, L))
    fig.suptitle(depth["title"], x=0.01, ha="left")
    return fig


def draw_router(path):
    """Histograms of the router weight r in each routed block: tokens that it ran, tokens that skipped it."""
    depth, tokens = read_depth(path)
    routed = np.flatnonzero(depth["routed"])
    if not len(routed):
        return None
    fig, axes = plt.subplots(1, len(routed), figsize=(2 + 3 * len(routed), 3.6), sharey=True, squeeze=False)
    for ax, n in zip(axes[0], routed, strict=True):
        cells, weight = tokens["cells"][:, n], tokens["weight"][:, n]
        parts = [weight[(cells == code) & np.isfinite(weight)] for code in (RAN, SKIPPED)]
        ax.hist(parts, 50, histtype="stepfilled", alpha=0.8, color=CELL_COLORS.colors[:2], label=CELLS[:2])
        share = f"{(cells == RAN).mean():.0%} of all tokens run" if any(map(len, parts)) else "no tokens"
        ax.set(title=f"block {n + 1}: {share}", xlabel="router weight r", yscale="symlog")
    axes[0, 0].set_ylabel("tokens (log above 2)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right")
    fig.suptitle(depth["title"], x=0.01, ha="left")
    return fig


def draw_frontier(path):
    """Quality against mean exit of the rules that evaluate.py compared, a line for each kind of rule."""
    measured, panels = run.read_json(path), {}
    panels["validation loss (nats/token)"] = [(r["exit"], r["loss"], r["rule"]) for r in measured["forced"]]
    for split, rows in measured["translated"].items():
        panels[f"BLEU on {split}"] = [(r["exit"], r["bleu"], r["rule"]) for r in rows if "bleu" in r]
    panels = {title: points for title, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    kinds = dict.fromkeys(kind_of(rule) for points in panels.values() for *_, rule in points)
    fig, axes = plt.subplots(1, len(panels), figsize=(2.4 + 4.6 * len(panels), 4), squeeze=False)
    for ax, (title, points) in zip(axes[0], panels.items(), strict=True):
        for kind in kinds:      # in every panel, for its colour
            found = sorted(point for point in points if kind_of(point[-1]) == kind)
            line, = ax.plot([x for x, *_ in found], [y for _, y, _ in found], mfc="none", label=kind)
            for *point, rule in found:
                label = rule.partition(":")[2] if kind != "fixed" and "," not in rule else ""
                ax.annotate(label, point, (4, 4), textcoords="offset points", size=9, c=line.get_color())
        ax.set(title=title, xlabel="mean exit (block)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return fig


def draw_text(path, columns=96):
    """The last sample or translation, each token on the colour of the number of blocks that wrote it."""
    sample = run.read_json(path)
    colors, tokens = depth_colors(sample["n_layer"]), []
    for text in sample["texts"]:
        tokens += [*((token, blocks) for token, _, blocks in text), ("\n\n", None)]
    tokens += [("blocks run:  ", None), *((f" {n} ", n) for n in range(len(colors)))]
    fig, row, column = plt.figure(layout="none"), 0, 0
    ax = fig.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
    for text, blocks in tokens:
        for k, part in enumerate(text.replace("\t", "    ").split("\n")):
            if k or column + len(part) > columns:
                row, column = row + 1, 0
            if blocks is not None:
                ax.barh(row, len(part), 0.9, column, color=colors[blocks], ec="white", alpha=0.5)
            ax.text(column, row, part, family="monospace", size=12, va="center", parse_math=False)
            column += len(part)
    ax.set(xlim=(-1, columns + 1), ylim=(row + 1, -1))
    fig.set_size_inches((columns + 2) * 0.1004, (row + 2) * 0.27)      # of a monospaced letter of 12 points
    return fig


def compare(runs):
    """{name: folder} side by side: held-out loss of the last exit over training, share of the tokens by
    blocks run, held-out loss against mean exit of the rules that evaluate.py compared."""
    fig, (training, shares, frontier) = plt.subplots(1, 3, figsize=(16, 4.4))
    for name, folder in runs.items():
        with reading(folder / "depth.npz"):
            lines = [line for line in run.read_metrics(folder) if line["kind"] == "val"]
            lines = lines[len(lines) > 3:]      # without the loss of the untrained model
            last_exit = [line["loss"].get("causal", line["loss"]["top_k"])[-1] for line in lines]
            training.plot([line["step"] for line in lines], last_exit)
            depth, tokens = read_depth(folder / "depth.npz")
            share = np.bincount(tokens["blocks"]) / len(tokens["blocks"])
            shares.plot(share, label=f"{name}: {depth['rule']}, mean {tokens['blocks'].mean():.2f}")
            rows = run.read_json(folder / "evaluation.json", "forced")
            frontier.plot([r["exit"] for r in rows], [r["loss"] for r in rows], ls="", mfc="none", ms=8)
    training.set(xlabel="training step", ylabel="held-out loss of the last exit (nats)")
    shares.set(xlabel="blocks run", ylabel="share of the tokens")
    shares.xaxis.get_major_locator().set_params(integer=True)
    frontier.set(xlabel="mean exit (block), each rule measured", ylabel="held-out loss (nats)")
    fig.legend(loc="outside lower center")
    return fig


@command
def main(argv=None):
    options = parse(argv, Options)
    folder, *others = [run.find(name, options.out) for name in options.run]
    if others:
        refuse(options, ("window", "first", "tokens", "html"), "several runs are compared (--run)")
        picture = folder.parent / "compare.png"
        compare(dict(zip(options.run, [folder, *others], strict=True))).savefig(picture)
        plt.close()
        print(f"wrote {picture}")
        return
    files = {draw_loss: "metrics.jsonl", draw_frontier: "evaluation.json", draw_text: "sample.json",
             **dict.fromkeys((draw_map, draw_lens, draw_depth, draw_when, draw_router), "depth.npz")}
    figures = {}
    for draw, file in files.items():
        path, more, image = folder / file, [options] if draw in (draw_map, draw_lens) else [], io.BytesIO()
        with reading(path):
            if fig := draw(path, *more) if path.exists() else None:
                fig.savefig(image)
        figures[f"{draw.__name__[5:]}.png"] = file, image.getvalue()
    plt.close("all")
    if options.html:
        path = folder / "depth.npz"
        with reading(path):
            depth, config = read_depth(path)[0], from_file(*run.stored_options(folder)).model
            page = page_of(piece_of(depth, options, 300), config, load_tokenizer(folder / "tokenizer.json"),
                           depth["title"], [*map(to_hex, depth_colors(config.n_layer))], CELLS)
        write_file(folder / "page.html", page)
        print(f"wrote {folder}/page.html: open it in a browser")
    (folder / "figures").mkdir(exist_ok=True)
    for name, (file, image) in figures.items():
        picture = folder / "figures" / name
        picture.unlink(missing_ok=True)
        if image:
            picture.write_bytes(image)
        print(f"wrote {picture}" if image else f"left out {picture}: no {file}, or too little in it")


if __name__ == "__main__":
    main()
