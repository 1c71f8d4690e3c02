"""Mixture-of-Depths [MoD]: blocks that run only some of the tokens.

    code            paper                                    where
    score   (B,T)   r_i = w . x_i, the router's weight       3.4, eq. 1
    k               C, the capacity in tokens                eq. 1
    idx     (B,k)   the places of the selected tokens        3.3
    guess   (B,T)   logit of "top-k would select this"       3.5, what decides when sampling

Top-k compares a token with later ones, so it cannot be used while sampling. `guess` reads one token alone:
it is the auxiliary predictor's output, or the router's own when `causal="router"`; see `Routed`.

The random control has Gaussian scores that look at nothing; its causal rule runs each token with the chance
`capacity`. A router decides with a tensor `idx`: for every row the places of the tokens that run, in order of
time, with T at the places left over (rows may run different numbers of tokens). This file knows no model:
`Routed` is given a block, and a rule (`top_k`, `causal`) is an argument of every call, never a mode of the
module.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from linear import Linear, in_full, linear

FAR = 2**30  # the position of a token that is not there (padding, or not selected): nothing attends to it


class Visit(NamedTuple):
    """What one block did with the tokens of one call. Dense blocks have no score and no guess."""
    ran: torch.Tensor | None            # (B,T) bool: the token ran this block; None: all did
    score: torch.Tensor | None = None   # (B,T) r_i, the factor on the block's update
    guess: torch.Tensor | None = None   # (B,T) the causal rule's logit: run when > 0
    choice: tuple | None = None    # experts.Choice of the tokens that ran, if there are experts


def numbered(rows, grid):
    """Row numbers (B,1) to go with grid (B,T); rows (B,) or None: 0..B-1."""
    return (torch.arange(len(grid), device=grid.device) if rows is None else rows).unsqueeze(1)


def mixed_bits(pos, seed, rows=None):
    """pos (B,T) of these rows (B,), None: 0..B-1 -> (B,T) integers in 0..2^32 - 1: chance as a function of
    (seed, row, position)."""
    x = (pos * 73_856_093 + numbered(rows, pos) * 19_349_663 + seed * 83_492_791) & 0xFFFFFFFF
    for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x


def gaussian(share):
    """share in (0,1), a tensor -> the value that a standard normal variable stays below with that chance."""
    return math.sqrt(2) * torch.erfinv(2 * share - 1)


def marked(idx, T):
    """Places idx (B,k), T: nobody -> (B,T) bool."""
    return torch.zeros(len(idx), T + 1, dtype=torch.bool, device=idx.device).scatter(1, idx, True)[:, :T]


def kept(capacity, T):
    """k for a sequence of T tokens: at least one, at most all."""
    return min(T, max(1, round(capacity * T)))


def top_k(score, guess, live, capacity):
    """Expert choice [MoD 3.3]: the k largest scores of each row (not of the batch). score (B,T) -> idx (B,k).

    Looks at the whole sequence, so a token's fate depends on later ones: for training and for measuring.
    Of equal scores (a word that stands twice, in block 0) the earlier goes first; topk promises no order.
    live (B,T) or None: a row in which fewer tokens are there selects fewer, k being that of its own length.
    """
    k = kept(capacity, score.size(1))
    if live is None:
        return score.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    idx = score.masked_fill(~live, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :k]
    own = (capacity * live.sum(1, keepdim=True)).round().clamp(min=1)                   # (B,1)
    among = torch.arange(k, device=score.device) < own
    return idx.where(among & live.gather(1, idx), score.size(1)).sort(dim=1).values


def causal(score, guess, live, capacity):
    """Each token by its own guess > 0 [MoD 3.5], however many those are. guess (B,T) -> idx (B, most)."""
    guess = guess if live is None else guess.masked_fill(~live, -1)
    T, rows = guess.size(1), [[t for t, g in enumerate(row) if g > 0] for row in guess.tolist()]
    most = max(map(len, rows))
    if most == 0:
        return torch.empty((len(rows), 0), dtype=torch.long, device=guess.device)
    return torch.tensor([row + [T] * (most - len(row)) for row in rows], device=guess.device)


ROUTES = {"top_k": top_k, "causal": causal}


class Routed(nn.Module):
    """x_i + r_i f(x)_i for the selected tokens, x_i for the others [MoD eq. 1].

    `block` needs `residual(x, at, past, route)`: its update f without the skip connection, and what its
    experts chose, if it has any. It sees the selected tokens alone, with the positions they had: they are the
    only queries and the only keys.
    capacity: share of a sequence that top-k selects. gate: "raw" multiplies by r, "sigmoid" by sigmoid(r).
    "one" leaves it alone, which the random control may.
    hidden: units of the causal predictor, a small MLP behind a stop-gradient that learns to imitate top-k
    and decides at sampling; 0: the router's own output does both. The gate is the router's in either case.
    random: None, or the control with a number that makes its chances differ from other blocks'.
    """

    def __init__(self, block, C, capacity, gate="raw", hidden=64, random=None):
        super().__init__()
        self.block, self.capacity, self.random = block, capacity, random
        self.gate = {"raw": lambda r: r, "sigmoid": torch.sigmoid, "one": torch.ones_like}[gate]
        self.router, self.predictor = None, None
        if random is None:
            self.router = nn.Linear(C, 1, bias=False)
            if hidden:
                self.predictor = nn.Sequential(Linear(C, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def chance(self, at):
        """-> score (B,T), guess (B,T) of the random control: noise, drawn anew while training as
        dropout is, else a function of row and position, so that one pass is like token by token."""
        if self.training:
            score = torch.randn(at.pos.shape, device=at.pos.device)
        else:
            score = gaussian(((mixed_bits(at.pos, self.random, at.rows) >> 9) + 0.5) / 2**23)
        return score, score - gaussian(torch.tensor(1 - self.capacity, device=score.device))

    def look(self, x):
        """x (B,T,C) -> score (B,T), guess (B,T). What skipped tokens cost: no module is called."""
        score = F.linear(x, self.router.weight).squeeze(-1)
        if self.predictor is None:
            return score, score
        first, _, last = self.predictor
        hidden = F.silu(linear(x.detach(), first.weight, first.bias))
        return score, F.linear(hidden, last.weight, last.bias).squeeze(-1)

    def forward(self, x, at, past, route):
        """x (B,T,C) -> (x, Visit). A token that does not run leaves nothing behind in `past`."""
        B, T, C = x.shape                                                   # k tokens kept
        score, guess = self.chance(at) if self.router is None else in_full(self, x, self.look)
        idx = route(score, guess, at.live, self.capacity)                   # (B,k), T: nobody
        if idx.size(1) == 0:
            return x, Visit(torch.zeros_like(score, dtype=torch.bool), score, guess)
        rows = past.busy(here := idx < T)                                   # n of B rows, None: all
        some, here, y, r, pos = (t if rows is None else t.index_select(0, rows)
                                 for t in (idx, here, x, score, at.pos))
        whole = some.size(1) == T and here.all()                            # every token: nothing to gather
        ran = here if whole and rows is None else marked(idx, T)
        if whole:
            update, choice = self.block.residual(y, at if rows is None else at.among(rows, pos), past, route)
            y = y + (self.gate(r).unsqueeze(-1) * update).to(x.dtype)
        else:
            place = some.clamp(max=T - 1)
            these = at.among(rows, torch.where(here, pos.gather(1, place), FAR))            # (n,k)
            each = place.unsqueeze(-1).expand(-1, -1, C)                                    # (n,k,C)
            update, choice = self.block.residual(y.gather(1, each), these, past, route)     # (n,k,C)
            weight = torch.where(here, self.gate(r.gather(1, place)), 0)                    # (n,k)
            y = y.scatter_add(1, each, (weight.unsqueeze(-1) * update).to(x.dtype))
        if choice is not None:          # of the tokens selected; now of all
            expert = torch.full((B, T + 1), -1, device=x.device)
            own = slice(None) if rows is None else rows
            expert[own] = expert[own].scatter(1, some, choice.expert)
            choice = choice._replace(expert=expert[:, :T])
        return y if rows is None else x.index_copy(0, rows, y), Visit(ran, score, guess, choice)


def imitation_loss(visit, live=None):
    """Sum over tokens (live (B,T): over those) of the binary cross-entropy of the guess against what top-k
    selected [MoD 3.5]."""
    wanted = visit.ran.to(visit.guess.dtype)
    return F.binary_cross_entropy_with_logits(visit.guess, wanted, live, reduction="sum")


def confusion(visit, live=None):
    """Counts (4,) of true positives, false positives, false negatives, true negatives of guess > 0."""
    yes, ran = visit.guess > 0, visit.ran
    cases = torch.stack([yes & ran, yes & ~ran, ~yes & ran, ~yes & ~ran])
    return (cases if live is None else cases & live).sum((1, 2))


def report(counts):
    """The four counts of `confusion` -> accuracy, the base rate of always answering no, precision, recall."""
    tp, fp, fn, tn = (float(c) for c in counts)
    total = tp + fp + fn + tn
    return {"accuracy": (tp + tn) / total, "base_rate": (fp + tn) / total,
            "precision": tp / (tp + fp) if tp + fp else 0.0, "recall": tp / (tp + fn) if tp + fn else 0.0}
