"""Draw a run from its files alone (metrics.jsonl, depth.npz, tokenizer.json): python plot.py --run 3

    figures/map.png       which blocks each token of real text ran, token by block
    figures/depth.png     how many tokens left at each exit, and how many blocks tokens ran
    figures/router.png    the router's weights, by block
    figures/when.png      who runs which block; blocks run against surprise, uncertainty and kind of token
    figures/loss.png      loss of every exit over training, top-k and causal
    figures/frontier.png  quality of the rules that evaluate.py compared, against mean exit
    figures/text.png      the last sample or translation, coloured by the blocks that wrote each token
"""
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import run
from data.common import UserError, command, load_tokenizer

plt.rcParams.update({"figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 11,
                     "axes.spines.top": False, "axes.spines.right": False,
                     "axes.titlesize": 12, "axes.titlelocation": "left"})


@dataclass
class Options:
    """Draw the figures of a run."""
    run: str = "last"       # its folder or number, or "last"
    out: str = "runs"       # where numbered runs are
    window: int | None = None   # which validation window the map shows; left out: where depths vary most
    first: int = 0          # first token of the map
    tokens: int = 44        # tokens in the map


def colors_of(L):
    """One colour per block, shallow to deep."""
    return plt.cm.viridis_r(np.linspace(0.08, 0.95, L))


def shown(encoding, i):
    """A token as an axis label: white space made visible, dollars safe from matplotlib's mathematics."""
    if i == encoding.eot_token:
        return "</s>"
    text = encoding.decode_single_token_bytes(int(i)).decode("utf-8", "replace")
    text = re.sub("  +", lambda spaces: f"␣×{len(spaces[0])}", text)
    text = text.replace("\n", "↵").replace("\t", "→").replace(" ", "␣")
    return (text if len(text) <= 10 else text[:9] + "…").replace("$", r"\$")


def draw_map(depth, encoding, options):
    """Token x block: dark ran, pale went around a routed block, white had already left."""
    visited, exit_at = depth["visited"], depth["exit_at"]
    W, T, L = visited.shape
    part = slice(options.first, options.first + options.tokens)
    window = options.window
    if window is None:
        there = depth["targets"][:, part] >= 0
        full = there.sum(1) == there.sum(1).max()
        window = int(np.where(full, visited[:, part].sum(-1).std(1, where=there), -1).argmax())
    if not (0 <= window < W and 0 <= options.first < T and options.tokens > 0):
        raise UserError(f"--window must be from 0 to {W - 1} and --first from 0 to {T - 1}, --tokens above 0")
    there = depth["targets"][window, part] >= 0
    ran, left = visited[window, part][there], exit_at[window, part][there]                     # (t,L), (t,)
    exited = np.arange(1, L + 1) > left[:, None]
    picture = np.where(ran, 2, np.where(exited, 0, 1))
    fig, ax = plt.subplots(figsize=(12, 1.9 + 0.3 * L))
    ax.pcolormesh(picture.T, cmap=ListedColormap(["#ffffff", "#f3c998", "#27508c"]), vmin=0, vmax=2,
                  edgecolors="#d5d9e0", linewidth=0.5)
    ax.step(np.arange(len(left) + 1), np.append(left, left[-1]), where="post", color="#c0392b", lw=2)
    ax.set_yticks(np.arange(L) + 0.5, [f"{n}{' routed' if is_routed else ''}" for n, is_routed in
                                       enumerate(depth["routed"], 1)])
    words = [shown(encoding, i) for i in depth["ids"][window, part][:len(left)]]
    ax.set_xticks(np.arange(len(words)) + 0.5, words, rotation=90, fontfamily="monospace", fontsize=10)
    ax.tick_params(length=0)
    ax.set(ylabel="block", xlabel="token read")
    handles = [plt.Rectangle((0, 0), 1, 1, fc=c, ec="#d5d9e0") for c in ("#27508c", "#f3c998", "#ffffff")]
    handles.append(plt.Line2D([], [], color="#c0392b", lw=2))
    names = ["ran", "went around (MoD)", "state copied (had left)", "exit"]
    ax.legend(handles, names, ncols=4, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), fontsize=10)
    ax.set_title(f"blocks each token runs ({depth['rule']})")
    return fig


