"""Decoding: a cache with holes, one step for prompts and single tokens, sampling, beam search.

The papers differ in what a token that does not run a block leaves behind: an exited token has keys and values
of its copied state in the dense blocks above [DAT 2], a token that skips a routed block has none [MoD 3.5].

Synchronisations with the device in a step: one for each block under a halting rule (is any token live?),
one for each routed block (two if a token runs it) or block with experts, one for the exits and for logits.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data.batches import pad_rows, positions_of
from data.common import UserError
from exits import ExitState, full_depth, to_float32, token_losses
from routing import NO_POSITION, ROUTES, causal, confusion, report


class LayerCache:
    """Keys and values of one block for B texts: kv (2,B,nh,size,hs) and pos (B,size), of each row the first
    `used` slots; the others hold NO_POSITION. memory_kv (2,B,nh,S,hs): of the encoder output. upto: column of
    the Cache up to which tokens have keys and values here, in a dense block."""

    def __init__(self, cache, routed):
        self.cache, self.routed, self.upto = cache, routed, 0
        self.kv, self.pos, self.used = None, cache.pos[:, :0], [0] * len(cache.pos)
        self.memory_kv = None

    def with_pending(self, x, pos):
        """x (B,T,C), pos (B,T) of this call -> (B,P+T,C), (B,P+T): before them, in a dense block, the copied
        states of tokens that exited below it and have no keys and values here yet [DAT 2]."""
        cache, pending = self.cache, slice(self.upto, self.cache.start)
        if self.routed or pending.start >= pending.stop:
            return x, pos
        return torch.cat([cache.states[:, pending], x], 1), torch.cat([cache.pos[:, pending], pos], 1)

    def append(self, k, v, pos):
        """k, v (B,nh,P+T,hs) at pos (B,P+T) -> those of all tokens so far (B,nh,M,hs), their pos (B,M)."""
        B, T = pos.shape        # here with the P pending ones
        if self.kv is None:
            self.kv = k.new_zeros(2, *k.shape[:2], 0, k.size(-1))
        if (missing := max(self.used) + T - self.kv.size(3)) > 0:   # grow by doubling: copies the buffers
            more = max(missing, self.kv.size(3), 64)
            self.kv = F.pad(self.kv, (0, 0, 0, more))
            self.pos = F.pad(self.pos, (0, more), value=NO_POSITION)
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

    def reorder(self, rows):
        self.kv = None if self.kv is None else self.kv[:, rows]
        self.memory_kv = None if self.memory_kv is None else self.memory_kv[:, rows]
        self.pos, self.used = self.pos[rows], [self.used[b] for b in rows]


class Cache:
    """What a model remembers of B texts of at most `size` tokens, padding included. A call appends columns
    start to end of pos (B,size) and states (B,size,C), the last state of every token. memory: the encoder
    output of a Seq2Seq. ValueError if the model is in training mode."""

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
    predicted: torch.Tensor     # (B,T) exit predictions that the token read
    weight: torch.Tensor        # (B,T,L) router weights; nan in dense blocks and above the last that ran


def run_block(model, n, x, live, cache, route, exited_kv="copy"):
    """Block n (from 1) on the tokens of the cache's call: x (B,T,C), live (B,T) -> (x, Routing).

    exited_kv="compute": the P tokens of earlier calls that exited below run it too, before the T of this
    call, all of which run, exited or not. The Routing then has P + T tokens."""
    block, layer, first = model.blocks[n - 1], cache.layers[n - 1], cache.start
    if exited_kv == "compute":
        first, layer.upto = min(first, layer.upto), first       # so with_pending adds none
        x = torch.cat([cache.states[:, first:cache.start], x], 1)
        live = cache.pos[:, first:cache.end] < NO_POSITION
    x, routing = block(x, cache.pos[:, first:cache.end], live, layer, cache.memory, route)
    layer.upto = cache.end
    if P := cache.start - first:
        cache.states[:, first:cache.start] = x[:, :P]
    return x[:, P:], routing


@torch.inference_mode()
def step(model, ids, pos, cache, rule, route=causal, exited_kv="copy"):
    """Run the tokens ids (B,T) at pos (B,T) under a halting and a routing rule -> StepOutput. cache None: a
    GPT scores a text by itself. Calls come in order of position. ValueError if the cache is full.

    One call of T tokens equals T calls of one, under rules that look at one token: block n reads states after
    block n - 1, which stay where a token has exited [DAT 2]. A block runs all rows while one token is live.
    exited_kv: what later tokens see of an exited one in the blocks above: "copy", keys and values of its
    copied state, as in the paper, or "compute", its true ones (`visited` is what it ran to be emitted)."""
    cache, L = cache or Cache(model, *pos.shape), len(model.blocks)
    cache.append(pos)
    x, pos = model.embed(ids), cache.pos[:, cache.start:cache.end]
    live, exit_at, none = pos < NO_POSITION, torch.full_like(pos, L), torch.zeros_like(pos, dtype=torch.bool)
    this_call = slice(-pos.size(1), None)       # of a Routing, without pending tokens
    visited, worked, weight = [none] * L, [none] * L, [torch.where(none, 0.0, torch.nan)] * L
    state = ExitState(model.classifiers, pos, live, cache.memory)
    for n in range(1, L + 1):
        x, routing = run_block(model, n, x, live, cache, route, exited_kv)
        state.states.append(x)
        visited[n - 1] = worked[n - 1] = live & routing.runs[:, this_call]
        if routing.worked is not None:
            worked[n - 1] = visited[n - 1] & routing.worked[:, this_call]
        if routing.weight is not None:
            weight[n - 1] = routing.weight[:, this_call].float()
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


def evaluate_loss(model, batches, context, stop=(), route="top_k"):
    """Batches under teacher forcing at full depth -> {"loss": {routing rule: [nats per token of each exit]}};
    with routed blocks also "predictor", how well the causal logit predicts the choice of the rule `route`.
    None if `stop` became true."""
    device, result, m = model.wte.weight.device, {"loss": {}}, model.eval().config
    for name in ROUTES if m.routed_blocks() or m.experts else ["top_k"]:
        losses, counts = torch.zeros(len(model.classifiers.blocks), dtype=torch.float64), torch.zeros(4)
        for i, batch in enumerate(batches):
            if stop:
                return None
            torch.manual_seed(i)        # the random control draws the same for batch i in every evaluation
            batch, exits = batch.to(device), []
            with torch.no_grad(), context:
                for n, (h, routing) in enumerate(model.run_batch(batch, ROUTES[name]), 1):
                    if n in model.classifiers.blocks:
                        exits.append(token_losses(model.classifiers(n, h), batch.targets).sum())
                    if routing.logit is not None:
                        counts += confusion(routing, batch.mask).cpu()
            losses += torch.stack(exits).cpu()
        result["loss"][name] = (losses / sum(batch.count for batch in batches)).tolist()
        if name == route and m.routed_blocks():
            result["predictor"] = report(counts)
    return result


def pad(rows, device):
    """Lists of token ids of any lengths -> ids, pos (B,T), padded on the right, NO_POSITION at padding."""
    lengths = list(map(len, rows))
    return pad_rows(rows, lengths, 0).to(device), positions_of(lengths).to(device)


def next_token_probs(logits, temperature, top_k=None):
    """logits (B,V) -> probabilities (B,V) in float64 on the CPU. temperature 0: 1 for the most likely token;
    top_k (not the routing rule): without tokens less likely than the k-th (None: all)."""
    logits = logits.cpu().double()      # in this order: MPS has no float64
    if not (logits.amax(-1) < torch.inf).all():         # nan compares as False
        raise UserError("the logits are not finite: this model has diverged in training")
    if temperature < 1e-30:     # or logits / temperature overflow
        return F.one_hot(logits.argmax(-1), logits.size(-1)).double()
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return (logits / temperature).softmax(-1)


def sample_token(probs, u):
    """probs (B,V), of any sum, and u (B,) uniform in [0,1) -> token (B,)."""
    below = probs.cumsum(-1)
    return torch.searchsorted(below, u.unsqueeze(1).to(below) * below[:, -1:], right=True).squeeze(1)


COUNTED = "exit_at", "visited", "worked", "classified", "predicted"     # what a Generated keeps of StepOutput


class Generated(NamedTuple):
    """One text. Entry j of the arrays is about reading ids[j] and predicting ids[j + 1]."""
    ids: list[int]              # prompt and continuation, an end token included
    prompt: int                 # tokens of the prompt
    exit_at: np.ndarray         # (len(ids) - 1,) in 1..L
    visited: np.ndarray         # (len(ids) - 1, L) bool
    worked: np.ndarray          # this and the next two as in StepOutput
    classified: np.ndarray
    predicted: np.ndarray
    log_prob: float = math.nan  # of a translation: log-probability / length^length_penalty


def generate(model, prompts, max_new_tokens, rule, route=causal, temperature=1.0, top_k=None, seed=0,
             eos_id=None, memory=None, exited_kv="copy"):
    """Continue every prompt (a list of ids) by at most max_new_tokens, all rows at once -> [Generated].

    A row stops at token eos_id. Row b draws from default_rng([seed, b]), whatever the other rows are. memory:
    of a Seq2Seq, one row for each prompt. UserError for an empty or over-long prompt."""
    device, B, P = model.wte.weight.device, len(prompts), max(map(len, prompts), default=0)
    if not prompts or not all(prompts):
        raise UserError("an empty prompt: give at least one token")
    if max_new_tokens < 1 or P + max_new_tokens > model.config.block_size:
        raise UserError(f"a prompt of {P} tokens leaves no room for {max_new_tokens} new ones (at least 1): "
                        f"the context is {model.config.block_size}")
    u = torch.tensor(np.stack([np.random.default_rng([seed, b]).random(max_new_tokens) for b in range(B)]))
    length, active = torch.tensor([len(prompt) for prompt in prompts]), torch.ones(B, dtype=torch.bool)
    cache = Cache(model, B, P + max_new_tokens, memory)
    outputs, written = [step(model, *pad(prompts, device), cache, rule, route, exited_kv)], []
    logits = outputs[0].logits[torch.arange(B), length - 1]
    for i in range(max_new_tokens):
        token = sample_token(next_token_probs(logits, temperature, top_k), u[:, i])
        written.append(torch.where(active, token, -1))
        active = active & (token != eos_id)         # always, if eos_id is None
        if i + 1 == max_new_tokens or not active.any():
            break
        pos = torch.where(active, length + i, NO_POSITION).unsqueeze(1).to(device)
        outputs.append(step(model, token.unsqueeze(1).to(device), pos, cache, rule, route, exited_kv))
        logits = outputs[-1].logits[:, 0]
    counted = {name: torch.cat([getattr(output, name) for output in outputs], 1).cpu().numpy()
               for name in COUNTED}
    texts = []
    for b, (prompt, new) in enumerate(zip(prompts, torch.stack(written, 1).tolist(), strict=True)):
        new = [token for token in new if token >= 0]
        columns = [*range(len(prompt)), *range(P, P + len(new) - 1)]    # without the padding of the prompt
        of_text = {name: array[b, columns] for name, array in counted.items()}
        texts.append(Generated(prompt + new, len(prompt), **of_text))
    return texts


@torch.inference_mode()
def translate(model, sources, eos_id, rule, beam=5, length_penalty=1.0, route=causal, exited_kv="copy"):
    """Beam search: lists of source ids, eos_id the last of each -> for each the best Generated, which begins
    with eos_id and has at most min(2 S + 10, block_size - 1) new tokens, S being those of the source.

    A step ranks all continuations of a source's hypotheses by summed log-probability: of the best `beam`,
    those that end in eos_id are finished; the best `beam` others go on. A source is done when `beam`
    hypotheses are finished, or at that limit, where the best `beam` count as finished. Finished ones
    compare by log-probability / length^length_penalty, length being the new tokens, eos_id included."""
    device, V = model.wte.weight.device, model.vocab_size
    longest = [min(2 * len(source) + 10, model.config.block_size - 1) for source in sources]
    cache = Cache(model, len(sources), max(longest), model.encode(*pad(sources, device)))
    ids, log_prob = torch.full((len(sources), 1), eos_id, device=device), 0.0       # of every hypothesis
    history = {name: [] for name in COUNTED}
    todo, finished = list(range(len(sources))), [[] for _ in sources]
    for length in range(1, max(longest) + 1):
        pos = torch.full((len(ids), 1), length - 1, device=device)
        output = step(model, ids[:, -1:], pos, cache, rule, route, exited_kv)
        history = {name: torch.cat([*past, getattr(output, name)], 1) for name, past in history.items()}
        scores = log_prob + to_float32(output.logits[:, 0]).log_softmax(-1)         # (hypotheses,V)
        scores = scores.view(len(todo), -1)
        best, places = scores.topk(min(2 * beam, scores.size(1)))
        if not (best[:, 0] < torch.inf).all():          # nan compares as False
            raise UserError("the scores are not finite: this model has diverged in training")
        rows = places // V + torch.arange(len(todo), device=device).unsqueeze(1) * (len(ids) // len(todo))
        going = []              # (source, row, token, log-probability) of the next step's hypotheses
        for b, *ranked in zip(todo, rows.tolist(), (places % V).tolist(), best.tolist(), strict=True):
            others = []
            for rank, (row, token, value) in enumerate(zip(*ranked, strict=True)):
                if token != eos_id:
                    others.append((b, row, token, value))
                if rank < beam and (token == eos_id or length == longest[b]):
                    counted = {name: past[row].cpu().numpy() for name, past in history.items()}
                    finished[b].append(Generated([*ids[row].tolist(), token], 1, **counted,
                                                 log_prob=value / length**length_penalty))
            if len(finished[b]) < beam and length < longest[b]:
                going += others[:beam]
        if not going:
            break
        sources_of, rows, tokens, values = map(list, zip(*going, strict=True))
        todo = list(dict.fromkeys(sources_of))
        cache.reorder(rows)
        ids = torch.cat([ids[rows], torch.tensor(tokens, device=device).unsqueeze(1)], 1)
        log_prob = scores.new_tensor(values).unsqueeze(1)
        history = {name: [past[rows]] for name, past in history.items()}
    return [max(texts, key=lambda text: text.log_prob) for texts in finished]
