"""Learning where to exit [DAT 2.2, 3]: oracles, predictors, losses, copied and computed states."""
import numpy as np
import pytest
import reference_halting as naive
import torch
from conftest import texts, tiny, tiny_translator
from reference_seq2seq import copies
from test_equivalence import by_steps, close, same
from test_equivalence import naive as loops_of
from test_translation import KINDS, gradients, loops, options, ragged, rows, same_gradients, search, unpadded

import decode
import exits
import train
from data.batches import Batch
from model import Encoder, position_ids

N = 4
GPTS = [(kind, False) for kind in KINDS[1:]]        # a GPT has no source


def model_with(kind, translator=True, **more):
    make = tiny_translator if translator else tiny
    return make(**{"routed": "none", "exit_predictor": kind} | more)


def checker_of(model):
    """The predictor as the loops have it."""
    return naive.Predictor({k: w.detach().numpy() for k, w in model.state_dict().items()})


def drawn(shape, seed=0):
    """Exits at random."""
    return torch.randint(1, N + 1, shape, generator=torch.Generator().manual_seed(seed))


def text_batch():
    """A Batch of a text without padding."""
    return Batch(texts(1), texts(2), position_ids(texts(1)))


# ----------------------------------------------------------------------------- oracles and predictors


def scores(seed=0, B=3, T=11, whole=False):
    """Scores (B,T,N), whole numbers with many ties as counts of right answers are, and a mask with gaps."""
    draw = torch.Generator().manual_seed(seed)
    score = torch.randn(B, T, N, generator=draw, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor([[T], [T - 4], [1]])
    mask[1, 0] = False
    return (score > 0).double() if whole else score, mask


@pytest.mark.parametrize("kind", ["correctness", "likelihood"])
@pytest.mark.parametrize("cost", [0.0, 0.1, 0.3, 0.4])
def test_oracles_are_the_papers(kind, cost):
    """Sums over padding, a kernel that is normalised or one-sided, ties that go to the deepest exit, a block
    that costs another price."""
    for seed in range(8):
        score, mask = scores(seed, whole=kind == "correctness")
        sequence = exits.oracle(score, mask, cost, whole_sequence=True)
        if kind == "correctness" and cost == 0.3:       # in closed form: the first that is right, else 1
            first = torch.where(score.any(-1), score.argmax(-1), 0) + 1
            assert torch.equal(exits.oracle(score, mask, cost)[mask], first[mask])
        for b in range(3):
            row = score[b][mask[b]].numpy()
            assert set(sequence[b].tolist()) == {naive.sequence_oracle(row, cost)}
            for sigma in (0.0, 0.5, 3.0):
                found = exits.oracle(score, mask, cost, sigma)[b][mask[b]]
                assert found.tolist() == naive.token_oracle(row, cost, sigma)


@pytest.mark.parametrize("kind", KINDS)
def test_predictor_losses_are_the_papers(kind):
    """A gradient above the oracle's exit, padding in the loss, a mean over padded source tokens."""
    model, batch = model_with(kind), ragged()
    memory, checker = model.memory_of(batch), checker_of(model)
    states = [h for h, _ in model.run_batch(batch, memory=memory)]
    exit_at = drawn(batch.pos.shape, seed=3)
    if kind == "sequence":
        exit_at = exit_at[:, :1].expand(batch.pos.shape)
    ours, theirs = model.exit_predictor.loss(states, memory, exit_at, batch.mask).item(), 0.0
    for b in range(3):
        wanted = exit_at[b][batch.mask[b]].tolist()
        hs = [h[b][batch.mask[b]].detach().numpy() for h in states]
        if kind == "sequence":
            mean = model.encode(*unpadded(batch, b).source).states[0].mean(0).detach().numpy()
            theirs += naive.loss_multinomial([checker.linear(mean)], wanted[:1])
        elif kind == "token":
            theirs += naive.loss_multinomial([checker.linear(h) for h in hs[0]], wanted)
        else:
            chi = np.array([[checker.chi(n, hs[n - 1][t]) for n in range(1, N)] for t in range(len(wanted))])
            theirs += {"geometric": naive.loss_geometric, "binary": naive.loss_binary}[kind](chi, wanted)
    close(ours, theirs)


# ----------------------------------------------------------------------------- decoding


def reading(model, kind, source):
    """The loops, which have read a source, and their rule for it."""
    checker = loops(model)
    checker.read(source)
    return checker, checker_of(model).rule(kind, checker.encode(source))


@pytest.mark.parametrize("exited_kv", ["copy", "compute"])
@pytest.mark.parametrize("kind, translator", [*((kind, True) for kind in KINDS), *GPTS])
def test_decoding_with_learned_exits_is_the_papers(kind, translator, exited_kv):
    """A predictor that reads another state or decides by another row, a copied state that is not projected by
    the block above, a catch-up that uses copies; one pass and step by step, every row."""
    depths, rule = set(), exits.learned()
    for seed in range(3):
        model, source, ids = model_with(kind, translator, seed=seed), texts(5, T=7), texts(seed, T=10)
        memory = model.encode(source) if translator else None
        cache = decode.Cache(model, *ids.shape, memory)
        whole = decode.step(model, ids, position_ids(ids), cache, rule, exited_kv=exited_kv)
        same(whole, by_steps(model, ids, rule, memory=memory, exited_kv=exited_kv)[0])
        for b in range(3):
            checker, own = (reading(model, kind, source[b].tolist()) if translator else
                            (loops_of(model), checker_of(model).rule(kind)))
            logits, exit_at, ran = naive.decode(checker, ids[b].tolist(), own, exited_kv)
            assert np.array_equal(whole.exit_at[b], exit_at)
            close(whole.logits[b], logits)
            visited = whole.visited[b].numpy()
            assert np.array_equal(visited if exited_kv == "copy" else visited | copies(visited), ran)
            depths |= set(exit_at)
    assert len(depths) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_hypothesis_has_its_own_exits(kind):
    """A beam whose exits stay with the row when hypotheses are reordered; the exit of another source."""
    model, sources = model_with(kind), rows((7, 2, 5))
    if kind == "sequence":      # three sentences that do not all exit at one block
        memory = model.encode(*decode.pad(sources, "cpu"))
        logits = model.exit_predictor.of_memory(memory.states, memory.mask).squeeze(1)
        model.exit_predictor.linear.bias.data -= logits.mean(0)
        assert len((logits - logits.mean(0)).argmax(-1).unique()) > 1
    results = search(model, sources, exits.learned(), 3, [6] * 3)
    for ((best, *_), _), source in zip(results, sources, strict=True):
        checker, own = reading(model, kind, source)
        _, exit_at, ran = naive.decode(checker, best.ids[:-1], own, "copy")
        assert np.array_equal(best.exit_at, exit_at) and np.array_equal(best.visited, ran)


def test_threshold_of_a_learned_exit():
    """chi > threshold, not chi >= 1 - threshold."""
    model, ids = model_with("geometric", translator=False), texts()
    mean = [decode.step(model, ids, position_ids(ids), None, exits.learned(t)).exit_at.double().mean().item()
            for t in (0.0, 0.3, 0.6, 1.0)]
    assert mean[0] == 1 and mean[3] == N and mean == sorted(mean) and mean[1] < mean[2]


def test_random_exits_are_uniform_and_belong_to_place_and_seed():
    """Exits that differ between one pass and step by step, favour some blocks, repeat along a row or in the
    next row, or are the same for every seed of torch."""
    model, ids = tiny(routed="none"), texts()
    rule, pos = exits.random_exit(N), torch.arange(4000).expand(20, -1)
    same(decode.step(model, ids, position_ids(ids), None, rule), by_steps(model, ids, rule)[0])

    def exits_of(seed):
        torch.manual_seed(seed)
        state, exit_at = exits.ExitState(None, None, pos, pos >= 0), 6
        for _ in range(5):
            state.states.append(None)
            exit_at = exit_at - exits.random_exit(6)(state).int()
        return exit_at
    first, other = exits_of(0), exits_of(1)
    share = torch.bincount(first.flatten(), minlength=7)[1:] / first.numel()
    assert (share - 1 / 6).abs().max() < 0.01 and torch.equal(first, exits_of(0))
    for a, b in ((first, other), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1])):
        assert 0.15 < (a == b).float().mean() < 0.19


