"""Translators from the command line: train, resume, average, evaluate, translate; bad input."""
import contextlib
import json
import shutil

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import TINY, texts, tiny
from test_exits import agree
from test_scripts import refused
from test_train import equal, val_lines, weights

import cost
import decode
import evaluate
import exits
import options
import run
import sample
import train as script
from data import parallel
from data.batches import Batch, batches_of, open_data
from data.common import UserError, load_tokenizer
from model import position_ids

SMALL = [w for n, w in enumerate(TINY) if "--batch_size" not in TINY[max(0, n - 1):n + 1]]
SMALL += ["--translate", "aa-bb", "--enc_layer", "1", "--enc_head", "2", "--enc_embd", "16",
          "--routed", "none", "--batch_tokens", "128"]


def evaluation(folder, *words):
    """evaluate.main on a run -> evaluation.json."""
    evaluate.main(["--run", str(folder), *map(str, words)])
    return json.loads((folder / "evaluation.json").read_text("utf-8"))


def trained(pairs, out, *words):
    script.main(["--data", str(pairs), "--out", str(out), *SMALL, *map(str, words)])
    return max(out.iterdir())


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(script, "finish", lambda *a: None)


@pytest.fixture(scope="session")
def translator(pairs, tmp_path_factory):
    """A finished run that has learned the eight words (do not change it)."""
    out = tmp_path_factory.mktemp("translators")
    return trained(pairs, out, "--n_embd", 32, "--enc_embd", 32, "--steps", 320, "--lr", 0.01, "--warmup", 20,
                   "--eval_every", 160, "--save_every", 20, "--average", 3, "--batch_tokens", 256,
                   "--rule", "confidence:0.5", "--label_smoothing", 0.05, "--log_every", 20)


@pytest.fixture
def copy(translator, tmp_path):
    return shutil.copytree(translator, tmp_path / "copy")


def test_a_translator_learns_to_translate(translator):
    """Everything runs and nothing is learned; a finished run without its sample, figures or evaluation."""
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
    found = evaluation(copy, "--bleu", "test", "--beam", 2, "--batch_size", 5)["translated"]["test"]
    said = capsys.readouterr().out
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
    _, o, _, model = run.open_run(copy, device="cpu")
    source = tmp_path / "mine.aa"
    source.write_text("otter heron badger\n", "utf-8")
    [row] = evaluation(copy, "--source", source, "--rules", "full", "--beam", 3)["translated"]["mine"]
    encoding = load_tokenizer(copy / "tokenizer.json")
    ids = parallel.source_ids(encoding, ["otter heron badger"], 32, "mine")
    [(_, trace)] = decode.translate(model, ids, encoding.eot_token, exits.full_depth, 3)
    S, C, V = len(ids[0]), o.model.n_embd, model.vocab_size
    total = 4 * 4 * S * C * C                               # the source, projected once by each of 4 blocks
    for taken in trace:
        t, parent = 1, taken.parent
        while parent >= 0:
            t, parent = t + 1, trace[parent].parent
        total += 4 * (12 * C * C + 16 * C * C + 4 * (t + S) * C) + 2 * V * C
    assert len(trace) > 6 and row["mflops_paper"] == pytest.approx(total / 1e6)


def test_own_sentences_with_and_without_references(copy, tmp_path, capsys):
    """BLEU against nothing, references that are not read, sentences that cannot be."""
    source, reference = tmp_path / "mine.aa", tmp_path / "mine.bb"
    source.write_text("otter heron\nmagpie\n", "utf-8")
    reference.write_text("uno due\notto\n", "utf-8")
    words = ["--source", source, "--rules", "full"]
    [row] = evaluation(copy, *words)["translated"]["mine"]
    assert "bleu" not in row and (copy / "outputs" / "mine.full.txt").read_text("utf-8") == "uno due\notto\n"
    assert "bleu" in evaluation(copy, *words, "--reference", reference)["translated"]["mine"][0]
    reference.write_text("uno due\n", "utf-8")
    words = ["--run", copy, *words]
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
    sample.main(["--run", str(copy), "--color", "always", "--rule", "fixed:2", "--beam", "1"])
    said = capsys.readouterr().out
    assert "\033[30;48;5;" in said and "</s>" in said and "exit after block 2.00 of 4" in said
    prompt = ["--prompt", "otter heron\nlizard badger\n"]
    sample.main(["--run", str(copy), *prompt, "--beam", "1", "--rule", "full"])
    assert "otter heron\nuno due\n" in capsys.readouterr().out


