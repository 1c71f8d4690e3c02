"""Measure a run on held-out data: python evaluate.py --run 3

    always             loss and bits per byte of every exit; loss, mean exit and FLOPs of every fixed exit and
                       of the run's rule; how deep tokens go under the rule (depth.npz)
    --rules RULE ...   these rules instead; also oracle:KIND:LAMBDA:SIGMA, the exits that an oracle picks
                       knowing the right answer (what is left out is as the run's own)
    --bleu SPLIT ...   translate these splits with the rules: BLEU, exit, FLOPs of all hypotheses, time
    --source FILE      translate your own lines; with --reference FILE also BLEU
    --search 10000     find the best thresholds for each depth among so many draws, and add them to the rules

Results: evaluation.json (rows of other rules and splits are kept), depth.npz, outputs/SPLIT.RULE.txt.
"""
import json
import keyword
import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import sacrebleu
import torch

import cost
import exits
import run
from data.batches import batches_of, bits_per_byte, open_data
from data.common import UserError, command
from data.parallel import direction, read_lines, sentence, source_ids
from decode import Cache, evaluate_loss, step, translate
from options import RunOptions, halting_rule, parse, refuse, rule_name
from routing import causal


@dataclass
class Options(RunOptions):
    """Measure a run on held-out data."""
    data: str = ""              # the prepared folder; left out: the one it was trained on
    bleu: tuple[str, ...] = ()  # splits to translate, such as test_2016_flickr
    source: Path | None = None  # your own sentences to translate, one a line
    reference: Path | None = None   # their reference translations, line by line
    beam: int = 5               # hypotheses; 1: greedy
    length_penalty: float = 1.0     # hypotheses compare by log-probability / length^this
    rules: tuple[str, ...] = ()     # these instead of every fixed exit and the rule
    exited_kv: Literal["copy", "compute"] = "copy"  # what later tokens see of an exited one
    search: int = 0             # draws of thresholds; 0: no search
    batch_size: int = 64        # sentences side by side


def check(o, folder, source, trained, model):
    """UserError for what cannot be measured, before anything is."""
    if o.beam < 1 or o.batch_size < 1 or o.search < 0 or not abs(o.length_penalty) < 100:
        raise UserError("--beam and --batch_size must be at least 1, --search at least 0 draws (a number of "
                        "draws), --length_penalty a small number")
    if (folder / "tokenizer.json").read_bytes() != (source / "tokenizer.json").read_bytes():
        raise UserError(f"{folder} was not trained on this data: {source} has another tokenizer")
    if (o.bleu or o.source) and not trained.translate:
        raise UserError("this run is a GPT: it has nothing to translate (--bleu, --source)")
    if not o.bleu and not o.source:
        refuse(o, ("beam", "length_penalty", "batch_size"), "nothing is translated (--bleu, --source)")
    if o.exited_kv == "compute" and trained.model.routed != "none":
        raise UserError("--exited_kv compute is for models without routed blocks: FLOPs are not counted")
    if o.search and trained.model.exits == "last":
        raise UserError("--search finds thresholds, and this run has one classifier: train with --exits all")
    if o.reference and not o.source:
        raise UserError("--reference needs --source: the sentences that it translates")
    for name in o.rules:
        if name.startswith("oracle"):
            oracle_of(name, trained)
        else:
            halting_rule(name, model)


def texts_to_translate(data, trained, o):
    """-> [(name, lines, references or None)] of everything that is asked for."""
    texts = []
    for split in o.bleu:
        if split not in data.splits or split == "train":
            raise UserError(f"--bleu {split}: there are {', '.join(s for s in data.splits if s != 'train')}")
        lines, references = (data.originals(split, name) for name in direction(data, trained.translate))
        texts.append((split, lines, references))
    if o.source:
        lines, references = read_lines(o.source), o.reference and read_lines(o.reference)
        if references is not None and len(references) != len(lines):
            raise UserError(f"{o.source} has {len(lines)} lines and {o.reference} has {len(references)}")
        texts.append((o.source.stem, lines, references))
    return texts


WORDS = rb"(?P<number>\d[\w.]*)|(?P<name>[A-Za-z_\x80-\xff][\w\x80-\xff]*)|(?P<space>\s+)|(?P<punctuation>.)"
TEXT = rb"(?P<text>('{3}|\"{3}).*?\2|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|\#[^\n]*)"


