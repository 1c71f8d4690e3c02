"""Learning where to exit [DAT 2.2, 3]: oracles, predictors, losses, copied and computed states."""
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import reference_halting as loops
import torch
from conftest import one_pass, texts, tiny, tiny_translator
from reference_seq2seq import log_softmax
from test_equivalence import by_steps, check, close, gradients, naive, row_of, same, sources_of
from test_translation import END, KINDS, ragged, rows, unpadded

import exits
import train
from decode import translate
from model import Encoder
from options import Options

N = 4


@pytest.mark.parametrize("exited_kv", ["copy", "compute"])
@pytest.mark.parametrize("kind, make", [*((kind, tiny_translator) for kind in KINDS),
                                        *((kind, tiny) for kind in KINDS[1:])])
def test_decoding_with_learned_exits_is_the_papers(kind, make, exited_kv):
    """A predictor that reads another state, decides by another row or against another threshold, a copied
    state that is not projected by the block above; one pass and step by step, every row; a beam whose exits
    stay with the row when hypotheses are reordered, the exit of another source."""
    depths = set()
    for seed in (0, 4, 9):
        ids, model = texts(seed, T=10), make(seed, routed="none", exit_predictor=kind)
        sources, memory = sources_of(model)
        rule = exits.learned(model, 0.4 if kind in ("geometric", "binary") else 0.5)
        whole, steps = (by_steps(model, ids, rule, chunk, memory, exited_kv)[0] for chunk in (10, 1))
        same(whole, steps)
        for b, row in enumerate(ids.tolist()):
            checker = naive(model, sources[b])
            check(row_of(whole, b), checker, loops.Predictor(checker, kind).rule(0.4), row, exited_kv)
        depths |= set(whole.exit_at.unique().tolist())
        sources = rows((7, 2, 5)) if memory else []
        best = translate(model, sources, END, rule, 3, exited_kv=exited_kv) if memory else []
        for text, source in zip(best, sources, strict=True):
            checker = naive(model, source)
            check(text, checker, loops.Predictor(checker, kind).rule(0.4), exited_kv=exited_kv)
    assert len(depths) > 1


def test_forced_and_random_exits_belong_to_their_place():
    """Exits of another row or position, or that differ between one pass and step by step; random ones that
    favour some blocks, repeat along a row or in the next row, or do not follow the seed of torch."""
    model, ids = tiny(routed="none", n_embd=4, block_size=60), texts(rows=200, T=60)
    forced = texts(rows=200, T=60, vocab=N) + 1
    for chunk in (1, 60):
        steps, _ = by_steps(model, ids, exits.forced_exits(forced), chunk)
        assert torch.equal(steps.exit_at, forced)

    def at_random(seed):
        torch.manual_seed(seed)
        return one_pass(model, ids, exits.random_exit(model)).exit_at
    first, other = at_random(0), at_random(1)
    assert torch.equal(first, at_random(0))
    share = torch.bincount(first.flatten(), minlength=N + 1)[1:] / first.numel()
    assert (share - 1 / N).abs().max() < 0.02
    for a, b in ((first, other), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1])):
        assert abs((a == b).float().mean() - 1 / N) < 0.02


