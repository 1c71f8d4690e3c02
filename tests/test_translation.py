"""The seq2seq Transformer: against loops from the paper, against torch's own blocks, and against itself."""
import itertools

import numpy as np
import pytest
import reference_seq2seq as naive
import torch
import torch.nn.functional as F
from conftest import V, held, texts, tiny, tiny_translator
from test_equivalence import RULES, by_steps, close, in_loops, same

import cost
import decode
import exits
from data.batches import Batch, fill, places
from model import Now, Tokens, positions
from routing import FAR, causal, imitation_loss, top_k

MODELS = {
    "dense": {"routed": "none"},
    "tied": {"routed": "none", "embeddings": "tied", "enc_embd": 16, "enc_head": 2},
    "routed": {"routed": "odd"},
    "separate, every block": {"routed": "all", "classifier": "separate", "gate": "sigmoid", "capacity": 0.5},
}


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


def rows(count=3, lengths=(7, 2, 12), seed=0):
    return [texts(seed + b, rows=1, T=T)[0].tolist() for b, T in zip(range(count), lengths, strict=False)]


def ragged(source, target):
    """Lists of ids -> Batch whose targets are the next tokens."""
    def padded(lists, value):
        return fill([np.array(r) for r in lists], [len(r) for r in lists], value)
    there = places([len(r) - 1 for r in target])
    return Batch(padded([r[:-1] for r in target], 0), padded([r[1:] for r in target], -1), there,
                 (padded(source, 0), places([len(r) for r in source])))


def unpadded(batch, b):
    """Row b of a Batch by itself."""
    t, s = int(batch.live[b].sum()), int((batch.source[1][b] < FAR).sum())
    source = tuple(x[b:b + 1, :s] for x in batch.source)
    return Batch(batch.ids[b:b + 1, :t], batch.targets[b:b + 1, :t], batch.pos[b:b + 1, :t], source)


# ----------------------------------------------------------------------------- one forward pass


def test_training_forward_is_the_papers(model):
    """A fault in encoder, cross-attention, their order in the block, or routing with a source."""
    source, ids = texts(5, T=7), texts()
    found = list(model.trunk(model.embed(ids), Tokens(positions(ids)), [Now(model.encode(source))] * 4))
    for b in range(3):
        states, visited, scores, guesses = loops(model).forward_top_k(ids[b].tolist(), source[b].tolist())
        for n, (h, visit) in enumerate(found):
            close(h[b].detach(), states[n + 1])
            assert visited[:, n].all() if visit.ran is None else np.array_equal(visit.ran[b], visited[:, n])
    close(model(source, ids).detach(), model.classifiers(4, found[-1][0]).detach())
    whole = decode.read(model, ids, positions(ids), decode.Cache(model, 3, 16, model.encode(source)),
                        exits.full_depth, causal)
    close(model.decode(model.encode(source), ids, causal).detach(), whole.logits)


def test_decoding_is_the_papers(model, rule):
    """Copied states and routed caches with a source: token by token against explicit lists."""
    source, ids = texts(5, T=7), texts(T=10)
    found, past = by_steps(model, ids, rule, source=model.encode(source))
    for b in range(3):
        row = ids[b].tolist(), in_loops(rule), source[b].tolist()
        logits, exit_at, visited, cached = loops(model).decode(*row)
        assert np.array_equal(found.exit_at[b], exit_at) and np.array_equal(found.visited[b], visited)
        close(found.logits[b], logits)
        assert [rows[b] for rows in held(past)] == list(cached)
    past = decode.Cache(model, *ids.shape, model.encode(source))
    whole = decode.read(model, ids, positions(ids), past, rule, causal)
    same(whole, found)


@pytest.mark.parametrize("route", [top_k, causal])
def test_padding_changes_nothing(model, route):
    """Padding that is attended to (in encoder, self- or cross-attention), routed, or counted in k."""
    batch = ragged(rows(), rows(lengths=(13, 9, 3), seed=9))
    padded = list(model.states(batch, route))
    for b in range(3):
        one = unpadded(batch, b)
        for (h, visit), (own, own_visit) in zip(padded, model.states(one, route), strict=True):
            close(h[b:b + 1, :one.ids.size(1)].detach(), own.detach())
            assert torch.equal(visit.ran[b:b + 1, :one.ids.size(1)], own_visit.ran)
            assert not visit.ran[b, one.ids.size(1):].any()


