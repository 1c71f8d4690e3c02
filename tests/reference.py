"""The two papers once more, one token at a time, to check the fast code against.

    DAT = Depth-Adaptive Transformer (arXiv 1910.10073): section 2.1 exits, 2.2 losses and copied states,
          3.2 exit rules of single tokens
    MoD = Mixture-of-Depths (arXiv 2404.02258): section 3.4 routing (equation 1), 3.5 sampling

Nothing here is fast and nothing is shared with the real code: float64 numpy, a vector per token, Python
loops over blocks, tokens and heads. Weights come as {name: array} in torch's layout, y = W x + b.
Blocks are called n = 1..L as in DAT; the names of their weights count from 0, so block n is `blocks.{n - 1}`.
"""

import math

import numpy as np


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def layer_norm(x, weight, bias, eps=1e-5):
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / math.sqrt(variance + eps) * weight + bias


def gelu(x):
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def bce(logits, selected):
    """Summed binary cross-entropy (MoD 3.5).

    log sigmoid(g) = -log(e^0 + e^-g) and log(1 - sigmoid(g)) = -log(e^0 + e^g).
    """
    total = 0.0
    for g, y in zip(logits, selected, strict=True):
        total += np.logaddexp(0, -g) if y else np.logaddexp(0, g)
    return float(total)


