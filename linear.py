"""Linear layers as decoding and decisions need them: fast for a few tokens, exact under autocast."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def linear(x, weight, bias=None):
    """F.linear. A few tokens on a CPU are multiplied by a batch of 16 parts of the matrix: decoding waits for
    weights to be read, and BLAS lets all threads read a batch, but one alone a matrix for so few vectors."""
    (*shape, C), out = x.shape, len(weight)
    n = math.prod(shape)
    if n > 16 or out % 16 or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    parts = weight.view(16, -1, C)
    if n <= 8:                                                                          # y^T = W x^T + b
        columns = x.contiguous().as_strided((16, C, n), (0, 1, C))
        y = torch.bmm(parts, columns) if bias is None else torch.baddbmm(bias.view(16, -1, 1), parts, columns)
        y = y if n == 1 else y.view(out, n).t().contiguous()
    else:                                                                               # y = x W^T + b
        rows, parts = x.reshape(n, C).expand(16, n, C), parts.transpose(1, 2)
        y = torch.bmm(rows, parts) if bias is None else torch.baddbmm(bias.view(16, 1, -1), rows, parts)
        y = y.transpose(0, 1)
    return y.reshape(*shape, out)


def gelu(x):
    """F.gelu. For a few tokens on a CPU not oneDNN's, which takes 25 us to begin."""
    if not x.is_cpu or x.numel() > 16 * x.size(-1) or torch.compiler.is_compiling():
        return F.gelu(x)
    onednn = torch.backends.mkldnn
    before, onednn.enabled = onednn.enabled, False
    y = F.gelu(x)
    onednn.enabled = before
    return y


class Linear(nn.Linear):
    """nn.Linear that reads its weights fast for a few tokens."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def in_full(module, x, method=None):
    """module(x), or method(x), in the precision of the module's parameters even under autocast: decisions are
    made of it."""
    function = method or module
    if not torch.is_autocast_enabled(x.device.type):
        return function(x)
    with torch.autocast(x.device.type, enabled=False):
        return function(x.to(next(module.parameters()).dtype))
