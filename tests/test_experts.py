"""Experts [MoD 4.3] and the random control [MoD 3.3]; what the training path may not do."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Counter, V, one_pass, texts, tiny
from test_equivalence import RULES, by_steps, close, same

import cost
import evaluate
import exits
import run
import train
from data.batches import Batch
from experts import Experts
from model import position_ids
from options import Options
from routing import NO_POSITION, causal, predictor_loss, top_k

KINDS = {"moe": {"routed": "none", "experts": 3}, "integrated": {"routed": "none", "experts": 2, "noops": 2},
         "staged": {"routed": "odd", "experts": 2, "noops": 2}}


def experts(E, noops, capacity):
    torch.manual_seed(0)
    made = Experts(8, 12, E, noops, capacity).double()
    for p in made.parameters():
        torch.nn.init.normal_(p)
    return made, torch.randn(2, 12, 8, dtype=torch.float64), torch.arange(12).repeat(2, 1)


def in_a_loop(made, x, capacity):
    """Token by token: (T,C), the expert of every token. capacity: most tokens of an expert."""
    out, expert = torch.zeros_like(x), [-1] * len(x)
    p = [(made.router.weight @ token).softmax(0) for token in x]
    for e in range(made.experts):
        chosen_by = [t for t in range(len(x)) if int(p[t].argmax()) == e]
        for t in sorted(chosen_by, key=lambda t: (-p[t][e].item(), t))[:capacity]:
            out[t] = p[t][e] * (F.gelu(x[t] @ made.fc[e]) @ made.proj[e])
            expert[t] = e
    return out, expert


@pytest.mark.parametrize("E, noops, capacity", [(3, 2, 1.0), (2, 0, 0.5), (4, 4, 1.25), (1, 1, 1.0)])
def test_experts_are_the_loop_over_tokens(E, noops, capacity):
    """A token that runs an expert it did not choose, two experts or the weights of a no-op; a gate that is
    not its probability; places of an expert that stay empty filled or counted; padding that takes a place."""
    made, x, pos = experts(E, noops, capacity)
    pos[1, 7:] = NO_POSITION
    for route in (top_k, causal):
        out, worked, _ = made(x, pos, route)
        for b, T in enumerate((12, 7)):
            most = T if route is causal else max(1, round(capacity / (E + noops) * T))
            expected, expert = in_a_loop(made, x[b, :T], most)
            close(out[b, :T].detach(), expected.detach())
            assert worked[b, :T].tolist() == [e >= 0 for e in expert]
            assert not worked[b, T:].any() and not out[b, T:].any()
    assert worked.any() and (~worked[0]).any() == (noops > 0)


def test_the_balance_loss():
    """Not E sum f P in tokens, no-ops among the E: the number of tokens, if all is even; no gradient."""
    made, x, pos = experts(3, 1, 1.25)
    p = (x @ made.router.weight.T).softmax(-1).flatten(0, 1)
    share = torch.stack([(p.argmax(-1) == e).double().mean() for e in range(4)])
    *_, balance = made(x, pos, top_k)
    close(balance.detach(), (4 * 24 * (share * p.mean(0)).sum()).detach())
    balance.backward()
    assert made.router.weight.grad.abs().sum() > 0
    made.router.weight.data.zero_()
    for present in (12, 6):
        pos[1, present:] = NO_POSITION
        close(made(x, pos, top_k)[2].detach(), 12 + present)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_experts_is_reading_at_once(kind):
    """An expert that sees other or later tokens of the call, a row that changes another; experts of the
    selected tokens reported at other places, all of them, or of tokens that have exited."""
    model, ids = tiny(**KINDS[kind]), texts(T=12)
    for rule in (exits.full_depth, RULES["scattered"]):
        whole, (steps, _) = one_pass(model, ids, rule), by_steps(model, ids, rule)
        same(whole, steps)
        assert torch.equal(whole.worked, steps.worked) and (whole.worked <= whole.visited).all()
        idle = (whole.worked < whole.visited)[..., 3]       # of staged, a routed block
        assert whole.worked.any() and idle.any() == ("noops" in KINDS[kind])
    close(one_pass(model, ids[1:2], rule).logits[0], whole.logits[1])


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
        train.aligned(model, batch, 1 / 96, Options())[0].backward()
    assert 3 * cost.training(model.config, V, 32) == pytest.approx(counted.flops, rel=1e-9)


@pytest.mark.parametrize("options", [{}, *(pytest.param(options, marks=pytest.mark.slow) for options in (
    {"causal_logit": "router"}, {"router": "random"}, {"experts": 3, "noops": 1}))], ids=str)
def test_the_training_path_is_one_graph(options):
    """A shape or a branch that depends on the data: the host would wait for the device."""
    def loss(x):
        total = 0
        for block in model.blocks:
            x, routing = block(x, pos)
            total = total + (0 if routing.logit is None else predictor_loss(routing))
        return x.square().sum() + total

    model, pos = tiny(**options).train(), torch.arange(16).expand(3, 16)
    torch.compiler.reset()
    torch.compile(loss, backend="eager", fullgraph=True)(torch.randn(3, 16, 16, dtype=torch.float64))


@pytest.mark.parametrize("words", ["--experts 2 --noops 2 --routed none", "--experts 2",
                                   "--router random --gate one"])
def test_training_and_measuring(words, dataset, tmp_path, monkeypatch):
    """Experts or the control that do not learn, or whose FLOPs and arrays do not belong to their run."""
    monkeypatch.setattr(train, "finish", lambda *a: None)
    train.main(["--data", str(dataset), "--out", str(tmp_path), *TINY, "--lr", "0.01", *words.split()])
    lines = run.read_metrics(tmp_path / "001")
    assert lines[-1]["loss"]["top_k"][-1] < lines[0]["loss"]["top_k"][-1]
    evaluate.main(["--run", str(tmp_path / "001"), "--rules", "full", "fixed:2"])
    depth = np.load(tmp_path / "001" / "depth.npz")
    assert depth["worked"].shape == depth["visited"].shape
    rows = {r["rule"]: r for r in run.read_json(tmp_path / "001" / "evaluation.json", "forced")}
    assert rows["fixed:2"]["mflops_paper"] < rows["full"]["mflops_paper"]
