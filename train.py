"""Train: python train.py [preset] [--option value ...]; --help lists the options.

Step t is a function of (seed, t): its batch, dropout and every other random choice. So nothing random is
stored, any step can be computed again, and --resume continues exactly.
"""
import importlib
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import exits
import run
from data.common import UserError, command, is_prepared, load_set, token_bytes
from decode import read
from model import GPT, Tokens, positions
from routing import ROUTES, causal, confusion, imitation_loss, report

# ----------------------------------------------------------------------------- objectives


def aligned(model, ids, targets, scale, options):
    """The aligned loss [DAT 2.2] plus the imitation loss [MoD 3.5] of one piece of a batch, and backward.

    ids, targets (B,T). Adds scale * loss to the gradients (scale = 1 / targets of the whole step) and returns
    the nats (N,) summed over tokens at each exit. With one classifier this is plain language modelling.
    """
    blocks = model.classifiers.blocks
    weights = dict(zip(blocks, exits.exit_weights(options.exit_weights, blocks), strict=True))
    sums, ends, gradients = [], [], []
    at = Tokens(positions(ids))
    for n, (h, visit) in enumerate(model.trunk(model.embed(ids), at), 1):
        if n in weights:
            nats, gradient = exits.loss_and_gradient(model.classifiers, n, h, targets, scale * weights[n])
            sums.append(nats)
            ends.append(h)
            gradients.append(gradient)
        if visit.guess is not None:
            ends.append(imitation_loss(visit) * scale * options.imitation)
            gradients.append(None)
    with torch.autocast(ids.device.type, enabled=False):        # backward keeps the types of forward
        torch.autograd.backward(ends, gradients)
    return torch.stack(sums)


# ----------------------------------------------------------------------------- batches and schedule


def batch_of(tokens, options, t):
    """The batch of step t: ids, targets (batch, block_size)."""
    T = options.model.block_size
    first = np.random.default_rng([options.seed, t]).integers(0, len(tokens) - T, options.batch)
    return cut(tokens, first, T)


def windows_of(tokens, count, T):
    """The same evenly spaced windows for every run: ids, targets (count,T)."""
    count = max(1, min(count, (len(tokens) - 1) // T))
    return cut(tokens, np.linspace(0, len(tokens) - T - 1, count).astype(np.int64), T)


def cut(tokens, first, T):
    rows = np.stack([tokens[i:i + T + 1] for i in first]).astype(np.int64)
    return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])


def pieces(windows, options):
    """(ids, targets) -> pairs of as many rows as training has in memory at a time."""
    size = options.batch // options.accumulate
    return zip(*(t.split(size) for t in windows), strict=True)


def learning_rate(t, options):
    """Linear warm-up, then a cosine from lr to lr * lr_end over exactly the run's steps."""
    if t < options.warmup:
        return options.lr * (t + 1) / options.warmup
    done = (t - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (options.lr_end + (1 - options.lr_end) * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer_of(model, options):
    """AdamW; only matrices decay (not norms, biases, or the one-row routers)."""
    decayed, free = [], []
    for p in model.parameters():
        (decayed if p.dim() > 1 and p.size(0) > 1 else free).append(p)
    groups = [{"params": decayed, "weight_decay": options.weight_decay},
              {"params": free, "weight_decay": 0.0}]
    fused = model.wte.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), fused=fused)


# ----------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, windows, options, context, stop=False):
    """Loss (nats per token) of every exit under each routing rule; how well the causal rule imitates top-k.

    windows: ids, targets (W,T). -> dict for metrics.jsonl, or None if `stop` came true on the way.
    """
    model.eval()
    targets, device = windows[1], model.wte.weight.device
    routes = ROUTES if options.model.routed != "none" else {"top_k": ROUTES["top_k"]}
    loss, counts, ran = {}, torch.zeros(4, device=device), []
    for name, route in routes.items():
        sums = torch.zeros(len(model.classifiers.blocks), dtype=torch.float64)
        for x, y in pieces(windows, options):
            if stop:
                return None
            x, y, losses = x.to(device), y.to(device), []
            at = Tokens(positions(x))
            with context:
                for n, (h, visit) in enumerate(model.trunk(model.embed(x), at, route=route), 1):
                    if n in model.classifiers.blocks:
                        losses.append(exits.nats(model.classifiers(n, h), y).sum())
                    if name == "top_k" and visit.guess is not None:
                        counts += confusion(visit)
                    if name == "causal" and visit.guess is not None:
                        ran.append(visit.ran.float().mean())
            sums += torch.stack(losses).cpu()
        loss[name] = (sums / targets.numel()).tolist()
    found = {"loss": loss}
    if ran:
        found |= {"imitation": report(counts), "causal_share": float(torch.stack(ran).mean())}
    return found


