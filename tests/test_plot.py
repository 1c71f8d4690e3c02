"""Figures from synthetic files of a run: what they show, what they leave out, what they refuse."""
import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import plot
from data.common import save_tokenizer, train_tokenizer

ALL = {"loss", "map", "depth", "when", "router", "frontier", "text"}
W, T, L = 4, 30, 3
ROUTED = np.array([False, True, False])


@pytest.fixture(autouse=True)
def strict():
    """A warning of numpy or matplotlib is a figure that a user sees with noise around it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)    # numpy leaves damaged archives open
        yield
    plt.close("all")


def depth_of(exit_at, visited, routed=ROUTED, **more):
    """Arrays of depth.npz: exit_at (W,T), visited (W,T,L), random losses, the letter a everywhere."""
    exit_at, visited = np.array(exit_at, np.uint8), np.array(visited, bool)
    draw = np.random.default_rng(0)
    depth = {"ids": np.full(exit_at.shape, ord("a"), np.int32), "targets": np.ones(exit_at.shape, np.int32),
             "loss": draw.random(exit_at.shape), "entropy": draw.random(exit_at.shape), "exit_at": exit_at,
             "visited": visited, "weight": np.where(routed, draw.normal(size=visited.shape), np.nan),
             "routed": np.array(routed), "rule": np.array("confidence 0.3, causal routing")}
    return depth | more


def random_depth(**more):
    draw = np.random.default_rng(1)
    exit_at = draw.integers(1, L + 1, (W, T))
    visited = np.arange(L) < exit_at[..., None]
    visited[..., 1] &= draw.random((W, T)) < 0.5
    kind = np.where(draw.random((W, T)) < 0.3, "name", "space")
    return depth_of(exit_at, visited, **({"kind": kind} | more))


def val(step, **loss):
    return {"kind": "val", "step": step, "loss": loss}


def write_metrics(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder / "metrics.jsonl"


def write_evaluation(folder, forced, **translated):
    """forced, translated: {rule: (exit, value)}."""
    rows = {name: [{"rule": rule, "exit": e, "bleu": v} for rule, (e, v) in rules.items()]
            for name, rules in translated.items()}
    content = {"forced": [{"rule": rule, "exit": e, "loss": v} for rule, (e, v) in forced.items()],
               "translated": rows}
    (folder / "evaluation.json").write_text(json.dumps(content), "utf-8")
    return folder / "evaluation.json"


def write_sample(folder, prompts, written, blocks, lines=()):
    """Texts of bytes: prompt and continuation of each, and how many of L blocks ran for each written byte."""
    ids, new, row, visited = [], [], [], []
    for n, (prompt, text, counts) in enumerate(zip(prompts, written, blocks, strict=True)):
        whole = [*prompt, *text]
        counts = [L] * (len(prompt) - 1) + list(counts)
        ids, new, row = ids + whole[:-1], new + whole[1:], row + [n] * len(counts)
        visited += [np.arange(L) < k for k in counts]
    np.savez(folder / "sample.npz", ids=np.array(ids, np.int32), written=np.array(new, np.int32),
             row=np.array(row), visited=np.array(visited), exit_at=np.sum(visited, 1).astype(np.uint8),
             prompt=np.array([len(prompt) for prompt in prompts]), lines=np.array(lines))
    return folder / "sample.npz"


@pytest.fixture(scope="session")
def encoding():
    """Single bytes (id = byte), $$ (256) and the end token 257."""
    encoding = train_tokenizer(["$$ $$ $$"], 258)
    assert encoding.decode([ord("a"), 256]) == "a$$" and encoding.eot_token == 257
    return encoding


@pytest.fixture
def folder(tmp_path, encoding):
    """The files of a finished run."""
    (tmp_path / "options.json").write_text("{}", "utf-8")
    save_tokenizer(tmp_path / "tokenizer.json", encoding)
    write_metrics(tmp_path, val(0, top_k=[5, 5, 5], causal=[5, 5, 5]), {"kind": "train", "step": 1},
                  val(9, top_k=[3, 2, 1], causal=[3, 2, 1]))
    np.savez(tmp_path / "depth.npz", **random_depth())
    write_evaluation(tmp_path, {"fixed:1": (1, 4.0), "full": (3, 3.0), "confidence:0.3": (2, 3.2)})
    write_sample(tmp_path, [b"ab"], [b"cd\n$e$"], [[1, 2, 3, 1, 1, 2]])
    return tmp_path


def names(folder):
    return {path.stem for path in (folder / "figures").iterdir()}


def refused(capsys, folder, *words):
    """plot.main must end with exit code 2 -> the one line that it printed on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        plot.main(["--run", str(folder), *map(str, words)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said
    return said


def heights(ax):
    """{label: heights} of the bars of an axis."""
    return {c.get_label(): [bar.get_height() for bar in c] for c in ax.containers}


def title(ax):
    return ax.get_title(loc="left")


def no_line_crosses_a_label(fig):
    """No drawn line passes through the text of a label."""
    fig.canvas.draw()
    for ax in fig.axes:
        boxes = [t.get_window_extent() for t in ax.texts if t.get_text()]
        for line in ax.lines:
            points = line.get_transform().transform(line.get_xydata())
            for box in boxes:
                for a, b in zip(points, points[1:], strict=False):
                    inside = [box.contains(*(a + (b - a) * t)) for t in np.linspace(0, 1, 100)]
                    assert not any(inside)


# ---- the script


def test_all_figures(folder, capsys):
    """A figure that is missing, or empty."""
    plot.main(["--run", str(folder)])
    assert names(folder) == ALL and capsys.readouterr().out.count("wrote ") == len(ALL)
    for picture in folder.glob("figures/*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_before_the_end_the_loss_alone(folder, capsys):
    """A figure script that needs a finished run."""
    for file in ("depth.npz", "evaluation.json", "sample.npz", "tokenizer.json"):
        (folder / file).unlink()
    plot.main(["--run", str(folder)])
    assert names(folder) == {"loss"} and "no depth.npz" in capsys.readouterr().out


def test_evaluation_alone(folder):
    """A frontier that needs depth.npz."""
    for file in ("metrics.jsonl", "depth.npz", "sample.npz"):
        (folder / file).unlink()
    plot.main(["--run", str(folder)])
    assert names(folder) == {"frontier"}


def test_a_dense_translator_has_no_router(folder):
    """Figures that need routed blocks or kinds of tokens; rows of unequal length."""
    targets = np.where(np.arange(T) < np.arange(8, 8 + W)[:, None], 1, -1)
    exit_at = np.random.default_rng(0).integers(1, L + 1, (W, T))
    depth = depth_of(exit_at, np.arange(L) < exit_at[..., None], [False] * L, targets=targets)
    np.savez(folder / "depth.npz", **depth)
    plot.main(["--run", str(folder)])
    assert names(folder) == ALL - {"router"}
    fig = plot.draw_when(folder / "depth.npz")
    assert [ax.get_visible() for ax in fig.axes] == [True, True, True, False]
    assert set(heights(fig.axes[0])) == {"ran", "exited: state copied"}     # no entry for what does not occur
    assert f"{(targets >= 0).sum()} validation tokens" in fig.get_suptitle()


def test_stale_figures_are_removed(folder):
    """A frontier of three rules beside an evaluation of one; a router for blocks that are dense now."""
    plot.main(["--run", str(folder)])
    (folder / "figures" / "mine.png").write_bytes(b"x")
    write_evaluation(folder, {"full": (3, 3.0)})
    np.savez(folder / "depth.npz", **depth_of(np.full((W, T), L), np.ones((W, T, L)), [False] * L))
    (folder / "sample.npz").unlink()
    plot.main(["--run", str(folder)])
    assert names(folder) == {"loss", "map", "depth", "mine"}


@pytest.mark.parametrize("file", ["depth.npz", "sample.npz", "evaluation.json", "metrics.jsonl"])
def test_damaged_files_are_one_line(folder, capsys, file):
    """A traceback for a file that is empty, cut short, something else, or of another version."""
    whole = (folder / file).read_bytes()
    older = {"depth.npz": {"nats": 1, **{k: v for k, v in random_depth().items() if k != "loss"}},
             "sample.npz": {"ids": np.zeros(3)}}
    damages = [b"", b"\x00garbage", b"[3]\n"]
    if file.endswith("npz"):
        np.savez(folder / "older.npz", **older[file])
        np.save(folder / "array.npy", np.zeros(3))
        middle = len(whole) // 2
        damages += [whole[:middle], whole[:middle] + bytes(255 - b for b in whole[middle:]),
                    (folder / "older.npz").read_bytes(), (folder / "array.npy").read_bytes()]
    else:
        damages += [b'{"kind": "val"}\n', b'{"forced": [{"rule": 3}, {"rule": 4}], "translated": {}}\n',
                    b'{"kind": "val", "step": 3, "loss": {"top_k": 3.5}}\n']
    for damage in damages:
        (folder / file).write_bytes(damage)
        said = refused(capsys, folder)
        assert str(folder / file) in said, damage
    if file == "depth.npz":
        np.savez(folder / file, **random_depth(loss=np.ones((W, T + 1))))
        assert "depth.npz is damaged, empty or of another version" in refused(capsys, folder)


def test_tokens_of_another_tokenizer_are_one_line(folder, capsys):
    np.savez(folder / "depth.npz", **random_depth(ids=np.full((W, T), 9999)))
    assert "depth.npz" in refused(capsys, folder)
    (folder / "tokenizer.json").write_text("{", "utf-8")
    assert "tokenizer.json" in refused(capsys, folder)


@pytest.mark.parametrize("words", [["--window", 99], ["--window", -1], ["--first", 99], ["--first", -1],
                                   ["--tokens", 0], ["--tokens", -3], ["--window", 1, "--first", T - 1]])
def test_bad_windows(folder, capsys, words):
    targets = np.ones((W, T), int)
    targets[1, 10:] = -1
    np.savez(folder / "depth.npz", **random_depth(targets=targets))
    said = refused(capsys, folder, *words)
    assert "--window must be from 0 to 3" in said and "damaged" not in said


# ---- loss


def test_any_routing_rule_has_a_panel(tmp_path):
    """Rules known by name; a panel with the title or the losses of another rule."""
    lines = [val(s, best=[5 - s, 4 - s], worst_first=[9 - s, 8 - s], top_k=[7 - s, 6 - s]) for s in (0, 1, 2)]
    fig = plot.draw_loss(write_metrics(tmp_path, *lines))
    assert [title(ax).split(" ")[0] for ax in fig.axes] == ["best", "worst_first", "top_k"]
    assert "last exit 2.000 at step 2" in title(fig.axes[0])
    assert [line.get_ydata().tolist() for line in fig.axes[1].lines] == [[9, 8, 7], [8, 7, 6]]
    alone = plot.draw_loss(write_metrics(tmp_path, val(0, top_k=[3]), val(1, top_k=[2])))
    assert [title(ax) for ax in alone.axes] == ["validation: last exit 2.000 at step 1"]    # nothing routed


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 7])
def test_the_whole_loss_curve_is_visible(tmp_path, evaluations):
    """After an interrupt, a curve that runs off the top; the untrained model flattening everything else."""
    lines = [val(10 * n, top_k=[8 / (n + 1), 7 / (n + 1)]) for n in range(evaluations)]
    [ax] = plot.draw_loss(write_metrics(tmp_path, *lines)).axes
    low, high = ax.get_ylim()
    for line in ax.lines:
        assert len(line.get_xdata()) == (evaluations if evaluations < 4 else evaluations - 1)
        assert ((low <= line.get_ydata()) & (line.get_ydata() <= high)).all()
    assert ax.get_xlabel() == "training step" and ax.get_ylabel() == "validation loss (nats per token)"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_losses_that_are_no_numbers(tmp_path, bad):
    """A diverged run whose figures cannot be drawn."""
    for lines in ([val(n, top_k=[bad, 2.0 - n]) for n in range(5)],
                  [val(n, top_k=[bad, bad]) for n in range(5)],
                  [val(0, top_k=[3, 2]), val(1, top_k=[bad, bad])]):
        fig = plot.draw_loss(write_metrics(tmp_path, *lines))
        fig.savefig(tmp_path / "loss.png")
        assert np.isfinite(fig.axes[0].get_ylim()).all()


# ---- depth.npz


def test_the_map_shows_what_ran_what_was_skipped_and_what_was_copied(folder):
    """A map that is off by a block or a token, and a pretty picture all the same; a routed block that is said
    to copy the state of an exited token."""
    depth = depth_of([[3, 1, 2]], [[[1, 0, 1], [1, 0, 0], [1, 1, 0]]], ids=np.array([[97, 98, 99]]))
    np.savez(folder / "depth.npz", **depth)
    [ax] = plot.draw_map(folder / "depth.npz", plot.Options()).axes
    ran, skipped, copied, nothing = plot.RAN, plot.SKIPPED, plot.COPIED, plot.NOTHING
    assert ax.collections[0].get_array().reshape(3, 3).T.tolist() == [
        [ran, skipped, ran], [ran, nothing, copied], [ran, ran, copied]]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "2 routed", "3"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "exit", "ran", "skipped (MoD)", "exited: state copied", "exited: nothing"]
    [line] = [line for line in ax.lines if line.get_label() == "exit"]
    assert line.get_ydata().tolist() == [3, 1, 2, 2]


