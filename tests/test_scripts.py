"""The scripts as a user runs them; bad input gives exit code 2, no traceback, and overwrites nothing."""
import io
import json
import shutil
import sys

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TINY

import evaluate
import plot
import run
import sample
import train as script
from decode import Generated


def refused(capsys, main, *words):
    """Run main(words), which must end with exit code 2 -> what it printed on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    return " ".join(said.replace("│", " ").split())


def test_the_default_run_ends_with_a_sample_and_figures(finished):
    """`finish` calling scripts that are not there, or failing without anybody noticing."""
    files = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    assert files == {"options.json", "tokenizer.json", "meta.json", "metrics.jsonl", "ckpt.pt", "depth.npz",
                     "sample.txt", "sample.npz", "evaluation.json", "figures/map.png", "figures/depth.png",
                     "figures/router.png", "figures/loss.png", "figures/text.png",
                     "figures/frontier.png", "figures/when.png"}
    for picture in finished.glob("figures/*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    depth = np.load(finished / "depth.npz")
    W, T, L = depth["visited"].shape
    assert depth["ids"].shape == depth["exit_at"].shape == depth["nats"].shape == (W, T) and L == 4
    assert np.isnan(depth["score"][..., 0]).all() and np.isfinite(depth["score"][..., 1]).all()
    assert ((depth["exit_at"] >= 1) & (depth["exit_at"] <= L)).all() and len(np.unique(depth["exit_at"])) > 1


def test_sample_is_repeatable_and_keeps_what_it_did(finished, capsys, tmp_path):
    """Another text for the same seed; arrays that do not belong to the text."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    words = ["--run", folder, "--prompt", "def f", "--tokens", 15, "--samples", 2]
    texts = []
    for seed in (1, 1, 2):
        sample.main([str(w) for w in [*words, "--seed", seed]])
        texts.append((folder / "sample.txt").read_text("utf-8"))
    assert texts[0] == texts[1] != texts[2] and all(t.startswith("def f") for t in texts)
    arrays = np.load(folder / "sample.npz")
    assert arrays["visited"].shape == (len(arrays["ids"]), 4) and set(arrays["row"]) == {0, 1}
    assert "\033[" not in capsys.readouterr().out       # not a terminal: plain


def test_sample_reads_standard_input(finished, capsys, monkeypatch, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f3_1"))
    sample.main(["--run", str(folder), "--prompt", "-", "--tokens", "3", "--temperature", "0"])
    assert capsys.readouterr().out.startswith("def f3_1")


@pytest.mark.parametrize("words, said", [
    (["--rule", "full"], "exit after block 4.00 of 4"),
    (["--rule", "fixed:3"], "exit after block 3.00 of 4"),
    (["--rule", "confidence:1,0,1"], "exit after block 2.00 of 4"),
    (["--rule", "random"], ", random: 8 tokens"),
    (["--exit", "2"], "exit after block 2.00 of 4"),
    (["--tau", "0"], "exit after block 1.00 of 4"),
    (["--tau", "1", "0", "1"], "exit after block 2.00 of 4"),
])
def test_rules_by_name(finished, capsys, tmp_path, words, said):
    """An option that is read and then not used."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    sample.main(["--run", str(folder), "--tokens", "8", *words])
    assert said in capsys.readouterr().out


def test_drafts_write_what_full_depth_writes(finished, capsys, tmp_path):
    """An option that changes the text, or does nothing."""
    folder, texts = shutil.copytree(finished, tmp_path / "copy"), []
    for words in (["--rule", "full"], ["--speculate", "1"], ["--speculate", "3", "--ahead", "2"]):
        sample.main(["--run", str(folder), "--tokens", "8", "--temperature", "0", *words])
        said = capsys.readouterr().out
        texts.append(np.load(folder / "sample.npz")["written"].tolist())
        assert ("accepted" in said) == (words[0] == "--speculate") and "full: 8 tokens, exit after" in said
    assert texts[0] == texts[1] == texts[2]
    sample.main(["--run", str(folder), "--tokens", "6", "--samples", "2", "--speculate", "2"])
    assert len(set(np.load(folder / "sample.npz")["row"])) == 2


def test_colours_follow_the_depth(finished, capsys, tmp_path):
    """A colour that means nothing; text changed by painting it; line ends painted to the right margin."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    sample.main(["--run", str(folder), "--tokens", "12", "--exit", "1", "--color", "always", "--seed", "4"])
    out = capsys.readouterr().out
    assert "\033[30;48;5;153m" in out and "blocks run to write a token" in out
    painted = sample.paint(["a", " b\n", "\n\n", "  c"], [None, 1, 2, 4], 4)
    assert painted == "a\033[30;48;5;153m b\033[0m\n\n\n\033[30;48;5;203m  c\033[0m"


LETTERS = tiktoken.Encoding("letters", pat_str=r"\w", special_tokens={"<|endoftext|>": 4},
                            mergeable_ranks={bytes([97 + i]): i for i in range(4)})


def test_a_token_has_the_colour_of_the_reading_that_wrote_it(capsys):
    """Depths shifted by one: the first new token is written by the reading of the last prompt token."""
    visited = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=bool)
    row = Generated([0, 1, 2, 3], 2, np.array([3, 1, 2]), visited)
    sample.show([row], None, LETTERS, 3, "t", color=True)
    painted = sample.paint("abcd", [None, None, 1, 2], 3)
    said = capsys.readouterr().out
    assert said.startswith(painted + "\n")
    assert "exit after block 1.50 of 3 on average, 1.50 blocks run" in said