def check_gradient(model, ours, loss):
    """loss(), by the loops, changes as our gradient says when all weights take a small step."""
    step, found = {k: torch.randn_like(p) for k, p in model.named_parameters()}, []
    for size in (1e-5, -2e-5):
        for name, p in model.named_parameters():
            p.data += size * step[name]
        found.append(loss())
    slope = sum((gradient * step[name]).sum().item() for name, gradient in ours.items())
    assert (found[0] - found[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


def lists(batch, b):
    """ids, targets and source ids of row b without padding."""
    one = unpadded(batch, b)
    return one.ids[0].tolist(), one.targets[0].tolist(), one.source[0][0].tolist()


def losses(logits, targets, smoothing):
    """Loops: logits (T, V), targets (T,) -> smoothed losses (T,), plain losses (T,) in nats."""
    logp = np.array([log_softmax(row) for row in logits])
    plain = -logp[np.arange(len(targets)), targets]
    return (1 - smoothing) * plain - smoothing * logp.mean(1), plain


def test_mixed_training_is_the_papers(monkeypatch):
    """States that go on above the exit, an exit counted for another token, a sum over paths, labels that are
    not smoothed, a report that is, a source that is encoded for every path or learns from one path only;
    draws that never reach the last exit, favour one, or are the same for every token, path or step."""
    model, batch = tiny_translator(routed="none"), ragged()
    paths, encoded, honest = [texts(m, *batch.ids.shape, vocab=N) + 1 for m in range(3)], [], Encoder.forward
    queue, state = iter(paths), torch.get_rng_state()

    def draw(low, high, shape, device):
        assert (low, high, shape) == (1, N + 1, batch.ids.shape)
        return next(queue)
    monkeypatch.setattr(Encoder, "forward", lambda self, *a: encoded.append(1) or honest(self, *a))
    monkeypatch.setattr(torch, "randint", draw)

    def in_loops():
        """Sums over the tokens that exit at each block, (3, N): smoothed losses, plain ones, 1."""
        sums = np.zeros((3, N))
        for exit_at in paths:
            for b, forced in enumerate(exit_at.tolist()):
                ids, targets, source = lists(batch, b)
                answers = iter([n == e for e in forced for n in range(1, min(e, N - 1) + 1)])
                logits, taken, *_ = naive(model, source).decode(ids, lambda *_, a=answers: next(a))
                for n, *values in zip(taken, *losses(logits, targets, 0.1), strict=True):
                    sums[:, n - 1] += *values, 1
        return sums
    wish = Options(paths=3, label_smoothing=0.1)
    ours, reported = gradients(model, lambda: train.mixed(model, batch, 1 / batch.count, wish))
    _, plain, counts = in_loops()
    np.testing.assert_allclose(reported, plain / counts * batch.count, rtol=1e-6)
    assert len(encoded) == 1 and not [*queue] and torch.equal(torch.get_rng_state(), state)     # no new seed
    check_gradient(model, ours, lambda: in_loops()[0].sum() / 3 / batch.count)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradient_scaling_has_the_stated_factors(gamma):
    """gamma_N = 0 in a denominator, or losses far above scaled once instead of at every block between."""
    factors, model, batch = loops.gradient_factors(N, gamma), tiny_translator(routed="none"), ragged()
    ours, scaled = gradients(model, lambda: train.aligned(model, batch, 1.0, Options(gradient_scale=gamma)))
    close(train.aligned(model, batch, 1.0, Options())[1], scaled)     # no value changes
    for n in range(1, N + 1):
        expected = 0
        for k in range(n, N + 1):       # each exit's own loss, unscaled, times its factor
            model.zero_grad()
            states = [h for h, _ in model.run_batch(batch)]
            (exits.token_losses(model.classifiers(k, states[k - 1]), batch.targets).sum() / N).backward()
            expected = expected + factors[n - 1, k - 1] * model.blocks[n - 1].mlp.proj.weight.grad
        close(ours[f"blocks.{n - 1}.mlp.proj.weight"], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("oracle, cost, sigma", [
    ("correctness", 0.0, 0.0), ("correctness", 0.3, 1.5), ("likelihood", 0.1, 0.0), ("likelihood", 0.4, 3.0)])
def test_stage_two_is_the_papers(kind, oracle, cost, sigma):
    """An oracle of smoothed or of other states, its sums over padding, a kernel that is normalised or
    one-sided, ties that go to the deepest exit, another price of a block; a predictor's loss above the
    oracle's exit or with padding, a mean over padded source tokens, an alpha that does nothing."""
    model, batch = tiny_translator(routed="none", exit_predictor=kind), ragged()
    wish = Options(oracle=oracle, exit_cost=cost, sigma=sigma, label_smoothing=0.2, alpha=0.7)
    ours, reported = gradients(model, lambda: train.aligned(model, batch, 1 / batch.count, wish))

    def in_loops():
        """Losses of the exits (N,) without label smoothing, what the objective sums."""
        plain_losses, total = np.zeros(N), 0.0
        for b in range(3):
            ids, targets, source = lists(batch, b)
            checker, score = naive(model, source), np.zeros((len(ids), N))
            states, *_ = checker.forward(ids)
            for n in range(1, N + 1):
                logits = np.array([checker.logits(n, h) for h in states[n]])
                smoothed, plain = losses(logits, targets, 0.2)
                score[:, n - 1] = -plain if oracle == "likelihood" else logits.argmax(1) == targets
                plain_losses[n - 1] += plain.sum()
                total += smoothed.sum() / N
            exit_at = loops.oracle(score, cost, np.inf if kind == "sequence" else sigma)
            total += 0.7 * loops.Predictor(checker, kind).loss(states, exit_at)
        return plain_losses, total
    close(reported, in_loops()[0])
    check_gradient(model, ours, lambda: in_loops()[1] / batch.count)


def test_the_predictor_alone_can_learn():
    """A frozen trunk that moves, or an oracle that sees dropout."""
    model, batch = tiny_translator(routed="none", exit_predictor="geometric", dropout=0.5), ragged()
    data, found = SimpleNamespace(step=lambda seed, t: batch), []
    keep = SimpleNamespace(param_groups=[], zero_grad=lambda set_to_none: None, step=lambda: found.append(
        {k for k, p in model.named_parameters() if p.grad is not None}))
    alone = Options(objective="exit_predictor")
    losses = [train.step_once(model.train(), keep, data, alone, t, nullcontext())[0]["loss"] for t in (0, 1)]
    assert losses[0] == losses[1] and found[0]
    assert all(k.startswith("exit_predictor.") for k in found[0])