def draw_depth(depth):
    """Two histograms: the exit, and the number of blocks run. With a mean line each."""
    L, there = depth["visited"].shape[-1], depth["targets"] >= 0
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for ax, values, title in ((axes[0], depth["exit_at"][there], "block after which a token left"),
                              (axes[1], depth["visited"][there].sum(-1), "blocks run by a token")):
        share = np.bincount(values.astype(int), minlength=L + 1)[1:] / values.size
        bars = ax.bar(np.arange(1, L + 1), share, color=colors_of(L), width=0.8)
        ax.bar_label(bars, [f"{s:.0%}" if s >= 0.005 else "" for s in share], fontsize=9)
        ax.axvline(values.mean(), color="#c0392b", ls="--", lw=1.5)
        ax.set(title=f"{title} (mean {values.mean():.2f})", xticks=range(1, L + 1))
    axes[0].set_ylabel("share of tokens")
    fig.suptitle(f"{there.sum():,} validation tokens, {depth['rule']}", x=0.01, ha="left",
                 fontsize=10, color="#555555")
    return fig


def draw_router(depth):
    """Histogram of r by routed block (log counts), split by what the causal rule did."""
    routed = np.flatnonzero(depth["routed"])
    fig, axes = plt.subplots(1, len(routed), figsize=(max(4, 3 * len(routed)), 3), sharey=True, squeeze=False)
    for ax, n in zip(axes[0], routed, strict=True):
        alive = (depth["exit_at"] > n) & (depth["targets"] >= 0)
        if not alive.any():
            ax.set(title=f"block {n + 1}: nobody came")
            continue
        score, ran = depth["score"][..., n][alive], depth["visited"][..., n][alive]
        bins = np.linspace(score.min(), score.max() + 1e-6, 50)
        ax.hist([score[ran], score[~ran]], bins, stacked=True, log=True, color=["#27508c", "#f3c998"],
                label=["ran", "went around"])
        ax.set(title=f"block {n + 1}: {ran.mean():.0%} ran", xlabel="router weight r")
    axes[0][0].set_ylabel("tokens (log)")
    drawn = [ax for ax in axes[0] if ax.patches]
    if drawn:
        fig.legend(*drawn[0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=9)
    return fig


def draw_when(depth):
    """Shares of the tokens that ran, went around and had left, by block; then the blocks that a token ran to
    be read against the surprise and the uncertainty of what it predicts, and (of a text) by its kind."""
    there = depth["targets"] >= 0
    visited, L = depth["visited"][there], depth["visited"].shape[-1]
    left, blocks = depth["exit_at"][there][:, None] <= np.arange(L), visited.sum(1)
    fig, axes = plt.subplots(1, 3 + ("kind" in depth), figsize=(16, 3.8))
    bottom = 0
    for share, color, name in ((visited, "#27508c", "ran"), (~visited & ~left, "#f3c998", "went around"),
                               (left, "#e9e9e9", "had left")):
        axes[0].bar(range(1, L + 1), share.mean(0), bottom=bottom, color=color, label=name)
        bottom = bottom + share.mean(0)
    axes[0].set(xlabel="block", ylabel="share of tokens", xticks=range(1, L + 1))
    axes[0].legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    for ax, key, name in ((axes[1], "nats", "surprise -log p(next)"), (axes[2], "entropy", "entropy of p")):
        x = depth[key][there]
        tenth = np.array_split(np.argsort(x, kind="stable"), min(10, len(x)))
        ax.errorbar([x[i].mean() for i in tenth], [blocks[i].mean() for i in tenth], ms=4, fmt="o-",
                    color="#27508c", yerr=[blocks[i].std() / len(i)**0.5 for i in tenth])
        ax.set(title=f"r = {np.corrcoef(x, blocks)[0, 1]:.2f}", xlabel=f"{name} (nats, tenths of the tokens)",
               ylabel="blocks run")
    if "kind" in depth:
        kinds = depth["kind"][there]
        names = sorted(set(kinds), key=lambda kind: blocks[kinds == kind].mean())
        bars = axes[3].barh(names, [blocks[kinds == kind].mean() for kind in names], color="#27508c")
        axes[3].bar_label(bars, [f" {(kinds == kind).mean():.0%} of tokens" for kind in names], fontsize=9)
        axes[3].set(title="by kind of the token read", xlabel="blocks run", xlim=(0, L))
    fig.suptitle(f"{there.sum():,} validation tokens, {depth['rule']}", x=0.01, ha="left", fontsize=10,
                 color="#555555")
    return fig


def draw_frontier(evaluation):
    """Loss, and BLEU on each split, against mean exit: a line for the fixed exits, the others with their
    threshold, random exits and oracle as marks. None if only one rule was measured."""
    panels = {"loss on validation text": (evaluation.get("forced", []), "loss")}
    panels |= {f"BLEU on {split}": (rows, "bleu") for split, rows in evaluation["translated"].items()
               if "bleu" in rows[0]}
    if max(len(rows) for rows, _ in panels.values()) < 2:
        return None
    fig, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4), squeeze=False)
    for ax, (title, (rows, key)) in zip(axes[0], panels.items(), strict=True):
        kinds = {}
        for r in rows:
            label = r["rule"].partition(":")[2].replace("correctness", "C").replace("likelihood", "LL")
            kinds.setdefault(run.kind_of(r["rule"]), []).append((r["exit"], r[key], label))
        for kind, points in kinds.items():
            x, y, labels = zip(*sorted(points), strict=True)
            mark = {"fixed": "o-", "random": "x", "oracle": "*:"}.get(kind, "s--")
            line, = ax.plot(x, y, mark, ms=9 if kind == "oracle" else 5, mfc="none", label=kind)
            for a, b, label in zip(x, y, labels, strict=True):
                if kind in ("confidence", "learned", "oracle"):
                    ax.annotate(label, (a, b), (4, 5), textcoords="offset points", fontsize=8,
                                color=line.get_color())
        ax.set(title=title, xlabel="exit (mean over tokens)")
        ax.grid(color="#e6e6e6")
    axes[0][-1].legend(frameon=False, fontsize=9)
    return fig