def test_the_map_of_other_tokens(folder):
    """White space that cannot be seen, mathematics in a label, padding drawn as tokens, another window."""
    ids = np.tile(np.array([*b"a \n$_", 256, *b"\t", 257] + [98] * 22), (W, 1))
    targets = np.ones((W, T), int)
    targets[2, 8:] = -1
    np.savez(folder / "depth.npz", **random_depth(ids=ids, targets=targets))

    def labels(**options):
        [ax] = plot.draw_map(folder / "depth.npz", plot.Options(**options)).axes
        ax.figure.savefig(folder / "map.png")
        return "|".join(t.get_text() for t in ax.get_xticklabels())
    assert labels(window=2) == labels(window=0, tokens=8) == "a|␣|↵|$|_|$$|→|</s>"
    assert labels(window=2, first=6) == "→|</s>" and labels(window=3, first=28) == "b|b"
    changing = np.full((W, T), L)
    changing[3, ::2] = 1
    np.savez(folder / "depth.npz", **depth_of(changing, np.arange(L) < changing[..., None], ids=ids + (
        np.arange(W)[:, None] == 3) * (ids == 98)))
    assert labels().endswith("c|c")         # left out: the window where depth changes most


def test_when_and_router_have_the_same_denominator(folder):
    """A block that 5 % run in one figure and 8 % in another; shares that do not add up to all tokens."""
    depth = random_depth()
    np.savez(folder / "depth.npz", **depth)
    when, router = plot.draw_when(folder / "depth.npz"), plot.draw_router(folder / "depth.npz")
    share = heights(when.axes[0])
    ran = depth["visited"].mean((0, 1))
    assert share["ran"] == pytest.approx(ran) and np.sum([*share.values()], 0) == pytest.approx(np.ones(L))
    exited = (depth["exit_at"][..., None] <= np.arange(L)).mean((0, 1))
    assert share["exited: nothing"] == pytest.approx(exited * ROUTED)
    assert share["exited: state copied"] == pytest.approx(exited * ~ROUTED)
    assert title(router.axes[0]) == f"block 2: {ran[1]:.0%} of all tokens run"
    assert when.axes[0].get_ylabel() == "share of all tokens"
    assert when.get_suptitle() == router.get_suptitle() == f"120 validation tokens, {depth['rule']}"


