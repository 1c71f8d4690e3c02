"""Experts [MoD 4.3] and the random control [MoD 3.3]; what the training path may not do."""
import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Counter, V, one_pass, texts, tiny
from test_equivalence import RULES, by_steps, close, same
from test_scripts import refused

import cost
import evaluate
import exits
import run
import train
from data.batches import Batch, batches_of, open_data
from decode import evaluate_loss
from experts import Experts
from model import position_ids
from options import Options, read_options
from routing import NO_POSITION, causal, predictor_loss, top_k

KINDS = {"moe": {"routed": "none", "experts": 3}, "integrated": {"routed": "none", "experts": 2, "noops": 2},
         "staged": {"routed": "odd", "experts": 3}}


def experts(E=3, noops=2, capacity=1.25, C=8):
    torch.manual_seed(0)
    made = Experts(C, 12, E, noops, capacity).double()
    for p in made.parameters():
        torch.nn.init.normal_(p)
    return made


def in_a_loop(made, x, pos, capacity):
    """Token by token: (T,C), the expert of every token. capacity: most tokens of an expert; None: all."""
    E, out, expert = made.experts, torch.zeros_like(x), [-1] * len(x)
    p = [(made.router.weight @ token).softmax(0) for token in x]
    for e in range(E):
        chosen_by = [t for t in range(len(x)) if pos[t] < NO_POSITION and int(p[t].argmax()) == e]
        if capacity is not None:
            chosen_by = sorted(chosen_by, key=lambda t: (-p[t][e].item(), t))[:capacity]
        for t in chosen_by:
            out[t] = p[t][e] * (F.gelu(x[t] @ made.fc.weight[e]) @ made.proj.weight[e])
            expert[t] = e
    return out, expert


@pytest.mark.parametrize("E, noops, capacity", [(3, 2, 1.0), (2, 0, 0.5), (4, 4, 1.25), (1, 1, 1.0)])
def test_experts_are_the_loop_over_tokens(E, noops, capacity):
    """A token that runs an expert it did not choose, two experts or the weights of a no-op; a gate that is
    not its probability; places of an expert that stay empty filled or counted; padding that takes a place."""
    made, T = experts(E, noops, capacity), 12
    x, pos = torch.randn(2, T, 8, dtype=torch.float64), torch.arange(T).expand(2, T).clone()
    pos[1, 7:] = NO_POSITION
    for route in (top_k, causal):
        out, choice = made(x, pos, route)
        for b, length in enumerate((12, 7)):
            limit = None if route is causal else max(1, round(capacity / (E + noops) * length))
            expected, expert = in_a_loop(made, x[b], pos[b], limit)
            close(out[b].detach(), expected.detach())
            assert choice.expert[b].tolist() == expert
    assert (choice.expert >= 0).any() and (choice.expert[0] < 0).any() == (noops > 0)


def test_the_balance_loss():
    """Not E sum f P in tokens, no-ops among the E: the number of tokens, when everything is even."""
    made, pos = experts(3, 1), torch.arange(6).expand(2, 6)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    p = (x @ made.router.weight.T).softmax(-1).flatten(0, 1)
    share = torch.stack([(p.argmax(-1) == e).double().mean() for e in range(4)])
    _, choice = made(x, pos, top_k)
    close(choice.balance.detach(), (4 * 12 * (share * p.mean(0)).sum()).detach())
    choice.balance.backward()
    assert made.router.weight.grad.abs().sum() > 0 and made.fc.weight.grad is None
    made.router.weight.data.zero_()
    close(made(x, pos, top_k)[1].balance.detach(), 12)
    half = torch.cat([pos[:1], torch.full_like(pos[:1], NO_POSITION)])
    close(made(x, half, top_k)[1].balance.detach(), 6)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_experts_is_reading_at_once(kind):
    """An expert that sees other tokens of the call, a row that changes another, a future that leaks."""
    model, ids = tiny(**KINDS[kind]), texts(T=12)
    whole, (steps, _) = one_pass(model, ids), by_steps(model, ids, exits.full_depth)
    same(whole, steps)
    assert torch.equal(whole.worked, steps.worked) and (whole.worked <= whole.visited).all()
    assert torch.equal(whole.worked, whole.visited) == ("noops" not in KINDS[kind])
    early = one_pass(model, ids, RULES["scattered"])
    assert early.worked.any() and not (early.worked & ~early.visited).any()
    close(one_pass(model, ids[1:2]).logits[0], whole.logits[1])
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % V
    close(one_pass(model, other).logits[:, :-1], whole.logits[:, :-1])


