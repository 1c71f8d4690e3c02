"""Measure a run on held-out data: python evaluate.py --run 3

    always             loss and bits per byte of every exit; loss, mean exit and FLOPs of every fixed exit and
                       of the run's rule; how deep tokens go under the rule (depth.npz)
    --rules RULE ...   these rules instead; also oracle:KIND:LAMBDA:SIGMA, the exits that an oracle picks
                       knowing the right answer (what is left out is as the run's own)
    --bleu SPLIT ...   translate these splits with the rules: BLEU, exit, FLOPs, time
    --search 10000     find the best thresholds for each depth among so many draws, and add them to the rules

Results: evaluation.json (other rows of the same weights are kept), depth.npz, outputs/SPLIT.RULE.txt.
"""
import json
import re
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import sacrebleu
import torch

import cost
import exits
import run
from data.batches import batches_of, bits_per_byte, open_data
from data.common import UserError, command, reading, write_file
from data.parallel import direction, originals, sentence, source_ids
from decode import COUNTED, Cache, evaluate_loss, step, translate
from options import RunOptions, parse, refuse, rule_name, within
from routing import causal


@dataclass
class Options(RunOptions):
    """Measure a run on held-out data."""
    data: str = ""              # the prepared folder; left out: the one it was trained on
    bleu: tuple[str, ...] = ()  # splits to translate, such as test_2016_flickr
    beam: int = 5               # hypotheses; 1: greedy
    length_penalty: float = 1.0     # hypotheses compare by log-probability / length^this
    rules: tuple[str, ...] = ()     # these instead of every fixed exit and the rule
    exited_kv: Literal["copy", "compute"] = "copy"  # what later tokens see of an exited one
    search: int = 0             # draws of thresholds; 0: no search
    batch_size: int = 64        # sentences side by side


def check(o, folder, source, data, trained, model):
    """UserError for what cannot be measured, before anything is."""
    within(vars(o), {(1, 4096): "beam batch_size", (0, 10**6): "search", (-100, 100): "length_penalty"})
    run.same_data(folder, source, ("tokenizer.json",))
    if not o.bleu:
        refuse(o, ("beam", "length_penalty", "batch_size"), "nothing is translated (--bleu)")
    if o.bleu and not trained.translate:
        raise UserError("this run is a GPT: it has nothing to translate (--bleu)")
    for split in o.bleu:
        if split not in data.splits or split == "train":
            raise UserError(f"--bleu {split}: there are {', '.join(s for s in data.splits if s != 'train')}")
    if o.exited_kv == "compute" and trained.model.routed != "none":
        raise UserError("--exited_kv compute is for models without routed blocks: FLOPs are not counted")
    if o.search and trained.model.exits == "last":
        raise UserError("--search finds thresholds, and this run has one classifier: train with --exits all")
    for name in o.rules:
        if name.startswith("oracle"):
            oracle_of(name, trained)
        else:
            exits.parse_rule(name, model)


def kinds_of(encoding):
    """(V,) kind of every token by its first character that is no space: word, number, punctuation, space."""
    kinds = []
    for i in range(encoding.n_vocab - 1):
        text = encoding.decode_single_token_bytes(i).strip()
        first = text[:1]
        word = first.isalpha() or first == b"_" or first > b"\x7f"      # or a letter of several bytes
        kind = "word" if word else "number" if first.isdigit() else "punctuation" if first else "space"
        kinds.append("." if text == b"." else kind)
    return np.array([*kinds, "end"])


def exit_scores(model, batch):
    """Full depth -> token losses (B,T,N), most likely tokens, their probabilities; blocks run (B,T,L)."""
    scores, runs = [], []
    for n, (h, routing) in enumerate(model.run_batch(batch, causal), 1):
        runs.append(routing.runs)
        if n in model.classifiers.blocks:
            logits = model.classifiers(n, h)
            p, said = exits.to_float32(logits).softmax(-1).max(-1)
            scores.append((exits.token_losses(logits, batch.targets), said, p))
    return *(torch.stack(parts, -1) for parts in zip(*scores, strict=True)), torch.stack(runs, -1)


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
    losses, said, *_ = exit_scores(model, batch)
    score = -losses if kind == "likelihood" else (said == batch.targets.unsqueeze(-1)).to(losses.dtype)
    whole = trained.model.exit_predictor == "sequence"
    return exits.forced_exits(exits.oracle(score, batch.mask, exit_cost, sigma, whole))


