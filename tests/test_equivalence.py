"""Two ways to compute one thing agree: the project against loops from the papers, and against itself.

float64 throughout: decisions (exits, routes) must be equal, numbers close.
"""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import torch.nn as nn
from conftest import held, one_pass, texts, tiny, tiny_translator

import decode
import exits
from data.batches import Batch
from model import GPT, MLP, GPTConfig, position_ids
from options import Options
from routing import NO_POSITION, causal, predictor_loss, top_k
from train import aligned

MODELS = {
    "default": {},
    "dense": {"routed": "none"},
    "router decides": {"causal_logit": "router"},
    "sigmoid gate, separate classifiers": {"gate": "sigmoid", "classifier": "separate", "routed": "0,2,3"},
    "every block": {"routed": "all", "capacity": 0.5},
}
RULES = {"full": exits.full_depth, "fixed": exits.fixed_exit(2),
         "confidence": exits.confidence([0.24, 0.2, 0.2]),
         "scattered": lambda state: (1000 * state.states[-1][..., 0]).remainder(1) < 0.3}     # no pattern
both_kv = pytest.mark.parametrize("exited_kv", ["copy", "compute"])


@pytest.fixture(params=MODELS, ids=list(MODELS))
def model(request):
    return tiny(**MODELS[request.param])


@pytest.fixture(params=RULES, ids=list(RULES))
def rule(request):
    return RULES[request.param]


def naive(model):
    c = model.config
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    return reference.Reference(weights, c.n_layer, c.n_head, c.capacity, c.gate)


def in_loops(rule):
    """A halting rule as the loops call it: one token's vectors instead of (B,T,...) tensors."""
    def single(array):
        return torch.from_numpy(np.asarray(array))[None, None]

    def one(n, logits, h):
        pos = torch.zeros(1, 1, dtype=torch.long)
        state = exits.ExitState(lambda m, h: single(logits), None, pos, pos == 0)
        state.states = [single(h)] * n
        return bool(rule(state))
    return one


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-9)


def by_steps(model, ids, rule, chunks=None, memory=None, exited_kv="copy"):
    """Read ids (B,T) through a cache, `chunks` tokens at a time -> (their StepOutputs, joined, cache)."""
    cache, parts = decode.Cache(model, *ids.shape, memory), []
    for part, pos in zip(ids.split(chunks or 1, 1), position_ids(ids).split(chunks or 1, 1), strict=True):
        parts.append(decode.step(model, part, pos, cache, rule, causal, exited_kv))
    names = "logits exit_at visited weight worked classified predicted".split()
    return SimpleNamespace(**{name: torch.cat([getattr(p, name) for p in parts], 1) for name in names}), cache


def same(a, b):
    assert torch.equal(a.exit_at, b.exit_at) and torch.equal(a.visited, b.visited)
    close(a.logits, b.logits)


def test_training_forward_is_the_papers(model):
    """A fault in the block, the gate, the residual, the order or number of tokens selected [MoD eq. 1];
    losses of the exits and of the predictor that differ from sums written out by hand."""
    ids, targets = texts(), texts(2)
    layers = list(model.run_layers(model.embed(ids), position_ids(ids)))
    for b, row in enumerate(ids.tolist()):
        states, visited, weights, logits = naive(model).forward_top_k(row)
        losses = naive(model).losses(row, targets[b].tolist())
        for n, (h, routing) in enumerate(layers):
            close(h[b].detach(), states[n + 1])
            close(exits.token_losses(model.classifiers(n + 1, h[b]), targets[b]).sum().item(), losses[n + 1])
            if routing.weight is None:
                assert routing.runs.all() and visited[:, n].all()
                continue
            assert np.array_equal(routing.runs[b], visited[:, n])
            close(routing.weight[b].detach(), weights[:, n])
            close(routing.logit[b].detach(), logits[:, n])
            of_row = routing._replace(runs=routing.runs[b], logit=routing.logit[b])
            close(predictor_loss(of_row).item(), reference.bce(logits[:, n], visited[:, n]))


