"""Drafting with an early exit and verifying at once gives what full depth gives."""
import itertools

import numpy as np
import pytest
import torch
from conftest import held, texts, tiny, tiny_translator

import decode
import exits
from model import positions
from routing import FAR, causal


def model_of(kind, seed=0):
    """Blocks that change little above the first, so that drafts are kept now and then."""
    model = tiny(seed, **MODELS[kind])
    for n, block in enumerate(model.blocks):
        model.classifiers.norms[str(n + 1)].load_state_dict(model.classifiers.norms["4"].state_dict())
        for name, p in block.named_parameters():
            if n > 0 and ".proj." in name:
                p.data *= 0.4
    return model


MODELS = {"dense": {"routed": "none"}, "routed": {"routed": "odd"}, "all routed": {"routed": "all"},
          "experts": {"routed": "none", "experts": 2}}


@pytest.mark.parametrize("E, ahead", [(1, 1), (1, 4), (2, 3), (3, 7)])
@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_is_that_of_full_depth(kind, E, ahead):
    """Slots of rejected tokens that stay, states from a draft that was dropped, a token judged by another's
    probabilities, copies in place of true states, routes that change in verification."""
    drafted, kept = 0, 0
    for seed in range(4):
        model, prompt = model_of(kind, seed), texts(seed, rows=1, T=5)[0].tolist()
        plain = decode.generate(model, [prompt], 15, exits.full_depth, temperature=0)[0]
        found = decode.speculate(model, prompt, 15, E, ahead, temperature=0)
        assert found.text.ids == plain.ids and found.text.prompt == plain.prompt
        assert np.array_equal(found.text.visited, plain.visited)
        assert np.array_equal(found.text.exit_at, plain.exit_at)
        drafted, kept = drafted + found.drafted, kept + found.kept
        end = plain.ids[9]
        until = decode.generate(model, [prompt], 15, exits.full_depth, temperature=0, end=end)[0]
        assert decode.speculate(model, prompt, 15, E, ahead, temperature=0, end=end).text.ids == until.ids
    assert 0 < kept < drafted


def test_a_translator_can_draft():
    model = tiny_translator(routed="odd")
    for seed in range(3):
        source = model.encode(texts(seed, rows=1, T=7))
        plain = decode.generate(model, [[0]], 12, exits.full_depth, temperature=0, source=source)[0]
        assert decode.speculate(model, [0], 12, 2, 3, temperature=0, source=source).text.ids == plain.ids


@pytest.mark.parametrize("kind", ["dense", "routed"])
def test_the_cache_is_that_of_full_depth(kind, monkeypatch):
    """A copied key or value, a stale slot, a hole: after every verification the cache holds what reading the
    text at full depth leaves there, and nothing else."""
    model, honest, join, seen = model_of(kind), decode.Cache.drop, decode.KV.join, []

    def drop(cache, pos):
        honest(cache, pos)
        seen.append([(getattr(kv, "pos", cache.pos).clone(), used, kv.filled, kv.kv.clone())
                     for kv, (used,) in zip(cache, held(cache), strict=True)])

    monkeypatch.setattr(decode.Cache, "drop", drop)
    monkeypatch.setattr(decode.KV, "join", lambda *a: no_copies(join, *a))
    found = decode.speculate(model, [1, 2, 3], 15, 1, 4, temperature=0.3)
    assert 0 < found.kept < found.drafted
    for snapshot in seen:
        read = snapshot[0][1]
        fresh = decode.Cache(model, 1, 18)
        decode.read(model, torch.tensor([found.text.ids[:read]]), torch.arange(read)[None], fresh,
                    exits.full_depth, causal)
        for (pos, m, filled, kept), kv, (used,) in zip(snapshot, fresh, held(fresh), strict=True):
            assert m == used and filled == kv.filled
            assert torch.equal(pos, getattr(kv, "pos", fresh.pos)) and (pos[0, m:] == FAR).all()
            torch.testing.assert_close(kept[..., :m, :], kv.kv[..., :m, :])


def no_copies(join, kv, x, at):
    assert kv.filled == kv.cache.start and at.rows is None
    return join(kv, x, at)


def test_every_token_comes_as_often_as_it_should():
    """Chances of keeping and of what replaces a token, by enumeration: together exactly p."""
    rng = np.random.default_rng(0)
    steps = 2000
    u = (np.arange(steps) + 0.5) / steps
    for hole in (False, True):
        p, q = (torch.from_numpy(rng.dirichlet([0.5] * 4)) for _ in range(2))
        if hole:            # tokens that only one of the two can draw, as top-k makes them
            p, q = (torch.where(torch.arange(4) == n, 0, x) / x[torch.arange(4) != n].sum()
                    for n, x in ((1, p), (2, q)))
        found = torch.zeros(4, dtype=torch.float64)
        for drafted in range(4):
            kept = sum(decode.accept(p, q, drafted, (a, 0.5))[0] for a in u) / steps
            found[drafted] += q[drafted] * kept
            if kept < 1:
                for b in u:
                    same, token = decode.accept(p, q, drafted, (1 - 1e-12, b))
                    assert not same
                    found[token] += q[drafted] * (1 - kept) / steps
        torch.testing.assert_close(found, p, rtol=0, atol=2 / steps)


def test_texts_come_as_often_as_they_should():
    """The chances of all texts of three tokens from a vocabulary of four, with temperature and top-k."""
    model, n = tiny(vocab=4), 3000
    wish = {"temperature": 1.3, "top": 3}
    chance = {}
    for text in itertools.product(range(4), repeat=3):
        ids = torch.tensor([[1, 2, *text]])
        found = decode.read(model, ids, positions(ids), None, exits.full_depth, causal)
        p = decode.chances(found.logits[0], 1.3, 3)
        chance[text] = float(p[1, text[0]] * p[2, text[1]] * p[3, text[2]])
    assert sum(chance.values()) == pytest.approx(1)
    counts, kept = dict.fromkeys(chance, 0), 0
    for seed in range(n):
        found = decode.speculate(model, [1, 2], 3, 1, 2, seed=seed, **wish)
        counts[tuple(found.text.ids[2:])] += 1
        kept += found.kept
    assert 0.2 * n < kept < 1.9 * n
    likely = {t: c for t, c in chance.items() if c * n >= 5}
    squares = sum((counts[t] - n * c)**2 / (n * c) for t, c in likely.items())
    assert abs(squares - len(likely)) < 4 * (2 * len(likely))**0.5      # chi-square: deviation sqrt(2 k)
    assert not any(counts[t] for t, c in chance.items() if c == 0)


def test_drafts_that_cannot_be():
    for options, E, ahead in (({}, 4, 2), ({}, 0, 2), ({"exits": "last"}, 2, 2), ({}, 2, 0)):
        with pytest.raises(ValueError, match="cannot draft"):
            decode.speculate(tiny(**options), [1], 4, E, ahead)
    with pytest.raises(ValueError, match="exceed the context"):
        decode.speculate(tiny(), [1] * 20, 5, 1, 2)
