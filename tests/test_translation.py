"""The seq2seq Transformer: against loops from the paper, and against itself."""
import itertools

import numpy as np
import pytest
import reference_seq2seq as loops
import torch
from conftest import Counter, V, texts, tiny, tiny_translator
from test_equivalence import RULES, TRANSLATORS, by_steps, check, close, each_rule, gradients, in_loops, naive

import cost
import decode
import exits
import train
from data.batches import Batch, pad_rows, positions_of
from decode import COUNTED
from options import Options

KINDS = ["sequence", "token", "geometric", "binary"]
END = 3


@pytest.fixture(params=TRANSLATORS)
def model(request):
    return tiny_translator(**TRANSLATORS[request.param])


def rows(lengths=(7, 2, 12), seed=0, vocab=V):
    return [texts(seed + b, rows=1, T=T, vocab=vocab)[0].tolist() for b, T in enumerate(lengths)]


def ragged():
    """A Batch of three sentence pairs of unequal lengths, with padding in source and target."""
    def padded(lists, value):
        return pad_rows([np.array(r) for r in lists], [len(r) for r in lists], value)
    source, target = rows(), rows((13, 9, 3), seed=9)
    return Batch(padded([r[:-1] for r in target], 0), padded([r[1:] for r in target], -1),
                 positions_of([12, 8, 2]), (padded(source, 0), positions_of([len(r) for r in source])))


def unpadded(batch, b):
    """Row b of a Batch by itself."""
    t, s = int(batch.mask[b].sum()), batch.sources()[b]
    source = tuple(x[b:b + 1, :s] for x in batch.source)
    return Batch(batch.ids[b:b + 1, :t], batch.targets[b:b + 1, :t], batch.pos[b:b + 1, :t], source)


@pytest.mark.parametrize("route", ["top_k", "causal"])
def test_the_loss_of_a_batch_is_that_of_its_rows(model, route):
    """Padding in a loss (of the exits, of the router), that is attended to (in encoder, self- or
    cross-attention), routed, or counted in k; rows that weigh by their padded length."""
    wish, batch = Options(exit_weights="n", predictor_loss=0.3, label_smoothing=0.1, route=route), ragged()

    def together(parts):
        def objective():
            return map(sum, zip(*(train.aligned(model, part, 1 / 22, wish) for part in parts), strict=True))
        return gradients(model, objective)
    (ours, whole), (theirs, alone) = together([batch]), together([unpadded(batch, b) for b in range(3)])
    close(whole, alone)
    assert batch.count == 12 + 8 + 2 and any("encoder" in k for k in ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, beam, length_penalty", [
    ("translator", 1, 1.0), ("tied", 2, 0.0), ("routed", 3, 0.5), ("separate", 7, 2.0)])
@each_rule
def test_translations_are_the_naive_ones(name, rule, beam, length_penalty):
    """Rows of the cache, exits or scores that do not follow their hypothesis when the beam is reordered; rows
    of different lengths in one batch that disturb each other; scores that forget a token, the end token or
    the length; a beam wider than the vocabulary."""
    for seed in range(3):
        model = tiny_translator(seed, vocab=6, **TRANSLATORS[name])
        model.config.block_size = 7         # at most six tokens, for the sake of the loops
        sources = rows((3, 1, 2), seed, vocab=6)
        best = decode.translate(model, sources, END, rule, beam, length_penalty)
        for source, text in zip(sources, best, strict=True):
            checker = naive(model, source)
            score, ids = loops.beam(checker, in_loops(rule), END, 6, beam, length_penalty)
            assert tuple(text.ids) == (END, *ids)
            close(text.log_prob, score)
            check(text, checker, in_loops(rule))


@each_rule
def test_beam_one_is_greedy(model, rule):
    """Two ways to decode that differ, in text, exits or blocks; a text over its 2 S + 10 tokens."""
    memory = model.encode(*decode.pad(rows(), "cpu"))
    greedy = decode.generate(model, [[END]] * 3, 23, rule, temperature=0, eos_id=END, memory=memory)
    for source, a, b in zip(rows(), decode.translate(model, rows(), END, rule, 1), greedy, strict=True):
        n = min(2 * len(source) + 10, 23)
        assert a.ids == b.ids[:n + 1] and np.array_equal(a.exit_at, b.exit_at[:n])
        assert np.array_equal(a.visited, b.visited[:n])


def test_a_beam_sums_in_fp32():
    """Scores of many tokens in steps of a half, ranked by rounding."""
    with torch.autocast("cpu", torch.bfloat16):
        model = tiny_translator(routed="none").float()
        [text] = decode.translate(model, rows((7,)), END, exits.full_depth, 2)
    steps = 16 * text.log_prob * (len(text.ids) - 1)
    assert len(text.ids) > 15 and abs(steps - round(steps)) > 1e-3


