"""Linear layers for few tokens against F.linear, and decisions under autocast."""
import copy
import io
import platform

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import decode
from exits import full_depth
from linear import ONEDNN, Linear, gelu, in_full, linear, processor
from model import GPT, Block, GPTConfig, Now, Source, Tokens, positions
from routing import causal


@pytest.fixture(params=["amd", "intel", "other"])
def maker(request, monkeypatch):
    """Who made the processor: paths for other makers run everywhere, only slower."""
    monkeypatch.setattr("linear.AMD", request.param == "amd")
    monkeypatch.setattr("linear.INTEL", request.param == "intel")
    monkeypatch.setattr("linear.LARGE", 0)
    return request.param


def packs(n, out, maker):
    """Are matrices of `out` rows packed for n rows of x?"""
    return {"amd": ONEDNN and n > 4, "intel": 4 <= n <= 64 and out % 8 == 0, "other": False}[maker]


@pytest.mark.parametrize("out", [48, 50])
@pytest.mark.parametrize("n", [*range(1, 19)])
def test_few_tokens_are_as_many(n, out, maker):
    """A part of the matrix in the wrong place, tokens exchanged, a bias left out, a gradient lost; also for
    inputs that do not lie in one piece, and rows in two dimensions."""
    torch.manual_seed(n)
    layer = Linear(12, out).double()
    rows = torch.randn(n, 12, dtype=torch.double, requires_grad=True)
    inputs = [rows, torch.stack([rows, rows], 2)[..., 0], rows[None], rows[:, None]]
    inputs += [torch.cat([rows, rows]).view(2, n, 12)[:, ::2].transpose(0, 1)]
    for x in inputs:
        for bias in (layer.bias, None):
            layer.bias, kept = bias, layer.bias
            got, wanted = layer(x), F.linear(x, layer.weight, bias)
            layer.bias = kept
            assert got.shape == wanted.shape and torch.allclose(got, wanted, rtol=0, atol=1e-12)
            params = [rows, layer.weight, *([bias] if bias is not None else [])]
            for a, b in zip(*(torch.autograd.grad(y.square().sum(), params) for y in (got, wanted)),
                            strict=True):
                assert torch.allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("out", [48, 50])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 64, 65])
def test_packed_matrices_follow_their_weights(n, out, maker):
    """A matrix packed once and used after its weights have changed, by a step, by other memory, as another
    parameter, through .data before a new cache; packed where gradients are wanted, or for one text alone."""
    def agree():
        for x in (rows, rows[None], rows[:, None], torch.stack([rows, rows], 2)[..., 0]):
            for bias in (layer.bias, None):
                with torch.inference_mode():
                    torch.testing.assert_close(linear(x, layer.weight, bias), F.linear(x, layer.weight, bias))

    torch.manual_seed(n)
    layer, rows = Linear(12, out), torch.randn(n, 12)
    with torch.inference_mode():
        layer(rows[None])
        copy.deepcopy(layer).double()(rows.double())
    assert not hasattr(layer.weight, "packed") and layer(rows).requires_grad
    agree()
    assert hasattr(layer.weight, "packed") == packs(n, out, maker)
    with torch.no_grad():
        layer.weight.add_(1)
    agree()
    layer.weight.data = torch.randn(out, 12)
    agree()
    layer.weight = nn.Parameter(torch.randn(out, 12))
    agree()
    with torch.inference_mode():
        layer.weight = nn.Parameter(torch.randn(out, 12))
        agree()
        layer.weight.add_(1)
    agree()


@pytest.mark.parametrize("n", [1, 8, 9])
def test_a_matrix_is_cut_only_where_that_is_faster(n, maker, monkeypatch):
    """Sixteen parts on processors of other makers, where they take twice the time, or for too many tokens."""
    def watched(*args):
        seen.append(args)
        return honest(*args)

    seen, layer, honest = [], Linear(16, 32), torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", watched)
    layer(torch.randn(n, 16))
    assert len(seen) == (maker == "amd" and n <= 8)


@pytest.mark.parametrize("text, found", [
    ("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9R14\nflags\t\t:\n", "AuthenticAMD AMD EPYC 9R14"),
    ("processor\t: 0\nCPU part\t: 0xd0c\n", platform.machine()), (None, "")])
def test_the_processor_is_told_by_its_system(text, found, monkeypatch):
    """A system that tells nothing, or less, stops every import."""
    monkeypatch.setattr("pathlib.Path.exists", lambda path: text is not None)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, encoding: text)
    assert processor().startswith(found) and processor()