def test_the_router_draws_live_tokens_only(folder):
    """Weights of exited tokens among those that were skipped; an infinite weight that stops the figure."""
    depth = random_depth()
    depth["weight"][..., 1][depth["exit_at"] == 1] = 50
    depth["weight"][..., 1][tuple(np.argwhere(depth["exit_at"] > 1)[0])] = np.inf
    np.savez(folder / "depth.npz", **depth)
    fig = plot.draw_router(folder / "depth.npz")
    [legend] = fig.legends
    assert {t.get_text() for t in legend.get_texts()} == {"ran", "skipped (MoD)"}
    assert fig.axes[0].get_xlim()[1] < 10
    fig.savefig(folder / "router.png")


def test_no_token_reaches_a_routed_block(folder):
    """The smallest weight of no weights at all."""
    np.savez(folder / "depth.npz", **depth_of(np.ones((1, 3)), np.zeros((1, 3, 3), bool)))
    fig = plot.draw_router(folder / "depth.npz")
    assert title(fig.axes[0]) == "block 2: no tokens"
    fig.savefig(folder / "router.png")


def test_when_says_what_is_correlated(folder):
    """"r = 0.31", "tenths of the tokens"; a correlation with other tokens or with padding."""
    depth = random_depth()
    depth["targets"][0] = -1
    depth["loss"] = depth["visited"].sum(-1) * 2.0
    np.savez(folder / "depth.npz", **depth)
    shares, loss, entropy, kinds = plot.draw_when(folder / "depth.npz").axes
    assert title(loss) == "blocks run against loss (correlation 1.00)"
    r = np.corrcoef(depth["entropy"][1:].ravel(), depth["visited"].sum(-1)[1:].ravel())[0, 1]
    assert title(entropy) == f"blocks run against entropy (correlation {r:.2f})"
    assert loss.get_xlabel() == "-log p(next) (nats, means of deciles)"
    assert loss.get_ylabel() == "blocks run (mean, of 3)" and len(loss.lines[0].get_xdata()) == 10
    assert loss.lines[0].get_xdata() == pytest.approx(2 * loss.lines[0].get_ydata())
    blocks, kind = depth["visited"].sum(-1)[1:], depth["kind"][1:]
    means = {name: blocks[kind == name].mean() for name in ("name", "space")}
    order = sorted(means, key=means.get)
    assert [t.get_text() for t in kinds.get_yticklabels()] == order
    assert [bar.get_width() for bar in kinds.patches] == pytest.approx([means[name] for name in order])
    assert [t.get_text().strip() for t in kinds.texts] == [f"{(kind == name).sum()} tokens" for name in order]


