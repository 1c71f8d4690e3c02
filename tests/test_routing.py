"""Every fault of the open Mixture-of-Depths re-implementations that can be expressed here is caught.

The numbers are the list in docs/papers.md, "What others got wrong". Faults 1 to 3 and 9 are also caught by
the comparison with the loops in test_equivalence.py.
"""
import contextlib
import inspect

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import held, one_pass, texts, tiny
from test_equivalence import by_steps, close, naive

import decode
import exits
from data.batches import Batch
from model import position_ids
from routing import NO_POSITION, Routed, Routing, causal, confusion, places_of, predictor_loss, report, top_k


def routings(model, ids, route=top_k):
    return [routing for _, routing in model.run_layers(model.embed(ids), position_ids(ids), route=route)]


def sum_of_predictor_losses(model, ids):
    return sum(predictor_loss(routing) for routing in routings(model, ids) if routing.logit is not None)


def with_gradient(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


class Echo(nn.Module):
    """A block whose update is 5; it notes what it was given."""

    def residual(self, x, pos, cache, memory, route):
        self.x, self.pos = x, pos
        return torch.full_like(x, 5.0), None


def routed(capacity=0.5, **options):
    torch.manual_seed(0)
    return Routed(Echo(), 8, capacity, **options).double()


def states(B=2, T=6):
    """x (B,T,8) and its positions 0..T-1."""
    return torch.randn(B, T, 8, dtype=torch.float64), torch.arange(T).expand(B, T)


def test_1_2_3_10_a_routed_block_in_small():
    """1: r (x + f) or 2x + ... instead of x + r f(x), with f = 5. 2, 3: selected tokens renumbered 0..k-1, or
    handed on in order of weight. 10: a predictor fed the output, which a skipped token does not have."""
    block, (x, _) = routed(), states()
    pos = torch.tensor([[3, 4, 5, 9, 10, 11], [0, 1, 2, 3, 4, 5]])
    out, routing = block(x, pos)
    expected = x + torch.where(routing.runs, 5 * routing.weight, 0).unsqueeze(-1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for b in range(2):
        assert block.block.pos[b].tolist() == pos[b][routing.runs[b]].tolist()
        assert torch.equal(block.block.x[b], x[b][routing.runs[b]])
    assert torch.equal(routing.logit, block.predictor(x).squeeze(-1))


def test_2_a_routed_cache_keeps_the_original_positions():
    """2: a cache that numbers its own slots."""
    model, ids = tiny(), texts(rows=2)
    cache = decode.Cache(model, 2, 16)
    visited = one_pass(model, ids, cache=cache).visited[..., 1]
    assert 0 < visited.sum() < 32
    for b in range(2):
        positions = visited[b].nonzero().squeeze(1).tolist()
        assert cache.layers[1].pos[b, : len(positions)].tolist() == positions
        assert (cache.layers[1].pos[b, len(positions):] == NO_POSITION).all()


def test_4_the_gate_depends_on_one_token():
    """4: a softmax over the sequence as gate: the weight of a token would change with the others'."""
    block, (x, pos) = routed(capacity=1.0), states(B=1)
    before, other = block(x, pos)[0], x.clone()
    other[0, 5] += 1
    after = block(other, pos)[0]
    assert torch.equal(before[0, :5], after[0, :5]) and not torch.equal(before[0, 5], after[0, 5])


def test_5_each_row_selects_and_learns_by_itself():
    """5: targets or top-k of the flattened batch: row 0 has the largest weights, row 1 still selects k."""
    weight = torch.stack([torch.arange(8.0) + 100, -torch.arange(8.0)])
    runs = top_k(weight, weight, weight > -1e9, 3 / 8)
    assert [row.nonzero().flatten().tolist() for row in runs] == [[5, 6, 7], [0, 1, 2]]
    sure = torch.where(runs, 50.0, -50.0)
    assert predictor_loss(Routing(runs, None, sure)) < 1e-6
    assert predictor_loss(Routing(runs.flip(0), None, sure)) > 100


def test_of_equal_weights_the_earlier_token_goes_first():
    """A selection that differs between machines and batch sizes: torch.topk promises no order."""
    runs = top_k(torch.zeros(2, 600), None, torch.ones(2, 600, dtype=torch.bool), 0.125)
    assert runs[:, :75].all() and not runs[:, 75:].any()


@pytest.mark.parametrize("T", range(1, 13))
def test_6_exactly_k_tokens_even_when_all_weights_are_equal(T):
    """6: `weight > k-th weight` routes fewer than k; int(0.125 T) = 0 below 8 tokens."""
    block, (x, pos) = routed(capacity=0.125), states(T=T)
    nn.init.zeros_(block.router.weight)
    assert (block(x, pos)[1].runs.sum(1) == max(1, round(T / 8))).all()


def test_7_a_single_token_can_be_skipped():
    """7: top-k while decoding routes every token, since the best of one token is that token."""
    visited = one_pass(tiny(), texts(rows=16, T=1)).visited[..., 1]
    assert 0 < visited.float().mean() < 1
    for function in (decode.step, decode.generate, decode.speculate, decode.beam_search, decode.translate):
        assert inspect.signature(function).parameters["route"].default is causal


def test_8_empty_slots_are_never_seen(monkeypatch):
    """8: zero keys attended to: garbage in every slot that no token has filled must not change anything."""
    def grow_by_garbage(layer, size, k):
        before = 0 if layer.kv is None else layer.kv.size(3)
        grow(layer, size, k)
        layer.kv[:, :, :, before:] = 37.0

    grow = decode.LayerCache.grow
    monkeypatch.setattr(decode.LayerCache, "grow", grow_by_garbage)
    model, ids = tiny(block_size=200), texts(rows=2, T=150)
    whole, (steps, cache) = one_pass(model, ids), by_steps(model, ids, exits.full_depth)
    monkeypatch.undo()
    clean = one_pass(model, ids)
    for output in (whole, steps):
        close(output.logits, clean.logits)
    assert torch.equal(torch.tensor(held(cache)).T, clean.visited.sum(1))               # (B,L)


def test_keys_and_values_take_memory_as_tokens_come():
    """Slots for a whole text in a block that runs part of it, or in one that no token reaches; or so few more
    at a time that everything is copied again and again."""
    model, ids = tiny(n_layer=4, block_size=512), texts(rows=2, T=400)
    for rule, reached in ((exits.full_depth, 4), (exits.fixed_exit(2), 2)):
        cache, sizes = decode.Cache(model, 2, 400), [set() for _ in range(4)]
        for part in ids.split(2, 1):
            decode.step(model, part, position_ids(part) + cache.end, cache, rule)
            for layer, seen in zip(cache.layers[:reached], sizes, strict=False):
                slots = 0 if layer.kv is None else layer.kv.size(3)
                seen.add(slots)
                assert max(layer.used) <= slots <= max(64, 2 * max(layer.used))
        assert all(layer.kv is None for layer in cache.layers[reached:])
        assert cache.layers[1].kv.size(3) < cache.layers[0].kv.size(3) <= 512
        assert all(len(seen) <= 5 for seen in sizes)


def test_9_and_12_every_router_learns_from_the_language_model():
    """9: a router whose weight multiplies nothing gets no gradient. 12: one router shared by all layers."""
    model = tiny()
    model(texts()).square().sum().backward()
    assert {"blocks.1.router.weight", "blocks.3.router.weight"} <= with_gradient(model)
    assert model.blocks[1].router.weight is not model.blocks[3].router.weight


def test_10_the_predictor_is_an_mlp_behind_a_stop_gradient_and_gates_nothing():
    """10: a linear predictor, one that trains the blocks, or one that replaces the gate."""
    model, ids = tiny(), texts()
    kinds = zip(model.blocks[1].predictor, [nn.Linear, nn.SiLU, nn.Linear], strict=True)
    assert all(isinstance(m, kind) for m, kind in kinds)
    sum_of_predictor_losses(model, ids).backward()
    learns = with_gradient(model)
    assert learns and all(".predictor." in name for name in learns)
    before = model(ids)
    for n in (1, 3):
        nn.init.normal_(model.blocks[n].predictor[2].weight)
    assert torch.equal(before, model(ids)) and not torch.equal(model(ids, causal), before)


def test_10_without_a_predictor_the_router_itself_learns():
    """The other way of the paper: the predictor loss reaches the router and the stream."""
    model = tiny(causal_logit="router")
    assert model.blocks[1].predictor is None
    sum_of_predictor_losses(model, texts()).backward()
    assert {"blocks.1.router.weight", "wte.weight"} <= with_gradient(model)


def test_13_evaluation_measures_the_trained_model():
    """13: the rule chosen by self.training. Only the argument decides."""
    model, ids = tiny(), texts()
    for route in (top_k, causal):
        assert torch.equal(model.train()(ids, route), model.eval()(ids, route))
    assert not torch.equal(model(ids, top_k), model(ids, causal))


def changed(model, route, rule, cut):
    """Largest change of anything before place `cut` when the tokens from it on are replaced."""
    worst, moved = 0.0, False
    for seed in range(6):
        a, b = texts(seed, rows=4), texts(seed + 100, rows=4)
        b[:, :cut] = a[:, :cut]
        x, y = (one_pass(model, ids, rule, route) for ids in (a, b))
        worst = max(worst, (x.logits - y.logits)[:, :cut].abs().max().item())
        moved |= bool((x.visited != y.visited)[:, :cut].any())
    return worst, moved


@pytest.mark.parametrize("rule", [exits.full_depth, exits.confidence([0.3] * 3)], ids=["full", "confidence"])
@pytest.mark.parametrize("kind", ["predictor", "router"])
def test_14_the_past_does_not_depend_on_the_future(kind, rule):
    """14: by perturbation, since selection has no gradient. Both causal logits hold, and top-k must leak."""
    model = tiny(causal_logit=kind)
    worst, moved = changed(model, causal, rule, cut=9)
    assert worst < 1e-12 and not moved
    worst, moved = changed(model, top_k, rule, cut=9)
    assert worst > 1e-3 and moved


def test_tokens_that_are_not_live_are_left_out():
    """A token that has exited or is padding taking one of the k places, or standing before live ones."""
    weight = torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0]])
    live = torch.tensor([[False, True, True, True, False]])

    def selected(route, *args):
        mask, = route(*args)
        return mask.nonzero().flatten().tolist()

    for capacity, expected in ((2 / 3, [2, 3]), (0.8, [2, 3]), (1.0, [1, 2, 3])):      # of the 3 live ones
        assert selected(top_k, weight, weight, live, capacity) == expected
    assert selected(top_k, weight, weight, torch.zeros_like(live), 0.8) == []           # a row of padding
    assert selected(causal, weight, weight - 1.5, live, 1) == [2, 3]
    assert selected(causal, weight, -weight, live, 1) == []
    places, runs = places_of(top_k(weight, weight, live, 0.8), 4)
    assert places[0, :2].tolist() == [2, 3] and runs.tolist() == [[True, True, False, False]]
    block, (x, pos) = routed(), states()
    out, routing = block(x, pos, route=lambda *args: torch.zeros(2, 6, dtype=torch.bool))
    assert torch.equal(out, x) and not routing.runs.any() and not hasattr(block.block, "x")


