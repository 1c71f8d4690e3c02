"""Translators from the command line: train, resume, evaluate, translate; bad input."""
import contextlib
import json
import shutil

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import TINY, finished_run, texts, tiny, with_other_words
from test_exits import agree
from test_scripts import no_figures, refused  # noqa: F401
from test_train import equal, val_lines, weights

import decode
import evaluate
import exits
import options
import run
import sample
import train as script
from data import parallel
from data.batches import Batch, batches_of, open_data
from model import position_ids

PAIRS = "--translate aa-bb --enc_layer 1 --enc_head 2 --enc_embd 16 --routed none"


def evaluation(folder, words):
    """evaluate.main on a run -> evaluation.json."""
    evaluate.main(["--run", str(folder), *words.split()])
    return json.loads((folder / "evaluation.json").read_text("utf-8"))


def trained(pairs, out, words):
    script.main([*TINY, *f"{PAIRS} --batch_tokens 128 --data {pairs} --out {out} {words}".split()])
    return max(out.iterdir())


def mflops(S, T, C=32):
    """The translator at full depth: a source of S tokens, projected once by each block, then T tokens."""
    tokens = sum(4 * (28 * C * C + 4 * (t + S) * C) + 2 * 300 * C for t in range(1, T + 1))
    return (4 * 4 * S * C * C + tokens) / 1e6


@pytest.fixture(scope="session")
def translator(pairs, tmp_path_factory):
    """A finished run that has learned the eight words (do not change it)."""
    words = ("--n_embd 32 --enc_embd 32 --steps 220 --lr 0.01 --warmup 20 --eval_every 110 --save_every 110 "
             "--batch_tokens 256 --rule confidence:0.5 --label_smoothing 0.05")
    return finished_run(pairs, tmp_path_factory.mktemp("translators"), f"{PAIRS} {words}")


@pytest.fixture
def copy(translator, tmp_path):
    return shutil.copytree(translator, tmp_path / "translator")


def test_a_translator_learns_to_translate(translator):
    """Everything runs and nothing is learned; a finished run without its figures; FLOPs of other lengths."""
    first, *_, last = (m["loss"]["top_k"][-1] for m in val_lines(translator))
    assert last < 0.6 < first and {"sample.txt", "map.png"} <= {p.name for p in translator.rglob("*")}
    _, o, *_ = run.open_run(translator, device="cpu")
    batches = batches_of(open_data(o.data, o.translate)[1], "val", o).fixed(o.eval_windows)
    depth, sources = np.load(translator / "depth.npz"), sum((batch.sources() for batch in batches), [])
    present = depth["present"]
    [full] = [r for r in run.read_json(translator / "evaluation.json", "forced") if r["rule"] == "full"]
    kinds, tenths = (sum(sum(t["exits"]) for t in full[k].values()) for k in ("kinds", "tenths"))
    assert not depth["visited"][~present].any() and not present.all()
    assert full["mflops_paper"] == pytest.approx(np.mean(list(map(mflops, sources, present.sum(1)))))
    assert len(present) == len(sources) == full["kinds"]["end"]["exits"][3] == kinds - tenths == 40  # </s>


def test_bleu_of_every_exit(copy, pairs, capsys):
    """Outputs in another order, exits all the same, a wrong signature, FLOPs of another hypothesis."""
    found = evaluation(copy, "--bleu test --beam 2 --batch_size 5")["translated"]["test"]
    assert [r["rule"] for r in found] == ["fixed:1", "fixed:2", "fixed:3", "full", "confidence:0.5"]
    assert [r["exit"] for r in found[:4]] == [1, 2, 3, 4] and 1 <= found[4]["exit"] < 4
    data, lengths = parallel.load_pairs(pairs), {}
    sources, references = (parallel.originals(data, "test", language) for language in ("aa", "bb"))
    for row in found:
        lines = (copy / "outputs" / row["file"]).read_text("utf-8").splitlines()
        assert row["bleu"] == pytest.approx(sacrebleu.corpus_bleu(lines, [references]).score)
        assert row["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a") and row["seconds"] > 0
        assert row["mflops_needed"] <= row["mflops_paper"]
        lengths[row["rule"]] = [[len(parallel.sentence_ids(data.encoding, text)) for text in texts]
                                for texts in (sources, lines)]
    assert found[3]["mflops_paper"] == pytest.approx(np.mean(list(map(mflops, *lengths["full"]))))
    assert found[3]["bleu"] > 60 and "| full |" in capsys.readouterr().out


def test_the_words_of_a_translation(copy, capsys):
    """Another sentence than the one asked for, or the end token printed."""
    sample.main(["--run", str(copy), "--prompt", "otter heron\nlizard badger\n"])
    assert capsys.readouterr().out.startswith("otter heron \nuno due\n---")
    assert "\nlizard badger \ncinque tre\n" in (copy / "sample.txt").read_text("utf-8")
    sample.main(["--run", str(copy), "--color", "always", "--rule", "fixed:2", "--beam", "1"])
    said = capsys.readouterr().out
    assert "\033[30;48;5;" in said and "</s>" in said and "exit after block 2.00 of 4" in said


