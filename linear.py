"""Linear layers as decoding and decisions need them: fast for a few tokens, exact under autocast."""
import platform
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


def processor():
    """Vendor and name of this machine's processor, as far as its system tells them."""
    told = Path("/proc/cpuinfo")
    known = re.findall(r"(?:vendor_id|model name)\s*: (.+)", told.read_text("utf-8") if told.exists() else "")
    return " ".join(known[:2]) or platform.processor() or platform.machine()


PROCESSOR = processor()
AMD, INTEL = "AuthenticAMD" in PROCESSOR, "GenuineIntel" in PROCESSOR
LARGE = 2**17  # a matrix of more numbers is read anew for every token, others may stay in the caches
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed(weight):
    """A copy of weight (out,C) in the order in which many rows meet it fastest, kept with the parameter until
    that changes: oneDNN's own on AMD, 8 parts of its transpose (8,C,out/8) on Intel."""
    now = weight._version, weight.data_ptr()
    if getattr(weight, "packed", (None,))[0] != now:
        weight.packed = now, (torch.ops.mkldnn._reorder_linear_weight(weight) if AMD else
                              weight.view(8, -1, weight.size(1)).transpose(1, 2).contiguous())
    return weight.packed[1]


def linear(x, weight, bias=None):
    """F.linear. Decoding on a CPU waits for weights to be read, and how long depends on who made it. In
    inference mode four rows or more meet a packed copy of a large matrix, on AMD (five tokens) by a private
    operator of torch.compile, on Intel as a batch of 8 parts. A few tokens on AMD meet a batch of 16 parts:
    all threads read a batch there, but one alone a matrix for so few vectors."""
    some = AMD or INTEL and x.size(0) > 3           # rows
    if not some or not x.is_cpu or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    (out, C), n = weight.shape, x.numel() // x.size(-1)
    large = out * C > LARGE and x.dtype == torch.float32 and torch.is_inference_mode_enabled()
    many = large and x.size(0) > 3 and not weight.is_inference()    # one text's prompt is read only once, and
    if AMD and large and n > 4 and ONEDNN:                          # changes in inference mode nobody counts
        weight = packed(weight) if many else weight
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if AMD and n <= 8 and out % 16 == 0:
        parts, columns = weight.view(16, -1, C), x.contiguous().as_strided((16, C, n), (0, 1, C))
        y = torch.bmm(parts, columns) if bias is None else torch.baddbmm(bias.view(16, -1, 1), parts, columns)
        return (y if n == 1 else y.view(out, n).t().contiguous()).view(*x.shape[:-1], out)  # y^T = W x^T + b
    if INTEL and many and n <= 64 and out % 8 == 0:
        y = torch.bmm(x.reshape(1, n, C).expand(8, -1, -1), packed(weight)).transpose(0, 1)     # (n,8,out/8)
        y = y if bias is None else torch.add(y, bias.view(8, -1), out=y.new_empty(n, 8, out // 8))
        return y.reshape(*x.shape[:-1], out)
    return F.linear(x, weight, bias)


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
