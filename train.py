"""Train: python train.py [preset] [--option value ...]; --help lists the options.

Step t is a function of (seed, t): its batch, dropout and every other random choice. So nothing random is
stored, and --resume continues exactly."""
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
from decode import evaluate_loss
from options import as_dict, halting_rule, read_options, rule_name
from routing import ROUTES, predictor_loss, report


def backward(ends):
    """One backward pass from all (loss, None) and (states, their gradient)."""
    ends = [(end, gradient) for end, gradient in ends if end.requires_grad]
    with torch.autocast(ends[0][0].device.type, enabled=False):     # keeps the types of forward
        torch.autograd.backward(*zip(*ends, strict=True))


def aligned(model, batch, scale, o):
    """The aligned loss [DAT 2.2], plus the predictor loss of routed blocks [MoD 3.5], the balance loss of
    experts and alpha times the loss of a predictor of exits [DAT 3]; with one classifier a language model's.
    Adds scale * loss to the gradients (scale = 1 / targets of the whole step) and returns the losses (N,),
    summed over tokens at each exit."""
    memory, x, exit_blocks = model.memory_of(batch), model.embed(batch.ids), model.classifiers.blocks
    weights = dict(zip(exit_blocks, exits.exit_weights(o.exit_weights, exit_blocks), strict=True))
    states, judged, ends = [], [], []
    for n, block in enumerate(model.blocks, 1):
        x, routing = block(x, batch.pos, batch.live, None, memory, ROUTES[o.route])
        states.append(x)
        if n in weights:
            loss, right, gradient = exits.loss_and_gradient(model.classifiers, n, x, batch.targets,
                                                            scale * weights[n], o.label_smoothing)
            judged.append((loss, right))
            ends.append((x, gradient))
        if routing.logit is not None:
            ends.append((predictor_loss(routing, batch.mask) * scale * o.predictor_loss, None))
        if routing.choice is not None:
            ends.append((routing.choice.balance * scale * o.balance_loss, None))
        if o.gradient_scale:
            x = exits.balance_gradient(x, n, len(model.blocks), o.gradient_scale)
    losses, right = (torch.stack(parts, -1) for parts in zip(*judged, strict=True))         # (B,T,N)
    if model.exit_predictor:
        score = -losses if o.oracle == "likelihood" else right.to(losses.dtype)
        whole = model.exit_predictor.kind == "sequence"
        exit_at = exits.oracle(score, batch.mask, o.exit_cost, o.sigma, whole)
        loss = model.exit_predictor.loss(states, memory, exit_at, batch.mask)
        ends.append((loss * scale * o.alpha, None))
    backward(ends)
    return losses.sum((0, 1))


def exit_predictor(model, batch, scale, o):
    """Only the exit predictor learns, from a trunk that stays as it is, without dropout [DAT 3]."""
    model.eval().requires_grad_(False).exit_predictor.requires_grad_(True)
    return aligned(model, batch, scale, o)


def mixed(model, batch, scale, o):
    """The mixed loss [DAT 2.2]: every token exits at a block drawn uniformly and keeps its state above; mean
    over `paths` draws. Returns losses (N,) as `aligned`, from the tokens that exited at each block."""
    N, mask, memory, ends = len(model.blocks), batch.mask, model.memory_of(batch), []
    sums, counts = torch.zeros(2, N, device=mask.device)
    for _ in range(o.paths):
        exit_at = torch.randint(1, N + 1, mask.shape, device=mask.device)
        x = model.embed(batch.ids)
        for n, block in enumerate(model.blocks, 1):
            x, _ = block(x, batch.pos, mask & (exit_at >= n), None, memory)
            exiting = mask & (exit_at == n)
            h = x[exiting]
            loss, _, gradient = exits.loss_and_gradient(model.classifiers, n, h, batch.targets[exiting],
                                                        scale / o.paths, o.label_smoothing)
            ends.append((h, gradient))
            sums[n - 1] += loss.sum()
            counts[n - 1] += len(h)
    backward(ends)
    return sums * mask.sum() / counts.clamp(min=1)


