"""Exit classifiers, weights and halting rules [DAT]."""
import pytest
import torch
from conftest import V, held, texts, tiny

import decode
import exits
from model import Tokens, positions
from routing import causal


def read(model, ids, rule):
    return decode.read(model, ids, positions(ids), None, rule, causal)


def test_weights_are_the_five_of_the_paper_and_sum_to_one():
    """w_n forgotten in the denominator, or n counted from 0."""
    assert exits.exit_weights("1", (1, 2, 3, 4)) == [0.25] * 4
    assert exits.exit_weights("n", (1, 2, 3)) == [1 / 6, 2 / 6, 3 / 6]
    assert exits.exit_weights("1/n", (1, 2)) == pytest.approx([2 / 3, 1 / 3])
    assert exits.exit_weights("sqrt(n)", (1, 4)) == pytest.approx([1 / 3, 2 / 3])
    assert exits.exit_weights("1/sqrt(n)", (1, 4)) == pytest.approx([2 / 3, 1 / 3])
    assert len(exits.WEIGHTS) == 5


def test_confidence_leaves_at_the_first_block_that_is_sure_enough():
    """Thresholds of the wrong block, `>=`, or the last instead of the first block."""
    model, ids = tiny(routed="none"), texts()
    tau = [0.30, 0.45, 0.25]
    found = read(model, ids, exits.confidence(tau))
    full = [decode.read(model, ids, positions(ids), None, exits.fixed_exit(n), causal) for n in (1, 2, 3, 4)]
    first = full[0].logits.softmax(-1).amax(-1) > tau[0]       # block 1 sees no copied state: comparable
    assert torch.equal(found.exit_at == 1, first) and 0 < first.sum() < first.numel()
    assert {1, 4} <= set(found.exit_at.flatten().tolist())


@pytest.mark.parametrize("tau, exit_at", [([1.0] * 3, 4), ([0.0] * 3, 1)])
def test_confidence_at_its_ends(tau, exit_at):
    """tau = 1 never leaves (p > 1 is impossible), tau = 0 always leaves at once."""
    assert (read(tiny(), texts(), exits.confidence(tau)).exit_at == exit_at).all()


@pytest.mark.parametrize("e", [1, 2, 3, 4])
def test_everybody_at_e_is_the_model_cut_at_e(e):
    """An exit that still runs blocks above it, or is read by the classifier of another."""
    model, ids = tiny(), texts()
    found = read(model, ids, exits.fixed_exit(e))
    at = Tokens(positions(ids))
    for n, (h, _) in enumerate(model.trunk(model.embed(ids), at, route=causal), 1):
        if n == e:
            torch.testing.assert_close(found.logits, model.classifiers(e, h))
            break
    assert (found.exit_at == e).all() and not found.visited[..., e:].any()


def test_dense_blocks_above_an_exit_keep_the_copied_state_and_routed_ones_nothing():
    """The two papers differ in what a token that does not run leaves behind; DAT's copies wait until a token
    comes that deep, and are made once."""
    model, ids = tiny(), texts(T=18)
    past = decode.Cache(model, 3, 18)

    def go_on(part, rule):
        decode.read(model, ids[:, part], positions(ids)[:, part], past, rule, causal)
        return [kv.filled for kv in past][::2]
    assert go_on(slice(16), exits.fixed_exit(1)) == [16, 0]
    assert held(past) == [[16] * 3, [0] * 3, [16] * 3, [0] * 3]
    assert go_on(slice(16, 17), exits.chosen(torch.full((3, 18), 3).index_fill(0, torch.tensor(1), 1))) \
        == [17, 17]
    assert go_on(slice(17, 18), exits.chosen(torch.full((3, 18), 2))) == [18, 17]
    ids = ids[:, :16]
    h = next(model.trunk(model.embed(ids), decode.Tokens(positions(ids))))[0]
    block = model.blocks[2]
    _, k, v = block.attn.heads(block.attn.qkv(block.ln1(h)), decode.Tokens(positions(ids)))     # its own norm
    torch.testing.assert_close(past[2].kv[0, :, :, :16], k)
    torch.testing.assert_close(past[2].kv[1, :, :, :16], v)


def test_each_exit_has_its_own_norm_and_shares_or_owns_its_matrix():
    """Classifiers tied when they should be separate, or the other way round."""
    for kind, matrices in (("tied", 0), ("separate", 4)):
        model = tiny(classifier=kind)
        assert len(model.classifiers.norms) == 4
        own = [p for n, p in model.named_parameters()
               if n.startswith("classifiers.weights") and p.shape == (V, 16)]
        assert len(own) == matrices
    model = tiny(classifier="tied")
    assert model.classifiers.weights["tied"] is model.wte.weight
    last = tiny(exits="last")
    assert last.classifiers.blocks == (4,) and len(last.classifiers.norms) == 1


def test_confidence_must_be_exceeded():
    """`>=`: a token that is exactly as sure as the threshold stays."""
    logits = torch.zeros(1, 1, 2)
    seen = exits.Seen(1, [torch.zeros(1, 1, 4)], lambda n, h: logits, torch.zeros(1, 1, dtype=torch.long))
    assert not exits.confidence([0.5])(seen).any() and exits.confidence([0.49])(seen).all()


def test_pick_samples_the_distribution_it_is_given():
    """Temperature on the wrong side, top-k that keeps k+1, a cumulative sum that returns a token of p = 0."""
    logits = torch.tensor([[0.0, 2.0, 1.0, -torch.inf, 3.0]]).double()
    u = torch.linspace(0, 1, 20001)[:-1].double()
    many = logits.expand(len(u), -1)
    for temperature, top in ((1.0, None), (0.5, None), (1.0, 2), (2.0, 3)):
        p = (logits / temperature).softmax(-1)
        if top:
            p = torch.where(logits >= logits.topk(top).values[0, -1], p, 0)
            p = p / p.sum()
        seen = torch.bincount(decode.pick(decode.chances(many, temperature, top), u), minlength=5) / len(u)
        torch.testing.assert_close(seen.double(), p[0], rtol=0, atol=2e-4)
    assert decode.pick(decode.chances(logits, 0, None), u[:1]).item() == 4
    assert decode.pick(decode.chances(logits.float(), 1e-45, None), u[:1]).item() == 4      # no overflow
    assert decode.pick(decode.chances(logits, 1.0, 1), u[-1:]).item() == 4
    certain = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert decode.pick(decode.chances(certain, 1.0, None), u[:1]).item() == 1


def test_generate_refuses_what_cannot_be():
    """An index error deep inside instead of a sentence."""
    model = tiny()
    with pytest.raises(ValueError, match="empty prompt"):
        decode.generate(model, [[1], []], 3, exits.full_depth)
    with pytest.raises(ValueError, match="exceed the context of 24"):
        decode.generate(model, [[1] * 20], 5, exits.full_depth)
    assert len(decode.generate(model, [[1] * 20], 4, exits.full_depth)[0].ids) == 24
