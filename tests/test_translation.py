"""The seq2seq Transformer: against loops from the paper, against torch's own blocks, and against itself."""
from types import SimpleNamespace

import numpy as np
import pytest
import reference_seq2seq as naive
import torch
import torch.nn.functional as F
from conftest import Counter, V, held, texts, tiny, tiny_translator
from test_equivalence import RULES, by_steps, close, in_loops, same

import cost
import decode
import exits
import train
from data.batches import Batch, pad_rows, positions_of
from model import GPT, position_ids
from routing import NO_POSITION, causal, predictor_loss, top_k

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


def rows(lengths=(7, 2, 12), seed=0):
    return [texts(seed + b, rows=1, T=T)[0].tolist() for b, T in enumerate(lengths)]


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


def options(**more):
    """What the objectives of train.py ask for."""
    return SimpleNamespace(**{"exit_weights": "1", "route": "top_k", "predictor_loss": 0.0, "paths": 1,
                              "label_smoothing": 0.0, "gradient_scale": 0.0, "alpha": 0.7,
                              "oracle": "correctness", "exit_cost": 0.1, "sigma": 0.0} | more)


def gradients(model, backward):
    """{name: gradient} after backward(), and what that returned."""
    model.zero_grad()
    returned = backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}, returned


def same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for k in theirs:
        close(ours[k], theirs[k])


# ----------------------------------------------------------------------------- one forward pass


def test_training_forward_is_the_papers(model):
    """A fault in encoder, cross-attention, their order in the block, or routing with a source."""
    source, ids = texts(5, T=7), texts()
    memory = model.encode(source)
    layers = list(model.run_layers(model.embed(ids), position_ids(ids), memory=memory))
    for b in range(3):
        states, visited, _, _ = loops(model).forward_top_k(ids[b].tolist(), source[b].tolist())
        for n, (h, routing) in enumerate(layers):
            close(h[b].detach(), states[n + 1])
            runs = routing.runs[b]
            assert np.array_equal(runs, visited[:, n])
    close(model(source, ids).detach(), model.classifiers(4, layers[-1][0]).detach())
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
    cache = decode.Cache(model, *ids.shape, model.encode(source))
    same(decode.step(model, ids, position_ids(ids), cache, rule), steps)


@pytest.mark.parametrize("route", [top_k, causal])
def test_padding_changes_nothing(model, route):
    """Padding that is attended to (in encoder, self- or cross-attention), routed, or counted in k."""
    batch = ragged()
    padded = list(model.run_batch(batch, route))
    for b in range(3):
        one = unpadded(batch, b)
        T = one.ids.size(1)
        for (h, routing), (alone, own) in zip(padded, model.run_batch(one, route), strict=True):
            close(h[b:b + 1, :T].detach(), alone.detach())
            assert torch.equal(routing.runs[b:b + 1, :T], own.runs) and not routing.runs[b, T:].any()


def test_the_loss_of_a_batch_is_that_of_its_rows(model):
    """Padding in a loss (of the exits, of the router), rows that weigh by their padded length, labels
    that are not smoothed, a report that is."""
    wish, batch = options(exit_weights="n", predictor_loss=0.3, label_smoothing=0.1), ragged()

    def together(parts):
        scale = 1 / batch.count
        return gradients(model, lambda: sum(train.aligned(model, part, scale, wish) for part in parts))

    def by_hand():
        loss, plain, given = 0, [], {"reduction": "sum", "ignore_index": -1}
        for n, (h, routing) in enumerate(model.run_batch(batch), 1):
            logits, targets = model.classifiers(n, h).flatten(0, 1), batch.targets.flatten()
            loss = loss + n / 10 * F.cross_entropy(logits, targets, **given, label_smoothing=0.1)
            plain.append(F.cross_entropy(logits, targets, **given).item())
            if routing.logit is not None:
                loss = loss + 0.3 * predictor_loss(routing, batch.live)
        (loss / batch.count).backward()
        return plain
    (a, whole), (b, alone) = together([batch]), together([unpadded(batch, b) for b in range(3)])
    assert batch.count == 12 + 8 + 2 and any("encoder" in k for k in a)
    c, plain = gradients(model, by_hand)
    close(whole, alone)
    close(whole, plain)
    same_gradients(a, b)
    same_gradients(a, c)


# ----------------------------------------------------------------------------- torch's own blocks


