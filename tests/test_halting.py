"""Learning where to exit [DAT 2.2, 3]: oracles, predictors, losses, copied and computed states."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reference_halting as naive
import torch
from conftest import texts, tiny, tiny_translator
from reference_seq2seq import copies
from test_equivalence import by_steps, close, same
from test_equivalence import naive as loops_of
from test_translation import END, loops, ragged, rows, search, unpadded

import decode
import exits
import train
from data.batches import Batch
from model import GPT, GPTConfig, Tokens, positions
from routing import causal

N = 4
KINDS = ["sequence", "token", "geometric", "binary"]


def scores(seed=0, B=3, T=11, whole=False):
    """Scores with many ties (whole numbers, as counts of right answers are), and who is there."""
    draw = torch.Generator().manual_seed(seed)
    score = torch.randn(B, T, N, generator=draw, dtype=torch.float64)
    live = torch.arange(T) < torch.tensor([[T], [T - 4], [1]])
    live[1, 0] = False
    return (score > 0).double() if whole else score, live


@pytest.mark.parametrize("whole", [True, False], ids=["correctness", "likelihood"])
@pytest.mark.parametrize("price", [0.0, 0.1, 0.4])
def test_oracles_are_the_papers(whole, price):
    """Sums over padding, a kernel that is normalised or one-sided, ties that go to the deepest exit."""
    for seed in range(4):
        score, live = scores(seed, whole=whole)
        whole_row = exits.sequence_oracle(score, live, price)
        for b in range(3):
            row = score[b][live[b]].numpy()
            assert set(whole_row[b].tolist()) == {naive.sequence_oracle(row, price)}
            for sigma in (0.0, 0.5, 3.0):
                found = exits.token_oracle(score, live, price, sigma)[b][live[b]]
                assert found.tolist() == naive.token_oracle(row, price, sigma)


def test_correctness_oracle_in_closed_form():
    """Tok-C, sigma 0, 0 < lambda < 1/(N-1): the first block that is right, or block 1 if none is."""
    score, live = scores(whole=True)
    right = score.bool()
    first = torch.where(right.any(-1), right.int().argmax(-1), 0) + 1
    assert torch.equal(exits.token_oracle(score, live, 0.3)[live], first[live])


def model_with(kind, translator=True, **options):
    make = tiny_translator if translator else tiny
    return make(**{"routed": "none", "halting": kind} | options)


@pytest.mark.parametrize("kind", KINDS)
def test_predictor_losses_are_the_papers(kind):
    """Halting gradient above the oracle's exit, padding in the loss, a mean over padded source tokens."""
    model = model_with(kind)
    batch = ragged(rows(), rows(lengths=(13, 9, 3), seed=9))
    past = model.past(batch)
    states = [h for h, _ in model.states(batch, past=past)]
    exit_at = torch.randint(1, N + 1, batch.pos.shape, generator=torch.Generator().manual_seed(3))
    if kind == "sequence":
        exit_at = exit_at[:, :1].expand(batch.pos.shape)
    ours, theirs = model.halting.loss(states, past[0].source, exit_at, batch.there).item(), 0.0
    for b in range(3):
        there = batch.there[b]
        wanted = exit_at[b][there].tolist()
        hs = [h[b][there].detach().numpy() for h in states]
        if kind == "sequence":
            one = unpadded(batch, b)
            mean = model.encode(*one.source).states[0].mean(0)
            theirs += naive.loss_multinomial(model.halting.linear(mean)[None].detach().numpy(), wanted[:1])
        elif kind == "token":
            logits = model.halting.linear(torch.from_numpy(hs[0])).detach().numpy()
            theirs += naive.loss_multinomial(logits, wanted)
        else:
            checker = naive.Predictor({k: w.detach().numpy() for k, w in model.state_dict().items()})
            chi = np.array([[checker.chi(n, hs[n - 1][t]) for n in range(1, N)] for t in range(len(wanted))])
            theirs += {"geometric": naive.loss_geometric, "binary": naive.loss_binary}[kind](chi, wanted)
    close(ours, theirs)


