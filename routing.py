"""Mixture-of-Depths [MoD]: blocks that run only some of the tokens.

    code             paper                                             where
    weight  (B,T)    r_i = w . x_i, the router weight of a token       3.4, eq. 1
    runs    (B,T)    the selected tokens, a boolean mask               3.3
    k                C, the capacity in tokens                         eq. 1
    logit   (B,T)    causal logit, of "top-k selects this token"       3.5

A routing rule is a function of tensors, rule(weight, logit, live, capacity) -> runs (B,T) bool, and an
argument of every call. `top_k` trains, but compares a token with later ones, so it cannot be used for
sampling. `causal` looks at one token: its logit comes from the auxiliary predictor, or from the router
itself (`causal_logit="router"`). The random control has Gaussian weights, independent of the input.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from linear import Linear, in_full_precision

NO_POSITION = 2**30  # of an absent token (padding, not selected): latest, and placed last: no other sees it


def capacity_in_tokens(capacity, T):
    """k for a sequence of T tokens: at least one, at most all."""
    return min(T, max(1, round(capacity * T)))


def top_k(weight, logit, live, capacity):
    """Expert choice [MoD 3.3]: the k largest router weights of each row. weight, live (B,T) -> runs (B,T).
    k is that of the row's live tokens. Of equal weights the earlier token goes first."""
    ranked = weight.masked_fill(~live, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranked = ranked[:, :capacity_in_tokens(capacity, weight.size(1))]                           # (B,k)
    k_of_row = (capacity * live.sum(1, keepdim=True)).round().clamp(min=1)
    selected = torch.arange(ranked.size(1), device=weight.device) < k_of_row
    return torch.zeros_like(live).scatter(1, ranked, selected) & live


def causal(weight, logit, live, capacity):
    """Each token by its own causal logit > 0 [MoD 3.5]. logit, live (B,T) -> runs (B,T)."""
    return (logit > 0) & live


ROUTES = {"top_k": top_k, "causal": causal}     # another rule is another line


def places_of(mask, k):
    """mask (B,T) -> places (B,k): those of its True in order of time, then others; and mask there (B,k)."""
    places = mask.int().argsort(dim=1, descending=True, stable=True)[:, :k]
    return places, mask.gather(1, places)


class Routing(NamedTuple):
    """What one block did with the tokens of one call."""
    runs: torch.Tensor                  # (B,T) bool: the token ran this block
    weight: torch.Tensor | None = None  # (B,T) r_i, the router weight, before the gate
    logit: torch.Tensor | None = None   # (B,T) causal logit: run when > 0
    worked: torch.Tensor | None = None  # (B,T) bool: it ran an expert, if the block has any
    balance: torch.Tensor | None = None     # () their load-balancing loss


GATES = {"raw": lambda weight: weight, "sigmoid": torch.sigmoid, "one": torch.ones_like}


class Routed(nn.Module):
    """x_i + r_i f(x)_i for the selected tokens, x_i for the others [MoD eq. 1].

    f is `block.residual`, given the selected tokens alone, with the positions they had: the only queries, and
    the only keys besides the cache's. capacity: share of a sequence that top-k selects. predictor_units: of
    the causal predictor, an MLP behind a stop-gradient; 0: the router's own output is the causal logit.
    random: the control, whose weights are noise and whose causal logit lets `capacity` of all tokens run."""

    def __init__(self, block, C, capacity, gate, predictor_units, random):
        super().__init__()
        self.block, self.capacity, self.gate, self.random = block, capacity, GATES[gate], random
        self.router = self.predictor = None
        if not random:
            self.router = nn.Linear(C, 1, bias=False)
        if not random and predictor_units:
            self.predictor = nn.Sequential(Linear(C, predictor_units), nn.SiLU(),
                                           nn.Linear(predictor_units, 1))

    def score(self, x):
        """x (B,T,C) -> router weight, causal logit, both (B,T). All that a skipped token costs."""
        if self.random:
            weight = torch.randn(x.shape[:2], device=x.device)
            quantile = torch.special.ndtri(torch.tensor(1 - self.capacity)).item()      # MPS has none
            return weight, weight - quantile
        weight = in_full_precision(self.router, x).squeeze(-1)
        if self.predictor is None:
            return weight, weight
        return weight, in_full_precision(self.predictor, x.detach()).squeeze(-1)

    def forward(self, x, pos, live=None, cache=None, memory=None, route=top_k):
        """x (B,T,C), pos, live (B,T), None: all that are present -> (x, Routing)."""
        live = pos < NO_POSITION if live is None else live
        weight, logit = self.score(x)
        runs = route(weight, logit, live, self.capacity)
        if route is top_k:
            k = capacity_in_tokens(self.capacity, x.size(1))    # known in advance: shapes are static
        else:
            k = int(runs.sum(1).max())
        if k == 0:
            return x, Routing(runs, weight, logit)
        places, selected = places_of(runs, k)
        index = places.unsqueeze(-1).expand(-1, -1, x.size(-1))                             # (B,k,C)
        positions = torch.where(selected, pos.gather(1, places), NO_POSITION)
        update, worked, balance = self.block.residual(x.gather(1, index), positions, cache, memory, route)
        factor = torch.where(selected, self.gate(weight.gather(1, places)), 0)
        x = x.scatter_add(1, index, (factor.unsqueeze(-1) * update).to(x.dtype))
        if worked is not None:          # of the selected tokens; now of all
            worked = torch.zeros_like(runs).scatter(1, places, worked)
        return x, Routing(runs, weight, logit, worked, balance)


def predictor_loss(routing, mask=None):
    """Binary cross-entropy of the causal logit against the rule's choice, summed over mask [MoD 3.5]."""
    target = routing.runs.to(routing.logit.dtype)
    return F.binary_cross_entropy_with_logits(routing.logit, target, weight=mask, reduction="sum")


def confusion(routing, mask=None):
    """Counts (4,) of true positives, false positives, false negatives, true negatives of logit > 0."""
    yes, runs = routing.logit > 0, routing.runs
    cases = torch.stack([yes & runs, yes & ~runs, ~yes & runs, ~yes & ~runs])
    return (cases if mask is None else cases & mask).sum((1, 2))


def report(counts):
    """The counts of `confusion` -> accuracy, base rate (accuracy of always "no"), precision, recall."""
    tp, fp, fn, tn = counts.tolist()
    total = tp + fp + fn + tn
    return {"accuracy": (tp + tn) / total, "base_rate": (fp + tn) / total,
            "precision": tp / (tp + fp) if tp + fp else 0.0, "recall": tp / (tp + fn) if tp + fn else 0.0}
