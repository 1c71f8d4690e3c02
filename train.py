"""Train: python train.py [preset] [--option value ...]; --help lists the options.

The batch and all draws of step t are functions of (seed, t): --resume continues exactly."""
import json
import math
import os
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
from data.common import UserError, command, write_file
from decode import evaluate_loss
from options import as_dict, read_options, rule_name
from routing import ROUTES, predictor_loss


def aligned(model, batch, scale, o):
    """The aligned loss [DAT 2.2], plus those of causal predictors [MoD 3.5], experts and an exit predictor
    [DAT 3], times scale (1 / targets of the step) -> loss (), of which the gradient counts, not the value
    (exits.exit_loss); losses (N,) of the exits in nats, summed over tokens."""
    memory, x = model.memory_of(batch), model.embed(batch.ids)
    weights = exits.exit_weights(o.exit_weights, model.classifiers.blocks)
    states, judged, total = [], [], 0.0
    for n, block in enumerate(model.blocks, 1):
        x, routing = block(x, batch.pos, batch.live, None, memory, ROUTES[o.route])
        states.append(x)
        if n in weights:
            *parts, carrier = exits.exit_loss(model.classifiers, n, x, batch.targets, scale * weights[n],
                                              o.label_smoothing)
            judged.append(parts)
            total = total + carrier
        if routing.logit is not None:
            total = total + predictor_loss(routing, batch.mask) * scale * o.predictor_loss
        if routing.balance is not None:
            total = total + routing.balance * scale * o.balance_loss
        if o.gradient_scale:
            x = exits.balance_gradient(x, n, len(model.blocks), o.gradient_scale)
    losses, right = (torch.stack(parts, -1) for parts in zip(*judged, strict=True))         # (B,T,N)
    if model.exit_predictor:
        score = -losses if o.oracle == "likelihood" else right.to(losses.dtype)
        asked, whole = batch.targets >= 0, model.exit_predictor.kind == "sequence"
        exit_at = exits.oracle(score, asked, o.exit_cost, o.sigma, whole)
        total = total + model.exit_predictor.loss(states, memory, exit_at, asked) * scale * o.alpha
    return total, losses.sum((0, 1))


def mixed(model, batch, scale, o):
    """The mixed loss [DAT 2.2]: every token exits at a block drawn uniformly and keeps its state above; mean
    over `paths` draws -> as `aligned`, losses from the tokens that exited at each block."""
    N, mask, memory, total = len(model.blocks), batch.mask, model.memory_of(batch), 0.0
    sums, counts = torch.zeros(2, N, device=mask.device)
    for _ in range(o.paths):
        exit_at = torch.randint(1, N + 1, mask.shape, device=mask.device)
        x = model.embed(batch.ids)
        for n, block in enumerate(model.blocks, 1):
            x, _ = block(x, batch.pos, mask & (exit_at >= n), None, memory)
            exiting = mask & (exit_at == n)
            losses, _, carrier = exits.exit_loss(model.classifiers, n, x[exiting], batch.targets[exiting],
                                                 scale / o.paths, o.label_smoothing)
            total = total + carrier
            sums[n - 1] += losses.sum()
            counts[n - 1] += len(losses)
    return total, sums / counts.clamp(min=1) * mask.sum()       # mean loss of an exit, times all tokens


OBJECTIVES = {"aligned": aligned, "mixed": mixed, "exit_predictor": aligned}    # the last: see step_once


def learning_rate(t, o):
    """Linear warm-up, then a cosine that would reach lr * lr_end at t = steps."""
    if t < o.warmup:
        return o.lr * (t + 1) / o.warmup
    done = (t - o.warmup) / max(1, o.steps - o.warmup)
    return o.lr * (o.lr_end + (1 - o.lr_end) * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer_of(model, o):
    """AdamW; only matrices of several rows decay (no norm, bias, router or one-row output)."""
    matrices = [p for p in model.parameters() if p.dim() > 1 and p.size(-2) > 1]
    others = [p for p in model.parameters() if p.dim() < 2 or p.size(-2) == 1]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, o.beta2), fused=not model.wte.weight.is_mps)


def begin(o):
    """-> run folder, encoding, (data to train on, to validate on), model, optimizer, step to begin with."""
    source, data = open_data(o.data, o.translate)
    batches = batches_of(data, "train", o), batches_of(data, "val", o)
    device = run.device_of(o.device)
    torch.manual_seed(o.seed)
    model = run.build(o, data.meta["vocab_size"]).to(device)
    exits.parse_rule(rule_name(o, o), model)        # refused before there is a folder
    optimizer = optimizer_of(model, o)
    if o.resume:
        folder = run.find(o.resume, o.out)
        run.same_data(folder, source, ("meta.json", "tokenizer.json"))
        stored = run.load(folder, device)
        run.fill(model, stored, folder, optimizer)
        return folder, data.encoding, batches, model, optimizer, stored["step"]
    if o.init_from:
        other = run.find(o.init_from, o.out)
        run.same_data(other, source, ("tokenizer.json",))
        run.fill(model, run.load(other, device), other, new=("exit_predictor.", "classifiers.norms."))
    folder = run.new_folder(o.out)
    for name in ("meta.json", "tokenizer.json"):
        shutil.copy(source / name, folder / name)
    content = {"options": as_dict(o), **run.environment(device)}
    write_file(folder / "options.json", json.dumps(content, indent=1) + "\n")
    return folder, data.encoding, batches, model, optimizer, 0


