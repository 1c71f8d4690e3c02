"""Products of few tokens against F.linear, decisions under autocast, and dropout."""
import platform
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import linear
from linear import Linear, in_full_precision
from model import GPT, Block, GPTConfig, Memory, position_ids


@pytest.fixture(params=["AMD EPYC 9R14", "Intel(R) Xeon(R)", "arm64"])
def processor(request, monkeypatch):
    """Who made the processor: the form for another maker runs everywhere, only slower."""
    monkeypatch.setattr("linear.PROCESSOR", request.param)
    return request.param


@pytest.mark.parametrize("out", [48, 50])
@pytest.mark.parametrize("n", [*range(1, 10), 18])
@pytest.mark.parametrize("grad", [False, True])
def test_few_tokens_are_as_many(n, out, grad, processor):
    """A part of the matrix in the wrong place, tokens exchanged, a bias left out, a gradient lost; also for
    inputs that do not lie in one piece, and rows in two dimensions."""
    torch.manual_seed(n)
    weight, b = torch.randn(out, 12, dtype=torch.double), torch.randn(out, dtype=torch.double)
    rows = torch.randn(n, 12, dtype=torch.double)
    parameters = [tensor.requires_grad_(grad) for tensor in (rows, weight, b)]
    inputs = [rows, torch.stack([rows, rows], 2)[..., 0], rows[None], rows[:, None]]
    inputs += [torch.cat([rows, rows]).view(2, n, 12)[:, ::2].transpose(0, 1)]
    for x in inputs:
        for bias in (b, None):
            with torch.set_grad_enabled(grad):
                y, expected = linear.linear(x, weight, bias), F.linear(x, weight, bias)
            assert y.shape == expected.shape and torch.allclose(y, expected, rtol=0, atol=1e-12)
            if grad:
                wanted = parameters[:2 if bias is None else 3]
                ours, theirs = (torch.autograd.grad(out.square().sum(), wanted) for out in (y, expected))
                for g, h in zip(ours, theirs, strict=True):
                    assert torch.allclose(g, h, rtol=0, atol=1e-9)


@pytest.mark.parametrize("n, out, grad", [(1, 32, False), (8, 32, False), (9, 32, False), (8, 36, False),
                                          (8, 32, True)])
def test_a_matrix_is_cut_only_where_that_is_faster(n, out, grad, processor, monkeypatch):
    """Eight parts on processors of other makers, where they take twice the time, for too many tokens, for
    rows that 8 does not divide, or where gradients are wanted."""
    def watched(*args):
        seen.append(args)
        return honest(*args)

    seen, honest = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", watched)
    with torch.set_grad_enabled(grad):
        Linear(16, out)(torch.randn(n, 16))
    assert len(seen) == ("AMD" in processor and n <= 8 and out == 32 and not grad)


@pytest.mark.parametrize("text, name", [
    ("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t:\nmodel name\t: AMD EPYC\n", "AMD EPYC"),
    ("processor\t: 0\nCPU part\t: 0xd0c\n", None), (None, None)])
def test_the_processor_is_told_by_its_system(text, name, monkeypatch):
    """A system that tells less, or nothing, stops every import."""
    monkeypatch.setattr(Path, "exists", lambda path: text is not None)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: text)
    told = runpy.run_path(linear.__file__)["PROCESSOR"].strip()
    assert told == (name or platform.processor() or platform.machine())


def test_decisions_are_made_in_full_precision():
    """A router that decides in bfloat16, or a type that stays behind."""
    torch.manual_seed(0)
    module, x = nn.Sequential(Linear(16, 32), nn.SiLU(), Linear(32, 1)), torch.randn(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        low = x.bfloat16()
        assert torch.equal(in_full_precision(module, low), in_full_precision(module, low.float()))
        assert not torch.equal(in_full_precision(module, x), module(x).float())
        inside = in_full_precision(module, x)
    assert inside.dtype == torch.float32 and torch.allclose(inside, module(x), atol=1e-6)
    assert torch.equal(in_full_precision(module, x), module(x))


@pytest.mark.parametrize("Ce, share", [(None, 0.25), (8, 0.125)])
def test_each_part_of_a_block_is_dropped_out(Ce, share):
    """Dropout forgotten on one part, done twice, or while evaluating."""
    torch.manual_seed(0)
    block, x = Block(32, 2, 16, 128, dropout=0.5, Ce=Ce), torch.randn(8, 16, 32)
    memory = Ce and Memory(torch.randn(8, 4, Ce), torch.ones(8, 4, dtype=torch.bool))
    update, _ = block.residual(x, position_ids(x[..., 0]), memory=memory)
    assert (update == 0).float().mean().item() == pytest.approx(share, abs=0.03)
    block.eval()
    assert (block.residual(x, position_ids(x[..., 0]), memory=memory)[0] != 0).all()


def test_embeddings_are_dropped_out():
    """Dropout forgotten where the stream begins."""
    model = GPT(GPTConfig(2, 2, 32, block_size=64, dropout=0.5), 50)
    h = model.embed(torch.randint(0, 50, (4, 64)))
    assert (h == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
