"""Train: python train.py [preset] [--option value ...]; --help lists the options.

Step t is a function of (seed, t): its batch, dropout and every other random choice. So nothing random is
stored, any step can be computed again, and --resume continues exactly.
"""
import json
import math
import shutil
import subprocess
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import exits
import run
from data.batches import batches_of, bits_per_byte, open_data
from data.common import UserError, command
from decode import measure
from model import Tokens
from routing import imitation_loss, report

# ----------------------------------------------------------------------------- objectives


def aligned(model, batch, scale, options):
    """The aligned loss [DAT 2.2] plus the imitation loss [MoD 3.5] and, if the model has a predictor of
    exits, alpha times its loss [DAT 3], of one piece of a batch; and backward.

    Adds scale * loss to the gradients (scale = 1 / targets of the whole step) and returns the nats (N,)
    summed over tokens at each exit. With one classifier this is plain language modelling, or translation.
    """
    blocks, at, past = model.classifiers.blocks, Tokens(batch.pos, batch.live), model.past(batch)
    weights = dict(zip(blocks, exits.exit_weights(options.exit_weights, blocks), strict=True))
    if options.gradient_scale:
        gamma = options.gradient_scale
        at.onward = lambda n, h: exits.scale_gradient(h, 1 / exits.balance(n, len(blocks), gamma))
    states, nats, right, ends, gradients = [], [], [], [], []
    for n, (h, visit) in enumerate(model.states(batch, at=at, past=past), 1):
        states.append(h)
        if n in weights:
            lost, hit, gradient = exits.loss_and_gradient(
                model.classifiers, n, h, batch.targets, scale * weights[n], options.label_smoothing)
            nats.append(lost)
            right.append(hit)
            ends.append(h)
            gradients.append(gradient)
        if visit.guess is not None and visit.guess.requires_grad:      # the random control learns nothing
            ends.append(imitation_loss(visit, batch.live) * scale * options.imitation)
            gradients.append(None)
        if visit.choice is not None:
            ends.append(visit.choice.balance * scale * options.balance)
            gradients.append(None)
    if model.halting:
        exit_at = run.oracle(torch.stack(nats, -1), torch.stack(right, -1), batch.there, options)
        lost = model.halting.loss(states, past and past[0].source, exit_at, batch.there)
        ends.append(lost * scale * options.alpha)
        gradients.append(None)
    with torch.autocast(batch.ids.device.type, enabled=False):  # backward keeps the types of forward
        torch.autograd.backward(ends, gradients)
    return torch.stack([lost.sum() for lost in nats])


def mixed(model, batch, scale, options):
    """The mixed loss [DAT 2.2]: every token leaves at an exit drawn uniformly and its state stays as it is
    above; mean over `paths` draws. Returns nats (N,) as `aligned`, from the tokens that left at each exit."""
    blocks, there = model.classifiers.blocks, batch.there
    sums, counts = torch.zeros(2, len(blocks), device=batch.ids.device)
    for _ in range(options.paths):
        exit_at = torch.randint(1, len(blocks) + 1, batch.pos.shape, device=batch.ids.device)
        at, ends, gradients = Tokens(batch.pos, there), [], []
        for n, (h, _) in enumerate(model.states(batch, at=at), 1):
            here = there & (exit_at == n)
            if here.any():
                lost, _, gradient = exits.loss_and_gradient(
                    model.classifiers, n, h[here], batch.targets[here], scale / options.paths,
                    options.label_smoothing)
                ends.append(h[here])
                gradients.append(gradient)
                sums[n - 1] += lost.sum()
                counts[n - 1] += here.sum()
            at.live = at.live & ~here
        with torch.autocast(batch.ids.device.type, enabled=False):
            torch.autograd.backward(ends, gradients)
    return sums * there.sum() / counts.clamp(min=1)