def test_the_loss_of_a_batch_is_that_of_its_rows(model):
    """Padding in a loss (of the exits, of the router), or rows that weigh by their padded length."""
    from types import SimpleNamespace

    from train import aligned
    options = SimpleNamespace(exit_weights="n", imitation=0.3, label_smoothing=0.1, gradient_scale=0.0)
    batch = ragged(rows(), rows(lengths=(13, 9, 3), seed=9))

    def gradients(parts):
        model.zero_grad()
        sums = sum(aligned(model, part, 1 / batch.count, options) for part in parts)
        return sums, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    (whole, a), (alone, b) = gradients([batch]), gradients([unpadded(batch, b) for b in range(3)])
    assert batch.count == 12 + 8 + 2 and a.keys() == b.keys() and any("encoder" in k for k in a)
    close(whole, alone)
    for k in a:
        close(a[k], b[k])
    model.zero_grad()       # and written out
    loss = 0
    for n, (h, visit) in enumerate(model.states(batch), 1):
        logits = model.classifiers(n, h).flatten(0, 1)
        loss = loss + n / 10 * F.cross_entropy(logits, batch.targets.flatten(), reduction="sum",
                                               ignore_index=-1, label_smoothing=0.1)
        if visit.guess is not None:
            loss = loss + 0.3 * imitation_loss(visit, batch.live)
    (loss / batch.count).backward()
    for k, p in model.named_parameters():
        if p.grad is not None:
            close(a[k], p.grad)


def test_label_smoothing_can_be_told_from_its_report():
    """The reported loss growing with the smoothing, or the gradient ignoring it."""
    model = tiny_translator(routed="none")
    h, targets = torch.randn(2, 5, 16, dtype=torch.float64), texts(T=5)[:2]
    (plain, _, g), (same_plain, _, smooth) = (
        exits.loss_and_gradient(model.classifiers, 2, h, targets, 1.0, s) for s in (0.0, 0.2))
    close(plain, same_plain)
    assert not torch.allclose(g, smooth)


def test_source_keys_and_values_are_made_once_at_the_first_visit(monkeypatch):
    """A decoder that projects the source again for every token, or for blocks that nobody reaches."""
    from model import CrossAttention
    calls, honest = [], CrossAttention.keys_values
    monkeypatch.setattr(CrossAttention, "keys_values",
                        lambda self, s: calls.append(self.key_value.weight) or honest(self, s))
    model, ids = tiny_translator(routed="none"), texts(T=6)
    calls.clear()
    source = model.encode(texts(5, T=7))
    past = decode.Cache(model, 3, 6, source)
    for t in range(6):
        e = 3 if t == 4 else 2
        decode.read(model, ids[:, t:t + 1], positions(ids)[:, t:t + 1], past, exits.fixed_exit(e), causal)
        assert [*map(id, calls)] == [id(b.cross.key_value.weight) for b in model.blocks[:3 if t >= 4 else 2]]
    decode.read(model, ids, positions(ids), decode.Cache(model, 3, 6, source), exits.fixed_exit(3), causal)
    assert len(calls) == 3


# ----------------------------------------------------------------------------- torch's own blocks


def test_blocks_are_torchs_transformer_blocks():
    """Against nn.TransformerEncoderLayer and nn.TransformerDecoderLayer, weights copied, no rotation."""
    model = tiny_translator(routed="none", enc_embd=16, enc_head=2)
    for block in (*model.blocks, *model.encoder.blocks):
        block.attn.rope[..., 0], block.attn.rope[..., 1] = 1, 0
    source, ids = texts(5, T=7), texts(T=9)
    there = torch.arange(7) < torch.tensor([[7], [4], [1]])
    x = model.encoder.wte(source)
    for block in model.encoder.blocks:
        theirs = torch.nn.TransformerEncoderLayer(16, 2, 40, 0.0, F.gelu, batch_first=True, norm_first=True)
        x = copied(theirs, block)(x, src_key_padding_mask=~there)
    states = model.encoder.norm(x)
    ours = model.encode(source, torch.where(there, torch.arange(7), FAR))
    close(ours.states[there].detach(), states[there].detach())
    h, mask = model.wte(ids), torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    for block in model.blocks:
        theirs = torch.nn.TransformerDecoderLayer(16, 2, 40, 0.0, F.gelu, batch_first=True, norm_first=True)
        h = copied(theirs, block)(h, states, tgt_mask=mask, memory_key_padding_mask=~there)
    close(model.decode(ours, ids).detach(), model.classifiers(4, h).detach())


