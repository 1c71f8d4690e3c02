"""Depth-Adaptive Transformer [DAT]: every block can emit the token.

    code            paper                                         where
    h       (B,T,C) h_t^n, the state after block n = 1..N         1
    classify(n, h)  softmax(W_n h_t^n) before the softmax         2.1, an anytime classifier
    weight          w_n of the aligned loss                       2.2
    score (B,T,N)   LL_t^n or C_t^n, what an oracle goes by       3.1, 3.2
    exit_at (B,T)   q*_t, the oracle's exit, in 1..N              3.1, 3.2
    z               logit of chi_t^n, "leave after block n"       3.2, geometric-like
    tau             confidence thresholds, N-1 of them            3.2

Classifiers read the stream and change nothing in it, so a model with exits is the same model. A halting rule
is a function rule(seen) -> (B,T) bool, "leaves after block seen.n". This file knows no model.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from linear import in_full, linear
from routing import mixed_bits, numbered

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
        return linear(self.norms[str(n)](h), self.weights["tied" if self.tied else str(n)])

    def several(self, exits, states):
        """Blocks n, and states h (m,C) of each -> the logits of all (sum of m, V), in one product if tied."""
        if not self.tied:
            return torch.cat([*map(self, exits, states)])
        normed = [self.norms[str(n)](h) for n, h in zip(exits, states, strict=True)]
        return linear(torch.cat(normed), self.weights["tied"])


WEIGHTS = {"1": lambda n: 1.0, "n": lambda n: n, "sqrt(n)": lambda n: n**0.5,
           "1/sqrt(n)": lambda n: n**-0.5, "1/n": lambda n: 1 / n}


def exit_weights(kind, blocks):
    """w_n / sum_m w_m for each exit n in `blocks` [DAT 2.2]; `kind` is a key of WEIGHTS."""
    w = [WEIGHTS[kind](n) for n in blocks]
    return [v / sum(w) for v in w]


def precise(logits):
    """In fp32 or better."""
    return logits if logits.dtype == torch.float64 else logits.float()


def certainty(logits):
    """p of the most likely token: logits (...,V) -> (...), in fp32 or better."""
    return precise(logits).softmax(-1).amax(-1)


def nats(logits, targets):
    """-log p(target) of every token: logits (...,V), targets (...) -> (...), in fp32 or better; 0 for the
    target -1, padding."""
    logits = precise(logits).flatten(0, -2)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=-1)
    return loss.view(targets.shape)


class SummedNats(torch.autograd.Function):
    """nats(logits, targets), whether the target is the most likely token, and the sum of nats with smoothed
    labels, for logits (T,V) that nobody needs afterwards: their memory becomes the sum's gradient, softmax -
    label. For one backward, at once. A smoothed label is (1 - smoothing) onehot(target) + smoothing / V.
    """

    @staticmethod
    def forward(ctx, logits, targets, smoothing):
        p = precise(logits)
        there, targets = (targets >= 0).unsqueeze(1), targets.clamp(min=0).unsqueeze(1)
        p.sub_(p.amax(1, keepdim=True))
        wanted, mean = p.gather(1, targets), p.mean(1, keepdim=True) if smoothing else 0
        total = p.exp_().sum(1, keepdim=True)                               # p is overwritten from here on
        p.div_(total).scatter_add_(1, targets, torch.full_like(wanted, smoothing - 1))
        if smoothing:
            p.sub_(smoothing / p.size(1))
        ctx.save_for_backward(p.mul_(there))
        total = total.log()
        plain, right = ((total - wanted) * there).squeeze(1), ((wanted == 0) & there).squeeze(1)
        smooth = (total - (1 - smoothing) * wanted - smoothing * mean) * there if smoothing else plain
        ctx.mark_non_differentiable(plain, right)
        return plain, right, smooth.sum()

    @staticmethod
    def backward(ctx, _, __, scale):
        return ctx.saved_tensors[0].mul_(scale), None, None


def loss_and_gradient(classifiers, n, h, targets, scale, smoothing=0.0):
    """One exit's part of a loss, backward included: h (...,C), targets (...), -1 at padding
    -> (nats (...) without label smoothing, is the target the most likely token (...), gradient (...,C)).

    scale * sum of nats is differentiated at once: into the classifier's parameters here, and down to h as
    the returned tensor. So the logits of one exit at a time are alive, and only CHUNK of them: hand all
    gradients to one torch.autograd.backward(hs, gradients) and the trunk is walked back once.
    """
    size = max(1, CHUNK // classifiers.vocab_size)                          # tokens a chunk
    found, parts = [], (h.detach().flatten(0, -2).split(size), targets.flatten().split(size))
    for part, wanted in zip(*parts, strict=True):
        leaf = part.detach().requires_grad_()
        plain, right, loss = SummedNats.apply(classifiers(n, leaf), wanted, smoothing)
        with torch.autocast(h.device.type, enabled=False):      # backward keeps the types of forward
            (loss * scale).backward()
        found.append((plain, right, leaf.grad))
    plain, right, gradient = (torch.cat(parts) for parts in zip(*found, strict=True))
    return plain.view_as(targets), right.view_as(targets), gradient.view_as(h)


def scale_gradient(x, g):
    """x, whose gradient is multiplied by g on the way back [DAT appendix]."""
    return g * x + (1 - g) * x.detach()


def balance(n, N, gamma):
    """gamma_n = gamma (N - n): the N - n losses above block n come down divided by it, so that they weigh as
    much as block n's own; gamma_N = 1, where the paper's code divides by 0. The loss of block n + m thus
    arrives at block n times the product of 1 / gamma_i for i = n .. n + m - 1 [DAT appendix]."""
    return gamma * (N - n) if n < N else 1.0


# ----------------------------------------------------------------------------- oracles


def sequence_oracle(score, live, cost):
    """argmax_n sum_t score_t^n - cost n, one exit for a whole row [DAT 3.1]; ties go to the lowest exit.
    score (B,T,N), live (B,T) -> exit_at (B,T). cost is in units of the summed score."""
    total = score.masked_fill(~live.unsqueeze(-1), 0).sum(1, keepdim=True)              # (B,1,N)
    return token_oracle(total, live.any(1, keepdim=True), cost).expand(live.shape)


def token_oracle(score, live, cost, sigma=0.0):
    """argmax_n sum_t' exp(-(t - t')^2 / sigma) score_t'^n - cost n [DAT 3.2]; sigma 0: of token t alone;
    ties go to the lowest exit. score (B,T,N), live (B,T): padding enters no sum -> exit_at (B,T)."""
    score = score.masked_fill(~live.unsqueeze(-1), 0)
    if sigma > 0:
        t = torch.arange(score.size(1), device=score.device)
        score = torch.exp(-(t[:, None] - t).square() / sigma).to(score.dtype) @ score
    n = torch.arange(1, score.size(-1) + 1, device=score.device, dtype=score.dtype)
    return (score - cost * n).argmax(-1) + 1


# ----------------------------------------------------------------------------- learned exits


class Halting(nn.Module):
    """Predicts the exit with one linear layer [DAT 3]. N exits, C channels, Ce channels of the source.

    sequence    softmax over N exits of the mean source state, one exit for the whole output [3.1]
    token       softmax over N exits of h^1, decided after block 1 [3.2]
    geometric   chi^n of h^n for n < N: q(n) = chi^n prod_{m<n} (1 - chi^m) [3.2]
    binary      chi^n of h^n for n < N, each trained by itself: "is n the oracle's exit or above it"
    """

    def __init__(self, kind, N, C, Ce=None, shared=False):
        super().__init__()
        self.kind, self.exits = kind, N
        if kind in ("sequence", "token"):
            self.linear = nn.Linear(Ce if kind == "sequence" else C, N)
        else:
            self.linear = nn.ModuleList([nn.Linear(C, 1)] * (N - 1) if shared else
                                        [nn.Linear(C, 1) for _ in range(N - 1)])

    def of_source(self, source):
        """A Source of B rows -> logits (B,N); padding is not in the mean."""
        there = source.there.unsqueeze(-1)
        return in_full(self.linear, source.states.masked_fill(~there, 0).sum(1) / there.sum(1))

    def of_first(self, h):
        """h^1 (...,C) -> logits (...,N)."""
        return in_full(self.linear, h)

    def z(self, n, h):
        """h^n (...,C) -> the logit (...) of leaving after block n < N."""
        return in_full(self.linear[n - 1], h).squeeze(-1)

    def loss(self, states, source, exit_at, live):
        """H(q*, q): h^1..h^N (B,T,C), Source or None, the oracle's exit_at (B,T), live (B,T) -> a sum over
        the tokens that are there; over rows for the sequence kind."""
        if self.kind == "sequence":
            return F.cross_entropy(self.of_source(source), exit_at[:, 0] - 1, reduction="sum")
        if self.kind == "token":
            return F.cross_entropy(self.of_first(states[0])[live], exit_at[live] - 1, reduction="sum")
        total = 0.0
        for n in range(1, self.exits):
            z, counts = self.z(n, states[n - 1]), live & (exit_at >= n) if self.kind == "geometric" else live
            total = total + F.binary_cross_entropy_with_logits(z, (exit_at <= n).to(z), counts.to(z),
                                                               reduction="sum")
        return total


# ----------------------------------------------------------------------------- halting rules


@dataclass
class Seen:
    """What a halting rule may look at after block n."""
    n: int
    states: list[torch.Tensor]          # h^1 first and h^n last, each (B,T,C)
    classify: Callable                  # (n, h^n) -> logits
    pos: torch.Tensor                   # (B,T)
    source: object = None               # of a Seq2Seq
    rows: torch.Tensor | None = None    # (B,) their numbers in a call of more rows; None: 0..B-1
    logits: torch.Tensor | None = None  # (B,T,V) once they have been read

    def read(self):
        """The classifier's logits (B,T,V), made at most once."""
        if self.logits is None:
            self.logits = self.classify(self.n, self.states[-1])
        return self.logits