def test_what_cannot_be_is_refused_before_writing(copy, finished, pairs, dataset, capsys, tmp_path):
    """Options or data of the other kind, another tokenizer, nan; a rule that fails after the others."""
    other = with_other_words(pairs, tmp_path / "other")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    new = f"{pairs} --translate aa-bb"
    cases = {
        (sample, f"--run {copy}"): {
            "--temperature 0.5": "is a translator", "--beam 0": "from 1",
            "--length_penalty nan": "_penalty",
            "--prompt |otter\n\nheron": "prompt: line 2 is empty"},
        (evaluate, f"--run {copy}"): {
            "--bleu test_2016": "there are val, test",
            "--batch_size 0": "from 1", "--search -1": "from 0", "--rules oracle:1.2.3": "at least 0",
            "--beam 3": "nothing is translated", "--bleu test --length_penalty inf": "--length_penalty",
            "--rules full fixed:9": "from 1 to 4", "--rules full oracle:nan": "at least 0",
            f"--data {other}": "tokenizer.json differs"},
        (evaluate, f"--run {finished}"): {
            "--exited_kv compute": "without routed blocks", "--bleu test": "this run is a GPT",
            f"--data {pairs}": "say what to --translate, aa-bb"},
        (script, f"--steps 1 --out {tmp_path}/runs --data"): {
            f"{dataset} --translate aa-bb": "nothing to", f"{dataset} --enc_layer 3": "a GPT has no source",
            f"{pairs} --translate en-de": "use aa-bb or bb-aa", f"{pairs}": "say what to --translate",
            f"{new} --batch_size 8": "have --batch_tokens", f"{new} --block_size 2": "at most 2 tokens",
            f"{new} --enc_embd 64": "separate", f"{dataset} --gate one": "no gradient",
            f"{dataset} --noops 2": "there are no experts", f"{dataset} --experts 1": "leaves no choice",
            f"{dataset} --experts 2 --objective mixed --routed none": "needs --routed none and no",
            f"{dataset} --router random --causal_logit router": "nothing learns to route",
            f"{dataset} --router random --predictor_loss 1": "nothing learns to route",
            f"{dataset} --experts 2 --expert_capacity 0": "must be from"}}
    for (main, first), more in cases.items():
        for words, said in more.items():
            words, *prompt = words.split("|")
            assert said in refused(capsys, main.main, *first.split(), *words.split(), *prompt)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_later_rows_replace_those_of_their_rule_and_keep_the_others(copy):
    """Minutes of BLEU lost to a later measurement, rows that stand twice, rows of the wrong split."""
    first = evaluation(copy, "--bleu test --rules full fixed:1 --beam 2")
    assert evaluation(copy, "--rules full fixed:2")["translated"] == first["translated"]
    evaluation(copy, "--bleu test --rules fixed:1 --beam 1")
    last = evaluation(copy, "--bleu val --rules full --beam 1")
    assert sorted(r["rule"] for r in last["forced"]) == "confidence:0.5 fixed:1 fixed:2 fixed:3 full".split()
    beams = {split: {r["rule"]: r["beam"] for r in rows} for split, rows in last["translated"].items()}
    assert beams == {"test": {"full": 2, "fixed:1": 1}, "val": {"full": 1}}


def test_chance_is_drawn_anew_for_every_batch():
    """Random exits or a random router that draw the same in every batch, or otherwise in the next call."""
    model, nothing = tiny(router="random", routed="odd", capacity=0.5), contextlib.nullcontext()
    batch = Batch(texts(), texts(1), position_ids(texts()))
    torch.manual_seed(5)
    first, again = (evaluate.under_rule(model, [batch] * 2, "random", options.Options(), nothing, "copy")
                    for _ in range(2))
    for name in ("exit_at", "visited"):
        assert (first[name][:3] != first[name][3:]).any() and np.array_equal(first[name], again[name])
    one, two = (decode.evaluate_loss(model, [batch] * n, nothing)["loss"]["causal"] for n in (1, 2))
    assert all(abs(b - a) > 1e-9 for a, b in zip(one[1:], two[1:], strict=True))       # block 1 is dense


@pytest.mark.parametrize("kind", ["copy", "folder"])
def test_a_new_rule_is_one_line(kind, request, monkeypatch, capsys):
    """A script that knows the rules by name, for a translator or for a GPT."""
    monkeypatch.setitem(exits.RULES, "agree", lambda model: agree)
    folder, bleu = request.getfixturevalue(kind), " --bleu test" * (kind == "copy")
    found = evaluation(folder, "--rules agree" + bleu)
    rows = [row for row in found["forced"] if row["rule"] == "agree"] + found["translated"].get("test", [])
    assert len(rows) == 1 + bool(bleu) and all(2 <= row["exit"] < 4 for row in rows)
    sample.main(["--run", str(folder), "--rule", "agree"])
    assert "agree: " in capsys.readouterr().out


