"""Decoding: a cache with holes, one pass that serves prompts and single tokens, sampling and beam search.

What a token that does not run leaves behind is where the two papers differ: an exited token writes keys and
values of its copied state into every dense block above [DAT 2]; a token that goes around a routed block
writes nothing there [MoD 3.5], so each routed block's cache holds only the tokens it ran.
"""
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from exits import Seen, nats
from model import Tokens
from routing import FAR, ROUTES, causal, confusion


class KV:
    """Keys and values of one block: slots (k, v, pos), filled from the left by the tokens that ran.

    B rows of `size` slots, plus one that catches the tokens that are not there (position FAR) and is never
    seen. A query sees the slots whose position is at most its own. source: what a Seq2Seq looks across at.
    """

    def __init__(self, B, size, n_head, hs, device=None, dtype=None, source=None):
        self.source = source
        self.k = torch.zeros(B, n_head, size + 1, hs, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.pos = torch.full((B, size + 1), FAR, device=device)
        self.used = torch.zeros(B, 1, dtype=torch.long, device=device)      # slots filled in each row
        self.most = 0                                                       # no row has filled more than this

    def write(self, k, v, pos):
        """k, v (B,nh,T,hs), pos (B,T): append the tokens that are there."""
        here = pos < FAR
        slot = torch.where(here, self.used + here.cumsum(1) - 1, self.pos.size(1) - 1)     # (B,T)
        row = torch.arange(len(pos), device=pos.device).unsqueeze(1)                        # (B,1)
        self.k[row, :, slot] = k.transpose(1, 2).to(self.k.dtype)
        self.v[row, :, slot] = v.transpose(1, 2).to(self.v.dtype)
        self.pos[row, slot] = pos
        self.used += here.sum(1, keepdim=True)
        self.most = min(self.most + pos.size(1), self.pos.size(1) - 1)

    def attend(self, q, k, v, pos, dropout):
        """Append, then let q (B,nh,T,hs) see everything up to its own position -> (B,nh,T,hs)."""
        self.write(k, v, pos)
        M = self.most
        seen = self.pos[:, None, None, :M] <= pos[:, None, :, None]                         # (B,1,T,M)
        k, v = self.k[:, :, :M].to(q.dtype), self.v[:, :, :M].to(q.dtype)                   # (B,nh,M,hs)
        return F.scaled_dot_product_attention(q, k, v, seen)

    def select(self, rows, source):
        """Go on with these rows, in any order, also twice (a beam turns), and with this source."""
        self.k, self.v, self.pos, self.used = self.k[rows], self.v[rows], self.pos[rows], self.used[rows]
        self.source = source


def empty_cache(model, B, size, source=None):
    """One KV per block, for B rows of at most `size` tokens."""
    w = model.wte.weight
    nh = model.config.n_head
    return [KV(B, size, nh, w.size(1) // nh, w.device, w.dtype, source) for _ in model.blocks]


class Read(NamedTuple):
    """What `read` found for every token of a call."""
    logits: torch.Tensor    # (B,T,V) of the classifier at which the token left
    exit_at: torch.Tensor   # (B,T) in 1..L, the block after which it left
    visited: torch.Tensor   # (B,T,L) bool, the blocks it ran
    score: torch.Tensor     # (B,T,L) router weights, nan for dense blocks
    worked: torch.Tensor    # (B,T,L) bool, the blocks whose MLP it ran: all of `visited` without experts


@torch.no_grad()
def read(model, ids, pos, past, rule, route, missing="copy"):
    """The one pass behind scoring (past=None), prompts and decoding: ids, pos (B,T) -> Read.

    All tokens of the call at once, under halting `rule` and routing `route`. Exact, and not an approximation
    of going token by token: block n reads states after block n - 1 only, and those are frozen where a token
    has left [DAT 2]. Tokens with position FAR are padding and run nothing.

    missing: what deeper tokens see of one that left earlier. "copy": keys and values of its copied state, the
    paper's way; "compute": its true ones, as if it ran the blocks later when one needs it (`visited` is still
    what it ran to be written; cost.decoding adds what is caught up).
    """
    L = len(model.blocks)
    at = Tokens(pos, live=pos < FAR)
    exit_at, inside = torch.full_like(pos, L), at.live                      # inside: has not left
    logits, ran, score, worked, states = None, [], [], [], []
    source = past[0].source if past else None
    for n, (h, visit) in enumerate(model.trunk(model.embed(ids), at, past, route), 1):
        ran.append(visit.ran & inside)
        worked.append(ran[-1] if visit.choice is None else ran[-1] & (visit.choice.expert >= 0))
        score.append(torch.full_like(h[..., 0], torch.nan) if visit.score is None else visit.score)
        states.append(h)
        if not inside.any():
            continue
        classify = functools.cache(functools.partial(model.classifiers, n, h))
        leave = inside & rule(Seen(n, states, classify, pos, source)) if n < L else inside
        if leave.any():
            logits = classify() if logits is None else torch.where(leave.unsqueeze(-1), classify(), logits)
            exit_at = torch.where(leave, n, exit_at)
            inside = inside & ~leave
            if missing == "copy":
                at.live, at.anyone = inside, bool(inside.any())
    return Read(logits, exit_at, torch.stack(ran, -1), torch.stack(score, -1), torch.stack(worked, -1))


@torch.no_grad()
def score(model, batch, route):
    """A Batch under teacher forcing, nobody leaving early -> nats (N,) of each exit, summed over tokens, and
    counts (4,) of how the causal guesses compare with what `route` selected."""
    losses, counts = [], torch.zeros(4, dtype=torch.long, device=batch.ids.device)
    for n, (h, visit) in enumerate(model.states(batch, route), 1):
        if n in model.classifiers.blocks:
            losses.append(nats(model.classifiers(n, h), batch.targets).sum())
        if visit.guess is not None:
            counts += confusion(visit, batch.live)
    return torch.stack(losses), counts


def measure(model, batches, context, stop=False):
    """Score batches under every routing rule that makes a difference -> {rule: (nats (N,) of each exit summed
    over tokens, counts as `score`)}, or None if `stop` came true on the way."""
    found, m = {}, model.config
    for name in ROUTES if m.routed != "none" or m.experts else ["top_k"]:
        total = 0, 0
        for batch in batches:
            if stop:
                return None
            with context:
                nats, counts = score(model, batch.to(model.wte.weight.device), ROUTES[name])
            total = total[0] + nats.double().cpu(), total[1] + counts.cpu()
        found[name] = total
    return found


def pad(rows, device):
    """Lists of token ids of any lengths -> ids, pos (B,T), padded on the right, padding at position FAR."""
    T = max(len(r) for r in rows)
    ids = torch.tensor([r + [0] * (T - len(r)) for r in rows], device=device)
    pos = torch.tensor([[*range(len(r))] + [FAR] * (T - len(r)) for r in rows], device=device)
    return ids, pos


def pick(logits, temperature, top, u):
    """logits (B,V), u (B,) uniform in [0,1) -> token (B,). temperature 0: the most likely; top: of the `top`
    most likely tokens only (None: of all)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)).double() / temperature
    if top is not None:
        least = logits.topk(min(top, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    below = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(below, u.unsqueeze(1).to(below) * below[:, -1:], right=True).squeeze(1)


class Generated(NamedTuple):
    """One text of `generate` or `beam_search`. Entry j of exit_at and visited belongs to the reading of
    ids[j], which wrote ids[j + 1]; the last token has not been read."""
    ids: list[int]              # prompt and what was added, an end token included
    prompt: int                 # tokens of the prompt
    exit_at: np.ndarray         # (len(ids) - 1,) in 1..L
    visited: np.ndarray         # (len(ids) - 1, L) bool
    score: float = math.nan     # of a beam: log-probability over length^penalty


def check_prompts(model, prompts, new):
    """Raise ValueError for an empty prompt or one that leaves no room for `new` tokens. -> longest prompt."""
    P = max(map(len, prompts), default=0)
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt: give at least one token")
    if P + new > model.config.block_size:
        raise ValueError(f"{P} prompt and {new} new tokens exceed the context of {model.config.block_size}")
    return P


def generate(model, prompts, new, rule, route=causal, temperature=1.0, top=None, seed=0, end=None,
             source=None, missing="copy"):
    """Continue every prompt (a non-empty list of ids) by at most `new` tokens, all rows at once.

    A row stops at token `end`. Row b draws from default_rng([seed, b]), so its text does not depend on the
    other rows. source: of a Seq2Seq, one for each prompt. Raises ValueError for an empty or over-long prompt.
    """
    device, B, P = model.wte.weight.device, len(prompts), check_prompts(model, prompts, new)
    u = np.stack([np.random.default_rng([seed, b]).random(new) for b in range(B)])
    u = torch.from_numpy(u)                             # (B,new); tokens are picked on the CPU, in float64
    length = torch.tensor([len(p) for p in prompts], device=device)
    going = torch.ones_like(length, dtype=torch.bool)
    past = empty_cache(model, B, P + new, source)
    ids, pos = pad(prompts, device)
    found = read(model, ids, pos, past, rule, route, missing)
    logits = found.logits[torch.arange(B, device=device), length - 1]
    written, exits, visits = [], [found.exit_at], [found.visited]
    for i in range(new):
        token = pick(logits.cpu(), temperature, top, u[:, i]).to(device)
        written.append(torch.where(going, token, -1))
        if end is not None:
            going = going & (token != end)
        if i + 1 == new or not going.any():
            break
        pos = torch.where(going, length + i, FAR).unsqueeze(1)
        found = read(model, token.unsqueeze(1), pos, past, rule, route, missing)
        logits = found.logits[:, 0]
        exits.append(found.exit_at)
        visits.append(found.visited)
    return _rows(prompts, written, exits, visits)


def _rows(prompts, written, exits, visits):
    """Tensors over (B, prompt padded to P, then single tokens) -> a Generated per row, padding taken out."""
    P = max(map(len, prompts))
    written = torch.stack(written, 1).tolist() if written else [[] for _ in prompts]
    exits, visits = torch.cat(exits, 1).cpu().numpy(), torch.cat(visits, 1).cpu().numpy()
    rows = []
    for b, prompt in enumerate(prompts):
        added = [t for t in written[b] if t >= 0]
        read_at = [*range(len(prompt)), *range(P, P + len(added))][: len(prompt) + len(added) - 1]
        rows.append(Generated(prompt + added, len(prompt), exits[b, read_at], visits[b, read_at]))
    return rows


# ----------------------------------------------------------------------------- beam search


class Reads:
    """All that was read for one prompt, a tree whose paths are texts: read r, of one token, came after read
    parent[r] (-1: it is the first), ran the blocks visited[r] (L,) and left after exit_at[r]."""

    def __init__(self):
        self.parent, self.exit_at, self.visited = [], [], []

    def add(self, parent, exit_at, visited):
        """-> the number of the new read."""
        self.parent.append(parent)
        self.exit_at.append(exit_at)
        self.visited.append(visited)
        return len(self.parent) - 1

    def path(self, r):
        """-> exit_at (T,), visited (T,L) of read r and of all that came before it, in order."""
        way = []
        while r >= 0:
            way.append(r)
            r = self.parent[r]
        return (np.array([each[r] for r in reversed(way)]) for each in (self.exit_at, self.visited))


class Hypothesis(NamedTuple):
    """A text on its way."""
    total: float                # log-probability
    written: tuple              # after the prompt
    read: int                   # the last read, in the Reads of its prompt


@torch.no_grad()
def beam_search(model, prompts, new, rule, beam, route=causal, penalty=1.0, end=None, source=None,
                missing="copy"):
    """The `beam` best continuations of every prompt -> for each a list of Generated, best first, and the
    Reads that all hypotheses took together.

    new: the most tokens to add, a number for each prompt. A step ranks all continuations of a prompt's live
    hypotheses by summed log-probability; those of the best `beam` that are `end` are done, and the best
    `beam` others live on. A prompt is finished when `beam` hypotheses are done, or at its last token, when
    the best `beam` continuations count as they are. Finished hypotheses compare by log-probability /
    length^penalty, length being the tokens added, `end` included. beam=1 is greedy decoding.

    Every hypothesis has its own exits; its rows of the cache follow it when the beam turns.
    """
    B, P, V = len(prompts), check_prompts(model, prompts, max(new)), model.vocab_size
    device = model.wte.weight.device
    past = empty_cache(model, B, P + max(new), source)
    ids, pos = pad(prompts, device)
    found = read(model, ids, pos, past, rule, route, missing)
    logits = found.logits[range(B), [len(p) - 1 for p in prompts]]
    reads, live = [Reads() for _ in prompts], []
    for b, how in enumerate(zip(found.exit_at.tolist(), found.visited.tolist(), strict=True)):
        for r, one in enumerate(zip(*how, strict=True)):
            if r < len(prompts[b]):
                reads[b].add(r - 1, *one)
        live.append([Hypothesis(0.0, (), len(prompts[b]) - 1)])
    going, done = list(range(B)), [[] for _ in prompts]
    for i in range(max(new)):
        totals = logits.new_tensor([[h.total for h in row] for row in live])            # (n,w)
        totals = totals.unsqueeze(-1) + logits.log_softmax(-1).view(*totals.shape, V)   # (n,w,V)
        best = [x.tolist() for x in totals.flatten(1).topk(min(2 * beam, totals[0].numel()))]
        rows, turned, staying = [], [], []
        for n, (b, *ranked) in enumerate(zip(going, *best, strict=True)):
            ended, on = extend(live[n], *ranked, V, beam, end, last=i + 1 == new[b])
            done[b] += ended
            if len(done[b]) < beam and i + 1 < new[b]:
                rows += [n * len(live[n]) + parent for parent, _ in on]
                turned.append([h for _, h in on])
                staying.append(n)
        if not staying:
            break
        live, going = turned, [going[n] for n in staying]
        source = source and source.select(staying)
        for kv in past:
            kv.select(rows, source)
        flat = [(b, h) for b, row in zip(going, live, strict=True) for h in row]
        ids = torch.tensor([[h.written[-1]] for _, h in flat], device=device)
        pos = torch.tensor([[len(prompts[b]) + i] for b, _ in flat], device=device)
        found = read(model, ids, pos, past, rule, route, missing)
        logits = found.logits[:, 0]
        how = iter(zip(found.exit_at[:, 0].tolist(), found.visited[:, 0].tolist(), strict=True))
        live = [[h._replace(read=reads[b].add(h.read, *next(how))) for h in row]
                for b, row in zip(going, live, strict=True)]
    return [(_ranked(p, ended, each, beam, penalty), each)
            for p, ended, each in zip(prompts, done, reads, strict=True)]


def extend(hypotheses, totals, places, V, beam, end, last):
    """One prompt's continuations from best to worst, place = hypothesis * V + token -> (those that are done,
    [(parent, hypothesis)] of those that go on)."""
    done, on = [], []
    for rank, (total, place) in enumerate(zip(totals, places, strict=True)):
        parent, token = divmod(place, V)
        h = hypotheses[parent]
        h = h._replace(total=total, written=(*h.written, token))
        if token == end or last:
            done += [h] if rank < beam else []
        elif len(on) < beam:
            on.append((parent, h))
    return done, on


def _ranked(prompt, ended, reads, beam, penalty):
    """Finished hypotheses -> the best `beam` Generated, best first."""
    texts = [Generated([*prompt, *h.written], len(prompt), *reads.path(h.read),
                       h.total / len(h.written)**penalty) for h in ended]
    return sorted(texts, key=lambda g: -g.score)[:beam]


def longest(S, block_size):
    """The most tokens that a translation of S source tokens may have: 2 S + 10, as far as there is room."""
    return min(2 * S + 10, block_size - 1)


def translate(model, sources, end, rule, beam=5, penalty=1.0, route=causal, missing="copy"):
    """Lists of source ids, `end` the last of each -> for each the best Generated, which begins with `end`,
    and the Reads of its search."""
    device = model.wte.weight.device
    source = model.encode(*pad(sources, device))
    new = [longest(len(s), model.config.block_size) for s in sources]
    found = beam_search(model, [[end]] * len(sources), new, rule, beam, route, penalty, end, source,
                        missing)
    return [(texts[0], reads) for texts, reads in found]
