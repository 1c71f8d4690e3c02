"""Drafting with an early exit and verifying at once gives what full depth gives."""
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import one_pass, texts, tiny, tiny_translator

import decode
import exits
import speculate

MODELS = {"dense": {"routed": "none"}, "routed": {"routed": "odd"}, "all routed": {"routed": "all"},
          "experts": {"routed": "none", "experts": 2}, "translator": {}}


def model_of(kind, seed):
    """Blocks that change little above the first, so that drafts are kept now and then."""
    model = (tiny_translator if kind == "translator" else tiny)(seed, **MODELS[kind])
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
    probabilities, copies in place of true states, routes that change in verification; drafts that do not
    attend to the source."""
    drafted, kept = 0, 0
    for seed in range(4):
        model, prompt = model_of(kind, seed), texts(seed, rows=1, T=5)[0].tolist()
        memory = model.encode(texts(seed, rows=1, T=7)) if kind == "translator" else None
        options = {"temperature": 0, "memory": memory}
        whole = decode.generate(model, [prompt], 15, exits.full_depth, **options)[0]
        for options["eos_id"] in (None, whole.ids[9]):
            plain = decode.generate(model, [prompt], 15, exits.full_depth, **options)[0]
            text, *counts = speculate.speculate(model, prompt, 15, layers, tokens, **options)
            assert text.ids == plain.ids and text.prompt == plain.prompt
            assert np.array_equal(text.visited, plain.visited)
            assert np.array_equal(text.exit_at, plain.exit_at)
        drafted, kept = drafted + counts[0], kept + counts[1]
    assert 0 < kept < drafted


@torch.inference_mode()
@pytest.mark.parametrize("routed", ["odd", "all", "none"])
def test_a_truncated_cache_is_one_that_never_read_more(routed):
    """A slot of a forgotten token that comes back when later tokens skip the block, or a hole."""
    model, text = tiny(routed=routed), []
    cache = decode.Cache(model, 1, 24)
    for seed, length in enumerate((2, 5, 6, 8, 11, 12)):
        ids = texts(seed, rows=1, T=6)
        text = text[:cache.end] + ids[0].tolist()
        logits = decode.step(model, ids, torch.arange(6)[None] + cache.end, cache, exits.full_depth).logits
        torch.testing.assert_close(logits, one_pass(model, torch.tensor([text])).logits[:, -6:])
        cache.truncate(length)


def acceptance(p, q, drafted):
    """The share of u[0] for which the drafted token is kept: from 0 to a threshold, sought by bisection."""
    low, high = 0.0, 1.0
    if speculate.accept_or_resample(p, q, drafted, (1 - 1e-12, 0.5))[0]:
        return 1.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        kept, _ = speculate.accept_or_resample(p, q, drafted, (middle, 0.5))
        low, high = (middle, high) if kept else (low, middle)
    return low


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


@pytest.mark.parametrize("routed", ["odd", "none"])
def test_every_text_comes_as_often_as_at_full_depth(routed, monkeypatch):
    """Drafts accepted 10 % too often or too rarely, or replaced from another distribution; a draft compared
    with another place's probabilities, a random number that is used twice; a copied key or value, a stale
    slot or a hole in the cache: by the tree of all random choices, for three tokens of a vocabulary of four,
    with temperature and top-k."""
    def sample_token(probs, u):
        used.extend(u.tolist())
        return torch.tensor([choices.choose((probs[0] / probs[0].sum()).tolist())])

    def accept_or_resample(p, q, drafted, u):
        used.append(u[0])
        with monkeypatch.context() as patch:
            patch.setattr(speculate, "accept_or_resample", honest)
            patch.setattr(speculate, "sample_token", lambda probs, u: 0)
            threshold = acceptance(p, q, drafted)
        keep = choices.choose([1 - threshold, threshold])
        return honest(p, q, drafted, (0.0 if keep else 1 - 1e-12, u[1]))

    model, honest = tiny(vocab=4, routed=routed), speculate.accept_or_resample
    total, paths, kept = Counter(), [[]], set()
    monkeypatch.setattr(speculate, "sample_token", sample_token)
    monkeypatch.setattr(speculate, "accept_or_resample", accept_or_resample)
    while paths:
        choices, used = Choices(paths.pop()), []
        text, _, accepted = speculate.speculate(model, [1, 2], 3, 1, 2, temperature=1.3, top_k=3)
        total[tuple(text.ids[2:])] += choices.chance
        paths += choices.others
        kept.add(accepted)
        assert len(set(used)) == len(used)
    assert kept == {0, 1, 2}
    for text in itertools.product(range(4), repeat=3):
        p = decode.next_token_probs(one_pass(model, torch.tensor([[1, 2, *text]])).logits[0], 1.3, 3)
        chance = float(p[1, text[0]] * p[2, text[1]] * p[3, text[2]])
        assert total[text] == pytest.approx(chance, abs=1e-7)