def kinds_of(encoding, ids, code):
    """One document's token ids -> the kind of each: space, number, punctuation, end, and word, or in Python
    code name, keyword and text (strings and comments). The first byte that is no space decides."""
    pieces = [b"" if i == encoding.eot_token else encoding.decode_single_token_bytes(int(i)) for i in ids]
    of_bytes = []
    for match in re.finditer(TEXT + b"|" + WORDS if code else WORDS, b"".join(pieces), re.S):
        kind = match.lastgroup
        if kind == "name":
            reserved = code and keyword.iskeyword(match[0].decode("utf-8", "replace"))
            kind = "keyword" if reserved else "name" if code else "word"
        of_bytes += [kind] * len(match[0])
    kinds, end = [], 0
    for piece in pieces:
        first = end + len(piece) - len(piece.lstrip() or piece)
        kinds.append(of_bytes[first] if piece else "end")
        end += len(piece)
    return kinds


def kinds_in(data, trained):
    """The kinds of the tokens in the validation windows (W,T), told from whole documents."""
    documents = np.split(data.val, np.flatnonzero(data.val == data.encoding.eot_token) + 1)
    kinds = [kind for document in documents
             for kind in kinds_of(data.encoding, document, data.meta.get("code", False))]
    names, codes = np.unique(kinds, return_inverse=True)
    windows = batches_of(data._replace(val=codes), "val", trained, trained.grad_accum_steps)
    return names[np.concatenate([b.ids for b in windows.fixed(trained.eval_windows)])]


def exit_scores(model, batch):
    """Full depth -> token losses, right, max. probability of every exit, each (B,T,N)."""
    scores = []
    for n, (h, _) in enumerate(model.run_batch(batch, causal), 1):
        logits = model.classifiers(n, h)
        scores.append((exits.token_losses(logits, batch.targets), logits.argmax(-1) == batch.targets,
                       exits.max_probability(logits)))
    return [torch.stack(parts, -1) for parts in zip(*scores, strict=True)]


def oracle_of(name, trained):
    """oracle[:KIND][:LAMBDA[:SIGMA]] -> kind, exit_cost, sigma; what is left out is as the run's own."""
    parts = re.fullmatch(r"oracle(?::(correctness|likelihood))?(?::(\d*\.?\d+)(?::(\d*\.?\d+))?)?", name)
    if trained.model.exits != "all" or not parts:
        raise UserError(f"--rules {name}: an oracle chooses among exits (--exits all) by correctness or by "
                        "likelihood; then come what it pays for a block and its sigma, both at least 0, as "
                        "in oracle:likelihood:0.1:2")
    kind, exit_cost, sigma = parts.groups()
    return kind or trained.oracle, float(exit_cost or trained.exit_cost), float(sigma or trained.sigma)


def oracle_rule(name, trained, model, batch):
    """The exits that an oracle picks for this very batch."""
    kind, exit_cost, sigma = oracle_of(name, trained)
    losses, right, _ = exit_scores(model, batch)
    score = -losses if kind == "likelihood" else right.to(losses.dtype)
    whole = trained.model.exit_predictor == "sequence"
    return exits.forced_exits(exits.oracle(score, batch.mask, exit_cost, sigma, whole))