def test_crowded_experts_leak_in_training_only():
    """Under top_k a later token can push an earlier one out of an expert."""
    model, ids, leaks = tiny(routed="none", experts=2, expert_capacity=0.5), texts(T=12), 0
    before = model(ids)
    for token in range(V):
        other = ids.clone()
        other[:, -1] = token
        leaks += not torch.allclose(model(other)[:, :-1], before[:, :-1], atol=1e-9)
    assert leaks > 0


def test_a_staged_choice_belongs_to_the_selected_tokens():
    """Experts of the selected tokens reported at other places."""
    model, ids = tiny(**KINDS["staged"]), texts()
    for n, (_, routing) in enumerate(model.run_layers(model.embed(ids), position_ids(ids))):
        runs = routing.runs
        assert not (routing.choice.expert[~runs] >= 0).any() and (routing.choice.expert >= 0).any()
        assert (n in (1, 3)) == bool((~runs).any())


@pytest.mark.parametrize("options", [{"routed": "none"}, {}, {"capacity": 1.0}, {"causal_logit": "router"},
                                     {"router": "random"}, *KINDS.values()], ids=str)
def test_training_flops_are_those_that_run(options):
    """A harness that gives one arm more than another; forward and backward of three rows."""
    model, ids = tiny(exits="last", block_size=32, **options), texts(T=33)
    batch = Batch(ids[:, :-1], ids[:, 1:], position_ids(ids[:, 1:]))
    with torch.no_grad(), Counter() as counted:
        model(batch.ids)
    assert 3 * cost.forward(model.config, V, 32) == counted.flops > 0           # of three rows
    with Counter() as counted:
        train.aligned(model, batch, 1 / 96, Options())
    assert 3 * cost.training(model.config, V, 32) == pytest.approx(counted.flops, rel=1e-9)


# ----------------------------------------------------------------------------- the random control


def test_chance_is_even_and_belongs_to_the_place():
    """Shares other than the capacity, blocks that agree, a token that fares otherwise alone."""
    model, pos = tiny(router="random", routed="all"), torch.arange(40_000).view(1, -1)
    weights, logits = zip(*(block.chance(pos) for block in model.blocks), strict=True)
    for weight, logit in zip(weights, logits, strict=True):
        assert abs((logit > 0).double().mean() - 0.25) < 0.01
        assert abs(weight.mean()) < 0.02 and abs(weight.std() - 1) < 0.02 and weight.isfinite().all()
    agreement = ((logits[0] > 0) == (logits[1] > 0)).double().mean()
    assert abs(agreement - (0.25**2 + 0.75**2)) < 0.02
    ids = texts()
    whole = one_pass(model, ids)
    assert whole.visited.any() and not whole.visited.all()
    first_exits = torch.tensor([1, 4, 4]).unsqueeze(1).expand(3, 16)        # chance stays with the row
    other = one_pass(model, ids, exits.forced_exits(first_exits))
    assert torch.equal(other.visited[1:], whole.visited[1:]) and not other.visited[0, :, 1:].any()


def test_chance_is_a_function_of_the_seed():
    """The same draws in every evaluation batch; draws that change between one pass and step by step."""
    model, ids, drawn = tiny(router="random", routed="all"), texts(), {}
    for seed in (0, 1, 2, 3, 0):
        torch.manual_seed(seed)
        whole, (steps, _) = one_pass(model, ids), by_steps(model, ids, exits.full_depth)
        same(whole, steps)
        torch.rand(5)                                           # the seed decides, not the generator's state
        assert torch.equal(drawn.setdefault(seed, whole.visited), one_pass(model, ids).visited)
    assert len({tuple(visited.flatten().tolist()) for visited in drawn.values()}) == 4
    batch = Batch(ids, ids, position_ids(ids))
    losses = [evaluate_loss(model, [batch] * n, contextlib.nullcontext())["causal"][0] for n in (1, 2)]
    assert not torch.allclose(losses[1], 2 * losses[0])         # the second batch draws anew


@pytest.mark.parametrize("gate", ["raw", "one"])
def test_the_control_is_top_k_of_noise(gate):
    """Noise that repeats in training, a number of tokens other than k, a gate other than the weight or 1."""
    model, x = tiny(router="random", gate=gate).train(), torch.randn(3, 16, 16, dtype=torch.float64)
    block, pos, results = model.blocks[1], torch.arange(16).expand(3, 16), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y, routing = block(x, pos)
        assert (routing.runs.sum(1) == 4).all()
        results.append((y, routing))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1].runs, results[2][1].runs)
    y, routing = results[0]
    for b in range(3):
        places = routing.weight[b].topk(4).indices.sort().values
        update, _ = block.block.residual(x[b:b + 1, places], places[None])
        gates = routing.weight[b, places, None] if gate == "raw" else 1
        close((y - x)[b, places].detach(), (gates * update[0]).detach())
    assert not routing.logit.requires_grad and torch.isfinite(predictor_loss(routing))