def test_few_tokens_and_losses_that_are_no_numbers(folder):
    """Deciles of three tokens; a diverged run that cannot be drawn."""
    np.savez(folder / "depth.npz", **random_depth(loss=np.full((W, T), np.nan)))
    assert title(plot.draw_when(folder / "depth.npz").axes[1]).endswith("(correlation nan)")
    np.savez(folder / "depth.npz", **depth_of([[1, 2, 3]], np.tril(np.ones((1, 3, 3))), [False] * 3))
    assert len(plot.draw_when(folder / "depth.npz").axes[1].lines[0].get_xdata()) == 3


def test_histograms_and_means(folder):
    """A mean line through its label; a token that ran no block counted as another or left out."""
    visited = np.zeros((1, 4, 3), bool)
    visited[0, 2:, :2] = True
    np.savez(folder / "depth.npz", **depth_of([[1, 2, 3, 3]], visited, [True] * 3))
    fig = plot.draw_depth(folder / "depth.npz")
    exits, blocks = fig.axes
    assert title(exits) == "exit after block (mean 2.25)" and title(blocks) == "blocks run (mean 1.00)"
    assert [bar.get_height() for bar in exits.patches] == [0.25, 0.25, 0.5]
    assert [bar.get_height() for bar in blocks.patches] == [0.5, 0, 0.5, 0]
    assert exits.get_xticks().tolist() == [1, 2, 3] and blocks.get_xticks().tolist() == [0, 1, 2, 3]
    assert [t.get_text() for t in blocks.texts] == ["50%", "", "50%", ""]
    no_line_crosses_a_label(fig)


