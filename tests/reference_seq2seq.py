"""The translator of DAT once more, one token at a time, to check the fast code against.

    DAT = Depth-Adaptive Transformer (arXiv 1910.10073): section 2.1 the decoder and its exits, 2.2 copied
          states, 3.2 exit rules, appendix B costs; 4 beam search

As in reference.py: float64 numpy, loops, nothing shared with the real code. The target side is `Reference`
with one more step in every block; the encoder's weights are those of a `Reference` too, named `encoder.`.
"""
import math

import numpy as np
from reference import Reference


def log_softmax(x):
    x = x - np.max(x)
    return x - math.log(sum(math.exp(v) for v in x))


class Translator(Reference):
    """Of one source: its encoding is read once, when this is made."""

    def __init__(self, weights, source_ids, enc_layer, enc_head, *decoder):
        super().__init__(weights, *decoder)
        own = {k.removeprefix("encoder."): w for k, w in weights.items() if k.startswith("encoder.")}
        self.encoded = self.encode(Reference(own, enc_layer, enc_head), source_ids)
        self.source = {}  # block n: the (key, value) pairs of all source tokens, not rotated
        for n in range(1, self.n_layer + 1):
            both = [self.linear(self.name(n) + ".cross.key_value", s) for s in self.encoded]
            self.source[n] = [np.split(kv, 2) for kv in both]

    def encode(self, encoder, source_ids):
        """DAT 2.1: the encoder runs whole; every source token attends to all of them, later ones too."""
        states = [encoder.embed(token) for token in source_ids]
        for n in range(1, encoder.n_layer + 1):
            memory = [encoder.key_value(n, x, i) for i, x in enumerate(states)]
            states = [x + encoder.update(n, x, i, memory) for i, x in enumerate(states)]
        return [encoder.norm("norm", x) for x in states]

    def cross(self, n, x):
        """c = Cross(LNc(x + a), source) of one target token, for x + a."""
        name = self.name(n)
        query = self.linear(name + ".cross.query", self.norm(name + ".ln_cross", x))
        return self.linear(name + ".cross.proj", self.attend(query, self.source[n]))


# ---- translating: every new token reads the source and all written tokens again


def beam(translator, rule, eos_id, longest, width, length_penalty):
    """DAT 4 (beam 4 or 5): (log p / length^length_penalty, written) of the best; eos_id is read first."""
    live, finished = [(0.0, ())], []
    for step in range(1, longest + 1):
        candidates = []
        for total, written in live:
            logp = log_softmax(translator.decode([eos_id, *written], rule)[0][-1])
            for token in range(len(logp)):
                candidates.append((total + float(logp[token]), (*written, token)))
        candidates.sort(key=lambda c: -c[0])
        live = []
        for rank, (total, written) in enumerate(candidates[: 2 * width]):
            if written[-1] == eos_id or step == longest:
                if rank < width:  # one that ends further down is dropped
                    finished.append((total / len(written) ** length_penalty, written))
            elif len(live) < width:
                live.append((total, written))
        if len(finished) >= width:
            break
    return max(finished, key=lambda f: f[0])


# ---- costs of dense decoders; n counts from 0 here, as columns do


def copies(visited):
    """DAT, appendix B: (T, L), where a copy's key and value are used, by a later token that comes so deep."""
    T, L = len(visited), len(visited[0])
    filled = np.zeros((T, L), dtype=bool)
    for j in range(T):
        for n in range(L):
            filled[j, n] = not visited[j][n] and any(visited[t][n] for t in range(j + 1, T))
    return filled


def flops(visited, classified, C, d_ff, V, S, Ce, needed):
    """DAT appendix B: FLOPs of the decoder for one output, 2 per multiply-add; S = 0: no source at all.

    needed: charge only the copies that are used, else all. classified (T,): classifiers evaluated, by the
    threshold of DAT 3.2 one at every block up to the exit; other rules' own small costs are not counted.
    """
    filled, called, total = copies(visited), set(), 0
    for t in range(1, len(visited) + 1):
        for n in range(len(visited[0])):
            if visited[t - 1][n]:
                total += 8 * C * C + 4 * d_ff * C + 4 * t * C  # self-attention and MLP
                if S > 0:
                    total += 4 * C * C + 4 * S * C  # cross-attention: its query and output, its sums
                    if n not in called:
                        total += 4 * S * C * Ce  # its keys and values, once for this source
                called.add(n)
            elif not needed or filled[t - 1, n]:
                total += 4 * C * C
        total += 2 * V * C * int(classified[t - 1])
    return total
