"""Measure a run on held-out data: python evaluate.py --run 3

    always             loss and bits per byte of every exit; how deep tokens go under an exit rule (depth.npz)
    --bleu SPLIT ...   translate these splits with every fixed exit and with the rule: BLEU, exit, FLOPs, time
    --source FILE      translate your own lines; with --reference FILE also BLEU

Results: evaluation.json, depth.npz and the translations outputs/SPLIT.RULE.txt in the run's folder.
"""
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import sacrebleu
import torch

import cost
import exits
import run
from data.batches import batches_of, open_data
from data.common import UserError, command, token_bytes
from data.parallel import direction, read_lines, sentence, sentence_ids
from decode import read, score, translate
from routing import ROUTES, causal


@dataclass
class Options(run.Halting):
    """Measure a run on held-out data."""
    run: str = "last"           # its folder or number, or "last"
    out: str = "runs"           # where numbered runs are
    data: str = ""              # the prepared folder; left out: the one it was trained on
    bleu: tuple[str, ...] = ()  # splits to translate, such as test_2016_flickr
    source: Path | None = None  # your own sentences to translate, one a line
    reference: Path | None = None   # their translations by somebody else, line by line
    beam: int = 5               # hypotheses; 1: greedy
    penalty: float = 1.0        # hypotheses compare by log-probability / length^penalty
    only_rule: bool = False     # translate with the rule only, not with every fixed exit
    batch: int = 64             # sentences side by side
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


# ----------------------------------------------------------------------------- teacher forcing


def losses(model, batches, encoding, context):
    """-> {routing rule: {"loss": nats per token of each exit, "bits_per_byte": of each exit}}."""
    targets = torch.cat([b.targets[b.targets >= 0] for b in batches]).numpy()
    size, found = token_bytes(encoding)[targets].sum(), {}
    for name in ROUTES if model.config.routed != "none" else ["top_k"]:
        with context:
            sums = sum(score(model, b.to(model.wte.weight.device), ROUTES[name])[0].double() for b in batches)
        found[name] = {"loss": (sums / len(targets)).tolist(),
                       "bits_per_byte": (sums / math.log(2) / size).tolist()}
    return found


