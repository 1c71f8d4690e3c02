"""Two ways to compute one thing agree: the project against loops from the papers, and against itself.

float64 throughout: decisions (exits, routes) must be equal, numbers close.
"""
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import FOUR, held, one_pass, texts, tiny, tiny_translator
from reference import Reference, bce
from reference_seq2seq import Translator

import decode
import exits
from data.batches import Batch
from model import GPT, GPTConfig, Seq2Seq, position_ids
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
TRANSLATORS = {
    "translator": {"routed": "none"},
    "tied": {"routed": "none", "embeddings": "tied", "enc_embd": 16, "enc_head": 2},
    "routed": {"routed": "odd"},
    "separate": {"routed": "all", "classifier": "separate", "gate": "sigmoid", "capacity": 0.5},
}
RULES = {"full": exits.full_depth, "fixed": exits.fixed_exit(FOUR, 2),
         "confidence": exits.confidence(FOUR, 0.24, 0.2, 0.2),
         "scattered": lambda state: (1000 * state.states[-1][..., 0]).remainder(1) < 0.3}     # no pattern
both_kv = pytest.mark.parametrize("exited_kv", ["copy", "compute"])
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
every_model = pytest.mark.parametrize("model", [*MODELS, *TRANSLATORS], indirect=True)      # not GPTs alone


@pytest.fixture(params=MODELS)
def model(request):
    name = request.param
    return tiny(**MODELS[name]) if name in MODELS else tiny_translator(**TRANSLATORS[name])


def sources_of(model):
    """Three sources of a translator as lists of ids, and its Memory of them."""
    ids = texts(5, T=7)
    return (ids.tolist(), model.encode(ids)) if isinstance(model, Seq2Seq) else ([None] * 3, None)


def naive(model, source=None):
    """The loops with the weights of a model, which may change in place; of a Seq2Seq with one source."""
    c, weights = model.config, {k: v.detach().numpy() for k, v in model.state_dict().items()}
    options = c.n_layer, c.n_head, c.capacity, c.gate
    if source is None:
        return Reference(weights, *options)
    return Translator(weights, source, c.enc_layer, c.enc_head, *options)


def in_loops(rule):
    """A halting rule as the loops call it: one token's vectors instead of (B,T,...) tensors."""
    def single(array):
        return torch.from_numpy(np.asarray(array))[None, None]

    def one(n, logits, h):
        pos = torch.zeros(1, 1, dtype=torch.long)
        state = exits.ExitState(lambda m, h: single(logits), pos, pos == 0)
        state.states = [single(h)] * n
        return bool(rule(state))
    return one


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-9)


def by_steps(model, ids, rule, chunks=None, memory=None, exited_kv="copy"):
    """Read ids (B,T) through a cache, `chunks` tokens at a time -> (their StepOutputs as one, cache)."""
    cache, parts = decode.Cache(model, *ids.shape, memory), []
    for part, pos in zip(ids.split(chunks or 1, 1), position_ids(ids).split(chunks or 1, 1), strict=True):
        parts.append(decode.step(model, part, pos, cache, rule, causal, exited_kv))
    return decode.StepOutput(*(torch.cat(part, 1) for part in zip(*parts, strict=True))), cache


def row_of(output, b):
    """One row of a StepOutput."""
    return decode.StepOutput(*(part[b] for part in output))


def check(text, checker, rule, ids=None, exited_kv="copy"):
    """The exits and visits of a text are those of the loops: of a Generated, or of a row of a StepOutput and
    the ids that it read, whose logits are those of the loops too -> entries of their caches."""
    logits, exit_at, visited, cached = checker.decode(ids or text.ids[:-1], rule, exited_kv)
    assert np.array_equal(text.exit_at, exit_at) and np.array_equal(text.visited, visited)
    if ids:
        close(text.logits, logits)
    return list(cached)


def gradients(model, objective):
    """{name: gradient} of the loss that objective() returns, and the losses of the exits."""
    model.zero_grad()
    loss, losses = objective()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}, losses


def same(a, b):
    assert torch.equal(a.exit_at, b.exit_at) and torch.equal(a.visited, b.visited)
    close(a.logits, b.logits)


