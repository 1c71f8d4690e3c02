"""Speed, as ratios within one run: python bench.py [--parts plain exits ...]. Keep the machine idle.

Works are timed in turns, in a new order every round, so that a slow moment of the machine hits all; shown are
the median and the middle half of the repeats. layers, FLOPs and bytes are counted ratios (cost.py; bytes as
for one text at a time); the one marked * is the ideal of the row, "share" is that over the measured ratio.

    train   steps and blocks: dense, routed, with many exits
    plain   one more token at full depth, against reading the weights and against Hugging Face's GPT-2
    exits   early exits, one text and many
    mod     routed blocks, by capacity
    run     a trained run (--run): its own mixtures of exits, and drafts at the lower half of its exits
    curves  time of a token against prefix, batch, depth and width
"""
import itertools
import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import cost
import decode
import run
from data.batches import Batch
from data.common import UserError, command, load_tokenizer
from exits import chosen, fixed_exit, full_depth, loss_and_gradient
from model import GPT, Block, GPTConfig, Now, Tokens, positions
from routing import Routed, causal, imitation_loss, kept, top_k


@dataclass
class Options:
    """Measure ratios of speed."""
    parts: tuple[Literal["train", "plain", "exits", "mod", "run", "curves"], ...] = (
        "train", "plain", "exits", "mod", "curves")
    n_layer: int = 12
    n_head: int = 6
    n_embd: int = 384
    vocab: int = 8192
    batch: int = 4
    block_size: int = 1024      # tokens of a sequence; some rows of `train` use a quarter
    repeats: int = 15
    run: str = ""               # for the part `run`: a run with exits
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: str = ""               # write the numbers to this JSON file
    figures: str = ""           # draw speed.png and curves.png here


# ----------------------------------------------------------------------------- measuring


def clock(work, device):
    getattr(torch, device.type).synchronize()
    began = time.perf_counter()
    work()
    getattr(torch, device.type).synchronize()
    return time.perf_counter() - began


def in_turns(works, repeats, device):
    """{name: function} -> {name: seconds (repeats,)}; one unmeasured round first. Every round has an order
    of its own, since a work takes longer after one that leaves the caches full of other things."""
    for work in works.values():
        clock(work, device)
    times, names, rng = {name: [] for name in works}, [*works], np.random.default_rng(0)
    for _ in range(repeats):
        for i in rng.permutation(len(names)):
            times[names[i]].append(clock(works[names[i]], device))
    return {name: np.array(t) for name, t in times.items()}


def quartiles(values):
    return [round(float(q), 4) for q in np.percentile(values, [25, 50, 75])]


def row(what, times, a, b=None, ideal="", counted=(0, 0, 0), curve=None):
    """A line of the table: time of a over b (turn by turn: lower quartile, median, upper) beside the counted
    ratios of layers, FLOPs and bytes, 0: none; ideal: which of them was promised. curve: (axis, x, line)."""
    found = {"what": what, **dict(zip(("layers", "flops", "bytes"), map(float, counted), strict=True)),
             "ideal": ideal, "time": quartiles(times[a] / times[b]) if b else None,
             "ms": quartiles(1e3 * times[a]), "curve": curve}
    found["share"] = found[ideal] / found["time"][1] if ideal else None
    return found


def work_of(model, prefix, exit_at, visited=None):
    """Blocks, FLOPs and bytes (3,) of reading the tokens that come after `prefix` others. exit_at: of all, or
    (T,) of each; visited (T,L): the blocks they ran, None for one token more that runs all below its exit."""
    config, found = model.config, []
    depth = np.broadcast_to(exit_at, prefix + 1 if visited is None else len(visited))
    ran = np.arange(config.n_layer) < depth[:, None] if visited is None else visited
    for T in (prefix, len(ran)):
        size = cost.decoding(config, model.vocab_size, ran[:T], depth[:T], copies="needed")
        found.append(np.array([ran[:T].sum(), size.flops, size.bytes]))
    return found[1] - found[0]


# ----------------------------------------------------------------------------- a plain model to compare with


class PlainBlock(nn.Module):
    """What most people write: one matrix for q, k and v, the causal kernel, no cache, nothing skipped."""

    def __init__(self, C, nh):
        super().__init__()
        self.nh, self.ln1, self.ln2 = nh, nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.nh, -1)).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln2(x))