def copied(theirs, block):
    """Our weights in a layer of torch's."""
    pairs = [(theirs.self_attn, block.attn)] + ([(theirs.multihead_attn, block.cross)] if block.cross else [])
    theirs = theirs.double()
    for attention, ours in pairs:
        for end in ("weight", "bias"):
            parts = [getattr(part, end) for part in ([ours.qkv] if hasattr(ours, "qkv") else
                                                     [ours.query, ours.key_value])]
            getattr(attention, f"in_proj_{end}").data = torch.cat(parts).data
        attention.out_proj.load_state_dict(ours.proj.state_dict())
    theirs.linear1.load_state_dict(block.mlp.fc.state_dict())
    theirs.linear2.load_state_dict(block.mlp.proj.state_dict())
    norms = [block.ln1, block.ln_cross, block.ln2] if block.cross else [block.ln1, block.ln2]
    for n, norm in enumerate(norms, 1):
        getattr(theirs, f"norm{n}").load_state_dict(norm.state_dict())
    return theirs


# ----------------------------------------------------------------------------- greedy and beam


END = 3


def search(model, sources, rule, beam, new, penalty=1.0):
    source = model.encode(*decode.pad(sources, "cpu"))
    return decode.beam_search(model, [[END]] * len(sources), new, rule, beam, penalty=penalty, end=END,
                              source=source)


@pytest.mark.parametrize("beam", [1, 2, 4])
def test_beam_search_is_the_naive_one(model, rule, beam):
    """Rows of the cache, exits or scores that do not follow their hypothesis when the beam turns; and rows of
    different lengths in one batch that disturb each other."""
    sources, new, checked = rows(lengths=(7, 2, 5)), [6, 4, 5], loops(model)
    found = search(model, sources, rule, beam, new)
    for source, longest, (texts_, reads) in zip(sources, new, found, strict=True):
        every = []
        expected = naive.beam(checked, source, in_loops(rule), END, longest, beam, 1.0, every)
        assert len(reads.parent) == len(every)
        assert [tuple(t.ids[1:]) for t in texts_] == [ids for _, ids in expected]
        close([t.score for t in texts_], [score for score, _ in expected])
        for text in texts_:
            _, exit_at, visited, _ = checked.decode(text.ids[:-1], in_loops(rule), source)
            assert np.array_equal(text.exit_at, exit_at) and np.array_equal(text.visited, visited)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all(rule, penalty):
    """Scores that forget a token, `end` or the length; by brute force over a vocabulary of five."""
    for seed in range(3):
        model = tiny_translator(seed, vocab=5, routed="none" if seed else "odd")
        source = [1, 4, 2]
        best = search(model, [source], rule, 4 * 4 * 4 * 5, [4], penalty)[0][0][0]
        score, ids = naive.best_of_all(loops(model), source, in_loops(rule), END, 4, penalty)
        assert tuple(best.ids[1:]) == ids
        close(best.score, score)


def test_beam_one_is_greedy(model, rule):
    """Two ways to decode that differ, in text, exits or blocks."""
    sources = rows()
    found = search(model, sources, rule, 1, [8, 8, 8])
    source = model.encode(*decode.pad(sources, "cpu"))
    greedy = decode.generate(model, [[END]] * 3, 8, rule, temperature=0, end=END, source=source)
    for ((a,), reads), b, ids in zip(found, greedy, sources, strict=True):
        assert reads.parent == list(range(-1, len(a.ids) - 2))
        assert a.ids == b.ids and np.array_equal(a.exit_at, b.exit_at)
        assert np.array_equal(a.visited, b.visited)
        assert a.ids[1:] == naive.greedy(loops(model), ids, in_loops(rule), END, 8)


def test_translating_a_batch_is_translating_its_rows(model, rule):
    sources = [r + [END] for r in rows()]
    together = decode.translate(model, sources, END, rule, beam=3)
    for (text, _), ids in zip(together, sources, strict=True):
        (alone, _), = decode.translate(model, [ids], END, rule, beam=3)
        assert text.ids == alone.ids and np.array_equal(text.visited, alone.visited)
        assert len(text.ids) - 1 <= decode.longest(len(ids), model.config.block_size)