def test_blocks_are_torchs_transformer_blocks():
    """Against nn.TransformerEncoderLayer and nn.TransformerDecoderLayer, weights copied, no rotation."""
    model = tiny_translator(routed="none", enc_embd=16, enc_head=2)
    for block in (*model.blocks, *model.encoder.blocks):
        block.attn.rope[:, 0], block.attn.rope[:, 1] = 1, 0         # cos, sin
    source, ids = texts(5, T=7), texts(T=9)
    present = torch.arange(7) < torch.tensor([[7], [4], [1]])
    x = model.encoder.wte(source)
    for block in model.encoder.blocks:
        theirs = torch.nn.TransformerEncoderLayer(16, 2, 40, 0.0, F.gelu, batch_first=True, norm_first=True)
        x = copied(theirs, block)(x, src_key_padding_mask=~present)
    states = model.encoder.norm(x)
    ours = model.encode(source, torch.where(present, torch.arange(7), NO_POSITION))
    close(ours.states[present].detach(), states[present].detach())
    h, mask = model.wte(ids), torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    for block in model.blocks:
        theirs = torch.nn.TransformerDecoderLayer(16, 2, 40, 0.0, F.gelu, batch_first=True, norm_first=True)
        h = copied(theirs, block)(h, states, tgt_mask=mask, memory_key_padding_mask=~present)
    close(GPT.forward(model, ids, memory=ours).detach(), model.classifiers(4, h).detach())


def copied(theirs, block):
    """Our weights in a layer of torch's."""
    theirs, parts = theirs.double(), [(theirs.self_attn, block.attn, [block.attn.qkv])]
    if block.cross:
        parts.append((theirs.multihead_attn, block.cross, [block.cross.query, block.cross.key_value]))
    for attention, ours, projections in parts:
        for end in ("weight", "bias"):
            getattr(attention, f"in_proj_{end}").data = torch.cat([getattr(p, end) for p in projections]).data
        attention.out_proj.load_state_dict(ours.proj.state_dict())
    theirs.linear1.load_state_dict(block.mlp.fc.state_dict())
    theirs.linear2.load_state_dict(block.mlp.proj.state_dict())
    norms = [block.ln1, block.ln_cross, block.ln2] if block.cross else [block.ln1, block.ln2]
    for n, norm in enumerate(norms, 1):
        getattr(theirs, f"norm{n}").load_state_dict(norm.state_dict())
    return theirs


# ----------------------------------------------------------------------------- greedy and beam


def search(model, sources, rule, beam, longest, length_penalty=1.0):
    memory = model.encode(*decode.pad(sources, "cpu"))
    return decode.beam_search(model, [[END]] * len(sources), longest, rule, beam, causal, length_penalty,
                              END, memory)


@pytest.mark.parametrize("beam", [1, 2, 4])
def test_beam_search_is_the_naive_one(model, rule, beam):
    """Rows of the cache, exits or scores that do not follow their hypothesis when the beam is reordered;
    rows of different lengths in one batch that disturb each other; beam 1 that is not greedy decoding."""
    sources, longest, checked = rows((7, 2, 5)), [6, 4, 5], loops(model)
    results = search(model, sources, rule, beam, longest)
    for source, T, (best, trace) in zip(sources, longest, results, strict=True):
        every = []
        expected = naive.beam(checked, source, in_loops(rule), END, T, beam, 1.0, every)
        assert len(trace) == len(every)
        assert [tuple(text.ids[1:]) for text in best] == [ids for _, ids in expected]
        close([text.log_prob for text in best], [score for score, _ in expected])
        for text in best:
            _, exit_at, visited, _ = checked.decode(text.ids[:-1], in_loops(rule), source)
            assert np.array_equal(text.exit_at, exit_at) and np.array_equal(text.visited, visited)
        if beam == 1:
            assert best[0].ids[1:] == naive.greedy(checked, source, in_loops(rule), END, T)
            assert [taken.parent for taken in trace] == list(range(-1, len(best[0].ids) - 2))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all(rule, length_penalty):
    """Scores that forget a token, the end token or the length; by brute force over a vocabulary of five."""
    for seed in range(3):
        model = tiny_translator(seed, vocab=5, routed="none" if seed else "odd")
        best = search(model, [[1, 4, 2]], rule, 4 * 4 * 4 * 5, [4], length_penalty)[0][0][0]
        score, ids = naive.best_of_all(loops(model), [1, 4, 2], in_loops(rule), END, 4, length_penalty)
        assert tuple(best.ids[1:]) == ids
        close(best.log_prob, score)


