"""Exit classifiers, weights, and what a halting rule can see and say [DAT]."""
import numpy as np
import pytest
import torch
from conftest import V, held, texts, tiny, tiny_translator
from reference import softmax
from test_equivalence import by_steps, close, same
from test_equivalence import naive as loops_of
from test_translation import END, loops, search

import decode
import exits
from model import position_ids
from routing import causal

N = 4


def read(model, ids, rule):
    """One pass over ids (B,T)."""
    return decode.step(model, ids, position_ids(ids), None, rule)


def test_weights_are_the_five_of_the_paper_and_sum_to_one():
    """w_n forgotten in the denominator, or n counted from 0."""
    assert exits.exit_weights("1", (1, 2, 3, 4)) == [0.25] * 4
    assert exits.exit_weights("n", (1, 2, 3)) == [1 / 6, 2 / 6, 3 / 6]
    assert exits.exit_weights("1/n", (1, 2)) == pytest.approx([2 / 3, 1 / 3])
    assert exits.exit_weights("sqrt(n)", (1, 4)) == pytest.approx([1 / 3, 2 / 3])
    assert exits.exit_weights("1/sqrt(n)", (1, 4)) == pytest.approx([2 / 3, 1 / 3])
    assert len(exits.WEIGHTS) == 5


def test_confidence_exits_at_the_first_block_that_is_sure_enough():
    """Thresholds of the wrong block, `>=`, or the last instead of the first block."""
    model, ids = tiny(routed="none"), texts()
    output = read(model, ids, exits.confidence([0.30, 0.45, 0.25]))
    at_1 = read(model, ids, exits.fixed_exit(1))                # block 1 sees no copied state: comparable
    first = at_1.logits.softmax(-1).amax(-1) > 0.30
    assert torch.equal(output.exit_at == 1, first) and 0 < first.sum() < first.numel()
    assert {1, 4} <= set(output.exit_at.flatten().tolist())
    for tau, exit_at in (([1.0] * 3, N), ([0.0] * 3, 1)):       # p > 1 is impossible, p > 0 is certain
        assert (read(tiny(), ids, exits.confidence(tau)).exit_at == exit_at).all()
    pos = torch.zeros(1, 1, dtype=torch.long)                   # exactly as sure as the threshold: stays
    state = exits.ExitState(lambda n, h: torch.zeros(1, 1, 2), None, pos, pos == 0)
    state.states.append(torch.zeros(1, 1, 4))
    assert not exits.confidence([0.5])(state) and exits.confidence([0.49])(state)


@pytest.mark.parametrize("e", [1, 2, 3, 4])
def test_all_exits_at_e_are_the_model_cut_at_e(e):
    """An exit that still runs blocks above it, or is read by the classifier of another."""
    model, ids = tiny(), texts()
    output = read(model, ids, exits.fixed_exit(e))
    h, _ = list(model.run_layers(model.embed(ids), position_ids(ids), route=causal))[e - 1]
    close(output.logits, model.classifiers(e, h).detach())
    assert (output.exit_at == e).all() and not output.visited[..., e:].any()


@pytest.mark.parametrize("classifier", ["tied", "separate"])
def test_every_token_is_read_by_the_classifier_of_its_exit(classifier):
    """The norm or the matrix of another exit, when the tokens of a call exit at different blocks."""
    model, draw = tiny(classifier=classifier), torch.Generator().manual_seed(0)
    states = [torch.randn(3, 7, 16, generator=draw, dtype=torch.float64) for _ in range(N)]
    exit_at = torch.randint(1, N + 1, (3, 7), generator=draw)
    with torch.no_grad():
        logits = model.classifiers.at(exit_at, exit_at.unique().tolist(), states)
        for b, t in np.ndindex(3, 7):
            n = int(exit_at[b, t])
            norm = model.classifiers.norms[str(n)]
            close(logits[b, t], model.classifiers.weight(n) @ norm(states[n - 1][b, t]))


def test_dense_blocks_above_an_exit_keep_the_copied_state_and_routed_ones_nothing():
    """The two papers differ in what a token that does not run leaves behind; DAT's copies wait until a token
    comes that deep, and are made once."""
    model, ids = tiny(), texts(T=18)
    cache = decode.Cache(model, 3, 18)

    def go_on(part, rule):
        decode.step(model, ids[:, part], position_ids(ids)[:, part], cache, rule)
        return [layer.upto for layer in cache.layers][::2]
    assert go_on(slice(16), exits.fixed_exit(1)) == [16, 0]
    assert held(cache) == [[16] * 3, [0] * 3, [16] * 3, [0] * 3]
    exit_at = torch.full((3, 18), 3)
    exit_at[:, 1] = 1
    assert go_on(slice(16, 17), exits.forced_exits(exit_at)) == [17, 17]
    assert go_on(slice(17, 18), exits.fixed_exit(2)) == [18, 17]
    alone, block, ids = decode.Cache(model, 3, 16), model.blocks[2], ids[:, :16]
    with torch.no_grad():
        h, _ = next(model.run_layers(model.embed(ids), position_ids(ids)))
        alone.append(position_ids(ids))
        block.residual(h, position_ids(ids), alone.layers[2])
    close(cache.layers[2].kv[..., :16, :], alone.layers[2].kv[..., :16, :])


