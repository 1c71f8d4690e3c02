"""A GPT whose blocks can be skipped, by Mixture-of-Depths (routing.py) or by early exit (exits.py).

B batch, T tokens of this call, C channels, nh heads, hs = C/nh head size, V vocabulary, L blocks,
N exits, M tokens that attention can see. C is never a capacity.

Three rules keep one forward pass good for training, prompts and decoding:
- every token carries its position (`Tokens.pos`); nobody counts places;
- what a layer remembers is an argument, `past`: `Now` (these tokens are all there is) or decode.KV;
- a block exposes its update, `residual`; running, routing and copying are three ways to use it.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from exits import Classifiers
from routing import Routed, Visit, top_k


@dataclass
class GPTConfig:
    """The shape of the network: with the vocabulary's size, all that a checkpoint needs to be built again."""
    n_layer: int = 6                                    # L, blocks
    n_head: int = 4                                     # nh
    n_embd: int = 128                                   # C
    block_size: int = 256                               # longest context, in tokens
    dropout: float = 0.0
    exits: Literal["all", "last"] = "all"               # which blocks have a classifier [DAT]
    classifier: Literal["tied", "separate"] = "tied"    # share the embedding, or one matrix per exit
    routed: str = "odd"                                 # none, odd, even, all, or numbers from 0: "1,3" [MoD]
    capacity: float = 0.125                             # share of the tokens that a routed block runs
    gate: Literal["raw", "sigmoid"] = "raw"             # r or sigmoid(r) times the block's update
    causal: Literal["predictor", "router"] = "predictor"    # what decides at sampling
    predictor_width: float = 0.5                        # the predictor's hidden units, as a share of n_embd

    def routed_blocks(self):
        """`routed` as a set of block numbers from 0. Raises ValueError if it is not understood."""
        named = {"none": [], "odd": range(1, self.n_layer, 2), "even": range(0, self.n_layer, 2),
                 "all": range(self.n_layer)}
        blocks = named[self.routed] if self.routed in named else [int(n) for n in self.routed.split(",")]
        if not all(0 <= n < self.n_layer for n in blocks):
            raise ValueError(f"routed={self.routed} names a block that is not in 0..{self.n_layer - 1}")
        return set(blocks)


@dataclass
class Tokens:
    """What one call reads. live: who still runs blocks, None for everybody; looked at before each block, so a
    caller that takes a token out after h^n has made it exit at block n: its state stays as it is."""
    pos: torch.Tensor                       # (B,T) position in the text; FAR: not there
    live: torch.Tensor | None = None        # (B,T) bool
    anyone: bool = True                     # False: nobody is live, so blocks need not run at all


def positions(ids):
    """ids (B,T) -> pos (B,T): 0..T-1 in every row."""
    return torch.arange(ids.size(1), device=ids.device).expand_as(ids)


