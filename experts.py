"""Experts: a block has several MLPs, and every token runs at most one [MoD 4.3].

    conventional MoE    --experts 4                 in place of every MLP
    integrated MoDE     --experts 4 --noops 4       some of the experts do nothing: a token that chooses one
                                                    of them keeps its attention and goes around the MLP
    staged MoDE         --experts 4 --routed odd    Mixture-of-Depths first; what it selects runs attention,
                                                    then chooses an expert

Every token chooses its most likely expert, alone. The rule of the call decides about crowds: under `top_k` an
expert keeps the `capacity` of a sequence that want it most and drops the others (static shapes, for training,
and a look ahead); under `causal`, as when sampling, it takes all who come.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from linear import in_full
from routing import FAR, marked


class Choice(NamedTuple):
    """What the experts of one block did with the tokens of one call."""
    expert: torch.Tensor        # (B,T) the expert that ran the token, -1: none
    balance: torch.Tensor       # () E sum_i f_i P_i over shares f of choices and mean probabilities P, times
    #                             tokens: at least 1 a token, when all experts are chosen alike


class Each(nn.Module):
    """E linear maps side by side: x (E,n,c) -> (E,n,d)."""

    def __init__(self, E, c, d):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, c, d))

    def forward(self, x):
        return torch.bmm(x, self.weight.to(x.dtype))


class Experts(nn.Module):
    """p_e(x) MLP_e(x) for the expert e that x chooses, p being a softmax over `experts` MLPs and `noops` that
    do nothing; 0 for a token that chose one of those or was dropped.

    capacity: how many tokens of a sequence an expert may take under `top_k`, as a multiple of its even share.
    """

    def __init__(self, C, inner, experts, noops, capacity):
        super().__init__()
        self.count, self.capacity = experts, capacity / (experts + noops)
        self.router = nn.Linear(C, experts + noops, bias=False)
        self.fc, self.proj = Each(experts, C, inner), Each(experts, inner, C)

    def forward(self, x, pos, route):
        """x (B,T,C), pos (B,T) -> (B,T,C), Choice."""
        (B, T, C), E, there = x.shape, self.count, pos < FAR
        p = in_full(self.router, x).softmax(-1)                                         # (B,T,E + noops)
        chosen = F.one_hot(p.argmax(-1), p.size(-1)).bool() & there.unsqueeze(-1)
        tokens = there.sum()
        balance = p.size(-1) * (chosen.sum((0, 1)) * (p * there.unsqueeze(-1)).sum((0, 1))).sum() / tokens

        score, want = (t[..., :E].transpose(1, 2).flatten(0, 1) for t in (p, chosen))   # (BE,T)
        score = torch.where(want, score, -1)
        idx = route(score, score, there.repeat_interleave(E, 0), self.capacity)
        keep, idx = idx < T, idx.clamp(max=T - 1)                                       # (BE,k)
        keep = keep & want.gather(1, idx)
        gate, idx, k = torch.where(keep, score.gather(1, idx), 0), idx.reshape(B, -1), idx.size(1)
        each = idx.unsqueeze(-1).expand(-1, -1, C)                                      # (B,Ek,C)
        h = x.gather(1, each).view(B, E, k, C).transpose(0, 1).reshape(E, B * k, C)
        y = self.proj(F.gelu(self.fc(h))).view(E, B, k, C).transpose(0, 1).reshape(B, E * k, C)
        out = torch.zeros_like(x).scatter_add(1, each, (gate.reshape(B, -1, 1) * y).to(x.dtype))

        ran = marked(idx.where(keep.reshape(B, -1), T), T)
        return out, Choice(torch.where(ran, p.argmax(-1), -1), balance)