def test_each_exit_has_its_own_norm_and_shares_or_owns_its_matrix():
    """Classifiers tied when they should be separate, or the other way round."""
    for kind, matrices in (("tied", 0), ("separate", N)):
        model = tiny(classifier=kind)
        assert len(model.classifiers.norms) == N
        own = [p for n, p in model.named_parameters()
               if n.startswith("classifiers.weights") and p.shape == (V, 16)]
        assert len(own) == matrices
    model = tiny(classifier="tied")
    assert model.classifiers.weights["tied"] is model.wte.weight
    last = tiny(exits="last")
    assert last.classifiers.blocks == (N,) and len(last.classifiers.norms) == 1


# ----------------------------------------------------------------------------- what a rule can see


def agree(state):
    """Exit when the most likely token is the same after two successive blocks."""
    if state.n == 1:
        return torch.zeros_like(state.live)
    return state.logits().argmax(-1) == state.logits(state.n - 1).argmax(-1)


def agree_in_loops():
    """The same for the loops, which know one token at a time."""
    said = {}

    def one(n, logits, h):
        said[n] = int(np.argmax(softmax(logits)))
        return n > 1 and said[n] == said[n - 1]
    return one


@pytest.mark.parametrize("classifier", ["tied", "separate"])
def test_a_rule_sees_what_the_block_before_said(classifier, monkeypatch):
    """`states[-2]` that is h^1 and not h^(n-1), logits of exited or other tokens, logits made twice: in one
    pass, step by step and in a beam, against brute force."""
    made, honest = [], exits.Classifiers.forward
    monkeypatch.setattr(exits.Classifiers, "forward", lambda self, n, h: made.append(n) or honest(self, n, h))
    model, ids = tiny(vocab=5, classifier=classifier), texts(vocab=5)
    whole = read(model, ids, agree)
    assert len(made) == len(set(made)) == int(whole.exit_at.max())
    same(whole, by_steps(model, ids, agree)[0])
    for b, row in enumerate(ids.tolist()):
        logits, exit_at, visited, _ = loops_of(model).decode(row, agree_in_loops())
        assert np.array_equal(whole.exit_at[b], exit_at) and np.array_equal(whole.visited[b], visited)
        close(whole.logits[b], logits)
    assert {2, N} <= set(whole.exit_at.flatten().tolist())
    model, sources = tiny_translator(vocab=5, classifier=classifier), texts(9, vocab=5, T=6).tolist()
    for ((best, *_), trace), source in zip(search(model, sources, agree, 3, [6] * 3), sources, strict=True):
        _, exit_at, visited, _ = loops(model).decode(best.ids[:-1], agree_in_loops(), source)
        assert best.ids[0] == END and np.array_equal(best.exit_at, exit_at)
        assert np.array_equal(best.visited, visited)
        assert all(taken.classified == taken.exit_at for taken in trace)


def test_a_rule_sees_the_states_of_every_block():
    """A list that keeps the first and the last state alone; the state of an exited token that goes on."""
    model, ids, seen = tiny(routed="none"), texts(), []

    def rule(state):
        assert state.n == len(state.states)
        seen.append(list(state.states))
        return exits.random_exit(N)(state)
    exit_at = read(model, ids, rule).exit_at
    layers = [h for h, _ in model.run_layers(model.embed(ids), position_ids(ids))]
    assert [len(states) for states in seen] == [1, 2, 3]
    close(seen[2][0], layers[0].detach())
    for n in (1, 2):
        stays = exit_at <= n
        assert torch.equal(seen[2][n][stays], seen[2][n - 1][stays]) and torch.equal(seen[2][n], seen[n][n])
        assert not torch.equal(seen[2][n][~stays], seen[2][n - 1][~stays])


# ----------------------------------------------------------------------------- sampling


def test_sampling_follows_the_distribution_it_is_given():
    """Temperature on the wrong side, top-k that keeps k+1, a cumulative sum that returns a token of p = 0."""
    logits = torch.tensor([[0.0, 2.0, 1.0, -torch.inf, 3.0]]).double()
    u = torch.linspace(0, 1, 20001)[:-1].double()

    def sample(logits, temperature, top_k, u=u[:1]):
        return decode.sample_token(decode.next_token_probs(logits, temperature, top_k), u)
    for temperature, top in ((1.0, None), (0.5, None), (1.0, 2), (2.0, 3)):
        p = (logits / temperature).softmax(-1)
        if top:
            p = torch.where(logits >= logits.topk(top).values[0, -1], p, 0)
            p = p / p.sum()
        share = torch.bincount(sample(logits.expand(len(u), -1), temperature, top, u), minlength=5) / len(u)
        torch.testing.assert_close(share.double(), p[0], rtol=0, atol=2e-4)
    assert sample(logits, 0, None) == 4 and sample(logits.float(), 1e-45, None) == 4        # no overflow
    assert sample(logits, 1.0, 1, u[-1:]) == 4
    assert sample(torch.tensor([[-torch.inf, 0.0, -torch.inf]]), 1.0, None) == 1


def test_generate_refuses_what_cannot_be():
    """An index error deep inside instead of a sentence."""
    model = tiny()
    with pytest.raises(ValueError, match="empty prompt"):
        decode.generate(model, [[1], []], 3, exits.full_depth)
    with pytest.raises(ValueError, match="exceed the context of 24"):
        decode.generate(model, [[1] * 20], 5, exits.full_depth)
    assert len(decode.generate(model, [[1] * 20], 4, exits.full_depth)[0].ids) == 24