def test_options_of_the_other_kind_are_refused(copy, finished, pairs, dataset, capsys, tmp_path):
    """A GPT asked to translate, a translator asked for samples, data of the other kind."""
    meta, gpt, out = pairs / "meta.json", f"--out {tmp_path}/runs --data {dataset}", f"--out {tmp_path}/runs"
    new = f"{out} --data {pairs} --translate aa-bb"
    cases = {
        (sample, f"--run {copy}"): {
            "--temperature 0.5": "this run is a translator (aa-bb)", "--beam 0": "at least 1",
            "--speculate 2": "drafts a GPT's text", "--prompt |otter\n\nheron": "the prompt: line 2 is empty",
            "--prompt | ": "the prompt: line 1 is empty", "--prompt |" + "otter " * 40: "reads at most 32"},
        (evaluate, f"--run {copy}"): {
            f"--reference {meta}": "needs --source", "--bleu test_2016": "there are val, test",
            f"--data {dataset}": "nothing to --translate", "--batch_size 0": "at least 1",
            "--search -1": "number of draws", "--beam 3": "nothing is translated"},
        (sample, f"--run {finished}"): {"--beam 2": "this run is a GPT"},
        (evaluate, f"--run {finished}"): {
            "--exited_kv compute": "without routed blocks",
            "--bleu test": "this run is a GPT", f"--source {meta}": "this run is a GPT",
            f"--data {pairs}": "say what to --translate, aa-bb"},
        (script, out): {
            f"--data {pairs} --translate en-de": "has the languages aa and bb; use aa-bb or bb-aa",
            f"--data {pairs}": "say what to --translate"},
        (script, gpt): {
            "--translate aa-bb": "nothing to --translate", "--enc_layer 3": "a GPT has no source",
            "--batch_tokens 99": "a GPT has no source", "--embeddings separate": "a GPT has no source"},
        (script, new): {
            "--batch_size 8": "have --batch_tokens", "--enc_embd 64": "use --embeddings separate",
            "--schedule inverse_sqrt --lr_end 0.5": "has no end", "--block_size 2": "at most 2 tokens",
            "--schedule inverse_sqrt --warmup 0": "needs --warmup"}}
    for (main, first), more in cases.items():
        for words, said in more.items():
            words, *prompt = words.split("|")
            assert said in refused(capsys, main.main, *first.split(), *words.split(), *prompt)
    assert not (tmp_path / "runs").exists()


RANGES = {"learned": "no predictor of exits", "confidence:.5,.5": "one threshold or 3",
          "fixed:9": "from 1 to 4",
          "fixed:1.5": "from 1 to 4", "confidence:nan": "from 0 to 1", "confidence:7": "from 0 to 1",
          "confidence:-3": "from 0 to 1", "oracle:-1": "at least 0", "oracle:x": "at least 0",
          "oracle:1.2.3": "at least 0", "oracle:nan": "at least 0"}


