"""Learned exits once more, one token at a time, to check the fast code against.

    DAT = Depth-Adaptive Transformer (arXiv 1910.10073): section 2.2 mixed training and copied states,
          3.1 exits of whole sequences, 3.2 exits of single tokens, appendix: gradient scaling

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
    """DAT 3.1: one exit for all tokens; score (T, N) is LL_t^n or C_t^n, summed over t."""
    return best_exit([sum(float(row[n]) for row in score) for n in range(len(score[0]))], cost)


def kernel(t, other, sigma):
    """DAT 3.2: kappa(t, t') = exp(-|t - t'|^2 / sigma), both ways; sigma = 0 is the token alone."""
    if sigma == 0:
        return 1.0 if t == other else 0.0
    return math.exp(-(abs(t - other) ** 2) / sigma)


def token_oracle(score, cost, sigma):
    """DAT 3.2: an exit per token, of scores smoothed over its neighbours."""
    T, N = len(score), len(score[0])
    exits = []
    for t in range(T):
        gain = [0.0] * N
        for other in range(T):
            for n in range(1, N + 1):
                gain[n - 1] += kernel(t, other, sigma) * float(score[other][n - 1])
        exits.append(best_exit(gain, cost))
    return exits


# ---- the predictors' losses, summed over tokens, in nats; chi is (T, N - 1)


def distribution_geometric(chi):
    """DAT 3.2: q_t(n) = chi_t^n prod_{m<n} (1 - chi_t^m), and q_t(N) what is left."""
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
    return -sum(math.log(q[n - 1]) for q, n in zip(distribution_geometric(chi), exit_at, strict=True))


def loss_binary(chi, exit_at):
    """Independent targets per block: may t exit after n < N, that is, is n >= exit_at_t?"""
    total = 0.0
    for row, target in zip(chi, exit_at, strict=True):
        for n in range(1, len(row) + 1):
            total -= math.log(row[n - 1]) if n >= target else math.log(1 - row[n - 1])
    return total


def loss_multinomial(logits, exit_at):
    """DAT 3.1 (a row per sequence) and 3.2 (a row per token): -sum_t log softmax(logits_t)[exit_at_t]."""
    return -sum(float(log_softmax(row)[n - 1]) for row, n in zip(logits, exit_at, strict=True))


class Predictor:
    """DAT 3: each predictor is one linear layer; a geometric or binary one has a name per block."""

    def __init__(self, weights):
        self.weights = weights

    def linear(self, x, name="exit_predictor.linear"):
        return self.weights[name + ".weight"] @ x + self.weights[name + ".bias"]

    def chi(self, n, h):
        """DAT 3.2: chi_t^n = sigmoid(w_n . h_t^n + b_n), for blocks n < N."""
        return float(sigmoid(self.linear(h, f"exit_predictor.linear.{n - 1}")[0]))

    def rule(self, kind, source=None, threshold=0.5):
        """A rule for `decode`: does the token exit after block n < N? source: encoder outputs,
        whose mean decides one exit for the whole text [DAT 3.1]; h^1 decides for kind "token"."""
        if kind == "sequence":
            exit_at = 1 + int(np.argmax(self.linear(sum(source) / len(source))))
            return lambda n, *_: exit_at <= n
        if kind == "token":
            return lambda n, logits, h, h1, t: 1 + int(np.argmax(self.linear(h1))) <= n
        return lambda n, logits, h, h1, t: self.chi(n, h) > threshold


# ---- decoding: one token through its blocks, then the next


def decode(reference, ids, rule, exited_kv="copy"):
    """Read ids one by one; rule(n, logits, h^n, h^1, t) says after block n < L whether token t exits there.

    exited_kv: what later tokens see above an exit. "copy" (DAT 2.2): keys and values of the copied state.
    "compute": the true ones, from blocks run when a later token first goes that deep.
    Gives logits (T, V) at the exits, exit_at (T,) in 1..L, ran (T, L): the blocks run, then or later.
    A Translator must have read its source.
    """
    T, L = len(ids), reference.n_layer
    if exited_kv not in ("copy", "compute") or any(reference.is_routed(n) for n in range(1, L + 1)):
        raise ValueError(f"{exited_kv!r} or routed blocks: not here")
    memory = {n: [] for n in range(1, L + 1)}  # block n: (key, value) of tokens 0, 1, ... as far as known
    states = []  # of each token h^0, h^1, ... as far as known
    ran = np.zeros((T, L), dtype=bool)
    exit_at, out = [], []
    for t in range(T):
        states.append([reference.embed(ids[t])])
        for n in range(1, L + 1):
            # t runs block n. Before it, in order of position, run the tokens that have not come further than
            # h^(n-1): none with "copy"; with "compute" those that exited below n and were not needed so far.
            for j in range(t + 1):
                if len(states[j]) == n:
                    x = states[j][n - 1]
                    memory[n].append(reference.key_value(n, x, j))
                    states[j].append(x + reference.update(n, x, j, memory[n]))
                    ran[j, n - 1] = True
            h, h1 = states[t][n], states[t][1]
            if n == L or (n in reference.exits and rule(n, reference.logits(n, h), h, h1, t)):
                break
        exit_at.append(n)
        out.append(reference.logits(n, h))
        if exited_kv == "copy":  # DAT 2.2: each higher block applies its own projections to the copied state
            for higher in range(n + 1, L + 1):
                memory[higher].append(reference.key_value(higher, h, t))
                states[t].append(h)
    return np.array(out), np.array(exit_at), ran


# ---- training


def mixed_loss(reference, ids, targets, exit_at):
    """DAT 2.2, one draw of mixed training: -sum_t log p(target_t | h_t^(exit_at_t)), frozen above it."""
    logits, taken, _ = decode(reference, ids, lambda n, logits, h, h1, t: n >= exit_at[t])
    if list(taken) != list(exit_at):
        raise ValueError("an exit without classifier")
    return -sum(float(log_softmax(row)[y]) for row, y in zip(logits, targets, strict=True))


def gradient_factors(N, gamma):
    """F[n - 1, k - 1], the factor of exit k's loss in the gradient that arrives at h^n [DAT appendix].

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
