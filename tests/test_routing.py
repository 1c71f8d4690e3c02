"""Faults of the open Mixture-of-Depths re-implementations, numbered like the list in docs/papers.md (1 to 5:
test_equivalence.py); rules of the user's own; the random control; reports."""
import contextlib
import inspect

import numpy as np
import pytest
import torch
from conftest import FOUR, one_pass, texts, tiny
from test_equivalence import close, naive

import decode
import exits
from data.batches import Batch
from model import position_ids
from routing import NO_POSITION, Routing, causal, confusion, predictor_loss, report, top_k


def routings(model, ids):
    return [routing for _, routing in model.run_layers(model.embed(ids), position_ids(ids))]


def with_gradient(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_1_capacity_one_with_weight_one_is_the_dense_model():
    """1: the residual doubled or scaled, tokens in another order: bit for bit."""
    model, dense = tiny(capacity=1.0, router="random", gate="one"), tiny(routed="none")
    dense.load_state_dict({name.replace(".block.", "."): w for name, w in model.state_dict().items()})
    assert torch.equal(model(texts()), dense(texts()))


@pytest.mark.parametrize("T", [*range(1, 13), 600])
def test_6_exactly_k_tokens_and_of_equal_weights_the_earlier_ones(T):
    """6: `weight > k-th weight` routes fewer than k; int(0.125 T) = 0 below 8 tokens. A selection that
    differs between machines and batch sizes: torch.topk promises no order."""
    runs, k = top_k(torch.zeros(2, T), None, torch.ones(2, T, dtype=torch.bool), 0.125), max(1, round(T / 8))
    assert runs[:, :k].all() and not runs[:, k:].any()


@pytest.mark.parametrize("function", [decode.step, decode.generate, decode.translate])
def test_7_decoding_compares_no_tokens(function):
    """7: top-k while decoding runs every token, since the best of one token is that token."""
    assert inspect.signature(function).parameters["route"].default is causal


def test_8_keys_and_values_take_memory_as_tokens_come():
    """8: empty slots that are seen. Slots for a whole text in a block that runs part of it, or in one that no
    token reaches; or so few more at a time that everything is copied again and again."""
    model, ids = tiny(block_size=512), texts(rows=2, T=400)
    for rule, reached in ((exits.full_depth, 4), (exits.fixed_exit(FOUR, 2), 2)):
        cache, sizes = decode.Cache(model, 2, 400), [set() for _ in range(reached)]
        for part in ids.split(2, 1):
            output = decode.step(model, part, position_ids(part) + cache.end, cache, rule)
            for layer, seen in zip(cache.layers, sizes, strict=False):
                seen.add(0 if layer.kv is None else layer.kv.size(3))
                assert max(layer.used) <= max(seen) <= max(64, 2 * max(layer.used))
        assert all(layer.kv is None for layer in cache.layers[reached:])
        assert max(sizes[1]) < max(sizes[0]) <= 512 and all(len(seen) <= 5 for seen in sizes)
        close(output.logits, one_pass(model, ids, rule).logits[:, -2:])


@pytest.mark.parametrize("kind, loss, part, others", [("predictor", "of language", "router", True),
                                                      ("predictor", "of routing", "predictor", False),
                                                      ("router", "of routing", "router", True)])
def test_9_10_12_what_learns_from_which_loss(kind, loss, part, others):
    """9: a router whose weight multiplies nothing gets no gradient. 10: a linear predictor, one that trains
    the blocks or learns from the language model; a router in its place that does not learn. 12: one router
    for all layers."""
    model = tiny(causal_logit=kind)
    if loss == "of routing":
        sum(predictor_loss(r) for r in routings(model, texts()) if r.logit is not None).backward()
    else:
        model(texts()).square().sum().backward()
    learns = with_gradient(model)
    chosen = {name for name in learns if ".router." in name or ".predictor." in name}
    assert chosen == {name for name, _ in model.named_parameters() if f".{part}." in name}
    assert bool(learns - chosen) == others and len(chosen) == (2 if part == "router" else 8)


def test_13_evaluation_measures_the_trained_model():
    """13: the rule chosen by self.training. Only the argument decides."""
    model, ids = tiny(), texts()
    for route in (top_k, causal):
        assert torch.equal(model.train()(ids, route), model.eval()(ids, route))
    assert not torch.equal(model(ids, top_k), model(ids, causal))


@pytest.mark.parametrize("rule", [exits.full_depth, exits.confidence(FOUR, 0.3)], ids=["full", "confidence"])
@pytest.mark.parametrize("kind", ["predictor", "router"])
def test_14_the_past_does_not_depend_on_the_future(kind, rule):
    """14: by perturbation, since selection has no gradient. Both causal logits hold, and top-k must leak."""
    model, a = tiny(causal_logit=kind), texts(rows=24)
    b = torch.cat([a[:, :9], texts(1, rows=24, T=7)], 1)
    for route in (causal, top_k):
        x, y = (one_pass(model, ids, rule, route) for ids in (a, b))
        moved = (x.visited != y.visited)[:, :9].any()
        change = (x.logits - y.logits)[:, :9].abs().max()
        assert (moved and change > 1e-3) if route is top_k else (not moved and change < 1e-12)


def test_tokens_that_are_not_live_are_left_out():
    """A token that has exited or is padding taking one of the k places, or standing before live ones."""
    weight = torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0]])
    live = torch.tensor([[False, True, True, True, False]])
    nothing = torch.zeros_like(live)
    for route, logit, of, capacity, expected in (
            (top_k, weight, live, 2 / 3, [2, 3]), (top_k, weight, live, 0.8, [2, 3]),       # of the 3 live
            (top_k, weight, live, 1.0, [1, 2, 3]), (top_k, weight, nothing, 0.8, []),       # a row of padding
            (causal, weight - 1.5, live, 1, [2, 3]), (causal, -weight, live, 1, [])):
        assert route(weight, logit, of, capacity)[0].nonzero().flatten().tolist() == expected


