"""A GPT and a seq2seq Transformer whose blocks can be skipped, by Mixture-of-Depths (routing.py) or by early
exit (exits.py). The Seq2Seq is that GPT with an encoder, whose output every block attends to.

B batch, T tokens of this call, S source tokens, C channels, nh heads, hs = C/nh head size, V vocabulary,
L blocks, N exits (L, or 1 with exits="last"), M keys of a query, P copied states projected in this call.

Three rules let one Block.forward serve training, prompts and decoding:
- every token carries its position, `pos`: attention treats subsets, padding and copied states alike;
- what a block remembers is an argument: cache=None in training, a decode.LayerCache in decoding;
- a block exposes its update, `residual`: added (dense), scattered (routed) or dropped (exited).
"""
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.common import UserError
from exits import Classifiers, ExitPredictor
from experts import Experts
from linear import Linear
from routing import NO_POSITION, Routed, Routing, top_k


@dataclass
class GPTConfig:
    """The shape of the network: with the size of the vocabulary, all that it takes to build it."""
    n_layer: int = 6                                    # L, blocks
    n_head: int = 4                                     # nh
    n_embd: int = 128                                   # C
    d_ff: int = 0                                       # hidden units of an MLP; 0: four times its width
    block_size: int = 256                               # longest context, in tokens
    dropout: float = 0.0
    exits: Literal["all", "last"] = "all"               # which blocks have a classifier [DAT]
    classifier: Literal["tied", "separate"] = "tied"    # share the embedding, or one matrix for each exit
    exit_predictor: Literal["none", "sequence", "token", "geometric", "binary"] = "none"    # where to exit
    routed: str = "odd"     # none, odd, even, all or "1,3", counted from 0 (all else counts from 1) [MoD]
    capacity: float = 0.125                             # share of the tokens that a routed block runs
    router: Literal["learned", "random"] = "learned"    # random: the control, weights without input
    gate: Literal["raw", "sigmoid", "one"] = "raw"      # r, sigmoid(r) or (random only) 1 times the update
    causal_logit: Literal["predictor", "router"] = "predictor"  # what decides when sampling
    predictor_width: float = 0.5                        # hidden units of the predictor, a share of n_embd
    experts: int = 0                                    # MLPs to choose one of; 0: no choice [MoD 4.3]
    noops: int = 0                                      # further experts that do nothing
    expert_capacity: float = 1.25       # tokens an expert keeps under top_k, a multiple of its even share

    @property
    def mlp_units(self):
        return self.d_ff or 4 * self.n_embd

    @property
    def predictor_units(self):      # 0: no router has a predictor beside it
        learned = self.router == "learned" and self.causal_logit == "predictor"
        return max(1, int(self.predictor_width * self.n_embd)) if learned else 0

    def routed_blocks(self):
        """`routed` as a set of indices into `blocks`: block number - 1. UserError if it cannot be read."""
        L = self.n_layer
        named = {"none": set(), "odd": set(range(1, L, 2)), "even": set(range(0, L, 2)), "all": set(range(L))}
        named |= {str(n): {n} for n in range(L)}
        try:
            return set().union(*(named[word] for word in self.routed.split(",")))
        except KeyError:
            raise UserError(f"--routed {self.routed}: use none, odd, even, all or numbers from 0 to {L - 1}, "
                            "such as 1,3") from None


@dataclass
class Seq2SeqConfig(GPTConfig):
    """The GPT's options are the decoder's; d_ff, block_size and dropout are also the encoder's."""
    enc_layer: int = 2
    enc_head: int = 4
    enc_embd: int = 128
    embeddings: Literal["tied", "separate"] = "tied"    # do source and target share one table?


def position_ids(ids):
    """ids (B,T) -> pos (B,T): 0..T-1 in every row."""
    return torch.arange(ids.size(1), device=ids.device).expand_as(ids)


def rotary_table(size, hs):
    """Rotary angles, position * 10000^(-2i/hs) -> their cos and sin (size, 2, hs/2)."""
    angle = torch.arange(size).double().outer(10000.0 ** (-torch.arange(0, hs, 2).double() / hs))
    return torch.stack([angle.cos(), angle.sin()], 1).float()


