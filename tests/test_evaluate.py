"""Translators from the command line: train, resume, average, evaluate, translate, reproduce; bad input."""
import json
import math
import shutil

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import TINY, WORDS
from test_scripts import refused
from test_train import equal, val_lines, weights

import cost
import decode
import evaluate
import exits
import reproduce
import run
import sample
import train as script
from data import parallel
from data.common import load_tokenizer

SMALL = [w for n, w in enumerate(TINY) if "--batch" not in TINY[max(0, n - 1):n + 1]]
SMALL += ["--translate", "aa-bb", "--enc_layer", "1", "--enc_head", "2", "--enc_embd", "16",
          "--routed", "none", "--batch_tokens", "128"]


def trained(pairs, out, *words):
    script.main(["--data", str(pairs), "--out", str(out), *SMALL, *map(str, words)])
    return max(out.iterdir())


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(script, "finish", lambda *a: None)


@pytest.fixture(scope="session")
def translator(pairs, tmp_path_factory):
    """A finished run that has learnt the eight words (do not change it)."""
    out = tmp_path_factory.mktemp("translators")
    return trained(pairs, out, "--n_embd", 32, "--enc_embd", 32, "--steps", 320, "--lr", 0.01, "--warmup", 20,
                   "--eval_every", 160, "--save_every", 20, "--average", 3, "--batch_tokens", 256,
                   "--tau", 0.5, "--label_smoothing", 0.05, "--log_every", 20)


@pytest.fixture
def copy(translator, tmp_path):
    return shutil.copytree(translator, tmp_path / "copy")


def test_a_translator_learns_to_translate(translator, pairs, capsys):
    """Everything runs and nothing is learnt; a finished run without its sample, figures or evaluation."""
    last = val_lines(translator)[-1]["loss"]["top_k"]
    assert last[-1] < 0.6 < val_lines(translator)[0]["loss"]["top_k"][-1]
    files = {p.name for p in translator.rglob("*")}
    assert {"evaluation.json", "depth.npz", "sample.txt", "map.png", "depth.png", "loss.png"} <= files
    assert "router.png" not in files
    depth = np.load(translator / "depth.npz")
    assert depth["targets"].shape[0] == 40 and (depth["targets"] == -1).any()
    assert not depth["visited"][depth["targets"] == -1].any()


def test_bleu_of_every_exit(copy, pairs, capsys):
    """Outputs in another order than their references, exits that are all the same, a wrong signature."""
    evaluate.main(["--run", str(copy), "--bleu", "test", "--beam", "2", "--batch", "5"])
    said = capsys.readouterr().out
    found = json.loads((copy / "evaluation.json").read_text("utf-8"))["translated"]["test"]
    assert [r["rule"] for r in found] == ["fixed:1", "fixed:2", "fixed:3", "full", "confidence:0.5"]
    assert [r["exit"] for r in found[:4]] == [1, 2, 3, 4] and 1 <= found[4]["exit"] < 4
    references = parallel.load_pairs(pairs).originals("test", "bb")
    for row in found:
        lines = (copy / "outputs" / row["file"]).read_text("utf-8").splitlines()
        assert row["bleu"] == pytest.approx(sacrebleu.corpus_bleu(lines, [references]).score)
        assert row["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a") and row["seconds"] > 0
        assert row["mflops_needed"] <= row["mflops_paper"]
    assert found[3]["bleu"] > 60 and "| full |" in said and "tok:13a" in said
    assert found[0]["mflops_paper"] < found[1]["mflops_paper"] < found[3]["mflops_paper"]