# ----------------------------------------------------------------------------- training


@pytest.mark.parametrize("options", [{}, {"causal_logit": "router"}, {"router": "random"},
                                     {"experts": 3, "noops": 1}], ids=str)
def test_the_training_path_is_one_graph(options):
    """A shape or a branch that depends on the data: the host would wait for the device."""
    model, pos = tiny(**options).train(), torch.arange(16).expand(3, 16)

    def loss(x):
        total = 0
        for block in model.blocks:
            x, routing = block(x, pos)
            if routing.logit is not None:
                total = total + predictor_loss(routing)
        return x.square().sum() + total

    torch.compiler.reset()
    x = torch.randn(3, 16, 16, dtype=torch.float64)
    torch.manual_seed(0)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)(x)
    torch.manual_seed(0)
    close(compiled.detach(), loss(x).detach())


@pytest.mark.parametrize("words", [["--experts", "2", "--noops", "2", "--routed", "none"], ["--experts", "2"],
                                   ["--router", "random", "--gate", "one"]], ids=" ".join)
def test_training_and_measuring(words, dataset, tmp_path, monkeypatch):
    """Experts or the control that do not learn, or whose FLOPs and arrays do not belong to their run."""
    monkeypatch.setattr(train, "finish", lambda *a: None)
    train.main(["--data", str(dataset), "--out", str(tmp_path), *TINY, "--lr", "0.01", *words])
    [folder] = tmp_path.iterdir()
    lines = run.read_metrics(folder)
    assert lines[-1]["loss"]["top_k"][-1] < lines[0]["loss"]["top_k"][-1]
    evaluate.main(["--run", str(folder), "--rules", "full", "fixed:2"])
    depth = np.load(folder / "depth.npz")
    assert depth["worked"].shape == depth["visited"].shape
    rows = {r["rule"]: r for r in run.read_json(folder / "evaluation.json", "forced")}
    assert rows["fixed:2"]["mflops_paper"] < rows["full"]["mflops_paper"]


def test_the_balance_loss_is_trained(dataset):
    """A weight that does nothing: experts that start uneven become even."""
    measured = []
    for balance in ("0", "1"):
        options = read_options(["--data", str(dataset), *TINY, "--routed", "none", "--experts", "4",
                                    "--lr", "0.01", "--balance_loss", balance], run.stored_options)
        torch.manual_seed(0)
        model = run.build(options, 300)
        for block in model.blocks:
            block.mlp.router.weight.data[0] += 0.2
        training = batches_of(open_data(str(dataset), "")[1], "train", options)
        optimizer = train.optimizer_of(model, options)
        for t in range(options.steps):
            train.step_once(model, optimizer, training, options, t, contextlib.nullcontext())
        batch = training.step(0, 99)
        balances = [routing.choice.balance.item() for _, routing in model.run_batch(batch)]
        measured.append(sum(balances) / batch.count)
    assert measured[1] < measured[0]


def test_combinations_that_cannot_be(capsys):
    """An option that would do nothing, or a method that another one excludes."""
    for words, said in {"--gate one": "no gradient", "--noops 2": "there are no experts",
                        "--experts 2 --objective mixed --routed none": "those would choose among tokens",
                        "--router random --causal_logit router": "nothing learns to route",
                        "--router random --predictor_loss 1": "nothing learns to route",
                        "--experts 2 --expert_capacity 0": "must be from",
                        "--experts 1": "leaves no choice"}.items():
        assert said in refused(capsys, train.main, *words.split())


def test_flops_of_decoding_with_experts():
    """No-ops that cost an MLP, choices that cost nothing."""
    model = tiny(**KINDS["integrated"])
    output = one_pass(model, texts(rows=1, T=12))
    visited, exit_at, worked = (t[0].numpy() for t in (output.visited, output.exit_at, output.worked))
    counted = cost.decoding(model.config, V, visited, exit_at, worked=worked).flops
    plain = cost.decoding(tiny(routed="none").config, V, visited, exit_at).flops
    idle = (visited & ~worked).sum()
    assert idle > 0 and plain - counted == idle * 4 * 64 * 16 - 12 * 4 * 2 * 16 * (2 + 2)
