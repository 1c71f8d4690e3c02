"""Two ways to compute one thing agree: the project against loops from the papers, and against itself.

float64 throughout: decisions (exits, routes) must be equal, numbers close.
"""
from typing import NamedTuple

import numpy as np
import pytest
import reference
import torch
from conftest import held, texts, tiny

import decode
import exits
from data.batches import Batch
from model import MLP, Now, Tokens, positions
from routing import causal, top_k

MODELS = {
    "default": {},
    "dense": {"routed": "none"},
    "router decides": {"causal": "router"},
    "sigmoid gate, separate classifiers": {"gate": "sigmoid", "classifier": "separate", "routed": "0,2,3"},
    "every block": {"routed": "all", "capacity": 0.5},
}
RULES = {"full": exits.full_depth, "fixed": exits.fixed_exit(2),
         "confidence": exits.confidence([0.24, 0.2, 0.2]),
         "scattered": lambda seen: (1000 * seen.states[-1][..., 0]).remainder(1) < 0.3}     # no pattern


@pytest.fixture(params=MODELS, ids=list(MODELS))
def model(request):
    return tiny(**MODELS[request.param])


@pytest.fixture(params=RULES, ids=list(RULES))
def rule(request):
    return RULES[request.param]


def naive(model):
    c = model.config
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    return reference.Reference(weights, c.n_layer, c.n_head, c.capacity, c.gate)


def in_loops(rule):
    """A halting rule as the loops call it: one token's vectors instead of (B,T,...) tensors."""
    def single(array):
        return torch.from_numpy(np.asarray(array))[None, None]
    return lambda n, logits, h: bool(rule(exits.Seen(n, [single(h)], lambda n, h: single(logits),
                                                     torch.zeros(1, 1, dtype=torch.long))))


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-9)


class Parts(NamedTuple):
    """A Read, put together of several."""
    logits: torch.Tensor
    exit_at: torch.Tensor
    visited: torch.Tensor
    score: torch.Tensor
    worked: torch.Tensor


def by_steps(model, ids, rule, chunks=None, source=None, missing="copy"):
    """Read ids (B,T) through a cache, `chunks` tokens at a time -> (Parts, cache)."""
    B, T = ids.shape
    past, parts, t = decode.Cache(model, B, T, source), [], 0
    for size in chunks or [1] * T:
        part = slice(t, t + size)
        parts.append(decode.read(model, ids[:, part], positions(ids)[:, part], past, rule, causal,
                                 missing))
        t += size
    return Parts(*(torch.cat([getattr(p, name) for p in parts], 1) for name in Parts._fields)), past


def same(a, b):
    assert torch.equal(a.exit_at, b.exit_at) and torch.equal(a.visited, b.visited)
    close(a.logits, b.logits)


def test_training_forward_is_the_papers(model):
    """Any fault in the block, the gate, the residual, the order or number of selected tokens [MoD eq. 1]."""
    ids = texts()
    found = list(model.trunk(model.embed(ids), Tokens(positions(ids))))
    for b, row in enumerate(ids.tolist()):
        states, visited, scores, guesses = naive(model).forward_top_k(row)
        for n, (h, visit) in enumerate(found):
            close(h[b].detach(), states[n + 1])
            assert visited[:, n].all() if visit.ran is None else np.array_equal(visit.ran[b], visited[:, n])
            if visit.score is not None:
                close(visit.score[b].detach(), scores[:, n])
                close(visit.guess[b].detach(), guesses[:, n])


def test_decoding_is_the_papers(model, rule):
    """Copied states, routed caches, who exits where: token by token against explicit lists."""
    ids = texts(rows=1, T=10)
    found, past = by_steps(model, ids, rule)
    logits, exit_at, visited, cached = naive(model).decode(ids[0].tolist(), in_loops(rule))
    assert np.array_equal(found.exit_at[0], exit_at) and np.array_equal(found.visited[0], visited)
    close(found.logits[0], logits)
    assert [row for row, in held(past)] == list(cached)