def depths(model, batches, rule, named, context):
    """How deep every token goes when the model decides causally: arrays for depth.npz, (W,T,...), padded with
    targets of -1 where rows are shorter."""
    parts, T = [], max(b.ids.size(1) for b in batches)
    for batch in batches:
        batch = batch.to(model.wte.weight.device)
        with context, torch.no_grad():
            found = read(model, batch.ids, batch.pos, model.past(batch), rule, causal)
        arrays = {"ids": batch.ids.int(), "targets": batch.targets.int(),
                  "nats": exits.nats(found.logits, batch.targets), "exit_at": found.exit_at.byte(),
                  "visited": found.visited, "score": found.score.float()}
        parts.append({k: widen(v.cpu().numpy(), T, -1 if k == "targets" else 0) for k, v in arrays.items()})
    named += ", causal routing" if model.config.routed != "none" else ""
    routed = [n in model.config.routed_blocks() for n in range(model.config.n_layer)]
    return {**{k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, "rule": np.array(named),
            "routed": np.array(routed)}


def widen(array, T, value):
    """(B,t,...) -> (B,T,...) with `value` on the right."""
    more = [(0, 0), (0, T - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, more, constant_values=value)


# ----------------------------------------------------------------------------- translation


def translations(model, sources, end, rule, o):
    """Lists of source ids -> their best Generated in the same order, and the seconds that took."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found, began = {}, time.perf_counter()
    for first in range(0, len(order), o.batch):
        part = order[first:first + o.batch]
        best = translate(model, [sources[i] for i in part], end, rule, o.beam, o.penalty)
        found |= zip(part, best, strict=True)
    return [found[i] for i in range(len(sources))], time.perf_counter() - began


def bleu(lines, references, tokenize):
    """-> BLEU and sacrebleu's signature. tokenize "none" is for text that is tokenised already."""
    metric = sacrebleu.BLEU(tokenize=tokenize, force=tokenize == "none")
    return metric.corpus_score(lines, [references]).score, str(metric.get_signature())


def measured(texts, sources, model, confident):
    """The texts that were kept: mean exit and blocks run of a token, FLOPs of a sentence both ways."""
    exit_at, blocks = (np.concatenate([getattr(t, k) for t in texts]) for k in ("exit_at", "visited"))
    each = {name: np.mean([cost.decoding(model.config, model.vocab_size, t.visited, t.exit_at, confident,
                                         len(s), name).flops for t, s in zip(texts, sources, strict=True)])
            for name in ("paper", "needed")}
    return {"exit": float(exit_at.mean()), "blocks": float(blocks.sum(1).mean()),
            **{f"mflops_{name}": float(v) / 1e6 for name, v in each.items()}}


def translate_split(model, trained, encoding, name, lines, references, tokenize, folder, o):
    """Every fixed exit and the rule on one list of sentences -> rows for evaluation.json; prints a table."""
    sources, rows = [sentence_ids(encoding, line) for line in lines], []
    for n, (line, ids) in enumerate(zip(lines, sources, strict=True), 1):
        if not line.strip():
            raise UserError(f"{name}: line {n} is empty")
        if len(ids) > model.config.block_size:
            raise UserError(f"{name}: line {n} has {len(ids)} tokens, the model reads at most "
                            f"{model.config.block_size}")
    rule, named = run.halting_rule(o, trained)
    chosen = {} if o.only_rule or trained.model.exits != "all" else \
        {f"exit {e}": exits.fixed_exit(e) for e in range(1, model.config.n_layer)}
    chosen["full depth"] = exits.full_depth
    if o.only_rule or named not in chosen:
        chosen[named] = rule
    print(f"\n{name}, {len(lines)} sentences, beam {o.beam}\n"
          "| rule | BLEU | exit | blocks | MFLOPs a sentence: paper | needed | time |\n" + "|---" * 7 + "|")
    for label, chosen_rule in chosen.items():
        texts, seconds = translations(model, sources, encoding.eot_token, chosen_rule, o)
        outputs = [sentence(encoding, t.ids) for t in texts]
        row = {"rule": label, **measured(texts, sources, model, label == named and "confidence" in named),
               "seconds": seconds}
        if references is not None:
            row["bleu"], row["signature"] = bleu(outputs, references, tokenize)
        path = folder / "outputs" / f"{name}.{label.replace(' ', '-')}.txt"
        path.parent.mkdir(exist_ok=True)
        run.write_text(path, "".join(line + "\n" for line in outputs))
        rows.append(row | {"file": path.name})
        score_ = f"{row['bleu']:.2f}" if "bleu" in row else ""
        print(f"| {label} | {score_} | {row['exit']:.2f} | {row['blocks']:.2f} | {row['mflops_paper']:.1f} | "
              f"{row['mflops_needed']:.1f} | {seconds:.1f} |", flush=True)
    if references is not None:
        print(f"BLEU: {rows[0]['signature']}")
    return rows


def texts_to_translate(data, trained, o):
    """-> (name, lines, references or None) of everything that is asked for."""
    if (o.bleu or o.source) and not trained.translate:
        raise UserError("this run is a GPT: it has nothing to translate (--bleu, --source)")
    if o.reference and not o.source:
        raise UserError("--reference needs --source: the sentences that it translates")
    for split in o.bleu:
        source, target = direction(data, trained.translate)
        if split not in data.splits or split == "train":
            raise UserError(f"--bleu {split}: there are {', '.join(s for s in data.splits if s != 'train')}")
        yield split, data.originals(split, source), data.originals(split, target)
    if o.source:
        lines, references = read_lines(o.source), o.reference and read_lines(o.reference)
        if references is not None and len(references) != len(lines):
            raise UserError(f"{o.source} has {len(lines)} lines and {o.reference} has {len(references)}")
        yield o.source.stem, lines, references


@command
def main(argv=None):
    o = run.parse(argv, Options)
    if o.beam < 1 or o.batch < 1:
        raise UserError("--beam and --batch must be at least 1")
    folder, trained, device, model = run.open_run(o.run, o.out, o.device)
    _, data = open_data(o.data or trained.data, trained.translate)
    if data.meta["vocab_size"] != model.vocab_size:
        raise UserError(f"{folder} was not trained on this data: its vocabulary is {model.vocab_size}")
    wanted = list(texts_to_translate(data, trained, o))
    context = run.autocast(device, trained.dtype)
    batches = batches_of(data, "val", trained, trained.accumulate).fixed(trained.eval_windows)
    rule, named = run.halting_rule(o, trained)
    found = {"options": json.loads(json.dumps(vars(o), default=str)), **run.environment(device),
             "val": losses(model, batches, data.encoding, context), "translated": {}}
    for route, each in found["val"].items():
        print(f"val, {route}: loss by exit " + " ".join(f"{v:.3f}" for v in each["loss"])
              + f" | {each['bits_per_byte'][-1]:.3f} bits/byte")
    depth = depths(model, batches, rule, named, context)
    there = depth["targets"] >= 0
    print(f"{named}: {there.sum():,} tokens, loss {depth['nats'][there].mean():.3f}, exit after block "
          f"{depth['exit_at'][there].mean():.2f}, {depth['visited'][there].sum(1).mean():.2f} blocks run")
    run.write_atomically(folder / "depth.npz", lambda f: np.savez_compressed(f, **depth))
    for name, lines, references in wanted:
        found["translated"][name] = translate_split(model, trained, data.encoding, name, lines, references,
                                                    data.meta["tokenize"], folder, o)
        run.write_text(folder / "evaluation.json", json.dumps(found, indent=1) + "\n")
    run.write_text(folder / "evaluation.json", json.dumps(found, indent=1) + "\n")
    print(f"wrote {folder}/evaluation.json and {folder}/depth.npz")


if __name__ == "__main__":
    main()