def test_flops_count_every_hypothesis(copy, tmp_path):
    """A beam charged for its best text alone, or as one long text."""
    _, trained, _, model = run.open_run(copy, device="cpu")
    source = tmp_path / "mine.aa"
    source.write_text("otter heron badger\n", "utf-8")
    evaluate.main(["--run", str(copy), "--source", str(source), "--rules", "full", "--beam", "3"])
    [row] = json.loads((copy / "evaluation.json").read_text("utf-8"))["translated"]["mine"]
    encoding = load_tokenizer(copy / "tokenizer.json")
    ids = parallel.source_ids(encoding, ["otter heron badger"], 32, "mine")
    [(_, reads)] = decode.translate(model, ids, encoding.eot_token, exits.full_depth, 3)
    S, C, V = len(ids[0]), trained.model.n_embd, model.vocab_size
    total = 4 * 4 * S * C * C                               # the source, projected once by each of 4 blocks
    for r in range(len(reads.parent)):
        t = len(list(reads.path(r))[0])
        total += 4 * (12 * C * C + 16 * C * C + 4 * (t + S) * C) + 2 * V * C
    assert len(reads.parent) > 6 and row["mflops_paper"] == pytest.approx(total / 1e6)


def test_own_sentences_with_and_without_references(copy, tmp_path, capsys):
    source, reference = tmp_path / "mine.aa", tmp_path / "mine.bb"
    source.write_text("otter heron\nmagpie\n", "utf-8")
    reference.write_text("uno due\notto\n", "utf-8")
    words = ["--run", str(copy), "--source", str(source), "--rules", "full"]
    evaluate.main(words)
    assert (copy / "outputs" / "mine.full.txt").read_text("utf-8") == "uno due\notto\n"
    [row] = json.loads((copy / "evaluation.json").read_text("utf-8"))["translated"]["mine"]
    assert "bleu" not in row
    evaluate.main([*words, "--reference", str(reference)])
    [row] = json.loads((copy / "evaluation.json").read_text("utf-8"))["translated"]["mine"]
    assert "bleu" in row
    reference.write_text("uno due\n", "utf-8")
    assert "2 lines and" in refused(capsys, evaluate.main, *words, "--reference", reference)
    for text, said in {"otter\n\n": "line 2 is empty", "otter " * 60: "reads at most 32"}.items():
        source.write_text(text, "utf-8")
        assert said in refused(capsys, evaluate.main, *words)


def test_translating_a_prompt(copy, capsys):
    """Another sentence than the one asked for, or the end token printed."""
    sample.main(["--run", str(copy), "--prompt", "otter heron\nlizard badger\n"])
    said = capsys.readouterr().out
    assert said.startswith("otter heron\nuno due\n---") and "lizard badger\ncinque tre\n" in said
    assert (copy / "sample.txt").read_text("utf-8") == "otter heron\nuno due\n\nlizard badger\ncinque tre\n"
    assert set(np.load(copy / "sample.npz")["row"]) == {0, 1}
    sample.main(["--run", str(copy), "--color", "always", "--exit", "2", "--beam", "1"])
    said = capsys.readouterr().out
    assert "\033[30;48;5;" in said and "</s>" in said and "exit after block 2.00 of 4" in said
    for words in (["--rule", "full"], ["--speculate", "2"]):        # greedy: the same lines
        sample.main(["--run", str(copy), "--prompt", "otter heron\nlizard badger\n", "--beam", "1", *words])
        assert "otter heron\nuno due\n" in capsys.readouterr().out


