"""Decoding: a cache with holes, one step that serves prompts and single tokens, sampling, drafts, beam
search.

What a token that does not run a block leaves behind is where the two papers differ: an exited token has keys
and values of its copied state in the dense blocks above [DAT 2], a token that skips a routed block has none
[MoD 3.5].

Synchronisations with the device in one step: one for each block under a halting rule (is any token live?),
one for each routed block and a second if a token runs it, one for the exits; and one for the logits in
`generate`.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from exits import ExitState, full_depth, to_float32, token_losses
from routing import NO_POSITION, ROUTES, causal, confusion


class LayerCache:
    """Keys and values of one block for B texts. Every row fills from the left; slots after a row's last
    token hold NO_POSITION, which no token sees.

    kv (2,B,nh,size,hs), pos (B,size), used: slots filled in each row. upto: the column of the Cache up to
    which tokens have keys and values here; dense blocks only, since a token that skips a routed block has
    none."""

    def __init__(self, cache, routed):
        self.cache, self.routed, self.upto = cache, routed, 0
        self.kv, self.pos, self.used = None, cache.pos[:, :0], [0] * len(cache.pos)

    def with_pending(self, x, pos):
        """x (B,T,C), pos (B,T) of this call, preceded in a dense block by the copied states of tokens that
        exited below it in earlier calls and have no keys and values here yet [DAT 2] -> (B,P+T,C),
        (B,P+T)."""
        cache, pending = self.cache, slice(self.upto, self.cache.start)
        if self.routed or pending.start >= pending.stop:
            return x, pos
        return torch.cat([cache.states[:, pending], x], 1), torch.cat([cache.pos[:, pending], pos], 1)

    def append(self, k, v, pos):
        """Keys and values (B,nh,T,hs) at pos (B,T) -> those of all tokens so far (B,nh,M,hs), their pos
        (B,M)."""
        B, T = pos.shape
        self.grow(max(self.used) + T, k)
        if min(self.used) == max(self.used):            # a slice is faster than indices
            slots = slice(self.used[0], self.used[0] + T)
            self.kv[0, :, :, slots], self.kv[1, :, :, slots], self.pos[:, slots] = k, v, pos
        else:
            rows, slots = torch.arange(B).unsqueeze(1), torch.tensor(self.used).unsqueeze(1) + torch.arange(T)
            self.kv[0][rows, :, slots], self.kv[1][rows, :, slots] = k.transpose(1, 2), v.transpose(1, 2)
            self.pos[rows, slots] = pos
        present = (pos < NO_POSITION).sum(1).tolist() if self.routed else [T] * B    # absent ones come last
        self.used = [used + n for used, n in zip(self.used, present, strict=True)]
        M = max(self.used)
        return self.kv[0, :, :, :M], self.kv[1, :, :, :M], self.pos[:, :M]

    def grow(self, size, k):
        """Grow the buffers to at least `size` slots, by doubling (copies them)."""
        if self.kv is None:
            self.kv = k.new_zeros(2, *k.shape[:2], 0, k.size(-1))
        filled = self.kv.size(3)
        if filled < size:
            more = max(size - filled, filled, 64)
            self.kv = F.pad(self.kv, (0, 0, 0, more))
            self.pos = F.pad(self.pos, (0, more), value=NO_POSITION)

    def truncate(self, length):
        """Forget the tokens of a single text at position `length` and later."""
        self.used, self.upto = [int((self.pos[0] < length).sum())], min(self.upto, length)
        self.pos[:, self.used[0]:] = NO_POSITION

    def reorder(self, rows):
        self.kv = None if self.kv is None else self.kv[:, rows]
        self.pos, self.used = self.pos[rows], [self.used[b] for b in rows]


class Cache:
    """What a model remembers of B texts of at most `size` tokens each, padding included. A call appends a
    column for each of its tokens, start to end: pos (B,size) and states (B,size,C), the last state of every
    token. memory: the encoder output of a Seq2Seq, B rows. ValueError if the model is in training mode."""

    def __init__(self, model, B, size, memory=None):
        if model.training:
            raise ValueError("decoding needs model.eval(): dropout would change the text")
        wte, routed = model.wte.weight, model.config.routed_blocks()
        self.memory, self.start, self.end = memory, 0, 0
        self.pos = torch.full((B, size), NO_POSITION, device=wte.device)
        self.states = wte.new_zeros(B, size, wte.size(1))
        self.layers = [LayerCache(self, n in routed) for n in range(len(model.blocks))]

    def append(self, pos):
        """Begin a call of tokens at pos (B,T), NO_POSITION at padding. ValueError if there is no room."""
        if self.end + pos.size(1) > self.pos.size(1):
            raise ValueError(f"no room: this cache holds {self.pos.size(1)} tokens of each text")
        self.start, self.end = self.end, self.end + pos.size(1)
        self.pos[:, self.start:self.end] = pos

    def truncate(self, length):
        """Forget the tokens of a single text, without padding, at position `length` and later."""
        self.end = length
        self.pos[:, length:] = NO_POSITION
        for layer in self.layers:
            layer.truncate(length)

    def reorder(self, rows):
        """Go on with these rows, in any order, also twice: a beam keeps its best hypotheses."""
        self.pos, self.states = self.pos[rows], self.states[rows]
        self.memory = self.memory and self.memory.reorder(rows)
        for layer in self.layers:
            layer.reorder(rows)


class StepOutput(NamedTuple):
    """What `step` computed for every token of a call. Padding visits no block; its exit is L."""
    logits: torch.Tensor        # (B,T,V) of the classifier at the token's exit
    exit_at: torch.Tensor       # (B,T) in 1..L
    visited: torch.Tensor       # (B,T,L) bool, the blocks it ran
    worked: torch.Tensor        # (B,T,L) bool, those whose MLP it ran: all without experts
    classified: torch.Tensor    # (B,T) classifiers evaluated for the token
    predicted: torch.Tensor     # (B,T) evaluations of the exit predictor
    weight: torch.Tensor        # (B,T,L) router weights; nan in dense blocks and above the last that ran


def run_block(model, n, x, live, cache, route, exited_kv="copy"):
    """Block n (from 1) on the tokens of the cache's call: x (B,T,C), live (B,T) -> (x, Routing).

    exited_kv="compute": tokens that exited below this block in earlier calls run it first, and those of this
    call go on after their exit, so that later tokens see their true keys and values."""
    block, layer, pos = model.blocks[n - 1], cache.layers[n - 1], cache.pos[:, cache.start:cache.end]
    if exited_kv == "compute":
        live = pos < NO_POSITION
        pending = slice(layer.upto, cache.start)
        layer.upto = max(layer.upto, cache.start)       # so that the block itself adds no copies
        if pending.start < pending.stop:
            late = cache.pos[:, pending]
            cache.states[:, pending], _ = block(cache.states[:, pending], late, late < NO_POSITION, layer,
                                                cache.memory, route)
    x, routing = block(x, pos, live, layer, cache.memory, route)
    layer.upto = cache.end
    return x, routing


@torch.inference_mode()
def step(model, ids, pos, cache, rule, route=causal, exited_kv="copy"):
    """Run the tokens ids (B,T) at pos (B,T) of one call -> StepOutput. cache None: a GPT scores a text by
    itself.

    All tokens of the call at once, under halting `rule` and routing `route`. That is exact, not an
    approximation of going token by token: block n reads states after block n - 1 only, and those stay where
    a token has exited [DAT 2]. A block runs all rows as long as one token is live. Calls come in order of
    position. ValueError if the cache is full.

    exited_kv: what later tokens see of an exited one in the blocks above: "copy", keys and values of its
    copied state, as in the paper, or "compute", its true ones (`visited` is what it ran to be emitted)."""
    cache, L = cache or Cache(model, *pos.shape), len(model.blocks)
    cache.append(pos)
    x, pos = model.embed(ids), cache.pos[:, cache.start:cache.end]
    live, exit_at, none = pos < NO_POSITION, torch.full_like(pos, L), torch.zeros_like(pos, dtype=torch.bool)
    visited, worked, weight = [none] * L, [none] * L, [none * torch.nan] * L        # of each block
    state = ExitState(model.classifiers, model.exit_predictor, pos, live, cache.memory)
    for n in range(1, L + 1):
        x, routing = run_block(model, n, x, live, cache, route, exited_kv)
        state.states.append(x)
        visited[n - 1] = worked[n - 1] = live & routing.runs
        if routing.choice is not None:
            worked[n - 1] = visited[n - 1] & (routing.choice.expert >= 0)
        if routing.weight is not None:
            weight[n - 1] = routing.weight.float()
        if n < L and rule is not full_depth:
            exiting = live & rule(state)
            exit_at = exit_at.masked_fill(exiting, n)
            live = state.live = live & ~exiting
            if not live.any():
                break
    cache.states[:, cache.start:cache.end] = x
    visited, worked, weight = (torch.stack(of_blocks, -1) for of_blocks in (visited, worked, weight))
    logits = state.emitted(exit_at)
    return StepOutput(logits, exit_at, visited, worked, state.classified, state.predicted, weight)


def evaluate_loss(model, batches, context, stop=()):
    """Batches under teacher forcing at full depth -> {routing rule: (nats (N,) of every exit summed over
    tokens, counts (4,) of `routing.confusion`)} for every rule that makes a difference; None if `stop`
    became true."""
    device, result, m = model.wte.weight.device, {}, model.config
    for name in ROUTES if m.routed_blocks() or m.experts else ["top_k"]:
        losses, counts = torch.zeros(len(model.classifiers.blocks), dtype=torch.float64), torch.zeros(4)
        for i, batch in enumerate(batches):
            if stop:
                return None
            torch.manual_seed(i)                # the random control draws anew for every batch
            batch, exits = batch.to(device), []
            with torch.no_grad(), context:
                for n, (h, routing) in enumerate(model.run_batch(batch, ROUTES[name]), 1):
                    if n in model.classifiers.blocks:
                        exits.append(token_losses(model.classifiers(n, h), batch.targets).sum())
                    if routing.logit is not None:
                        counts += confusion(routing, batch.mask).cpu()
            losses += torch.stack(exits).cpu()
        result[name] = losses, counts
    return result


def pad(rows, device):
    """Lists of token ids of any lengths -> ids, pos (B,T), padded on the right, NO_POSITION at padding."""
    T = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    pos = torch.tensor([[*range(len(row))] + [NO_POSITION] * (T - len(row)) for row in rows], device=device)
    return ids, pos


def next_token_probs(logits, temperature, top_k=None):
    """logits (B,V) -> probabilities (B,V) in float64 on the CPU. temperature 0: 1 for the most likely token;
    top_k: of so many most likely tokens only (None: all)."""
    logits = logits.double().cpu()
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).double()
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return (logits / temperature).softmax(-1)


def sample_token(probs, u):
    """probs (B,V), of any sum, and u (B,) uniform in [0,1) -> token (B,)."""
    below = probs.cumsum(-1)
    return torch.searchsorted(below, u.unsqueeze(1).to(below) * below[:, -1:], right=True).squeeze(1)


class Generated(NamedTuple):
    """One text of `generate` or `beam_search`. Entry j of exit_at and visited belongs to the step that read
    ids[j] and wrote ids[j + 1]; the last token has not been read."""
    ids: list[int]              # prompt and continuation, an end token included
    prompt: int                 # tokens of the prompt
    exit_at: np.ndarray         # (len(ids) - 1,) in 1..L
    visited: np.ndarray         # (len(ids) - 1, L) bool
    log_prob: float = math.nan  # of a beam: log-probability / length^length_penalty


def check_prompts(model, prompts, max_new_tokens):
    """The longest prompt's length. ValueError for an empty prompt or one that leaves no room."""
    P = max(map(len, prompts), default=0)
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt: give at least one token")
    if max_new_tokens < 1 or P + max_new_tokens > model.config.block_size:
        raise ValueError(f"{P} prompt and {max_new_tokens} new tokens (at least 1) exceed the context of "
                         f"{model.config.block_size}")
    return P


