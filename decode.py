"""Decoding: a cache with holes, one pass that serves prompts and single tokens, sampling and beam search.

What a token that does not run leaves behind is where the two papers differ: an exited token has keys and
values of its copied state in the dense blocks above [DAT 2], one that goes around a block has none [MoD 3.5].
"""
import functools
import math
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from exits import Seen, full_depth, nats, precise
from model import Tokens
from routing import FAR, ROUTES, causal, confusion, numbered


def in_steps(rows, used):
    """Rows of a cache, ascending, as few slices (which of them, which rows of the cache, slots used)."""
    found, i = [], 0
    while i < len(rows):
        j, step = i + 1, rows[i + 1] - rows[i] if i + 1 < len(rows) else 1
        while j < len(rows) and rows[j] == rows[j - 1] + step and used[j] == used[i]:
            j += 1
        found.append((slice(i, j), slice(rows[i], rows[j - 1] + 1, step), used[i]))
        i = j
    return found


class KV:
    """Keys and values of a dense block, in the slots of the cache. Tokens that left below it get those of
    their copied states [DAT 2] together with the first token that comes this deep; if none does, never."""

    def __init__(self, cache, n_head, hs, dtype):
        self.cache, self.filled = cache, 0                                  # slots that have keys and values
        self.kv = torch.zeros(2, len(cache.pos), n_head, 0, hs, device=cache.pos.device, dtype=dtype)

    source = property(lambda self: self.cache.source)       # what a Seq2Seq looks across at

    def grow(self, slots, size):
        """Have `size` slots if there are not this many. To grow is to copy all there is."""
        if self.kv.size(3) < slots:
            self.kv = F.pad(self.kv, (0, 0, 0, size - self.kv.size(3)))

    def join(self, x, at):
        """x (n,T,C), the tokens that run -> the states of all whose keys and values one product should make,
        their Tokens: (B,R + T,C), the tokens of this call, also those that left below, after the R of earlier
        calls that came no deeper than below this block."""
        cache, first = self.cache, self.filled
        self.filled = cache.end
        if first == cache.start:
            return (x, at) if at.rows is None else (cache.now, cache.tokens)
        if at.rows is None:
            cache.keep(x)
        return cache.states[:, first:cache.end], Tokens(cache.pos[:, first:cache.end])

    def attend(self, qkv, at, dropout):
        """Keep keys and values of all who joined, qkv (3,B,nh,R + T,hs); let those that run see everything up
        to their own positions -> (n,nh,T,hs)."""
        kv, cache, T, end = qkv[1:], self.cache, self.cache.tokens.pos.size(1), self.cache.end
        self.grow(end, cache.pos.size(1))
        self.kv.narrow(3, end - kv.size(3), kv.size(3)).copy_(kv)
        q, past, seen = qkv[0, :, :, -T:], self.kv.narrow(3, 0, end), None   # of a single token: all there is
        if T > 1 or any(cache.holes[b] for b in cache.numbers):
            seen = cache.pos[:, None, None, :end] <= cache.tokens.pos[:, None, :, None]     # (B,1,T,end)
        if cache.rows is None:
            return F.scaled_dot_product_attention(q, *past.to(q.dtype).unbind(), seen)
        some = [cache.rows]
        if T == 1 and q.is_cpu:         # where they lie, not gathered
            some = [b for _, b, _ in in_steps(cache.numbers, [end] * len(cache.numbers))]
        return torch.cat([F.scaled_dot_product_attention(q[b], *past[:, b].to(q.dtype).unbind(),
                                                         None if seen is None else seen[b]) for b in some])

    def drop(self, pos):
        self.filled = min(self.filled, self.cache.end)

    def select(self, rows):
        self.kv = self.kv[:, rows]