@pytest.mark.parametrize("way", ["one pass", "steps of a batch"])
def test_a_batch_is_the_papers(model, rule, way):
    """States that go on changing after the exit: only a neighbour that is still running shows it."""
    ids = texts(rows=3, T=10)
    found = decode.read(model, ids, positions(ids), None, rule, causal)
    if way == "steps of a batch":
        found, _ = by_steps(model, ids, rule)
    if rule is RULES["scattered"]:
        assert found.exit_at.unique().tolist() == [1, 2, 3, 4]
    for b, row in enumerate(ids.tolist()):
        logits, exit_at, visited, _ = naive(model).decode(row, in_loops(rule))
        assert np.array_equal(found.exit_at[b], exit_at) and np.array_equal(found.visited[b], visited)
        close(found.logits[b], logits)


def test_scores_are_the_routers(model):
    """Another block's, another row's, the predictor's; a score where there is no router or nobody came."""
    ids = texts()
    at, gone = Tokens(positions(ids)), torch.tensor([4, 1, 4]).unsqueeze(1).expand(3, 16)
    found = decode.read(model, ids, at.pos, None, exits.chosen(gone), causal)
    with torch.no_grad():
        visits = [visit for _, visit in model.trunk(model.embed(ids), at, route=causal)]
    for n, visit in enumerate(visits):
        wanted = torch.full((3, 16), torch.nan)
        came = [0, 1, 2] if n == 0 else [0, 2]
        if visit.score is not None:
            wanted[came] = visit.score[came].float()
        torch.testing.assert_close(found.score[..., n], wanted, equal_nan=True)


def test_one_masked_pass_is_step_by_step(model, rule):
    """A prompt that does not follow the exit rule, or routes by anything but the past."""
    ids = texts()
    same(decode.read(model, ids, positions(ids), None, rule, causal), by_steps(model, ids, rule)[0])


@pytest.mark.parametrize("chunks", [[16], [5, 11], [1, 7, 1, 3, 4], [8, 3, 2, 1, 2]])
def test_any_chunking_of_the_prompt(model, rule, chunks):
    """A mask or a slot that is right only for one token, or only for an empty cache."""
    ids = texts()
    same(by_steps(model, ids, rule, chunks)[0], by_steps(model, ids, rule)[0])


def test_batched_ragged_generation_is_single(model, rule):
    """Padding that is attended, routed or counted; rows that share cache slots or random numbers."""
    rows = [texts(seed=b, rows=1, T=T)[0].tolist() for b, T in enumerate((7, 1, 4))]
    for temperature in (0, 1.0):
        batch = decode.generate(model, rows, 8, rule, temperature=temperature, top=9)
        for b, row in enumerate(rows):
            alone = decode.generate(model, [[0]] * b + [row], 8, rule, temperature=temperature, top=9)[b]
            assert batch[b].ids == alone.ids and batch[b].prompt == len(row)
            assert np.array_equal(batch[b].exit_at, alone.exit_at)
            assert np.array_equal(batch[b].visited, alone.visited)


def test_generation_is_reading(model, rule):
    """Greedy text, exits and visits from the cache are those of one pass over the finished text."""
    row = decode.generate(model, [[1, 2, 3]], 12, rule, temperature=0)[0]
    ids = torch.tensor([row.ids])
    whole = decode.read(model, ids, positions(ids), None, rule, causal)
    assert row.ids[3:] == whole.logits[0, 2:-1].argmax(-1).tolist()
    assert np.array_equal(row.exit_at, whole.exit_at[0, :-1])
    assert np.array_equal(row.visited, whole.visited[0, :-1])


def test_a_text_longer_than_the_context_is_refused():
    """Positions quietly clamped to the last one."""
    with pytest.raises(ValueError, match="exceed the context of 24"):
        tiny()(texts(T=25))


def test_padding_runs_nothing():
    """Padding or finished rows that are routed, counted, said to have left, or keep a block busy."""
    model = tiny()
    ids, pos = decode.pad([[1, 2, 3, 4, 5], [6, 7]], "cpu")
    for rule in RULES.values():
        found = decode.read(model, ids, pos, decode.Cache(model, 2, 5), rule, causal)
        assert not found.visited[1, 2:].any() and not found.logits[1, 2:].any()
        assert (found.exit_at[1, 2:] == 4).all()
        assert found.visited[0, :, 0].all() and found.visited[1, :2, 0].all()