def test_options_of_the_other_kind_are_refused(copy, finished, pairs, dataset, capsys, tmp_path):
    """A GPT asked to translate, a translator asked for samples, data of the other kind."""
    def no(main, *words):
        return refused(capsys, main, *words)
    assert "this run is a translator (aa-bb)" in no(sample.main, "--run", copy, "--temperature", 0.5)
    assert "this run is a GPT" in no(sample.main, "--run", finished, "--beam", 2)
    assert "this run is a GPT" in no(evaluate.main, "--run", finished, "--bleu", "test")
    assert "this run is a GPT" in no(evaluate.main, "--run", finished, "--source", pairs / "meta.json")
    assert "needs --source" in no(evaluate.main, "--run", copy, "--reference", pairs / "meta.json")
    assert "there are val, test" in no(evaluate.main, "--run", copy, "--bleu", "test_2016")
    assert "say what to --translate, aa-bb" in no(evaluate.main, "--run", finished, "--data", pairs)
    assert "nothing to --translate" in no(evaluate.main, "--run", copy, "--data", dataset)
    assert "the prompt: line 2 is empty" in no(sample.main, "--run", copy, "--prompt", "otter\n\nheron")
    assert "the prompt: line 1 is empty" in no(sample.main, "--run", copy, "--prompt", " ")
    assert "reads at most 32" in no(sample.main, "--run", copy, "--prompt", "otter " * 40)
    assert "at least 1" in no(sample.main, "--run", copy, "--beam", 0)
    assert "a beam turns several" in no(sample.main, "--run", copy, "--speculate", 2)
    assert "at least 1" in no(evaluate.main, "--run", copy, "--batch", 0)
    assert "number of draws" in no(evaluate.main, "--run", copy, "--search", -1)
    assert "nothing is translated" in no(evaluate.main, "--run", copy, "--beam", 3)
    (tmp_path / "results" / "dat-cpu").mkdir(parents=True)
    (tmp_path / "results" / "dat-cpu" / "mixed.json").write_text("{", encoding="utf-8")
    assert "mixed.json" in no(reproduce.main, "dat", "--out", tmp_path / "results")
    assert "needs a long text" in no(reproduce.main, "mod-isoflop", "--scale", "gpu", "--out", tmp_path)
    for rule, said in {"learned": "no predictor of exits", "confidence:.5,.5": "one threshold or 3",
                       "oracle:-1": "at least 0", "oracle:x": "at least 0",
                       "oracle:1.2.3": "at least 0", "fixed:9": "from 1 to 4"}.items():
        assert said in no(evaluate.main, "--run", copy, "--rules", "full", rule)
    out = ["--out", tmp_path / "runs", "--data"]
    said = no(script.main, *out, pairs, "--translate", "en-de")
    assert "has the languages aa and bb; use aa-bb or bb-aa" in said
    assert "say what to --translate" in no(script.main, *out, pairs)
    assert "nothing to --translate" in no(script.main, *out, dataset, "--translate", "aa-bb")
    for words in (["--enc_layer", 3], ["--batch_tokens", 99], ["--embeddings", "separate"]):
        assert "a GPT has no source" in no(script.main, *out, dataset, *words)
    words = [*out, pairs, "--translate", "aa-bb"]
    assert "have --batch_tokens" in no(script.main, *words, "--batch", 8)
    assert "use --embeddings separate" in no(script.main, *words, "--enc_embd", 64)
    assert "has no end" in no(script.main, *words, "--schedule", "inverse_sqrt", "--lr_end", 0.5)
    assert "needs --warmup" in no(script.main, *words, "--schedule", "inverse_sqrt", "--warmup", 0)
    assert "no sentence pair is at most 2 tokens" in no(script.main, *words, "--block_size", 2)
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_of_another_vocabulary_is_refused(copy, tmp_path, capsys, pairs):
    folder = shutil.copytree(pairs, tmp_path / "other")
    encoding = parallel.load_pairs(folder).encoding
    smaller = parallel.train_tokenizer([" ".join(WORDS)] * 9, 270)
    assert smaller.n_vocab != encoding.n_vocab
    parallel.write_pairs(folder, {s: {"aa": ["otter"] * 3, "bb": ["uno"] * 3} for s in ("train", "val")}, 260,
                         name="o", source="o")
    assert "was not trained on this data" in refused(capsys, evaluate.main, "--run", copy, "--data", folder)


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_a_translator_resumes_exactly(pairs, tmp_path, quiet, k):
    """Buckets replayed from the start, averages that begin again; with dropout and accumulation."""
    extra = ["--dropout", "0.1", "--accumulate", "2", "--average", "3", "--save_every", "2"]
    whole = trained(pairs, tmp_path / "a", *extra)
    part = trained(pairs, tmp_path / "b", *extra, "--stop_at", k)
    script.main(["--resume", str(part)])
    assert equal(weights(whole), weights(part)) and list(weights(part)["last"]) == [4, 6, 8]
    assert val_lines(whole) == val_lines(part)


