"""A GPT and a seq2seq Transformer whose blocks can be skipped, by Mixture-of-Depths (routing.py) or by early
exit (exits.py). The Seq2Seq is that GPT with an encoder that every block looks across at.

B batch, T tokens of this call, S source tokens, C channels, nh heads, hs = C/nh head size, V vocabulary,
L blocks, N exits, M tokens that attention can see. C is never a capacity.

Three rules keep one forward pass good for training, prompts and decoding:
- every token carries its position (`Tokens.pos`); nobody counts places;
- what a layer remembers is an argument, `past`: `Now` (these tokens are all there is) or decode.KV, and the
  `Source` of a translation comes with it;
- a block exposes its update, `residual`; running, routing and copying are three ways to use it.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from exits import Classifiers, Halting
from experts import Experts
from linear import Linear, gelu
from routing import FAR, Routed, Visit, top_k


@dataclass
class GPTConfig:
    """The shape of the network: with the vocabulary's size, all that a checkpoint needs to be built again."""
    n_layer: int = 6                                    # L, blocks
    n_head: int = 4                                     # nh
    n_embd: int = 128                                   # C
    n_inner: int = 0                                    # hidden units of an MLP; 0: four times its width
    block_size: int = 256                               # longest context, in tokens
    dropout: float = 0.0
    exits: Literal["all", "last"] = "all"               # which blocks have a classifier [DAT]
    classifier: Literal["tied", "separate"] = "tied"    # share the embedding, or one matrix per exit
    halting: Literal["none", "sequence", "token", "geometric", "binary"] = "none"   # learns where to exit
    share_halting: bool = False                         # geometric, binary: one predictor for all blocks
    share_blocks: bool = False                          # one block, run n_layer times
    routed: str = "odd"                                 # none, odd, even, all, or numbers from 0: "1,3" [MoD]
    capacity: float = 0.125                             # share of the tokens that a routed block runs
    router: Literal["learned", "random"] = "learned"    # random: the control, scores that look at nothing
    gate: Literal["raw", "sigmoid", "one"] = "raw"      # r, sigmoid(r) or (random only) 1 times the update
    causal: Literal["predictor", "router"] = "predictor"    # what decides at sampling
    predictor_width: float = 0.5                        # the predictor's hidden units, as a share of n_embd
    experts: int = 0                                    # MLPs to choose one of; 0: no choice [MoDE]
    noops: int = 0                                      # further experts that do nothing
    expert_capacity: float = 1.25                       # of its even share of tokens, in training

    @property
    def inner(self):
        """Hidden units of a block's MLP."""
        return self.n_inner or 4 * self.n_embd

    @property
    def hidden(self):
        """Hidden units of the predictor beside each router, 0 for none."""
        if self.router == "random" or self.causal == "router":
            return 0
        return max(1, int(self.predictor_width * self.n_embd))

    def routed_blocks(self):
        """`routed` as a set of block numbers from 0. Raises ValueError if it is not understood."""
        named = {"none": [], "odd": range(1, self.n_layer, 2), "even": range(0, self.n_layer, 2),
                 "all": range(self.n_layer)}
        blocks = named[self.routed] if self.routed in named else [int(n) for n in self.routed.split(",")]
        if not all(0 <= n < self.n_layer for n in blocks):
            raise ValueError(f"routed={self.routed} names a block that is not in 0..{self.n_layer - 1}")
        return set(blocks)


@dataclass
class Seq2SeqConfig(GPTConfig):
    """The GPT's options are the decoder's; n_inner, block_size and dropout are also the encoder's."""
    enc_layer: int = 2
    enc_head: int = 4
    enc_embd: int = 128
    embeddings: Literal["tied", "separate"] = "tied"    # do source and target share one table?