class RoutedKV(KV):
    """Keys and values of a routed block, of the tokens it ran: rows that are filled from the left, whatever
    slots the cache has for these tokens, and a last slot that catches those that are not there (position FAR)
    and is never seen. pos (B,size + 1): theirs. used: slots filled in each row."""

    def __init__(self, cache, n_head, hs, dtype):
        super().__init__(cache, n_head, hs, dtype)
        self.pos, self.used = F.pad(torch.full_like(cache.pos, FAR), (0, 1), value=FAR), [0] * len(cache.pos)

    def busy(self, here):
        """Rows of here (n,k) in which anybody is, None: in all; the others need not run."""
        if here.size(0) == 1:           # then somebody is in it
            return None
        some = [i for i, row in enumerate(here.tolist()) if any(row)]
        return None if len(some) == here.size(0) else torch.tensor(some, device=here.device)

    def join(self, x, at):
        """Nobody: a token that left runs no router [MoD 3.5]."""
        return x, at

    def enter(self, at, numbers):
        """The next slots of these rows for their tokens: (n,T), or a slice if all rows have the same."""
        pos, T, used = at.pos, at.pos.size(1), [self.used[b] for b in numbers]
        more = [sum(p < FAR for p in row) for row in pos.tolist()]              # they come first
        for b, u, m in zip(numbers, used, more, strict=True):
            self.used[b] = u + m
        if at.rows is None and min(used) == max(used) and min(more) == T:
            slot = slice(used[0], used[0] + T)
            self.pos[:, slot] = pos
        else:
            slot = [[*range(u, u + m)] + [-1] * (T - m) for u, m in zip(used, more, strict=True)]
            slot = torch.tensor(slot, device=pos.device)
            self.pos[numbered(at.rows, slot), slot] = pos
        return slot

    def attend(self, qkv, at, dropout):
        q, kv, rows, (n, T) = qkv[0], qkv[1:], at.rows, at.pos.shape
        numbers = range(n) if rows is None else rows.tolist()
        slot, used = self.enter(at, numbers), [self.used[b] for b in numbers]
        most = max(used)
        self.grow(most + 1, min(most + max(64, most // 2), self.pos.size(1)))
        if isinstance(slot, slice):
            self.kv[:, :, :, slot] = kv
        else:                                                                               # (n,T,2,nh,hs)
            self.kv[:, numbered(rows, slot), :, slot] = kv.permute(1, 3, 0, 2, 4).to(self.kv.dtype)
        if T == 1 and rows is not None and q.is_cpu:        # as in a dense block
            return torch.cat([F.scaled_dot_product_attention(q[i], *self.kv[:, b, :, :M].to(q.dtype).unbind())
                              for i, b, M in in_steps(numbers, used)])
        past, pos = self.kv.narrow(3, 0, most), self.pos.narrow(1, 0, most)
        past, pos = (past, pos) if rows is None else (past[:, rows], pos[rows])
        seen = pos[:, None, None] <= at.pos[:, None, :, None] if T > 1 or min(used) < most else None
        return F.scaled_dot_product_attention(q, *past.to(q.dtype).unbind(), seen)

    def drop(self, pos):
        self.used = [bisect_left(self.pos[0].tolist(), pos)]
        self.pos[:, self.used[0]:] = FAR

    def select(self, rows):
        super().select(rows)
        self.pos, self.used = self.pos[rows], [self.used[b] for b in rows]


@functools.cache
def _bare(kind, forward):
    return type(kind.__name__, (kind,), {"__call__": forward})


def bare(model):
    """A copy that shares all tensors, for many small calls: Python finds parts and parameters as ordinary
    attributes and calls forward at once, which saves a tenth to a third of a single token's time. Modules
    with hooks are called as ever. What is exchanged in the original later on stays in the copy."""
    copies = {}
    for module in model.modules():                  # each once, also if it has several places
        own, kind = vars(module), type(module)
        watched = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
        plain = not watched and module._compiled_call_impl is None
        copies[module] = object.__new__(_bare(kind, kind.forward) if plain else kind)
    for module, copy in copies.items():
        own = vars(module)
        parts = {name: copies.get(part) for name, part in own["_modules"].items()}
        vars(copy).update(own | own["_parameters"] | own["_buffers"] | parts, _modules=parts)
    return copies[model]


class Cache:
    """What a model remembers of B texts of at most `size` tokens each, padding included; cache[n] is the KV
    of block n from 0. Keys and values take memory when tokens come to a block, so less where capacity is low
    or exits are early.

    The tokens of a call take the next slots, the same ones in every row, padding too: it has position FAR,
    which nothing attends to. `states` has those of the tokens that left, as they left.
    """

    def __init__(self, model, B, size, source=None):
        w, nh, routed = model.wte.weight, model.config.n_head, model.config.routed_blocks()
        half = torch.is_autocast_enabled(w.device.type)
        dtype = torch.get_autocast_dtype(w.device.type) if half else w.dtype
        self.model, self.source, self.end = bare(model), source, 0
        self.pos = torch.full((B, size), FAR, device=w.device)
        self.states = torch.zeros(B, size, w.size(1), device=w.device, dtype=w.dtype)
        self.holes = [False] * B                    # rows with padding among their tokens
        self.blocks = [(RoutedKV if n in routed else KV)(self, nh, w.size(1) // nh, dtype)
                       for n in range(len(model.blocks))]
        for p in model.parameters():
            vars(p).pop("packed", None)         # of linear.py: nobody counts what is changed through .data

    def __getitem__(self, n):
        return self.blocks[n]

    def enter(self, pos):
        """The tokens of a call come, pos (B,T). If it is on the CPU, nobody waits for a device."""
        start, end = self.end, self.end + pos.size(1)
        if end > self.pos.size(1):
            raise ValueError(f"no room: this cache holds {self.pos.size(1)} tokens of each text")
        self.pos[:, start:end] = pos
        there = [[t for t, p in enumerate(row) if p < FAR] for row in pos.tolist()]
        self.holes = [hole or len(row) < end - start for hole, row in zip(self.holes, there, strict=True)]
        self.call(start, end, there)

    def call(self, start, end, there):
        """The call is of the tokens in these slots; there: for each row the places of those that are no
        padding, in 0..T-1."""
        self.start, self.end, self.there = start, end, there
        self.tokens, self.now = Tokens(self.pos[:, start:end]), self.states[:, start:end]
        self.rows, self.numbers = None, range(len(there))       # that still run: (n,), None: all; as integers

    def again(self, start):
        """The call is of tokens of a single text that came before, from the slot `start` on."""
        self.call(start, self.end, [[*range(self.end - start)]])

    def keep(self, x):
        """The states of the tokens that still run are x (n,T,C) now."""
        self.now.copy_(x) if self.rows is None else self.now.index_copy_(0, self.rows, x)

    def drop(self, pos):
        """Forget all tokens of a single text at `pos` and after, whichever slots they have."""
        self.end = bisect_left(self.pos[0].tolist(), pos)
        self.pos[:, self.end:] = FAR
        for kv in self.blocks:
            kv.drop(pos)

    def select(self, rows, source):
        """Go on with these rows, in any order, also twice (a beam turns), and with this source."""
        self.source, self.pos, self.states = source, self.pos[rows], self.states[rows]
        self.holes = [self.holes[b] for b in rows]
        for kv in self.blocks:
            kv.select(rows)


def paths(steps, L):
    """[(exit_at (B,T), who is there (B,T), {number from 0 of a block that chose: who ran it (B,T)})] of calls
    one after the other -> exit_at (B,T), visited (B,T,L) of the tokens of all."""
    exit_at = torch.cat([step[0] for step in steps], 1)
    ran = [torch.cat([chose.get(n, there) for _, there, chose in steps], 1) for n in range(L)]
    return exit_at, (exit_at.unsqueeze(-1) > torch.arange(L, device=exit_at.device)) & torch.stack(ran, -1)


class Read:
    """What `read` found for every token of a call. What the blocks did is stacked when somebody asks.

    logits    (B,T,V) of the classifier at which the token left
    exit_at   (B,T) in 1..L, the block after which it left
    visited   (B,T,L) bool, the blocks it ran
    score     (B,T,L) router weights, nan for dense blocks
    worked    (B,T,L) bool, the blocks whose MLP it ran: all of `visited` without experts
    """

    def __init__(self, call):
        self.exit_at, self.logits = call.emitted()
        self.step = self.exit_at, call.cache.tokens.pos < FAR, call.ran         # see `paths`
        self.L, self.scores, self.works = call.L, call.scores, call.works

    def of_blocks(self, of, rest):
        """{number of a block from 0: (B,T)}, `rest` (B,T) for the others -> (B,T,L)."""
        return torch.stack([of.get(n, rest) for n in range(self.L)], -1)

    visited = property(lambda self: paths([self.step], self.L)[1])
    worked = property(lambda self: self.visited & self.of_blocks(self.works, self.step[1]))
    score = property(lambda self: self.of_blocks(self.scores, self.exit_at * torch.nan))


class Call:
    """The tokens of the cache's call on their way up, from states x (B,T,C): those of the rows in which
    somebody is `inside`, has not left: for each of these rows the places of those. missing: see `read`."""

    def __init__(self, x, cache, missing="copy"):
        self.model, self.cache, self.missing = cache.model, cache, missing
        self.blocks = [*zip(cache.model.blocks, cache.blocks, strict=True)]
        self.L = len(self.blocks)
        self.x, self.first, self.at, self.inside = x, x, cache.tokens, cache.there
        self.ran, self.scores, self.works = {}, {}, {}      # of blocks that chose, by number from 0: (B,T)
        self.left, self.done = [], False                    # (Seen, rows, who): who left where; all did
        self.narrow()

    def of_all(self, of_some, missing):
        """(n,T) of the rows that run -> (B,T)."""
        if self.at.rows is None:
            return of_some
        return of_some.new_full(self.cache.tokens.pos.shape, missing).index_copy_(0, self.at.rows, of_some)

    def narrow(self):
        """Let the rows drop out in which nobody is inside, unless that is all."""
        cache, stay = self.cache, [i for i, row in enumerate(self.inside) if row]
        self.done = not stay
        if len(stay) < len(self.inside):
            if cache.rows is None:
                cache.keep(self.x)
            if self.done:
                return
            self.inside, cache.numbers = ([of[i] for i in stay] for of in (self.inside, cache.numbers))
            only, cache.rows = torch.tensor([stay, cache.numbers], device=self.x.device)
            self.x, self.first, pos = (t.index_select(0, only) for t in (self.x, self.first, self.at.pos))
            self.at = Tokens(pos, rows=cache.rows)
        if min(map(len, self.inside)) < self.x.size(1):
            inside = [(i, t) for i, row in enumerate(self.inside) for t in row]
            self.at.live = torch.zeros_like(self.at.pos, dtype=torch.bool)
            self.at.live[self.places(inside)] = True

    def places(self, those):
        """[(row, place)] -> two index tensors."""
        return torch.tensor(those, device=self.x.device).T.unbind()

    def run(self, n, route):
        """Block n, from 1."""
        block, past = self.blocks[n - 1]
        self.x, visit = block(self.x, self.at, past, route)
        self.first = self.x if n == 1 else self.first
        if self.at.rows is not None or self.at.live is not None:
            self.cache.keep(self.x)
        if visit.score is not None:
            self.scores[n - 1] = self.of_all(visit.score.float(), torch.nan)
            self.ran[n - 1] = self.of_all(visit.ran, False)
        if visit.choice is not None:
            self.works[n - 1] = self.of_all(visit.choice.expert >= 0, False)

    def leave(self, n, rule):
        """Those leave after block n that rule wants to, all after the last."""
        seen = Seen(n, [self.first, self.x], self.model.classifiers, self.at.pos, self.cache.source,
                    self.at.rows)
        wants = rule(seen).tolist() if n < self.L else [[True] * self.x.size(1)] * len(self.inside)
        who = [(i, t) for i, row in enumerate(self.inside) for t in row if wants[i][t]]
        if not who:
            return
        self.left.append((seen, self.cache.numbers, who))
        self.inside = [[t for t in row if not wants[i][t]] for i, row in enumerate(self.inside)]
        if self.missing == "compute":
            seen.read()         # before its states go on
        elif n < self.L:
            self.narrow()

    def emitted(self):
        """-> exit_at (B,T), logits (B,T,V): L and 0 for tokens that are not there. Classifiers that no rule
        has asked are one product."""
        cache, pos = self.cache, self.cache.tokens.pos
        seen, _, who = self.left[0]
        if len(who) == pos.numel():         # all are there, and left at once
            return torch.full_like(pos, seen.n), seen.read()
        exit_at, known, unknown = [[self.L] * pos.size(1) for _ in cache.there], [], []
        for seen, numbers, who in self.left:
            where = [(numbers[i], t) for i, t in who]
            for b, t in where:
                exit_at[b][t] = seen.n
            if seen.logits is None:
                unknown.append((seen.n, where))
            else:
                known.append((self.places(where), seen.logits[self.places(who)]))
        if unknown:
            where = self.places([place for _, them in unknown for place in them])
            states = cache.now[where].split([len(them) for _, them in unknown])
            known.append((where, self.model.classifiers.several([n for n, _ in unknown], states)))
        logits = known[0][1].new_zeros(*pos.shape, self.model.vocab_size)
        for where, some in known:
            logits[where] = some
        return torch.tensor(exit_at, device=pos.device), logits


@torch.inference_mode()
def read(model, ids, pos, cache, rule, route, missing="copy"):
    """The one pass behind scoring (cache=None: of its own), prompts and decoding: ids, pos (B,T) -> Read.

    All tokens of the call at once, under halting `rule` and routing `route`. Exact, and not an approximation
    of going token by token: block n reads states after block n - 1 only, and those are frozen where a token
    has left [DAT 2]. Tokens with position FAR are padding and run nothing; a row of which no token goes on
    drops out, and when there is none the blocks above do not run at all. Calls come in order of position,
    which is below the model's block_size; at least one token is there. Raises ValueError if a cache is full.

    missing: what deeper tokens see of one that left earlier. "copy": keys and values of its copied state, the
    paper's way; "compute": its true ones, as if it ran the blocks later when one needs it (`visited` is still
    what it ran to be written; cost.decoding adds what is caught up).
    """
    cache = cache or Cache(model, *pos.shape)
    cache.enter(pos)
    call = Call(cache.model.embed(ids), cache, missing)
    for n in range(1, call.L + 1):
        call.run(n, route)
        if n == call.L or rule is not full_depth:
            call.leave(n, rule)
        if call.done:
            break
    return Read(call)


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


def chances(logits, temperature, top):
    """logits (B,V) -> probabilities (B,V), float64. temperature 0: 1 for the most likely token; top: of the
    `top` most likely tokens only (None: of all)."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).double()
    if top is not None:
        least = logits.topk(min(top, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return (logits.double() / temperature).softmax(-1)


def pick(p, u):
    """Probabilities p (B,V), of any sum, and u (B,) uniform in [0,1) -> token (B,)."""
    below = p.cumsum(-1)
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
    length = torch.tensor([len(p) for p in prompts])    # and so is what decides about the next position
    going = torch.ones_like(length, dtype=torch.bool)
    past = Cache(model, B, P + new, source)
    ids, pos = pad(prompts, device)
    found = read(model, ids, pos, past, rule, route, missing)
    logits = found.logits[torch.arange(B), length - 1]
    written, steps = [], [found.step]
    for i in range(new):
        token = pick(chances(logits.cpu(), temperature, top), u[:, i])
        written.append(torch.where(going, token, -1))
        if end is not None:
            going = going & (token != end)
        if i + 1 == new or not going.any():
            break
        pos = torch.where(going, length + i, FAR).unsqueeze(1)
        found = read(model, token.unsqueeze(1).to(device), pos, past, rule, route, missing)
        logits = found.logits[:, 0]
        steps.append(found.step)
    return _rows(prompts, written, *paths(steps, model.config.n_layer))


def _rows(prompts, written, exits, visits):
    """Tensors over (B, prompt padded to P, then single tokens, ...) -> a Generated per row, no padding."""
    P = max(map(len, prompts))
    written = torch.stack(written, 1).tolist() if written else [[] for _ in prompts]
    exits, visits, rows = exits.cpu().numpy(), visits.cpu().numpy(), []
    for b, prompt in enumerate(prompts):
        added = [t for t in written[b] if t >= 0]
        read_at = [*range(len(prompt)), *range(P, P + len(added))][: len(prompt) + len(added) - 1]
        rows.append(Generated(prompt + added, len(prompt), exits[b, read_at], visits[b, read_at]))
    return rows


# ----------------------------------------------------------------------------- lossless drafts


def climb(cache, x, blocks, route):
    """Run these blocks on all tokens of the cache's call, of a single text, nobody leaving: x (1,T,C)
    -> (1,T,C), {number of a block that chose, from 0: who ran it (1,T)}."""
    call = Call(x, cache)
    for n in blocks:
        call.run(n, route)
    return call.x, call.ran


def accept(p, q, drafted, u):
    """Keep a drafted token with chance min(1, p / q), else draw one from what p has more than q: so tokens
    come as often as p says. p, q (V,), u two numbers uniform in [0,1) -> (kept?, token)."""
    if u[0] * q[drafted] < p[drafted]:
        return True, drafted
    return False, int(pick((p - q).clamp(min=0)[None], torch.tensor(u[1:])))


def check_drafts(model, E, ahead):
    """Raise ValueError if no tokens can be drafted at exit E."""
    early = model.classifiers.blocks[:-1]
    if E not in early or ahead < 1:
        raise ValueError(f"cannot draft {ahead} tokens at exit {E}: at least one token, at an early exit of "
                         f"this run: {', '.join(map(str, early)) or 'it has none'}")


class Drafted(NamedTuple):
    """What `speculate` did."""
    text: Generated
    drafted: int                # tokens proposed
    kept: int                   # of those


@torch.inference_mode()
def speculate(model, prompt, new, E, ahead, route=causal, temperature=1.0, top=None, seed=0, end=None,
              source=None):
    """Continue one prompt as full depth would, in distribution (at temperature 0 token by token), but faster:
    draft `ahead` tokens with the first E blocks and their classifier, run the other blocks on all of them at
    once, and keep what those agree with (speculative sampling, the draft being the model's own early exit).
    Every state in the cache is a true one, none is copied. -> Drafted.

    Raises ValueError for a prompt as in `generate`, or if block E is not an early exit.
    """
    check_drafts(model, E, ahead)
    P, L, device = check_prompts(model, [prompt], new), len(model.blocks), model.wte.weight.device
    rng, cache, ids = np.random.default_rng(seed), Cache(model, 1, P + new, source), [*prompt]
    steps, start, drafted, kept = [], 0, 0, 0
    while len(ids) < P + new and ids[P:][-1:] != [end]:
        q, below, first = [], [], len(ids)
        room = min(ahead, P + new - first - 1)
        for i in range(room + 1):
            unread = torch.tensor([ids[cache.end:]], device=device)
            cache.enter(torch.arange(cache.end, len(ids)).unsqueeze(0))
            x, ran = climb(cache, cache.model.embed(unread), range(1, E + 1), route)
            cache.keep(x)
            below.append(ran)
            if i < room:
                q.append(chances(cache.model.classifiers(E, x[:, -1]).cpu(), temperature, top))
                ids.append(int(pick(q[-1], torch.from_numpy(rng.random(1)))))
        drafted += room
        cache.again(start)
        x, above = climb(cache, cache.now, range(E + 1, L + 1), route)
        p = chances(cache.model.classifiers(L, x[0, first - 1 - start:]).cpu(), temperature, top)
        for i, u in enumerate(rng.random((len(q), 2))):
            same, token = accept(p[i], q[i][0], ids[first + i], u)
            kept += same
            if not same or token == end:
                ids[first + i:] = [token]
                break
        else:
            ids.append(int(pick(p[-1:], torch.from_numpy(rng.random(1)))))
        above |= {n: torch.cat([ran[n] for ran in below], 1) for n in below[0]}
        there = torch.ones(1, len(ids) - 1 - start, dtype=torch.bool, device=device)
        steps.append((L * there, there, {n: ran[:, :there.size(1)] for n, ran in above.items()}))
        start = len(ids) - 1                                                    # the last one is unread
        cache.drop(start)
    (exit_at,), (visited,) = (of_all.cpu().numpy() for of_all in paths(steps, L))
    return Drafted(Generated(ids, P, exit_at, visited), drafted, kept)


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


@torch.inference_mode()
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
    past = Cache(model, B, P + max(new), source)
    ids, pos = pad(prompts, device)
    found = read(model, ids, pos, past, rule, route, missing)
    logits = precise(found.logits[range(B), [len(p) - 1 for p in prompts]])
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
        past.select(rows, source and source.select(staying, len(turned[0])))
        source = past.source
        flat = [(b, h) for b, row in zip(going, live, strict=True) for h in row]
        ids = torch.tensor([[h.written[-1]] for _, h in flat], device=device)
        pos = torch.tensor([[len(prompts[b]) + i] for b, _ in flat])
        found = read(model, ids, pos, past, rule, route, missing)
        logits = precise(found.logits[:, 0])
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


@torch.inference_mode()
def encoded(model, sources):
    """Lists of source ids -> Source, and the most tokens that each translation may have."""
    source = model.encode(*pad(sources, model.wte.weight.device))
    return source, [longest(len(s), model.config.block_size) for s in sources]


def translate(model, sources, end, rule, beam=5, penalty=1.0, route=causal, missing="copy"):
    """Lists of source ids, `end` the last of each -> for each the best Generated, which begins with `end`,
    and the Reads of its search."""
    source, new = encoded(model, sources)
    found = beam_search(model, [[end]] * len(sources), new, rule, beam, route, penalty, end, source,
                        missing)
    return [(texts[0], reads) for texts, reads in found]
