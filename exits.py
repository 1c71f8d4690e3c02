"""Depth-Adaptive Transformer [DAT]: every block can emit the token.

    code            paper                                         where
    h       (B,T,C) h_t^n, the state after block n = 1..N         1
    classify(n, h)  softmax(W_n h_t^n) before the softmax         2.1, an anytime classifier
    weight          w_n of the aligned loss                       2.2
    tau             confidence thresholds, N-1 of them            3.2

Classifiers read the stream and change nothing in it, so a model with exits is the same model. A halting rule
is a function rule(n, h, read) -> (B,T) bool, "leaves after block n"; read() gives block n's logits (B,T,V),
made at most once. This file knows no model.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

CHUNK = 2**22  # logits alive at a time while training (16 MB in fp32): reused memory instead of fresh pages


class Classifiers(nn.Module):
    """One output classifier after each block in `blocks` (numbers from 1), each with its own LayerNorm.

    embedding: a (V,C) parameter that all of them share (tied), or None for one matrix each [DAT 2.1].
    """

    def __init__(self, blocks, C, V, embedding=None):
        super().__init__()
        self.blocks, self.vocab_size = tuple(blocks), V
        self.norms = nn.ModuleDict({str(n): nn.LayerNorm(C) for n in self.blocks})
        self.tied = embedding is not None
        self.weights = nn.ParameterDict({"tied": embedding} if self.tied else
                                        {str(n): nn.Parameter(torch.empty(V, C)) for n in self.blocks})

    def forward(self, n, h):
        """The logits (...,V) of the classifier after block n, for h (...,C)."""
        return F.linear(self.norms[str(n)](h), self.weights["tied" if self.tied else str(n)])


WEIGHTS = {"1": lambda n: 1.0, "n": lambda n: n, "sqrt(n)": lambda n: n**0.5,
           "1/sqrt(n)": lambda n: n**-0.5, "1/n": lambda n: 1 / n}


def exit_weights(kind, blocks):
    """w_n / sum_m w_m for each exit n in `blocks` [DAT 2.2]; `kind` is a key of WEIGHTS."""
    w = [WEIGHTS[kind](n) for n in blocks]
    return [v / sum(w) for v in w]


def nats(logits, targets):
    """-log p(target) of every token: logits (...,V), targets (...) -> (...), in fp32 or better; 0 for the
    target -1, padding."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=-1)
    return loss.view(targets.shape)


class SummedNats(torch.autograd.Function):
    """nats(logits, targets).sum(), and the same with smoothed labels, for logits (T,V) that nobody needs
    afterwards: their memory becomes the second sum's gradient, softmax(logits) - label. For one backward,
    at once. A smoothed label is (1 - smoothing) onehot(target) + smoothing / V.
    """

    @staticmethod
    def forward(ctx, logits, targets, smoothing):
        p = logits if logits.dtype == torch.float64 else logits.float()
        there, targets = (targets >= 0).unsqueeze(1), targets.clamp(min=0).unsqueeze(1)
        p.sub_(p.amax(1, keepdim=True))
        wanted, mean = p.gather(1, targets), p.mean(1, keepdim=True) if smoothing else 0
        total = p.exp_().sum(1, keepdim=True)                               # p is overwritten from here on
        p.div_(total).scatter_add_(1, targets, torch.full_like(wanted, smoothing - 1))
        if smoothing:
            p.sub_(smoothing / p.size(1))
        ctx.save_for_backward(p.mul_(there))
        total = total.log()
        plain = ((total - wanted) * there).sum()
        smooth = ((total - (1 - smoothing) * wanted - smoothing * mean) * there).sum() if smoothing else plain
        ctx.mark_non_differentiable(plain)
        return plain, smooth.clone()

    @staticmethod
    def backward(ctx, _, scale):
        return ctx.saved_tensors[0].mul_(scale), None, None


def loss_and_gradient(classifiers, n, h, targets, scale, smoothing=0.0):
    """One exit's part of the aligned loss, backward included: h (B,T,C), targets (B,T), -1 at padding
    -> (sum of nats, without label smoothing; gradient (B,T,C)).

    scale * sum of nats is differentiated at once: into the classifier's parameters here, and down to h as
    the returned tensor. So the logits of one exit at a time are alive, and only CHUNK of them: hand all
    gradients to one torch.autograd.backward(hs, gradients) and the trunk is walked back once.
    """
    size = max(1, CHUNK // classifiers.vocab_size)                          # tokens a chunk
    total, gradients = 0.0, []
    for part, wanted in zip(h.detach().flatten(0, 1).split(size), targets.flatten().split(size), strict=True):
        leaf = part.detach().requires_grad_()
        plain, loss = SummedNats.apply(classifiers(n, leaf), wanted, smoothing)
        with torch.autocast(h.device.type, enabled=False):      # backward keeps the types of forward
            (loss * scale).backward()
        total = total + plain
        gradients.append(leaf.grad)
    return total, torch.cat(gradients).view_as(h)


# ----------------------------------------------------------------------------- halting rules


def full_depth(n, h, read):
    """Nobody leaves early."""
    return torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)


def fixed_exit(e):
    """Everybody leaves after block e."""
    return lambda n, h, read: torch.full(h.shape[:2], n >= e, device=h.device)


def confidence(tau):
    """Leave after the first block whose most likely token has p > tau_n [DAT 3.2]; tau has N-1 entries."""
    def rule(n, h, read):
        logits = read().float()
        return (logits.amax(-1) - logits.logsumexp(-1)).exp() > tau[n - 1]
    return rule
