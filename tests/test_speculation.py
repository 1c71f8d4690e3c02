"""Drafting with an early exit and verifying at once gives what full depth gives."""
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import held, one_pass, texts, tiny, tiny_translator

import decode
import exits
from routing import NO_POSITION

MODELS = {"dense": {"routed": "none"}, "routed": {"routed": "odd"}, "all routed": {"routed": "all"},
          "experts": {"routed": "none", "experts": 2}}


def model_of(kind, seed=0):
    """Blocks that change little above the first, so that drafts are kept now and then."""
    model = tiny(seed, **MODELS[kind])
    for n, block in enumerate(model.blocks):
        model.classifiers.norms[str(n + 1)].load_state_dict(model.classifiers.norms["4"].state_dict())
        for name, p in block.named_parameters():
            if n > 0 and ".proj." in name:
                p.data *= 0.4
    return model


@pytest.mark.parametrize("layers, tokens", [(1, 1), (1, 4), (2, 3), (3, 7)])
@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_is_that_of_full_depth(kind, layers, tokens):
    """Slots of rejected tokens that stay, states from a draft that was dropped, a token judged by another's
    probabilities, copies in place of true states, routes that change in verification."""
    drafted, kept, greedy = 0, 0, {"temperature": 0}
    for seed in range(4):
        model, prompt = model_of(kind, seed), texts(seed, rows=1, T=5)[0].tolist()
        plain = decode.generate(model, [prompt], 15, exits.full_depth, **greedy)[0]
        result = decode.speculate(model, prompt, 15, layers, tokens, **greedy)
        assert result.text.ids == plain.ids and result.text.prompt == plain.prompt
        assert np.array_equal(result.text.visited, plain.visited)
        assert np.array_equal(result.text.exit_at, plain.exit_at)
        drafted, kept = drafted + result.drafted, kept + result.kept
        end = plain.ids[9]
        until = decode.generate(model, [prompt], 15, exits.full_depth, eos_id=end, **greedy)[0]
        assert decode.speculate(model, prompt, 15, layers, tokens, eos_id=end, **greedy).text.ids == until.ids
    assert 0 < kept < drafted


def test_a_translator_can_draft():
    """Drafts that do not attend to the source."""
    model = tiny_translator(routed="odd")
    for seed in range(3):
        memory = model.encode(texts(seed, rows=1, T=7))
        plain = decode.generate(model, [[0]], 12, exits.full_depth, temperature=0, memory=memory)[0]
        assert decode.speculate(model, [0], 12, 2, 3, temperature=0, memory=memory).text.ids == plain.ids


@pytest.mark.parametrize("kind", ["dense", "routed"])
def test_the_cache_is_that_of_full_depth(kind, monkeypatch):
    """A copied key or value, a stale slot, a hole: after every verification the cache holds what reading the
    text at full depth leaves there, and nothing else."""
    model, truncate, with_pending = model_of(kind), decode.Cache.truncate, decode.LayerCache.with_pending
    snapshots = []

    def watched(cache, length):
        truncate(cache, length)
        snapshots.append([(layer.pos.clone(), used, layer.upto, layer.kv is not None and layer.kv.clone())
                          for layer, (used,) in zip(cache.layers, held(cache), strict=True)])

    def without_copies(layer, x, pos):
        h, h_pos = with_pending(layer, x, pos)
        assert h is x and h_pos is pos
        return h, h_pos

    monkeypatch.setattr(decode.Cache, "truncate", watched)
    monkeypatch.setattr(decode.LayerCache, "with_pending", without_copies)
    result = decode.speculate(model, [1, 2, 3], 15, 1, 4, temperature=0.3)
    assert 0 < result.kept < result.drafted
    for snapshot in snapshots:
        read = snapshot[0][1]
        fresh = decode.Cache(model, 1, 18)
        one_pass(model, torch.tensor([result.text.ids[:read]]), cache=fresh)
        for (pos, m, upto, kv), layer, (used,) in zip(snapshot, fresh.layers, held(fresh), strict=True):
            assert m == used and (layer.routed or upto == layer.upto)
            assert torch.equal(pos[:, :m], layer.pos[:, :m]) and (pos[0, m:] == NO_POSITION).all()
            if m > 0:
                torch.testing.assert_close(kv[..., :m, :], layer.kv[..., :m, :])


# ----------------------------------------------------------------------------- in distribution


def acceptance(p, q, drafted):
    """The share of u[0] for which the drafted token is kept: from 0 to a threshold, sought by bisection."""
    low, high = 0.0, 1.0
    if decode.accept_or_resample(p, q, drafted, (1 - 1e-12, 0.5))[0]:
        return 1.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        kept, _ = decode.accept_or_resample(p, q, drafted, (middle, 0.5))
        low, high = (middle, high) if kept else (low, middle)
    return low