def halting(model, batch, scale, options):
    """Only the predictor of exits learns, from a trunk that stays as it is [DAT 3]. Returns nats (N,)."""
    model.eval()
    with torch.no_grad():
        past = model.past(batch)
        states = [h for h, _ in model.states(batch, past=past)]
        logits = [model.classifiers(n, h) for n, h in enumerate(states, 1)]
        nats = torch.stack([exits.nats(x, batch.targets) for x in logits], -1)
        right = torch.stack([x.argmax(-1) == batch.targets for x in logits], -1)
        exit_at = run.oracle(nats, right, batch.there, options)
    lost = model.halting.loss(states, past and past[0].source, exit_at, batch.there)
    with torch.autocast(batch.ids.device.type, enabled=False):
        (lost * scale * options.alpha).backward()
    return nats.sum((0, 1))


OBJECTIVES = {"aligned": aligned, "mixed": mixed, "halting": halting}


# ----------------------------------------------------------------------------- schedule and optimiser


def learning_rate(t, options):
    """Linear warm-up, then a cosine from lr to lr * lr_end over exactly the run's steps, or lr / sqrt(t)."""
    if t < options.warmup:
        return options.lr * (t + 1) / options.warmup
    if options.schedule == "inverse_sqrt":
        return options.lr * math.sqrt(options.warmup / (t + 1))
    done = (t - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (options.lr_end + (1 - options.lr_end) * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer_of(model, options):
    """AdamW; only matrices decay (not norms, biases, or the one-row routers)."""
    decayed, free = [], []
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        (decayed if p.dim() > 2 or p.dim() == 2 and p.size(0) > 1 else free).append(p)
    groups = [{"params": decayed, "weight_decay": options.weight_decay},
              {"params": free, "weight_decay": 0.0}]
    fused = model.wte.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), fused=fused)


# ----------------------------------------------------------------------------- evaluation


def evaluate(model, batches, context, stop=False):
    """Loss (nats per token) of every exit under each routing rule; how well the causal rule imitates top-k.
    -> dict for metrics.jsonl, or None if `stop` came true on the way."""
    model.eval()
    measured, tokens = measure(model, batches, context, stop), sum(b.count for b in batches)
    if measured is None:
        return None
    found = {"loss": {rule: (nats / tokens).tolist() for rule, (nats, _) in measured.items()}}
    if model.config.routed != "none":       # under the causal rule, what is guessed is what runs
        yes, _, _, no = measured["causal"][1].tolist()
        found |= {"imitation": report(measured["top_k"][1]), "causal_share": yes / (yes + no)}
    return found


# ----------------------------------------------------------------------------- the script


def begin(options):
    """-> (run folder, encoding, (what to train on, to validate on), model, optimizer, step, last weights),
    new or, of a resumed run, as stored."""
    source, data = open_data(options.data, options.translate)
    batches = batches_of(data, "train", options), batches_of(data, "val", options, options.accumulate)
    device = run.device_of(options.device)
    torch.manual_seed(options.seed)
    model = run.build(options, data.meta["vocab_size"]).to(device)
    if options.init:
        run.start_from(model, run.find(options.init, options.out), device)
    if options.objective == "halting":
        model.requires_grad_(False).halting.requires_grad_(True)
    optimizer = optimizer_of(model, options)
    step, last = 0, {}
    if options.resume:
        folder = run.find(options.resume, options.out)
        for name in ("meta.json", "tokenizer.json"):
            if (folder / name).read_bytes() != (source / name).read_bytes():
                raise UserError(f"{source} is not the data that {folder} began with: {name} differs")
        state = run.load(folder, device)
        run.fill(model, state["model"], folder)
        optimizer.load_state_dict(state["optimizer"])
        step, last = state["step"], state["last"]
    else:
        folder = run.new_folder(options.out)
        stored = {"options": run.flat(options), **run.environment(device)}
        run.write_text(folder / "options.json", json.dumps(stored, indent=1) + "\n")
        shutil.copy(source / "tokenizer.json", folder / "tokenizer.json")
        shutil.copy(source / "meta.json", folder / "meta.json")
    if options.compile:
        run.compile_blocks(model)
    return folder, data.encoding, batches, model, optimizer, step, last