@both_kv
def test_decoding_is_the_papers(model, rule, exited_kv):
    """Keys and values of exited tokens that are missing, doubled, at another position or not true under
    "compute"; a state that goes on changing after the exit; rows of a batch that exit at different blocks and
    disturb each other: token by token against explicit lists."""
    ids = texts(rows=3, T=10)
    steps, cache = by_steps(model, ids, rule, None, None, exited_kv)
    whole = one_pass(model, ids, rule, exited_kv=exited_kv)
    if rule is RULES["scattered"]:
        assert whole.exit_at.unique().tolist() == [1, 2, 3, 4]
    for b, row in enumerate(ids.tolist()):
        logits, exit_at, visited, cached = naive(model).decode(row, in_loops(rule), exited_kv)
        for ours in (whole, steps):
            assert np.array_equal(ours.exit_at[b], exit_at) and np.array_equal(ours.visited[b], visited)
            close(ours.logits[b], logits)
        if exited_kv == "copy":
            assert [rows[b] for rows in held(cache)] == list(cached)


@both_kv
def test_any_chunking_of_the_prompt(model, rule, exited_kv):
    """A mask or a slot that is right only for one token, or only for an empty cache; a prompt in one call
    that does not follow the exit rule, or that routes by later tokens."""
    ids = texts()
    steps, _ = by_steps(model, ids, rule, None, None, exited_kv)
    for chunks in ([16], [5, 11], [1, 7, 1, 3, 4], [8, 3, 2, 1, 2]):
        same(by_steps(model, ids, rule, chunks, None, exited_kv)[0], steps)


@both_kv
@pytest.mark.parametrize("rule", [*RULES.values(), lambda state: state.pos < 3], ids=[*RULES, "late"])
def test_a_row_beside_padding_is_the_row_alone(model, rule, exited_kv):
    """Padding or finished rows that are attended to, routed, counted, said to have exited, or that move the
    slots and pending tokens of other rows."""
    rows, following = [[1, 2, 3], [6], [8, 9]], [[11, 12], [], [13, 14]]
    cache, length = decode.Cache(model, 3, 5), torch.tensor([[3], [1], [2]])
    first = decode.step(model, *decode.pad(rows, "cpu"), cache, rule, causal, exited_kv)
    ids, pos = decode.pad(following, "cpu")                             # the second row has ended
    later = torch.where(pos < NO_POSITION, pos + length, NO_POSITION)
    second = decode.step(model, ids, later, cache, rule, causal, exited_kv)
    for b, (row, tokens) in enumerate(zip(rows, following, strict=True)):
        alone = one_pass(model, torch.tensor([row + tokens]), rule, exited_kv=exited_kv)
        present = [*range(len(row)), *range(3, 3 + len(tokens))]
        absent = [c for c in range(5) if c not in present]
        for name in ("visited", "exit_at", "logits"):
            ours = torch.cat([getattr(first, name), getattr(second, name)], 1)[b]
            close(ours[present], getattr(alone, name)[0])
            if name != "logits":
                assert (ours[absent] == (4 if name == "exit_at" else 0)).all()


def test_weights_are_the_routers(model):
    """The weight of another block or row, or the predictor's logit; a weight where there is no router or the
    block did not run."""
    ids = texts()
    with torch.no_grad():
        layers = list(model.run_layers(model.embed(ids), position_ids(ids), route=causal))
    for last in (2, 4):
        exit_at = torch.tensor([last, 1, last]).unsqueeze(1).expand(3, 16)
        weight = one_pass(model, ids, exits.forced_exits(exit_at)).weight
        for n, (_, routing) in enumerate(layers):
            expected = torch.full((3, 16), torch.nan)
            if routing.weight is not None and n < last:
                expected = routing.weight.float()
                if n > 0:                           # of the state that the second row exited with
                    expected[1] = (layers[0][0][1] @ model.blocks[n].router.weight[0]).float()
            torch.testing.assert_close(weight[..., n], expected, equal_nan=True)


def test_batched_ragged_generation_is_single(model, rule):
    """Padding that is attended to, routed or counted; rows that share cache slots or random numbers; a greedy
    text, exits or visits from the cache that are not those of one pass over the finished text."""
    rows = [texts(seed=b, rows=1, T=T)[0].tolist() for b, T in enumerate((7, 1, 4))]
    for temperature in (0, 1.0):
        batch = decode.generate(model, rows, 8, rule, temperature=temperature, top_k=9)
        for b, (row, text) in enumerate(zip(rows, batch, strict=True)):
            alone = decode.generate(model, [[0]] * b + [row], 8, rule, temperature=temperature, top_k=9)[b]
            whole, T = one_pass(model, torch.tensor([text.ids]), rule), len(row)
            assert text.ids == alone.ids and text.prompt == T
            for values in (alone.exit_at, whole.exit_at[0, :-1]):
                assert np.array_equal(text.exit_at, values)
            for values in (alone.visited, whole.visited[0, :-1]):
                assert np.array_equal(text.visited, values)
            if temperature == 0:
                assert text.ids[T:] == whole.logits[0, T - 1:-1].argmax(-1).tolist()


