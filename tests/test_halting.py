"""Learning where to exit [DAT 2.2, 3]: oracles, predictors, losses, copied and computed states."""
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import reference_halting as naive
import torch
from conftest import one_pass, texts, tiny, tiny_translator
from reference_seq2seq import log_softmax
from test_equivalence import by_steps, close, same
from test_equivalence import naive as loops_of
from test_translation import KINDS, gradients, loops, ragged, rows, search, unpadded

import exits
import train
from data.batches import Batch
from model import Encoder, position_ids
from options import Options

N = 4


def drawn(shape, seed=0):
    """Exits at random."""
    return torch.randint(1, N + 1, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("exited_kv", ["copy", "compute"])
@pytest.mark.parametrize("kind, make", [*((kind, tiny_translator) for kind in KINDS),
                                        *((kind, tiny) for kind in KINDS[1:])])
def test_decoding_with_learned_exits_is_the_papers(kind, make, exited_kv):
    """A predictor that reads another state, decides by another row or against another threshold, a copied
    state that is not projected by the block above; one pass and step by step, every row."""
    depths = set()
    for seed in (0, 4, 9):
        ids, source = texts(seed, T=10), texts(5, T=7)
        model = make(seed, routed="none", exit_predictor=kind)
        memory = model.encode(source) if make is tiny_translator else None
        rule = exits.learned(model, 0.4 if kind in ("geometric", "binary") else 0.5)
        whole, steps = (by_steps(model, ids, rule, chunk, memory, exited_kv)[0] for chunk in (10, 1))
        same(whole, steps)
        for b in range(3):
            checker = loops(model) if memory else loops_of(model)
            read = [source[b].tolist()] if memory else []
            own = naive.Predictor(checker.weights, kind).rule(0.4, memory and checker.encode(*read))
            logits, exit_at, visited, _ = checker.decode(ids[b].tolist(), own, *read, exited_kv)
            assert np.array_equal(whole.exit_at[b], exit_at) and np.array_equal(whole.visited[b], visited)
            close(whole.logits[b], logits)
            depths |= set(exit_at)
    assert len(depths) > 1


@pytest.mark.parametrize("kind, seed", [("sequence", 4), ("token", 4), ("geometric", 9), ("binary", 9)])
def test_every_hypothesis_has_its_own_exits(kind, seed):
    """A beam whose exits stay with the row when hypotheses are reordered; the exit of another source."""
    model, sources = tiny_translator(seed, routed="none", exit_predictor=kind), rows((7, 2, 5))
    checker = loops(model)      # of a seed whose exits differ
    for text, source in zip(search(model, sources, exits.learned(model), 3), sources, strict=True):
        own = naive.Predictor(checker.weights, kind).rule(0.5, checker.encode(source))
        _, exit_at, visited, _ = checker.decode(text.ids[:-1], own, source)
        assert np.array_equal(text.exit_at, exit_at) and np.array_equal(text.visited, visited)


def test_forced_and_random_exits_belong_to_their_place():
    """Exits of another row or position, or that differ between one pass and step by step; random ones that
    favour some blocks, repeat along a row or in the next row, or do not follow the seed of torch."""
    model, ids, forced = tiny(routed="none", n_embd=4, block_size=60), texts(rows=200, T=60), drawn((200, 60))
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
    not smoothed, a report that is, a source that is encoded for every path or learns from one path only."""
    model, batch = tiny_translator(routed="none"), ragged()
    paths, encoded, honest = [drawn(batch.ids.shape, m) for m in range(3)], [], Encoder.forward
    queue = iter(paths)
    monkeypatch.setattr(Encoder, "forward", lambda self, *a: encoded.append(1) or honest(self, *a))
    monkeypatch.setattr(torch, "randint", lambda *a, **k: next(queue))

    def in_loops():
        """Sums over the tokens that exit at each block, (3, N): smoothed losses, plain ones, 1."""
        sums = np.zeros((3, N))
        for exit_at in paths:
            for b, forced in enumerate(exit_at.tolist()):
                ids, targets, source = lists(batch, b)
                answers = iter([n == e for e in forced for n in range(1, min(e, N - 1) + 1)])
                logits, taken, _, _ = loops(model).decode(ids, lambda *_, a=answers: next(a), source)
                for n, *values in zip(taken, *losses(logits, targets, 0.1), strict=True):
                    sums[:, n - 1] += *values, 1
        return sums
    wish = Options(paths=3, label_smoothing=0.1)
    ours, reported = gradients(model, lambda: train.mixed(model, batch, 1 / batch.count, wish))
    _, plain, counts = in_loops()
    np.testing.assert_allclose(reported, plain / counts * batch.count, rtol=1e-6)
    assert len(encoded) == 1
    check_gradient(model, ours, lambda: in_loops()[0].sum() / 3 / batch.count)


def test_mixed_training_draws_every_exit_alike(monkeypatch):
    """Draws that never reach the last exit, favour one, or are the same for every token, path or step."""
    model, draws, randint = tiny(routed="none", n_layer=3), [], torch.randint
    batch = Batch(texts(1), texts(2), position_ids(texts(1)))
    monkeypatch.setattr(torch, "randint", lambda *a, **k: draws.append(randint(*a, **k)) or draws[-1])
    for step in range(6):
        torch.manual_seed(step)
        train.mixed(model, batch, 1.0, Options(paths=10))
    draws = torch.stack(draws)
    share = torch.bincount(draws.flatten(), minlength=4) / draws.numel()
    assert share[0] == 0 and (share[1:] - 1 / 3).abs().max() < 0.03 and len(draws) == 60
    assert all(draws.double().std(dim).mean() > 0.6 for dim in range(3))       # 0.8 if drawn independently


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradient_scaling_has_the_stated_factors(gamma):
    """gamma_N = 0 in a denominator, or losses far above scaled once instead of at every block between."""
    factors, model, batch = naive.gradient_factors(N, gamma), tiny_translator(routed="none"), ragged()
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
        plain_losses, total, checker = np.zeros(N), 0.0, loops(model)
        for b in range(3):
            ids, targets, source = lists(batch, b)
            states, score = checker.forward_top_k(ids, source)[0], np.zeros((len(ids), N))
            for n in range(1, N + 1):
                logits = np.array([checker.logits(n, h) for h in states[n]])
                smoothed, plain = losses(logits, targets, 0.2)
                score[:, n - 1] = -plain if oracle == "likelihood" else logits.argmax(1) == targets
                plain_losses[n - 1] += plain.sum()
                total += smoothed.sum() / N
            exit_at = naive.oracle(score, cost, np.inf if kind == "sequence" else sigma)
            predictor = naive.Predictor(checker.weights, kind)
            total += 0.7 * predictor.loss(states, checker.encode(source), exit_at)
        return plain_losses, total
    close(reported, in_loops()[0])
    check_gradient(model, ours, lambda: in_loops()[1] / batch.count)


def test_the_predictor_alone_can_learn():
    """A frozen trunk that moves, or an oracle that sees dropout."""
    model, batch = tiny_translator(routed="none", exit_predictor="geometric", dropout=0.5), ragged()

    def keep_names():
        found.append({k for k, p in model.named_parameters() if p.grad is not None})
    keep = SimpleNamespace(param_groups=[], step=keep_names, zero_grad=lambda set_to_none: None)
    data, found = SimpleNamespace(step=lambda seed, t: batch), []
    alone = Options(objective="exit_predictor")
    losses = [train.step_once(model.train(), keep, data, alone, t, nullcontext())[0]["loss"] for t in (0, 1)]
    assert losses[0] == losses[1] and found[0]
    assert all(k.startswith("exit_predictor.") for k in found[0])