def measure_depth(model, windows, options, context):
    """How deep every token of the windows goes when the model decides causally: arrays for depth.npz."""
    model.eval()
    device, rule, named = model.wte.weight.device, exits.full_depth, "full depth"
    if options.model.exits == "all":
        rule, named = exits.confidence([options.tau] * options.model.n_layer), f"confidence > {options.tau:g}"
    if options.model.routed != "none":
        named += ", causal routing"
    ids, targets = windows
    parts = []
    for x, y in pieces(windows, options):
        x, y = x.to(device), y.to(device)
        with context:
            found = read(model, x, positions(x), None, rule, causal)
        parts.append((exits.nats(found.logits, y), found.exit_at, found.visited, found.score))
    nats, exit_at, visited, score = (torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True))
    return {"ids": ids.numpy().astype(np.int32), "targets": targets.numpy().astype(np.int32),
            "nats": nats, "exit_at": exit_at.astype(np.uint8), "visited": visited,
            "score": score.astype(np.float32), "rule": np.array(named)}


# ----------------------------------------------------------------------------- the script


def prepared(name):
    """The data set `name`: a folder under data/ (made now if it needs nothing from the user) or a path."""
    folder = Path(name) if Path(name).is_dir() else run.HERE / "data" / name
    if name in ("pysource", "shakespeare") and not is_prepared(folder):
        print(f"preparing data/{name} ...", flush=True)
        importlib.import_module(f"data.{name}.prepare").main([])
    return folder, load_set(folder)


def begin(options):
    """-> (run folder, data, model, optimizer, step), new or, of a resumed run, as stored."""
    source, data = prepared(options.data)
    T = options.model.block_size
    for split, tokens in (("train.bin", data.train), ("val.bin", data.val)):
        if len(tokens) <= T:
            raise UserError(f"{source / split} has {len(tokens)} tokens, but one window takes {T + 1}: "
                            f"give more data or a smaller --block_size")
    device = run.device_of(options.device)
    torch.manual_seed(options.seed)
    model = GPT(options.model, data.meta["vocab_size"]).to(device)
    optimizer = optimizer_of(model, options)
    step = 0
    if options.resume:
        folder = run.find(options.resume, options.out)
        for name in ("meta.json", "tokenizer.json"):
            if (folder / name).read_bytes() != (source / name).read_bytes():
                raise UserError(f"{source} is not the data that {folder} began with: {name} differs")
        state = run.load(folder, device)
        run.fill(model, state["model"], folder)
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    else:
        folder = run.new_folder(options.out)
        stored = {"options": run.flat(options), **run.environment(device)}
        run.write_text(folder / "options.json", json.dumps(stored, indent=1) + "\n")
        shutil.copy(source / "tokenizer.json", folder / "tokenizer.json")
        shutil.copy(source / "meta.json", folder / "meta.json")
    if options.compile:
        run.compile_blocks(model)
    return folder, data, model, optimizer, step


def step_once(model, optimizer, tokens, options, t, context):
    """Step t: gradients of the batch, piece by piece, then clip, check, update. -> (nats per exit, norm)."""
    model.train()
    device = model.wte.weight.device
    torch.manual_seed(int(np.random.SeedSequence([options.seed, t]).generate_state(1)[0]))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(t, options)
    ids, targets = (x.to(device) for x in batch_of(tokens, options, t))
    sums = 0
    for x, y in zip(ids.chunk(options.accumulate), targets.chunk(options.accumulate), strict=True):
        with context:
            sums = sums + aligned(model, x, y, 1 / targets.numel(), options)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip))
    if not math.isfinite(norm):
        raise FloatingPointError
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums / targets.numel(), norm


