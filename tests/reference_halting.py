"""Learnt exits once more, one token at a time, to check the fast code against.

    DAT = Depth-Adaptive Transformer (arXiv 1910.10073): section 2.2 mixed training and copied states,
          3.1 exits of whole sequences, 3.2 exits of single tokens, appendix: gradient scaling
    papers.md 1.2 training, 1.3 predictors, 1.4 oracles, 1.9 what later work learnt

As in reference.py: float64 numpy, loops, nothing shared with the real code. One row, no batch and no padding.
Exits and blocks are n = 1..N; in an array of T tokens by N exits, exit n of token t is [t][n - 1].
"""

import math

import numpy as np
from reference import sigmoid
from reference_seq2seq import log_softmax

# ---- oracles: which exit a predictor should learn


def best_exit(gain, cost):
    """argmax_n gain^n - cost n; a tie goes to the lowest n."""
    best = 1
    for n in range(2, len(gain) + 1):
        if gain[n - 1] - cost * n > gain[best - 1] - cost * best:
            best = n
    return best


def sequence_oracle(score, cost):
    """DAT 3.1, papers.md 1.4: one exit for all tokens; score (T, N) is LL_t^n or C_t^n, summed over t."""
    N = len(score[0])
    return best_exit([sum(float(row[n - 1]) for row in score) for n in range(1, N + 1)], cost)


def kernel(t, other, sigma):
    """DAT 3.2: kappa(t, t') = exp(-|t - t'|^2 / sigma), both ways; sigma = 0 is the token alone."""
    if sigma == 0:
        return 1.0 if t == other else 0.0
    return math.exp(-(abs(t - other) ** 2) / sigma)


def token_oracle(score, cost, sigma):
    """DAT 3.2, papers.md 1.4: an exit per token, of scores smoothed over its neighbours."""
    T, N = len(score), len(score[0])
    exits = []
    for t in range(T):
        gain = [0.0] * N
        for other in range(T):
            for n in range(1, N + 1):
                gain[n - 1] += kernel(t, other, sigma) * float(score[other][n - 1])
        exits.append(best_exit(gain, cost))
    return exits


# ---- what the predictors say and their losses, summed over tokens, in nats


def distribution_geometric(chi):
    """DAT 3.2: q_t(n) = chi_t^n prod_{m<n} (1 - chi_t^m), and q_t(N) what is left; chi is (T, N - 1)."""
    T, N = len(chi), len(chi[0]) + 1
    q = np.zeros((T, N))
    for t in range(T):
        stayed = 1.0
        for n in range(1, N):
            q[t, n - 1] = chi[t][n - 1] * stayed
            stayed *= 1 - chi[t][n - 1]
        q[t, N - 1] = stayed
    return q


def loss_geometric(chi, exit_at):
    """DAT 3.2, H(q*_t, q_t) with a one-hot q*: -sum_t log q_t(exit_at_t)."""
    q = distribution_geometric(chi)
    return -sum(math.log(q[t, n - 1]) for t, n in zip(range(len(q)), exit_at, strict=True))


def loss_binary(chi, exit_at):
    """papers.md 1.9, independent targets per block: may t leave after n < N, that is, is n >= exit_at_t?"""
    total = 0.0
    for row, target in zip(chi, exit_at, strict=True):
        for n in range(1, len(row) + 1):
            total -= math.log(row[n - 1]) if n >= target else math.log(1 - row[n - 1])
    return total


def loss_multinomial(logits, exit_at):
    """DAT 3.1 (a row per sequence) and 3.2 (a row per token): -sum_t log softmax(logits_t)[exit_at_t]."""
    return -sum(float(log_softmax(row)[n - 1]) for row, n in zip(logits, exit_at, strict=True))