@dataclass
class Tokens:
    """What one call reads. live: who still runs blocks, None for everybody; looked at before each block, so a
    caller that takes a token out after h^n has made it exit at block n: its state stays as it is."""
    pos: torch.Tensor                       # (B,T) position in the text; FAR: not there
    live: torch.Tensor | None = None        # (B,T) bool
    rows: torch.Tensor | None = None        # (B,) their numbers in a call of more rows; None: 0..B-1
    onward: Callable | None = None          # (n, h^n) -> what block n + 1 reads, to scale its gradient
    turns: torch.Tensor | None = None       # (B,T,3,1,hs/2) complex, once a block has asked

    def among(self, rows, pos):
        """Tokens at pos (n,k) of these rows (n,) only, None: of all."""
        return Tokens(pos, rows=self.rows if rows is None else rows if self.rows is None else self.rows[rows])

    def turned(self, rope):
        """The rows of rope (block_size, 3, 1, hs/2, 2) for these positions, as complex numbers."""
        if self.turns is None:
            self.turns = torch.view_as_complex(rope[self.pos.clamp(max=len(rope) - 1)])
        return self.turns


def positions(ids):
    """ids (B,T) -> pos (B,T): 0..T-1 in every row."""
    return torch.arange(ids.size(1), device=ids.device).expand_as(ids)


class Source:
    """An encoded source: states (B,S,Ce), there (B,S) bool. Each decoder block makes its keys and values at
    its first visit, for training and for decoding apart. A call has g rows for each source, side by side
    (the hypotheses of a beam)."""

    def __init__(self, states, there, g=1):
        self.states, self.there, self.g, self.made = states, there, g, {}

    def keys_values(self, cross):
        """k, v (B,nh,S,hs) for one block's CrossAttention."""
        half = torch.is_autocast_enabled(self.states.device.type)
        how = cross.key_value.weight, half, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if how not in self.made:
            self.made[how] = cross.keys_values(self.states)
        return self.made[how]

    def select(self, rows, g):
        """The Source of these rows only, with g rows of a call for each."""
        own = (lambda t: t) if [*rows] == [*range(len(self.states))] else (lambda t: t[rows])
        chosen = Source(own(self.states), own(self.there), g)
        chosen.made = {how: (own(k), own(v)) for how, (k, v) in self.made.items()}
        return chosen


class Now:
    """No past: what can be seen is in this call. In training and scoring tokens come in order of time, those
    with position FAR last, and see what came before; in an encoder all see those that are there (B,S)."""

    def __init__(self, source=None, there=None):
        self.source, self.seen = source, None if there is None else there[:, None, None]     # (B,1,1,S)

    def busy(self, here):
        """Rows of here (B,k) in which anybody is; None: run all, so that shapes do not depend on data."""
        return None

    def join(self, x, at):
        """Who else is due for keys and values: nobody."""
        return x, at

    def attend(self, qkv, at, dropout):
        """Queries, keys and values (3,B,nh,T,hs) -> (B,nh,T,hs)."""
        q, k, v = qkv.unbind()
        return F.scaled_dot_product_attention(q, k, v, self.seen, dropout, is_causal=self.seen is None)


def rotations(size, hs, dtype=torch.float32):
    """How far a position turns pair i of a query and a key, position * 10000^(-2i/hs), and of a value, not at
    all: cos and sin (size, 3, 1, hs/2, 2)."""
    angle = torch.arange(size).double().outer(10000.0 ** (-torch.arange(0, hs, 2).double() / hs))
    angle = torch.stack([angle, angle, 0 * angle], 1).unsqueeze(2)
    return torch.stack([angle.cos(), angle.sin()], -1).to(dtype)