def test_what_cannot_be_decoded_is_refused():
    """Positions clamped to the last one of the context; texts sampled with dropout."""
    model, translator, ids, full = tiny(), tiny_translator(), texts(), exits.full_depth
    with pytest.raises(ValueError, match="exceed the context of 24"):
        model(texts(T=25))
    memory = translator.encode(ids)
    model.train()
    translator.train()
    for call in (lambda: one_pass(model, ids),
                 lambda: decode.generate(model, [[1]], 3, full),
                 lambda: decode.speculate(model, [1], 3, 1, 2),
                 lambda: decode.beam_search(translator, [[1]] * 3, [3] * 3, full, 2, memory=memory),
                 lambda: decode.translate(translator, ids.tolist(), 1, full)):
        with pytest.raises(ValueError, match="eval"):
            call()


def test_a_row_that_ended_changes_nothing_for_the_others():
    """Rows that ended still writing to the cache, or cutting the others off."""
    model = tiny()
    free = decode.generate(model, [[1], [2], [3]], 10, exits.full_depth, temperature=0)
    end = free[0].ids[4]
    stopped = decode.generate(model, [[1], [2], [3]], 10, exits.full_depth, temperature=0, eos_id=end)
    for a, b in zip(free, stopped, strict=True):
        expected = a.ids[: a.ids.index(end, 1) + 1] if end in a.ids[1:] else a.ids
        assert b.ids == expected and len(b.exit_at) == len(b.ids) - 1
    assert len(stopped[0].ids) < len(free[0].ids)


@pytest.mark.parametrize("route", [top_k, causal])
def test_a_step_at_full_depth_is_forward_and_a_batch_is_its_rows(model, route):
    """Blocks that decode otherwise than they train; top-k of the flattened batch instead of each sequence."""
    ids = texts()
    whole = one_pass(model, ids, route=route)
    close(whole.logits, model(ids, route).detach())
    assert (whole.exit_at == 4).all()
    for b in range(len(ids)):
        alone = one_pass(model, ids[b:b + 1], route=route)
        assert torch.equal(whole.visited[b:b + 1], alone.visited)
        close(whole.logits[b:b + 1], alone.logits)


def test_capacity_one_and_r_one_is_dense_bit_for_bit():
    """[MoD eq. 1] residual doubled or scaled by r: x + r f(x) must be x + f(x) exactly at r = 1."""
    routed, dense = tiny(capacity=1.0), tiny(routed="none")
    weights = {k.replace(".block.", "."): v for k, v in routed.state_dict().items()}
    dense.load_state_dict({k: weights[k] for k in dense.state_dict()})
    for block in routed.blocks[1::2]:
        block.gate = torch.ones_like
    for m in (routed, dense):
        m.float()
    assert torch.equal(routed(texts()), dense(texts()))


def test_gradients_exit_by_exit_are_those_of_the_sum(model, monkeypatch):
    """The aligned loss walked back with one logits tensor alive, in chunks, is the naive sum of losses."""
    monkeypatch.setattr(exits, "CHUNK", 5 * 23)
    ids, targets = texts(1), texts(2)
    options = Options(exit_weights="sqrt(n)", predictor_loss=0.3)
    sums = aligned(model, Batch(ids, targets, position_ids(ids)), 1 / ids.numel(), options)
    ours = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, w = 0, [n**0.5 for n in (1, 2, 3, 4)]
    for n, (h, routing) in enumerate(model.run_layers(model.embed(ids), position_ids(ids)), 1):
        of_exit = exits.token_losses(model.classifiers(n, h), targets).sum()
        close(of_exit.item(), sums[n - 1])
        loss = loss + of_exit * w[n - 1] / sum(w)
        if routing.logit is not None:
            loss = loss + 0.3 * predictor_loss(routing)
    (loss / ids.numel()).backward()
    theirs = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for k in theirs:
        close(ours[k], theirs[k])