def test_kinds_of_tokens():
    """A space that hides what follows, a keyword inside a string, a quote in prose that swallows the rest."""
    def kinds(text, code):
        pieces = text.split("|")
        known = list(dict.fromkeys(pieces))
        encoding = tiktoken.Encoding("pieces", pat_str="x", special_tokens={"<|endoftext|>": 99},
                                     mergeable_ranks={p.encode(): i for i, p in enumerate(known)})
        return " ".join(evaluate.kinds_of(encoding, [*map(known.index, pieces), 99], code))
    assert kinds("def| fü|(|x|):|  |# if|\n| 12|.5", True) == \
        "keyword name punctuation name punctuation space text space number number end"
    assert kinds(" '|not|'|\n|\"\"\"|is\n|\"\"\"|is", True) == \
        "text text text space text text text keyword end"
    assert kinds("It|'s| a| dog|'|s", False) == "word punctuation word word punctuation word end"


def test_the_map_shows_what_ran_what_went_around_and_what_was_copied():
    """A map that is off by a block or a token, and a pretty picture all the same."""
    score = np.full((1, 3, 3), np.nan)
    score[..., 1] = 0.5                                         # block 2 is routed
    depth = {"ids": np.array([[0, 1, 2]]), "targets": np.array([[1, 2, 3]]), "score": score,
             "visited": np.array([[[1, 0, 1], [1, 0, 0], [1, 1, 0]]], dtype=bool)}
    depth |= {"exit_at": np.array([[3, 1, 2]]), "rule": np.array("a rule"), "routed": [False, True, False]}
    fig = plot.draw_map(depth, LETTERS, plot.Options())
    ax = fig.axes[0]
    ran, around, copied = 2, 1, 0
    assert ax.collections[0].get_array().reshape(3, 3).T.tolist() == [
        [ran, around, ran], [ran, copied, copied], [ran, ran, copied]]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "2 routed", "3"]


def test_figures_when_nobody_reaches_a_routed_block():
    """The smallest score of no scores at all."""
    score = np.full((1, 3, 3), np.nan)
    score[..., 1] = 0.5
    fig = plot.draw_router({"exit_at": np.ones((1, 3)), "visited": np.zeros((1, 3, 3), bool), "score": score,
                            "targets": np.zeros((1, 3)), "routed": [False, True, False]})
    assert "nobody came" in fig.axes[0].get_title(loc="left")