@every_model
def test_training_forward_is_the_papers(model):
    """A fault in the block, the gate, the residual, the order or number of tokens selected [MoD eq. 1], in a
    batch or as decoding does it; in the encoder, in cross-attention or where it stands in the block; losses
    of the exits and of the predictor that are not sums over rows; encoder output that decoding has read and
    training then cannot go back through."""
    ids, targets, losses_of_predictor = texts(), texts(2), np.zeros(4)
    sources, memory = sources_of(model)
    for route in top_k, causal:
        cache = decode.Cache(model, *ids.shape, memory)
        close(one_pass(model, ids, route=route, cache=cache).logits, model(ids, route, memory).detach())
    layers = list(model.run_layers(model.embed(ids), position_ids(ids), memory=memory))
    for b, row in enumerate(ids.tolist()):
        checker = naive(model, sources[b])
        states, visited, weights, logits = checker.forward(row)
        losses = checker.losses(row, targets[b].tolist())
        for n, (h, routing) in enumerate(layers):
            close(h[b].detach(), states[n + 1])
            close(exits.token_losses(model.classifiers(n + 1, h[b]), targets[b]).sum().item(), losses[n + 1])
            if routing.weight is None:
                assert routing.runs.all() and visited[:, n].all()
                continue
            assert np.array_equal(routing.runs[b], visited[:, n])
            close(routing.weight[b].detach(), weights[:, n])
            close(routing.logit[b].detach(), logits[:, n])
            losses_of_predictor[n] += bce(logits[:, n], visited[:, n])
    close([0 if r.logit is None else predictor_loss(r).item() for _, r in layers], losses_of_predictor)
    close(model(ids, memory=memory).detach(), model.classifiers(4, layers[-1][0]).detach())
    found, _ = gradients(model, lambda: (model(ids, memory=memory).sum(), None))
    assert memory is None or found["encoder.norm.weight"].abs().sum() > 0


@both_kv
@each_rule
@every_model
def test_decoding_is_the_papers(model, rule, exited_kv):
    """Keys and values of exited tokens that are missing, doubled, at another position or not true under
    "compute"; a state that goes on changing after the exit; rows of a batch that exit at different blocks and
    disturb each other: token by token against explicit lists, with a source and without."""
    ids, (sources, memory) = texts(4, T=10), sources_of(model)
    steps, cache = by_steps(model, ids, rule, None, memory, exited_kv)
    same(by_steps(model, ids, rule, 10, memory, exited_kv)[0], steps)
    if rule is RULES["scattered"]:
        assert steps.exit_at.unique().tolist() == [1, 2, 3, 4]
    for b, row in enumerate(ids.tolist()):
        cached = check(row_of(steps, b), naive(model, sources[b]), in_loops(rule), row, exited_kv)
        if exited_kv == "copy":
            assert [rows[b] for rows in held(cache)] == cached


@both_kv
@each_rule
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
    rows, following = [[1, 2, 3], [6], [8, 9]], [[11, 12], [], [13, 14]]            # the second row has ended
    cache, later = decode.Cache(model, 3, 5), torch.tensor([[3, 4], [NO_POSITION, NO_POSITION], [2, 3]])
    outputs = [decode.step(model, *part, cache, rule, causal, exited_kv)
               for part in (decode.pad(rows, "cpu"), (decode.pad(following, "cpu")[0], later))]
    present = cache.pos < NO_POSITION
    for b, (row, tokens) in enumerate(zip(rows, following, strict=True)):
        alone = one_pass(model, torch.tensor([row + tokens]), rule, exited_kv=exited_kv)
        for name in ("visited", "exit_at", "logits"):
            ours = torch.cat([getattr(output, name) for output in outputs], 1)[b]
            close(ours[present[b]], getattr(alone, name)[0])
            assert name == "logits" or (ours[~present[b]] == (4 if name == "exit_at" else 0)).all()


def test_weights_are_the_routers(model):
    """The weight of another block or state, or the predictor's logit; a weight where there is no router or
    the block did not run."""
    ids, states = texts(), []
    rule = RULES["scattered"]
    weight = one_pass(model, ids, lambda state: states.append(state.states[-1]) or rule(state)).weight
    states = [model.wte(ids).detach(), *states]
    for n, block in enumerate(model.blocks):
        expected = torch.full((3, 16), torch.nan)
        if hasattr(block, "router"):
            expected = (states[n] @ block.router.weight[0].detach()).float()
        torch.testing.assert_close(weight[..., n], expected, equal_nan=True)
    assert one_pass(model, ids, exits.fixed_exit(FOUR, 2)).weight[..., 2:].isnan().all()


