"""Figures from synthetic files of a run: what they show, what they leave out, what they refuse."""
import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from test_scripts import refused

import plot
import sample
from data.common import save_tokenizer, train_tokenizer
from decode import Generated

# A warning of numpy or matplotlib is a figure that a user sees with noise around it.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
plot.plt.rcParams["figure.max_open_warning"] = 0
W, T, L = 4, 30, 3


def write_depth(folder, exit_at=None, visited=None, routed=(False, True, False), **more):
    """depth.npz -> its arrays (W,T,...), drawn at random unless given; None leaves one out."""
    draw = np.random.default_rng(0)
    exit_at = np.array(draw.integers(1, L + 1, (W, T)) if exit_at is None else exit_at, np.uint8)
    shape, runs = exit_at.shape, draw.random((*exit_at.shape, L)) < np.where(routed, 0.5, 1)
    visited = (np.arange(L) < exit_at[..., None]) & runs if visited is None else np.array(visited, bool)
    depth = {"ids": draw.integers(97, 123, shape), "targets": np.ones(shape, int), "exit_at": exit_at,
             "said": draw.integers(97, 123, (*shape, L)), "sources": np.zeros(W, int),
             "present": np.broadcast_to(np.array(more.get("targets", 1)) >= 0, shape),
             "loss": draw.random(shape), "entropy": draw.random(shape), "visited": visited,
             "routed": np.full(L, routed), "weight": draw.normal(size=visited.shape),
             "kind": np.where(draw.random(shape) < 0.3, "name", "space"), "rule": np.array("a rule")} | more
    np.savez(folder / "depth.npz", **{name: array for name, array in depth.items() if array is not None})
    return depth


def draw_loss(folder, losses):
    """The figure of evaluations at steps 0, 1, ..., each {rule: losses of the exits}."""
    lines = [json.dumps({"kind": "val", "step": n, "loss": loss}) + "\n" for n, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(lines), "utf-8")
    return plot.draw_loss(folder / "metrics.jsonl")


def draw_frontier(folder, forced, **translated):
    """forced, translated: {rule: (exit, value)}."""
    def rows(rules):
        return [{"rule": rule, "exit": e, "loss": value, "bleu": value} for rule, (e, value) in rules.items()]
    content = {"forced": rows(forced), "translated": {k: rows(rules) for k, rules in translated.items()}}
    (folder / "evaluation.json").write_text(json.dumps(content), "utf-8")
    return plot.draw_frontier(folder / "evaluation.json")


def words(texts):
    return [text.get_text().strip() for text in texts if text.get_text()]


def test_every_figure_needs_its_own_file_alone(folder):
    """A router for dense blocks; figures that need routed blocks or rows of equal length; a frontier of three
    rules beside an evaluation of one; a script that needs a finished run."""
    def drawn():
        plot.main(["--run", str(folder)])
        return {path.stem for path in (folder / "figures").iterdir()}
    targets = np.where(np.arange(T) < np.arange(8, 8 + W)[:, None], 1, -1)
    write_depth(folder, routed=False, targets=targets)
    (folder / "figures" / "mine.png").write_bytes(b"x")
    assert drawn() == {"loss", "map", "lens", "depth", "when", "frontier", "text", "mine"}
    fig = plot.draw_when(folder / "depth.npz")
    assert [c.get_label() for c in fig.axes[0].containers] == ["ran", "exited: state copied"]
    assert f"{(targets >= 0).sum()} validation tokens" in fig.get_suptitle()
    write_depth(folder, np.full((W, T), L), routed=False)
    (folder / "sample.json").unlink()
    draw_frontier(folder, {"full": (3, 3.0)})
    assert drawn() == {"loss", "map", "lens", "depth", "mine"}
    (folder / "depth.npz").unlink()
    draw_frontier(folder, {"full": (3, 3.0), "fixed:1": (1, 4.0)})
    assert drawn() == {"loss", "frontier", "mine"}


@pytest.mark.parametrize("more", [{"loss": None}, {"loss": np.ones((W, T + 1))},
                                  {"ids": np.full((W, T), 9999)}])