class PlainGPT(nn.Module):
    def __init__(self, config, vocab):
        super().__init__()
        C = config.n_embd
        self.wte, self.wpe = nn.Embedding(vocab, C), nn.Embedding(config.block_size, C)
        self.blocks = nn.Sequential(*(PlainBlock(C, config.n_head) for _ in range(config.n_layer)))
        self.norm = nn.LayerNorm(C)

    def forward(self, ids):
        x = self.blocks(self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device)))
        return F.linear(self.norm(x), self.wte.weight)


# ----------------------------------------------------------------------------- training


def step(model, ids, targets):
    """Forward, all losses, backward, of our model."""
    at, ends, gradients = Tokens(positions(ids)), [], []
    for n, (h, visit) in enumerate(model.trunk(model.embed(ids), at), 1):
        if n in model.classifiers.blocks:
            gradients.append(loss_and_gradient(model.classifiers, n, h, targets, 1 / ids.numel())[2])
            ends.append(h)
        if visit.guess is not None:
            ends.append(imitation_loss(visit) / ids.numel())
            gradients.append(None)
    torch.autograd.backward(ends, gradients)
    model.zero_grad()


def peak(exits, o, vocab):
    """Bytes that one step, in a process of its own, adds to the most it ever held (one exit or all)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, exits, o, vocab).result()


def _peak(exits, o, vocab):
    run.device_of("cpu")
    T = o.block_size // 4
    config = GPTConfig(o.n_layer // 2, o.n_head, o.n_embd, block_size=T, routed="none", exits=exits)
    model = GPT(config, vocab)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = _most()
    step(model, *torch.randint(0, vocab, (2, o.batch, T)))
    return _most() - before


def _most():
    """The most memory that this process ever held, in bytes."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def train_part(o, device):
    """Dense against plain; one exit against many; routed against dense, whole steps and one block."""
    T = o.block_size // 4
    config = GPTConfig(o.n_layer, o.n_head, o.n_embd, block_size=T, routed="none", exits="last")
    ours, plain = GPT(config, o.vocab).to(device), PlainGPT(config, o.vocab).to(device)
    ids, targets = torch.randint(0, o.vocab, (2, o.batch, T), device=device)
    at, x = Tokens(positions(ids)), torch.randn(o.batch, T, o.n_embd, device=device, requires_grad=True)
    times = in_turns({"plain": lambda: plain.blocks[0](x).backward(x),
                      "ours": lambda: ours.blocks[0](x, at, Now(), top_k)[0].backward(x)},
                     3 * o.repeats, device)
    yield row(f"dense block there and back, {o.batch} x {T} tokens: over a plain one", times, "ours", "plain",
              "flops", (1, 1, 0))

    def plain_step():
        F.cross_entropy(plain(ids).flatten(0, 1), targets.flatten()).backward()
        plain.zero_grad()

    times = in_turns({"plain": plain_step, "ours": lambda: step(ours, ids, targets)}, o.repeats, device)
    yield row(f"dense step, {o.batch} x {T} tokens: over a plain one", times, "ours", "plain", "flops",
              (1, 1, 0))
    yield from many_exits(o, config, device)
    yield from routed_steps(o, device)
    yield from routed_blocks(o, device)


def many_exits(o, config, device):
    """Time at a vocabulary of 4,096, memory at 50,000."""
    T = config.block_size
    ids, targets = torch.randint(0, 4096, (2, o.batch, T), device=device)
    models = {e: GPT(replace(config, exits=e), 4096).to(device) for e in ("last", "all")}
    times = in_turns({e: (lambda m=m: step(m, ids, targets)) for e, m in models.items()}, o.repeats, device)
    flops = [cost.training(m.config, 4096, T) for m in models.values()]
    yield row(f"step with {config.n_layer} tied exits, vocabulary 4,096: over one exit", times, "all", "last",
              "flops", (1, flops[1] / flops[0], 0))
    if device.type == "cpu" and Path("/proc/self/status").exists():
        size = [peak(e, o, 50_000) for e in ("all", "last")]
        found = row(f"memory of a step, {o.n_layer // 2} blocks, vocabulary 50,000: all exits over one",
                    {"all": np.array([size[0]]), "last": np.array([size[1]])}, "all", "last")
        yield found | {"ms": [], "mb": [s / 1e6 for s in size]}