def generate(model, prompts, max_new_tokens, rule, route=causal, temperature=1.0, top_k=None, seed=0,
             eos_id=None, memory=None, exited_kv="copy"):
    """Continue every prompt (a non-empty list of ids) by at most max_new_tokens, all rows at once ->
    [Generated].

    A row stops at token eos_id. Row b draws from default_rng([seed, b]), so its text does not depend on the
    other rows. memory: of a Seq2Seq, one row for each prompt. ValueError for an empty or over-long
    prompt."""
    device, B, P = model.wte.weight.device, len(prompts), check_prompts(model, prompts, max_new_tokens)
    u = torch.tensor(np.stack([np.random.default_rng([seed, b]).random(max_new_tokens) for b in range(B)]))
    length, active = torch.tensor([len(prompt) for prompt in prompts]), torch.ones(B, dtype=torch.bool)
    cache = Cache(model, B, P + max_new_tokens, memory)
    output = step(model, *pad(prompts, device), cache, rule, route, exited_kv)
    logits, written = output.logits[torch.arange(B), length - 1], []
    exit_at, visited = [output.exit_at], [output.visited]
    for i in range(max_new_tokens):
        token = sample_token(next_token_probs(logits, temperature, top_k), u[:, i])
        written.append(torch.where(active, token, -1))
        active = active & (token != eos_id)
        if i + 1 == max_new_tokens or not active.any():
            break
        pos = torch.where(active, length + i, NO_POSITION).unsqueeze(1).to(device)
        output = step(model, token.unsqueeze(1).to(device), pos, cache, rule, route, exited_kv)
        logits = output.logits[:, 0]
        exit_at.append(output.exit_at)
        visited.append(output.visited)
    exit_at, visited = (torch.cat(steps, 1).cpu().numpy() for steps in (exit_at, visited))
    texts = []
    for b, (prompt, new) in enumerate(zip(prompts, torch.stack(written, 1).tolist(), strict=True)):
        new = [token for token in new if token >= 0]
        columns = [*range(len(prompt)), *range(P, P + len(new) - 1)]    # without the padding of the prompt
        texts.append(Generated(prompt + new, len(prompt), exit_at[b, columns], visited[b, columns]))
    return texts