@command
def main(argv=None):
    options = run.read_options(argv)
    folder, data, model, optimizer, start = begin(options)
    context = run.autocast(model.wte.weight.device, options.dtype)
    windows = windows_of(data.val, options.eval_windows, options.model.block_size)
    bytes_per_token = token_bytes(data.encoding)[windows[1].numpy()].mean()
    metrics, saved = run.Metrics(folder, start), start
    tokens = options.batch * options.model.block_size
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {tokens:,} tokens a step, "
          f"{model.wte.weight.device.type}", flush=True)
    last = min(options.steps, options.stop_at or options.steps)
    if last < start:
        raise UserError(f"--stop_at {last} is behind: {folder} is at step {start}")
    pace = 0.2 if sys.stderr.isatty() else 15       # seconds between two bars; a log file needs few
    bar = tqdm(total=options.steps, initial=start, unit="step", mininterval=pace)
    with run.Interrupt() as stop, bar:
        began = time.perf_counter()
        for t in range(start, last + 1):
            if t % options.eval_every == 0 or t == options.steps:
                found = evaluate(model, windows, options, context, stop)
                if found:
                    rule = list(found["loss"])[-1]
                    found["bits_per_byte"] = found["loss"][rule][-1] / math.log(2) / bytes_per_token
                    metrics.write("val", t, **found)
                    bar.write(describe(t, found))
            if t % options.save_every == 0 or t == last or stop:
                run.save(folder, t, model, optimizer)
                saved = t
            if t == last or stop:
                break
            try:
                nats, norm = step_once(model, optimizer, data.train, options, t, context)
            except FloatingPointError:
                raise UserError(f"step {t}: the gradient is not finite, so the step was not taken. "
                                f"{folder}/ckpt.pt holds step {saved}. Try a lower --lr or a longer --warmup"
                                ) from None
            speed = tokens * (t + 1 - start) / (time.perf_counter() - began)
            if (t + 1) % options.log_every == 0:
                bar.set_postfix(loss=f"{nats[-1]:.3f}", tokens_per_s=f"{speed:,.0f}", refresh=False)
                metrics.write("train", t + 1, loss=nats.tolist(), norm=norm, lr=learning_rate(t, options),
                              tokens_per_s=round(speed))
            bar.update()
    if stop or t < options.steps:
        print(f"stopped at step {t}, saved. Go on with: python train.py --resume {folder}")
        return
    finish(folder, model, windows, options, context)


def describe(t, found):
    """One line of an evaluation."""
    names = {rule: f"{rule} " if len(found["loss"]) > 1 else "" for rule in found["loss"]}
    text = f"step {t:5d} | " + " | ".join(
        f"{names[rule]}loss by exit " + " ".join(f"{v:.2f}" for v in loss)
        for rule, loss in found["loss"].items())
    text += f" | {found['bits_per_byte']:.3f} bits/byte"
    if "imitation" in found:
        i = found["imitation"]
        text += (f" | causal rule right {i['accuracy']:.1%} (always no: {i['base_rate']:.1%}), "
                 f"precision {i['precision']:.0%}, recall {i['recall']:.0%}")
    return text


def finish(folder, model, windows, options, context):
    """Measure depth on the validation text, let sample.py and plot.py show it, say where everything is."""
    run.write_atomically(folder / "depth.npz",
                         lambda f: np.savez_compressed(f, **measure_depth(model, windows, options, context)))
    for script, more in (("sample.py", ["--device", options.device]), ("plot.py", [])):
        print(f"\n$ python {script} --run {folder}", flush=True)
        subprocess.run([sys.executable, run.HERE / script, "--run", folder, *more], check=False)
    files = sorted(p.name for p in folder.iterdir())
    print(f"\nEverything is in {folder}: {', '.join(files)}\n"
          f"Next: python sample.py --run {folder} --prompt \"import\" --temperature 0.5\n"
          f"      python plot.py --run {folder} --window 3 --first 100\n"
          f"      python train.py --help")


if __name__ == "__main__":
    main()