class Reference:
    def __init__(self, weights, n_layer, n_head, capacity=0.125, gate="raw"):
        if gate not in ("raw", "sigmoid"):
            raise ValueError(f"unknown gate {gate!r}")
        self.weights, self.n_layer, self.n_head = weights, n_layer, n_head
        self.capacity, self.gate = capacity, gate
        self.exits = [n for n in range(1, n_layer + 1) if f"classifiers.norms.{n}.weight" in weights]

    # ---- parts of a block, each for one token x of shape (C,)

    def linear(self, name, x):
        return self.weights[name + ".weight"] @ x + self.weights[name + ".bias"]

    def norm(self, name, x):
        return layer_norm(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def is_routed(self, n):
        return f"blocks.{n - 1}.router.weight" in self.weights

    def name(self, n):
        return f"blocks.{n - 1}.block" if self.is_routed(n) else f"blocks.{n - 1}"

    def embed(self, token):
        return self.weights["wte.weight"][token]

    def rotate(self, x, position):
        """RoPE: in each head, channels 2i and 2i + 1 are turned by position / 10000^(2i / head size)."""
        out, size = x.copy(), len(x) // self.n_head
        for start in range(0, len(x), size):
            for i in range(0, size, 2):
                angle, a, b = position / 10000 ** (i / size), x[start + i], x[start + i + 1]
                out[start + i] = a * math.cos(angle) - b * math.sin(angle)
                out[start + i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    def key_value(self, n, x, position):
        """What block n remembers of a token whose state below the block is x."""
        three = self.linear(self.name(n) + ".attn.qkv", self.norm(self.name(n) + ".ln1", x))
        _, key, value = np.split(three, 3)
        return self.rotate(key, position), value

    def attend(self, query, memory):
        """softmax(q k / sqrt(head size)) v in each head; memory: the (key, value) pairs that are seen."""
        size = len(query) // self.n_head
        heads = np.zeros(len(query))
        for head in range(self.n_head):
            s = slice(head * size, (head + 1) * size)
            p = softmax([query[s] @ key[s] / math.sqrt(size) for key, _ in memory])
            for j, (_, value) in enumerate(memory):
                heads[s] += p[j] * value[s]
        return heads

    def update(self, n, x, position, memory):
        """f(x) = a + m of block n, a = Attn(LN1(x)), m = MLP(LN2(x + a)); memory: the (key, value) pairs."""
        name = self.name(n)
        query = self.rotate(self.linear(name + ".attn.qkv", self.norm(name + ".ln1", x))[: len(x)], position)
        a = self.linear(name + ".attn.proj", self.attend(query, memory))
        hidden = gelu(self.linear(name + ".mlp.fc", self.norm(name + ".ln2", x + a)))
        m = self.linear(name + ".mlp.proj", hidden)
        return a + m

    def router_weight(self, n, x):
        """MoD 3.4: the router's r = w . x."""
        return float(self.weights[f"blocks.{n - 1}.router.weight"][0] @ x)

    def causal_logit(self, n, x):
        """MoD 3.5: the logit that routes when decoding, W2 silu(W1 x + b1) + b2, or r without predictor."""
        name = f"blocks.{n - 1}.predictor"
        if name + ".0.weight" not in self.weights:
            return self.router_weight(n, x)
        return float(self.linear(name + ".2", silu(self.linear(name + ".0", x)))[0])

    def gate_of(self, r):
        return r if self.gate == "raw" else sigmoid(r)

    def logits(self, n, x):
        """DAT 2.1: exit n, W_n LN_n(h^n)."""
        name = "classifiers.weights.tied"
        if name not in self.weights:
            name = f"classifiers.weights.{n}"
        return self.weights[name] @ self.norm(f"classifiers.norms.{n}", x)

    # ---- training: all tokens of one sequence, block after block

    def top_k(self, r):
        """MoD 3.4: places of the k largest router weights of this sequence (a tie to the earlier token)."""
        k = max(1, round(self.capacity * len(r)))
        return sorted(range(len(r)), key=lambda t: (-r[t], t))[:k]

    def forward_top_k(self, ids):
        return self.forward(ids, self.top_k)

    def forward(self, ids, select):
        """Training under a routing rule, select(r of T tokens) -> the places of those that run.

        States h^0..h^L, each (T, C); visited, r, causal logits (T, L), with nan for dense blocks.
        """
        T, L = len(ids), self.n_layer
        visited = np.zeros((T, L), dtype=bool)
        r, logits = np.full((T, L), np.nan), np.full((T, L), np.nan)
        states = [np.array([self.embed(ids[t]) for t in range(T)])]
        for n in range(1, L + 1):
            x = states[-1]
            chosen = list(range(T))
            if self.is_routed(n):
                for t in range(T):
                    r[t, n - 1] = self.router_weight(n, x[t])
                    logits[t, n - 1] = self.causal_logit(n, x[t])
                chosen = sorted(select(r[:, n - 1]))  # back in order of time
            memory = {t: self.key_value(n, x[t], t) for t in chosen}
            out = x.copy()  # MoD 3.4: a token that is not selected keeps x
            for t in chosen:
                visited[t, n - 1] = True
                f = self.update(n, x[t], t, [memory[j] for j in chosen if j <= t])
                # MoD 3.4, equation 1: x + gate(r) f(x); a dense block is x + f(x)
                out[t] = x[t] + (self.gate_of(r[t, n - 1]) * f if self.is_routed(n) else f)
            states.append(out)
        return states, visited, r, logits

    def losses(self, ids, targets, select=None):
        """DAT 2.2: {n: -LL^n} in nats, LL^n = sum_t log p(target_t | h_t^n), no token exiting early."""
        states = self.forward(ids, select or self.top_k)[0]
        nll = {}
        for n in self.exits:
            nll[n] = 0.0
            for x, target in zip(states[n], targets, strict=True):
                nll[n] -= math.log(softmax(self.logits(n, x))[target])
        return nll

    # ---- decoding: one token through all its blocks, then the next

    def run(self, n, h, position, memory):
        """Block n of one token, its key and value added to `memory` -> h^n, or None if it is skipped."""
        # MoD 3.5: the predictor decides alone, on this token alone; no capacity and no top-k here
        if self.is_routed(n) and self.causal_logit(n, h) <= 0:
            return None
        memory.append(self.key_value(n, h, position))
        f = self.update(n, h, position, memory)
        # MoD 3.5: the predictor only opens the way, the factor is still the router's
        return h + (self.gate_of(self.router_weight(n, h)) * f if self.is_routed(n) else f)

    def decode(self, ids, rule, exited_kv="copy"):
        """Read ids one by one; rule(n, logits, h^n) says after block n < L whether this token exits there.

        exited_kv: in the blocks above, "copy": keys and values of the copied state; "compute": the token runs
        these blocks after all, so that its keys and values are the true ones.
        Gives logits (T, V) at the exits, exit_at (T,) in 1..L, visited (T, L), cached entries per block (L,).
        """
        T, L = len(ids), self.n_layer
        caches = {n: [] for n in range(1, L + 1)}
        visited = np.zeros((T, L), dtype=bool)
        exit_at, out = [], []
        for t in range(T):
            h = self.embed(ids[t])
            for n in range(1, L + 1):
                after = self.run(n, h, t, caches[n])
                visited[t, n - 1] = after is not None
                h = h if after is None else after
                # DAT 3.2: exit at the first n that the rule accepts, else at L
                if n == L or (n in self.exits and rule(n, self.logits(n, h), h)):
                    break
            exit_at.append(n)
            out.append(self.logits(n, h))
            for higher in range(n + 1, L + 1):
                if exited_kv == "compute":
                    after = self.run(higher, h, t, caches[higher])
                    h = h if after is None else after
                # DAT 2: the state is copied upward; each higher block applies its own projections to it.
                # A routed block has not seen this token and keeps nothing (our reading: DAT has none).
                elif not self.is_routed(higher):
                    caches[higher].append(self.key_value(higher, h, t))
        cached = np.array([len(caches[n]) for n in range(1, L + 1)])
        return np.array(out), np.array(exit_at), visited, cached