def test_small_matrices_are_not_packed(maker, monkeypatch):
    """A copy of every matrix, of which the caches hold the small ones anyway."""
    layer = Linear(12, 48)
    for size, wanted in (12 * 48, False), (12 * 48 - 1, packs(6, 48, maker)):
        monkeypatch.setattr("linear.LARGE", size)
        with torch.inference_mode():
            layer(torch.randn(6, 12))
        assert hasattr(layer.weight, "packed") == wanted


def test_compiled_layers_leave_packing_to_the_compiler(maker):
    """A question that the compiler cannot follow, and so a graph in pieces."""
    layer, x = Linear(12, 48), torch.randn(6, 12)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_a_cache_begins_with_the_weights_as_they_are(maker):
    """Weights changed through .data, which nobody counts, and an old packed copy of them."""
    model, ids = GPT(GPTConfig(2, 2, 32, block_size=16), 50).eval(), torch.randint(0, 50, (6, 8))
    for _ in range(2):
        for p in model.parameters():
            p.data.mul_(1.5)
        found = decode.read(model, ids, positions(ids), None, full_depth, causal)
        assert hasattr(model.blocks[0].attn.qkv.weight, "packed") == packs(6 * 8, 96, maker)
        torch.testing.assert_close(found.logits, model(ids, causal).detach(), atol=1e-4, rtol=1e-4)


def test_packed_matrices_stay_out_of_checkpoints(maker):
    """A copy of the weights that is written with them, or keeps a deep copy from its own."""
    torch.manual_seed(0)
    layer, x = Linear(12, 48), torch.randn(6, 12)
    with torch.inference_mode():
        before, again = layer(x), copy.deepcopy(layer)
        again.weight.zero_()
        again.bias.zero_()
        assert torch.equal(again(x), torch.zeros(6, 48)) and torch.equal(layer(x), before)
    torch.save(layer.state_dict(), written := io.BytesIO())
    written.seek(0)
    assert not vars(torch.load(written, weights_only=True)["weight"])


@pytest.mark.parametrize("n", [1, 16, 17])
@pytest.mark.parametrize("enabled", [True, False])
def test_gelu_of_few_tokens_is_the_same_and_leaves_the_setting_alone(n, enabled, monkeypatch):
    """Another GELU; oneDNN off for everything that comes after; a setting of the user's turned on."""
    def watched(x):
        seen.append(torch.backends.mkldnn.enabled)
        return honest(x)

    seen, x, honest = [], torch.randn(n, 1, 48), F.gelu
    monkeypatch.setattr(F, "gelu", watched)
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, enabled
    try:
        y = gelu(x)
        assert torch.backends.mkldnn.enabled == enabled
    finally:
        torch.backends.mkldnn.enabled = before
    assert seen == [enabled and n > 16]
    torch.testing.assert_close(y, x * torch.special.ndtr(x))


def test_decisions_are_made_in_full():
    """A router that decides in bfloat16, or a type that stays behind."""
    torch.manual_seed(0)
    module, x = nn.Sequential(Linear(16, 32), nn.SiLU(), Linear(32, 1)), torch.randn(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        assert torch.equal(in_full(module, x.bfloat16()), in_full(module, x.bfloat16().float()))
        assert not torch.equal(in_full(module, x), module(x).float())
        inside = in_full(module, x)
    assert inside.dtype == torch.float32 and torch.allclose(inside, module(x), atol=1e-6)
    assert torch.equal(in_full(module, x), module(x))


@pytest.mark.parametrize("Ce, share", [(None, 0.25), (8, 0.125)])
def test_each_part_of_a_block_is_dropped_out(Ce, share):
    """Dropout forgotten on one part, done twice, or while evaluating."""
    torch.manual_seed(0)
    block, x = Block(32, 2, 16, dropout=0.5, Ce=Ce), torch.randn(8, 16, 32)
    past = Now(Ce and Source(torch.randn(8, 4, Ce), torch.ones(8, 4, dtype=torch.bool)))
    at = Tokens(positions(x[..., 0]))
    assert (block.residual(x, at, past, None)[0] == 0).float().mean().item() == pytest.approx(share, abs=0.03)
    block.eval()
    assert (block.residual(x, at, past, None)[0] != 0).all()


def test_embeddings_are_dropped_out():
    """Dropout forgotten where the stream begins."""
    model = GPT(GPTConfig(2, 2, 32, block_size=64, dropout=0.5), 50)
    h = model.embed(torch.randint(0, 50, (4, 64)))
    assert (h == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