def accept_or_resample(p, q, drafted, u):
    """Keep a drafted token with probability min(1, p / q), else draw one from the positive part of p - q:
    tokens then come as often as p says. p, q (V,), u two numbers uniform in [0,1) -> (kept?, token)."""
    if u[0] * q[drafted] < p[drafted]:
        return True, drafted
    return False, int(sample_token((p - q).clamp(min=0)[None], torch.tensor(u[1:])))


def check_drafts(model, draft_layers, draft_tokens):
    """ValueError if no tokens can be drafted with so many blocks."""
    early = model.classifiers.blocks[:-1]
    if draft_layers not in early or draft_tokens < 1:
        raise ValueError(f"cannot draft {draft_tokens} tokens at exit {draft_layers}: at least one token, "
                         f"at an early exit of this run: {', '.join(map(str, early)) or 'it has none'}")


class Speculation(NamedTuple):
    """What `speculate` did."""
    text: Generated
    drafted: int                # tokens proposed
    kept: int                   # of those


def run_blocks(model, x, blocks, cache, route):
    """These blocks (from 1) on all tokens of the cache's call, none of which exits: x (1,T,C) -> (1,T,C),
    visited (1,T,blocks). The states are kept in the cache."""
    live, visited = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), []
    for n in blocks:
        x, routing = run_block(model, n, x, live, cache, route)
        visited.append(routing.runs)
    cache.states[:, cache.start:cache.end] = x
    return x, torch.stack(visited, -1)