OBJECTIVES = {"aligned": aligned, "mixed": mixed, "exit_predictor": exit_predictor}


def learning_rate(t, o):
    """Linear warm-up, then a cosine from lr to lr * lr_end over exactly the run's steps, or lr * sqrt(warmup
    / (t + 1))."""
    if t < o.warmup:
        return o.lr * (t + 1) / o.warmup
    if o.schedule == "inverse_sqrt":
        return o.lr * math.sqrt(o.warmup / (t + 1))
    done = (t - o.warmup) / max(1, o.steps - o.warmup)
    return o.lr * (o.lr_end + (1 - o.lr_end) * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer_of(model, o):
    """AdamW; only matrices decay (not norms, biases, or the one-row routers)."""
    matrices = [p for p in model.parameters() if p.dim() > 1 and p.size(-2) > 1]
    others = [p for p in model.parameters() if p.dim() < 2 or p.size(-2) == 1]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, o.beta2), fused=not model.wte.weight.is_mps)


def begin(o):
    """-> run folder, encoding, (data to train on, to validate on), model, optimizer, t, weights to average;
    of a resumed run as it was stored."""
    source, data = open_data(o.data, o.translate)
    batches = batches_of(data, "train", o), batches_of(data, "val", o, o.grad_accum_steps)
    device, stored = run.device_of(o.device), {"step": 0, "last": {}}
    torch.manual_seed(o.seed)
    model = run.build(o, data.meta["vocab_size"]).to(device)
    halting_rule(rule_name(o, o), model)        # refused before there is a folder
    optimizer = optimizer_of(model, o)
    if o.resume:
        folder = run.find(o.resume, o.out)
        for name in ("meta.json", "tokenizer.json"):
            if (folder / name).read_bytes() != (source / name).read_bytes():
                raise UserError(f"{source} is not the data that {folder} began with: {name} differs")
        stored = run.load(folder, device)
        run.fill(model, stored["model"], folder)
        optimizer.load_state_dict(stored["optimizer"])
    else:
        if o.init_from:
            other = run.find(o.init_from, o.out)
            if (other / "tokenizer.json").read_bytes() != (source / "tokenizer.json").read_bytes():
                raise UserError(f"--init_from: {source} has another tokenizer than {other}")
            run.start_from(model, other, device)
        folder = run.new_folder(o.out)
        for name in ("meta.json", "tokenizer.json"):
            shutil.copy(source / name, folder / name)
        content = {"options": as_dict(o), **run.environment(device)}
        run.write_atomically(folder / "options.json", json.dumps(content, indent=1) + "\n")
    if o.compile:
        run.compile_blocks(model)
    return folder, data.encoding, batches, model, optimizer, stored["step"], stored["last"]


def step_once(model, optimizer, training, o, t, context):
    """Step t: gradients of the batch, piece by piece, then clip, and update if they are finite.
    -> dict for metrics.jsonl (loss in nats per token of each exit), tokens per second."""
    model.train()
    began, batch, rate = time.perf_counter(), training.step(o.seed, t), learning_rate(t, o)
    torch.manual_seed(int(np.random.SeedSequence([o.seed, t]).generate_state(1)[0]))
    objective, device = OBJECTIVES[o.objective], model.wte.weight.device
    with context:
        sums = sum(objective(model, piece.to(device), 1 / batch.count, o)
                   for piece in batch.cut(o.grad_accum_steps))
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss, seconds = (sums / batch.count).tolist(), round(time.perf_counter() - began, 5)
    return {"loss": loss, "norm": norm, "lr": rate, "seconds": seconds}, batch.count / seconds


def evaluate(model, batches, context, stop=(), route="top_k"):
    """-> dict for metrics.jsonl: loss (nats per token) of every exit under each routing rule, how well the
    causal logit predicts the rule that trains; None if an interrupt came."""
    model.eval()
    measured, tokens = evaluate_loss(model, batches, context, stop), sum(b.count for b in batches)
    if measured is None:
        return None
    result = {"loss": {rule: (losses / tokens).tolist() for rule, (losses, _) in measured.items()}}
    if model.config.routed_blocks():
        yes, _, _, no = measured["causal"][1].tolist()      # here a positive logit is a token that runs
        result |= {"predictor": report(measured[route][1]), "causal_share": yes / (yes + no)}
    return result