class Now:
    """No past: training and scoring. Tokens come in order of time, those with position FAR last."""

    def write(self, k, v, pos):
        """Nothing to keep."""

    def attend(self, q, k, v, pos, dropout):
        """q, k, v (B,nh,T,hs) -> (B,nh,T,hs)."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def rotations(size, hs, dtype=torch.float32):
    """cos and sin (size, hs/2, 2) of position * 10000^(-2i/hs): how far a position turns pair i."""
    angle = torch.arange(size).double().outer(10000.0 ** (-torch.arange(0, hs, 2).double() / hs))
    return torch.stack([angle.cos(), angle.sin()], -1).to(dtype)


def rotate(x, by):
    """Turn each pair of channels of x (B,T,nh,hs) as a complex number; by (B,T,hs/2,2)."""
    pairs = x.to(by.dtype).unflatten(-1, (-1, 2))                                       # (B,T,nh,hs/2,2)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(by).unsqueeze(2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over `past` and the tokens of this call, with rotary positions."""

    def __init__(self, config):
        super().__init__()
        C, hs = config.n_embd, config.n_embd // config.n_head
        self.n_head, self.dropout = config.n_head, config.dropout
        self.query, self.key_value, self.proj = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)
        self.drop = nn.Dropout(config.dropout)
        self.register_buffer("rope", rotations(config.block_size, hs), persistent=False)

    def turn(self, x, pos):
        """x (B,T,nh,hs) at pos (B,T), rotated -> (B,nh,T,hs)."""
        return rotate(x, self.rope[pos.clamp(max=len(self.rope) - 1)]).transpose(1, 2)

    def keys_values(self, x, pos):
        """x (B,T,C), pos (B,T) -> k, v (B,nh,T,hs)."""
        B, T, C = x.shape
        k, v = self.key_value(x).view(B, T, 2, self.n_head, C // self.n_head).unbind(2)  # (B,T,nh,hs)
        return self.turn(k, pos), v.transpose(1, 2)

    def write(self, x, pos, past):
        """Leave keys and values of x in `past` without attending: what a copied state does [DAT 2]."""
        past.write(*self.keys_values(x, pos), pos)

    def forward(self, x, pos, past):
        """x (B,T,C), pos (B,T) -> (B,T,C)."""
        B, T, C = x.shape
        q = self.turn(self.query(x).view(B, T, self.n_head, C // self.n_head), pos)     # (B,nh,T,hs)
        k, v = self.keys_values(x, pos)
        y = past.attend(q, k, v, pos, self.dropout if self.training else 0.0)           # (B,nh,T,hs)
        return self.drop(self.proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        """x (B,T,C) -> (B,T,C)."""
        return self.drop(self.proj(F.gelu(self.fc(x))))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def residual(self, x, pos, past):
        """What this block would add to the stream x (B,T,C)."""
        a = self.attn(self.ln1(x), pos, past)
        return self.mlp(self.ln2(x + a)).add_(a)        # a + m, in the memory of m

    def forward(self, x, at, past, route):
        """x (B,T,C) -> (x, Visit). A token that has exited keeps its state; later tokens see this block's own
        keys and values of that copy [DAT 2]. Only a routed block has a use for `route`."""
        if at.live is None:
            return x + self.residual(x, at.pos, past), Visit(torch.ones_like(at.pos, dtype=torch.bool))
        if at.anyone:
            x = torch.where(at.live.unsqueeze(-1), x + self.residual(x, at.pos, past), x)
        else:
            self.attn.write(self.ln1(x), at.pos, past)
        return x, Visit(at.live)


class GPT(nn.Module):
    """Embedding, L blocks, and classifiers that read the stream after some of them."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        C, L = config.n_embd, config.n_layer
        self.wte = nn.Embedding(vocab_size, C)
        self.drop = nn.Dropout(config.dropout)
        routed = config.routed_blocks()
        self.blocks = nn.ModuleList(
            Routed(Block(config), C, config.capacity, config.gate, config.causal,
                   hidden=max(1, int(config.predictor_width * C))) if n in routed else Block(config)
            for n in range(L))
        self.classifiers = Classifiers(range(1, L + 1) if config.exits == "all" else [L], C, vocab_size,
                                       self.wte.weight if config.classifier == "tied" else None)
        # GPT-2's 0.02 is for a width of 768, and narrower needs more; what is added 2L times gets less
        std = 0.02 * math.sqrt(768 / C)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=std / math.sqrt(2 * L) if name.endswith("proj.weight") else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, ids):
        """ids (B,T) -> h^0 (B,T,C). Positions enter in attention."""
        if ids.size(1) > self.config.block_size:
            raise ValueError(f"{ids.size(1)} tokens exceed the context of {self.config.block_size}")
        return self.drop(self.wte(ids))

    def trunk(self, x, at, past=None, route=top_k):
        """h^0 (B,T,C) -> yields (h^n, Visit) for n = 1..L. past: one per block, None for `Now`."""
        for n, block in enumerate(self.blocks):
            x, visit = block(x, at, past[n] if past else Now(), route)
            yield x, visit

    def forward(self, ids, route=top_k):
        """ids (B,T) -> logits (B,T,V) after the last block. The scripts read every h^n from `trunk`."""
        at = Tokens(positions(ids))
        *_, (h, _) = self.trunk(self.embed(ids), at, route=route)
        return self.classifiers(self.config.n_layer, h)