@torch.inference_mode()
def speculate(model, prompt, max_new_tokens, draft_layers, draft_tokens, route=causal, temperature=1.0,
              top_k=None, seed=0, eos_id=None, memory=None):
    """Continue one prompt as full depth would, in distribution (at temperature 0 token by token), but faster
    -> Speculation. Draft tokens with the first blocks and their classifier, run the other blocks on all of
    them at once, and keep those that agree (self-speculative decoding). Every state in the cache is a true
    one. ValueError for a prompt as in `generate`, or if block draft_layers is not an early exit."""
    check_drafts(model, draft_layers, draft_tokens)
    end, L = check_prompts(model, [prompt], max_new_tokens) + max_new_tokens, len(model.blocks)
    device, rng, cache = model.wte.weight.device, np.random.default_rng(seed), Cache(model, 1, end, memory)
    ids, visited, verified, drafted, kept = [*prompt], [], 0, 0, 0
    while len(ids) < end and (len(ids) == len(prompt) or ids[-1] != eos_id):
        first, q, low = len(ids), [], []
        drafts = min(draft_tokens, end - first - 1)
        for i in range(drafts + 1):                                         # the last one is only read
            unread = torch.tensor([ids[cache.end:]], device=device)
            cache.append(torch.arange(cache.end, len(ids), device=device).unsqueeze(0))
            x, ran = run_blocks(model, model.embed(unread), range(1, draft_layers + 1), cache, route)
            low.append(ran)
            if i < drafts:
                q.append(next_token_probs(model.classifiers(draft_layers, x[:, -1]), temperature, top_k))
                ids.append(int(sample_token(q[-1], torch.from_numpy(rng.random(1)))))
        cache.start = verified
        x = cache.states[:, verified:cache.end]
        x, high = run_blocks(model, x, range(draft_layers + 1, L + 1), cache, route)
        p = next_token_probs(model.classifiers(L, x[0, first - 1 - verified:]), temperature, top_k)
        drafted += drafts
        for i, u in enumerate(rng.random((drafts, 2))):
            same, token = accept_or_resample(p[i], q[i][0], ids[first + i], u)
            kept += same
            if not same or token == eos_id:
                ids[first + i:] = [token]
                break
        else:
            ids.append(int(sample_token(p[-1:], torch.from_numpy(rng.random(1)))))
        visited.append(torch.cat([torch.cat(low, 1), high], -1)[0, :len(ids) - 1 - verified])
        verified = len(ids) - 1                                             # the last token is unread
        cache.truncate(verified)
    text = Generated(ids, len(prompt), np.full(verified, L), torch.cat(visited).cpu().numpy())
    return Speculation(text, drafted, kept)