def test_a_row_that_ended_changes_nothing_for_the_others():
    """Rows that ended still writing to the cache, or cutting the others off."""
    model = tiny()
    free = decode.generate(model, [[1], [2], [3]], 10, exits.full_depth, temperature=0)
    end = free[0].ids[4]
    stopped = decode.generate(model, [[1], [2], [3]], 10, exits.full_depth, temperature=0, end=end)
    for a, b in zip(free, stopped, strict=True):
        expected = a.ids[: a.ids.index(end, 1) + 1] if end in a.ids[1:] else a.ids
        assert b.ids == expected and len(b.exit_at) == len(b.ids) - 1
    assert len(stopped[0].ids) < len(free[0].ids)


@pytest.mark.parametrize("route", [top_k, causal])
def test_full_depth_reading_is_forward(model, route):
    """A trunk for decoding that differs from the one for training."""
    ids = texts()
    a = decode.read(model, ids, positions(ids), None, exits.full_depth, route)
    close(a.logits, model(ids, route).detach())
    assert (a.exit_at == 4).all()


def test_capacity_one_and_r_one_is_dense_bit_for_bit():
    """[MoD eq. 1] residual doubled or scaled by r: x + r f(x) must be x + f(x) exactly at r = 1."""
    routed, dense = tiny(capacity=1.0), tiny(routed="none")
    own = {k.replace(".block.", "."): v for k, v in routed.state_dict().items()}
    dense.load_state_dict({k: own[k] for k in dense.state_dict()})
    for block in routed.blocks[1::2]:
        block.gate = torch.ones_like
    ids = texts()
    for m in (routed, dense):
        m.float()
    assert torch.equal(routed(ids), dense(ids))


def test_batch_is_rows(model):
    """Top-k or targets of the flattened batch instead of each sequence (papers: row offset forgotten)."""
    ids = texts()
    for route in (top_k, causal):
        whole = decode.read(model, ids, positions(ids), None, exits.full_depth, route)
        for b in range(len(ids)):
            row = ids[b:b + 1]
            alone = decode.read(model, row, positions(row), None, exits.full_depth, route)
            assert torch.equal(whole.visited[b:b + 1], alone.visited)
            close(whole.logits[b:b + 1], alone.logits)


def test_a_bare_model_is_the_model(model):
    """A part called as ever or looked for in vain, a copied parameter, a change in place that is not seen."""
    ids, copy = texts(), decode.bare(model)
    close(copy(ids, causal).detach(), model(ids, causal).detach())
    assert all(a is b for a, b in zip(copy.parameters(), model.parameters(), strict=True))
    for a, b in zip(copy.modules(), model.modules(), strict=True):
        assert type(a) is not type(b) and isinstance(a, type(b))
        assert {*b._parameters, *b._buffers, *b._modules} <= {*vars(a)}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    close(copy(ids, causal).detach(), model(ids, causal).detach())


def full(model, ids):
    return decode.read(model, ids, positions(ids), None, exits.full_depth, top_k).logits


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "compiler"])
@pytest.mark.parametrize("part", ["blocks.0.mlp", "blocks.1.block.attn.qkv", "blocks.2.attn.proj"])
def test_who_watches_a_module_sees_it_called(part, how):
    """A call that goes around hooks, the user's own forward or the compiler."""
    def saw(*args):
        seen.append(args)

    def compiled(graph, _):
        return lambda *args: saw() or graph(*args)

    model, ids, seen = tiny(capacity=1.0), texts(), []
    wanted, module = full(model, ids), model.get_submodule(part)
    if how == "forward":
        forward, module.forward = module.forward, lambda *args: saw() or forward(*args)
    elif how == "compiler":
        torch.compiler.reset()
        module.compile(backend=compiled)
    else:
        (module.register_forward_hook if how == "hook" else module.register_forward_pre_hook)(saw)
    close(full(model, ids), wanted)
    assert seen