def test_the_final_weights_are_the_mean_of_the_last_checkpoints(pairs, tmp_path, quiet):
    """A mean over other steps, or one that nobody uses."""
    folder = trained(pairs, tmp_path, "--average", 2, "--save_every", 3)
    state = weights(folder)
    assert list(state["last"]) == [6, 8] and equal(state["last"][8], state["model"])
    model = run.open_run(folder, device="cpu")[3]
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w, (state["last"][6][name] + state["last"][8][name]) / 2)
    assert not equal(state["last"][6], state["last"][8])
    few = trained(pairs, tmp_path / "few", "--average", 9, "--save_every", 5)
    assert list(weights(few)["last"]) == [5, 8]             # the weights before step 1 are no result
    single = trained(pairs, tmp_path / "one", "--average", 1)
    assert weights(single)["last"] == {}
    assert equal(dict(run.open_run(single, device="cpu")[3].state_dict()), dict(weights(single)["model"]))


def test_accumulation_gives_the_same_step(pairs, tmp_path, quiet):
    """A loss divided by the tokens of a piece instead of the whole step's: pieces are unequal here."""
    both = []
    for pieces in (1, 3):
        folder = trained(pairs, tmp_path / str(pieces), "--steps", 1, "--accumulate", pieces,
                         "--routed", "odd", "--batch_tokens", 2048)      # sorted: pieces of unequal length
        both.append([m for m in run.read_metrics(folder) if m["kind"] == "train"][0])
    assert both[0]["norm"] == pytest.approx(both[1]["norm"], rel=1e-4)
    assert both[0]["loss"] == pytest.approx(both[1]["loss"], rel=1e-5)


def test_a_routed_translator_trains_and_translates(pairs, tmp_path, quiet):
    """Mixture-of-Depths in the decoder: padding in its report, a predictor that the search does not use."""
    folder = trained(pairs, tmp_path, "--routed", "odd", "--capacity", 0.25, "--steps", 30)
    found = val_lines(folder)[-1]
    assert set(found["loss"]) == {"top_k", "causal"} and 0.6 < found["imitation"]["base_rate"] < 0.8
    evaluate.main(["--run", str(folder), "--bleu", "test", "--rules", "full", "--beam", "2"])
    [row] = json.loads((folder / "evaluation.json").read_text("utf-8"))["translated"]["test"]
    assert 2 <= row["blocks"] < 4 and row["exit"] == 4


