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

The paper charges every copy ("paper"). If keys and values of copies are made only when a later token goes
that deep, some are never made: the same count with those alone is "needed".
"""
from typing import NamedTuple

import numpy as np


class Cost(NamedTuple):
    """FLOPs of reading one text token by token, by part; bytes moved at batch 1 (parameters and cache)."""
    blocks: float
    source: float
    copies: float
    classifiers: float
    router: float
    bytes: float

    @property
    def flops(self):
        return sum(self[:5])


def block_flops(C, inner, t, S=0):
    """One token through one block that attends to t tokens (itself included) and S source tokens."""
    return (12 if S else 8) * C * C + 4 * inner * C + 4 * (t + S) * C


def router_flops(C, hidden):
    """One token's score, and its predictor's logit if that has hidden units (0: the router decides)."""
    return 2 * C + 2 * (C + 1) * hidden


def copied(config, visited):
    """visited (T,L) -> (T,L) bool, the keys and values that some later token needs of a copied state."""
    dense = np.array([n not in config.routed_blocks() for n in range(config.n_layer)])
    return dense & ~visited & np.logical_or.accumulate(visited[::-1])[::-1]


def decoding(config, vocab_size, visited, exit_at, confident=False, S=0, copies="paper", itemsize=4):
    """visited (T,L) bool and exit_at (T,) of one text, in order of reading -> Cost.

    confident: classifiers were read until one was sure enough. S: source tokens, 0 for a GPT.
    copies: "paper", "needed" for those that a later token attends to, or "computed": nothing is copied, the
    token runs the block after all when a later one goes that deep (decode.read, missing="compute").
    """
    C, L, routed = config.n_embd, config.n_layer, config.routed_blocks()
    inner, Ce = config.n_inner or 4 * C, config.enc_embd if S else 0
    dense = np.array([n not in routed for n in range(L)])
    hidden = max(1, int(config.predictor_width * C)) if config.causal == "predictor" else 0
    T = len(visited)
    if copies == "computed":
        visited = visited | copied(config, visited)
    place = np.arange(1, T + 1)[:, None]
    attended = np.where(dense, place, np.cumsum(visited, 0)) * visited                      # (T,L)
    made = {"paper": dense & ~visited, "needed": copied(config, visited),
            "computed": np.zeros_like(visited)}[copies]
    came = ~dense & (exit_at[:, None] > np.arange(L))                                       # (T,L)
    read = exit_at.sum() if confident else T                                                # classifiers
    projections = visited.any(0).sum() * S                          # of source tokens, over blocks
    weights = visited.sum() * block_flops(C, inner, 0, 0) / 2 + visited.sum() * (2 * C * C if S else 0)
    weights += made.sum() * 2 * C * C + read * vocab_size * C + came.sum() * router_flops(C, hidden) / 2
    weights += visited.any(0).sum() * 2 * C * Ce
    cache = 2 * C * (attended.sum() + visited.sum() * S + (visited | made).sum() + projections)
    parts = {"blocks": visited.sum() * block_flops(C, inner, 0, S) + 4 * C * attended.sum(),
             "source": 4 * projections * C * Ce, "copies": 4 * C * C * made.sum(),
             "classifiers": 2 * read * vocab_size * C, "router": came.sum() * router_flops(C, hidden),
             "bytes": itemsize * (weights + cache)}
    return Cost(**{name: float(value) for name, value in parts.items()})
