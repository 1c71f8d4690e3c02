"""Speed, as ratios within one run: python bench.py [--parts plain exits ...]. Keep the machine idle.

Every pair is timed in turns (a, b, a, b, ...), so that a slow moment of the machine hits both; shown are the
median and the middle half of the repeats. "share of the ideal" is the ratio that counting operations promises
over the ratio that was measured: 1 is all of it.
"""
import itertools
import json
import platform
import time
from dataclasses import dataclass
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
from data.common import command
from exits import chosen, fixed_exit, full_depth, loss_and_gradient
from model import GPT, Block, GPTConfig, Now, Tokens, positions
from routing import Routed, causal, kept, top_k


@dataclass
class Options:
    """Measure ratios of speed."""
    parts: tuple[Literal["train", "routed", "plain", "exits", "mod"], ...] = (
        "train", "routed", "plain", "exits", "mod")
    n_layer: int = 12
    n_head: int = 6
    n_embd: int = 384
    vocab: int = 8192
    batch: int = 4
    block_size: int = 1024      # tokens of a sequence; `train` uses a quarter
    repeats: int = 15
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: str = ""               # write the numbers to this JSON file


# ----------------------------------------------------------------------------- measuring


def clock(work, device):
    getattr(torch, device.type).synchronize()
    began = time.perf_counter()
    work()
    getattr(torch, device.type).synchronize()
    return time.perf_counter() - began


def in_turns(works, repeats, device):
    """{name: function} -> {name: seconds (repeats,)}; one unmeasured round first."""
    for work in works.values():
        clock(work, device)
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work, device))
    return {name: np.array(t) for name, t in times.items()}


def quartiles(values):
    return [round(float(q), 4) for q in np.percentile(values, [25, 50, 75])]


def row(what, flops, times, a, b):
    """A line of the table: flops and time of a over b (time turn by turn: lower quartile, median, upper)."""
    ms = quartiles(1e3 * times[a])
    return {"what": what, "flops": flops, "time": quartiles(times[a] / times[b]), "ms": ms}


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


# ----------------------------------------------------------------------------- the three parts


def train_part(o, device):
    """A dense block, then a dense training step (forward, loss, backward), against the plain ones."""
    T = o.block_size // 4
    config = GPTConfig(o.n_layer, o.n_head, o.n_embd, block_size=T, routed="none", exits="last")
    ours, plain = GPT(config, o.vocab).to(device), PlainGPT(config, o.vocab).to(device)
    ids, targets = torch.randint(0, o.vocab, (2, o.batch, T), device=device)
    at = Tokens(positions(ids))

    x = torch.randn(o.batch, T, o.n_embd, device=device, requires_grad=True)
    blocks = {"plain": lambda: plain.blocks[0](x).backward(x),
              "nanodepth": lambda: ours.blocks[0](x, at, Now(), top_k)[0].backward(x)}
    times = in_turns(blocks, 3 * o.repeats, device)
    yield row(f"dense block there and back, width {o.n_embd}, {o.batch} x {T} tokens: nanodepth / plain",
              1.0, times, "nanodepth", "plain")

    def plain_step():
        F.cross_entropy(plain(ids).flatten(0, 1), targets.flatten()).backward()
        plain.zero_grad()

    def our_step():
        for n, (h, _) in enumerate(ours.trunk(ours.embed(ids), at), 1):
            if n == o.n_layer:
                h.backward(loss_and_gradient(ours.classifiers, n, h, targets, 1 / ids.numel())[2])
        ours.zero_grad()

    times = in_turns({"plain": plain_step, "nanodepth": our_step}, o.repeats, device)
    yield row(f"dense training step, {o.n_layer} x {o.n_embd}, {o.batch} x {T} tokens: nanodepth / plain",
              1.0, times, "nanodepth", "plain")


def routed_part(o, device):
    """Forward and backward of a routed block over a dense one, by capacity; router and predictor count."""
    T, C = o.block_size, o.n_embd
    x = torch.randn(1, T, C, device=device, requires_grad=True)
    at = Tokens(torch.arange(T, device=device)[None])
    capacities = (0.125, 0.25, 0.5, 1.0)
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
        yield row(f"routed block, capacity {c:g}, {T} tokens, width {C}: routed / dense",
                  flops, times, c, "dense")


# ----------------------------------------------------------------------------- decoding


def reader(model, B, prefix, rule, more=1):
    """-> a function that reads `more` tokens, one by one, of B texts of `prefix` random tokens before."""
    ids = torch.randint(0, model.vocab_size, (B, model.config.block_size), device=model.wte.weight.device)
    past, pos, t = decode.Cache(model, *ids.shape), positions(ids), itertools.count(prefix)
    decode.read(model, ids[:, :prefix], pos[:, :prefix], past, rule, causal)

    def go_on():
        for n in itertools.islice(t, more):
            decode.read(model, ids[:, n:n + 1], pos[:, n:n + 1], past, rule, causal)
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


def last_token(model, exit_at, prefix):
    """Bytes that the token after `prefix` others moves, if all leave at exit_at."""
    config, size = model.config, []
    for T in (prefix, prefix + 1):
        depth = np.full(T, exit_at)
        visited = np.arange(config.n_layer) < depth[:, None]
        size.append(cost.decoding(config, model.vocab_size, visited, depth, copies="needed").bytes)
    return size[1] - size[0]