def test_forced_exits_are_taken():
    """The exits of another row or position."""
    model, ids, exit_at = tiny(routed="none"), texts(), drawn((3, 16))
    steps, _ = by_steps(model, ids, exits.forced_exits(exit_at))
    assert torch.equal(steps.exit_at, exit_at)
    same(decode.step(model, ids, position_ids(ids), None, exits.forced_exits(exit_at)), steps)


# ----------------------------------------------------------------------------- training


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("translator", [False, True], ids=["gpt", "translator"])
def test_mixed_training_is_the_papers(translator, smoothing, monkeypatch):
    """States that go on above the exit, an exit counted for another token, the mean over paths, labels
    that are not smoothed; a source that is encoded for every path, or whose gradient is that of one path."""
    model = (tiny_translator if translator else tiny)(routed="none")
    batch = ragged() if translator else text_batch()
    paths, encoded, honest = [drawn(batch.ids.shape, m) for m in range(3)], [], Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, *a: encoded.append(1) or honest(self, *a))
    queue = iter(paths)
    monkeypatch.setattr(torch, "randint", lambda *a, **k: next(queue))
    wish = options(paths=3, label_smoothing=smoothing)
    ours, reported = gradients(model, lambda: train.mixed(model, batch, 1 / batch.count, wish))
    assert len(encoded) == translator

    def by_hand():
        sums, counts = torch.zeros(2, N, dtype=torch.float64)
        for exit_at in paths:
            x, memory = model.embed(batch.ids), model.memory_of(batch)
            for n, block in enumerate(model.blocks, 1):
                x, _ = block(x, batch.pos, batch.mask & (exit_at >= n), None, memory)
                here, logits = batch.mask & (exit_at == n), model.classifiers(n, x)
                loss = exits.token_losses(logits, batch.targets, smoothing)[here].sum()
                (loss / 3 / batch.count).backward(retain_graph=True)
                plain = exits.token_losses(logits, batch.targets)[here].detach()
                sums[n - 1], counts[n - 1] = sums[n - 1] + plain.sum(), counts[n - 1] + len(plain)
        return sums, counts
    theirs, (sums, counts) = gradients(model, by_hand)
    same_gradients(ours, theirs)
    torch.testing.assert_close(reported, (sums / counts * batch.count).float())
    expected = 0.0
    for exit_at in paths:
        for b in range(3):
            one, checker = unpadded(batch, b) if translator else batch, loops_of(model)
            if translator:
                checker = loops(model)
                checker.read(one.source[0][0].tolist())
            row = 0 if translator else b
            ids, targets = one.ids[row].tolist(), one.targets[row].tolist()
            expected += naive.mixed_loss(checker, ids, targets, exit_at[b].tolist()[:len(ids)])
    close(sums.sum(), expected)


