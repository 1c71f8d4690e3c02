"""Speed, as ratios within one run: python bench.py [--parts train full exits mod]

Timed in turns, in random order: median and middle half of the ratio. layers, FLOPs, bytes: counted ratios, of
one text (cost.py). at most: what the project promises on an idle CPU at the default sizes.
"""
import json
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import cost
import decode
import options
import run
from data.batches import Batch
from data.common import UserError, command, write_file
from exits import fixed_exit, forced_exits, full_depth
from linear import PROCESSOR
from model import GPT, GPTConfig, position_ids
from train import aligned


@dataclass
class Options:
    """Measure ratios of speed: training; decoding at full depth, with early exits, with routed blocks."""
    parts: tuple[Literal["train", "full", "exits", "mod"], ...] = ("train", "full", "exits", "mod")
    n_layer: int = 12
    n_head: int = 6
    n_embd: int = 384
    vocab_size: int = 8192
    batch_size: int = 4
    block_size: int = 1024      # tokens of a sequence; some training rows use a quarter
    repeats: int = 15
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: str = ""               # write the numbers to this JSON file


def compare(o, what, ours, theirs, counted=(), at_most=None, of=None):
    """A row of the table: time of ours() over theirs(), after an unmeasured round. counted: ratios of layers,
    FLOPs and bytes, as far as known. at_most: the promise, times the counted ratio `of` if it is given."""
    works, times, rng = (ours, theirs), np.zeros((o.repeats + 1, 2)), np.random.default_rng(0)
    synchronize = getattr(torch, o.device).synchronize
    for turn in times:
        for i in rng.permutation(2):
            synchronize()
            began = time.perf_counter()
            works[i]()
            synchronize()
            turn[i] = time.perf_counter() - began
    counted = dict(zip(("layers", "flops", "bytes"), map(float, counted), strict=False))
    return {"what": what, **counted, "at_most": at_most * counted[of] if of else at_most,
            "ratio": np.percentile(times[1:, 0] / times[1:, 1], [25, 50, 75]).tolist(),
            "ms": 1e3 * np.median(times[1:, 0])}


def as_text(r):
    """A row of the table; a promise that is not kept is marked."""
    cells = [f"{r[name]:.3f}" if name in r else "" for name in ("layers", "flops", "bytes")]
    cells.append("{1:.3f} ({0:.3f}-{2:.3f})".format(*r["ratio"]))
    cells.append(f"{r['at_most']:.3f}" + " missed" * (r["ratio"][1] > r["at_most"]) if r["at_most"] else "")
    return f"| {r['what']} | {' | '.join(cells)} | {r['ms']:.1f} |"


def random_ids(o, *size):
    return torch.randint(0, o.vocab_size, size, device=o.device)


def gpt(o, routed="none", **more):
    config = GPTConfig(o.n_layer, o.n_head, o.n_embd, block_size=o.block_size, routed=routed, **more)
    return GPT(config, o.vocab_size).to(o.device).eval()


