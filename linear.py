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
AMD = "AuthenticAMD" in PROCESSOR
LARGE = 2**17  # a matrix of more numbers is read anew for every token, others may stay in the caches
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed(weight):
    """A copy of weight in oneDNN's own order, kept with the parameter until that changes."""
    if weight.is_inference():               # whose changes nobody counts
        return weight
    now = weight._version, weight.data_ptr()
    if getattr(weight, "packed", (None,))[0] != now:
        weight.packed = now, torch.ops.mkldnn._reorder_linear_weight(weight)
    return weight.packed[1]


def linear(x, weight, bias=None):
    """F.linear. Decoding on a CPU waits for weights to be read. On AMD a few tokens are multiplied by a batch
    of 16 parts of the matrix: BLAS lets all threads read a batch there, but one alone a matrix for so few
    vectors. More rows, in inference mode, meet a packed copy of a large matrix, by a private operator of
    torch.compile."""
    (out, C), n = weight.shape, x.numel() // x.size(-1)
    if not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    large = n > 4 and ONEDNN and out * C > LARGE and x.dtype == torch.float32
    if large and not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        weight = packed(weight) if len(x) > 4 else weight               # one text's prompt is read only once
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if n > 8 or out % 16 or not AMD:
        return F.linear(x, weight, bias)
    parts, columns = weight.view(16, -1, C), x.contiguous().as_strided((16, C, n), (0, 1, C))
    y = torch.bmm(parts, columns) if bias is None else torch.baddbmm(bias.view(16, -1, 1), parts, columns)
    return (y if n == 1 else y.view(out, n).t().contiguous()).view(*x.shape[:-1], out)  # y^T = W x^T + b


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