def test_a_model_in_bfloat16_decodes():
    """A rotary embedding or a routing rule that is made for other types."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_embd=32, block_size=256, capacity=0.5), 50).eval()
    ids, low = texts(T=200, vocab=50), GPT(model.config, 50).eval()
    low.load_state_dict(model.state_dict())
    low.bfloat16()
    for route in (top_k, causal):
        expected = model(ids, route)
        for logits in (low(ids, route), one_pass(low, ids, route=route).logits):
            assert logits.dtype == torch.bfloat16 and (logits - expected).norm() < 0.05 * expected.norm()
    row = decode.generate(low, [[1, 2], [3]], 20, exits.confidence([0.03] * 3), exited_kv="compute")[0]
    assert len(row.ids) == 22 and len(decode.speculate(low, [1, 2], 20, 1, 3).text.ids) == 22


# ----------------------------------------------------------------------------- modules are called as modules


def passes(model, ids):
    """Logits of decoding in two calls, and of the training form."""
    yield by_steps(model, ids, exits.full_depth, [10, 6])[0].logits
    yield model.train()(ids)
    model.eval()


OURS = ["blocks.0.mlp", "blocks.1.block.attn.qkv", "blocks.2.attn.proj", "blocks.1.predictor"]
TORCHS = ["blocks.1.router", "blocks.1.predictor.1", "classifiers.norms.4"]      # the compiler skips these


@pytest.mark.parametrize("part, how", [*itertools.product(OURS + TORCHS, ["hook", "pre-hook", "forward"]),
                                       *itertools.product(OURS, ["compiler"])])
def test_a_watched_module_is_called(part, how):
    """A call that goes around hooks, a forward of the user's own or the compiler, in decoding or training."""
    def saw(*args):
        seen.append(args)

    def compiled(graph, _):
        return lambda *args: saw() or graph(*args)

    model, ids, seen = tiny(capacity=1.0), texts(), []
    expected, module = list(passes(model, ids)), model.get_submodule(part)
    if how == "forward":
        forward, module.forward = module.forward, lambda *args: saw() or forward(*args)
    elif how == "compiler":
        torch.compiler.reset()
        module.compile(backend=compiled)
    else:
        (module.register_forward_hook if how == "hook" else module.register_forward_pre_hook)(saw)
    for logits, unwatched in zip(passes(model, ids), expected, strict=True):
        close(logits.detach(), unwatched.detach())
        assert seen
        seen.clear()


@pytest.mark.parametrize("kind", [tiny, tiny_translator])
def test_what_a_hook_keeps_stays_as_it_was(kind):
    """An output of a module, such as block.mlp's, that is overwritten in place afterwards."""
    def keep(module, args, output):
        if isinstance(output, torch.Tensor):
            kept.append((output, output.detach().clone()))

    model, kept, ids = kind(experts=2, noops=1), [], texts()
    for module in model.modules():
        module.register_forward_hook(keep)
    memory = model.encode(ids) if kind is tiny_translator else None
    by_steps(model, ids, RULES["scattered"], [10, 6], memory)
    aligned(model, Batch(ids, ids, position_ids(ids), memory and (ids, position_ids(ids))), 1.0, Options())
    assert len(kept) > 100 and all(torch.equal(output, copy) for output, copy in kept)


def test_a_replaced_activation_changes_the_causal_logit():
    """A predictor whose layers are computed by name, so that another SiLU does nothing."""
    model, ids = tiny(), texts()
    block, x, pos = model.blocks[1], model.wte(ids), position_ids(ids)
    before = block(x, pos)[1].logit
    block.predictor[1] = nn.Tanh()
    for cache in (None, decode.Cache(model, *ids.shape).layers[1]):
        after = block(x, pos, None, cache)[1].logit
        assert torch.equal(after, block.predictor(x).squeeze(-1)) and not torch.allclose(before, after)


def test_a_new_forward_of_a_class_is_called(monkeypatch):
    """The forward that a class had when it was first decoded with."""
    model, ids = tiny(), texts()
    before = one_pass(model, ids, route=top_k).logits
    monkeypatch.setattr(MLP, "forward", lambda self, x: 0 * x)
    assert not torch.equal(one_pass(model, ids, route=top_k).logits, before)