def test_split_characters_are_put_together():
    """Half a character printed as a question mark twice."""
    ranks = {bytes([i]): i for i in range(256)}
    bytes_only = tiktoken.Encoding("b", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    ids = bytes_only.encode("aé→z")
    assert "".join(sample.pieces(bytes_only, ids)) == "aé→z"
    assert "".join(sample.pieces(bytes_only, ids[:-2])) == "aé\ufffd"
    assert "".join(sample.pieces(bytes_only, bytes_only.encode("→a→")[:-2])) == "→a\ufffd"


def test_bad_samples(finished, capsys, tmp_path):
    """Prompt empty or too long, rule without classifiers, thresholds of the wrong number, unknown run."""
    def no(*words):
        return refused(capsys, sample.main, "--run", finished, *words)
    before = (finished / "sample.txt").read_bytes()
    assert "prompt is empty" in no("--prompt", "")
    assert "reads at most 32" in no("--prompt", "x = 1\n" * 40)
    assert "one threshold or 3" in no("--tau", "0.5", "0.5")
    assert "block from 1 to 4" in no("--exit", "9") and "block from 1 to 4" in no("--rule", "fixed:1.5")
    assert "would do nothing" in no("--rule", "full", "--tau", "0.5")
    assert "there are full, fixed:N" in no("--rule", "sometimes")
    assert "not a number" in no("--rule", "fixed:x") and "takes no number" in no("--rule", "random:3")
    assert "no predictor of exits" in no("--rule", "learned")
    assert "--causal router was not trained: in this run predictor learned" in no("--causal", "router")
    assert "at least" in no("--tokens", "0") and "at least" in no("--temperature", "-1")
    assert "at least" in no("--seed", "-1") and "at least" in no("--temperature", "nan")
    assert "Perhaps you meant" in no("--temprature", "1")
    assert "early exit of this run: 1, 2, 3" in no("--speculate", "4")
    assert "at least one token" in no("--speculate", "2", "--ahead", "0")
    assert "--exit would do nothing: --speculate" in no("--speculate", "2", "--exit", "3")
    assert "--ahead would do nothing" in no("--ahead", "2")
    assert "has 001 to 001" in refused(capsys, sample.main, "--out", finished.parent, "--run", "7")
    assert run.find(finished, finished.parent) == run.find("1", finished.parent) == finished    # a Path too
    assert "has none yet" in refused(capsys, sample.main, "--out", tmp_path / "nothing", "--run", "last")
    assert (finished / "sample.txt").read_bytes() == before


def test_a_run_without_exits_samples_at_full_depth_and_refuses_rules(train, capsys, monkeypatch):
    monkeypatch.setattr(script, "finish", lambda *a: None)
    folder = train("--exits", "last", "--routed", "none", "--tau", run.Options().tau)
    sample.main(["--run", str(folder), "--tokens", "4"])
    assert "full: 4 tokens, exit after block 4.00" in capsys.readouterr().out
    said = refused(capsys, sample.main, "--run", folder, "--tau", "0.5")
    assert "classifier after its last block only" in said


def test_plot_before_the_end_draws_the_loss_alone(train, capsys, monkeypatch):
    """A figure script that needs a finished run."""
    monkeypatch.setattr(script, "finish", lambda *a: None)
    folder = train("--stop_at", 4)
    plot.main(["--run", str(folder)])
    assert [p.name for p in (folder / "figures").iterdir()] == ["loss.png"]
    assert "no depth.npz" in capsys.readouterr().out


def test_bad_figures(finished, capsys, tmp_path):
    assert "--window must be" in refused(capsys, plot.main, "--run", finished, "--window", "99")
    old = shutil.copytree(finished, tmp_path / "old")
    depth = dict(np.load(old / "depth.npz"))
    np.savez(old / "depth.npz", **{k: v for k, v in depth.items() if k != "entropy"})
    assert "older version" in refused(capsys, plot.main, "--run", old)


def refuse_training(capsys, tmp_path, dataset, *words):
    said = refused(capsys, script.main, "--data", dataset, "--out", tmp_path / "runs", *TINY, *words)
    assert not (tmp_path / "runs").exists()
    return said


def test_bad_data(dataset, capsys, tmp_path):
    """Missing, empty, odd-sized, too short data or a token outside the vocabulary: nothing is written."""
    def no(folder, *words):
        return refuse_training(capsys, tmp_path, folder, *words)
    assert "prepare" in no(tmp_path / "nowhere")
    assert "prepare.py" in no("text")
    assert "smaller --block_size" in no(dataset, "--block_size", "100000")
    for name, change in {"empty": b"", "odd": (dataset / "train.bin").read_bytes() + b"x",
                         "outside": b"\xff\xff" * ((dataset / "train.bin").stat().st_size // 2)}.items():
        folder = shutil.copytree(dataset, tmp_path / name)
        (folder / "train.bin").write_bytes(change)
        assert "train.bin" in no(folder)


def test_bad_options(dataset, capsys, tmp_path):
    """A typo or a wrong type that is silently a new variable; an option that does nothing."""
    def no(*words):
        return refuse_training(capsys, tmp_path, dataset, *words)
    assert "--lr" in no("--lrate", "1") and "Perhaps you meant" in no("--n_layers", "3")
    assert "could not convert" in no("--lr", "fast")
    assert "invalid choice" in no("--gate", "soft")
    assert "--capacity" in no("--capacity", "1.5") and "--capacity" in no("--capacity", "0")
    assert "would do nothing" in no("--routed", "none", "--capacity", "0.5")
    assert "would do nothing" in no("--exits", "last", "--exit_weights", "n")
    assert "would do nothing" in no("--causal", "router", "--predictor_width", "1")
    assert "cannot train routed blocks" in no("--objective", "mixed")
    assert "needs classifiers" in no("--exits", "last", "--tau", run.Options().tau, "--halting", "token")
    assert "a GPT has none" in no("--halting", "sequence")
    assert "needs --halting" in no("--objective", "halting") and "--init" in no(
        "--objective", "halting", "--halting", "token")
    assert "no run" in no("--init", "nowhere") and "no other to route" in no("--share_blocks", "True")
    assert "draws one" in no("--objective", "mixed", "--routed", "none", "--halting", "binary")
    for words in (["--sigma", 1], ["--alpha", 2], ["--exit_cost", 1], ["--oracle", "likelihood"],
                  ["--paths", 2]):
        assert "would do nothing" in no(*words)
    for words in (["--sigma", -1], ["--exit_cost", -0.1], ["--gradient_scale", -1], ["--alpha", "nan"]):
        assert "must be from" in no(*words)
    assert "would do nothing" in no("--halting", "token", "--share_halting", "True")
    assert "not in 0..3" in no("--routed", "1,7") and "--routed" in no("--routed", "sometimes")
    assert "even multiple of" in no("--n_head", "3") and "must be from 1" in no("--steps", "-4")
    for option, value in {"seed": -1, "beta1": 1, "lr": "nan", "lr_end": -5, "weight_decay": -1, "tau": 2,
                          "imitation": "nan", "block_size": 1, "stop_at": -1, "dropout": 1}.items():
        assert f"--{option}" in no(f"--{option}", value)
    assert "equal pieces" in no("--accumulate", "3")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "Not a directory" in refused(capsys, script.main, "--data", dataset, *TINY, "--out",
                                        tmp_path / "file" / "x")


def test_bad_presets(capsys, tmp_path, monkeypatch):
    """A typo in a file is found by the same checker as one on the command line, and the file is named."""
    assert "unknown preset 'huge'; there are:" in refused(capsys, script.main, "huge")
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "configs").mkdir()
    for text, expected in {"n_layers = 3": "Perhaps you meant", "lr = 'fast'": "could not convert",
                           "steps = 1.5": "invalid", "capacity = 2": "--capacity",
                           "x = = 1": "not valid TOML", "[model]\nn_layer = 3": "model"}.items():
        (tmp_path / "configs" / "mine.toml").write_text(text, "utf-8")
        said = refused(capsys, script.main, "mine")
        assert expected in said and ("mine.toml" in said or "--capacity" in said)


def test_every_preset_is_accepted_and_the_command_line_wins():
    names = [p.stem for p in (run.HERE / "configs").glob("*.toml")]
    assert names
    for name in names:
        assert run.read_options([name, "--steps", "7"]).steps == 7
        assert run.read_options([name]) != run.Options()


def test_bad_resumes(train, capsys, monkeypatch):
    """A resumed run whose schedule or shape is not the one it began with."""
    monkeypatch.setattr(script, "finish", lambda *a: None)
    folder = train("--stop_at", 2)
    before = (folder / "ckpt.pt").read_bytes()
    assert "--lr cannot be changed" in refused(capsys, script.main, "--resume", folder, "--lr", "1")
    assert "no run" in refused(capsys, script.main, "--resume", folder / "nowhere")
    (folder / "ckpt.pt").unlink()
    assert "no ckpt.pt" in refused(capsys, script.main, "--resume", folder)
    (folder / "ckpt.pt").write_bytes(before)
    (folder / "options.json").write_text("{", "utf-8")
    assert "cannot read" in refused(capsys, script.main, "--resume", folder)
    (folder / "options.json").write_text('{"options": {"zzz": 3}}', "utf-8")
    assert "options.json" in refused(capsys, script.main, "--resume", folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(dataset, capsys, tmp_path):
    assert "no cuda" in refuse_training(capsys, tmp_path, dataset, "--device", "cuda")


def test_compile_that_cannot_work_is_one_line_and_eager(train, capsys, monkeypatch):
    """A training that dies because there is no compiler."""
    monkeypatch.setattr(script, "finish", lambda *a: None)
    monkeypatch.setattr(torch, "compile", lambda f: (_ for _ in ()).throw(RuntimeError("no compiler")))
    folder = train("--compile", "True", "--stop_at", 1)
    assert capsys.readouterr().err.count("going on without it") == 1
    assert json.loads((folder / "options.json").read_text("utf-8"))["options"]["compile"] is True


def test_every_token_of_the_windows_has_its_own_kind(finished, dataset):
    """Labels of another window, or shifted by a token: a name is a name wherever its window begins."""
    from data.common import load_tokenizer
    encoding, depth = load_tokenizer(finished / "tokenizer.json"), np.load(finished / "depth.npz")
    assert depth["kind"].shape == depth["ids"].shape
    for token, kind in zip(depth["ids"].flat, depth["kind"].flat, strict=True):
        text = encoding.decode([token]).strip()
        assert (kind == "end") == (token == encoding.eot_token)
        assert kind != "space" or not text
        if text.isdigit():
            assert kind in ("number", "word")
        if text in ("+", "*", "(", ")", ":", ","):
            assert kind == "punctuation"
