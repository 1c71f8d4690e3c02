"""Every fault of the open Mixture-of-Depths re-implementations that can be expressed here is caught.

The numbers are the list in README.md, "What others got wrong". Faults 1 to 3 and 9 are also caught by the
comparison with the loops in test_equivalence.py.
"""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import V, held, texts, tiny

import decode
import exits
from model import Now, Tokens, positions
from routing import FAR, Routed, Visit, causal, confusion, imitation_loss, report, top_k


def visits(model, ids, route=top_k):
    at = Tokens(positions(ids))
    return [v for _, v in model.trunk(model.embed(ids), at, route=route)]


class Echo(nn.Module):
    """A block whose update is a constant; it notes what it was given."""

    def residual(self, x, at, past, route):
        self.x, self.pos = x, at.pos
        return torch.full_like(x, 5.0), None


def routed(capacity=0.5, **options):
    torch.manual_seed(0)
    return Routed(Echo(), 8, capacity, **options).double()


def test_1_residual_once_and_unscaled():
    """1: x + r f(x), not r (x + f) or 2x + ...: with f = 5 everywhere the output is x + 5 r, or x."""
    block, x = routed(), torch.randn(2, 6, 8, dtype=torch.float64)
    out, visit = block(x, Tokens(torch.arange(6).expand(2, 6)), Now(), top_k)
    expected = x + torch.where(visit.ran, 5 * visit.score, 0).unsqueeze(-1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_2_and_3_positions_and_time_order_are_kept():
    """2, 3: selected tokens renumbered 0..k-1, or handed on in order of their scores."""
    block, x = routed(), torch.randn(2, 6, 8, dtype=torch.float64)
    pos = torch.tensor([[3, 4, 5, 9, 10, 11], [0, 1, 2, 3, 4, 5]])
    _, visit = block(x, Tokens(pos), Now(), top_k)
    for b in range(2):
        assert block.block.pos[b].tolist() == pos[b][visit.ran[b]].tolist()
        assert torch.equal(block.block.x[b], x[b][visit.ran[b]])


def test_2_a_routed_cache_keeps_the_original_positions():
    """2: a cache that numbers its own slots."""
    model, ids = tiny(), texts(rows=2)
    past = decode.Cache(model, 2, 16)
    found = decode.read(model, ids, positions(ids), past, exits.full_depth, causal)
    assert 0 < found.visited[..., 1].sum() < 32
    for b in range(2):
        where = found.visited[b, :, 1].nonzero().squeeze(1).tolist()
        assert past[1].pos[b, : len(where)].tolist() == where
        assert (past[1].pos[b, len(where):-1] == FAR).all()


def test_4_the_gate_of_a_token_is_its_own():
    """4: a softmax over the sequence as gate: one token's score would change with the others'."""
    block, x = routed(capacity=1.0), torch.randn(1, 6, 8, dtype=torch.float64)
    at = Tokens(torch.arange(6)[None])
    before, other = block(x, at, Now(), top_k)[0], x.clone()
    other[0, 5] += 1
    after = block(other, at, Now(), top_k)[0]
    assert torch.equal(before[0, :5], after[0, :5]) and not torch.equal(before[0, 5], after[0, 5])


def test_5_each_row_selects_and_learns_by_itself():
    """5: targets or top-k taken in the flattened batch: row 0 scores highest, row 1 still selects k."""
    score = torch.stack([torch.arange(8.0) + 100, -torch.arange(8.0)])
    idx = top_k(score, score, None, 3 / 8)
    assert idx.tolist() == [[5, 6, 7], [0, 1, 2]]
    ran = torch.zeros(2, 8, dtype=torch.bool).scatter(1, idx, True)
    sure = torch.where(ran, 50.0, -50.0)
    assert imitation_loss(Visit(ran, score, sure)) < 1e-6 < imitation_loss(Visit(ran.flip(0), score, sure))


def test_of_equal_scores_the_earlier_token_goes_first():
    """A selection that differs between machines and batch sizes: torch.topk promises no order."""
    score = torch.zeros(2, 600)
    assert top_k(score, score, None, 0.125).tolist() == [list(range(75))] * 2


@pytest.mark.parametrize("T", range(1, 13))
def test_6_exactly_k_tokens_even_when_all_scores_are_equal(T):
    """6: `score > k-th score` routes fewer than k; int(0.125 T) = 0 below 8 tokens."""
    block = routed(capacity=0.125)
    nn.init.zeros_(block.router.weight)
    x = torch.randn(2, T, 8, dtype=torch.float64)
    _, visit = block(x, Tokens(torch.arange(T).expand(2, T)), Now(), top_k)
    assert (visit.ran.sum(1) == max(1, round(T / 8))).all()


def test_7_a_single_token_can_go_around():
    """7: top-k while decoding routes every token, since the best of one token is that token."""
    model, ids = tiny(), texts(rows=16, T=1)
    past = decode.Cache(model, 16, 4)
    found = decode.read(model, ids, positions(ids), past, exits.full_depth, causal)
    assert 0 < found.visited[..., 1].float().mean() < 1
    assert decode.generate.__defaults__[0] is causal


@pytest.mark.parametrize("step", [1, 3, 64])
@pytest.mark.parametrize("size", [16, 40])
def test_8_empty_slots_are_never_seen(size, step, monkeypatch):
    """8: zero keys attended; garbage in every slot that nobody filled must not change anything, nor how much
    room is added at a time."""
    def grow_by_garbage(kv, slots, size):
        more = slots - kv.kv.size(3)
        if more > 0:
            kv.kv = F.pad(kv.kv, (0, 0, 0, more + step - 1), value=37.0)

    monkeypatch.setattr(decode.KV, "grow", grow_by_garbage)
    model, ids = tiny(), texts(rows=2)
    past = decode.Cache(model, 2, size)
    found = [decode.read(model, ids[:, t:t + 1], positions(ids)[:, t:t + 1], past, exits.full_depth, causal)
             for t in range(16)]
    clean = decode.read(model, ids, positions(ids), None, exits.full_depth, causal)
    torch.testing.assert_close(torch.cat([f.logits for f in found], 1), clean.logits)
    ran = clean.visited.sum(1)                                                          # (B,L)
    assert torch.equal(torch.tensor(held(past)).T, ran)


def test_keys_and_values_take_memory_as_tokens_come():
    """Room for a whole text in a block that runs an eighth of it, or in one that nobody comes to; or room for
    so few more that everything is copied again and again, in a dense block even once."""
    model, ids = tiny(n_layer=4, block_size=512), texts(rows=2, T=400)
    for rule, reached in ((exits.full_depth, 4), (exits.fixed_exit(2), 2)):
        past, sizes = decode.Cache(model, 2, 400), [set() for _ in range(4)]
        for part in ids.split(2, 1):
            pos = positions(part) + past.end
            decode.read(model, part, pos, past, rule, causal)
            for kv, used, seen in zip(past, held(past), sizes, strict=True):
                ran, room = max(used), kv.kv.size(3)
                seen.add(room)
                grows = room == 0 or ran < room <= max(1.5 * ran, ran + 64)
                assert grows if isinstance(kv, decode.RoutedKV) else room in (0, 400)
        room = [kv.kv.size(3) for kv in past]
        assert room[reached:] == [0] * (4 - reached) and room[0] == 400 and 0 < room[1] < 200
        assert len(sizes[0]) == 1 and len(sizes[1]) <= 3


def test_9_the_router_learns_from_the_language_model():
    """9: a router whose weight multiplies nothing gets no gradient."""
    model, ids = tiny(), texts()
    model(ids).square().sum().backward()
    assert all(model.blocks[n].router.weight.grad.abs().sum() > 0 for n in (1, 3))


def test_10_the_predictor_is_an_mlp_behind_a_stop_gradient_and_gates_nothing():
    """10: a linear predictor, one that trains the trunk, or one that replaces the gate."""
    model, ids = tiny(), texts()
    kinds = zip(model.blocks[1].predictor, [nn.Linear, nn.SiLU, nn.Linear], strict=True)
    assert all(isinstance(m, kind) for m, kind in kinds)
    sum(imitation_loss(v) for v in visits(model, ids) if v.guess is not None).backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learns and all(".predictor." in name for name in learns)
    before = model(ids)
    for n in (1, 3):
        nn.init.normal_(model.blocks[n].predictor[2].weight)
    assert torch.equal(before, model(ids)) and not torch.equal(model(ids, causal), before)


def test_10_the_predictor_reads_the_input_of_the_block():
    """10: a predictor fed the block's output, which a skipped token does not have."""
    block, x = routed(), torch.randn(1, 6, 8, dtype=torch.float64)
    _, visit = block(x, Tokens(torch.arange(6)[None]), Now(), top_k)
    assert torch.equal(visit.guess, block.predictor(x).squeeze(-1))


def test_10_without_a_predictor_the_router_itself_learns():
    """The other way of the paper: the auxiliary loss reaches the router and the stream."""
    model, ids = tiny(causal="router"), texts()
    assert model.blocks[1].predictor is None
    sum(imitation_loss(v) for v in visits(model, ids) if v.guess is not None).backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "blocks.1.router.weight" in learns and "wte.weight" in learns


def test_12_every_routed_block_has_its_own_router():
    """12: one router shared by all layers."""
    model = tiny()
    assert len({model.blocks[n].router.weight.data_ptr() for n in (1, 3)}) == 2


def test_13_evaluation_measures_the_trained_model():
    """13: the rule chosen by self.training. Only the argument decides."""
    model, ids = tiny(), texts()
    for route in (top_k, causal):
        assert torch.equal(model.train()(ids, route), model.eval()(ids, route))
    assert not torch.equal(model(ids, top_k), model(ids, causal))


def changed(model, route, rule, cut):
    """Largest change of anything before place `cut` when the tokens from there on are replaced."""
    worst, moved = 0.0, False
    for seed in range(6):
        a, b = texts(seed, rows=4), texts(seed + 100, rows=4)
        b[:, :cut] = a[:, :cut]
        x, y = (decode.read(model, ids, positions(ids), None, rule, route) for ids in (a, b))
        worst = max(worst, (x.logits - y.logits)[:, :cut].abs().max().item())
        moved |= bool((x.visited != y.visited)[:, :cut].any())
    return worst, moved


@pytest.mark.parametrize("rule", [exits.full_depth, exits.confidence([0.3] * 3)], ids=["full", "confidence"])
@pytest.mark.parametrize("kind", ["predictor", "router"])
def test_14_the_past_does_not_depend_on_the_future(kind, rule):
    """14: by perturbation, since selection has no gradient. Both causal rules hold, and top-k must leak."""
    model = tiny(causal=kind)
    worst, moved = changed(model, causal, rule, cut=9)
    assert worst < 1e-12 and not moved
    worst, moved = changed(model, top_k, rule, cut=9)
    assert worst > 1e-3 and moved


def test_routing_leaves_out_who_is_not_live():
    """A token that has exited or is padding taking one of the k places, or sitting in front of live ones."""
    score = torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0]])
    live = torch.tensor([[False, True, True, True, False]])
    assert top_k(score, score, live, 2 / 3).tolist() == [[2, 3, 5]]      # 2 of the 3, nobody
    assert top_k(score, score, live, 0.8).tolist() == [[2, 3, 5, 5]]
    assert top_k(score, score, live, 1.0).tolist() == [[1, 2, 3, 5, 5]]
    assert top_k(score, score, torch.zeros_like(live), 0.8).tolist() == [[5, 5, 5, 5]]      # a row of padding
    assert causal(score, score - 1.5, live, 1).tolist() == [[2, 3]]
    assert causal(score, -score, live, 1).shape == (1, 0)


def test_the_report_counts():
    """Accuracy without its base rate, or precision and recall exchanged."""
    ran = torch.tensor([[True, True, False, False, False, False, False, False]])
    guess = torch.tensor([[1.0, -1, 1, 1, -1, -1, -1, -1]])
    found = report(confusion(Visit(ran, None, guess)))
    assert found == {"accuracy": 5 / 8, "base_rate": 6 / 8, "precision": 1 / 3, "recall": 1 / 2}
    assert np.isfinite(list(report([0, 0, 2, 6]).values())).all()


def test_scores_keep_their_precision_under_autocast():
    """Decisions in bf16: near-ties flip."""
    model, ids = tiny().float(), texts()
    plain = visits(model, ids)[1]
    with torch.autocast("cpu", torch.bfloat16):
        cast = visits(model, ids)[1]
    assert cast.score.dtype == cast.guess.dtype == torch.float32
    assert plain.score.shape == (3, 16) and V == 23