# ---- frontier


def test_the_frontier_knows_no_rule_by_name(tmp_path):
    """A rule that gets no line, no label, or another colour in the next panel."""
    forced = {"fixed:1": (1, 4.0), "mine:7": (1.5, 3.5), "full": (3, 3.0), "fixed:2": (2, 3.4),
              "odd": (2, 3.6), "mine:x:8": (2.5, 3.2), "confidence:0.5,0.6": (2.2, 3.3)}
    write_evaluation(tmp_path, forced, test={"mine:7": (1.4, 30.0), "full": (3, 33.0)}, few={"full": (3, 30)})
    loss, bleu = plot.draw_frontier(tmp_path / "evaluation.json").axes
    assert title(loss) == "validation loss (nats/token)" and title(bleu) == "BLEU on test"
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines == {"fixed": [[1, 4.0], [2, 3.4], [3, 3.0]], "mine": [[1.5, 3.5], [2.5, 3.2]],
                     "odd": [[2, 3.6]], "searched thresholds": [[2.2, 3.3]]}
    assert [t.get_text() for t in loss.texts if t.get_text()] == ["7", "x:8"]
    colors = [{line.get_label(): to_rgb(line.get_color()) for line in ax.lines} for ax in (loss, bleu)]
    assert colors[0] == colors[1] and len(set(colors[0].values())) == 4
    assert len({line.get_marker() for line in loss.lines}) == 4
    [legend] = loss.figure.legends
    assert {t.get_text() for t in legend.get_texts()} == set(lines)