@torch.no_grad()
def plain_part(o, device):
    """One more token at full depth: against reading every weight once, and against Hugging Face's GPT-2."""
    model = gpt(o, device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    size = sum(p.numel() * p.element_size() for p in matrices)
    for B, prefix in ((1, 64), (1, 512), (16, 64)):
        works = {"weights": lambda: [p.sum() for p in matrices], "ours": reader(model, B, prefix, full_depth)}
        works["theirs"] = theirs(o, device, B, prefix)
        times = in_turns({k: w for k, w in works.items() if w}, o.repeats, device)
        if B == 1:
            yield row(f"next token, prefix {prefix}: over reading all weights once ({size / 1e6:.0f} MB)",
                      1.0, times, "ours", "weights")
        if works["theirs"]:
            yield row(f"next token, {B} rows, prefix {prefix}: over Hugging Face's GPT-2", None, times,
                      "ours", "theirs")


@torch.no_grad()
def exits_part(o, device):
    """Early exits, all at one block, against a model that has no more blocks, and against full depth; then of
    many rows at once, spread evenly over the blocks."""
    model, prefix = gpt(o, device), 128
    for e in sorted({o.n_layer // 6, o.n_layer // 3, o.n_layer // 2} - {0}):
        small = gpt(o, device, n_layer=e)
        small.load_state_dict(model.state_dict(), strict=False)
        times = in_turns({"exit": reader(model, 1, prefix, fixed_exit(e)),
                          "small": reader(small, 1, prefix, full_depth),
                          "full": reader(model, 1, prefix, full_depth)}, o.repeats, device)
        yield row(f"all exit at {e}: over a model of {e} blocks", 1.0, times, "exit", "small")
        ideal = last_token(model, e, prefix) / last_token(model, o.n_layer, prefix)
        yield row(f"all exit at {e}: over full depth, ideal by bytes", ideal, times, "exit", "full")
    B = 16
    for prefix in (64, 256):
        spread = chosen(torch.randint(1, o.n_layer + 1, (B, o.block_size), device=device))
        times = in_turns({"spread": reader(model, B, prefix, spread),
                          "nobody": reader(model, B, prefix, fixed_exit(o.n_layer)),
                          "full": reader(model, B, prefix, full_depth)}, o.repeats, device)
        yield row(f"{B} rows, prefix {prefix}, exits spread evenly: over full depth, ideal by FLOPs",
                  (o.n_layer + 1) / 2 / o.n_layer, times, "spread", "full")
        yield row(f"{B} rows, prefix {prefix}, a rule but nobody exits: over full depth", 1.0, times,
                  "nobody", "full")


@torch.no_grad()
def mod_part(o, device):
    """Mixture-of-Depths in every other block, the predictor's threshold set so that capacity is kept."""
    dense, prefix = gpt(o, device), 256
    for capacity in (0.125, 0.5):
        model = gpt(o, device, routed="odd", capacity=capacity)
        ids = torch.randint(0, o.vocab, (4, prefix), device=device)
        for n, (_, visit) in enumerate(model.states(Batch(ids, ids, positions(ids)))):
            if visit.guess is not None:
                model.blocks[n].predictor[-1].bias -= visit.guess.quantile(1 - capacity)
        found = decode.read(model, ids[:1], positions(ids[:1]), None, full_depth, causal)
        ran, exit_at = found.visited[0].cpu().numpy(), found.exit_at[0].cpu().numpy()
        size = [cost.decoding(m.config, o.vocab, visited, exit_at).bytes
                for m, visited in ((model, ran), (dense, np.ones_like(ran)))]
        times = in_turns({"mod": reader(model, 1, prefix // 2, full_depth, more=16),
                          "dense": reader(dense, 1, prefix // 2, full_depth, more=16)}, o.repeats, device)
        yield row(f"next 16, {capacity:.1%} of every other block: over dense, by bytes",
                  size[0] / size[1], times, "mod", "dense")


PARTS = {"train": train_part, "routed": routed_part, "plain": plain_part, "exits": exits_part,
         "mod": mod_part}


@command
def main(argv=None):
    o = run.parse(argv, Options)
    device = run.device_of(o.device)
    torch.manual_seed(0)
    header = {**run.environment(device), "system": platform.system(), "options": vars(o)}
    print("{device}, {threads} threads, torch {torch}, commit {commit}".format(**header)
          + f", {o.repeats} repeats in turns\n")
    print(f"| {'what':86} | FLOPs | time (middle half) | share of the ideal | ms |\n|---|---|---|---|---|")
    rows = []
    for part in o.parts:
        for found in PARTS[part](o, device):
            rows.append(found)
            (low, mid, high), ideal = found["time"], found["flops"]
            counted, share = (f"{ideal:.3f}", f"{ideal / mid:.2f}") if ideal else ("", "")
            print(f"| {found['what']:86} | {counted} | {mid:.3f} ({low:.3f}-{high:.3f}) | {share} "
                  f"| {found['ms'][1]:.1f} |", flush=True)
            if o.out:
                text = json.dumps({"command": "bench.py", **header, "rows": rows}, indent=1)
                run.write_text(Path(o.out), text + "\n")


if __name__ == "__main__":
    main()