def describe(result):
    """One line of an evaluation."""
    several = len(result["loss"]) > 1
    parts = [f"{rule} " * several + "loss by exit " + " ".join(f"{v:.2f}" for v in loss)
             for rule, loss in result["loss"].items()]
    parts.append(f"{result['bits_per_byte']:.3f} bits/byte")
    if "predictor" in result:
        parts.append("causal logit right {accuracy:.1%} (always no: {base_rate:.1%}), "
                     "precision {precision:.0%}, recall {recall:.0%}".format(**result["predictor"]))
    return " | ".join(parts)


@command
def main(argv=None):
    o = read_options(argv, run.stored_options)
    folder, encoding, (training, validation), model, optimizer, start, last = begin(o)
    device, end = model.wte.weight.device, min(o.steps, o.stop_at or o.steps)
    if end < start:
        raise UserError(f"--stop_at {end} is behind: {folder} is at step {start}")
    context, batches = run.autocast(device, o.dtype), validation.fixed(o.eval_windows)
    per_token = bits_per_byte(batches, encoding)
    run.start_metrics(folder, start)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{'about ' if o.translate else ''}{training.step(o.seed, start).count:,} tokens a step, "
          f"{device.type}", flush=True)
    pace = 0.2 if sys.stderr.isatty() else 15       # seconds between two bars; a log file needs few
    bar = tqdm(total=o.steps, initial=start, unit="step", mininterval=pace)
    with run.interrupts() as stop, bar:
        for t in range(start, end + 1):
            if t % o.eval_every == 0 or t == o.steps:
                result = evaluate(model, batches, context, stop, o.route)
                if result:
                    final = result["loss"].get("causal", result["loss"]["top_k"])[-1]
                    result["bits_per_byte"] = final * per_token
                    run.log_metrics(folder, "val", t, **result)
                    bar.write(f"step {t:5d} | {describe(result)}")
            if (t and t % o.save_every == 0) or t == o.steps:
                last = run.keep_last(last, t, model, o.average)
            if t % o.save_every == 0 or t == end or stop:
                run.save(folder, t, model, optimizer, last)
            if t == end or stop:
                break
            result, speed = step_once(model, optimizer, training, o, t, context)
            if not math.isfinite(result["norm"]):
                saved = max(start, t - t % o.save_every)
                raise UserError(f"step {t}: the gradient is not finite, so the step was not taken. "
                                f"{folder}/ckpt.pt holds step {saved}. Try a lower --lr or a longer --warmup")
            if (t + 1) % o.log_every == 0:
                run.log_metrics(folder, "train", t + 1, **result)
                bar.set_postfix(loss=f"{result['loss'][-1]:.3f}", tokens_per_s=f"{speed:,.0f}", refresh=False)
            bar.update()
    if stop or t < o.steps:
        print(f"stopped at step {t}, saved. Go on with: python train.py --resume {folder}")
    else:
        finish(folder, o)


def finish(folder, o):
    """Let the other scripts measure the run, sample from it and draw it; say where everything is."""
    if o.average > 1:
        print(f"\nThe final weights are the mean of the last {o.average} checkpoints.")
    device = ["--device", o.device]
    for script, more in ("evaluate.py", device), ("sample.py", device), ("plot.py", []):
        print(f"\n$ python {script} --run {folder}", flush=True)
        subprocess.run([sys.executable, run.HERE / script, "--run", folder, *more], check=False)
    prompt = run.read_json(folder / "meta.json", "prompt")
    prompt = prompt[o.translate.split("-")[0]] if o.translate else prompt
    print(f"\nEverything is in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}\n"
          f"Next: python sample.py --run {folder} --prompt {json.dumps(prompt, ensure_ascii=False)}\n"
          f"      python plot.py --run {folder} --window 3 --first 0\n"
          f"      python train.py --help")


if __name__ == "__main__":
    main()