# ----------------------------------------------------------------------------- a rule of the user's own


def above_mean(weight, logit, live, capacity):
    """Tokens whose weight is above the mean of their row."""
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
    padded = torch.where(pos < torch.tensor(lengths).unsqueeze(1), pos, NO_POSITION)
    layers = list(model.run_layers(model.embed(ids), padded, padded < NO_POSITION, None, above_mean))
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
    measured = decode.evaluate_loss(model, batches, contextlib.nullcontext(), route="above_mean")
    tokens = sum(batch.count for batch in batches)
    close(np.array(measured["loss"]["above_mean"]), losses / tokens)
    ran = [int(r.runs.sum()) for _, r in layers if r.weight is not None]
    assert measured["predictor"]["base_rate"] == pytest.approx(1 - sum(ran) / tokens / len(ran))
    layers[-1][0].square().sum().backward()
    assert f"blocks.{max(model.config.routed_blocks())}.router.weight" in with_gradient(model)


# ----------------------------------------------------------------------------- the random control


def test_chance_is_even():
    """Shares other than the capacity, blocks that agree, noise that does not follow the seed of torch."""
    model, x = tiny(router="random", routed="all"), torch.zeros(1, 40_000, 16)
    weights, logits = (torch.cat(t) for t in zip(*(block.score(x) for block in model.blocks), strict=True))
    runs = logits > 0
    assert ((runs.double().mean(1) - 0.25).abs() < 0.01).all() and weights.isfinite().all()
    assert (weights.mean(1).abs() < 0.02).all() and ((weights.std(1) - 1).abs() < 0.02).all()
    assert abs((runs[0] == runs[1]).double().mean() - (0.25**2 + 0.75**2)) < 0.02
    visited = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        visited.append(one_pass(model, texts()).visited)
    assert torch.equal(visited[0], visited[1]) and not torch.equal(visited[0], visited[2])


@pytest.mark.parametrize("gate", ["raw", "one"])
def test_the_control_is_top_k_of_noise(gate):
    """Noise that repeats in training, a number of tokens other than k, a gate other than the weight or 1."""
    model, x = tiny(router="random", gate=gate).train(), torch.randn(3, 16, 16, dtype=torch.float64)
    block, pos, rows = model.blocks[1], torch.arange(16).expand(3, 16), torch.arange(3)[:, None]
    (_, other), (y, routing) = block(x, pos), block(x, pos)
    assert not torch.equal(routing.runs, other.runs)
    places = routing.runs.nonzero()[:, 1].view(3, 4)
    weight, least = routing.weight[rows, places].detach(), routing.weight[~routing.runs].view(3, 12)
    assert (weight.amin(1) > least.amax(1)).all()
    update, *_ = block.block.residual(x[rows, places], places)
    close((y - x)[rows, places].detach(), (update * (weight[..., None] if gate == "raw" else 1)).detach())
    assert not routing.logit.requires_grad and torch.isfinite(predictor_loss(routing))


def test_the_report_counts():
    """Accuracy without its base rate, or precision and recall exchanged."""
    runs = torch.tensor([[True, True, False, False, False, False, False, False]])
    logit = torch.tensor([[1.0, -1, 1, 1, -1, -1, -1, -1]])
    counted = report(confusion(Routing(runs, None, logit)))
    assert counted == {"accuracy": 5 / 8, "base_rate": 6 / 8, "precision": 1 / 3, "recall": 1 / 2}
    assert np.isfinite(list(report(torch.tensor([0, 0, 2, 6])).values())).all()


def test_decisions_keep_their_precision_under_autocast():
    """Router weights, or an oracle's sums, in bf16: near-ties flip."""
    asked = torch.rand(2, 60, 4), torch.ones(2, 60, dtype=torch.bool), 0.02, 8.0
    with torch.autocast("cpu", torch.bfloat16):
        cast, chosen = routings(tiny().float(), texts())[1], exits.oracle(*asked)
    assert cast.weight.dtype == cast.logit.dtype == torch.float32
    assert torch.equal(chosen, exits.oracle(*asked))
