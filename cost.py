"""What decoding costs, counted from `visited`: FLOPs (2 for a multiply-add, matrix products only) and bytes.

    part         one token                                                           DAT, appendix B
    blocks       a block that ran: 8 C^2 + 4 inner C + 4 t C, t being the tokens     12 d^2 + 4 d_f d
                 it attends to; with a source of S tokens 4 C^2 + 4 S C more         + 4 t d + 4 |x| d
    source       4 S C Ce at a block's first visit: its keys and values of it        4 |x| d d_e
    copies       4 C^2 for every dense block above the exit: keys and values         4 d^2
    classifiers  2 V C for each that was read: all up to the exit when confidence    2 V d, or 2 q V d
                 decides, else one
    router       2 C for the score and 2 (C + 1) hidden for the predictor of every   (MoD 3.5)
                 token that comes to a routed block
    halting      2 C for each look at a state, 2 N C for token, 2 N Ce for sequence      2 d q, 2 N d

The paper charges every copy ("paper"). If keys and values of copies are made only when a later token goes
that deep, some are never made: the same count with those alone is "needed" (not counted: decode.py gives each
of them a query too, 2 C^2, so that all is one product). Hypotheses of a beam that went apart before one of
them came that deep each make their own, so "needed" can then be the larger one.
"""
from typing import NamedTuple

import numpy as np

from routing import kept


class Cost(NamedTuple):
    """FLOPs of reading one text token by token, by part; bytes at batch 1 (parameters and cache)."""
    blocks: float
    source: float
    copies: float
    classifiers: float
    router: float
    halting: float
    bytes: float        # moved
    cache: float        # keys and values kept at the end, as a share of a dense model's at full depth

    @property
    def flops(self):
        return sum(self[:6])


def block_flops(C, inner, t, S=0):
    """One token through one block that attends to t tokens (itself included) and S source tokens."""
    return (12 if S else 8) * C * C + 4 * inner * C + 4 * (t + S) * C


def router_flops(config):
    """One token's score, and its predictor's logit if there is one; chance costs nothing."""
    return 0 if config.router == "random" else 2 * config.n_embd + 2 * (config.n_embd + 1) * config.hidden


def mlp_flops(config, T):
    """The MLPs of one block over T tokens of a sequence: experts as full as they may be, and their router."""
    one = 4 * config.inner * config.n_embd
    if not config.experts:
        return T * one
    choices = config.experts + config.noops
    return config.experts * kept(config.expert_capacity / choices, T) * one + T * 2 * config.n_embd * choices


def forward(config, vocab_size, T):
    """FLOPs of a GPT's forward pass over one sequence of T tokens, under top-k. Attention counts all T keys
    for every query, and k for k in a routed block [MoD 3.2]."""
    C, total, routed = config.n_embd, 0, config.routed_blocks()
    for n in range(config.n_layer):
        k = kept(config.capacity, T) if n in routed else T
        total += k * block_flops(C, 0, k) + mlp_flops(config, k)
        total += T * router_flops(config) if n in routed else 0
    return total + T * 2 * vocab_size * C * (config.n_layer if config.exits == "all" else 1)


def training(config, vocab_size, T):
    """FLOPs of a GPT's training step on one sequence of T tokens: three forward passes, backward being two,
    less the gradients that the predictors' first layers do not hand down."""
    stopped = len(config.routed_blocks()) * T * 2 * config.n_embd * config.hidden
    return 3 * forward(config, vocab_size, T) - stopped


def dense_blocks(config):
    """(L,) bool."""
    return np.array([n not in config.routed_blocks() for n in range(config.n_layer)])


def along(visited, dense, parent):
    """Where every read of a tree finds itself: parent (R,) is the read before, -1 for a first one.
    -> attended (R,L): tokens in a block's cache with this one if all pending ones are made when a token comes
    that deep; pending (R,L): how many of them this read had to make."""
    place, held = np.zeros((len(visited) + 1, 1), int), np.zeros((len(visited) + 1, visited.shape[1]), int)
    for r, p in enumerate(parent):                                          # row -1: nothing was read yet
        place[r] = place[p] + 1
        held[r] = np.where(visited[r], np.where(dense, place[r], held[p] + 1), held[p])
    attended = np.where(visited, held[:-1], 0)
    return attended, np.where(visited & dense, attended - 1 - held[parent], 0)


def decoding(config, vocab_size, visited, exit_at, decides="", S=0, copies="paper", itemsize=4, parent=None,
             worked=None):
    """visited (T,L) bool and exit_at (T,) of one text, in order of reading -> Cost.

    decides: what the exit rule looks at, "confidence", a kind of `exits.Halting`, or "" for nothing.
    S: source tokens, 0 for a GPT. parent (T,): the read before each, -1 for the first, where several texts
    that begin alike were read, as the hypotheses of a beam; None: one text.
    worked (T,L): where there are experts, the blocks in which one of them took the token.
    copies: "paper", "needed" for those that a later token attends to, or "computed": nothing is copied, the
    token runs the block after all when a later one goes that deep (decode.read, missing="compute").
    """
    C, L, V = config.n_embd, config.n_layer, vocab_size
    inner, Ce, dense = config.inner, config.enc_embd if S else 0, dense_blocks(config)
    attended, pending = along(visited, dense, np.arange(-1, len(visited) - 1) if parent is None else parent)
    runs, seen, made = visited.sum(), attended.sum(), pending.sum()
    if copies == "paper":
        made = (dense & ~visited).sum()
    if copies == "computed":    # the pending ones run too, each attending to all that came before it
        before = attended - 1 - pending
        runs, seen = runs + made, seen + (pending * before + pending * (pending + 1) // 2).sum()
        made = 0
    came = (~dense & (exit_at[:, None] > np.arange(L))).sum()
    read = exit_at.sum() if decides == "confidence" else len(exit_at)                       # classifiers
    looks = {"sequence": L * Ce / C, "token": L * len(exit_at)}.get(decides, 0)             # of C channels
    looks = np.minimum(exit_at, L - 1).sum() if decides in ("geometric", "binary") else looks
    blocks = min(visited.any(0).sum(), 1 if config.share_blocks else L)     # that look at the source
    mlps = runs if worked is None else worked.sum() + runs - visited.sum()
    linear = {"blocks": runs * (block_flops(C, 0, 0) + (4 * C * C if S else 0)) + mlps * 4 * inner * C
              + (runs * 2 * C * (config.experts + config.noops) if config.experts else 0),
              "source": 4 * blocks * C * Ce, "copies": 4 * C * C * made, "classifiers": 2 * read * V * C,
              "router": came * router_flops(config), "halting": 2 * looks * C}
    cache = 2 * C * (seen + runs * S + runs + made + blocks * S)
    moved = itemsize * (sum(linear.values()) / 2 + cache)       # every weight once a token that it works for
    parts = linear | {"blocks": linear["blocks"] + 4 * C * (seen + runs * S), "source": linear["source"] * S}
    return Cost(**{name: float(value) for name, value in parts.items()}, bytes=float(moved),
                cache=float((runs + made) / max(1, visited.size)))