def learned_in_loops(model, kind, source=None):
    """The model's learned rule as the loops call it."""
    checker = naive.Predictor({k: w.detach().numpy() for k, w in model.state_dict().items()})
    if kind == "sequence":
        exit_at = checker.exit_of_source(source)
        return lambda n, logits, h, h1: exit_at <= n
    return checker.rule(kind)


@pytest.mark.parametrize("missing", ["copy", "compute"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_learned_exits_is_the_papers(kind, missing):
    """A predictor that reads another state, a decision that is made again every block, a copied state that is
    not projected by the block above, a catch-up that uses copies; one pass and step by step, every row."""
    depths = set()
    for seed in range(3):
        model, source, ids = model_with(kind, seed=seed), texts(5, T=7), texts(seed, T=10)
        rule = exits.learned(model.halting)
        past = decode.Cache(model, *ids.shape, model.encode(source))
        whole = decode.read(model, ids, positions(ids), past, rule, causal, missing)
        steps, _ = by_steps(model, ids, rule, source=model.encode(source), missing=missing)
        same(whole, steps)
        for b in range(3):
            checker = loops(model)
            checker.read(source[b].tolist())
            own = learned_in_loops(model, kind, checker.encode(source[b].tolist()))
            logits, exit_at, ran = naive.decode(checker, ids[b].tolist(), own, missing)
            assert np.array_equal(whole.exit_at[b], exit_at)
            close(whole.logits[b], logits)
            visited = whole.visited[b].numpy()
            caught_up = visited | copies(visited, [True] * N)
            assert np.array_equal(visited if missing == "copy" else caught_up, ran)
            depths |= set(exit_at)
    assert len(depths) > 1


@pytest.mark.parametrize("kind", ["token", "geometric", "binary"])
def test_a_gpt_learns_where_to_exit_too(kind):
    model, ids = model_with(kind, translator=False), texts(T=10)
    found = decode.read(model, ids, positions(ids), None, exits.learned(model.halting), causal)
    for b in range(3):
        own = learned_in_loops(model, kind)
        logits, exit_at, _ = naive.decode(loops_of(model), ids[b].tolist(), own, "copy")
        assert np.array_equal(found.exit_at[b], exit_at)
        close(found.logits[b], logits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_hypothesis_has_its_own_exits(kind):
    """A beam whose exits stay with the row when hypotheses turn; the exit of another sentence's source."""
    model, sources = model_with(kind), rows(lengths=(7, 2, 5))
    if kind == "sequence":      # three sentences that do not all leave at one exit
        logits = model.halting.of_source(model.encode(*decode.pad(sources, "cpu")))
        model.halting.linear.bias.data -= logits.mean(0)
        logits = model.halting.of_source(model.encode(*decode.pad(sources, "cpu")))
        assert len(logits.argmax(-1).unique()) > 1
    found = search(model, sources, exits.learned(model.halting), 3, [6] * 3)
    for ((best, *_), _), source in zip(found, sources, strict=True):
        checker = loops(model)
        checker.read(source)
        own = learned_in_loops(model, kind, checker.encode(source))
        assert best.ids[0] == END
        _, exit_at, ran = naive.decode(checker, best.ids[:-1], own, "copy")
        assert np.array_equal(best.exit_at, exit_at) and np.array_equal(best.visited, ran)


def test_threshold_of_a_learned_exit():
    """chi > threshold, not chi >= 1 - threshold."""
    model, ids = model_with("geometric", translator=False), texts()
    mean = [decode.read(model, ids, positions(ids), None, exits.learned(model.halting, t), causal)
            .exit_at.double().mean().item() for t in (0.0, 0.3, 0.6, 1.0)]
    assert mean[0] == 1 and mean[3] == N and mean == sorted(mean) and mean[1] < mean[2]


def test_random_exits_are_uniform_and_belong_to_the_place():
    """Exits that differ between one pass and step by step, or favour some blocks."""
    model, ids = tiny(routed="none"), texts()
    rule = exits.random_exit(N)
    same(decode.read(model, ids, positions(ids), None, rule, causal), by_steps(model, ids, rule)[0])
    seen = exits.Seen(0, [], None, torch.arange(4000).expand(20, -1))
    exit_at = sum((~exits.random_exit(6)(replace(seen, n=n))).int() for n in range(1, 6)) + 1
    share = torch.bincount(exit_at.flatten(), minlength=7)[1:] / exit_at.numel()
    assert (share - 1 / 6).abs().max() < 0.01
    other = sum((~exits.random_exit(6, seed=1)(replace(seen, n=n))).int() for n in range(1, 6)) + 1
    assert 0.1 < (other == exit_at).float().mean() < 0.25
    for a, b in ((exit_at[:, 1:], exit_at[:, :-1]), (exit_at[1:], exit_at[:-1])):
        assert 0.15 < (a == b).float().mean() < 0.19


def test_chosen_exits_are_taken():
    model, ids = tiny(routed="none"), texts()
    exit_at = torch.randint(1, N + 1, ids.shape, generator=torch.Generator().manual_seed(0))
    for found in (decode.read(model, ids, positions(ids), None, exits.chosen(exit_at), causal),
                  by_steps(model, ids, exits.chosen(exit_at))[0]):
        assert torch.equal(found.exit_at, exit_at)


# ----------------------------------------------------------------------------- training


def options(**more):
    return SimpleNamespace(**{"exit_weights": "1", "imitation": 0.0, "label_smoothing": 0.0, "alpha": 0.7,
                              "gradient_scale": 0.0, "oracle": "correctness", "exit_cost": 0.1, "sigma": 0.0,
                              "paths": 1} | more)


def test_mixed_training_is_the_papers(monkeypatch):
    """States that go on above the exit, an exit counted for another token, the mean over paths."""
    model, (ids, targets) = tiny(routed="none"), (texts(1), texts(2))
    drawn = [torch.randint(1, N + 1, ids.shape, generator=torch.Generator().manual_seed(m)) for m in range(3)]
    queue = iter(drawn)
    monkeypatch.setattr(torch, "randint", lambda *a, **k: next(queue))
    train.mixed(model, Batch(ids, targets, positions(ids)), 1 / ids.numel(), options(paths=3))
    ours = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = 0
    for exit_at in drawn:
        expected, at = 0.0, Tokens(positions(ids), torch.ones_like(ids, dtype=torch.bool))
        total = 0
        for n, (h, _) in enumerate(model.trunk(model.embed(ids), at), 1):
            lost = exits.nats(model.classifiers(n, h), targets)
            total = total + lost[exit_at == n].sum()
            at.live = exit_at > n
        for b in range(3):
            row = [x[b].tolist() for x in (ids, targets, exit_at)]
            expected += naive.mixed_loss(loops_of(model), *row)
        close(total.item(), expected)
        loss = loss + total / 3
    (loss / ids.numel()).backward()
    theirs = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for k in theirs:
        close(ours[k], theirs[k])


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradient_scaling_has_the_stated_factors(gamma):
    """gamma_N = 0 in a denominator, or losses far above scaled once instead of at every block between."""
    factors = naive.gradient_factors(N, gamma)
    model, (ids, targets) = tiny(routed="none", exits="all"), (texts(1), texts(2))
    batch = Batch(ids, targets, positions(ids))
    train.aligned(model, batch, 1.0, options(gradient_scale=gamma))
    ours = [model.blocks[n].mlp.proj.weight.grad.clone() for n in range(N)]
    for n in range(1, N + 1):
        expected = 0
        for k in range(n, N + 1):       # each exit's own loss, unscaled, times its factor
            model.zero_grad()
            states = [h for h, _ in model.states(batch)]
            (exits.nats(model.classifiers(k, states[k - 1]), targets).sum() / N).backward()
            expected = expected + factors[n - 1, k - 1] * model.blocks[n - 1].mlp.proj.weight.grad
        close(ours[n - 1], expected)


@pytest.mark.parametrize("exit_at", [(1, 3, 2), (2, 1, 4), (4, 4, 1)])
def test_rows_keep_their_own_exit_when_others_drop_out(exit_at, monkeypatch):
    """One exit for each source, looked up by the place among the rows that still run."""
    model, ids = model_with("sequence"), texts()
    wish = torch.nn.functional.one_hot(torch.tensor(exit_at) - 1, N).double()
    monkeypatch.setattr(type(model.halting), "of_source", lambda self, source: wish)
    rule, source = exits.learned(model.halting), model.encode(texts(5, T=7))
    whole = decode.read(model, ids, positions(ids), decode.Cache(model, *ids.shape, source), rule, causal)
    assert torch.equal(whole.exit_at, torch.tensor(exit_at).unsqueeze(1).expand(3, 16))
    same(whole, by_steps(model, ids, rule, source=source)[0])


def test_scaling_a_gradient_changes_no_value():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = exits.scale_gradient(x, 0.25)
    y.sum().backward()
    torch.testing.assert_close(y, x)
    assert torch.equal(x.grad, torch.full_like(x, 0.25))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("oracle", ["correctness", "likelihood"])
def test_stage_two_adds_alpha_times_the_predictors_loss(kind, oracle):
    """An oracle of smoothed or of other states, gradients into the oracle, an alpha that does nothing."""
    model = model_with(kind)
    batch = ragged(rows(), rows(lengths=(13, 9, 3), seed=9))
    wish = options(oracle=oracle, sigma=0.0 if kind == "sequence" else 1.5, model=model.config)
    train.aligned(model, batch, 1 / batch.count, wish)
    ours = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    past = model.past(batch)
    states = [h for h, _ in model.states(batch, past=past)]
    logits = [model.classifiers(n, h) for n, h in enumerate(states, 1)]
    nats = torch.stack([exits.nats(x, batch.targets) for x in logits], -1)
    right = torch.stack([(x.argmax(-1) == batch.targets).double() for x in logits], -1)
    score = -nats.detach() if oracle == "likelihood" else right
    exit_at = exits.sequence_oracle(score, batch.there, 0.1) if kind == "sequence" else \
        exits.token_oracle(score, batch.there, 0.1, 1.5)
    halting = model.halting.loss(states, past[0].source, exit_at, batch.there)
    ((nats.sum() / N + 0.7 * halting) / batch.count).backward()
    for k, p in model.named_parameters():
        if p.grad is not None:
            close(ours[k], p.grad)
    assert any(k.startswith("halting.") for k in ours)


def test_the_predictor_alone_can_learn():
    """A frozen trunk that moves, or an oracle that sees dropout."""
    model = model_with("geometric", dropout=0.5)
    model.requires_grad_(False).halting.requires_grad_(True)
    batch = ragged(rows(), rows(lengths=(13, 9, 3), seed=9))
    model.train()
    nats = train.halting(model, batch, 1 / batch.count, options(model=model.config))
    learns = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learns and all(k.startswith("halting.") for k in learns)
    model.eval()
    close(nats, [exits.nats(model.classifiers(n, h), batch.targets).sum().item()
                 for n, (h, _) in enumerate(model.states(batch), 1)])


def test_one_block_repeated():
    """A block that is copied instead of shared, or counted more than once among the parameters."""
    model, other = tiny(routed="none", share_blocks=True), tiny(routed="none")
    assert len({id(b) for b in model.blocks}) == 1 and len(model.blocks) == N
    block = sum(p.numel() for p in other.blocks[0].parameters())
    count = [sum(p.numel() for p in m.parameters()) for m in (model, other)]
    assert count[1] - count[0] == 3 * block
    other.load_state_dict(model.state_dict())
    sizes = [GPT(GPTConfig(routed="none", share_blocks=s), 9).blocks[0].mlp.proj.weight.std() for s in (0, 1)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02          # a block that adds six times adds less each time
    ids = texts()
    close(model(ids).detach(), other(ids).detach())
    rule = exits.confidence([0.24, 0.2, 0.2])
    same(decode.read(model, ids, positions(ids), None, rule, causal), by_steps(model, ids, rule)[0])