def gpt2(o):
    """Hugging Face's GPT-2 in these sizes, without dropout; None without `transformers`."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    config = GPT2Config(vocab_size=o.vocab_size, n_positions=o.block_size, n_embd=o.n_embd,
                        n_layer=o.n_layer, n_head=o.n_head, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).to(o.device).eval()


def step(model, ids, targets):
    """Forward, all losses, backward, of our model."""
    batch = Batch(ids, targets, position_ids(ids))
    aligned(model, batch, 1 / ids.numel(), options.Options())[0].backward()
    model.zero_grad()


def steps(o, what, ours, theirs, B, layers, at_most, of=None):
    """A row: a step of one of our models over a step of another, on B sequences."""
    ids, targets = random_ids(o, 2, B, o.block_size)
    flops = [cost.training(model.config, o.vocab_size, o.block_size) for model in (ours, theirs)]
    return compare(o, f"step, {B} x {o.block_size} tokens, {what}", lambda: step(ours, ids, targets),
                   lambda: step(theirs, ids, targets), (layers, flops[0] / flops[1]), at_most, of)


def train_part(o):
    short = replace(o, block_size=o.block_size // 4)
    ours, plain = gpt(short, exits="last"), gpt2(short)
    ids, targets = random_ids(o, 2, o.batch_size, short.block_size)

    def plain_step():
        F.cross_entropy(plain(ids).logits.flatten(0, 1), targets.flatten()).backward()
        plain.zero_grad()

    if plain:
        yield compare(o, "dense step: over Hugging Face's GPT-2", lambda: step(ours, ids, targets),
                      plain_step, (1, 1), 1.05)
    small = replace(short, vocab_size=4096)
    one, many = gpt(small, exits="last"), gpt(small)
    yield steps(small, f"{o.n_layer} tied exits: over one", many, one, o.batch_size, 1, 1.83)
    mod, dense = gpt(o, "odd", exits="last"), gpt(o, exits="last")
    layers = 1 - (1 - mod.config.capacity) * len(mod.config.routed_blocks()) / o.n_layer
    for B in (1, o.batch_size):
        yield steps(o, "12.5 % of every other block: over dense", mod, dense, B, layers, 1.06, "flops")


def reader(model, rule, ids, prefix, more):
    """Read `prefix` tokens of ids (B,T) -> a function that reads the next `more`, one by one."""
    pos, cache = position_ids(ids), decode.Cache(model, *ids.shape)
    decode.step(model, ids[:, :prefix], pos[:, :prefix], cache, rule)

    def read_more():
        for t in range(cache.end, cache.end + more):
            decode.step(model, ids[:, t:t + 1], pos[:, t:t + 1], cache, rule)
    return read_more


def counts(model, rule, ids, prefix):
    """Blocks, FLOPs and bytes (3,) of reading the first text of ids (B,T) alone, after `prefix` tokens."""
    output = decode.step(model, ids, position_ids(ids), None, rule)
    visited, exit_at = output.visited[0].cpu().numpy(), output.exit_at[0].cpu().numpy()
    before, whole = (cost.decoding(model.config, model.vocab_size, visited[:T], exit_at[:T], copies="needed")
                     for T in (prefix, len(visited)))
    return np.array([visited[prefix:].sum(), *(whole[part] - before[part] for part in ("flops", "bytes"))])


def readings(o, what, ours, theirs, at_most=None, of=None, B=1, more=1, prefix=128):
    """A row: reading B texts further, `more` tokens at a time. ours, theirs: (model, halting rule)."""
    ids = random_ids(o, B, prefix + more * (o.repeats + 1))
    counted = counts(*ours, ids, prefix) / counts(*theirs, ids, prefix)
    return compare(o, what, reader(*ours, ids, prefix, more), reader(*theirs, ids, prefix, more), counted,
                   at_most, of)


def full_part(o):
    """Against Hugging Face's GPT-2."""
    ours, plain = gpt(o), gpt2(o)
    for B, prefix in ((1, 64), (1, 512), (16, 64), (16, 512)) if plain else ():
        ids = random_ids(o, B, prefix + o.repeats + 1)
        cache = plain(ids[:, :prefix], use_cache=True).past_key_values       # grows with every call
        faster = 1.5 if B == 1 and "AMD" in PROCESSOR else 1.2
        yield compare(o, f"next token of {B}, prefix {prefix}: over Hugging Face's GPT-2",
                      reader(ours, full_depth, ids, prefix, 1),
                      lambda ids=ids[:, :1], cache=cache: plain(ids, past_key_values=cache, use_cache=True),
                      (1, 1, 1), 1 / faster)


def exits_part(o):
    """All tokens exit at one block; then 16 texts, 8 tokens at a time since late copies come in bursts."""
    model, L = gpt(o), o.n_layer
    for e in range(2, L + 1, 2):
        small, ours = gpt(replace(o, n_layer=e)), (model, fixed_exit(model, e))
        small.load_state_dict(model.state_dict(), strict=False, assign=True)     # the same memory
        yield readings(o, f"all exit at {e}: over a model of {e} blocks", ours, (small, full_depth), 1.10)
        yield readings(o, f"all exit at {e}: over full depth", ours, (model, full_depth))
    spread = forced_exits(torch.randint(1, L + 1, (16, o.block_size), device=o.device))
    never = fixed_exit(model, L)
    for what, rule, at_most in (("spread exits", spread, 1.10), ("a rule, no exits", never, 1.05)):
        yield readings(o, f"next 8 of 16 texts, {what}: over full depth", (model, rule),
                       (model, full_depth), at_most, B=16, more=8)


def mod_part(o):
    """16 tokens at a time, since one may run all blocks or few. Thresholds are set to keep the capacity."""
    mod, dense, ids = gpt(o, "odd"), gpt(o), random_ids(o, 4, 256)
    for n, (_, routing) in enumerate(mod.run_layers(mod.embed(ids), position_ids(ids))):
        if routing.logit is not None:
            mod.blocks[n].predictor[-1].bias -= routing.logit.quantile(1 - mod.config.capacity)
    yield readings(o, "next 16, 12.5 % of every other block: over dense", (mod, full_depth),
                   (dense, full_depth), 1.15, "bytes", more=16)


@command
def main(argv=None):
    o = options.parse(argv, Options)
    if o.repeats < 1 or o.block_size < 528 + 16 * o.repeats:
        raise UserError(f"--repeats must be at least 1 and fit into --block_size {o.block_size}")
    o.device = run.device_of(o.device).type
    torch.manual_seed(0)
    result = {**run.environment(torch.device(o.device)), "options": vars(o), "rows": []}
    print("{device}, {threads} threads, torch {torch}, commit {commit}\n".format(**result))
    print("| what | layers | FLOPs | bytes | time (middle half) | at most | ms |\n" + "|---" * 7 + "|")
    parts = {"train": train_part, "full": full_part, "exits": exits_part, "mod": mod_part}
    for part in o.parts:
        with torch.set_grad_enabled(part == "train"):
            for r in parts[part](o):
                result["rows"].append(r)
                print(as_text(r), flush=True)
                if o.out:
                    write_file(o.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
