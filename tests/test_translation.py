"""The seq2seq Transformer: against loops from the paper, and against itself."""
import itertools

import numpy as np
import pytest
import reference_seq2seq as naive
import torch
from conftest import Counter, V, held, texts, tiny, tiny_translator
from test_equivalence import RULES, by_steps, close, in_loops, same

import cost
import decode
import exits
import train
from data.batches import Batch, pad_rows, positions_of
from model import GPT, position_ids
from options import Options
from routing import causal

MODELS = {
    "dense": {"routed": "none"},
    "tied": {"routed": "none", "embeddings": "tied", "enc_embd": 16, "enc_head": 2},
    "routed": {"routed": "odd"},
    "separate, every block": {"routed": "all", "classifier": "separate", "gate": "sigmoid", "capacity": 0.5},
}
KINDS = ["sequence", "token", "geometric", "binary"]
END = 3


@pytest.fixture(params=MODELS, ids=list(MODELS))
def model(request):
    return tiny_translator(**MODELS[request.param])


@pytest.fixture(params=RULES, ids=list(RULES))
def rule(request):
    return RULES[request.param]


def loops(model):
    c = model.config
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    return naive.Translator(weights, c.n_layer, c.n_head, c.enc_layer, c.enc_head, c.capacity, c.gate)


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


def gradients(model, objective):
    """{name: gradient} of the loss that objective() returns, and the losses of the exits."""
    model.zero_grad()
    loss, losses = objective()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}, losses


def test_training_forward_is_the_papers(model):
    """A fault in encoder, cross-attention, their order in the block, or routing with a source."""
    source, ids = texts(5, T=7), texts()
    memory = model.encode(source)
    layers = list(model.run_layers(model.embed(ids), position_ids(ids), memory=memory))
    for b in range(3):
        states, visited, _, _ = loops(model).forward_top_k(ids[b].tolist(), source[b].tolist())
        for n, (h, routing) in enumerate(layers):
            close(h[b].detach(), states[n + 1])
            assert np.array_equal(routing.runs[b], visited[:, n])
    close(model(ids, memory=memory).detach(), model.classifiers(4, layers[-1][0]).detach())
    whole = decode.step(model, ids, position_ids(ids), decode.Cache(model, 3, 16, memory), exits.full_depth)
    close(GPT.forward(model, ids, causal, model.encode(source)).detach(), whole.logits)


def test_decoding_is_the_papers(model, rule):
    """Copied states and routed caches with a source: token by token against explicit lists."""
    source, ids = texts(5, T=7), texts(T=10)
    steps, cache = by_steps(model, ids, rule, memory=model.encode(source))
    for b in range(3):
        row = ids[b].tolist(), in_loops(rule), source[b].tolist()
        logits, exit_at, visited, cached = loops(model).decode(*row)
        assert np.array_equal(steps.exit_at[b], exit_at) and np.array_equal(steps.visited[b], visited)
        close(steps.logits[b], logits)
        assert [used[b] for used in held(cache)] == list(cached)
    same(by_steps(model, ids, rule, 10, model.encode(source))[0], steps)


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
    assert batch.count == 12 + 8 + 2 and ours.keys() == theirs.keys() and any("encoder" in k for k in ours)
    for name, gradient in theirs.items():
        close(ours[name], gradient)


def search(model, sources, rule, beam, length_penalty=1.0):
    """The best translation of every source, of at most block_size - 1 tokens."""
    return decode.translate(model, sources, END, rule, beam, length_penalty)


@pytest.mark.parametrize("name, beam, length_penalty", [
    ("dense", 1, 1.0), ("tied", 2, 0.0), ("routed", 3, 0.5), ("separate, every block", 7, 2.0)])
def test_translations_are_the_naive_ones(name, rule, beam, length_penalty):
    """Rows of the cache, exits or scores that do not follow their hypothesis when the beam is reordered; rows
    of different lengths in one batch that disturb each other; scores that forget a token, the end token or
    the length; a beam wider than the vocabulary."""
    for seed in range(3):
        model = tiny_translator(seed, vocab=6, **MODELS[name])
        model.config.block_size = 7         # at most six tokens, for the sake of the loops
        sources, checker = rows((3, 1, 2), seed, vocab=6), loops(model)
        for source, text in zip(sources, search(model, sources, rule, beam, length_penalty), strict=True):
            score, ids = naive.beam(checker, source, in_loops(rule), END, 6, beam, length_penalty)
            assert tuple(text.ids) == (END, *ids)
            close(text.log_prob, score)
            _, exit_at, visited, _ = checker.decode(text.ids[:-1], in_loops(rule), source)
            assert np.array_equal(text.exit_at, exit_at) and np.array_equal(text.visited, visited)