DECODERS = {
    "seq2seq": {"routed": "none"}, "separate classifiers": {"routed": "none", "classifier": "separate"},
    "gpt": {"routed": "none"}, "routed seq2seq": {}, "routed gpt": {},
    "router decides": {"causal_logit": "router"}, "experts": {"routed": "none", "experts": 1, "noops": 2},
    **{kind: {"routed": "none", "exit_predictor": kind} for kind in KINDS},
}


def looks_back(state):
    """Exits anywhere, and reads the first classifier when the second block has run."""
    if state.n == 2:
        state.logits(1)
    return ANYWHERE(state)


ANYWHERE = exits.forced_exits(texts(7, rows=1, T=12, vocab=4) + 1)
EVERY = RULES | {"anywhere": ANYWHERE, "looks back": looks_back}
CASES = [*itertools.product(["seq2seq", "separate classifiers", "gpt"], EVERY, ["copy", "compute"]),
         *itertools.product(["routed seq2seq", "routed gpt", "router decides", "experts"], EVERY, ["copy"]),
         *itertools.product(KINDS, ["learned"], ["copy", "compute"])]


@pytest.mark.parametrize("name, rule, exited_kv", CASES)
def test_flops_are_those_that_run(name, rule, exited_kv):
    """The accounting against a hook on the matrix products of real decoding: a source that is projected again
    by every token or every use of a shared block, a predictor that decides again after every block or for
    every token of a sentence, copies that are made although no later token goes that deep, blocks that run at
    once where they are counted as if they ran late; no-ops that cost an MLP, choices that cost nothing."""
    gpt = name in ("gpt", "routed gpt", "router decides", "experts")
    model = (tiny if gpt else tiny_translator)(4 if name == "token" else 0, **DECODERS[name])
    memory, ids = None if gpt else model.encode(texts(5, rows=1, T=7)), texts(rows=1, T=12)
    halting = EVERY.get(rule) or exits.learned(model)
    with Counter() as counter:
        steps, _ = by_steps(model, ids, halting, 1, memory, exited_kv)
    whole, _ = by_steps(model, ids, halting, 12, memory, exited_kv)
    counts = {part: getattr(steps, part)[0].numpy() for part in COUNTED}
    assert all(np.array_equal(counts[part], getattr(whole, part)[0]) for part in COUNTED)
    copies = "needed" if exited_kv == "copy" else "computed"
    counted = cost.decoding(model.config, V, **counts, S=7 if memory else 0, copies=copies)
    decided = 2 * 4 * 12 if name == "sequence" else 0                       # with the encoder output, above
    assert counted["flops"] + counted["copies"] / 2 == counter.flops + decided > 0    # a copy makes a query
    assert rule in RULES or name == "sequence" or len(set(counts["exit_at"])) > 1
    assert (counts["worked"] < counts["visited"]).any() == (name == "experts")
    if rule == "learned":       # decided once, or after every block up to the exit but the last
        decisions = 1 if name in ("sequence", "token") else counts["exit_at"].clip(max=3)
        assert (counts["predicted"] == decisions).all()


@pytest.mark.parametrize("copies", ["paper", "needed"])
@pytest.mark.parametrize("S", [0, 7])
@pytest.mark.parametrize("confident", [False, True])
def test_flops_are_the_papers(S, confident, copies):
    """Both accountings against the loops over tokens and blocks."""
    model = tiny_translator(routed="none")
    for seed in range(5):
        exit_at = np.random.default_rng(seed).integers(1, 5, 11)
        visited, classified = np.arange(4) < exit_at[:, None], exit_at if confident else np.ones(11)
        counted = cost.decoding(model.config, V, visited, exit_at, classified, S=S, copies=copies)
        assert counted["flops"] == loops.flops(visited, classified, 16, 40, V, S, 12, copies == "needed")
        computed = cost.decoding(model.config, V, visited, exit_at, classified, S=S, copies="computed")
        caught_up = visited | loops.copies(visited)
        assert computed["flops"] == loops.flops(caught_up, classified, 16, 40, V, S, 12, True)


def test_bytes_of_a_full_pass():
    """Weights read once a token, keys and values once a look, by hand for one dense block."""
    model = tiny_translator(routed="none", n_layer=1)
    counted = cost.decoding(model.config, V, np.ones((2, 1), bool), np.ones(2, int), S=7, itemsize=2)
    weights = 2 * (12 * 256 // 2 + 2 * 40 * 16 + V * 16) + 2 * 16 * 12
    cache = 2 * 16 * ((1 + 2) + 2 * 7 + 2 + 7)      # seen, of the source, written, source written
    assert counted["bytes"] == 2 * (weights + cache)
