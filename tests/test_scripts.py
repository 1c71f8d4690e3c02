"""The scripts as a user runs them; bad input gives exit code 2, no traceback, and overwrites nothing."""
import io
import os
import re
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


def refused(capsys, main, *words):
    """Run main(words), which must end with exit code 2 and one line, or a box of tyro's -> stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(r"(^|\n)error: .*\n$|(-|─){9}", said)
    return " ".join(said.replace("│", " ").split())


def test_the_default_run_ends_with_a_sample_and_figures(finished):
    """Scripts that are missing, or fail without a complaint; a run without a name; kinds of other tokens."""
    assert [run.find(name, finished.parent) for name in (finished, "1", "last")] == [finished] * 3
    files = {p.name for p in finished.rglob("*") if p.is_file()}
    assert files == set("options.json tokenizer.json meta.json metrics.jsonl ckpt.pt lock depth.npz "
                        "sample.txt sample.json evaluation.json map.png depth.png router.png loss.png "
                        "text.png frontier.png when.png lens.png".split())
    for picture in finished.glob("figures/*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    depth = np.load(finished / "depth.npz")
    assert depth["ids"].shape == depth["exit_at"].shape == depth["loss"].shape == depth["visited"].shape[:2]
    assert np.isnan(depth["weight"][..., 0]).all() and np.isfinite(depth["weight"][..., 1]).all()
    assert set(np.unique(depth["exit_at"])) <= {1, 2, 3, 4} and len(np.unique(depth["exit_at"])) > 1
    encoding = load_tokenizer(finished / "tokenizer.json")
    for token, kind in zip(depth["ids"].flat, depth["kind"].flat, strict=True):
        text = encoding.decode([token]).strip()
        assert (kind == "end") == (token == encoding.eot_token) and (kind != "space" or not text)
        assert kind == "punctuation" or text not in ("+", "*", "(", ")", ":", ",")


def test_the_end_of_a_run_says_what_comes_next(folder, capsys, monkeypatch):
    """A finished run that is not measured, sampled or drawn, or does not say where it is."""
    started = []
    monkeypatch.setattr(script.subprocess, "run", lambda words, **_: started.append(words[1].name))
    finish(folder, options.Options())
    assert f"python sample.py --run {folder}" in capsys.readouterr().out
    assert started == ["evaluate.py", "sample.py", "plot.py"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_early_is_no_error(folder, unbuffered):
    """A broken pipe as a traceback: python sample.py | head -1, at the last flush or in the middle."""
    words = [sys.executable, ROOT / "sample.py", "--run", folder, "--max_new_tokens", "9"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_sample_is_repeatable_and_keeps_what_it_did(folder, monkeypatch):
    """Another text for the same seed; tokens that do not belong to the text; "-" taken for a prompt."""
    words, texts = "--max_new_tokens 15 --samples 2 --prompt - --seed".split(), []
    for seed in "112":
        monkeypatch.setattr(sys, "stdin", io.StringIO("def f3_1"))
        sample.main(["--run", str(folder), *words, seed])
        texts.append((folder / "sample.txt").read_text("utf-8"))
    assert texts[0] == texts[1] != texts[2] and all(t.startswith("def f3_1") for t in texts)
    kept = run.read_json(folder / "sample.json")
    assert texts[2] == f"\n{'-' * 60}\n".join("".join(s for s, *_ in text) for text in kept["texts"]) + "\n"
    assert kept["n_layer"] == 4 and all(exit_at >= blocks for text in kept["texts"]
                                        for _, exit_at, blocks in text if blocks is not None)


@pytest.mark.parametrize("rule, depth", [("fixed:3", 3), ("confidence:0", 1), ("confidence:1,0,1", 2)])
def test_rules_by_name(folder, capsys, rule, depth):
    """An option that is read and then not used."""
    sample.main(["--run", str(folder), "--max_new_tokens", "8", "--rule", rule])
    assert f", {rule}: 8 tokens, exit after block {depth}.00 of 4" in capsys.readouterr().out


def test_a_token_has_the_colour_of_the_step_that_wrote_it():
    """Depths shifted by one; line ends painted to the right margin; half a character printed twice."""
    ranks = {b"a": 0, b" \xe2\x86": 1, b"\x92\n": 2, b"\n\n": 3, b"b\xc3": 4}
    encoding = tiktoken.Encoding("letters", pat_str="a", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 5})
    visited = np.arange(3) < np.array([3, 1, 2, 3, 3])[:, None]
    row = Generated([0, 0, 1, 2, 3, 4], 2, visited.sum(1), visited, *[None] * 3)
    tokens, shade = sample.tokens_of(row, encoding, ""), "\033[30;48;5;{}m".format
    assert sample.paint(tokens, 3) == \
        f"aa{shade(153)} \033[0m{shade(193)}→\033[0m\n\n\n{shade(203)}b\ufffd\033[0m"
    assert [tuple(counted) for _, *counted in tokens] == [(None, None)] * 2 + [(1, 1), (2, 2), (3, 3), (3, 3)]


def test_kinds_of_tokens():
    """A space that hides what follows; a letter of several bytes taken for punctuation."""
    kinds = {b"word": "word", b" \xc3\xbc": "word", b"_x": "word", b"\n 12": "number", b"):": "punctuation",
             b"a.": "word", b"\n\n": "space"}
    encoding = tiktoken.Encoding("pieces", pat_str="x", special_tokens={"<|endoftext|>": len(kinds)},
                                 mergeable_ranks={piece: i for i, piece in enumerate(kinds)})
    assert evaluate.kinds_of(encoding).tolist() == [*kinds.values(), "end"]


TRAINING = {
    "Perhaps you meant": "--n_layers 3", "invalid choice": "--gate soft", "could not convert": "--lr fast",
    "would do nothing": "--routed none --capacity 0.5; --routed none --route causal; --paths 2; --sigma 1; "
        "--router random --predictor_width 1; --causal_logit router --predictor_width 1; --alpha 2; "
        "--exits last --rule confidence:0.1; --objective mixed --routed none --gradient_scale 1; "
        "--objective exit_predictor --exit_predictor token --label_smoothing 0.1",
    "must be from": "--sigma -1; --alpha nan; --steps -4; --capacity 0; --capacity 1.5; --beta2 1; --lr nan; "
        "--lr_end -5; --weight_decay -1; --block_size 1; --predictor_loss nan; --stop_at -1; --dropout 1",
    "would teach the causal predictor": "--route causal",
    "needs --routed none": "--objective mixed", "a GPT has none": "--exit_predictor sequence",
    "trains no predictor": "--objective mixed --routed none --exit_predictor binary",
    "no run": "--init_from nowhere",
    "takes --exits all": "--exits last --rule auto --exit_predictor token", "equal": "--grad_accum_steps 3",
    "needs an --exit_predictor": "--objective exit_predictor", "--rule confidence:2": "--rule confidence:2",
    "--init_from": "--objective exit_predictor --exit_predictor token", "prepare.py": "--data nowhere",
    "from 0 to 3": "--routed 1,7", "--routed": "--routed sometimes", "even multiple of": "--n_head 3",
    "smaller --block_size": "--block_size 100000", "Not a directory": f"--out {__file__}/x",
    **({} if torch.cuda.is_available() else {"no cuda": "--device cuda"})}
SAMPLING = {
    "an empty prompt": "--prompt=", "the context is 32": "--prompt=" + "x=1," * 40,
    "one threshold or 3": "--rule confidence:0.5,0.5", "no exit predictor": "--rule learned",
    "block from 1 to 4": "--rule fixed:9; --rule fixed:1.5", "could not convert": "--rule fixed:x",
    "from 0 to 1": "--rule confidence:nan; --rule confidence:-3", "other numbers": "--rule random:3",
    "rules are full, fixed,": "--rule sometimes",
    "must be from": "--max_new_tokens 0; --seed -1; --temperature -1; --temperature nan; --samples 5000; "
        "--top_k -1; --seed 99999999999999999999", "cannot read the prompt": "--prompt=\udce9",
    "has 1 to 1": "--run 7; --run ²", "has none yet": "--out nothing --run last", "--beam would": "--beam 2"}


@pytest.mark.parametrize("main, words, said", [
    (main, words, said) for main, table in ((script.main, TRAINING), (sample.main, SAMPLING))
    for said, lines in table.items() for words in lines.split(";")])
def test_bad_options(finished, dataset, capsys, tmp_path, main, words, said):
    """A traceback, a typo that passes, an option that does nothing; a run or a sample of bad input."""
    before, words = (finished / "sample.txt").read_bytes(), words.split()
    training = "--data", dataset, "--out", tmp_path / "runs", *TINY
    first = training if main is script.main else ("--run", "1", "--out", finished.parent)
    message = refused(capsys, main, *first, *words)
    assert said in message and (said not in ("would do nothing", "must be from") or words[-2] in message)
    assert not (tmp_path / "runs").exists() and (finished / "sample.txt").read_bytes() == before


def test_a_run_without_exits_samples_at_full_depth_and_refuses_rules(train, capsys):
    """A threshold that is accepted where no token can exit."""
    folder = train("--exits", "last", "--routed", "none", "--rule", "auto")
    sample.main(["--run", str(folder), "--max_new_tokens", "4"])
    assert "full: 4 tokens, exit after block 4.00" in capsys.readouterr().out
    assert "its last block only" in refused(capsys, sample.main, "--run", folder, "--rule", "confidence:0.5")


def test_presets(capsys, tmp_path, monkeypatch):
    """An option of an earlier version; a typo that another checker lets pass; a message without the file."""
    for path in options.CONFIGS.glob("*.toml"):     # the command line wins
        assert options.read_options([path.stem, "--steps", "7"], None).steps == 7
        assert options.read_options([path.stem], None) != options.Options()
    assert "unknown preset 'huge'; there are: dense, gpu" in refused(capsys, script.main, "huge")
    monkeypatch.setattr(options, "CONFIGS", tmp_path)
    for text in "n_layers = 3", "steps = 1.5", "lr = 'fast'", "x = = 1", "[model]\nn_layer = 3":
        (tmp_path / "mine.toml").write_text(text, "utf-8")
        assert "mine.toml" in refused(capsys, script.main, "mine")


def test_resumed_runs_go_on_as_they_began(train, capsys):
    """Another device or schedule than at the beginning; a run whose metrics are cut and then refused."""
    folder = train("--stop_at", 2)
    resumed = options.read_options(["--resume", str(folder)], run.stored_options)
    assert resumed.device == "cpu" and resumed.stop_at == 0 and resumed.steps == 8
    pytest.raises(ValueError, run.start_metrics, folder, 1)         # another process has reached step 2
    assert "--lr cannot be changed" in refused(capsys, script.main, "--resume", folder, "--lr", "1")
    before = (folder / "metrics.jsonl").read_bytes()
    assert "is at step 2" in refused(capsys, script.main, "--resume", folder, "--stop_at", 1)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_compile_that_cannot_work_is_eager(train, monkeypatch):
    """A training that dies because there is no compiler."""
    monkeypatch.setenv("CXX", "/nowhere")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere",))
    folder = train("--compile", "True", "--stop_at", 1)
    assert run.read_json(folder / "options.json", "options")["compile"] is True
    assert torch._functorch.config.backward_pass_autocast == "off"      # fp32 routers keep fp32 gradients
    torch._dynamo.reset()
