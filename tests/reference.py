"""The two papers once more, one token at a time, to check the fast code against.

    DAT = Depth-Adaptive Transformer (arXiv 1910.10073): 2.1 exits, 2.2 losses and copied states, 3.2 rules
    MoD = Mixture-of-Depths (arXiv 2404.02258): 3.4 routing (equation 1), 3.5 sampling

Nothing is shared with the real code: float64 numpy, a vector per token, Python loops over blocks, tokens and
heads. Weights come as {name: array} in torch's layout, y = W x + b. Blocks are called n = 1..L as in DAT; the
names of their weights count from 0, so block n is `blocks.{n - 1}`.
"""
import math

import numpy as np


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def gelu(x):
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bce(logits, selected):
    """Summed binary cross-entropy (MoD 3.5): -log sigmoid(g) if selected, else -log(1 - sigmoid(g))."""
    return sum(-math.log(sigmoid(g) if y else 1 - sigmoid(g)) for g, y in zip(logits, selected, strict=True))


class Reference:
    def __init__(self, weights, n_layer, n_head, capacity=0.125, gate="raw"):
        self.weights, self.n_layer, self.n_head = weights, n_layer, n_head
        self.capacity, self.gate = capacity, gate
        self.exits = [n for n in range(1, n_layer + 1) if f"classifiers.norms.{n}.weight" in weights]

    # ---- parts of a block, each for one token x of shape (C,)

    def linear(self, name, x):
        return self.weights[name + ".weight"] @ x + self.weights[name + ".bias"]

    def norm(self, name, x):
        centred = x - sum(x) / len(x)
        deviation = math.sqrt(sum(centred**2) / len(x) + 1e-5)
        return centred / deviation * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def is_routed(self, n):
        return f"blocks.{n - 1}.router.weight" in self.weights

    def name(self, n):
        return f"blocks.{n - 1}.block" if self.is_routed(n) else f"blocks.{n - 1}"

    def embed(self, token):
        return self.weights["wte.weight"][token]

    def rotate(self, x, position):
        """RoPE: in each head, channels 2i and 2i + 1 are turned by position / 10000^(2i / head size)."""
        size = len(x) // self.n_head
        angle = position / 10000 ** (np.arange(0, len(x), 2) % size / size)
        turned = (x[::2] + 1j * x[1::2]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], 1).ravel()

    def key_value(self, n, x, position):
        """What block n remembers of a token whose state below the block is x."""
        name = self.name(n)
        _, key, value = np.split(self.linear(name + ".attn.qkv", self.norm(name + ".ln1", x)), 3)
        return self.rotate(key, position), value

    def attend(self, query, memory):
        """softmax(q k / sqrt(head size)) v in each head; memory: the (key, value) pairs that are seen."""
        size, heads = len(query) // self.n_head, []
        for start in range(0, len(query), size):
            s = slice(start, start + size)
            p = softmax([query[s] @ key[s] / math.sqrt(size) for key, _ in memory])
            heads.extend(p @ [value[s] for _, value in memory])
        return np.array(heads)

    def update(self, n, x, position, memory):
        """f(x) = a + m of block n, a = Attn(LN1(x)) plus a translator's c, m = MLP(LN2(x + a))."""
        name = self.name(n)
        query = self.rotate(self.linear(name + ".attn.qkv", self.norm(name + ".ln1", x))[: len(x)], position)
        a = self.linear(name + ".attn.proj", self.attend(query, memory))
        a = a + self.cross(n, x + a)
        hidden = gelu(self.linear(name + ".mlp.fc", self.norm(name + ".ln2", x + a)))
        return a + self.linear(name + ".mlp.proj", hidden)

    def cross(self, n, x):
        """Nothing: there is no source."""
        return 0

    def router_weight(self, n, x):
        """MoD 3.4: the router's r = w . x."""
        return float(self.weights[f"blocks.{n - 1}.router.weight"][0] @ x)

    def causal_logit(self, n, x):
        """MoD 3.5: the logit that routes when decoding, W2 silu(W1 x + b1) + b2, or r without predictor."""
        name = f"blocks.{n - 1}.predictor"
        if name + ".0.weight" not in self.weights:
            return self.router_weight(n, x)
        hidden = self.linear(name + ".0", x)
        return float(self.linear(name + ".2", hidden * sigmoid(hidden))[0])

    def run(self, n, x, position, memory):
        """Block n of one token, whose key and value are added to `memory` -> its next state."""
        memory.append(self.key_value(n, x, position))
        f = self.update(n, x, position, memory)
        if not self.is_routed(n):
            return x + f
        r = self.router_weight(n, x)  # MoD 3.4, equation 1: x + gate(r) f(x)
        return x + (r if self.gate == "raw" else sigmoid(r)) * f

    def logits(self, n, x):
        """DAT 2.1: exit n, W_n LN_n(h^n)."""
        kind = "tied" if "classifiers.weights.tied" in self.weights else n
        return self.weights[f"classifiers.weights.{kind}"] @ self.norm(f"classifiers.norms.{n}", x)

    # ---- training: all tokens of one sequence, block after block

    def top_k(self, r):
        """MoD 3.4: places of the k largest router weights of this sequence (a tie to the earlier token)."""
        k = max(1, round(self.capacity * len(r)))
        return sorted(range(len(r)), key=lambda t: (-r[t], t))[:k]

    def forward(self, ids, select=None):
        """Training under a rule, select(r of T tokens) -> the places of those that run, or top-k. Gives
        h^0..h^L, each (T, C); visited, r, causal logits (T, L), nan in dense blocks."""
        T, L = len(ids), self.n_layer
        visited = np.zeros((T, L), dtype=bool)
        r, logits = np.full((2, T, L), np.nan)
        states = [np.array([self.embed(token) for token in ids])]
        for n in range(1, L + 1):
            x, chosen = states[-1], range(T)
            if self.is_routed(n):
                for t in range(T):
                    r[t, n - 1] = self.router_weight(n, x[t])
                    logits[t, n - 1] = self.causal_logit(n, x[t])
                chosen = sorted((select or self.top_k)(r[:, n - 1]))  # back in order of time
            out, memory = x.copy(), []  # MoD 3.4: a token that is not selected keeps x
            for t in chosen:
                visited[t, n - 1] = True
                out[t] = self.run(n, x[t], t, memory)
            states.append(out)
        return states, visited, r, logits

    def losses(self, ids, targets, select=None):
        """DAT 2.2: {n: -LL^n} in nats, LL^n = sum_t log p(target_t | h_t^n), no token exiting early."""
        states = self.forward(ids, select)[0]
        nll = dict.fromkeys(self.exits, 0.0)
        for n in self.exits:
            for x, target in zip(states[n], targets, strict=True):
                nll[n] -= math.log(softmax(self.logits(n, x))[target])
        return nll

    # ---- decoding: one token through all its blocks, then the next

    def is_skipped(self, n, h):
        """MoD 3.5: the predictor decides alone, on this token alone; no capacity and no top-k here."""
        return self.is_routed(n) and self.causal_logit(n, h) <= 0

    def decode(self, ids, rule, exited_kv="copy"):
        """Read ids one by one; rule(n, logits, h^n) says after block n < L whether this token exits there.

        exited_kv: in the blocks above, "copy": keys and values of the copied state; "compute": the token runs
        these blocks after all, so that its keys and values are the true ones.
        Gives logits (T, V) at the exits, exit_at (T,) in 1..L, visited (T, L), cached entries per block."""
        T, L, exit_at, out = len(ids), self.n_layer, [], []
        caches = {n: [] for n in range(1, L + 1)}
        visited = np.zeros((T, L), dtype=bool)
        for t in range(T):
            h = self.embed(ids[t])
            for n in range(1, L + 1):
                visited[t, n - 1] = not self.is_skipped(n, h)
                if visited[t, n - 1]:
                    h = self.run(n, h, t, caches[n])
                # DAT 3.2: exit at the first n that the rule accepts, else at L
                if n == L or (n in self.exits and rule(n, self.logits(n, h), h)):
                    break
            exit_at.append(n)
            out.append(self.logits(n, h))
            for higher in range(n + 1, L + 1):
                if exited_kv == "compute" and not self.is_skipped(higher, h):
                    h = self.run(higher, h, t, caches[higher])
                # DAT 2: the state is copied upward; each higher block applies its own projections to it.
                # A routed block keeps nothing of this token (our reading: DAT has none).
                if exited_kv == "copy" and not self.is_routed(higher):
                    caches[higher].append(self.key_value(higher, h, t))
        return np.array(out), np.array(exit_at), visited, [len(cache) for cache in caches.values()]