def laid_out(sample, encoding, columns):
    """sample.npz -> [(row, column, string, blocks run or None)]; translations stand below their sources."""
    found, row = [], 0
    for n, prompt in enumerate(sample["prompt"].tolist()):
        mine, column = sample["row"] == n, 0
        depth = [None] * prompt + sample["visited"][mine][prompt - 1:].sum(1).tolist()
        ids = [*sample["ids"][mine][:prompt], *sample["written"][mine][prompt - 1:]]
        tokens = list(zip(ids, depth, strict=True))
        if len(sample["lines"]):
            found.append((row, 0, str(sample["lines"][n]), None))
            row, tokens = row + 1, tokens[prompt:]
        for i, depth in tokens:
            text = " </s>" if i == encoding.eot_token else \
                encoding.decode_single_token_bytes(int(i)).decode("utf-8", "replace").replace("\t", "    ")
            text = text.lstrip() if column == 0 and len(sample["lines"]) else text
            for k, part in enumerate(text.split("\n")):
                if k or column + len(part) > columns:
                    row, column = row + 1, 0
                found.append((row, column, part, depth))
                column += len(part)
        row += 2
    return found


def draw_text(sample, encoding, columns=96):
    """The texts of sample.npz, every token on the colour of the number of blocks that ran to write it."""
    L, texts = sample["visited"].shape[1], laid_out(sample, encoding, columns)
    last, width = texts[-1][0] + 2, max(column + len(text) for _, column, text, _ in texts)
    texts += [(last, 12 + 3 * n, f" {n} ", n) for n in range(1, L + 1)]
    width = max(width, 15 + 3 * L)
    fig = plt.figure(figsize=((width + 2) * 0.1004, (last + 2) * 0.27), layout="none")  # 12 points monospaced
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-1, width + 1), ylim=(last + 1, -1))
    ax.axis("off")
    texts.append((last, 0, "blocks run:", None))
    for row, column, text, depth in texts:
        if depth is not None:
            ax.add_patch(plt.Rectangle((column, row - 0.45), len(text), 0.9, lw=0, alpha=0.5,
                                       color=colors_of(L)[depth - 1]))
        ax.text(column, row, text.replace("$", r"\$"), family="monospace", fontsize=12, va="center")
    return fig


