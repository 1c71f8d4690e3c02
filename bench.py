"""Speed, as ratios within one run: python bench.py [--parts train routed decode]. Keep the machine idle.

Every pair is timed in turns (a, b, a, b, ...), so that a slow moment of the machine hits both; shown are the
median and the middle half of the repeats. "share of the ideal" is the ratio that counting operations promises
over the ratio that was measured: 1 is all of it.
"""
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

import decode
import run
from cost import block_flops, router_flops
from data.common import command
from exits import full_depth, loss_and_gradient
from model import GPT, Block, GPTConfig, Now, Tokens, positions
from routing import Routed, causal, kept, top_k


@dataclass
class Options:
    """Measure ratios of speed."""
    parts: tuple[Literal["train", "routed", "decode"], ...] = ("train", "routed", "decode")
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    vocab: int = 2048
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
        flops = k * block_flops(C, 4 * C, k) + T * router_flops(GPTConfig(n_embd=C))
        flops /= T * block_flops(C, 4 * C, T)
        yield row(f"routed block, capacity {c:g}, {T} tokens, width {C}: routed / dense",
                  flops, times, c, "dense")


@torch.no_grad()
def decode_part(o, device):
    """One more token at full depth after several prefixes: with the cache over reading all again."""
    T = o.block_size
    ids = torch.randint(0, o.vocab, (1, T), device=device)
    pos = positions(ids)
    for routed in ("none", "odd"):
        config = GPTConfig(n_layer=o.n_layer, n_head=o.n_head, n_embd=o.n_embd, block_size=T, routed=routed)
        model = GPT(config, o.vocab).to(device).eval()
        for prefix in (p for p in (32, 128, 512, T - o.repeats - 2) if p + o.repeats + 2 <= T):
            past = decode.empty_cache(model, 1, T)
            decode.read(model, ids[:, :prefix], pos[:, :prefix], past, full_depth, causal)
            places = iter(range(prefix, T))

            def cached(model=model, past=past, places=places):
                t = next(places)
                decode.read(model, ids[:, t:t + 1], pos[:, t:t + 1], past, full_depth, causal)

            def again(model=model, end=prefix + 1):
                decode.read(model, ids[:, :end], pos[:, :end], None, full_depth, causal)

            times = in_turns({"cached": cached, "again": again}, o.repeats, device)
            kind = "dense" if routed == "none" else "MoD every other block"
            yield row(f"next token, {kind}, prefix {prefix}: cache / reading all again", None,
                      times, "cached", "again")


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
        for found in {"train": train_part, "routed": routed_part, "decode": decode_part}[part](o, device):
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