def test_values_out_of_range_are_refused_before_anything_is_written(copy, capsys):
    """nan, which is in no range and compares false; a rule that fails when the others have been measured."""
    def written():
        return {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    before = written()

    def no(said, main, *words):
        with pytest.raises(SystemExit) as stop:
            main(["--run", str(copy), *words])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and err.count("\n") == 1 and written() == before
    for rule, said in RANGES.items():
        no(said, evaluate.main, "--rules", "full", rule)
        if not rule.startswith("oracle"):
            no(said, sample.main, "--rule", rule)
    for value in ("nan", "inf"):
        no("--length_penalty", evaluate.main, "--bleu", "test", "--length_penalty", value)
        no("--length_penalty", sample.main, "--length_penalty", value)
    model = run.open_run(copy, device="cpu")[3]
    model.exit_predictor = exits.ExitPredictor("geometric", 4, 32)
    for rule in ("learned:nan", "learned:2", "learned:-1"):
        with pytest.raises(UserError, match="from 0 to 1"):
            options.halting_rule(rule, model)


def test_later_rows_replace_those_of_their_rule_and_keep_the_others(copy):
    """Minutes of BLEU lost to a later measurement, rows that stand twice, rows of the wrong split."""
    first = evaluation(copy, "--bleu", "test", "--rules", "full", "fixed:1", "--beam", 2)
    later = evaluation(copy, "--rules", "full", "fixed:2")
    assert later["translated"] == first["translated"]
    last = evaluation(copy, "--bleu", "test", "--rules", "fixed:1", "--beam", 1)

    def rules(found):
        return sorted(row["rule"] for row in found)
    assert rules(last["forced"]) == ["confidence:0.5", "fixed:1", "fixed:2", "fixed:3", "full"]
    assert {r["rule"]: r["beam"] for r in last["translated"]["test"]} == {"full": 2, "fixed:1": 1}
    both = evaluation(copy, "--bleu", "val", "--rules", "full", "--beam", 1)["translated"]
    assert both["test"] == last["translated"]["test"] and rules(both["val"]) == ["full"]


def test_chance_is_drawn_anew_for_every_batch_and_seed():
    """Random exits and the random router that repeat the same draws in every evaluation batch or for every
    seed, or that the next call draws otherwise."""
    o = options.Options()
    model = tiny(router="random", routed="odd", capacity=0.5)
    batch = Batch(texts(), texts(1), position_ids(texts()))
    nothing = contextlib.nullcontext()

    def measured():
        return evaluate.under_rule(model, [batch, batch], "random", o, nothing, "copy")
    torch.manual_seed(5)
    first, again = measured(), measured()
    for name in ("exit_at", "visited"):
        assert (first[name][:3] != first[name][3:]).any() and np.array_equal(first[name], again[name])
    one, two = (decode.evaluate_loss(model, [batch] * n, nothing)["causal"][0] for n in (1, 2))
    assert (two - 2 * one)[1:].abs().min() > 1e-6       # block 1 is dense

    def at_seed(seed):
        torch.manual_seed(seed)
        return decode.step(model, batch.ids, batch.pos, None, exits.random_exit(4))
    a, b = at_seed(0), at_seed(1)
    assert (a.exit_at != b.exit_at).any() and (a.visited != b.visited).any()
    assert torch.equal(at_seed(1).exit_at, at_seed(1).exit_at)


@pytest.mark.parametrize("kind", ["translator", "gpt"])
def test_a_new_rule_is_one_line(kind, copy, finished, tmp_path, monkeypatch, capsys):
    """A script that knows the rules by name; FLOPs that are counted by the name of a rule: this one reads one
    classifier after each block up to the exit."""
    monkeypatch.setitem(exits.RULES, "agree", lambda model: agree)
    folder = copy if kind == "translator" else shutil.copytree(finished, tmp_path / "gpt")
    found = evaluation(folder, "--rules", "agree", *(["--bleu", "test"] if kind == "translator" else []))
    [row] = [r for r in found["forced"] if r["rule"] == "agree"]
    assert 2 <= row["exit"] < 4 and (kind == "gpt" or found["translated"]["test"][-1]["exit"] >= 2)
    sample.main(["--run", str(folder), "--rule", "agree"])
    assert "agree: " in capsys.readouterr().out
    _, o, _, model = run.open_run(folder, device="cpu")
    _, data = open_data(o.data, o.translate)
    batches = batches_of(data, "val", o).fixed(o.eval_windows)
    arrays = evaluate.under_rule(model, batches, "agree", o, contextlib.nullcontext(), "copy")
    flops = []
    for w, S in enumerate(S for batch in batches for S in batch.sources()):
        mask = arrays["targets"][w] >= 0
        visited, exit_at = arrays["visited"][w, mask], arrays["exit_at"][w, mask]
        flops.append(cost.decoding(o.model, model.vocab_size, visited, exit_at, exit_at, S=S).flops)
    assert row["mflops_paper"] == pytest.approx(np.mean(flops) / 1e6)


def test_another_tokenizer_is_refused(copy, finished, dataset, pairs, tmp_path, capsys):
    """A wrong loss without a complaint: ids that mean other words, in a vocabulary as large as before."""
    for folder, data in ((copy, pairs), (finished, dataset)):
        other = shutil.copytree(data, tmp_path / f"other {data.name}")
        tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
        tokenizer["tokens"][-2:] = tokenizer["tokens"][:-3:-1]
        (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
        assert "has another tokenizer" in refused(capsys, evaluate.main, "--run", folder, "--data", other)
    parallel.write_pairs(other, {"train": [("heron", "due")] * 3, "val": [("otter", "uno")] * 3}, 260,
                         languages=("aa", "bb"), name="o", source="o")
    assert "was not trained on this data" in refused(capsys, evaluate.main, "--run", copy, "--data", other)


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_a_translator_resumes_exactly(pairs, tmp_path, quiet, k):
    """Buckets replayed from the start, averages that begin again; with dropout and accumulation."""
    extra = ["--dropout", "0.1", "--grad_accum_steps", "2", "--average", "3", "--save_every", "2"]
    whole = trained(pairs, tmp_path / "a", *extra)
    part = trained(pairs, tmp_path / "b", *extra, "--stop_at", k)
    script.main(["--resume", str(part)])
    assert equal(weights(whole), weights(part)) and list(weights(part)["last"]) == [4, 6, 8]
    assert val_lines(whole) == val_lines(part)


def test_the_final_weights_are_the_mean_of_the_last_checkpoints(pairs, tmp_path, quiet):
    """A mean over other steps, or one that no script uses."""
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
        folder = trained(pairs, tmp_path / str(pieces), "--steps", 1, "--grad_accum_steps", pieces,
                         "--routed", "odd", "--batch_tokens", 2048)      # sorted: pieces of unequal length
        both.append([m for m in run.read_metrics(folder) if m["kind"] == "train"][0])
    assert both[0]["norm"] == pytest.approx(both[1]["norm"], rel=1e-4)
    assert both[0]["loss"] == pytest.approx(both[1]["loss"], rel=1e-5)


def test_a_routed_translator_trains_and_translates(pairs, tmp_path, quiet):
    """Mixture-of-Depths in the decoder: padding in its report, a predictor that the search does not use."""
    folder = trained(pairs, tmp_path, "--routed", "odd", "--capacity", 0.25, "--steps", 30)
    found = val_lines(folder)[-1]
    assert set(found["loss"]) == {"top_k", "causal"} and 0.6 < found["predictor"]["base_rate"] < 0.8
    [row] = evaluation(folder, "--bleu", "test", "--rules", "full", "--beam", 2)["translated"]["test"]
    assert 2 <= row["blocks"] < 4 and row["exit"] == 4


def test_learning_where_to_exit_after_training(translator, copy, pairs, tmp_path, capsys):
    """A second stage that forgets the first, moves the trunk, or whose predictor no rule asks."""
    words = ["--init_from", str(translator), "--data", str(pairs), "--out", str(tmp_path / "r")]
    words += "--device cpu --steps 40 --warmup 2 --lr 0.05 --eval_every 40 --batch_tokens 256".split()
    script.main([*words, "--exit_predictor", "geometric", "--objective", "exit_predictor",
                 "--oracle", "likelihood"])
    [folder] = (tmp_path / "r").iterdir()
    old, new = (run.open_run(f, device="cpu")[3].state_dict() for f in (translator, folder))
    assert all(torch.equal(w, new[k]) for k, w in old.items()) and len(new) > len(old)
    capsys.readouterr()
    found = evaluation(folder, "--search", 200, "--rules", "learned:0", "learned", "learned:1", "full",
                       "fixed:1", "random", "oracle:0.1", "oracle:0", "confidence:0.5", "confidence:1",
                       "oracle:correctness:0", "oracle:likelihood:0.1:2")
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
    found = evaluation(folder, "--rules", "fixed:1", "learned", "--exited_kv", "compute")
    found = {r["rule"]: r for r in found["forced"]}
    assert found["fixed:1"]["loss"] == pytest.approx(rows["fixed:1"]["loss"])
    assert found["learned"]["mflops_paper"] > rows["learned"]["mflops_needed"]
    script.main([*words, "--exit_predictor", "token", "--alpha", "0.5"])       # the model as well [DAT 3]
    other = max((tmp_path / "r").iterdir())
    assert not equal(old["wte.weight"], run.open_run(other, device="cpu")[3].state_dict()["wte.weight"])
    said = refused(capsys, script.main, *words, "--n_layer", "3", "--exit_predictor", "token")
    assert "has another model" in said


def test_mixed_training_from_the_command_line(pairs, tmp_path, quiet):
    """Losses of exits that were not drawn, or a resume that draws other paths."""
    extra = ["--objective", "mixed", "--paths", "2", "--save_every", "2"]
    whole = trained(pairs, tmp_path / "a", *extra)
    part = trained(pairs, tmp_path / "b", *extra, "--stop_at", 3)
    script.main(["--resume", str(part)])
    assert equal(weights(whole), weights(part))
    first, last = (val_lines(whole)[i]["loss"]["top_k"] for i in (0, -1))
    assert all(b < a for a, b in zip(first, last, strict=True))


def test_the_inverse_square_root():
    """A rate that falls from another peak, or at another step."""
    words = ["--schedule", "inverse_sqrt", "--warmup", "100", "--lr", "2e-3"]
    o = options.read_options(words, run.stored_options)
    rates = [script.learning_rate(t, o) for t in (0, 49, 99, 399, 9999)]
    assert rates == pytest.approx([2e-5, 1e-3, 2e-3, 1e-3, 2e-4])