@pytest.mark.parametrize("k, words", [(k, "--dropout 0.1 --grad_accum_steps 2") for k in (1, 3, 7)] + [
    (4, "--objective mixed --paths 2")])
def test_a_translator_resumes_exactly(pairs, tmp_path, words, k):
    """Buckets replayed from the start, other paths drawn, exits that never learn."""
    whole = trained(pairs, tmp_path / "a", f"{words} --save_every 3")
    part = trained(pairs, tmp_path / "b", f"{words} --save_every 3 --stop_at {k}")
    script.main(["--resume", str(part)])
    assert equal(weights(whole), weights(part)) and val_lines(whole) == val_lines(part)
    begin, end = (val_lines(whole)[i]["loss"]["top_k"] for i in (0, -1))
    assert all(b < a for a, b in zip(begin, end, strict=True))


def test_accumulation_gives_the_same_step(pairs, tmp_path):
    """A loss divided by the tokens of a piece instead of the whole step's: pieces are unequal here."""
    words = "--steps 1 --routed odd --batch_tokens 2048 --grad_accum_steps "
    folders = [trained(pairs, tmp_path, words + pieces) for pieces in "13"]
    norms = [m["norm"] for folder in folders for m in run.read_metrics(folder) if m["kind"] == "train"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and len(norms) == 2


def test_a_routed_translator_trains_and_translates(pairs, tmp_path):
    """Mixture-of-Depths in the decoder: padding in its report, a predictor that the search does not use."""
    folder = trained(pairs, tmp_path, "--routed odd --capacity 0.25 --steps 30")
    found = val_lines(folder)[-1]
    assert set(found["loss"]) == {"top_k", "causal"} and 0.6 < found["predictor"]["base_rate"] < 0.8
    [row] = evaluation(folder, "--bleu test --rules full --beam 2")["translated"]["test"]
    assert 2 <= row["blocks"] < 4 and row["exit"] == 4


def test_learning_where_to_exit_after_training(translator, pairs, tmp_path, capsys):
    """A second stage that forgets the first, moves the trunk, or whose predictor no rule asks."""
    words = f"--init_from {translator} --data {pairs} --out {tmp_path} --device cpu --steps 40 --warmup 2 "
    words = (words + "--lr 0.05 --eval_every 40 --batch_tokens 256 --exit_predictor").split()
    script.main([*words, *"geometric --objective exit_predictor --oracle likelihood".split()])
    script.main([*words, "token", "--alpha", "0.5"])                        # the model as well [DAT 3]
    old, new, moved = (run.open_run(folder, device="cpu")[3].state_dict()
                       for folder in (translator, tmp_path / "001", tmp_path / "002"))
    assert all(torch.equal(w, new[k]) for k, w in old.items()) and len(new) > len(old)
    assert not equal(old["wte.weight"], moved["wte.weight"])
    found = evaluation(tmp_path / "001", "--search 200 --rules learned:0 learned learned:1 full fixed:1 "
                       "random oracle:0.1 oracle:0 confidence:1 oracle:correctness:0 oracle:likelihood:0.1:2")
    rows = {r["rule"]: r for r in found["forced"]}
    assert rows["learned:0"]["loss"] == pytest.approx(rows["fixed:1"]["loss"])
    assert rows["learned:1"]["loss"] == pytest.approx(rows["full"]["loss"])
    asked = [rows[r]["mflops_paper"] for r in ("full", "learned:1", "confidence:1")]    # to be told to stay
    assert asked[0] < asked[1] < asked[2]
    assert 1 < rows["learned"]["exit"] < 4 and 1.5 < rows["random"]["exit"] < 3.5
    assert rows["oracle:0"]["loss"] <= min(r["loss"] for r in rows.values())
    assert rows["oracle:correctness:0"]["right"] > max(r["right"] for r in rows.values()) - 0.02   # of copies
    deeper = [rows[rule]["exit"] for rule in ("oracle:0.1", "oracle:0", "oracle:likelihood:0.1:2")]
    assert deeper[0] < min(deeper[1:])                      # nothing paid for a block, or a wider sigma
    assert found["search"][0][2].count(",") == 2 and found["search"][0][2] in rows
    found = evaluation(tmp_path / "001", "--rules fixed:1 learned --exited_kv compute")["forced"]
    path, found = tmp_path / "001" / "evaluation.json", {r["rule"]: r for r in found}
    path.write_text(path.read_text("utf-8").replace('"step": 40', '"step": 39'), "utf-8")      # other weights
    assert [r["rule"] for r in evaluation(tmp_path / "001", "--rules full")["forced"]] == ["full"]
    assert found["fixed:1"]["loss"] == pytest.approx(rows["fixed:1"]["loss"])
    assert found["learned"]["mflops_paper"] > rows["learned"]["mflops_needed"]
    for rule in ("learned:nan", "learned:2", "learned:-1"):
        assert "0 to 1" in refused(capsys, evaluate.main, "--run", tmp_path / "001", "--rules", rule)