def under_rule(model, batches, name, trained, context, exited_kv):
    """The batches read with a halting rule and causal routing: arrays (W,T,...) as for depth.npz, padded
    with targets of -1 where rows are shorter."""
    parts, T = defaultdict(list), max(b.ids.size(1) for b in batches)
    for i, batch in enumerate(batches):
        torch.manual_seed(i)                # random exits and the random control draw anew for every batch
        batch = batch.to(model.wte.weight.device)
        with context, torch.no_grad():
            rule = (oracle_rule(name, trained, model, batch) if name.startswith("oracle") else
                    halting_rule(name, model))
            cache = Cache(model, *batch.pos.shape, model.memory_of(batch))
            output = step(model, batch.ids, batch.pos, cache, rule, causal, exited_kv)
        log_probs = exits.to_float32(output.logits).log_softmax(-1)
        arrays = {"ids": batch.ids.int(), "targets": batch.targets.int(),
                  "loss": exits.token_losses(output.logits, batch.targets),
                  "entropy": -(log_probs.exp() * log_probs).sum(-1),
                  "right": output.logits.argmax(-1) == batch.targets, "exit_at": output.exit_at.byte(),
                  "visited": output.visited, "worked": output.worked, "weight": output.weight,
                  "classified": output.classified.byte(), "predicted": output.predicted.byte()}
        for key, tensor in arrays.items():
            array, padding = tensor.cpu().numpy(), -1 if key == "targets" else 0
            width = [(0, 0), (0, T - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
            parts[key].append(np.pad(array, width, constant_values=padding))
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}


def depth_and_cost(model, exit_at, visited, texts, exited_kv):
    """Mean exit, blocks, MFLOPs by both accountings, and keys and values kept as a share of a dense model's.
    texts: for each text or beam its steps (arrays by name), and S."""
    both, costs = ("computed", "computed") if exited_kv == "compute" else ("paper", "needed"), []
    for steps, S in texts:
        steps = {name: np.array(values) for name, values in steps.items()}
        paper, needed = (cost.decoding(model.config, model.vocab_size, **steps, S=S, copies=c) for c in both)
        costs.append((paper.flops / 1e6, needed.flops / 1e6, paper.cache))
    mean = zip(("mflops_paper", "mflops_needed", "cache"), np.mean(costs, 0).tolist(), strict=True)
    return {"exit": float(exit_at.mean()), "blocks": float(visited.sum(1).mean()), **dict(mean)}


def table(title, *columns):
    print(f"\n{title}| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def forced(model, batches, names, trained, context, o, known):
    """Rows for evaluation.json: each rule on the validation batches, read at once as if step by step;
    known: {rule: what `under_rule` returned} so far."""
    rows, sources = [], [S for batch in batches for S in batch.sources()]
    counted = "visited", "exit_at", "classified", "predicted", "worked"
    table("", "rule", "loss", "right", "exit", "blocks", "MFLOPs a sequence: paper", "needed",
          "cache / dense")
    for name in names:
        arrays = known.get(name) or under_rule(model, batches, name, trained, context, o.exited_kv)
        mask = arrays["targets"] >= 0
        texts = [({k: arrays[k][w, mask[w]] for k in counted}, S) for w, S in enumerate(sources)]
        loss, right, exit_at, visited = (arrays[key][mask] for key in ("loss", "right", "exit_at", "visited"))
        row = {"rule": name, "loss": float(loss.mean()), "right": float(right.mean()),
               "exited_kv": o.exited_kv, **depth_and_cost(model, exit_at, visited, texts, o.exited_kv)}
        rows.append(row)
        print("| {rule} | {loss:.3f} | {right:.1%} | {exit:.2f} | {blocks:.2f} | {mflops_paper:.1f} | "
              "{mflops_needed:.1f} | {cache:.0%} |".format(**row), flush=True)
    return rows


def search_thresholds(model, batches, draws, context):
    """Thresholds drawn uniformly, judged by the exits' confidences under teacher forcing (no copied states)
    -> for each segment of one block of mean exit the rule that is right most often, [(exit, right,
    name)]."""
    confidences, right = [], []
    for batch in batches:
        batch = batch.to(model.wte.weight.device)
        with context, torch.no_grad():
            _, hits, confidence = exit_scores(model, batch)
        confidences.append(confidence[batch.mask].cpu().numpy())
        right.append(hits[batch.mask].cpu().numpy())
    confidences, right = np.concatenate(confidences), np.concatenate(right)             # (tokens,N)
    (tokens, N), best = confidences.shape, {}
    for tau in np.random.default_rng(0).random((draws, N - 1)):
        exits_here = np.concatenate([confidences[:, :-1] > tau, np.ones((tokens, 1), bool)], 1)
        exit_at = exits_here.argmax(1)                                                  # from 0
        exit_, share = exit_at.mean() + 1, right[np.arange(tokens), exit_at].mean()
        if int(exit_) not in best or best[int(exit_)][1] < share:
            best[int(exit_)] = exit_, share, "confidence:" + ",".join(f"{t:.3f}" for t in tau)
    return [best[segment] for segment in sorted(best)]


def translations(model, sources, eos_id, rule, o):
    """Lists of source ids -> [(best Generated, BeamTrace)] in the same order, and the seconds that took."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    results, began = {}, time.perf_counter()
    for first in range(0, len(order), o.batch_size):
        part = order[first:first + o.batch_size]
        best = translate(model, [sources[i] for i in part], eos_id, rule, o.beam, o.length_penalty,
                         exited_kv=o.exited_kv)
        results |= zip(part, best, strict=True)
    return [results[i] for i in range(len(sources))], time.perf_counter() - began


def translate_split(model, encoding, name, lines, references, tokenize, folder, o, rules):
    """The rules on one list of sentences -> rows for evaluation.json; prints a table."""
    sources, rows = source_ids(encoding, lines, model.config.block_size, name), []
    metric = sacrebleu.BLEU(tokenize=tokenize, force=tokenize == "none")    # none: tokenised already
    table(f"{name}, {len(lines)} sentences, beam {o.beam}\n", "rule", "BLEU", "exit", "blocks",
          "MFLOPs a sentence, all hypotheses: paper", "needed", "seconds")
    for label in (r for r in rules if not r.startswith("oracle")):
        torch.manual_seed(0)
        best, seconds = translations(model, sources, encoding.eot_token, halting_rule(label, model), o)
        outputs = [sentence(encoding, text.ids) for text, _ in best]
        exit_at, visited = (np.concatenate([getattr(text, part) for text, _ in best])
                            for part in ("exit_at", "visited"))
        counted = "parent", "exit_at", "visited", "classified", "predicted"
        texts = [({key: [getattr(taken, key) for taken in steps] for key in counted}, len(source))
                 for (_, steps), source in zip(best, sources, strict=True)]
        path = folder / "outputs" / f"{name}.{label.replace(':', '-').replace(',', '_')}.txt"
        row = {"rule": label, **depth_and_cost(model, exit_at, visited, texts, o.exited_kv),
               "seconds": seconds, "exited_kv": o.exited_kv, "beam": o.beam, "file": path.name}
        if references is not None:
            row |= {"bleu": metric.corpus_score(outputs, [references]).score,
                    "signature": str(metric.get_signature())}
        path.parent.mkdir(exist_ok=True)
        run.write_atomically(path, "".join(line + "\n" for line in outputs))
        rows.append(row)
        print("| {rule} | {bleu:.2f} | {exit:.2f} | {blocks:.2f} | {mflops_paper:.1f} | "
              "{mflops_needed:.1f} | {seconds:.1f} |".format(**{"bleu": math.nan, **row}), flush=True)
    if references is not None and rows:
        print(f"BLEU: {rows[0]['signature']}")
    return rows


def merged(old, new):
    """Rows of an earlier evaluation whose rule was not measured now, then the new ones."""
    return [row for row in old if row["rule"] not in {r["rule"] for r in new}] + new


@command
def main(argv=None):
    o = parse(argv, Options)
    folder, trained, device, model = run.open_run(o.run, o.out, o.device)
    source, data = open_data(o.data or trained.data, trained.translate)
    check(o, folder, source, trained, model)
    texts, named, L = texts_to_translate(data, trained, o), rule_name(o, trained), trained.model.n_layer
    halting_rule(named, model)
    fixed = [f"fixed:{e}" for e in range(1, L)] if trained.model.exits == "all" else []
    rules = list(o.rules) or [*dict.fromkeys([*fixed, "full", named])]
    context = run.autocast(device, trained.dtype)
    batches = batches_of(data, "val", trained, trained.grad_accum_steps).fixed(trained.eval_windows)
    tokens, per_byte = sum(b.count for b in batches), bits_per_byte(batches, data.encoding)
    path = folder / "evaluation.json"
    before = run.read_json(path) if path.exists() and not o.data else {}
    result = {"options": json.loads(json.dumps(vars(o), default=str)), **run.environment(device),
              "parameters": sum(p.numel() for p in model.parameters()), "val": {},
              "translated": before.get("translated", {})}
    for route, (losses, _) in evaluate_loss(model, batches, context).items():
        loss, bits = (losses / tokens).tolist(), (losses / tokens * per_byte).tolist()
        result["val"][route] = {"loss": loss, "bits_per_byte": bits}
        by_exit = " ".join(f"{v:.3f}" for v in loss)
        print(f"val, {route}: loss by exit {by_exit} | {bits[-1]:.3f} bits/byte")
    depth = under_rule(model, batches, named, trained, context, o.exited_kv)
    if not trained.translate:
        depth["kind"] = kinds_in(data, trained)
    depth["routed"] = np.array([n in trained.model.routed_blocks() for n in range(L)])
    depth["rule"] = np.array(named.replace(":", " ") + ", causal routing" * bool(depth["routed"].any()))
    run.write_atomically(folder / "depth.npz", lambda f: np.savez_compressed(f, **depth))
    if o.search:
        result["search"] = search_thresholds(model, batches, o.search, context)
        for exit_, right, rule in result["search"]:
            print(f"search: exit {exit_:.2f}, right {right:.1%}: {rule}")
        rules += [rule for *_, rule in result["search"]]    # confirmed by reading and translating for real
    result["forced"] = merged(before.get("forced", []), forced(model, batches, rules, trained, context, o,
                                                               {named: depth}))
    for name, lines, references in texts:
        tokenize = data.meta.get("tokenize", "13a")
        rows = translate_split(model, data.encoding, name, lines, references, tokenize, folder, o, rules)
        result["translated"][name] = merged(result["translated"].get(name, []), rows)
        run.write_atomically(path, json.dumps(result, indent=1) + "\n")
    run.write_atomically(path, json.dumps(result, indent=1) + "\n")
    print(f"wrote {path} and {folder}/depth.npz")


if __name__ == "__main__":
    main()
