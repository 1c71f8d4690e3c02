"""Exit classifiers, weights, what a halting rule can see [DAT], sampling, and what decoding refuses."""
import numpy as np
import pytest
import torch
from conftest import FOUR, one_pass, texts, tiny, tiny_translator
from test_equivalence import by_steps, check, naive, row_of, same
from test_translation import END

import decode
import exits


@pytest.mark.parametrize("kind, weights", {"1": (1, 1, 1), "n": (1, 2, 3), "1/n": (6, 3, 2),
                                           "sqrt(n)": (1, 2**0.5, 3**0.5),
                                           "1/sqrt(n)": (1, 2**-0.5, 3**-0.5)}.items())
def test_weights_are_the_five_of_the_paper_and_sum_to_one(kind, weights):
    """w_n forgotten in the denominator, or n counted from 0."""
    expected = {n: w / sum(weights) for n, w in enumerate(weights, 1)}
    assert exits.exit_weights(kind, (1, 2, 3)) == pytest.approx(expected)


def test_confidence_compares_with_the_threshold_of_its_block():
    """Thresholds of the wrong block, or `>=`."""
    pos = torch.zeros(1, 1, dtype=torch.long)
    logits = torch.tensor([[[0.0, 0.0, -torch.inf]]])           # the most likely token has p = 1/2
    state = exits.ExitState(lambda n, h: logits, pos, pos == 0)
    for exiting in (False, False, True):
        state.states.append(torch.zeros(1, 1, 4))
        assert exits.confidence(FOUR, 0.6, 0.5, 0.4)(state).item() == exiting


@pytest.mark.parametrize("kind, names", [("tied", {"tied"}), ("separate", {"1", "2", "3", "4"})])
def test_each_exit_has_its_own_norm_and_shares_or_owns_its_matrix(kind, names):
    """Classifiers tied when they should be separate, or the other way round."""
    model = tiny(classifier=kind)
    assert set(model.classifiers.weights) == names and len(model.classifiers.norms) == 4
    assert all((p is model.wte.weight) == (kind == "tied") for p in model.classifiers.weights.values())
    last = tiny(exits="last", classifier=kind).classifiers
    assert last.blocks == (4,) and len(last.norms) == len(last.weights) == 1


def agree(state):
    """Exit when the most likely token is the same after two successive blocks."""
    if state.n == 1:
        return torch.zeros_like(state.live)
    return state.logits().argmax(-1) == state.logits(state.n - 1).argmax(-1)


def agree_in_loops():
    """The same for the loops, for one token at a time."""
    best = {}

    def one(n, logits, h):
        best[n] = int(np.argmax(logits))
        return n > 1 and best[n] == best[n - 1]
    return one


@pytest.mark.parametrize("classifier", ["tied", "separate"])
def test_a_rule_sees_the_logits_and_states_of_every_block(classifier, monkeypatch):
    """`states[-2]` that is h^1 and not h^(n-1), or that is overwritten; logits of exited or other tokens,
    logits made twice: in one pass, step by step and in a beam, against brute force."""
    made, kept, honest = [], [], exits.Classifiers.forward
    monkeypatch.setattr(exits.Classifiers, "forward", lambda self, n, h: made.append(n) or honest(self, n, h))
    model, ids = tiny(vocab=5, classifier=classifier), texts(vocab=5)
    whole = one_pass(model, ids, lambda state: kept.append([*state.states]) or agree(state))
    assert len(made) == len(set(made)) == int(whole.exit_at.max())
    assert [len(states) for states in kept] == [1, 2, 3]
    assert kept[0][0] is kept[1][0] is kept[2][0] and kept[1][1] is kept[2][1]
    assert not torch.equal(kept[2][0], kept[2][1]) and not torch.equal(kept[2][1], kept[2][2])
    same(whole, by_steps(model, ids, agree)[0])
    for b, row in enumerate(ids.tolist()):
        check(row_of(whole, b), naive(model), agree_in_loops(), row)
    assert {2, 4} <= set(whole.exit_at.flatten().tolist())
    model, sources = tiny_translator(vocab=5, classifier=classifier), texts(9, vocab=5, T=6).tolist()
    for best, source in zip(decode.translate(model, sources, END, agree, 3), sources, strict=True):
        check(best, naive(model, source), agree_in_loops())
        assert best.ids[0] == END and np.array_equal(best.classified, best.exit_at)


def test_sampling_follows_the_distribution_it_is_given():
    """Temperature on the wrong side, top-k that keeps k+1, a cumulative sum that returns a token of p = 0."""
    logits = torch.tensor([[0.0, 2.0, 1.0, -1e9, 3.0]]).double()   # the fourth: p = 0
    u = torch.linspace(0, 1, 20001)[:-1].double()

    def sample(logits, temperature, top_k, u=u[:1]):
        return decode.sample_token(decode.next_token_probs(logits, temperature, top_k), u)
    for temperature, top, kept in ((1.0, None, 4), (0.5, None, 4), (1.0, 2, 2), (2.0, 3, 3)):
        likely = logits[0].topk(kept)
        p = torch.zeros(5).double().index_copy(0, likely.indices, (likely.values / temperature).softmax(-1))
        share = torch.bincount(sample(logits.expand(len(u), -1), temperature, top, u), minlength=5) / len(u)
        torch.testing.assert_close(share.double(), p, rtol=0, atol=2e-4)
    assert sample(logits, 0, None) == 4 and sample(logits.float(), 1e-45, None) == 4        # no overflow
    assert sample(logits, 1.0, 1, u[-1:]) == 4
    assert sample(torch.tensor([[-torch.inf, 0.0, -torch.inf]]), 1.0, None) == 1
    model = tiny_translator(routed="none")
    for bad in torch.nan, torch.inf:
        with pytest.raises(ValueError, match="diverged"):
            sample(torch.tensor([[0.0, bad]]), 1.0, None)
        model.wte.weight.data[0] = bad
        with pytest.raises(ValueError, match="diverged"):
            decode.translate(model, [[3, END]], END, exits.full_depth, 2)


def test_what_cannot_be_decoded_is_refused():
    """Positions clamped to the last one of the context; texts sampled with dropout; an empty prompt or an
    index error deep inside instead of a sentence; a token written where there is no room."""
    model, ids, full, long = tiny(), texts(), exits.full_depth, [1] * 20
    training, translator = tiny().train(), tiny_translator().train()
    for message, calls in {
            "tokens exceed the context of 24": [lambda: model(texts(T=25))],
            "source of 25 tokens exceeds the context of 24": [lambda: translator.encode(texts(T=25))],
            "holds 4 tokens": [lambda: one_pass(model, ids, cache=decode.Cache(model, 3, 4))],
            "the context is 24": [lambda: decode.generate(model, [long], 5, full)],
            "empty prompt": [lambda: decode.generate(model, [[1], []], 3, full)],
            "eval": [lambda: one_pass(training, ids), lambda: decode.generate(training, [[1]], 3, full),
                     lambda: decode.translate(translator, ids.tolist(), 1, full)]}.items():
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()
    assert len(decode.generate(model, [long], 4, full)[0].ids) == 24