def joined(parts):
    """[{name: (B,T,...)}] of batches -> {name: array (W, longest T, ...)}, where padding is -1 or 0."""
    T = max(part["targets"].size(1) for part in parts)

    def padded(name, x):
        shorter = [(0, 0), (0, T - x.size(1)), (0, 0)][:x.dim()]
        return np.pad(x.cpu().numpy(), shorter, constant_values=-1 if name == "targets" else 0)
    return {name: np.concatenate([padded(name, part[name]) for part in parts]) for name in parts[0]}


def under_rule(model, batches, name, trained, context, exited_kv):
    """The batches under a halting rule and causal routing -> arrays (W,T,...); targets -1 at padding."""
    parts = []
    for i, batch in enumerate(batches):
        torch.manual_seed(i)                # random exits and the random control
        batch = batch.to(model.wte.weight.device)
        with context, torch.no_grad():
            rule = (oracle_rule(name, trained, model, batch) if name.startswith("oracle") else
                    exits.parse_rule(name, model))
            torch.manual_seed(i)            # the oracle has drawn, too
            cache = Cache(model, *batch.pos.shape, model.memory_of(batch))
            output = step(model, batch.ids, batch.pos, cache, rule, causal, exited_kv)
        log_probs = exits.to_float32(output.logits).log_softmax(-1)
        parts.append({"ids": batch.ids.int(), "targets": batch.targets.int(), "present": batch.mask,
                      "loss": exits.token_losses(output.logits, batch.targets),
                      "entropy": -(log_probs.exp() * log_probs).sum(-1),
                      "right": output.logits.argmax(-1) == batch.targets, **output._asdict()})
        del parts[-1]["logits"]
    return joined(parts)


def lens(model, batches, context):
    """Full depth: what each exit would say next, how sure it is, the blocks run -> arrays (W,T,...)."""
    parts = []
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        batch = batch.to(model.wte.weight.device)
        with context, torch.no_grad():
            _, said, p, runs = exit_scores(model, batch)
        parts.append({"targets": batch.targets.int(), "said": said.int(), "confidence": p, "runs": runs})
    return joined(parts)


def depth_and_cost(model, texts, exited_kv):
    """Mean exit, blocks, MFLOPs by both accountings, and keys and values kept as a share of a dense model's.
    texts: for each text what `step` counted of its tokens (arrays by name), and its S source tokens."""
    both, costs = ("computed", "computed") if exited_kv == "compute" else ("paper", "needed"), []
    for counted, S in texts:
        paper, needed = (cost.decoding(model.config, model.vocab_size, **counted, S=S, copies=copies)
                         for copies in both)
        costs.append((paper["flops"] / 1e6, needed["flops"] / 1e6, paper["cache"]))
    mean = zip(("mflops_paper", "mflops_needed", "cache"), np.mean(costs, 0).tolist(), strict=True)
    exit_at = np.concatenate([counted["exit_at"] for counted, _ in texts])
    visited = np.concatenate([counted["visited"] for counted, _ in texts])
    return {"exit": float(exit_at.mean()), "blocks": float(visited.sum(1).mean()), **dict(mean)}


COLUMNS = {     # of the tables: key of a row -> head, format
    "rule": ("rule", ""), "loss": ("loss", ".3f"), "right": ("right", ".1%"), "bleu": ("BLEU", ".2f"),
    "exit": ("exit", ".2f"), "blocks": ("blocks", ".2f"), "mflops_paper": ("MFLOPs a text: paper", ".1f"),
    "mflops_needed": ("needed", ".1f"), "cache": ("cache / dense", ".0%"), "seconds": ("seconds", ".1f")}


def print_row(row, first):
    """A row of a Markdown table, below its head if it is the first."""
    columns = {key: COLUMNS[key] for key in COLUMNS if key in row}
    if first:
        print("| " + " | ".join(head for head, _ in columns.values()) + " |\n" + "|---" * len(columns) + "|")
    print("| " + " | ".join(format(row[key], form) for key, (_, form) in columns.items()) + " |", flush=True)


def tenths_of(mask):
    """(W,T) bool -> (W,T) "tenth 01" to "tenth 10": where the middle of a token is in its row's tokens."""
    place = (2 * mask.cumsum(1) - 1) * 10 // np.maximum(2 * mask.sum(1, keepdims=True), 1) + 1
    return np.char.add("tenth ", np.char.zfill(place.astype(str), 2))