def step_once(model, optimizer, training, o, t, context):
    """Step t: gradients of the batch, clip, update if they are finite -> metrics, tokens per second."""
    model.train()
    if o.objective == "exit_predictor":     # it alone learns, from states without dropout [DAT 3]
        model.eval().requires_grad_(False).exit_predictor.requires_grad_(True)
    began, batch, rate = time.perf_counter(), training.step(o.seed, t), learning_rate(t, o)
    objective, device, sums = OBJECTIVES[o.objective], model.wte.weight.device, 0.0
    for n, piece in enumerate(batch.cut(o.grad_accum_steps)):
        torch.manual_seed(int(np.random.SeedSequence([o.seed, t, n]).generate_state(1)[0]))
        with context:
            total, losses = objective(model, piece.to(device), 1 / batch.count, o)
        total.backward()
        sums = sums + losses
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss, seconds = (sums / batch.count).tolist(), round(time.perf_counter() - began, 5)
    return {"loss": loss, "norm": norm, "lr": rate, "seconds": seconds}, batch.count / seconds


def describe(result):
    """One line of an evaluation."""
    several = len(result["loss"]) > 1
    parts = [(f"{rule} " if several else "") + "loss by exit " + " ".join(f"{v:.2f}" for v in loss)
             for rule, loss in result["loss"].items()]
    parts.append(f"{result['bits_per_byte']:.3f} bits/byte (last exit{', causal' * several})")
    if "predictor" in result:
        parts.append("causal logit right {accuracy:.1%} (always no: {base_rate:.1%}), "
                     "precision {precision:.0%}, recall {recall:.0%}".format(**result["predictor"]))
    return " | ".join(parts)


def require_finite(values, what, t, folder, saved):
    """End with exit status 1, without another step or checkpoint, unless the values are finite."""
    if not np.isfinite(values).all():
        raise SystemExit(f"error: step {t}: the {what} is not finite, training ends here. {folder}/ckpt.pt "
                         f"holds step {saved}. Try a lower --lr or a longer --warmup")


@command
def main(argv=None):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a run is trained by one process; docs/reliability.md has the change for torchrun")
    o = read_options(argv, run.stored_options)
    folder, encoding, (training, validation), model, optimizer, start = begin(o)
    device, end = model.wte.weight.device, min(o.steps, o.stop_at or o.steps)
    if end < start:
        raise UserError(f"--stop_at {end} is behind: {folder} is at step {start}")
    if o.compile:
        torch._dynamo.config.suppress_errors = True     # a block that cannot be compiled here runs as it is
        if hasattr(torch._functorch.config, "backward_pass_autocast"):      # not before torch 2.8
            torch._functorch.config.backward_pass_autocast = "off"          # or routers' gradients were bf16
        for block in model.blocks:
            block.compile()                             # in place: the names of parameters stay
    context, saved = run.autocast(device, o.dtype), start
    batches = validation.fixed(o.eval_windows, o.grad_accum_steps)
    per_token = bits_per_byte(batches, encoding)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{'about ' if o.translate else ''}{training.step(o.seed, start).count:,} tokens a step, "
          f"{device.type}", flush=True)
    with run.locked(folder), run.interrupts() as stop:
        run.start_metrics(folder, start)
        bar = tqdm(range(start, end + 1), initial=start, total=o.steps, unit="step",
                   mininterval=0.2 if sys.stderr.isatty() else 15)  # seconds; a log file needs few bars
        for t in bar:
            if t % o.eval_every == 0 or t == o.steps:
                result = evaluate_loss(model, batches, context, stop, o.route)
                if result:
                    require_finite([*result["loss"].values()], "validation loss", t, folder, saved)
                    final = result["loss"].get("causal", result["loss"]["top_k"])[-1]
                    result["bits_per_byte"] = final * per_token
                    run.log_metrics(folder, "val", t, **result)
                    bar.write(f"step {t:5d} | {describe(result)}")
            if t % o.save_every == 0 or t == end or stop:
                run.save(folder, t, model, optimizer)
                saved = t
            if t == end or stop:
                break
            metrics, speed = step_once(model, optimizer, training, o, t, context)
            require_finite(metrics["norm"], "gradient", t, folder, saved)
            run.log_metrics(folder, "train", t + 1, **metrics)
            bar.set_postfix(loss=f"{metrics['loss'][-1]:.3f}", tokens_per_s=f"{speed:,.0f}", refresh=False)
    if stop or t < o.steps:
        print(f"stopped at step {t}, saved. Go on with: python train.py --resume {folder}")
    else:
        finish(folder, o)


def finish(folder, o):
    """Let the other scripts measure the run, sample from it and draw it; say where everything is."""
    device = ["--device", o.device]
    for script, more in ("evaluate.py", device), ("sample.py", device), ("plot.py", []):
        print(f"\n$ python {script} --run {folder}", flush=True)
        subprocess.run([sys.executable, run.HERE / script, "--run", folder, *more], check=False)
    print(f"\nEverything is in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}\n"
          f"Next: python sample.py --run {folder} --prompt TEXT, plot.py --run {folder} --window 3")


if __name__ == "__main__":
    main()
