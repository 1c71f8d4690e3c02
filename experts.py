"""Experts: a block has several MLPs, and every token runs at most one of them [MoD 4.3].

    conventional MoE    --experts 4                 in place of every MLP
    integrated MoDE     --experts 4 --noops 4       a token that chooses a no-op expert skips the MLP
    staged MoDE         --experts 4 --routed odd    the tokens that a routed block runs choose an expert

Every token chooses its most likely expert. Under `top_k` an expert keeps its most likely tokens, `capacity`
times its even share of a sequence (static shapes; it reads later tokens), under any other rule all of them.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from linear import in_full_precision
from routing import NO_POSITION, capacity_in_tokens, places_of, top_k


class Experts(nn.Module):
    """p_e(x) MLP_e(x) for the expert e that x chooses, p being a softmax over `experts` MLPs and `noops`
    that do nothing; 0 for a token that chose a no-op or was dropped. capacity: how many tokens of a sequence
    an expert may take under `top_k`, as a multiple of its even share."""

    def __init__(self, C, units, experts, noops, capacity):
        super().__init__()
        self.experts, self.capacity = experts, capacity / (experts + noops)
        self.router = nn.Linear(C, experts + noops, bias=False)
        self.fc = nn.Parameter(torch.empty(experts, C, units))
        self.proj = nn.Parameter(torch.empty(experts, units, C))

    def forward(self, x, pos, route):
        """x (B,T,C), pos (B,T) -> (B,T,C); which tokens ran an expert (B,T); the load-balancing loss (),
        summed over tokens: 1 for each if all experts and no-ops are chosen equally."""
        (B, T, C), E, present = x.shape, self.experts, pos < NO_POSITION
        p = in_full_precision(self.router, x).softmax(-1)                               # (B,T,E + noops)
        best = p.argmax(-1)
        wants = F.one_hot(best, p.size(-1)).bool() & present.unsqueeze(-1)
        share = (p * present.unsqueeze(-1)).sum((0, 1)) / present.sum()
        balance = p.size(-1) * (wants.sum((0, 1)) * share).sum()

        score, runs = (t[..., :E].transpose(1, 2).flatten(0, 1) for t in (p, wants))    # (BE,T)
        if route is top_k:
            k = capacity_in_tokens(self.capacity, T)
            allowed = present.repeat_interleave(E, 0)                                   # (BE,T)
            runs = runs & top_k(torch.where(runs, score, -1), None, allowed, self.capacity)
        else:
            k = int(runs.sum(1).max())
        places, selected = places_of(runs, k)                                           # (BE,k)
        gate = torch.where(selected, score.gather(1, places), 0).reshape(B, E * k, 1)
        index = places.reshape(B, E * k, 1).expand(-1, -1, C)
        h = x.gather(1, index).view(B, E, k, C).transpose(0, 1).reshape(E, B * k, C)
        y = torch.bmm(F.gelu(torch.bmm(h, self.fc)), self.proj)
        y = y.view(E, B, k, C).transpose(0, 1).reshape(B, E * k, C)
        out = torch.zeros_like(x).scatter_add(1, index, (gate * y).to(x.dtype))
        return out, runs.view(B, E, T).any(1), balance