def by_kind(arrays, mask, kinds):
    """{kind: number of its tokens at each exit 1..L and with 0..L blocks run, share that is right}."""
    blocks, L, table = arrays["visited"].sum(-1), arrays["visited"].shape[-1], {}
    for kind in np.unique(kinds[mask]).tolist():
        here = mask & (kinds == kind)
        table[kind] = {"exits": np.bincount(arrays["exit_at"][here], minlength=L + 1)[1:].tolist(),
                       "blocks": np.bincount(blocks[here], minlength=L + 1).tolist(),
                       "right": float(arrays["right"][here].mean())}
    return table


def forced(model, batches, names, trained, context, o, known, kinds):
    """Rows for evaluation.json: each rule on the validation batches, read at once as if step by step;
    known: {rule: what `under_rule` returned} so far; kinds (W,T) of their tokens."""
    rows, sources = [], [S for batch in batches for S in batch.sources()]
    for name in names:
        arrays = known.get(name) or under_rule(model, batches, name, trained, context, o.exited_kv)
        mask, present = arrays["targets"] >= 0, arrays["present"]
        texts = [({k: arrays[k][w, present[w]] for k in COUNTED}, S) for w, S in enumerate(sources)]
        inside = mask & (kinds != "end")        # the last tenth would be the end of its text, mostly
        rows.append({"rule": name, **{key: float(arrays[key][mask].mean()) for key in ("loss", "right")},
                     "exited_kv": o.exited_kv, **depth_and_cost(model, texts, o.exited_kv),
                     "exit": float(arrays["exit_at"][mask].mean()),     # of targets; FLOPs are those of all
                     "blocks": float(arrays["visited"][mask].sum(1).mean()),
                     "kinds": by_kind(arrays, mask, kinds),
                     "tenths": by_kind(arrays, inside, tenths_of(inside)) if trained.translate else {}})
        print_row(rows[-1], first=len(rows) == 1)
    return rows


def search_thresholds(depth, draws):
    """Thresholds drawn uniformly, judged under teacher forcing (no copied states) [DAT 3.2] -> for every
    segment of one block of mean exit the rule that is right most often, [(exit, right, name)]. depth: of
    `lens`."""
    asked = depth["targets"] >= 0
    confidences = depth["confidence"][asked]                                            # (tokens,N)
    right = depth["said"][asked] == depth["targets"][asked][:, None]
    (tokens, N), best = confidences.shape, {}
    for tau in np.random.default_rng(0).random((draws, N - 1)):
        exits_here = np.concatenate([confidences[:, :-1] > tau, np.ones((tokens, 1), bool)], 1)
        exit_at = exits_here.argmax(1)                                                  # from 0
        exit_, share = exit_at.mean() + 1, right[np.arange(tokens), exit_at].mean()
        if int(exit_) not in best or best[int(exit_)][1] < share:
            best[int(exit_)] = exit_, share, "confidence:" + ",".join(f"{t:.3f}" for t in tau)
    return [best[segment] for segment in sorted(best)]