def full_depth(seen):
    """Nobody leaves early."""
    return torch.zeros_like(seen.pos, dtype=torch.bool)


def fixed_exit(e):
    """Everybody leaves after block e."""
    return lambda seen: torch.full_like(seen.pos, seen.n >= e, dtype=torch.bool)


def chosen(exit_at):
    """Everybody leaves where exit_at (B,T) says, by row and position: an oracle's choice, or anybody's."""
    last = exit_at.size(1) - 1
    return lambda seen: exit_at[numbered(seen.rows, seen.pos), seen.pos.clamp(max=last)] <= seen.n


def random_exit(N, seed=0):
    """Each token leaves at an exit drawn uniformly from 1..N ("uniform" in the paper's table 1), a function
    of (seed, row of the call, position): in a beam, sentences that are done give up their rows."""
    return lambda seen: mixed_bits(seen.pos, seed, seen.rows) % N + 1 <= seen.n


def confidence(tau):
    """Leave after the first block whose most likely token has p > tau_n [DAT 3.2]; tau has N-1 entries."""
    return lambda seen: certainty(seen.read()) > tau[seen.n - 1]


def learned(halting, threshold=0.5):
    """Leave where `halting` says [DAT 3]: at the most likely exit (sequence, token), or after the first block
    with chi > threshold (geometric, binary)."""
    def rule(seen):
        if halting.kind == "sequence":
            exit_at = halting.of_source(seen.source).argmax(-1).repeat_interleave(seen.source.g) + 1
            exit_at = (exit_at if seen.rows is None else exit_at[seen.rows]).unsqueeze(1)
        elif halting.kind == "token":
            exit_at = halting.of_first(seen.states[0]).argmax(-1) + 1
        else:
            return halting.z(seen.n, seen.states[-1]).sigmoid() > threshold
        return (exit_at <= seen.n).expand(seen.pos.shape)
    return rule