def distributions():
    """p, q (4,): all orders of likely and unlikely tokens, random ones, and tokens that only one can draw."""
    even = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    pairs = [(even, even[list(order)]) for order in itertools.permutations(range(4))]
    rng = np.random.default_rng(0)
    for _ in range(6):
        p, q = (torch.from_numpy(rng.dirichlet([0.5] * 4)) for _ in range(2))
        only_q, only_p = torch.arange(4) == 1, torch.arange(4) == 2
        holes = (p.masked_fill(only_q, 0), q.masked_fill(only_p, 0))
        pairs += [(p, q), tuple(x / x.sum() for x in holes)]
    return pairs


def test_every_token_comes_as_often_as_it_should():
    """Drafts accepted 10 % too often or too rarely, or replaced from another distribution: the chances of
    keeping a token and of what replaces it, by enumeration, are min(1, p / q) and together exactly p."""
    steps = 500
    for p, q in distributions():
        total = torch.zeros(4, dtype=torch.float64)
        for drafted in range(4):
            if q[drafted] == 0:
                continue
            kept = acceptance(p, q, drafted)
            assert kept == pytest.approx(min(1.0, float(p[drafted] / q[drafted])), abs=1e-8)
            total[drafted] += q[drafted] * kept
            for u in (np.arange(steps) + 0.5) / steps if kept < 1 else ():
                same, token = decode.accept_or_resample(p, q, drafted, (1 - 1e-12, u))
                assert not same
                total[token] += q[drafted] * (1 - kept) / steps
        torch.testing.assert_close(total, p, rtol=0, atol=2 / steps)


class Choices:
    """The choices of one run of a random program: those of `path`, then the first option each time; and the
    `others` that it leaves for later runs, paths up to a different option."""

    def __init__(self, path):
        self.path, self.made, self.others, self.chance = path, [], [], 1.0

    def choose(self, chances):
        """-> the number of an option."""
        possible = [option for option, chance in enumerate(chances) if chance > 0]
        if len(self.made) == len(self.path):
            self.others += [[*self.made, option] for option in possible[1:]]
            self.path = [*self.path, possible[0]]
        option = self.path[len(self.made)]
        self.made.append(option)
        self.chance *= chances[option]
        return option


def test_every_text_comes_as_often_as_at_full_depth(monkeypatch):
    """Drafts accepted 10 % too often or too rarely, a draft compared with another place's probabilities, a
    last token from another distribution, a random number that is used twice: by the tree of all random
    choices, for three tokens of a vocabulary of four, with temperature and top-k."""
    def sample_token(probs, u):
        used.extend(u.tolist())
        return torch.tensor([choices.choose((probs[0] / probs[0].sum()).tolist())])

    def accept_or_resample(p, q, drafted, u):
        used.append(u[0])
        with monkeypatch.context() as patch:
            patch.setattr(decode, "accept_or_resample", honest)
            patch.setattr(decode, "sample_token", lambda probs, u: 0)
            threshold = acceptance(p, q, drafted)
        keep = choices.choose([1 - threshold, threshold])
        return honest(p, q, drafted, (0.0 if keep else 1 - 1e-12, u[1]))

    model, honest, total, paths, kept = tiny(vocab=4), decode.accept_or_resample, Counter(), [[]], set()
    monkeypatch.setattr(decode, "sample_token", sample_token)
    monkeypatch.setattr(decode, "accept_or_resample", accept_or_resample)
    while paths:
        choices, used = Choices(paths.pop()), []
        result = decode.speculate(model, [1, 2], 3, 1, 2, temperature=1.3, top_k=3)
        total[tuple(result.text.ids[2:])] += choices.chance
        paths += choices.others
        kept.add(result.kept)
        assert len(set(used)) == len(used)
    assert kept == {0, 1, 2}
    for text in itertools.product(range(4), repeat=3):
        p = decode.next_token_probs(one_pass(model, torch.tensor([[1, 2, *text]])).logits[0], 1.3, 3)
        chance = float(p[1, text[0]] * p[2, text[1]] * p[3, text[2]])
        assert total[text] == pytest.approx(chance, abs=1e-7)


def test_drafts_that_cannot_be():
    """A draft of no tokens, at an exit that does not exist, or beyond the context."""
    for options, layers, tokens in (({}, 4, 2), ({}, 0, 2), ({"exits": "last"}, 2, 2), ({}, 2, 0)):
        with pytest.raises(ValueError, match="cannot draft"):
            decode.speculate(tiny(**options), [1], 4, layers, tokens)
    with pytest.raises(ValueError, match="exceed the context"):
        decode.speculate(tiny(), [1] * 20, 5, 1, 2)