def routed_steps(o, device):
    """A whole step, 12.5 % of every other block: one sequence in two precisions, then several."""
    T = o.block_size
    configs = [GPTConfig(o.n_layer, o.n_head, o.n_embd, block_size=T, routed=routed, exits="last")
               for routed in ("none", "odd")]
    ids, targets = torch.randint(0, o.vocab, (2, o.batch, T), device=device)
    dense, mod = (GPT(config, o.vocab).to(device) for config in configs)
    flops = [cost.training(config, o.vocab, T) for config in configs]

    def work(model, B, dtype):
        with run.autocast(device, dtype):
            step(model, ids[:B], targets[:B])

    for B, dtype in ((1, "float32"), (1, "bfloat16"), (o.batch, "float32")):
        works = {"dense": lambda B=B, d=dtype: work(dense, B, d), "mod": lambda B=B, d=dtype: work(mod, B, d)}
        yield row(f"step, 12.5 % of every other block, {B} x {T} tokens, {dtype}: over dense",
                  in_turns(works, o.repeats, device), "mod", "dense", "flops", (0, flops[1] / flops[0], 0))


def routed_blocks(o, device):
    """Forward and backward of a routed block over a dense one, by capacity; router and predictor count."""
    T, C = o.block_size, o.n_embd
    x = torch.randn(1, T, C, device=device, requires_grad=True)
    at, capacities = Tokens(positions(x[..., 0])), (0.125, 0.25, 0.5, 1.0)
    blocks = {"dense": Block(C, o.n_head, T).to(device)}
    blocks |= {c: Routed(Block(C, o.n_head, T), C, c, hidden=C // 2).to(device) for c in capacities}

    def work(block):
        y, visit = block(x, at, Now(), top_k)
        loss = y.square().mean() + (0 if visit.guess is None else visit.guess.mean())
        loss.backward()

    times = in_turns({name: (lambda b=b: work(b)) for name, b in blocks.items()}, o.repeats, device)
    for c in capacities:
        k = kept(c, T)      # no saving is counted for the causal half
        flops = k * cost.block_flops(C, 4 * C, k) + T * cost.router_flops(GPTConfig(n_embd=C))
        flops /= T * cost.block_flops(C, 4 * C, T)
        yield row(f"routed block, capacity {c:g}, {T} tokens: over a dense one", times, c, "dense", "flops",
                  (c, flops, 0), ("capacity", c, "training, one block"))


# ----------------------------------------------------------------------------- decoding


def reader(model, B, prefix, rule, more=1, ids=None):
    """-> a function that reads `more` tokens, one by one, of B texts after `prefix` others (ids (B,T), or
    random), or fewer; from the prefix on again when there is no more room."""
    device, size = model.wte.weight.device, model.config.block_size
    ids = torch.randint(0, model.vocab_size, (B, size), device=device) if ids is None else ids
    pos, state, prefix = positions(ids).cpu(), {"t": ids.size(1)}, min(prefix, ids.size(1) - more)

    def go_on():
        t = state["t"]
        if t + more > ids.size(1):
            t, state["past"] = prefix, decode.Cache(model, *ids.shape)
            decode.read(model, ids[:, :t], pos[:, :t], state["past"], rule, causal)
        state["t"] = t + more
        for n in range(t, t + more):
            decode.read(model, ids[:, n:n + 1], pos[:, n:n + 1], state["past"], rule, causal)
    return go_on


def theirs(o, device, B, prefix):
    """The same for a GPT-2 of Hugging Face with its cache; None without their library."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    config = GPT2Config(vocab_size=o.vocab, n_positions=o.block_size, n_embd=o.n_embd, n_layer=o.n_layer,
                        n_head=o.n_head)
    model = GPT2LMHeadModel(config).to(device).eval()
    ids = torch.randint(0, o.vocab, (B, prefix), device=device)
    state = {"past_key_values": model(ids, use_cache=True).past_key_values}

    def one():
        state.update(past_key_values=model(ids[:, :1], use_cache=True, **state).past_key_values)
    return one


def gpt(o, device, **options):
    sizes = {"n_layer": o.n_layer, "n_head": o.n_head, "n_embd": o.n_embd, "block_size": o.block_size}
    return GPT(GPTConfig(**sizes | {"routed": "none"} | options), o.vocab).to(device).eval()


def gpt_mod(o, device, capacity):
    """Every other block routed, the predictors' thresholds set on random text so that capacity is kept."""
    model = gpt(o, device, routed="odd", capacity=capacity)
    ids = torch.randint(0, o.vocab, (4, min(256, o.block_size)), device=device)
    for n, (_, visit) in enumerate(model.states(Batch(ids, ids, positions(ids)))):
        if visit.guess is not None:
            model.blocks[n].predictor[-1].bias -= visit.guess.quantile(1 - capacity) - 1e-6
    return model


@torch.no_grad()
def plain_part(o, device):
    """One more token at full depth: against reading every weight once, and against Hugging Face's GPT-2."""
    model = gpt(o, device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    size = sum(p.numel() * p.element_size() for p in matrices)
    for B, prefix in ((1, 64), (1, 512), (16, 64), (16, 512)):
        works = {"weights": lambda: [p.sum() for p in matrices], "ours": reader(model, B, prefix, full_depth)}
        works["theirs"] = theirs(o, device, B, prefix)
        times = in_turns({k: w for k, w in works.items() if w}, o.repeats, device)
        moved = work_of(model, prefix, o.n_layer)[2] / size
        if B == 1:
            yield row(f"next token, prefix {prefix}: over reading all weights once ({size / 1e6:.0f} MB)",
                      times, "ours", "weights", "bytes", (1, 0, moved))
        if works["theirs"]:
            yield row(f"next token, {B} rows, prefix {prefix}: over Hugging Face's GPT-2", times, "ours",
                      "theirs", counted=(1, 1, 1))


def mixed_work(model, prefix, more=400):
    """As work_of, on average over exits spread evenly over the blocks, late copies included; of many texts at
    once, whose bytes are not counted."""
    L = model.config.n_layer
    depth = np.random.default_rng(0).integers(1, L + 1, prefix + more)
    return work_of(model, prefix, depth, np.arange(L) < depth[:, None]) / more * [1, 1, 0]


@torch.no_grad()
def exits_part(o, device):
    """All exit at one block, against a model that has no more blocks, and against full depth; then many rows
    at once, exits spread evenly over the blocks, some tokens at a time since late copies come in fits."""
    model, prefix, L = gpt(o, device), 128, o.n_layer
    for e in sorted({max(1, L * i // 6) for i in range(1, 7)}):
        small = gpt(o, device, n_layer=e)
        small.load_state_dict(model.state_dict(), strict=False, assign=True)     # the same memory
        times = in_turns({"exit": reader(model, 1, prefix, fixed_exit(e)),
                          "small": reader(small, 1, prefix, full_depth),
                          "full": reader(model, 1, prefix, full_depth)}, o.repeats, device)
        yield row(f"all exit at {e}: over a model of {e} blocks", times, "exit", "small", "bytes", (1, 1, 1))
        yield row(f"all exit at {e}: over full depth", times, "exit", "full", "bytes",
                  work_of(model, prefix, e) / work_of(model, prefix, L), ("exit", e, "all exit at one block"))
    B, more = 16, 8
    for prefix in (64, 256):
        spread = chosen(torch.randint(1, L + 1, (B, o.block_size), device=device))
        times = in_turns({"spread": reader(model, B, prefix, spread, more),
                          "nobody": reader(model, B, prefix, fixed_exit(L), more),
                          "full": reader(model, B, prefix, full_depth, more)}, o.repeats, device)
        yield row(f"next {more} of {B} rows, prefix {prefix}, exits spread evenly: over full depth", times,
                  "spread", "full", "flops", mixed_work(model, prefix) / work_of(model, prefix, L))
        yield row(f"next {more} of {B} rows, prefix {prefix}, a rule but nobody exits: over full depth",
                  times, "nobody", "full", "flops", (1, 1, 0))


@torch.no_grad()
def mod_part(o, device):
    """Routed blocks in every other place, by capacity; 16 tokens at a time, since one may run all or none."""
    dense, prefix, more = gpt(o, device), 128, 16
    for capacity in (0.125, 0.25, 0.5, 1.0):
        model = gpt_mod(o, device, capacity)
        ids = torch.randint(0, o.vocab, (1, prefix + more * (o.repeats + 1)), device=device)
        ran = decode.read(model, ids, positions(ids), None, full_depth, causal).visited[0].cpu().numpy()
        size = [work_of(m, prefix, o.n_layer, v) for m, v in ((model, ran), (dense, np.ones_like(ran)))]
        times = in_turns({"mod": reader(model, 1, prefix, full_depth, more, ids),
                          "dense": reader(dense, 1, prefix, full_depth, more, ids)}, o.repeats, device)
        yield row(f"next {more}, {capacity:.1%} of every other block: over dense", times, "mod", "dense",
                  "bytes", size[0] / size[1], ("capacity", capacity, "decoding, every other block"))


@torch.no_grad()
def curves_part(o, device):
    """One more token at full depth, with all exits at a third of the blocks, and with routed blocks, against
    prefix, batch, depth and width."""
    def point(axis, x, B=1, prefix=128, **shape):
        sized = replace(o, **shape)
        model, mod, e = gpt(sized, device), gpt_mod(sized, device, 0.125), max(1, sized.n_layer // 3)
        times = in_turns({"full": reader(model, B, prefix, full_depth),
                          "exit": reader(model, B, prefix, fixed_exit(e)),
                          "mod": reader(mod, B, prefix, full_depth)}, o.repeats, device)
        full = work_of(model, prefix, sized.n_layer)
        yield row(f"{axis} {x}: full depth", times, "full", curve=(axis, x, "full depth"))
        yield row(f"{axis} {x}: all exit at {e}, over full depth", times, "exit", "full",
                  "bytes" if B == 1 else "flops", work_of(model, prefix, e) / full,
                  (axis, x, "all exit at a third of the blocks"))
        yield row(f"{axis} {x}: 12.5 % of every other block, over full depth", times, "mod", "full",
                  counted=(0.5625, 0, 0), curve=(axis, x, "12.5 % in every other block"))

    for prefix in (32, 128, 512, 960):
        yield from point("prefix", min(prefix, o.block_size - 8), prefix=min(prefix, o.block_size - 8))
    for B in (1, 4, 16):
        yield from point("batch", B, B)
    for L in (4, 8, 16):
        yield from point("depth", L, n_layer=L)
    for C in (192, 384, 768):
        yield from point("width", C, n_embd=C, n_head=C // 64)


@torch.no_grad()
def run_part(o, device):
    """A trained GPT with exits: what its own mixture costs against what the same exits cost unmixed, and
    lossless drafts from the lower half of its exits."""
    if not o.run:
        raise UserError("the part `run` needs a trained run: --run runs/001")
    folder, trained, _, model = run.open_run(o.run, device=o.device)
    if trained.translate or trained.model.exits != "all":
        raise UserError(f"{folder} is not a GPT with exits")
    L, encoding = trained.model.n_layer, load_tokenizer(folder / "tokenizer.json")
    prompt = encoding.encode_ordinary(run.read_json(folder / "meta.json", "prompt"))
    P, size = len(prompt), trained.model.block_size
    text = decode.generate(model, [prompt], size - P, full_depth, top=50)[0].ids
    ids = torch.tensor([text], device=device)
    names = [f"confidence:{t}" for t in (0.3, 0.6, 0.9)] + ["learned"] * (model.halting is not None)
    yield from mixtures(o, device, model, ids, P, {n: run.rule_of(n, trained, model) for n in names})
    new = min(64, size - P - 1)
    works, kept_of = {"full": lambda: [decode.generate(model, [prompt], new, full_depth, top=50, seed=s)
                                       for s in range(4)]}, {}
    for E, ahead in itertools.product(range(1, L // 2 + 1), (2, 4, 6)):
        def work(E=E, ahead=ahead):
            found = [decode.speculate(model, prompt, new, E, ahead, top=50, seed=s) for s in range(4)]
            kept_of[E, ahead] = sum(f.kept for f in found) / sum(f.drafted for f in found)
        works[E, ahead] = work
    times = in_turns(works, o.repeats, device)
    for (E, ahead), share in kept_of.items():
        yield row(f"{folder.name}: {ahead} tokens drafted with {E} blocks, {share:.0%} kept: over full depth",
                  times, (E, ahead), "full")


def mixtures(o, device, model, ids, P, rules):
    """Reading ids (1,T), the first P at once and then token by token. Calibrated: a token that leaves at e
    costs what it does if all leave at e, a look what full depth gains in time if every classifier is read,
    and all late copies of a block, made at once, what queries, keys and values of one token cost alone."""
    def look(seen):
        seen.read()
        return full_depth(seen)

    L, T, x = len(model.blocks), ids.size(1), model.embed(ids[:, :1])
    works = {e: reader(model, 1, P, fixed_exit(e), T - P, ids) for e in range(1, L + 1)}
    works |= {name: reader(model, 1, P, rule, T - P, ids) for name, rule in rules.items()}
    works["look"] = reader(model, 1, P, look, T - P, ids)
    block, at = decode.bare(model).blocks[0], Tokens(positions(x[..., 0]))          # as decoding calls it
    block = getattr(block, "block", block)
    works["copy"] = lambda: [block.attn.heads(block.attn.qkv(block.ln1(x)), at) for _ in range(T - P)]
    times = in_turns(works, o.repeats, device)
    for name, rule in rules.items():
        found = decode.read(model, ids, positions(ids), None, rule, causal)
        exit_at, visited = found.exit_at[0].cpu().numpy(), found.visited[0].cpu().numpy()
        pending = cost.along(visited, cost.dense_blocks(model.config), np.arange(-1, T - 1))[1][P:]
        exit_at, copies = exit_at[P:], (pending > 0).sum()
        seen = (exit_at - 1).sum() if name.startswith("confidence") else 0
        times["ideal"] = sum(times[e] * (exit_at == e).mean() for e in range(1, L + 1)) \
            + (times["look"] - times[L]) * seen / (L - 1) / (T - P) + times["copy"] * copies / (T - P)
        what = f"{name}, mean exit {exit_at.mean():.2f} of {L}: over"
        yield row(f"{what} the same exits unmixed, looks, copies", times, name, "ideal")
        yield row(f"{what} full depth", times, name, L, "layers", (exit_at.mean() / L, 0, 0))


PARTS = {"train": train_part, "plain": plain_part, "exits": exits_part, "mod": mod_part, "run": run_part,
         "curves": curves_part}


# ----------------------------------------------------------------------------- showing


def shown(found):
    """A row of the table, as text."""
    counted = [f"{found[k]:.3f}{'*' * (k == found['ideal'])}" if found[k] else ""
               for k in ("layers", "flops", "bytes")]
    time_ = "{1:.3f} ({0:.3f}-{2:.3f})".format(*found["time"]) if found["time"] else ""
    share = f"{found['share']:.2f}" if found["share"] else ""
    ms = f"{found['ms'][1]:.1f}" if found["ms"] else ""
    return f"| {found['what']} | {' | '.join(counted)} | {time_} | {share} | {ms} |"


def draw(rows, folder):
    """speed.png: what exits and capacity save. curves.png: time of a token."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    axes = {"speed": {"exit": "blocks run by every token", "capacity": "capacity"},
            "curves": {"prefix": "tokens before", "batch": "texts at once", "depth": "blocks",
                       "width": "channels"}}
    there = {r["curve"][0] for r in rows if r["curve"]}
    for name, panels in axes.items():
        if not there >= {*panels}:
            continue
        fig, places = plt.subplots(1, len(panels), figsize=(3.8 * len(panels), 3.6))
        for ax, (axis, label) in zip(places, panels.items(), strict=True):
            lines = {}
            for r in rows:
                if r["curve"] and r["curve"][0] == axis:
                    lines.setdefault(r["curve"][2], []).append(r)
            for color, (line, found) in zip(plt.cm.tab10(range(10)), lines.items(), strict=False):
                x = [r["curve"][1] for r in found]
                low, middle, high = zip(*(r["time" if name == "speed" else "ms"] for r in found), strict=True)
                ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
                ax.plot(x, middle, "o-", color=color, label=line, ms=4)
                ax.set_xticks(x, [f"{v:g}" for v in x], fontsize=7)
                if name == "speed":
                    ax.plot(x, [r[r["ideal"]] for r in found], "--", color=color, lw=1)
            ax.set(xlabel=label, ylim=(0, None))
            ax.grid(color="#e6e6e6")
            if name == "speed" or ax is places[0]:
                ax.legend(frameon=False, fontsize=8)
        places[0].set_ylabel("time / all blocks (dashed: promised)" if name == "speed" else "ms for one more")
        fig.savefig(Path(folder) / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(fig)


@command
def main(argv=None):
    o = run.parse(argv, Options)
    device = run.device_of(o.device)
    torch.manual_seed(0)
    header = {**run.environment(device), "system": platform.system(), "options": vars(o)}
    print("{device}, {threads} threads, torch {torch}, commit {commit}".format(**header)
          + f", {o.repeats} repeats in turns\n")
    print("| what | layers | FLOPs | bytes | time (middle half) | share | ms |\n" + "|---" * 7 + "|")
    rows = []
    for part in o.parts:
        for found in PARTS[part](o, device):
            rows.append(found | {"part": part})
            print(shown(found), flush=True)
            if o.out:
                text = json.dumps({"command": "bench.py", **header, "rows": rows}, indent=1)
                run.write_text(Path(o.out), text + "\n")
    if o.figures:
        Path(o.figures).mkdir(parents=True, exist_ok=True)
        draw(rows, o.figures)


if __name__ == "__main__":
    main()