class Attention(nn.Module):
    """Multi-head self-attention over `past` and the tokens of this call, with rotary positions."""

    def __init__(self, C, nh, block_size, dropout):
        super().__init__()
        self.n_head, self.size, self.dropout = nh, C // nh, dropout
        self.qkv, self.proj = Linear(C, 3 * C), Linear(C, C)
        self.register_buffer("rope", rotations(block_size, C // nh), persistent=False)

    def heads(self, x, at):
        """Queries, keys and values, side by side in x (B,T,3C) -> (3,B,nh,T,hs). Two channels turn as one
        complex number."""
        (B, T, _), nh, hs = x.shape, self.n_head, self.size
        pairs = torch.view_as_complex(x.to(self.rope.dtype).view(B, T, 3, nh, hs // 2, 2))
        y = torch.view_as_real(pairs * at.turned(self.rope)).view(B, T, 3, nh, hs)
        return y.to(x.dtype).permute(2, 0, 3, 1, 4)

    def forward(self, x, at, past):
        """x (B,T,C) -> (B,T,C), without those that joined late."""
        y = past.attend(self.heads(self.qkv(x), at), at, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of this call to a Source, which has no order here: its encoder put
    positions into the states."""

    def __init__(self, C, nh, Ce, dropout):
        super().__init__()
        self.n_head, self.dropout = nh, dropout
        self.query, self.key_value, self.proj = Linear(C, C), Linear(Ce, 2 * C), Linear(C, C)

    def keys_values(self, states):
        """states (B,S,Ce) -> k, v (B,nh,S,hs)."""
        return self.key_value(states).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x, at, source):
        """x (gB,T,C), a source of B rows -> (gB,T,C). The g rows of one source are queries side by side,
        unless only some rows run."""
        (k, v), there = source.keys_values(self), source.there
        if at.rows is not None:
            k, v, there = (t[at.rows // source.g] for t in (k, v, there))
        q = self.query(x).view(len(k), -1, self.n_head, k.size(-1)).transpose(1, 2)     # (B,nh,gT,hs)
        y = F.scaled_dot_product_attention(q, k, v, there[:, None, None],
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, C, inner):
        super().__init__()
        self.fc, self.proj = Linear(C, inner), Linear(inner, C)

    def forward(self, x, pos, route):
        """x (B,T,C) -> (B,T,C), None: there was nothing to choose, as there is among Experts."""
        return self.proj(gelu(self.fc(x))), None


class Block(nn.Module):
    """Pre-norm attention, then (with a source of Ce channels) cross-attention, then MLP; inner 0 means 4C."""

    def __init__(self, C, nh, block_size, inner=0, dropout=0.0, Ce=None):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(C), Attention(C, nh, block_size, dropout)
        self.cross = None
        if Ce is not None:
            self.ln_cross, self.cross = nn.LayerNorm(C), CrossAttention(C, nh, Ce, dropout)
        self.ln2, self.mlp = nn.LayerNorm(C), MLP(C, inner or 4 * C)
        self.dropout = dropout

    def drop(self, x):
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def residual(self, x, at, past, route):
        """What this block would add to the stream x (B,T,C), and the Choice if its MLP is Experts."""
        more, here = past.join(x, at)                   # with copied states that are due for keys and values
        a = self.drop(self.attn(self.ln1(more), here, past))
        if self.cross is not None:
            a = a + self.drop(self.cross(self.ln_cross(x + a), at, past.source))
        m, choice = self.mlp(self.ln2(x + a), at.pos, route)
        return self.drop(m).add_(a), choice             # a + m, in the memory of m

    def forward(self, x, at, past, route):
        """x (B,T,C) -> (x, Visit). A token that has exited keeps its state; later tokens see this block's own
        keys and values of that copy [DAT 2]. route: for experts."""
        update, choice = self.residual(x, at, past, route)
        if at.live is None:
            return x + update, Visit(None, choice=choice)
        return torch.where(at.live.unsqueeze(-1), x + update, x), Visit(at.live, choice=choice)


def initialise(modules, C):
    """Normal weights, zero biases. GPT-2's 0.02 is for a width of 768, and narrower needs more; the matrices
    that add to the stream get less, by the root of how often that happens (a shared block: L times)."""
    every = modules.named_parameters(remove_duplicate=False)
    std, adds = 0.02 * math.sqrt(768 / C), sum(name.endswith("proj.weight") for name, _ in every)
    for name, p in modules.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std / math.sqrt(adds) if name.endswith("proj.weight") else std)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


class GPT(nn.Module):
    """Embedding, L blocks, and classifiers that read the stream after some of them. Ce: channels of the
    source that every block looks across at, None for a plain GPT."""

    def __init__(self, config, vocab_size, Ce=None):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        C, L, routed = config.n_embd, config.n_layer, config.routed_blocks()
        self.wte = nn.Embedding(vocab_size, C)
        self.dropout = config.dropout
        blocks = [Block(C, config.n_head, config.block_size, config.inner, config.dropout, Ce)
                  for _ in range(1 if config.share_blocks else L)]
        blocks = blocks * (L // len(blocks))
        for block in blocks if config.experts else []:
            block.mlp = Experts(C, config.inner, config.experts, config.noops, config.expert_capacity)
        for n in routed:
            blocks[n] = Routed(blocks[n], C, config.capacity, config.gate, config.hidden,
                               n if config.router == "random" else None)
        self.blocks = nn.ModuleList(blocks)
        self.classifiers = Classifiers(range(1, L + 1) if config.exits == "all" else [L], C, vocab_size,
                                       self.wte.weight if config.classifier == "tied" else None)
        self.halting = None
        if config.halting != "none":
            self.halting = Halting(config.halting, L, C, Ce, config.share_halting)
        initialise(self, C)

    def embed(self, ids):
        """ids (B,T) -> h^0 (B,T,C). Positions enter in attention."""
        if ids.size(1) > self.config.block_size:
            raise ValueError(f"{ids.size(1)} tokens exceed the context of {self.config.block_size}")
        return F.dropout(self.wte(ids), self.dropout, self.training)

    def trunk(self, x, at, past=None, route=top_k):
        """h^0 (B,T,C) -> yields (h^n, Visit) for n = 1..L. past: one for each block, None for `Now`."""
        for n, block in enumerate(self.blocks):
            x, visit = block(x, at, past[n] if past else Now(), route)
            yield x, visit
            x = at.onward(n + 1, x) if at.onward else x

    def past(self, batch):
        """What a batch (data/batches.py) looks back on when it is read all at once: nothing."""
        return None

    def states(self, batch, route=top_k, at=None, past=None):
        """A batch -> h^1..h^L and the Visits, as `trunk`."""
        at = at or Tokens(batch.pos, batch.live)
        return self.trunk(self.embed(batch.ids), at, past or self.past(batch), route)

    def forward(self, ids, route=top_k, past=None):
        """ids (B,T) -> logits (B,T,V) after the last block. The scripts read every h^n from `trunk`."""
        *_, (h, _) = self.trunk(self.embed(ids), Tokens(positions(ids)), past, route)
        return self.classifiers(self.config.n_layer, h)


class Encoder(nn.Module):
    """Embedding, blocks that look both ways, LayerNorm. wte: a table to share with the decoder, or None."""

    def __init__(self, config, vocab_size, wte=None):
        super().__init__()
        self.block_size, C = config.block_size, config.enc_embd
        self.wte = wte or nn.Embedding(vocab_size, C)
        self.dropout = config.dropout
        self.blocks = nn.ModuleList(Block(C, config.enc_head, self.block_size, config.n_inner, config.dropout)
                                    for _ in range(config.enc_layer))
        self.norm = nn.LayerNorm(C)
        initialise(self, C)

    def forward(self, ids, pos):
        """ids, pos (B,S), FAR: padding -> Source."""
        if ids.size(1) > self.block_size:
            raise ValueError(f"a source of {ids.size(1)} tokens exceeds the context of {self.block_size}")
        x, there = F.dropout(self.wte(ids), self.dropout, self.training), pos < FAR
        for block in self.blocks:
            x = x + block.residual(x, Tokens(pos), Now(there=there), None)[0]
        return Source(self.norm(x), there)


class Seq2Seq(GPT):
    """An encoder, and a GPT whose blocks look across at what it made [DAT 2]."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size, config.enc_embd)
        if config.embeddings == "tied" and config.enc_embd != config.n_embd:
            raise ValueError(f"one embedding cannot have {config.enc_embd} and {config.n_embd} channels")
        self.encoder = Encoder(config, vocab_size, self.wte if config.embeddings == "tied" else None)

    def encode(self, ids, pos=None):
        """ids, pos (B,S), FAR: padding; None: no padding -> Source."""
        return self.encoder(ids, positions(ids) if pos is None else pos)

    def past(self, batch):
        """The source of a batch, encoded: one object for all blocks."""
        return [Now(self.encode(*batch.source))] * self.config.n_layer

    def decode(self, source, ids, route=top_k):
        """Source, ids (B,T) -> logits (B,T,V)."""
        return super().forward(ids, route, [Now(source)] * self.config.n_layer)

    def forward(self, source_ids, ids, route=top_k):
        """source_ids (B,S), ids (B,T), no padding -> logits (B,T,V)."""
        return self.decode(self.encode(source_ids), ids, route)