def test_beam_one_is_greedy(model, rule):
    """Two ways to decode that differ, in text, exits or blocks."""
    memory = model.encode(*decode.pad(rows(), "cpu"))
    greedy = decode.generate(model, [[END]] * 3, 8, rule, temperature=0, eos_id=END, memory=memory)
    for ((a,), _), b in zip(search(model, rows(), rule, 1, [8] * 3), greedy, strict=True):
        assert a.ids == b.ids and np.array_equal(a.exit_at, b.exit_at)
        assert np.array_equal(a.visited, b.visited)


def test_translating_a_batch_is_translating_its_rows(model, rule):
    """Rows that disturb each other, or a translation longer than it may be."""
    sources = [r + [END] for r in rows()]
    together = decode.translate(model, sources, END, rule, beam=3)
    for (text, _), ids in zip(together, sources, strict=True):
        (alone, _), = decode.translate(model, [ids], END, rule, beam=3)
        assert text.ids == alone.ids and np.array_equal(text.visited, alone.visited)
        assert len(text.ids) - 1 <= min(2 * len(ids) + 10, model.config.block_size - 1)


def test_beam_search_serves_prompts_of_a_gpt():
    """A beam that only knows one-token prompts and sources."""
    model, prompts = tiny(), rows()
    results = decode.beam_search(model, prompts, [5, 5, 5], exits.full_depth, 2)
    for ((best, second), trace), prompt in zip(results, prompts, strict=True):
        assert len(trace) == len(prompt) + 2 * 4 and len(best.visited) == len(best.ids) - 1
        assert best.log_prob > second.log_prob and best.ids[:len(prompt)] == prompt
        assert len(best.ids) == len(prompt) + 5
        ids = torch.tensor([best.ids])
        whole = decode.step(model, ids, position_ids(ids), None, exits.full_depth)
        logp = whole.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        close(best.log_prob, logp[len(prompt) - 1:].sum() / 5)


def test_a_beam_sums_in_fp32():
    """Scores of forty tokens in steps of a half, ranked by rounding."""
    model = tiny_translator(routed="none").float()
    with torch.autocast("cpu", torch.bfloat16):
        memory = model.encode(texts(2, rows=1, T=7))
        [(best, _)] = decode.beam_search(model, [[0]], [15], exits.full_depth, 2, memory=memory)
    assert all((16 * text.log_prob * 15) % 1 != 0 for text in best)


def test_sources_and_caches_that_cannot_be(model):
    """An index error deep inside instead of a sentence; a token written where there is no room."""
    with pytest.raises(ValueError, match="source of 25 tokens exceeds the context of 24"):
        model.encode(texts(T=25))
    if model.config.embeddings == "tied":
        with pytest.raises(ValueError, match="one embedding cannot"):
            tiny_translator(embeddings="tied")
    ids, memory = texts(rows=1, T=5), model.encode(texts(rows=1, T=3))
    with pytest.raises(ValueError, match="holds 4 tokens"):
        decode.step(model, ids, position_ids(ids), decode.Cache(model, 1, 4, memory), exits.full_depth)


def test_a_memory_serves_decoding_and_training():
    """Keys and values made while decoding that training then cannot go back through, or that come in another
    type; rows given in another order."""
    model = tiny_translator().float()
    ids, memory = texts(1, rows=2, T=5), model.encode(texts(2, rows=2, T=7))
    with torch.autocast("cpu", torch.bfloat16):
        decode.generate(model, [[0], [0]], 3, exits.full_depth, memory=memory)
    turned = memory.reorder([1, 0])
    assert torch.equal(turned.states, memory.states[[1, 0]])
    assert all(torch.equal(turned.made[k][0], v[0][[1, 0]]) for k, v in memory.made.items()) and turned.made
    GPT.forward(model, ids, memory=memory).sum().backward()
    assert model.blocks[0].cross.key_value.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------- what it costs


def counts_of(outputs):
    """StepOutputs of one text -> what cost.decoding asks for."""
    return {name: torch.cat([getattr(output, name)[0] for output in outputs]).numpy()
            for name in ("visited", "exit_at", "classified", "predicted")}


def runs_and_counts(model, rule, exited_kv, memory=None):
    """Twelve tokens step by step -> FLOPs of the products that run, what `step` says it computed (which one
    call for all of them must say too)."""
    ids, ahead = texts(rows=1, T=12), memory and memory.reorder([0])
    pos, cache = position_ids(ids), decode.Cache(model, 1, 12, memory)
    with Counter() as counted:
        outputs = [decode.step(model, ids[:, t:t + 1], pos[:, t:t + 1], cache, rule, exited_kv=exited_kv)
                   for t in range(12)]
    counts, cache = counts_of(outputs), decode.Cache(model, 1, 12, ahead)
    for name, whole in counts_of([decode.step(model, ids, pos, cache, rule, exited_kv=exited_kv)]).items():
        assert np.array_equal(counts[name], whole), name
    return counted.flops, counts