class BeamStep(NamedTuple):
    """One token that a beam search read, after the step number `parent` (-1: the first). All steps of the
    search for one prompt are a tree, whose paths are texts."""
    parent: int
    token: int
    log_prob: float             # of the text up to this token
    exit_at: int                # and what else `step` computed for it
    visited: list
    classified: int
    predicted: int


def computed_for(output):
    """StepOutput -> for every row a list over tokens of (exit_at, visited, classified, predicted)."""
    parts = output.exit_at, output.visited, output.classified, output.predicted
    return [list(zip(*row, strict=True)) for row in zip(*(part.tolist() for part in parts), strict=True)]


@torch.inference_mode()
def beam_search(model, prompts, max_new_tokens, rule, beam, route=causal, length_penalty=1.0, eos_id=None,
                memory=None, exited_kv="copy"):
    """The `beam` best continuations of every prompt -> for each a list of Generated, best first, and the
    BeamSteps of all its hypotheses.

    max_new_tokens: a number for each prompt. A step ranks all continuations of a prompt's hypotheses by
    summed log-probability: of the best `beam`, those that end in eos_id are finished; the best `beam` others
    go on. A prompt is done when `beam` hypotheses are finished, or at its last token, when the best `beam`
    count as they are. Finished hypotheses compare by log-probability / length^length_penalty, length being
    the new tokens, eos_id included. beam=1 is greedy decoding. Every hypothesis has its own exits."""
    P, V = check_prompts(model, prompts, max(max_new_tokens)), model.vocab_size
    device = model.wte.weight.device
    cache = Cache(model, len(prompts), P + max(max_new_tokens), memory)
    output = step(model, *pad(prompts, device), cache, rule, route, exited_kv)
    logits = output.logits[range(len(prompts)), [len(prompt) - 1 for prompt in prompts]]
    steps = [[BeamStep(t - 1, token, 0.0, *row[t]) for t, token in enumerate(prompt)]
             for prompt, row in zip(prompts, computed_for(output), strict=True)]
    beams = {b: [len(prompt) - 1] for b, prompt in enumerate(prompts)}      # last steps of prompts not done
    finished = [[] for _ in prompts]                                        # (log_prob, last step, token)
    for i in range(max(max_new_tokens)):
        totals = logits.new_tensor([[steps[b][n].log_prob for n in beams[b]] for b in beams]).unsqueeze(-1)
        totals = totals + to_float32(logits).log_softmax(-1).view(len(beams), -1, V)     # (prompts,w,V)
        ranked = [x.tolist() for x in totals.flatten(1).topk(min(2 * beam, totals[0].numel()))]
        rows, reading = [], []
        for first, (b, log_probs, places) in zip(range(0, len(logits), totals.size(1)),
                                                 zip(beams, *ranked, strict=True), strict=True):
            best, last = list(zip(log_probs, places, strict=True)), i + 1 == max_new_tokens[b]
            finished[b] += [(log_prob, beams[b][place // V], place % V) for log_prob, place in best[:beam]
                            if last or place % V == eos_id]
            if len(finished[b]) < beam and not last:
                others = [(log_prob, place) for log_prob, place in best if place % V != eos_id][:beam]
                rows += [first + place // V for _, place in others]
                reading += [(b, beams[b][place // V], place % V, log_prob) for log_prob, place in others]
        if not reading:
            break
        cache.reorder(rows)
        ids = torch.tensor([[token] for _, _, token, _ in reading], device=device)
        pos = torch.tensor([[len(prompts[b]) + i] for b, *_ in reading], device=device)
        output = step(model, ids, pos, cache, rule, route, exited_kv)
        logits, beams = output.logits[:, 0], {b: [] for b, *_ in reading}
        for (b, parent, token, log_prob), [computed] in zip(reading, computed_for(output), strict=True):
            beams[b].append(len(steps[b]))
            steps[b].append(BeamStep(parent, token, log_prob, *computed))
    return [(best_texts(*parts, beam, length_penalty), parts[-1])
            for parts in zip(prompts, finished, steps, strict=True)]


def best_texts(prompt, finished, steps, beam, length_penalty):
    """Finished hypotheses (log_prob, last step, token) -> the best `beam` Generated, best first."""
    texts = []
    for log_prob, number, token in finished:
        path = []
        while number >= 0:
            path.insert(0, steps[number])
            number = path[0].parent
        ids, length = [*(taken.token for taken in path), token], len(path) + 1 - len(prompt)
        exit_at, visited = (np.array(column) for column in list(zip(*path, strict=True))[3:5])
        texts.append(Generated(ids, len(prompt), exit_at, visited, log_prob / length**length_penalty))
    return sorted(texts, key=lambda text: -text.log_prob)[:beam]


@torch.inference_mode()
def translate(model, sources, eos_id, rule, beam=5, length_penalty=1.0, route=causal, exited_kv="copy"):
    """Lists of source ids, eos_id the last of each -> for each the best Generated, which begins with eos_id
    and has at most 2 S + 10 tokens for S of the source, and the BeamSteps of its search."""
    memory = model.encode(*pad(sources, model.wte.weight.device))
    longest = [min(2 * len(source) + 10, model.config.block_size - 1) for source in sources]
    results = beam_search(model, [[eos_id]] * len(sources), longest, rule, beam, route, length_penalty,
                          eos_id, memory, exited_kv)
    return [(texts[0], steps) for texts, steps in results]