@each_rule
def test_batched_ragged_generation_is_single(model, rule):
    """Padding that is attended to, routed or counted; rows that share cache slots or random numbers; a greedy
    text, exits or visits from the cache that are not those of one pass over the finished text; rows that
    ended still writing to the cache, or cutting the others off."""
    rows = [texts(seed=b, rows=1, T=T)[0].tolist() for b, T in enumerate((7, 1, 4))]
    for temperature in (0, 1.0):
        options = {"temperature": temperature, "top_k": 9}
        batch = decode.generate(model, rows, 8, rule, **options)
        end = batch[0].ids[-4]
        stopped = decode.generate(model, rows, 8, rule, eos_id=end, **options)
        for b, (row, text) in enumerate(zip(rows, batch, strict=True)):
            alone = decode.generate(model, [[0]] * b + [row], 8, rule, **options)[b]
            whole, T = one_pass(model, torch.tensor([text.ids]), rule), len(row)
            assert text.ids == alone.ids and text.prompt == T
            for ours in (text, alone):
                assert np.array_equal(ours.exit_at, whole.exit_at[0, :-1])
                assert np.array_equal(ours.visited, whole.visited[0, :-1])
            if temperature == 0:
                assert text.ids[T:] == whole.logits[0, T - 1:-1].argmax(-1).tolist()
            until = text.ids.index(end, T) + 1 if end in text.ids[T:] else len(text.ids)
            assert stopped[b].ids == text.ids[:until] and len(stopped[b].exit_at) == until - 1


@pytest.mark.parametrize("kind", [*MODELS.values(), {"experts": 2, "noops": 1}], ids=str)
def test_gradients_exit_by_exit_are_those_of_the_sum(kind, monkeypatch):
    """The aligned loss walked back in chunks, with one logits tensor alive, that is not the naive sum; a
    predictor's or a balance loss without its weight; another routing rule than the one asked for."""
    monkeypatch.setattr(exits, "CHUNK", 5 * 23)
    model, ids, targets, loss = tiny(**kind), texts(1), texts(2), 0
    options = Options(exit_weights="sqrt(n)", predictor_loss=0.3, balance_loss=0.2, route="causal")
    batch = Batch(ids, targets, position_ids(ids))
    ours, sums = gradients(model, lambda: aligned(model, batch, 1 / ids.numel(), options))
    for n, (h, routing) in enumerate(model.run_layers(model.embed(ids), position_ids(ids), route=causal), 1):
        of_exit = exits.token_losses(model.classifiers(n, h), targets).sum()
        close(of_exit.item(), sums[n - 1])
        loss = loss + of_exit * n**0.5 / (1 + 2**0.5 + 3**0.5 + 2)
        if routing.logit is not None:
            loss = loss + 0.3 * predictor_loss(routing)
        if routing.balance is not None:
            loss = loss + 0.2 * routing.balance
    theirs, _ = gradients(model, lambda: (loss / ids.numel(), None))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_model_in_bfloat16_decodes():
    """A rotary embedding or a routing rule that is made for other types."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_embd=32, block_size=256, capacity=0.5), 50).eval()
    ids, low = texts(T=200, vocab=50), deepcopy(model).bfloat16()
    for route in (top_k, causal):
        expected = model(ids, route)
        for logits in (low(ids, route), one_pass(low, ids, route=route).logits):
            assert logits.dtype == torch.bfloat16 and (logits - expected).norm() < 0.05 * expected.norm()
    row = decode.generate(low, [[1, 2], [3]], 20, exits.confidence(FOUR, 0.03), exited_kv="compute")[0]
    assert len(row.ids) == 22


OURS = ["blocks.0.mlp", "blocks.0.cross", "blocks.1.block.attn.qkv", "blocks.2.attn", "blocks.1.predictor"]
ALL = [*OURS, "blocks.1.router", "blocks.1.predictor.1", "classifiers.norms.4"]     # torch's: not compiled


@pytest.mark.parametrize("how, parts", [("hook", ALL), ("forward", ALL),
                                        pytest.param("compiler", OURS, marks=pytest.mark.slow)])
def test_modules_are_called_as_modules(how, parts):
    """A call that goes around hooks, a forward of the user's own, another activation or the compiler, in
    decoding or training; an output that is overwritten in place afterwards."""
    def watch(name, module, forward):
        def saw(*args):
            seen.add(name)
            output = args[-1][0] if how == "compiler" else args[-1]
            kept.append((output, output.detach().clone()))
            return args[-1]
        if how == "hook":
            module.register_forward_hook(saw)
        elif how == "forward":
            module.forward = lambda *args: saw(forward(*args))
        else:
            module.compile(backend=lambda graph, _: lambda *args: saw(graph(*args)))

    torch.compiler.reset()
    model, ids, kept = tiny_translator(capacity=1.0), texts(), []
    for name in parts:
        watch(name, model.get_submodule(name), model.get_submodule(name).forward)
    for run in (lambda: by_steps(model, ids, exits.full_depth, [10, 6], model.encode(ids)),
                lambda: model.train()(ids, memory=model.encode(ids))):
        seen = set()
        run()
        assert seen == set(parts)
    assert all(torch.equal(output, copy) for output, copy in kept)