def test_a_frontier_of_losses_that_are_no_numbers(tmp_path):
    write_evaluation(tmp_path, {"fixed:1": (1, float("nan")), "full": (3, 3.0), "a:1": (2, float("nan"))})
    plot.draw_frontier(tmp_path / "evaluation.json").savefig(tmp_path / "frontier.png")
    assert plot.draw_frontier(write_evaluation(tmp_path, {"full": (3, 3.0)})) is None


# ---- text


def drawn(path, **options):
    """The text figure -> {(row, column): string}, {(row, column): colour}."""
    [ax] = plot.draw_text(path, **options).axes
    ax.figure.savefig(path.with_name("text.png"))
    colors = {(round(b.get_y() + 0.45), b.get_x()): to_rgb(b.get_facecolor()[:3]) for b in ax.patches}
    return {t.get_position()[::-1]: t.get_text() for t in ax.texts if t.get_text()}, colors


def test_a_token_has_the_colour_of_the_blocks_that_wrote_it(folder):
    """Depths shifted by one, prompts with a colour, a text on another's lines, dollars as mathematics."""
    path = write_sample(folder, [b"ab", b"z"], [[*b"c", 256, *b"\n$"], b"yx"], [[1, 2, 3, 0], [3, 1]])
    text, color = drawn(path)
    shade = [to_rgb(c) for c in plot.depth_colors(L)]
    legend = {(5, 0): "blocks run:  ", (5, 13): " 0 ", (5, 16): " 1 ", (5, 19): " 2 ", (5, 22): " 3 "}
    assert text == legend | {(0, 0): "a", (0, 1): "b", (0, 2): "c", (0, 3): "$$", (1, 0): "$",
                             (3, 0): "z", (3, 1): "y", (3, 2): "x"}
    assert (0, 0) not in color and (0, 1) not in color and (3, 0) not in color
    assert color[0, 2] == shade[1] and color[0, 3] == shade[2] and color[1, 0] == shade[0]
    assert color[3, 1] == shade[3] and color[3, 2] == shade[1] and color[5, 13] == shade[0]


def test_a_translation_stands_below_its_source(folder):
    """The start token drawn; a source line that runs off the figure."""
    path = write_sample(folder, [[257]], [[*b"ba", 257]], [[1, 2, 3]], lines=["aa bb cc"])
    text, color = drawn(path, columns=6)
    assert text[0, 0] == "aa " and text[0, 3] == "bb " and text[1, 0] == "cc "
    assert text[2, 0] == "b" and text[2, 1] == "a" and text[2, 2] == "</s>"
    assert color[2, 1] == to_rgb(plot.depth_colors(L)[2]) and (0, 0) not in color