class Predictor:
    """papers.md 1.3: each predictor is one linear layer; a geometric or binary one has a name per block."""

    def __init__(self, weights):
        self.weights = weights

    def linear(self, name, x):
        return self.weights[name + ".weight"] @ x + self.weights[name + ".bias"]

    def chi(self, n, h):
        """DAT 3.2: chi_t^n = sigmoid(w_n . h_t^n + b_n), for blocks n < N."""
        return float(sigmoid(self.linear(f"halting.linear.{n - 1}", h)[0]))

    def exit_of_first(self, h1):
        """DAT 3.2, multinomial: decided by the state after block 1."""
        return 1 + int(np.argmax(self.linear("halting.linear", h1)))

    def exit_of_source(self, states):
        """DAT 3.1: one exit for the whole output, decided by the mean of the encoder's outputs."""
        return 1 + int(np.argmax(self.linear("halting.linear", sum(states) / len(states))))

    def rule(self, kind, threshold=0.5):
        """rule(n, logits, h^n, h^1) for `decode`: does the token leave after block n < N?"""
        if kind == "token":
            return lambda n, logits, h, h1: self.exit_of_first(h1) <= n
        if kind in ("geometric", "binary"):
            return lambda n, logits, h, h1: self.chi(n, h) > threshold
        raise ValueError(f"no rule of single tokens for kind {kind!r}")


# ---- decoding: one token through its blocks, then the next


def walk(reference, ids, leaves, missing):
    """`decode` with a rule leaves(t, n, logits, h^n, h^1) that also knows the token's position."""
    if missing not in ("copy", "compute"):
        raise ValueError(f"unknown way {missing!r} to supply missing states")
    T, L = len(ids), reference.n_layer
    if any(reference.is_routed(n) for n in range(1, L + 1)):
        raise ValueError("routed blocks: not here")
    memory = {n: [] for n in range(1, L + 1)}  # block n: (key, value) of tokens 0, 1, ... as far as known
    states = []  # of each token h^0, h^1, ... as far as known
    ran = np.zeros((T, L), dtype=bool)
    exit_at, out = [], []
    for t in range(T):
        states.append([reference.embed(ids[t])])
        for n in range(1, L + 1):
            # t runs block n. Before it, in order of position, whoever has not come further than h^(n-1):
            # none with "copy"; with "compute" those that left below n and were not needed here until now.
            for j in range(t + 1):
                if len(states[j]) == n:
                    x = states[j][n - 1]
                    memory[n].append(reference.key_value(n, x, j))
                    states[j].append(x + reference.update(n, x, j, memory[n]))
                    ran[j, n - 1] = True
            h, h1 = states[t][n], states[t][1]
            if n == L or (n in reference.exits and leaves(t, n, reference.logits(n, h), h, h1)):
                break
        exit_at.append(n)
        out.append(reference.logits(n, h))
        if missing == "copy":  # DAT 2.2: each higher block applies its own projections to the copied state
            for higher in range(n + 1, L + 1):
                memory[higher].append(reference.key_value(higher, h, t))
                states[t].append(h)
    return np.array(out), np.array(exit_at), ran


def decode(reference, ids, rule, missing):
    """Read ids one by one; rule(n, logits, h^n, h^1) says after block n < L whether this token leaves there.

    missing: what later tokens find above an exit. "copy" (DAT 2.2): keys and values of the copied state.
    "compute" (papers.md 1.9): the true ones, from blocks run when a later token first goes there.
    Gives logits (T, V) at the exits, exit_at (T,) in 1..L, ran (T, L): the blocks run, then or later.
    A Translator must have read its source.
    """
    return walk(reference, ids, lambda t, *seen: rule(*seen), missing)


# ---- training


def mixed_loss(reference, ids, targets, exit_at):
    """DAT 2.2, one draw of mixed training: -sum_t log p(target_t | h_t^(exit_at_t)), frozen above it."""
    logits, found, _ = walk(reference, ids, lambda t, n, *_: n >= exit_at[t], "copy")
    if list(found) != list(exit_at):
        raise ValueError("an exit without classifier")
    return -sum(float(log_softmax(row)[y]) for row, y in zip(logits, targets, strict=True))


def gradient_factors(N, gamma):
    """papers.md 1.2: F[n - 1, k - 1], the factor of exit k's loss in the gradient that arrives at h^n.

    Exit n's own loss arrives as it is; what comes from above is divided by gamma_i = gamma (N - i) at each
    state h^i on its way down, h^n included. Nothing is above N, so gamma_N (0, read as 1) divides nothing.
    """
    factors = np.zeros((N, N))
    for n in range(1, N + 1):
        for k in range(n, N + 1):
            factors[n - 1, k - 1] = 1.0
            for i in range(n, k):
                factors[n - 1, k - 1] /= gamma * (N - i)
    return factors