def test_depth_of_another_version_is_one_line(folder, capsys, more):
    """A traceback for arrays that are missing or of other shapes, or tokens that the tokenizer lacks."""
    write_depth(folder, **more)
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    said = refused(capsys, plot.main, "--run", folder)
    assert str(folder / "depth.npz") in said and "damaged" in said
    assert before == {path: path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.parametrize("evaluations", [1, 3, 4, 7])
def test_the_loss_of_any_routing_rule(tmp_path, evaluations):
    """Rules known by name; a panel with the title or the losses of another rule; after an interrupt, a curve
    that runs off the top; the untrained model flattening everything else."""
    losses = [{"best": [5 - n, 4 - n], "worst": [9 + n, 8 - n], "top_k": [7, 6]} for n in range(evaluations)]
    axes = draw_loss(tmp_path, losses).axes
    assert [ax.get_title(loc="left").split(" ")[0] for ax in axes] == ["best", "worst", "top_k"]
    assert f"last exit {5 - evaluations}.000 at step {evaluations - 1}" in axes[0].get_title(loc="left")
    for ax, rule in zip(axes, losses[0], strict=True):
        shown = [loss[rule] for loss in losses[evaluations > 3:]]
        assert np.array_equal(np.transpose([line.get_ydata() for line in ax.lines]), shown)
        assert ax.get_ylim()[0] <= np.min(shown) and np.max(shown) <= ax.get_ylim()[1]


@pytest.mark.parametrize("bad", [np.nan, float("inf"), None])
def test_losses_that_are_no_numbers(tmp_path, bad):
    """A diverged run whose figures cannot be drawn."""
    write_depth(tmp_path, loss=np.full((W, T), np.nan))
    figures = [draw_loss(tmp_path, [{"top_k": losses} for losses in ([3, 2], [bad, 1], [bad, bad])]),
               draw_frontier(tmp_path, {"full": (3, 3.0), "a:1": (2, np.nan)}),
               plot.draw_when(tmp_path / "depth.npz")]
    for figure in figures:
        figure.savefig(tmp_path / "figure.png")


def test_the_map_shows_what_ran_what_was_skipped_and_what_was_copied(folder):
    """A map that is off by a block or a token, and a pretty picture all the same; a routed block that is said
    to copy the state of an exited token."""
    write_depth(folder, [[3, 1, 2]], [[[1, 0, 1], [1, 0, 0], [1, 1, 0]]], ids=np.array([[97, 98, 99]]))
    [ax] = plot.draw_map(folder / "depth.npz", plot.Options()).axes
    ran, skipped, copied, nothing = plot.RAN, plot.SKIPPED, plot.COPIED, plot.NOTHING
    assert ax.collections[0].get_array().reshape(3, 3).T.tolist() == [
        [ran, skipped, ran], [ran, nothing, copied], [ran, ran, copied]]
    assert words(ax.get_xticklabels() + ax.get_yticklabels()) == ["a", "b", "c", "1", "2 routed", "3"]
    [line] = [line for line in ax.lines if line.get_label() == "exit"]
    assert line.get_ydata().tolist() == [3, 1, 2, 2]


def test_the_window_of_the_map(folder, capsys):
    """White space that cannot be seen, mathematics in a label, padding drawn as tokens, another window than
    asked for or, by default, than where depth changes most; a bad window as a complaint about the file."""
    save_tokenizer(folder / "tokenizer.json", train_tokenizer(["$$ $$ $$"], 258))       # $$: 256, end: 257
    ids, exit_at, targets = np.full((W, T), ord("b")), np.full((W, T), L), np.ones((W, T), int)
    ids[:, :7] = [*b"a \n_\t", 256, 257]
    ids[3, 7:] = ord("c")
    exit_at[3, ::2] = 1
    targets[2, 7:] = -1
    write_depth(folder, exit_at, routed=False, ids=ids, targets=targets)

    def labels(**options):
        [ax] = plot.draw_map(folder / "depth.npz", plot.Options(**options)).axes
        ax.figure.savefig(folder / "map.png")
        return "".join(words(ax.get_xticklabels()))
    assert labels(window=2) == labels(window=0, tokens=7) == "a␣↵_→$$</s>"
    assert labels(window=2, first=5) == "$$</s>" and labels(window=1, first=28) == "bb"
    assert labels().endswith("cc")
    (folder / "sample.json").unlink()
    for bad in "--window=4", "--window=-1", "--first=30", "--first=-1", "--tokens=0", "--window=2 --first=7":
        said = refused(capsys, plot.main, "--run", folder, *bad.split())
        assert "error: --window must be from 0 to 3" in said, bad


def test_shares_are_of_all_tokens(folder):
    """A block that 5 % run in one figure and 8 % in another; shares that do not add up to all tokens; padding
    among them; a token that ran no block counted as another or left out."""
    routed = np.array([True, True, False])
    depth = write_depth(folder, routed=routed, targets=np.repeat(np.arange(W)[:, None] - 1, T, 1))
    exit_at, visited, path = depth["exit_at"][1:], depth["visited"][1:], folder / "depth.npz"
    when, router, (exits, blocks) = plot.draw_when(path), plot.draw_router(path), plot.draw_depth(path).axes
    share = {c.get_label(): [bar.get_height() for bar in c] for c in when.axes[0].containers}
    ran, exited = visited.mean((0, 1)), (exit_at[..., None] <= np.arange(L)).mean((0, 1))
    assert share["ran"] == pytest.approx(ran) and np.sum([*share.values()], 0) == pytest.approx(np.ones(L))
    assert share["exited: nothing"] == pytest.approx(exited * routed)
    assert share["exited: state copied"] == pytest.approx(exited * ~routed)
    assert router.axes[1].get_title(loc="left") == f"block 2: {ran[1]:.0%} of all tokens run"
    for ax, counts, values in ((exits, exit_at, [1, 2, 3]), (blocks, visited.sum(-1), [0, 1, 2, 3])):
        assert [bar.get_height() for bar in ax.patches] == [(counts == n).mean() for n in values]
        assert f"(mean {counts.mean():.2f})" in ax.get_title(loc="left")


def test_the_router_draws_live_tokens_only(folder):
    """Weights of exited tokens among those that were skipped; an infinite weight, or none at all, that stops
    the figure."""
    depth = write_depth(folder)
    depth["weight"][depth["exit_at"] == 1] = 50
    depth["weight"][tuple(np.argwhere(depth["exit_at"] > 1)[0])] = np.inf
    write_depth(folder, **depth)
    fig = plot.draw_router(folder / "depth.npz")
    assert fig.axes[0].get_xlim()[1] < 10
    write_depth(folder, np.ones((1, 3)), np.zeros((1, 3, L)))
    for figure in (fig, plot.draw_router(folder / "depth.npz")):
        figure.savefig(folder / "router.png")


def test_when_says_what_is_correlated(folder):
    """A correlation with other tokens or with padding; means of another kind; deciles of three tokens."""
    depth = write_depth(folder)
    depth["targets"][0] = -1
    depth["loss"] = depth["visited"].sum(-1) * 2.0
    write_depth(folder, **depth)
    _, loss, entropy, count, kinds, exits = plot.draw_when(folder / "depth.npz").axes
    line, blocks, kind = loss.lines[0], depth["visited"].sum(-1)[1:], depth["kind"][1:]
    assert "(correlation 1.00)" in loss.get_title(loc="left") and len(line.get_xdata()) == 10
    assert line.get_xdata() == pytest.approx(2 * line.get_ydata())
    r = np.corrcoef(depth["entropy"][1:].ravel(), blocks.ravel())[0, 1]
    assert f"entropy (correlation {r:.2f})" in entropy.get_title(loc="left")
    for ax, counted in (kinds, blocks), (exits, depth["exit_at"][1:]):
        bars = zip(words(ax.get_yticklabels()), ax.patches, words(ax.texts), strict=True)
        means = {name: counted[kind == name].mean() for name in ("name", "space")}
        assert {name: bar.get_width() for name, bar, _ in bars} == pytest.approx(means)
    ids = depth["ids"][1:].ravel()
    r = np.corrcoef(np.log10([(ids == i).sum() for i in ids]), blocks.ravel())[0, 1]
    assert f"count (correlation {r:.2f})" in count.get_title(loc="left")
    write_depth(folder, [[1, 2, 3]], routed=False)
    assert len(plot.draw_when(folder / "depth.npz").axes[1].lines[0].get_xdata()) == 3


def test_what_each_exit_would_say(folder):
    """The word of another exit or token; a disagreement with the first exit, not the last."""
    depth, options = write_depth(folder), plot.Options(window=2, first=5, tokens=9)
    ax, = plot.draw_lens(folder / "depth.npz", options).axes
    said = depth["said"][2, 5:14]
    assert words(ax.texts) == [chr(i) for i in said.flat]
    assert np.array_equal(ax.collections[0].get_array().reshape(L, 9), (said != said[:, -1:]).T)


def test_the_frontier_knows_no_rule_by_name(tmp_path):
    """A rule that gets no line, no label, or another colour in the next panel; a panel of one point."""
    forced = {"fixed:1": (1, 4.0), "mine:7": (1.5, 3.5), "full": (3, 3.0), "fixed:2": (2, 3.4),
              "odd": (2, 3.6), "mine:x:8": (2.5, 3.2), "confidence:0.5,0.6": (2.2, 3.3)}
    translated = {"test": {"mine:7": (1.4, 30.0), "full": (3, 33.0)}, "few": {"full": (3, 30)}}
    loss, bleu = draw_frontier(tmp_path, forced, **translated).axes
    assert bleu.get_title(loc="left") == "BLEU on test"
    assert {line.get_label(): line.get_xydata().tolist() for line in loss.lines} == {
        "fixed": [[1, 4.0], [2, 3.4], [3, 3.0]], "mine": [[1.5, 3.5], [2.5, 3.2]],
        "odd": [[2, 3.6]], "searched thresholds": [[2.2, 3.3]]}
    assert words(loss.texts) == ["7", "x:8"] and len(loss.figure.legends[0].get_texts()) == 4
    colors = [{line.get_label(): to_rgb(line.get_color()) for line in ax.lines} for ax in (loss, bleu)]
    assert colors[0] == colors[1] and len(set(colors[0].values())) == 4


def painted(folder, texts, lines=(), **options):
    """The figure of (prompt, written, blocks run) -> {(row, column): string}, {(row, column): blocks}."""
    rows, encoding = [], train_tokenizer(["$$ $$ $$"], 258)
    for prompt, written, blocks in texts:
        counts = np.array([L] * (len(prompt) - 1) + blocks)
        visited = np.arange(L) < counts[:, None]
        rows.append(Generated([*prompt, *written], len(prompt), counts, visited, *[None] * 3))
    texts = [sample.tokens_of(*row) for row in zip(rows, [encoding] * 9, lines or [""] * 9, strict=False)]
    (folder / "sample.json").write_text(json.dumps({"n_layer": L, "texts": texts}), "utf-8")
    [ax] = plot.draw_text(folder / "sample.json", **options).axes
    ax.figure.savefig(folder / "text.png")
    shades = [to_rgb(shade) for shade in plot.depth_colors(L)]
    blocks = {(round(bar.get_y() + 0.45), bar.get_x()): shades.index(to_rgb(bar.get_facecolor()[:3]))
              for bar in ax.patches if bar.get_width()}
    return {t.get_position()[::-1]: t.get_text() for t in ax.texts if t.get_text()}, blocks


def test_a_token_has_the_colour_of_the_blocks_that_wrote_it(folder):
    """Depths shifted by one, prompts with a colour, a text on another's lines, dollars as mathematics; of a
    translation, the start token drawn, or a source line that runs off the figure."""
    text, blocks = painted(folder, [(b"ab", [*b"c", 256, *b"\n$"], [1, 2, 3, 0]), (b"z", b"yx", [3, 1])])
    legend = {(5, 13): 0, (5, 16): 1, (5, 19): 2, (5, 22): 3}
    assert text == {place: f" {n} " for place, n in legend.items()} | {
        (0, 0): "a", (0, 1): "b", (0, 2): "c", (0, 3): "$$", (1, 0): "$", (3, 0): "z", (3, 1): "y",
        (3, 2): "x", (5, 0): "blocks run:  "}
    assert blocks == legend | {(0, 2): 1, (0, 3): 2, (1, 0): 0, (3, 1): 3, (3, 2): 1}
    text, blocks = painted(folder, [([257], [*b"ba", 257], [1, 2, 3])], ["aa bb cc"], columns=7)
    source = {(0, 0): "aa ", (0, 3): "bb ", (1, 0): "cc "}
    assert text.items() >= (source | {(2, 0): "b", (2, 1): "a", (2, 2): " </s>"}).items()
    assert blocks[2, 1] == 2 and not source.keys() & blocks.keys()