def draw_loss(metrics):
    """Validation loss of each exit over training, a panel per routing rule; untrained values run off the top.
    None before the first evaluation."""
    found = [m for m in metrics if m["kind"] == "val"]
    if not found:
        return None
    rules = list(found[-1]["loss"])
    fig, axes = plt.subplots(1, len(rules), figsize=(5.6 * len(rules), 3.8), sharey=True, squeeze=False)
    for ax, rule in zip(axes[0], rules, strict=True):
        loss = np.array([m["loss"][rule] for m in found])                               # (evaluations, N)
        for n, color in enumerate(colors_of(loss.shape[1])):
            width = 4 - 3 * n / loss.shape[1]     # lines that coincide stay visible
            ax.plot([m["step"] for m in found], loss[:, n], color=color, lw=width, label=f"{n + 1}")
        ax.set(title={"top_k": "top-k routing" if len(rules) > 1 else "validation",
                      "causal": "causal routing"}[rule], xlabel="step")
        ax.annotate(f"last exit {loss[-1, -1]:.3f}", (1, 0.98), xycoords="axes fraction",
                    ha="right", va="top", fontsize=10)
        ax.grid(axis="y", color="#e6e6e6")
    late = np.concatenate([m["loss"][r] for m in found[min(1, len(found) - 1):] for r in rules])
    axes[0][0].set_ylim(late.min() - 0.1, late.max() + 0.3)
    axes[0][0].set_ylabel("loss (nats per token)")
    axes[0][-1].legend(title="exit", frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


@command
def main(argv=None):
    options = run.parse(argv, Options)
    folder = run.find(options.run, options.out)
    figures = {"loss": draw_loss(run.read_metrics(folder))}
    if (folder / "depth.npz").is_file():
        with np.load(folder / "depth.npz") as archive:
            depth = dict(archive)
        if not {"routed", "entropy"} <= depth.keys():
            raise UserError(f"{folder}/depth.npz is of an older version: python evaluate.py --run {folder}")
        encoding = load_tokenizer(folder / "tokenizer.json")
        figures["map"] = draw_map(depth, encoding, options)
        figures["depth"] = draw_depth(depth)
        if depth["visited"].sum(-1)[depth["targets"] >= 0].std() > 0:
            figures["when"] = draw_when(depth)
        if depth["routed"].any():
            figures["router"] = draw_router(depth)
        if (folder / "evaluation.json").is_file():
            figures["frontier"] = draw_frontier(run.read_json(folder / "evaluation.json"))
        if (folder / "sample.npz").is_file():
            with np.load(folder / "sample.npz") as archive:
                figures["text"] = draw_text(dict(archive), encoding)
    else:
        print(f"{folder} has no depth.npz yet (evaluate.py writes it): drawing the loss alone")
    (folder / "figures").mkdir(exist_ok=True)
    for name, fig in figures.items():
        if fig is not None:
            fig.savefig(Path(folder) / "figures" / f"{name}.png")
            plt.close(fig)
            print(f"wrote {folder}/figures/{name}.png")


if __name__ == "__main__":
    main()
