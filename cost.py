"""FLOPs of training, from a config; FLOPs and bytes of decoding, from what each token ran. A multiply-add is
2 FLOPs; matrix products only; `experts + noops` choices of an expert cost 2 C each.

    part         one token                                                            DAT, appendix B
    blocks       a block that ran: 8 C^2 + 4 d_ff C + 4 t C, t being the tokens       12 d^2 + 4 d_f d
                 it attends to; with a source of S tokens 4 C^2 + 4 S C more          + 4 t d + 4 |x| d
    source       4 S C Ce at a block's first visit: keys and values of the source     4 |x| d d_e
    copies       4 C^2 for every dense block above the exit: keys and values          4 d^2
    classifiers  2 V C for each classifier evaluated for the token                    2 V d, or 2 q V d
    router       2 C for the weight and 2 (C + 1) units for the predictor, for        (MoD 3.5)
                 every token that arrives at a routed block
    predictor    2 C for each look at a state, 2 N C for token, 2 N Ce for sequence   2 d q, 2 N d

The paper charges every copy ("paper"). If keys and values of copies are made only when a later token goes
that deep, some are never made: the same count with those alone is "needed" (not counted: decode.py makes a
query for each of them too, 2 C^2).
"""
import numpy as np

from routing import capacity_in_tokens


def router_flops(config):
    """One token's router weight and, if a predictor makes it, causal logit; the random control is free."""
    if config.router == "random":
        return 0
    return 2 * config.n_embd + 2 * (config.n_embd + 1) * config.predictor_units


def mlp_flops(config, T):
    """The MLPs of one block over T tokens of a sequence: experts as full as they may be, their router."""
    one = 4 * config.mlp_units * config.n_embd
    if not config.experts:
        return T * one
    choices = config.experts + config.noops
    tokens = config.experts * capacity_in_tokens(config.expert_capacity / choices, T)
    return tokens * one + T * 2 * config.n_embd * choices


def forward(config, vocab_size, T):
    """FLOPs of a GPT's forward pass over one sequence of T tokens, under top-k. Attention counts all T keys
    for every query, and k for k in a routed block [MoD 3.2]."""
    C, total, routed = config.n_embd, 0, config.routed_blocks()
    for n in range(config.n_layer):
        k = capacity_in_tokens(config.capacity, T) if n in routed else T
        total += k * (8 * C * C + 4 * k * C) + mlp_flops(config, k)
        total += T * router_flops(config) if n in routed else 0
    return total + T * 2 * vocab_size * C * (config.n_layer if config.exits == "all" else 1)


def training(config, vocab_size, T):
    """FLOPs of a GPT's training step on one sequence of T tokens: three forward passes, backward being two,
    less the gradients that the predictors' first layers do not hand down."""
    stopped = len(config.routed_blocks()) * T * 2 * config.n_embd * config.predictor_units
    return 3 * forward(config, vocab_size, T) - stopped


def attended(visited, dense):
    """visited (T,L), dense (L,) bool -> keys (T,L) that a token attends to in each block that it ran, its own
    included; pending (T,L): how many of them, in a dense block, are copies not yet projected when it ran."""
    place = np.arange(1, len(visited) + 1)[:, None]
    in_dense = np.maximum.accumulate(np.where(visited, place, 0))
    held = np.where(dense, in_dense, visited.cumsum(0))
    before = np.pad(held, ((1, 0), (0, 0)))[:-1]
    return np.where(visited, held, 0), np.where(visited & dense, held - 1 - before, 0)


def decoding(config, vocab_size, visited, exit_at, classified=None, predicted=None, worked=None, S=0,
             copies="paper", itemsize=4):
    """One text, read token by token as `decode.step` describes it -> {part: FLOPs, "flops": their sum,
    "bytes": moved at batch 1, "cache": keys and values kept at the end, as a share of a dense model's}.

    visited (T,L) bool, exit_at (T,); classified (T,): classifiers evaluated, None for one a token; predicted
    (T,): evaluations of the exit predictor; worked (T,L): blocks whose MLP ran, None for all visited; S:
    source tokens, 0 for a GPT. copies: which are counted, "paper" (all), "needed" (those that a later token
    attends to) or, for exited_kv="compute", "computed": the token runs the block once a later one does."""
    C, L, V, Ce = config.n_embd, config.n_layer, vocab_size, config.enc_embd if S else 0
    dense = np.array([n not in config.routed_blocks() for n in range(L)])
    keys, pending = attended(visited, dense)
    runs, seen, made = visited.sum(), keys.sum(), pending.sum()
    if copies == "paper":
        made = (dense & ~visited).sum()
    if copies == "computed":    # the pending ones run too, each attending to all that came before it
        runs, made = runs + made, 0
        seen += (pending * (keys - 1 - pending) + pending * (pending + 1) // 2).sum()
    mlps = runs if worked is None else worked.sum() + runs - visited.sum()
    classified = len(visited) if classified is None else np.sum(classified)
    looks = 0 if predicted is None else np.sum(predicted)
    width = {"sequence": L * Ce / max(1, looks), "token": L * C}.get(config.exit_predictor, C)
    sources, arrived = visited.any(0).sum(), (~dense & (exit_at[:, None] > np.arange(L))).sum()
    choices = config.experts + config.noops if config.experts else 0
    attention = (12 if S else 8) * C * C + 2 * C * choices
    products = {    # FLOPs for one read of each parameter: "source" for one source token
        "blocks": runs * attention + mlps * 4 * config.mlp_units * C,
        "source": 4 * sources * C * Ce, "copies": 4 * C * C * made, "classifiers": 2 * classified * V * C,
        "router": arrived * router_flops(config), "predictor": 2 * looks * width}
    cache = 2 * C * (seen + runs * S + runs + made + sources * S)           # numbers read and written
    moved = itemsize * (sum(products.values()) / 2 + cache)
    flops = products | {"source": products["source"] * S}
    flops["blocks"] += 4 * C * (seen + runs * S)
    share = (runs + made) / max(1, visited.size)
    return flops | {"flops": sum(flops.values()), "bytes": moved, "cache": share}
