"""The scripts as a user runs them; bad input gives exit code 2, no traceback, and overwrites nothing."""
import io
import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import torch
from conftest import ROOT, TINY

import evaluate
import options
import run
import sample
import train as script
from data.common import load_tokenizer
from decode import Generated

finish = script.finish


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Training ends without starting evaluate.py, sample.py and plot.py; `finished` was made with them."""
    monkeypatch.setattr(script, "finish", lambda *a: None)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "copy")


def refused(capsys, main, *words):
    """Run main(words), which must end with exit code 2 -> what it printed on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    return " ".join(said.replace("│", " ").split())


def test_the_default_run_ends_with_a_sample_and_figures(finished):
    """`finish` calling scripts that are missing, or that fail without a complaint; a run that has no name."""
    assert [run.find(name, finished.parent) for name in (finished, "1", "last")] == [finished] * 3
    files = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    assert files == {"options.json", "tokenizer.json", "meta.json", "metrics.jsonl", "ckpt.pt", "depth.npz",
                     "sample.txt", "sample.npz", "evaluation.json", "figures/map.png", "figures/depth.png",
                     "figures/router.png", "figures/loss.png", "figures/text.png",
                     "figures/frontier.png", "figures/when.png"}
    for picture in finished.glob("figures/*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    depth = np.load(finished / "depth.npz")
    W, T, L = depth["visited"].shape
    assert depth["ids"].shape == depth["exit_at"].shape == depth["loss"].shape == (W, T) and L == 4
    assert np.isnan(depth["weight"][..., 0]).all() and np.isfinite(depth["weight"][..., 1]).all()
    assert ((depth["exit_at"] >= 1) & (depth["exit_at"] <= L)).all() and len(np.unique(depth["exit_at"])) > 1


@pytest.mark.parametrize("average, translate", [(1, ""), (3, "aa-bb")])
def test_the_end_of_a_run_says_what_comes_next(folder, capsys, monkeypatch, average, translate):
    """A prompt of other data, final weights that are silently others than those of the last line."""
    started = []
    monkeypatch.setattr(script.subprocess, "run", lambda words, **_: started.append(words[1].name))
    meta = run.read_json(folder / "meta.json")
    prompt = {"aa": "an otter", "bb": "uno"} if translate else meta["prompt"]
    run.write_atomically(folder / "meta.json", json.dumps(meta | {"prompt": prompt}))
    finish(folder, options.Options(average=average, translate=translate))
    said = capsys.readouterr().out
    following = next(line for line in said.splitlines() if line.startswith("Next:"))
    assert shlex.split(following)[-2:] == ["--prompt", "an otter" if translate else meta["prompt"]]
    assert ("mean of the last 3 checkpoints" in said) == (average == 3)
    assert started == ["evaluate.py", "sample.py", "plot.py"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_early_is_no_error(folder, unbuffered):
    """A broken pipe as a traceback: python sample.py | head -1, at the last flush or in the middle."""
    words = [sys.executable, ROOT / "sample.py", "--run", folder, "--max_new_tokens", "9", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered}
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_sample_is_repeatable_and_keeps_what_it_did(folder, capsys, monkeypatch):
    """Another text for the same seed; arrays that do not belong to the text; "-" taken for a prompt."""
    words = ["--run", str(folder), "--max_new_tokens", "15", "--samples", "2", "--prompt", "-"]
    texts = []
    for seed in "112":
        monkeypatch.setattr(sys, "stdin", io.StringIO("def f3_1"))
        sample.main([*words, "--seed", seed])
        texts.append((folder / "sample.txt").read_text("utf-8"))
    assert texts[0] == texts[1] != texts[2] and all(t.startswith("def f3_1") for t in texts)
    arrays = np.load(folder / "sample.npz")
    assert arrays["visited"].shape == (len(arrays["ids"]), 4) and set(arrays["row"]) == {0, 1}
    out = capsys.readouterr().out
    assert out.startswith("def f3_1") and "\033[" not in out     # not a terminal: plain


@pytest.mark.parametrize("rule, depth", [
    ("full", 4), ("fixed:3", 3), ("confidence:0", 1), ("confidence:1,0,1", 2), ("random", None)])
def test_rules_by_name(folder, capsys, rule, depth):
    """An option that is read and then not used."""
    sample.main(["--run", str(folder), "--max_new_tokens", "8", "--rule", rule])
    exit_after = f"exit after block {depth}.00 of 4" if depth else "exit after"
    assert f", {rule}: 8 tokens, {exit_after}" in capsys.readouterr().out


def test_drafts_write_what_full_depth_writes(folder, capsys):
    """An option that changes the text, or does nothing."""
    texts = []
    for words in (["--rule", "full"], ["--speculate", "1"], ["--speculate", "3", "--draft_tokens", "2"]):
        sample.main(["--run", str(folder), "--max_new_tokens", "8", "--temperature", "0", *words])
        said = capsys.readouterr().out
        texts.append(np.load(folder / "sample.npz")["written"].tolist())
        assert ("accepted" in said) == (words[0] == "--speculate") and "full: 8 tokens, exit after" in said
    assert texts[0] == texts[1] == texts[2]
    sample.main(["--run", str(folder), "--max_new_tokens", "6", "--samples", "2", "--speculate", "2"])
    assert len(set(np.load(folder / "sample.npz")["row"])) == 2


def test_colours_follow_the_depth(folder, capsys):
    """A colour that means nothing; text changed by painting it; line ends painted to the right margin."""
    words = ["--max_new_tokens", "12", "--rule", "fixed:1", "--color", "always", "--seed", "4"]
    sample.main(["--run", str(folder), *words])
    out = capsys.readouterr().out
    assert "\033[30;48;5;153m" in out and "blocks run to write a token" in out
    painted = sample.paint(["a", " b\n", "\n\n", "  c"], [None, 1, 2, 4], 4)
    assert painted == "a\033[30;48;5;153m b\033[0m\n\n\n\033[30;48;5;203m  c\033[0m"


def test_a_token_has_the_colour_of_the_step_that_wrote_it(capsys):
    """Depths shifted by one: the step that reads the last token of the prompt writes the first new one."""
    letters = tiktoken.Encoding("letters", pat_str=r"\w", special_tokens={"<|endoftext|>": 4},
                                mergeable_ranks={bytes([97 + i]): i for i in range(4)})
    visited = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=bool)
    sample.show([Generated([0, 1, 2, 3], 2, np.array([3, 1, 2]), visited)], None, letters, 3, "t", color=True)
    said = capsys.readouterr().out
    assert said.startswith(sample.paint("abcd", [None, None, 1, 2], 3) + "\n")
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


def test_split_characters_are_put_together():
    """Half a character printed as a question mark twice."""
    ranks = {bytes([i]): i for i in range(256)}
    bytes_only = tiktoken.Encoding("b", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    ids = bytes_only.encode("aé→z")
    assert "".join(sample.pieces(bytes_only, ids)) == "aé→z"
    assert "".join(sample.pieces(bytes_only, ids[:-2])) == "aé\ufffd"
    assert "".join(sample.pieces(bytes_only, bytes_only.encode("→a→")[:-2])) == "→a\ufffd"


def cases(table):
    """{message: "words; words; ..."} -> (words, message) pairs."""
    return [(words.split(), said) for said, lines in table.items() for words in lines.split(";")]


@pytest.mark.parametrize("words, said", cases({
    "prompt is empty": "--prompt=", "reads at most 32": "--prompt=" + "x=1," * 40,
    "one threshold or 3": "--rule confidence:0.5,0.5", "no predictor of exits": "--rule learned",
    "block from 1 to 4": "--rule fixed:9; --rule fixed:1.5", "could not convert": "--rule fixed:x",
    "fixed does not take 0 numbers": "--rule fixed", "random does not take 1 numbers": "--rule random:3",
    "rules are full, fixed,": "--rule sometimes", "has 001 to 001": "--run 7",
    "has none yet": "--out nothing --run last",
    "at least": "--max_new_tokens 0; --seed -1; --temperature -1; --temperature nan",
    "Perhaps you meant": "--temprature 1",
    "early exit of this run: 1, 2, 3": "--speculate 4",
    "at least one token": "--speculate 2 --draft_tokens 0",
    "--rule would do nothing: --speculate": "--speculate 2 --rule fixed:3",
    "--draft_tokens would do nothing": "--draft_tokens 2",
    "--beam would do nothing: this run is a GPT": "--beam 2",
}))
def test_bad_samples(finished, capsys, words, said):
    """A traceback, an option without effect that is accepted, or the last sample lost to bad input."""
    before = (finished / "sample.txt").read_bytes()
    assert said in refused(capsys, sample.main, "--run", "1", "--out", finished.parent, *words)
    assert (finished / "sample.txt").read_bytes() == before


def test_a_run_without_exits_samples_at_full_depth_and_refuses_rules(train, capsys):
    """A threshold that is accepted where no token can exit."""
    folder = train("--exits", "last", "--routed", "none", "--rule", "auto")
    sample.main(["--run", str(folder), "--max_new_tokens", "4"])
    assert "full: 4 tokens, exit after block 4.00" in capsys.readouterr().out
    said = refused(capsys, sample.main, "--run", folder, "--rule", "confidence:0.5")
    assert "classifier after its last block only" in said


@pytest.mark.parametrize("main, names", [
    (script.main, "batch=batch-size clip=grad-clip init=init-from balance=balance-loss causal=causal-logit "
                  "beta1=beta2 tau accumulate n_inner halting imitation share_halting"),
    (sample.main, "tokens=max-new-tokens penalty=length-penalty tau exit causal ahead missing"),
    (evaluate.main, "batch=batch-size tau exit causal missing")])
def test_earlier_names_of_options_are_refused(capsys, main, names):
    """An option of an earlier version that is silently ignored; a similar name that is not suggested."""
    for name, _, suggested in (name.partition("=") for name in names.split()):
        said = refused(capsys, main, f"--{name}", "1")
        assert f"Unrecognized options: --{name}, 1" in said and f"--{suggested or 'help'}" in said


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
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "Not a directory" in no(dataset, "--out", tmp_path / "file" / "x")
    for name, change in {"empty": b"", "odd": (dataset / "train.bin").read_bytes() + b"x",
                         "outside": b"\xff\xff" * ((dataset / "train.bin").stat().st_size // 2)}.items():
        folder = shutil.copytree(dataset, tmp_path / name)
        (folder / "train.bin").write_bytes(change)
        assert "train.bin" in no(folder)


OPTIONS = {
    "Perhaps you meant": "--n_layers 3", "Unrecognized options: --lrate": "--lrate 1",
    "invalid choice": "--gate soft; --objective halting", "could not convert": "--lr fast",
    "would do nothing": "--routed none --capacity 0.5; --routed none --route causal; --paths 2; --sigma 1; "
        "--routed none --predictor_loss 1; --router random --predictor_width 1; --oracle likelihood; "
        "--causal_logit router --predictor_width 1; --exits last --rule confidence:0.1; --alpha 2; "
        "--exits last --rule auto --exit_weights n; --exits last --rule auto --gradient_scale 1; "
        "--objective mixed --routed none --gradient_scale 1; --exit_cost 1; "
        "--objective exit_predictor --exit_predictor token --label_smoothing 0.1",
    "must be from": "--sigma -1; --exit_cost -0.1; --gradient_scale -1; --alpha nan; --steps -4; "
        "--capacity 0; --capacity 1.5; --seed -1; --beta2 1; --lr nan; --lr_end -5; --weight_decay -1; "
        "--block_size 1; --predictor_loss nan; --stop_at -1; --dropout 1",
    "--route causal would teach the predictor its own decisions": "--route causal",
    "cannot train routed blocks": "--objective mixed", "a GPT has none": "--exit_predictor sequence",
    "draws one": "--objective mixed --routed none --exit_predictor binary",
    "needs classifiers": "--exits last --rule auto --exit_predictor token",
    "needs --exit_predictor": "--objective exit_predictor", "--rule confidence:2": "--rule confidence:2",
    "--init_from": "--objective exit_predictor --exit_predictor token", "no run": "--init_from nowhere",
    "equal pieces": "--grad_accum_steps 3",
    "not in 0..3": "--routed 1,7", "--routed": "--routed sometimes", "even multiple of": "--n_head 3",
}


@pytest.mark.parametrize("words, said", cases(OPTIONS | ({} if torch.cuda.is_available() else {
    "no cuda": "--device cuda"})))
def test_bad_options(dataset, capsys, tmp_path, words, said):
    """A typo or a wrong type that is silently a new variable; an option that does nothing."""
    message = refuse_training(capsys, tmp_path, dataset, *words)
    assert said in message and (words[-2] in message or said not in ("would do nothing", "must be from"))


def test_presets(capsys, tmp_path, monkeypatch):
    """A preset with an option of an earlier version; a typo in a file that another checker lets pass, or a
    message that does not name the file."""
    names = [p.stem for p in options.CONFIGS.glob("*.toml")]
    assert len(names) >= 5
    for name in names:      # the command line wins
        assert options.read_options([name, "--steps", "7"], None).steps == 7
        assert options.read_options([name], None) != options.Options()
    assert "unknown preset 'huge'; there are:" in refused(capsys, script.main, "huge")
    monkeypatch.setattr(options, "CONFIGS", tmp_path)
    for text, expected in {"n_layers = 3": "Perhaps you meant", "lr = 'fast'": "could not convert",
                           "steps = 1.5": "invalid", "capacity = 2": "--capacity",
                           "x = = 1": "not valid TOML", "[model]\nn_layer = 3": "model"}.items():
        (tmp_path / "mine.toml").write_text(text, "utf-8")
        said = refused(capsys, script.main, "mine")
        assert expected in said and ("mine.toml" in said or "--capacity" in said)


def test_resumed_runs_go_on_as_they_began(train, capsys):
    """Another device, schedule or shape than the one it began with; a wall of state_dict keys."""
    folder = train("--stop_at", 2)
    resumed = options.read_options(["--resume", str(folder)], run.stored_options)
    assert resumed.device == "cpu" and resumed.stop_at == 0 and resumed.steps == 8

    def no(*words):
        return refused(capsys, script.main, "--resume", *words)
    before, stored = (folder / "ckpt.pt").read_bytes(), (folder / "options.json").read_text("utf-8")
    assert "--lr cannot be changed" in no(folder, "--lr", "1")
    assert "is at step 2" in no(folder, "--stop_at", 1)
    assert "no run" in no(folder / "nowhere")
    (folder / "ckpt.pt").unlink()
    assert "no ckpt.pt" in no(folder)
    (folder / "ckpt.pt").write_bytes(before)
    for content, said in (("{", "cannot read"), ('{"options": {"zzz": 3}}', "options.json"),
                          (stored.replace('"n_embd": 16', '"n_embd": 32'), "does not fit")):
        (folder / "options.json").write_text(content, "utf-8")
        message = no(folder)
        assert said in message and len(message) < 700


def test_compile_that_cannot_work_is_one_line_and_eager(train, capsys, monkeypatch):
    """A training that dies because there is no compiler."""
    monkeypatch.setattr(torch, "compile", lambda f: (_ for _ in ()).throw(RuntimeError("no compiler")))
    folder = train("--compile", "True", "--stop_at", 1)
    assert capsys.readouterr().err.count("going on without it") == 1
    assert run.read_json(folder / "options.json", "options")["compile"] is True


def test_every_token_of_the_windows_has_its_own_kind(finished):
    """Labels of another window, or shifted by a token: a name is a name wherever its window begins."""
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