def test_beam_one_is_greedy(model, rule):
    """Two ways to decode that differ, in text, exits or blocks; a text over its 2 S + 10 tokens."""
    memory = model.encode(*decode.pad(rows(), "cpu"))
    greedy = decode.generate(model, [[END]] * 3, 23, rule, temperature=0, eos_id=END, memory=memory)
    for source, a, b in zip(rows(), search(model, rows(), rule, 1), greedy, strict=True):
        n = min(2 * len(source) + 10, 23)
        assert a.ids == b.ids[:n + 1] and np.array_equal(a.exit_at, b.exit_at[:n])
        assert np.array_equal(a.visited, b.visited[:n])


def test_a_beam_sums_in_fp32():
    """Scores of many tokens in steps of a half, ranked by rounding."""
    with torch.autocast("cpu", torch.bfloat16):
        [text] = search(tiny_translator(routed="none").float(), rows((7,)), exits.full_depth, 2)
    steps = 16 * text.log_prob * (len(text.ids) - 1)
    assert len(text.ids) > 15 and abs(steps - round(steps)) > 1e-3


def test_sources_and_caches_that_cannot_be():
    """An index error deep inside instead of a sentence; a token written where there is no room."""
    model = tiny_translator()
    with pytest.raises(ValueError, match="source of 25 tokens exceeds the context of 24"):
        model.encode(texts(T=25))
    ids, memory = texts(rows=1, T=5), model.encode(texts(rows=1, T=3))
    with pytest.raises(ValueError, match="holds 4 tokens"):
        decode.step(model, ids, position_ids(ids), decode.Cache(model, 1, 4, memory), exits.full_depth)


def test_a_memory_serves_decoding_and_training():
    """Encoder output that decoding has read and training then cannot go back through."""
    model = tiny_translator().float()
    ids, memory = texts(1, rows=2, T=5), model.encode(texts(2, rows=2, T=7))
    with torch.autocast("cpu", torch.bfloat16):
        decode.generate(model, [[0], [0]], 3, exits.full_depth, memory=memory)
    GPT.forward(model, ids, memory=memory).sum().backward()
    assert model.blocks[0].cross.key_value.weight.grad.abs().sum() > 0


DECODERS = {
    "seq2seq": {"routed": "none"}, "separate classifiers": {"routed": "none", "classifier": "separate"},
    "gpt": {"routed": "none"}, "routed seq2seq": {}, "routed gpt": {},
    "router decides": {"causal_logit": "router"},
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
         *itertools.product(["routed seq2seq", "routed gpt", "router decides"], EVERY, ["copy"]),
         *itertools.product(KINDS, ["learned"], ["copy", "compute"])]


@pytest.mark.parametrize("name, rule, exited_kv", CASES)
def test_flops_are_those_that_run(name, rule, exited_kv):
    """The accounting against a hook on the matrix products of real decoding: a source that is projected again
    by every token or every use of a shared block, a predictor that decides again after every block or for
    every token of a sentence, copies that are made although no later token goes that deep, blocks that run at
    once where they are counted as if they ran late."""
    gpt = name in ("gpt", "routed gpt", "router decides")
    model = (tiny if gpt else tiny_translator)(4 if name == "token" else 0, **DECODERS[name])
    memory, ids = None if gpt else model.encode(texts(5, rows=1, T=7)), texts(rows=1, T=12)
    halting = EVERY.get(rule) or exits.learned(model)
    with Counter() as counter:
        steps, _ = by_steps(model, ids, halting, 1, memory, exited_kv)
    whole, _ = by_steps(model, ids, halting, 12, memory, exited_kv)
    counts = {}
    for part in ("visited", "exit_at", "classified", "predicted"):
        counts[part] = getattr(steps, part)[0].numpy()
        assert np.array_equal(counts[part], getattr(whole, part)[0]), part
    copies = "needed" if exited_kv == "copy" else "computed"
    counted = cost.decoding(model.config, V, **counts, S=7 if memory else 0, copies=copies)
    decided = 2 * 4 * 12 if name == "sequence" else 0                       # with the encoder output, above
    assert counted["flops"] + counted["copies"] / 2 == counter.flops + decided > 0    # a copy makes a query
    assert rule in RULES or name == "sequence" or len(set(counts["exit_at"])) > 1
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
        assert counted["flops"] == naive.flops(visited, classified, 16, 40, V, S, 12, copies == "needed")
        computed = cost.decoding(model.config, V, visited, exit_at, classified, S=S, copies="computed")
        caught_up = visited | naive.copies(visited)
        assert computed["flops"] == naive.flops(caught_up, classified, 16, 40, V, S, 12, True)


def test_bytes_of_a_full_pass():
    """Weights read once a token, keys and values once a look, by hand for one dense block."""
    model = tiny_translator(routed="none", n_layer=1)
    counted = cost.decoding(model.config, V, np.ones((2, 1), bool), np.ones(2, int), S=7, itemsize=2)
    weights = 2 * (12 * 256 // 2 + 2 * 40 * 16 + V * 16) + 2 * 16 * 12
    cache = 2 * 16 * ((1 + 2) + 2 * 7 + 2 + 7)      # seen, of the source, written, source written
    assert counted["bytes"] == 2 * (weights + cache)