# ----------------------------------------------------------------------------- a rule of the user's own


def above_mean(weight, logit, live, capacity):
    """Tokens whose weight is above the mean of their row."""
    live = torch.ones_like(weight, dtype=torch.bool) if live is None else live
    mean = weight.masked_fill(~live, 0).sum(1, keepdim=True) / live.sum(1, keepdim=True)
    return live & (weight > mean)


def above_mean_in_loops(r):
    return [t for t in range(len(r)) if r[t] > sum(r) / len(r)]


@pytest.mark.parametrize("options", [{}, {"routed": "all"}, {"causal_logit": "router"}], ids=str)
def test_a_rule_of_the_users_own(options, monkeypatch):
    """A block that counts on k tokens in every row or on a rule known by name, or that runs other tokens
    than the mask says; with padding, in the training form and as losses are measured."""
    model, ids, targets, lengths = tiny(**options).train(), texts(), texts(2), (16, 16, 9)
    pos = position_ids(ids)
    live = pos < torch.tensor(lengths).unsqueeze(1)
    padded = torch.where(live, pos, NO_POSITION)
    layers = list(model.run_layers(model.embed(ids), padded, live, None, above_mean))
    loops, losses, counts = naive(model), np.zeros(4), set()
    for b, T in enumerate(lengths):
        row, wanted = ids[b, :T].tolist(), targets[b, :T].tolist()
        expected, visited, *_ = loops.forward(row, above_mean_in_loops)
        losses += list(loops.losses(row, wanted, above_mean_in_loops).values())
        for n, (h, routing) in enumerate(layers):
            close(h[b, :T].detach(), expected[n + 1])
            assert np.array_equal(routing.runs[b, :T], visited[:, n]) and not routing.runs[b, T:].any()
            counts.add(int(visited[:, n].sum()) if routing.weight is not None else None)
    assert len(counts - {None}) > 1         # rows run different numbers of tokens
    batches = [Batch(ids[:2], targets[:2], pos[:2]), Batch(ids[2:, :9], targets[2:, :9], pos[2:, :9])]
    monkeypatch.setitem(decode.ROUTES, "above_mean", above_mean)
    measured, cases = decode.evaluate_loss(model, batches, contextlib.nullcontext())["above_mean"]
    close(measured, losses)
    assert cases[0] + cases[2] == sum(int(r.runs.sum()) for _, r in layers if r.weight is not None)
    layers[-1][0].square().sum().backward()
    assert f"blocks.{max(model.config.routed_blocks())}.router.weight" in with_gradient(model)


# ----------------------------------------------------------------------------- reports and precision


def test_the_report_counts():
    """Accuracy without its base rate, or precision and recall exchanged."""
    runs = torch.tensor([[True, True, False, False, False, False, False, False]])
    logit = torch.tensor([[1.0, -1, 1, 1, -1, -1, -1, -1]])
    counted = report(confusion(Routing(runs, None, logit)))
    assert counted == {"accuracy": 5 / 8, "base_rate": 6 / 8, "precision": 1 / 3, "recall": 1 / 2}
    assert np.isfinite(list(report(torch.tensor([0, 0, 2, 6])).values())).all()


def test_weights_keep_their_precision_under_autocast():
    """Decisions in bf16: near-ties flip."""
    model, ids = tiny().float(), texts()
    assert routings(model, ids)[1].weight.shape == (3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = routings(model, ids)[1]
    assert cast.weight.dtype == cast.logit.dtype == torch.float32