def test_beam_search_serves_prompts_of_a_gpt():
    """A beam that only knows one-token prompts and sources."""
    model, prompts = tiny(), rows()
    found = decode.beam_search(model, prompts, [5, 5, 5], exits.full_depth, 2)
    for ((best, second), reads), prompt in zip(found, prompts, strict=True):
        assert len(reads.parent) == len(prompt) + 2 * 4 and len(best.visited) == len(best.ids) - 1
        assert best.score > second.score and best.ids[:len(prompt)] == prompt
        assert len(best.ids) == len(prompt) + 5
        ids = torch.tensor([best.ids])
        whole = decode.read(model, ids, positions(ids), None, exits.full_depth, causal)
        logp = whole.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        close(best.score, logp[len(prompt) - 1:].sum() / 5)


def test_sources_that_cannot_be(model):
    with pytest.raises(ValueError, match="source of 25 tokens exceeds the context of 24"):
        model.encode(texts(T=25))
    assert decode.longest(3, 128) == 16 and decode.longest(100, 128) == 127
    if model.config.embeddings == "tied":
        with pytest.raises(ValueError, match="one embedding cannot"):
            tiny_translator(embeddings="tied")


# ----------------------------------------------------------------------------- what it costs


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Two FLOPs for every multiply-add of the matrix products that really run."""
    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("linear", "matmul", "scaled_dot_product_attention"):    # inference mode shows them whole
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[-2:] if "add" in name else args[:2]
            self.flops += 2 * a.numel() * b.shape[-1]
        elif name.startswith("_scaled_dot_product") and "backward" in name:
            _, q, k = args[:3]
            self.flops += 8 * q.numel() * k.shape[-2]
        elif name.startswith("_scaled_dot_product"):
            q, k = args[:2]
            self.flops += 4 * q.numel() * k.shape[-2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["seq2seq", "seq2seq, separate classifiers", "gpt", "routed gpt",
                                  "router decides", "routed seq2seq"])
def test_flops_are_those_that_run(kind, rule):
    """The accounting against a hook on the matrix products of real decoding, token by token: copies are made
    when a later token attends to them."""
    if "seq2seq" in kind:
        model = tiny_translator(routed="odd" if "routed" in kind else "none",
                                classifier="separate" if "separate" in kind else "tied")
    else:
        model = tiny(routed="none" if kind == "gpt" else "odd",
                     causal="router" if kind == "router decides" else "predictor")
    ids, source = texts(rows=1, T=12), None
    if "seq2seq" in kind:
        source = model.encode(texts(5, rows=1, T=7))
    with Counter() as counted:
        read, _ = by_steps(model, ids, rule, source=source)
    found = cost.decoding(model.config, V, read.visited[0].numpy(), read.exit_at[0].numpy(),
                          "confidence" if rule is RULES["confidence"] else "", 7 if source else 0, "needed")
    assert found.flops + found.copies / 2 == counted.flops > 0      # and their queries, which nobody needs


@pytest.mark.parametrize("S", [0, 7])
@pytest.mark.parametrize("confident, copies", list(itertools.product([False, True], ["paper", "needed"])))
def test_flops_are_the_papers(S, confident, copies):
    """Both accountings against the loops over tokens and blocks."""
    model = tiny_translator(routed="none")
    for seed in range(5):
        exit_at = np.random.default_rng(seed).integers(1, 5, 11)
        visited = np.arange(4) < exit_at[:, None]
        decides = "confidence" if confident else ""
        found = cost.decoding(model.config, V, visited, exit_at, decides, S, copies)
        expected = naive.flops(visited, exit_at, 16, 40, V, S, 12, [True] * 4, confident, copies == "needed")
        assert found.flops == expected and found.bytes > 0
        caught_up = visited | naive.copies(visited, [True] * 4)
        computed = cost.decoding(model.config, V, visited, exit_at, decides, S, "computed")
        expected = naive.flops(caught_up, exit_at, 16, 40, V, S, 12, [True] * 4, confident, True)
        assert computed.flops == expected


@pytest.mark.parametrize("needed", [False, True])
def test_flops_of_a_beam_are_those_of_every_token_it_read(rule, needed):
    """Texts that begin alike and are charged twice, hypotheses that were dropped and not charged, the source
    projected for each of them, copies that one hypothesis made and another did not."""
    model, source, every = tiny_translator(routed="none"), rows(lengths=(6,))[0], []
    (_, reads), = search(model, [source], rule, 3, [7])
    naive.beam(loops(model), source, in_loops(rule), END, 7, 3, 1.0, every)
    confident, expected, called = rule is RULES["confidence"], 0, set()
    for ids in every:
        _, exit_at, visited, _ = loops(model).decode(ids, in_loops(rule), source)
        part = [naive.flops(visited[:T], exit_at[:T], 16, 40, V, 6, 0, [True] * 4, confident, needed)
                for T in (len(ids) - 1, len(ids))]
        expected += part[1] - part[0]
        called |= set(range(exit_at[-1]))
    found = cost.decoding(model.config, V, np.array(reads.visited), np.array(reads.exit_at),
                          "confidence" if confident else "", 6, "needed" if needed else "paper",
                          parent=reads.parent)
    assert found.flops == expected + 4 * 6 * 16 * 12 * len(called)


@pytest.mark.parametrize("kind, flops", [("sequence", 2 * 4 * 12), ("token", 3 * 2 * 4 * 16),
                                         ("geometric", 2 * 16 * 7), ("binary", 2 * 16 * 7)])
def test_flops_of_looking(kind, flops):
    """Exits 1, 3 and 4 of 4: the last block asks nobody."""
    model, exit_at = tiny_translator(routed="none"), np.array([1, 3, 4])
    visited = np.arange(4) < exit_at[:, None]
    found = [cost.decoding(model.config, V, visited, exit_at, decides, 5).flops for decides in (kind, "")]
    assert found[0] - found[1] == flops


def test_bytes_of_a_full_pass():
    """Weights read once a token, keys and values once a look, by hand for one dense block."""
    model = tiny_translator(routed="none", n_layer=1)
    found = cost.decoding(model.config, V, np.ones((2, 1), bool), np.ones(2, int), S=7, itemsize=2)
    weights = 2 * (12 * 256 // 2 + 2 * 40 * 16 + V * 16) + 2 * 16 * 12
    cache = 2 * 16 * ((1 + 2) + 2 * 7 + 2 + 7)      # seen, of the source, written, source written
    assert found.bytes == 2 * (weights + cache)


def test_a_source_serves_decoding_and_training():
    """Keys and values made while decoding that training then cannot go back through, or that come in another
    type; rows given in another order."""
    model = tiny_translator().float()
    ids, source = texts(1, rows=2, T=5), model.encode(texts(2, rows=2, T=7))
    with torch.autocast("cpu", torch.bfloat16):
        decode.generate(model, [[0], [0]], 3, exits.full_depth, source=source)
    model.decode(source, ids).sum().backward()
    assert model.blocks[0].cross.key_value.weight.grad.abs().sum() > 0
    turned = source.select([1, 0], 1)
    assert torch.equal(turned.states, source.states[[1, 0]])


def test_shared_blocks_look_at_the_source_once():
    """Keys and values of the source charged for each run of one block."""
    model = tiny_translator(routed="none", share_blocks=True)
    ids, source = texts(rows=1, T=6), model.encode(texts(5, rows=1, T=7))
    with Counter() as counted:
        read, _ = by_steps(model, ids, RULES["full"], source=source)
    found = cost.decoding(model.config, V, read.visited[0].numpy(), read.exit_at[0].numpy(), "", 7, "needed")
    assert found.flops == counted.flops > 0


def test_a_full_cache_says_so():
    """A token more than there is room for, written where nobody looks."""
    model = tiny(routed="none")
    past, ids = decode.Cache(model, 1, 4), texts(rows=1, T=5)
    with pytest.raises(ValueError, match="holds 4 tokens"):
        decode.read(model, ids, positions(ids), past, exits.full_depth, causal)


def test_a_beam_sums_in_fp32():
    """Scores of forty tokens in steps of a half, ranked by rounding."""
    model = tiny_translator(routed="none").float()
    with torch.autocast("cpu", torch.bfloat16):
        source = model.encode(texts(2, rows=1, T=7))
        [(found, _)] = decode.beam_search(model, [[0]], [15], exits.full_depth, 2, source=source)
    assert all((16 * t.score * 15) % 1 != 0 for t in found)