DECODERS = {
    "seq2seq": {"routed": "none"}, "separate classifiers": {"routed": "none", "classifier": "separate"},
    "routed seq2seq": {},
    "gpt": {"routed": "none"}, "routed gpt": {}, "router decides": {"causal_logit": "router"},
    **{kind: {"routed": "none", "exit_predictor": kind} for kind in KINDS},
}


def looks_back(state):
    """Exits at random, and reads the first classifier when the second block has run."""
    if state.n == 2:
        state.logits(1)
    return exits.random_exit(4)(state)


EVERY = RULES | {"random": exits.random_exit(4), "looks back": looks_back}


def cases():
    """(model, rule, exited_kv): predictors under their own rule, the others under every rule; computed keys
    and values in dense models."""
    for name, config in DECODERS.items():
        for rule in ["learned"] if "exit_predictor" in config else EVERY:
            yield name, rule, "copy"
            if config.get("routed") == "none":
                yield name, rule, "compute"


@pytest.mark.parametrize("name, rule, exited_kv", list(cases()))
def test_flops_are_those_that_run(name, rule, exited_kv):
    """The accounting against a hook on the matrix products of real decoding: a source that is projected again
    by every token or every use of a shared block, a predictor that decides again after every block or for
    every token of a sentence, copies that are made although no later token goes that deep, blocks that run at
    once where they are counted as if they ran late."""
    gpt = name in ("gpt", "routed gpt", "router decides")
    model = (tiny if gpt else tiny_translator)(4 if name == "token" else 0, **DECODERS[name])
    memory = None if gpt else model.encode(texts(5, rows=1, T=7))
    flops, counts = runs_and_counts(model, EVERY.get(rule) or exits.learned(), exited_kv, memory)
    copies = "needed" if exited_kv == "copy" else "computed"
    counted = cost.decoding(model.config, V, **counts, S=7 if memory else 0, copies=copies)
    assert counted.flops + counted.copies / 2 == flops > 0      # and queries of copies, which are not needed
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
        assert counted.flops == naive.flops(visited, classified, 16, 40, V, S, 12, copies == "needed")
        assert counted.bytes > 0
        computed = cost.decoding(model.config, V, visited, exit_at, classified, S=S, copies="computed")
        caught_up = visited | naive.copies(visited)
        assert computed.flops == naive.flops(caught_up, classified, 16, 40, V, S, 12, True)


@pytest.mark.parametrize("needed", [False, True])
def test_flops_of_a_beam_are_those_of_every_token_it_read(rule, needed):
    """Texts that begin alike and are charged twice, hypotheses that were dropped and not charged, the source
    projected for each of them, copies that one hypothesis made and another did not."""
    model, source, every = tiny_translator(routed="none"), rows((6,))[0], []
    (_, trace), = search(model, [source], rule, 3, [7])
    naive.beam(loops(model), source, in_loops(rule), END, 7, 3, 1.0, every)
    expected, called = 0, set()
    for ids in every:
        _, exit_at, visited, _ = loops(model).decode(ids, in_loops(rule), source)
        classified = exit_at if rule is RULES["confidence"] else np.ones(len(ids))
        before, after = (naive.flops(visited[:T], classified[:T], 16, 40, V, 6, 0, needed) if T else 0
                         for T in (len(ids) - 1, len(ids)))
        expected += after - before
        called |= set(range(exit_at[-1]))
    columns = zip(decode.BeamStep._fields, zip(*trace, strict=True), strict=True)
    counts = {name: np.array(values) for name, values in columns if name not in ("token", "log_prob")}
    counted = cost.decoding(model.config, V, **counts, S=6, copies="needed" if needed else "paper")
    assert counted.flops == expected + 4 * 6 * 16 * 12 * len(called)


def test_bytes_of_a_full_pass():
    """Weights read once a token, keys and values once a look, by hand for one dense block."""
    model = tiny_translator(routed="none", n_layer=1)
    counted = cost.decoding(model.config, V, np.ones((2, 1), bool), np.ones(2, int), S=7, itemsize=2)
    weights = 2 * (12 * 256 // 2 + 2 * 40 * 16 + V * 16) + 2 * 16 * 12
    cache = 2 * 16 * ((1 + 2) + 2 * 7 + 2 + 7)      # seen, of the source, written, source written
    assert counted.bytes == 2 * (weights + cache)