def test_mixed_training_draws_every_exit_alike(monkeypatch):
    """Draws that never reach the last exit, favour one, or are the same for every token, path or step."""
    model, batch, exits_of = tiny(routed="none", n_layer=3), text_batch(), []
    counts, honest = torch.zeros(3), exits.loss_and_gradient

    def count(classifiers, n, h, *more):
        counts[n - 1] += len(h)
        return honest(classifiers, n, h, *more)
    monkeypatch.setattr(exits, "loss_and_gradient", count)
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: exits_of.append(randint(*a, **k)) or exits_of[-1])
    for step in range(6):
        torch.manual_seed(step)
        train.mixed(model, batch, 1.0, options(paths=10))
    assert (counts / counts.sum() - 1 / 3).abs().max() < 0.03 and counts.sum() == 60 * batch.ids.numel()
    drawn_exits = torch.stack(exits_of).double()
    assert all(drawn_exits.std(dim).mean() > 0.6 for dim in range(3))       # 0.8 if drawn independently


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradient_scaling_has_the_stated_factors(gamma):
    """gamma_N = 0 in a denominator, or losses far above scaled once instead of at every block between."""
    factors, model, batch = naive.gradient_factors(N, gamma), tiny(routed="none"), text_batch()
    plain = train.aligned(model, batch, 1.0, options())
    model.zero_grad()
    close(plain, train.aligned(model, batch, 1.0, options(gradient_scale=gamma)))       # no value changes
    ours = [block.mlp.proj.weight.grad.clone() for block in model.blocks]
    for n in range(1, N + 1):
        expected = 0
        for k in range(n, N + 1):       # each exit's own loss, unscaled, times its factor
            model.zero_grad()
            states = [h for h, _ in model.run_batch(batch)]
            (exits.token_losses(model.classifiers(k, states[k - 1]), batch.targets).sum() / N).backward()
            expected = expected + factors[n - 1, k - 1] * model.blocks[n - 1].mlp.proj.weight.grad
        close(ours[n - 1], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("oracle", ["correctness", "likelihood"])
def test_stage_two_adds_alpha_times_the_predictors_loss(kind, oracle):
    """An oracle of smoothed or of other states, gradients into the oracle, an alpha that does nothing."""
    model, batch = model_with(kind), ragged()
    sigma = 0.0 if kind == "sequence" else 1.5
    wish = options(oracle=oracle, sigma=sigma, label_smoothing=0.2, model=model.config)
    ours, _ = gradients(model, lambda: train.aligned(model, batch, 1 / batch.count, wish))

    def by_hand():
        memory = model.memory_of(batch)
        states = [h for h, _ in model.run_batch(batch, memory=memory)]
        logits = torch.stack([model.classifiers(n, h) for n, h in enumerate(states, 1)], -2)
        targets = batch.targets.unsqueeze(-1).expand(-1, -1, N)
        score = -exits.token_losses(logits, targets).detach()
        if oracle == "correctness":
            score = (logits.argmax(-1) == targets).double()
        exit_at = exits.oracle(score, batch.mask, 0.1, sigma)
        if kind == "sequence":
            exit_at = exits.oracle(score, batch.mask, 0.1, whole_sequence=True)
        loss = exits.token_losses(logits, targets, 0.2).sum() / N
        loss = loss + 0.7 * model.exit_predictor.loss(states, memory, exit_at, batch.mask)
        (loss / batch.count).backward()
    same_gradients(ours, gradients(model, by_hand)[0])
    assert any(k.startswith("exit_predictor.") for k in ours)


def test_the_predictor_alone_can_learn():
    """A frozen trunk that moves, or an oracle that sees dropout."""
    model, batch = model_with("geometric", dropout=0.5), ragged()
    model.requires_grad_(False).exit_predictor.requires_grad_(True)
    model.train()
    losses = train.exit_predictor(model, batch, 1 / batch.count, options(model=model.config))
    learns = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learns and all(k.startswith("exit_predictor.") for k in learns)
    model.eval()
    close(losses, [exits.token_losses(model.classifiers(n, h), batch.targets).sum().item()
                   for n, (h, _) in enumerate(model.run_batch(batch), 1)])