def step_once(model, optimizer, training, options, t, context):
    """Step t: gradients of the batch, piece by piece, then clip, check, update.
    -> (nats per token of each exit, gradient norm, tokens)."""
    model.train()
    device = model.wte.weight.device
    torch.manual_seed(int(np.random.SeedSequence([options.seed, t]).generate_state(1)[0]))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(t, options)
    batch, sums = training.step(options.seed, t), 0
    for piece in batch.cut(options.accumulate):
        with context:
            sums = sums + OBJECTIVES[options.objective](model, piece.to(device), 1 / batch.count, options)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip))
    if not math.isfinite(norm):
        raise FloatingPointError
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums / batch.count, norm, batch.count


@command
def main(argv=None):
    options = run.read_options(argv)
    folder, encoding, (training, validation), model, optimizer, start, last = begin(options)
    context = run.autocast(model.wte.weight.device, options.dtype)
    batches = validation.fixed(options.eval_windows)
    per_token = bits_per_byte(batches, encoding)
    metrics, saved = run.Metrics(folder, start), start
    tokens = training.step(options.seed, start).count
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{'about ' if options.translate else ''}{tokens:,} tokens a step, {model.wte.weight.device.type}",
          flush=True)
    end = min(options.steps, options.stop_at or options.steps)
    if end < start:
        raise UserError(f"--stop_at {end} is behind: {folder} is at step {start}")
    pace = 0.2 if sys.stderr.isatty() else 15       # seconds between two bars; a log file needs few
    bar = tqdm(total=options.steps, initial=start, unit="step", mininterval=pace)
    with run.interrupts() as stop, bar:
        began, tokens = time.perf_counter(), 0
        for t in range(start, end + 1):
            if t % options.eval_every == 0 or t == options.steps:
                found = evaluate(model, batches, context, stop)
                if found:
                    found["bits_per_byte"] = list(found["loss"].values())[-1][-1] * per_token
                    metrics.write("val", t, **found)
                    bar.write(describe(t, found))
            if (t and t % options.save_every == 0) or t == options.steps:
                last = run.keep_last(last, t, model, options.average)
            if t % options.save_every == 0 or t == end or stop:
                run.save(folder, t, model, optimizer, last)
                saved = t
            if t == end or stop:
                break
            started = time.perf_counter()
            try:
                nats, norm, count = step_once(model, optimizer, training, options, t, context)
            except FloatingPointError:
                raise UserError(f"step {t}: the gradient is not finite, so the step was not taken. "
                                f"{folder}/ckpt.pt holds step {saved}. Try a lower --lr or a longer --warmup"
                                ) from None
            tokens += count
            ended = time.perf_counter()
            if (t + 1) % options.log_every == 0:
                bar.set_postfix(loss=f"{nats[-1]:.3f}", tokens_per_s=f"{tokens / (ended - began):,.0f}",
                                refresh=False)
                metrics.write("train", t + 1, loss=nats.tolist(), norm=norm, lr=learning_rate(t, options),
                              seconds=round(ended - started, 5))
            bar.update()
    if stop or t < options.steps:
        print(f"stopped at step {t}, saved. Go on with: python train.py --resume {folder}")
        return
    finish(folder, options)


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


def finish(folder, options):
    """Let the other scripts measure the run, sample from it and draw it; say where everything is."""
    for script in ("evaluate.py", "sample.py", "plot.py"):
        more = [] if script == "plot.py" else ["--device", options.device]
        print(f"\n$ python {script} --run {folder}", flush=True)
        subprocess.run([sys.executable, run.HERE / script, "--run", folder, *more], check=False)
    files = sorted(p.name for p in folder.iterdir())
    wish = f'"..."      ({options.translate})' if options.translate else '"import" --temperature 0.5'
    print(f"\nEverything is in {folder}: {', '.join(files)}\n"
          f"Next: python sample.py --run {folder} --prompt {wish}\n"
          f"      python plot.py --run {folder} --window 3 --first 0\n"
          f"      python train.py --help")


if __name__ == "__main__":
    main()
