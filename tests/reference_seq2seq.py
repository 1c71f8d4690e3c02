"""The translator of DAT once more, one token at a time, to check the fast code against.

    DAT = Depth-Adaptive Transformer (arXiv 1910.10073): section 2.1 the decoder and its exits, 2.2 copied
          states, 3.2 exit rules, appendix B costs; 4 beam search

As in reference.py: float64 numpy, loops, nothing shared with the real code. The target side is `Reference`
with one more step in every block; the encoder's weights are those of a `Reference` too, named `encoder.`.
"""

import math

import numpy as np
from reference import Reference, gelu


def log_softmax(x):
    x = x - np.max(x)
    return x - math.log(sum(math.exp(v) for v in x))


class Translator(Reference):
    def __init__(self, weights, n_layer, n_head, enc_layer, enc_head, capacity=0.125, gate="raw"):
        super().__init__(weights, n_layer, n_head, capacity, gate)
        own = {k.removeprefix("encoder."): w for k, w in weights.items() if k.startswith("encoder.")}
        self.encoder = Reference(own, enc_layer, enc_head)
        self.source = {}  # block n: the (key, value) pairs of all source tokens

    # ---- the source

    def encode(self, source_ids):
        """DAT 2.1: the encoder runs whole; every source token attends to all of them, later ones too."""
        encoder = self.encoder
        states = [encoder.embed(token) for token in source_ids]
        for n in range(1, encoder.n_layer + 1):
            memory = [encoder.key_value(n, x, i) for i, x in enumerate(states)]
            states = [x + encoder.update(n, x, i, memory) for i, x in enumerate(states)]
        return [encoder.norm("norm", x) for x in states]

    def read(self, source_ids):
        """What each decoder block sees of the source: its own projections of one encoding, not rotated."""
        encoded = self.encode(source_ids)
        for n in range(1, self.n_layer + 1):
            self.source[n] = []
            for s in encoded:
                both = self.linear(self.name(n) + ".cross.key_value", s)
                self.source[n].append((both[: len(both) // 2], both[len(both) // 2 :]))

    # ---- a block, for one target token x of shape (C,)

    def update(self, n, x, position, memory):
        """f(x) = a + c + m: a = Attn(LN1(x)), c = Cross(LNc(x + a), source), m = MLP(LN2(x + a + c))."""
        name = self.name(n)
        query = self.rotate(self.linear(name + ".attn.qkv", self.norm(name + ".ln1", x))[: len(x)], position)
        a = self.linear(name + ".attn.proj", self.attend(query, memory))
        query = self.linear(name + ".cross.query", self.norm(name + ".ln_cross", x + a))
        c = self.linear(name + ".cross.proj", self.attend(query, self.source[n]))
        hidden = gelu(self.linear(name + ".mlp.fc", self.norm(name + ".ln2", x + a + c)))
        m = self.linear(name + ".mlp.proj", hidden)
        return a + c + m

    # ---- training and decoding: as without a source, `update` above being the difference

    def forward_top_k(self, ids, source_ids):
        """States h^0..h^L, each (T, C); visited, scores, guesses (T, L), with nan for dense blocks."""
        self.read(source_ids)
        return super().forward_top_k(ids)

    def decode(self, ids, rule, source_ids):
        """Logits (T, V) at the exits, exit_at (T,), visited (T, L), cached entries of self-attention (L,).

        DAT 2.2: a copied state fills self-attention above its exit; the source's keys and values are whole.
        """
        self.read(source_ids)
        return super().decode(ids, rule)


# ---- translating: every new token reads the source and all written tokens again


def next_log_probabilities(translator, source_ids, rule, end, written):
    """log p(v | written, source) for all v; the first token read is `end`."""
    return log_softmax(translator.decode([end, *written], rule, source_ids)[0][-1])


def greedy(translator, source_ids, rule, end, longest):
    """The likeliest token each time, up to and with `end` or to `longest` tokens."""
    written = []
    while len(written) < longest and end not in written:
        logp = next_log_probabilities(translator, source_ids, rule, end, written)
        written.append(int(np.argmax(logp)))
    return written


def beam(translator, source_ids, rule, end, longest, width, penalty, read=None):
    """DAT 4 (beam 4 or 5): [(score, written)], best first; score = log p / length^penalty. read: a list to
    which every text that was read is added, once for its last token."""
    live, finished, read = [(0.0, ())], [], [] if read is None else read
    for step in range(1, longest + 1):
        candidates = []
        for total, written in live:
            read.append([end, *written])
            logp = next_log_probabilities(translator, source_ids, rule, end, written)
            for token in range(len(logp)):
                candidates.append((total + float(logp[token]), (*written, token)))
        candidates.sort(key=lambda c: -c[0])
        live = []
        for rank, (total, written) in enumerate(candidates[: 2 * width]):
            if written[-1] == end or step == longest:
                if rank < width:  # one that ends further down is dropped
                    finished.append((total / len(written) ** penalty, written))
            elif len(live) < width:
                live.append((total, written))
        if len(finished) >= width:
            break
    return sorted(finished, key=lambda f: -f[0])[:width]


def best_of_all(translator, source_ids, rule, end, longest, penalty, total=0.0, written=()):
    """(score, tokens) of the best of all outputs that go on from `written`, whose log p is `total`."""
    best = (-math.inf, ())
    logp = next_log_probabilities(translator, source_ids, rule, end, written)
    for token in range(len(logp)):
        longer, sum_of_both = (*written, token), total + float(logp[token])
        if token == end or len(longer) == longest:
            found = (sum_of_both / len(longer) ** penalty, longer)
        else:
            found = best_of_all(translator, source_ids, rule, end, longest, penalty, sum_of_both, longer)
        if found[0] > best[0]:
            best = found
    return best


# ---- costs


def copies(visited, dense):
    """DAT, appendix B: (T, L), where a copy's key and value are used, by a later token that goes deep.

    dense[n] says for each block whether it is dense; n counts from 0 here and in `flops`, as columns do.
    """
    T, L = len(visited), len(dense)
    filled = np.zeros((T, L), dtype=bool)
    for j in range(T):
        for n in range(L):
            for t in range(j + 1, T):
                if dense[n] and not visited[j][n] and visited[t][n]:
                    filled[j, n] = True
    return filled


def flops(visited, exit_at, C, inner, V, S, Ce, dense, confident, needed):
    """DAT appendix B: FLOPs of the decoder for one output, 2 per multiply-add; S = 0: no source at all.

    needed: charge only the copies that are used, else all. confident: DAT 3.2's threshold, which reads a
    classifier at every block up to the exit; the other rules' own small costs are not counted.
    """
    if not all(dense):
        raise ValueError("routed blocks attend to fewer than t tokens: not counted here")
    filled, called, total = copies(visited, dense), set(), 0
    for t in range(1, len(visited) + 1):
        for n in range(len(dense)):
            if visited[t - 1][n]:
                total += 8 * C * C + 4 * inner * C + 4 * t * C  # self-attention and MLP
                if S > 0:
                    total += 4 * C * C + 4 * S * C  # cross-attention: its query and output, its sums
                    if n not in called:
                        total += 4 * S * C * Ce  # its keys and values, once for this source
                called.add(n)
            elif not needed or filled[t - 1, n]:
                total += 4 * C * C
        total += 2 * V * C * (int(exit_at[t - 1]) if confident else 1)
    return total