def test_an_experiment_goes_on_point_by_point(pairs, tmp_path, monkeypatch, capsys):
    """Points that run twice, an interrupted point that begins again, a table of something else."""
    points = [reproduce.Point(name, ["--data", str(pairs), *SMALL, *more], ["--bleu", "test", "--beam", "2"])
              for name, more in (("tied", []), ("separate", ["--classifier", "separate"]))]
    points = [p._replace(train=[w for w in p.train if w not in ("--device", "cpu")]) for p in points]
    monkeypatch.setitem(reproduce.EXPERIMENTS, "dat",
                        reproduce.EXPERIMENTS["dat"]._replace(data=lambda scale: (str(pairs), "", []),
                                                              points=lambda scale, found: points))
    words = ["dat", "--out", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    honest, calls = reproduce.script, []

    def stopped(name, *more):
        calls.append(name)
        return honest(name, *more, *(["--stop_at", 5] if name == "train.py" else []))
    monkeypatch.setattr(reproduce, "script", stopped)
    assert "the same command goes on" in refused(capsys, reproduce.main, *words, "--points", "tied")
    monkeypatch.setattr(reproduce, "script", lambda *w: calls.append(w[0]) or honest(*w))
    reproduce.main([*words, "--points", "tied"])
    folder = tmp_path / "results" / "dat-cpu"
    assert [p.name for p in folder.glob("*.json")] == ["tied.json"]
    assert "--resume" in capsys.readouterr().out and calls == ["train.py", "train.py", "evaluate.py"]
    reproduce.main(words)
    assert calls[3:] == ["train.py", "evaluate.py"] and "2 points, 1 to do" in capsys.readouterr().out
    table = (folder / "table.md").read_text("utf-8")
    (folder / "table.md").unlink()
    reproduce.main(words)
    assert len(calls) == 5 and (folder / "table.md").read_text("utf-8") == table
    found = json.loads((folder / "separate.json").read_text("utf-8"))
    assert found["options"]["classifier"] == "separate" and found["training_seconds"] > 0 and found["torch"]
    bleu = found["evaluation"]["translated"]["test"][3]["bleu"]
    assert f"| separate | full | {bleu:.2f} | 4.00 | 4.00 |" in table
    assert table.count("--classifier separate") == 1
    assert (folder / "figure.png").stat().st_size > 5000 and len(list(folder.glob("tied.test.*.txt"))) == 5
    assert "there are tied, separate" in refused(capsys, reproduce.main, *words, "--points", "x")


def test_equal_flops_and_more_seeds_for_the_best(dataset, tmp_path, monkeypatch, capsys):
    sizes = ((2, 1, 8), (2, 2, 16), (4, 2, 24), (6, 2, 24))
    monkeypatch.setitem(reproduce.SIZES, "cpu", (3e8, 300, 32, 128, sizes))
    monkeypatch.setattr(reproduce, "ARMS", {"dense": ["--routed", "none"], "mod": []})
    monkeypatch.setitem(reproduce.EXPERIMENTS, "mod-isoflop", reproduce.EXPERIMENTS["mod-isoflop"]._replace(
        data=lambda scale: (str(dataset), "", [])))
    monkeypatch.setattr(reproduce, "isoflop_data", lambda scale: (str(dataset), "", []))

    def here(name, *words):
        script.main(list(map(str, words)))
        return 1.0
    monkeypatch.setattr(reproduce, "script", here)
    monkeypatch.setattr(script, "finish", lambda folder, options: evaluate.main(["--run", str(folder)]))
    reproduce.main(["mod-isoflop", "--out", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"),
                    "--device", "cpu"])
    results = tmp_path / "results" / "mod-isoflop-cpu"
    found = {p.stem: json.loads(p.read_text("utf-8")) for p in results.glob("*.json")}
    assert len(found) == 3 + 2 + 4 and (results / "figure.png").stat().st_size > 5000
    for arm in ("dense", "mod"):
        best = min((n for n in found if n.startswith(arm) and "seed" not in n),
                   key=lambda n: reproduce.held_out(found[n]))
        assert {f"{best}-seed1", f"{best}-seed2"} == {n for n in found if n.startswith(arm) and "seed" in n}
        assert found[f"{best}-seed2"]["options"]["seed"] == 1002
    for point in found.values():
        model = run.read_options(point["train"][1:]).model
        spent = point["options"]["steps"] * 128 / 32 * cost.training(model, 300, 32)
        assert abs(spent / 3e8 - 1) < 0.05
    table = (results / "table.md").read_text("utf-8")
    assert table.count("| dense-") - 1 == table.count("| mod-") == 4 and "| 3 |" in table
    capsys.readouterr()


def test_parabola():
    """The lowest point of three on a parabola in log N; a line has none."""
    rows = [{"parameters": n, "held_out": 3 + (math.log(n) - math.log(1e6))**2} for n in (3e5, 1e6, 5e6)]
    assert reproduce.parabola(rows)[0] == pytest.approx(1e6)
    rows = [{"parameters": n, "held_out": -(math.log(n) - 14)**2} for n in (3e5, 1e6, 5e6)]
    assert reproduce.parabola(rows)[0] is None and reproduce.parabola(rows[:2]) == (None, None)
    rows = [{"parameters": n, "held_out": (math.log(n) - 14)**2} for n in (3e3, 1e4, 5e4)]
    assert reproduce.parabola(rows)[0] is None              # far outside what was measured


def test_learning_where_to_exit_after_training(translator, copy, pairs, tmp_path, capsys):
    """A second stage that forgets the first, moves the trunk, or whose predictor nobody asks."""
    words = ["--init", str(translator), "--data", str(pairs), "--out", str(tmp_path / "r"), "--device", "cpu",
             "--steps", "40", "--lr", "0.05", "--warmup", "2", "--eval_every", "40", "--batch_tokens", "256"]
    script.main([*words, "--halting", "geometric", "--objective", "halting", "--oracle", "likelihood"])
    [folder] = (tmp_path / "r").iterdir()
    old, new = (run.open_run(f, device="cpu")[3].state_dict() for f in (translator, folder))
    assert all(torch.equal(w, new[k]) for k, w in old.items()) and len(new) > len(old)
    capsys.readouterr()
    evaluate.main(["--run", str(folder), "--search", "200", "--rules", "learned:0", "learned", "learned:1",
                   "full", "fixed:1", "random", "oracle:0.1", "oracle:0", "confidence:0.5",
                   "oracle:correctness:0", "oracle:likelihood:0.1:2", "confidence:1"])
    found = json.loads((folder / "evaluation.json").read_text("utf-8"))
    rows = {r["rule"]: r for r in found["forced"]}
    assert rows["learned:0"]["loss"] == pytest.approx(rows["fixed:1"]["loss"])
    assert rows["learned:1"]["loss"] == pytest.approx(rows["full"]["loss"])
    asked = [rows[r]["mflops_paper"] for r in ("full", "learned:1", "confidence:1")]    # to be told to stay
    assert asked[0] < asked[1] < asked[2]
    assert 1 < rows["learned"]["exit"] < 4 and 1.5 < rows["random"]["exit"] < 3.5
    assert rows["oracle:0"]["loss"] <= min(r["loss"] for r in rows.values())
    assert rows["oracle:0.1"]["exit"] < rows["oracle:0"]["exit"]
    assert rows["oracle:correctness:0"]["right"] > max(r["right"] for r in rows.values()) - 0.02   # of copies
    assert rows["oracle:0.1"]["exit"] < rows["oracle:likelihood:0.1:2"]["exit"]     # a wider sigma
    assert found["search"] and "search: exit" in capsys.readouterr().out
    assert found["search"][0][2].count(",") == 2 and found["search"][0][2] in rows
    evaluate.main(["--run", str(folder), "--rules", "fixed:1", "learned", "--missing", "compute"])
    found = {r["rule"]: r for r in json.loads((folder / "evaluation.json").read_text("utf-8"))["forced"]}
    assert found["fixed:1"]["loss"] == pytest.approx(rows["fixed:1"]["loss"])
    assert found["learned"]["mflops_paper"] > rows["learned"]["mflops_needed"]
    script.main([*words, "--halting", "token", "--alpha", "0.5"])       # into the model, as the paper does
    other = max((tmp_path / "r").iterdir())
    assert not equal(old["wte.weight"], run.open_run(other, device="cpu")[3].state_dict()["wte.weight"])
    said = refused(capsys, script.main, *words, "--n_layer", "3", "--halting", "token")
    assert "has another model" in said


def test_mixed_training_from_the_command_line(pairs, tmp_path, quiet):
    """Losses of the exits that nobody drew, or a resume that draws other paths."""
    extra = ["--objective", "mixed", "--paths", "2", "--save_every", "2"]
    whole = trained(pairs, tmp_path / "a", *extra)
    part = trained(pairs, tmp_path / "b", *extra, "--stop_at", 3)
    script.main(["--resume", str(part)])
    assert equal(weights(whole), weights(part))
    first, last = (val_lines(whole)[i]["loss"]["top_k"] for i in (0, -1))
    assert all(b < a for a, b in zip(first, last, strict=True))


def test_the_inverse_square_root():
    options = run.read_options(["--schedule", "inverse_sqrt", "--warmup", "100", "--lr", "2e-3"])
    rates = [script.learning_rate(t, options) for t in (0, 49, 99, 399, 9999)]
    assert rates == pytest.approx([2e-5, 1e-3, 2e-3, 1e-3, 2e-4])