def rotate(x, table):
    """Rotary embedding: channels 2i and 2i+1 of every head turn by the angle of their position.
    x (...,nh,T,hs), table (B,1,T,2,hs/2) -> (...,nh,T,hs)."""
    cos, sin = table.to(x.dtype).unbind(-2)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, C, nh, block_size, dropout):
        super().__init__()
        self.n_head, self.dropout = nh, dropout
        self.qkv, self.proj = Linear(C, 3 * C), Linear(C, C)
        self.register_buffer("rope", rotary_table(block_size, C // nh), persistent=False)

    def forward(self, x, pos, T, cache=None, mask=None):
        """x (B,P+T,C) at pos (B,P+T) -> (B,T,C) for the last T, the only queries. A token sees itself and
        earlier ones: by position with a cache, else by place. In an encoder: where mask (B,1,1,T) is True."""
        qk, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4).split([2, 1])
        q, k = rotate(qk, self.rope[pos.clamp(max=len(self.rope) - 1)].unsqueeze(1))    # (B,nh,P+T,hs)
        q, v = q[:, :, q.size(2) - T:], v[0]
        if cache is not None:
            k, v, positions = cache.append(k, v, pos)
            mask = positions[:, None, None, :] <= pos[:, None, -T:, None]               # (B,1,T,M)
        return self.proj(attend(q, k, v, mask, self.dropout if self.training else 0.0))


def attend(q, k, v, mask, dropout):
    """Queries (B,nh,T,hs), keys and values (B,nh,M,hs), mask None: causal -> (B,T,C)."""
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
    return y.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of this call to the encoder output."""

    def __init__(self, C, nh, Ce, dropout):
        super().__init__()
        self.n_head, self.dropout = nh, dropout
        self.query, self.key_value, self.proj = Linear(C, C), Linear(Ce, 2 * C), Linear(C, C)

    def forward(self, x, memory, cache=None):
        """x (B,T,C), Memory of B rows -> (B,T,C). A cache keeps the keys and values of the encoder output."""
        kv = None if cache is None else cache.memory_kv
        if kv is None:
            kv = self.key_value(memory.states).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache.memory_kv = kv
        q = self.query(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        mask = memory.mask[:, None, None]
        return self.proj(attend(q, *kv, mask, self.dropout if self.training else 0.0))


class Memory(NamedTuple):
    """Encoder output."""
    states: torch.Tensor            # (B,S,Ce)
    mask: torch.Tensor              # (B,S) bool, False at padding
    exit_logits: torch.Tensor | None = None     # (B,1,N) of an exit predictor that reads the source

    def reorder(self, rows):
        return Memory(*(x if x is None else x[rows] for x in self))


class MLP(nn.Module):
    def __init__(self, C, units):
        super().__init__()
        self.fc, self.proj = Linear(C, units), Linear(units, C)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))


class Block(nn.Module):
    """Pre-norm attention, then (with an encoder of Ce channels) cross-attention, then MLP."""

    def __init__(self, C, nh, block_size, units, dropout=0.0, Ce=None):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(C), Attention(C, nh, block_size, dropout)
        self.cross = None
        if Ce is not None:
            self.ln_cross, self.cross = nn.LayerNorm(C), CrossAttention(C, nh, Ce, dropout)
        self.ln2, self.mlp = nn.LayerNorm(C), MLP(C, units)
        self.drop = nn.Dropout(dropout)

    def residual(self, x, pos, cache=None, memory=None, route=top_k, mask=None):
        """x (B,T,C) at pos (B,T) -> update of x; worked, balance as in Routing, None without Experts.
        With a cache: also projects copied states of tokens that exited below in earlier calls [DAT 2]."""
        h, h_pos = (x, pos) if cache is None else cache.with_pending(x, pos)
        a = self.drop(self.attn(self.ln1(h), h_pos, x.size(1), cache, mask))
        if self.cross is not None:
            a = a + self.drop(self.cross(self.ln_cross(x + a), memory, cache))
        z, worked, balance = self.ln2(x + a), None, None
        if isinstance(self.mlp, Experts):
            m, worked, balance = self.mlp(z, pos, route)
        else:
            m = self.mlp(z)
        return a + self.drop(m), worked, balance

    def forward(self, x, pos, live=None, cache=None, memory=None, route=top_k):
        """x (B,T,C), pos, live (B,T), None: all -> (x, Routing). A token that is not live keeps its state."""
        update, worked, balance = self.residual(x, pos, cache, memory, route)
        if live is not None:
            update = torch.where(live.unsqueeze(-1), update, 0)
        runs = pos < NO_POSITION if live is None else live
        return x + update, Routing(runs, None, None, worked, balance)


def initialise(model, C):
    """Normal weights, zero biases: GPT-2's 0.02 is for a width of 768, narrower networks need more. Matrices
    that add to the stream get less, by the root of their number."""
    std = 0.02 * math.sqrt(768 / C)
    additions = [name for name, _ in model.named_parameters() if name.endswith(("proj.weight", "proj"))]
    for name, p in model.named_parameters():
        if p.dim() > 1:
            w = nn.init.normal_(torch.empty(p.shape), std=std)      # whatever the order of p in memory
            p.data.copy_(w / math.sqrt(len(additions)) if name in additions else w)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


class GPT(nn.Module):
    """Embedding, L blocks, classifiers after some of them. Ce: channels of an encoder's output, or None."""

    def __init__(self, config, vocab_size, Ce=None):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        C, L = config.n_embd, config.n_layer
        self.wte, self.drop = nn.Embedding(vocab_size, C), nn.Dropout(config.dropout)
        blocks = [Block(C, config.n_head, config.block_size, config.mlp_units, config.dropout, Ce)
                  for _ in range(L)]
        if config.experts:
            for block in blocks:
                block.mlp = Experts(C, config.mlp_units, config.experts, config.noops, config.expert_capacity)
        for n in config.routed_blocks():
            blocks[n] = Routed(blocks[n], C, config.capacity, config.gate, config.predictor_units,
                               config.router == "random")
        self.blocks = nn.ModuleList(blocks)
        self.classifiers = Classifiers(range(1, L + 1) if config.exits == "all" else [L], C, vocab_size,
                                       self.wte.weight if config.classifier == "tied" else None)
        self.exit_predictor = None
        if config.exit_predictor != "none":
            self.exit_predictor = ExitPredictor(config.exit_predictor, L, C, Ce)
        initialise(self, C)

    def embed(self, ids):
        """ids (B,T) -> h^0 (B,T,C). Positions enter in attention."""
        if ids.size(1) > self.config.block_size:
            raise ValueError(f"{ids.size(1)} tokens exceed the context of {self.config.block_size}")
        return self.drop(self.wte(ids))

    def run_layers(self, x, pos, live=None, memory=None, route=top_k):
        """h^0 (B,T,C) -> yields (h^n, Routing) for n = 1..L, without early exits and without a cache."""
        for block in self.blocks:
            x, routing = block(x, pos, live, None, memory, route)
            yield x, routing

    def memory_of(self, batch):
        """The Memory of a batch (data/batches.py) of sentence pairs, None of a text."""
        return self.encode(*batch.source) if batch.source else None

    def run_batch(self, batch, route=top_k):
        """A batch -> yields (h^n, Routing) as `run_layers`."""
        return self.run_layers(self.embed(batch.ids), batch.pos, batch.live, self.memory_of(batch), route)

    def forward(self, ids, route=top_k, memory=None):
        """ids (B,T) without padding, Memory of a Seq2Seq -> logits (B,T,V) after the last block."""
        *_, (h, _) = self.run_layers(self.embed(ids), position_ids(ids), None, memory, route)
        return self.classifiers(self.config.n_layer, h)


class Encoder(nn.Module):
    """Embedding, blocks that look both ways, LayerNorm. wte: a table to share with the decoder, or None."""

    def __init__(self, config, vocab_size, wte=None):
        super().__init__()
        self.block_size, C = config.block_size, config.enc_embd
        self.wte, self.drop = wte or nn.Embedding(vocab_size, C), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(C, config.enc_head, self.block_size, config.d_ff or 4 * C,
                                          config.dropout) for _ in range(config.enc_layer))
        self.norm = nn.LayerNorm(C)
        initialise(self, C)

    def forward(self, ids, pos):
        """ids, pos (B,S), NO_POSITION at padding -> Memory."""
        if ids.size(1) > self.block_size:
            raise ValueError(f"a source of {ids.size(1)} tokens exceeds the context of {self.block_size}")
        x, mask = self.drop(self.wte(ids)), pos < NO_POSITION
        for block in self.blocks:
            x = x + block.residual(x, pos, mask=mask[:, None, None])[0]
        return Memory(self.norm(x), mask)


class Seq2Seq(GPT):
    """An encoder, and a GPT whose blocks attend to its output [DAT 2]."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size, config.enc_embd)
        self.encoder = Encoder(config, vocab_size, self.wte if config.embeddings == "tied" else None)

    def encode(self, ids, pos=None):
        """ids, pos (B,S), NO_POSITION at padding; None: no padding -> Memory."""
        memory = self.encoder(ids, position_ids(ids) if pos is None else pos)
        if self.config.exit_predictor == "sequence":
            memory = memory._replace(exit_logits=self.exit_predictor.of_memory(memory))
        return memory
