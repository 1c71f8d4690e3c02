"""Products of few tokens against F.linear, and dropout."""
import platform
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import linear
from model import GPT, Block, GPTConfig, Memory, position_ids


@pytest.mark.parametrize("processor", ["AMD EPYC 9R14", "Intel(R) Xeon(R)", "arm64"])
@pytest.mark.parametrize("n, out, grad", [(1, 48, False), (3, 48, False), (8, 48, False), (9, 48, False),
                                          (8, 50, False), (8, 48, True)])
def test_few_tokens_are_as_many(n, out, grad, processor, monkeypatch):
    """A part of the matrix in the wrong place, tokens exchanged, a bias left out; also for inputs that do not
    lie in one piece. Eight parts with gradients (they would be lost) or where they are slower: on processors
    of other makers, for too many tokens, for rows that 8 does not divide."""
    seen, honest = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *args: seen.append(args) or honest(*args))
    monkeypatch.setattr(linear, "PROCESSOR", processor)
    rows = torch.randn(n, 12, dtype=torch.double)
    inputs = [rows, torch.stack([rows, rows], 2)[..., 0], rows[None], torch.stack([rows, -rows], 1)]
    for x in (*inputs, inputs[-1].transpose(0, 1)):
        for bias in True, False:
            seen.clear()
            layer = linear.Linear(12, out, bias, dtype=torch.double)
            with torch.set_grad_enabled(grad):
                y = layer(x)
            torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-12)
            assert len(seen) == ("AMD" in processor and x.numel() <= 8 * 12 and out == 48 and not grad)


@pytest.mark.parametrize("text, name", [
    ("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t:\nmodel name\t: AMD EPYC\n", "AMD EPYC"),
    ("processor\t: 0\nCPU part\t: 0xd0c\n", None), (None, None)])
def test_the_processor_is_told_by_its_system(text, name, monkeypatch):
    """A system that tells less, or nothing, stops every import."""
    monkeypatch.setattr(Path, "exists", lambda path: text is not None)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: text)
    told = runpy.run_path(linear.__file__)["PROCESSOR"].strip()
    assert told == (name or platform.processor() or platform.machine())


@pytest.mark.parametrize("Ce, share", [(None, 0.25), (8, 0.125)])
def test_each_part_of_a_model_is_dropped_out(Ce, share):
    """Dropout forgotten on one part or where the stream begins, done twice, or while evaluating."""
    torch.manual_seed(0)
    block, x = Block(32, 2, 16, 128, dropout=0.5, Ce=Ce), torch.randn(8, 16, 32)
    memory = Ce and Memory(torch.randn(8, 4, Ce), torch.ones(8, 4, dtype=torch.bool))
    update, *_ = block.residual(x, position_ids(x[..., 0]), memory=memory)
    h = GPT(GPTConfig(2, 2, 32, block_size=64, dropout=0.5), 50).embed(torch.randint(0, 50, (4, 64)))
    for dropped, expected in (update, share), (h, 0.5):
        assert (dropped == 0).float().mean().item() == pytest.approx(expected, abs=0.03)
    assert (block.eval().residual(x, position_ids(x[..., 0]), memory=memory)[0] != 0).all()
