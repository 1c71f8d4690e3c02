"""Learned exits once more, in loops over tokens, to check the fast code against.

    DAT = Depth-Adaptive Transformer (arXiv 1910.10073): section 3.1 exits of whole sequences, 3.2 exits of
          single tokens, appendix: gradient scaling

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
    return max(range(1, len(gain) + 1), key=lambda n: (gain[n - 1] - cost * n, -n))


def kernel(t, other, sigma):
    """DAT 3.2: kappa(t, t') = exp(-|t - t'|^2 / sigma), both ways; sigma = 0 is the token alone, infinity
    the whole sequence [DAT 3.1]."""
    if sigma == 0:
        return 1.0 if t == other else 0.0
    return math.exp(-(abs(t - other) ** 2) / sigma)


def oracle(score, cost, sigma):
    """DAT 3: an exit per token, of scores (T, N), LL_t^n or C_t^n, smoothed over its neighbours."""
    T, N = len(score), len(score[0])
    exits = []
    for t in range(T):
        gain = [sum(kernel(t, other, sigma) * float(score[other][n]) for other in range(T)) for n in range(N)]
        exits.append(best_exit(gain, cost))
    return exits


# ---- predictors and their losses, summed over tokens, in nats


def loss_multinomial(logits, exit_at):
    """DAT 3.1 (a row per sequence) and 3.2 (a row per token): -sum_t log softmax(logits_t)[exit_at_t]."""
    return -sum(float(log_softmax(row)[n - 1]) for row, n in zip(logits, exit_at, strict=True))


def loss_of_decisions(chi, exit_at, kind):
    """-log p of the right decisions, to stay below the oracle's exit and to leave at it; chi is (T, N - 1).

    geometric, DAT 3.2: -sum_t log q_t(exit_at_t), q_t(n) = chi_t^n prod_{m<n} (1 - chi_t^m), so no decision
    after the exit counts. binary: one after every block n < N counts, and those above the exit leave too.
    """
    total = 0.0
    for row, target in zip(chi, exit_at, strict=True):
        for n in range(1, len(row) + 1):
            if n < target:
                total -= math.log(1 - row[n - 1])
            elif n == target or kind == "binary":
                total -= math.log(row[n - 1])
    return total


class Predictor:
    """DAT 3: each predictor is one linear layer; a geometric or binary one has a name per block. model: the
    `Reference` that has it; of sequence, the mean of its encoder outputs decides for the whole text."""

    def __init__(self, model, kind):
        self.model, self.kind = model, kind

    def linear(self, x, name="exit_predictor.linear"):
        return self.model.linear(name, x)

    def of_source(self):
        return self.linear(sum(self.model.encoded) / len(self.model.encoded))

    def chi(self, n, h):
        """DAT 3.2: chi_t^n = sigmoid(w_n . h_t^n + b_n), for blocks n < N."""
        return float(sigmoid(self.linear(h, f"exit_predictor.linear.{n - 1}")[0]))

    def loss(self, states, exit_at):
        """states h^0..h^N, each (T, C)."""
        if self.kind == "sequence":
            return loss_multinomial([self.of_source()], exit_at[:1])
        if self.kind == "token":
            return loss_multinomial([self.linear(h) for h in states[1]], exit_at)
        chi = [[self.chi(n, states[n][t]) for n in range(1, len(states) - 1)] for t in range(len(exit_at))]
        return loss_of_decisions(chi, exit_at, self.kind)

    def rule(self, threshold):
        """A rule for `Reference.decode`, asked after block n = 1, 2, ... of a token: does it exit there?"""
        if self.kind not in ("sequence", "token"):
            return lambda n, logits, h: self.chi(n, h) > threshold
        exit_at = 1 + int(np.argmax(self.of_source())) if self.kind == "sequence" else 0

        def decided_once(n, logits, h):
            nonlocal exit_at
            if self.kind == "token" and n == 1:
                exit_at = 1 + int(np.argmax(self.linear(h)))
            return exit_at <= n
        return decided_once


# ---- training


def gradient_factors(N, gamma):
    """F[n - 1, k - 1], the factor of exit k's loss in the gradient that arrives at h^n [DAT appendix].

    Exit n's own loss arrives as it is; what comes from above is divided by gamma_i = gamma (N - i) at each
    state h^i on its way down, h^n included. Nothing is above N, so gamma_N (0, read as 1) divides nothing.
    """
    factors = np.zeros((N, N))
    for n in range(1, N + 1):
        for k in range(n, N + 1):
            factors[n - 1, k - 1] = math.prod(1 / (gamma * (N - i)) for i in range(n, k))
    return factors