def test_a_new_forward_of_a_class_is_called(monkeypatch):
    """The one that a class had when it was first decoded with."""
    model, ids = tiny(), texts()
    wanted = full(model, ids)
    monkeypatch.setattr(MLP, "forward", lambda self, x, pos, route: (0 * x, None))
    assert not torch.equal(full(model, ids), wanted)


def test_some_rows_of_a_cache_are_few_slices():
    """Every row in its turn, rows of one slice equally full, and even distances in one slice."""
    rng = np.random.default_rng(0)
    for n in range(1, 13):
        rows, used = sorted(rng.choice(12, n, replace=False).tolist()), rng.integers(5, 7, n).tolist()
        found = decode.in_steps(rows, used)
        assert [b for _, these, _ in found for b in range(12)[these]] == rows
        assert [u for own, _, u in found for _ in range(n)[own]] == used
        assert len(decode.in_steps(rows, [5] * n)) <= (n + 1) // 2
    some = [(slice(0, 3), slice(1, 6, 2), 7), (slice(3, 4), slice(9, 10, 1), 7)]
    assert decode.in_steps([1, 3, 5, 9], [7] * 4) == some


@pytest.mark.parametrize("route", [top_k, causal])
def test_running_everybody_is_running_a_part_that_is_all(route):
    """A routed block gathers nothing when everybody runs; beside one that does not, the same is gathered."""
    model = tiny(routed="all", capacity=1.0)
    block, x = model.blocks[0], torch.randn(2, 6, 16, dtype=torch.float64)
    with torch.no_grad():
        block.predictor[-1].bias += 100
        whole, visit = block(x, Tokens(positions(x[..., 0])), Now(), route)
        live = torch.ones(2, 6, dtype=torch.bool)
        live[1, 3:] = False
        gathered, some = block(x, Tokens(positions(x[..., 0]), live), Now(), route)
    assert visit.ran.all() and (some.ran == live).all()
    close(gathered[live], whole[live])
    close(gathered[~live], x[~live])


def test_gradients_exit_by_exit_are_those_of_the_sum(model, monkeypatch):
    """The aligned loss walked back with one logits tensor alive, in chunks, is the naive sum of losses."""
    from types import SimpleNamespace

    from routing import imitation_loss
    from train import aligned
    monkeypatch.setattr(exits, "CHUNK", 5 * 23)
    ids, targets = texts(1), texts(2)
    options = SimpleNamespace(exit_weights="sqrt(n)", imitation=0.3, label_smoothing=0.0, gradient_scale=0.0)
    sums = aligned(model, Batch(ids, targets, positions(ids)), 1 / ids.numel(), options)
    ours = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, w = 0, [n**0.5 for n in (1, 2, 3, 4)]
    for n, (h, visit) in enumerate(model.trunk(model.embed(ids), Tokens(positions(ids))), 1):
        nats = exits.nats(model.classifiers(n, h), targets).sum()
        close(nats.item(), sums[n - 1])
        loss = loss + nats * w[n - 1] / sum(w)
        if visit.guess is not None:
            loss = loss + 0.3 * imitation_loss(visit)
    (loss / ids.numel()).backward()
    theirs = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for k in theirs:
        close(ours[k], theirs[k])


def test_losses_are_the_papers(model):
    """The aligned loss and the imitation loss against sums written out by hand."""
    from routing import imitation_loss
    ids, targets = texts(1, rows=1), texts(2, rows=1)
    loops = naive(model)
    expected = loops.losses(ids[0].tolist(), targets[0].tolist())
    _, visited, _, guesses = loops.forward_top_k(ids[0].tolist())
    for n, (h, visit) in enumerate(model.trunk(model.embed(ids), Tokens(positions(ids))), 1):
        close(exits.nats(model.classifiers(n, h), targets).sum().item(), expected[n])
        if visit.guess is not None:
            close(imitation_loss(visit).item(), reference.bce(guesses[:, n - 1], visited[:, n - 1]))