def translations(model, sources, eos_id, rule, o):
    """Lists of source ids -> the best Generated of each, and the seconds that took."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    results, began = {}, time.perf_counter()
    for first in range(0, len(order), o.batch_size):
        part = order[first:first + o.batch_size]
        best = translate(model, [sources[i] for i in part], eos_id, rule, o.beam, o.length_penalty,
                         exited_kv=o.exited_kv)
        results |= zip(part, best, strict=True)
    return [results[i] for i in range(len(sources))], time.perf_counter() - began


def translate_split(model, data, split, trained, folder, o, rules):
    """The rules on the sentences of a split -> rows for evaluation.json; prints a table."""
    encoding, rows, tokenize = data.encoding, [], data.meta["tokenize"]
    lines, references = (originals(data, split, name) for name in direction(data, trained.translate))
    sources = source_ids(encoding, lines, model.config.block_size, split)
    metric = sacrebleu.BLEU(tokenize=tokenize, force=tokenize == "none")    # none: tokenised already
    print(f"\n{split}, {len(lines)} sentences, beam {o.beam}, FLOPs of the best hypothesis")
    for label in (r for r in rules if not r.startswith("oracle")):
        torch.manual_seed(0)
        best, seconds = translations(model, sources, encoding.eot_token, exits.parse_rule(label, model), o)
        outputs = [sentence(encoding, text.ids) for text in best]
        texts = [({key: getattr(text, key) for key in COUNTED}, len(source))
                 for text, source in zip(best, sources, strict=True)]
        path = folder / "outputs" / f"{split}.{label.replace(':', '-').replace(',', '_')}.txt"
        path.parent.mkdir(exist_ok=True)
        write_file(path, "".join(line + "\n" for line in outputs))
        rows.append({"rule": label, "bleu": metric.corpus_score(outputs, [references]).score,
                     "signature": str(metric.get_signature()), "seconds": seconds, "file": path.name,
                     "exited_kv": o.exited_kv, "beam": o.beam, "flops_of": "the best hypothesis",
                     **depth_and_cost(model, texts, o.exited_kv)})
        print_row(rows[-1], first=len(rows) == 1)
    print("BLEU:", metric.get_signature())
    return rows


def merged(old, new):
    """Rows of an earlier evaluation whose rule was not measured now, then the new ones."""
    return [row for row in old if row["rule"] not in {r["rule"] for r in new}] + new


@command
def main(argv=None):
    o = parse(argv, Options)
    folder, trained, device, model, step = run.open_run(o.run, o.out, o.device)
    source, data = open_data(o.data or trained.data, trained.translate)
    check(o, folder, source, data, trained, model)
    named, L = rule_name(o, trained), trained.model.n_layer
    exits.parse_rule(named, model)
    fixed = [f"fixed:{e}" for e in range(1, L)] if trained.model.exits == "all" else []
    rules = list(o.rules) or [*dict.fromkeys([*fixed, "full", named])]
    context = run.autocast(device, trained.dtype)
    batches = batches_of(data, "val", trained).fixed(trained.eval_windows, trained.grad_accum_steps)
    per_byte = bits_per_byte(batches, data.encoding)
    path, nothing = folder / "evaluation.json", {"forced": [], "translated": {}}
    with reading(path):
        before = run.read_json(path) if path.exists() and not o.data else nothing
        for rows in (before["forced"], *before["translated"].values()):
            merged(rows, [])        # fails here if they are no rows
    before = before if before.get("step") == step else nothing      # rows of other weights
    result = {"step": step, "options": json.loads(json.dumps(vars(o), default=str)),
              **run.environment(device), "parameters": sum(p.numel() for p in model.parameters()), "val": {},
              "translated": before["translated"]}
    for route, loss in evaluate_loss(model, batches, context)["loss"].items():
        bits = [nats * per_byte for nats in loss]
        result["val"][route] = {"loss": loss, "bits_per_byte": bits}
        print(f"val, {route}: loss by exit", *(f"{v:.3f}" for v in loss), f"| {bits[-1]:.3f} bits/byte")
    depth = under_rule(model, batches, named, trained, context, o.exited_kv) | lens(model, batches, context)
    depth["sources"] = np.array([S for batch in batches for S in batch.sources()])
    depth["kind"] = kinds_of(data.encoding)[depth["targets" if trained.translate else "ids"]]
    if data.meta.get("listing"):        # data/hops: the token before a start says how many steps
        depth["kind"] = np.char.add((np.roll(depth["ids"], 1, 1) - ord("0")).astype(str), " hops")
    depth["routed"] = np.array([n in trained.model.routed_blocks() for n in range(L)])
    depth["rule"] = np.array(named.replace(":", " ") + ", causal routing" * bool(depth["routed"].any()))
    write_file(folder / "depth.npz", lambda f: np.savez_compressed(f, **depth))
    if o.search:
        result["search"] = search_thresholds(depth, o.search)
        for exit_, right, rule in result["search"]:
            print(f"search: exit {exit_:.2f}, right {right:.1%}: {rule}")
        rules += [rule for *_, rule in result["search"]]    # confirmed by reading and translating for real
    rows = forced(model, batches, rules, trained, context, o, {named: depth}, depth["kind"])
    result["forced"] = merged(before["forced"], rows)
    for split in o.bleu:
        rows = translate_split(model, data, split, trained, folder, o, rules)
        result["translated"][split] = merged(result["translated"].get(split, []), rows)
        write_file(path, json.dumps(result, indent=1) + "\n")
    write_file(path, json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}, and {folder}/depth.npz under the rule {named}: --rule chooses it")


if __name__ == "__main__":
    main()
