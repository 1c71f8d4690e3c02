"""Measure a run on held-out data: python evaluate.py --run 3

    always             loss and bits per byte of every exit; loss, mean exit and FLOPs of every fixed exit and
                       of the rule; how deep tokens go under the rule (depth.npz)
    --rules RULE ...   these rules instead; also oracle:KIND:LAMBDA:SIGMA, the exits that an oracle picks
                       knowing the right answer (what is left out is as the run's own)
    --bleu SPLIT ...   translate these splits with the rules: BLEU, exit, FLOPs of all hypotheses, time
    --source FILE      translate your own lines; with --reference FILE also BLEU
    --search 10000     find the best vector of thresholds for each depth among so many draws on the validation
                       text, and add them to the rules [DAT 3.2]

Results: evaluation.json, depth.npz and the translations outputs/SPLIT.RULE.txt in the run's folder.
"""
import dataclasses
import json
import keyword
import re
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
from data.batches import batches_of, bits_per_byte, open_data
from data.common import UserError, command
from data.parallel import direction, read_lines, sentence, source_ids
from decode import Cache, measure, read, translate
from routing import causal


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
    rules: tuple[str, ...] = ()     # these instead of every fixed exit and the rule
    missing: Literal["copy", "compute"] = "copy"    # what deeper tokens see of those that left early
    search: int = 0             # draws of thresholds; 0: no search
    batch: int = 64             # sentences side by side
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


# ----------------------------------------------------------------------------- teacher forcing


def losses(model, batches, encoding, context):
    """-> {routing rule: {"loss": nats per token of each exit, "bits_per_byte": of each exit}}."""
    tokens, factor = sum(b.count for b in batches), bits_per_byte(batches, encoding)
    return {rule: {"loss": (nats / tokens).tolist(), "bits_per_byte": (nats / tokens * factor).tolist()}
            for rule, (nats, _) in measure(model, batches, context).items()}


def under_rule(model, batches, name, trained, context, missing):
    """The batches read with a rule, routing causally: arrays (W,T,...) as for depth.npz, padded with targets
    of -1 where rows are shorter."""
    parts, T = [], max(b.ids.size(1) for b in batches)
    for batch in batches:
        batch = batch.to(model.wte.weight.device)
        with context, torch.no_grad():
            past, rule = model.past(batch), rule_for(model, batch, name, trained)
            cache = Cache(model, *batch.pos.shape, past and past[0].source)
            found = read(model, batch.ids, batch.pos, cache, rule, causal, missing)
        arrays = {"ids": batch.ids.int(), "targets": batch.targets.int(),
                  "nats": exits.nats(found.logits, batch.targets), "entropy": entropy(found.logits),
                  "exit_at": found.exit_at.byte(),
                  "right": found.logits.argmax(-1) == batch.targets,
                  "visited": found.visited, "worked": found.worked, "score": found.score}
        parts.append({k: widen(v.cpu().numpy(), T, -1 if k == "targets" else 0) for k, v in arrays.items()})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


WORDS = rb"(?P<number>\d[\w.]*)|(?P<name>[A-Za-z_\x80-\xff][\w\x80-\xff]*)|(?P<space>\s+)|(?P<punctuation>.)"
TEXT = rb"(?P<text>('{3}|\"{3}).*?\2|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|\#[^\n]*)"


def kinds_of(encoding, ids, code):
    """One document's token ids -> the kind of each: space, number, punctuation, end, and word, or in Python
    code name, keyword and text (strings and comments). A token is what its first byte is that is no space."""
    pieces = [b"" if i == encoding.eot_token else encoding.decode_single_token_bytes(int(i)) for i in ids]
    kinds = []
    for match in re.finditer(TEXT + b"|" + WORDS if code else WORDS, b"".join(pieces), re.S):
        kind = match.lastgroup
        if kind == "name":
            reserved = code and keyword.iskeyword(match[0].decode("utf-8", "replace"))
            kind = "keyword" if reserved else "name" if code else "word"
        kinds += [kind] * len(match[0])
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    first = [start + len(p) - len(p.lstrip() or p) for start, p in zip(starts, pieces, strict=True)]
    return ["end" if not p else kinds[at] for p, at in zip(pieces, first, strict=True)]


def kinds_in(data, trained):
    """The kinds of the tokens in the validation windows (W,T), told from whole documents."""
    documents = np.split(data.val, np.flatnonzero(data.val == data.encoding.eot_token) + 1)
    code = data.meta["name"] == "pysource"
    kinds = [kind for document in documents for kind in kinds_of(data.encoding, document, code)]
    names, codes = np.unique(kinds, return_inverse=True)
    windows = batches_of(data._replace(val=codes), "val", trained, trained.accumulate)
    return names[np.concatenate([b.ids for b in windows.fixed(trained.eval_windows)])]


def entropy(logits):
    """logits (...,V) -> (...) nats."""
    logp = exits.precise(logits).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def rule_for(model, batch, name, trained):
    """The named rule; for an oracle the exits that are best for this very batch."""
    if not name.startswith("oracle"):
        return run.rule_of(name, trained, model)
    nats, right, _ = exit_scores(model, batch)
    return exits.chosen(run.oracle(nats, right, batch.there, oracle_of(name, trained)))


def oracle_of(name, trained):
    """oracle[:KIND][:LAMBDA[:SIGMA]] -> the run's Options with these in place of its own."""
    parts = re.fullmatch(r"oracle(?::(correctness|likelihood))?(?::(\d*\.?\d+)(?::(\d*\.?\d+))?)?", name)
    if trained.model.exits != "all" or not parts:
        raise UserError(f"--rules {name}: an oracle chooses among exits (--exits all) by correctness or by "
                        "likelihood; then come what it pays for a block and its sigma, both at least 0, as "
                        "in oracle:likelihood:0.1:2")
    names = ("oracle", "exit_cost", "sigma")
    given = zip(names, (str, float, float), parts.groups(), strict=True)
    return dataclasses.replace(trained, **{name: kind(word) for name, kind, word in given if word})


def exit_scores(model, batch):
    """Teacher forcing, nobody leaving -> nats, right, confidence of every exit, each (B,T,N)."""
    found = []
    for n, (h, _) in enumerate(model.states(batch, causal), 1):
        logits = model.classifiers(n, h)
        found.append((exits.nats(logits, batch.targets), logits.argmax(-1) == batch.targets,
                      exits.certainty(logits)))
    return (torch.stack(parts, -1) for parts in zip(*found, strict=True))


def rules_of(o, trained, model):
    """The rules to compare: those asked for, or every fixed exit and the one rule."""
    for name in o.rules:
        if name.startswith("oracle"):               # either complains before anything is measured
            oracle_of(name, trained)
        else:
            run.rule_of(name, trained, model)
    if o.rules:
        return list(o.rules)
    fixed = []
    if trained.model.exits == "all":
        fixed = [f"fixed:{e}" for e in range(1, trained.model.n_layer)]
    return [*fixed, "full", *({o.named(trained)} - {*fixed, "full"})]


def forced(model, batches, names, trained, context, o, known):
    """Rows for evaluation.json: loss, mean exit, blocks and FLOPs of each rule on the validation batches,
    read all at once as they would be step by step; known: {rule: what `under_rule` found} so far."""
    rows = []
    print("\n| rule | loss | right | exit | blocks | MFLOPs a row: paper | needed | cache / dense |\n"
          + "|---" * 8 + "|")
    for name in names:
        found = known.get(name) or under_rule(model, batches, name, trained, context, o.missing)
        there = found["targets"] >= 0
        each = [cost_of(model, {k: found[k][w, there[w]] for k in ("visited", "exit_at", "worked")}, name, S,
                        o.missing)
                for w, S in enumerate(s for b in batches for s in b.sources())]
        rows.append({"rule": name, "loss": float(found["nats"][there].mean()),
                     "right": float(found["right"][there].mean()),
                     "exit": float(found["exit_at"][there].mean()),
                     "blocks": float(found["visited"][there].sum(1).mean()), **mean_of(each)})
        print("| {rule} | {loss:.3f} | {right:.1%} | {exit:.2f} | {blocks:.2f} | {mflops_paper:.1f} | "
              "{mflops_needed:.1f} | {cache:.0%} |".format(**rows[-1]), flush=True)
    return rows


def search_thresholds(model, batches, draws, context):
    """Thresholds drawn uniformly, judged by the exits' confidences under teacher forcing (no copied states)
    -> for each segment of one block of mean exit the rule that is right most often, [(exit, right, name)]."""
    sure, right = [], []
    for batch in batches:
        batch = batch.to(model.wte.weight.device)
        with context, torch.no_grad():
            _, hit, confidence = exit_scores(model, batch)
        sure.append(confidence[batch.there].cpu().numpy())
        right.append(hit[batch.there].cpu().numpy())
    sure, right = np.concatenate(sure), np.concatenate(right)                           # (tokens,N)
    N, best = sure.shape[1], {}
    for tau in np.random.default_rng(0).random((draws, N - 1)):
        leave = np.concatenate([sure[:, :-1] > tau, np.ones((len(sure), 1), bool)], 1)
        exit_at = leave.argmax(1)                                                       # from 0
        found = exit_at.mean() + 1, right[np.arange(len(right)), exit_at].mean(), tau
        segment = int(found[0])
        if segment not in best or best[segment][1] < found[1]:
            best[segment] = found
    return [(e, r, "confidence:" + ",".join(f"{t:.3f}" for t in tau)) for e, r, tau in
            (best[s] for s in sorted(best))]


def widen(array, T, value):
    """(B,t,...) -> (B,T,...) with `value` on the right."""
    more = [(0, 0), (0, T - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, more, constant_values=value)


# ----------------------------------------------------------------------------- translation


def translations(model, sources, end, rule, o):
    """Lists of source ids -> (best Generated, Reads) of each in the same order, and the seconds that took."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found, began = {}, time.perf_counter()
    for first in range(0, len(order), o.batch):
        part = order[first:first + o.batch]
        best = translate(model, [sources[i] for i in part], end, rule, o.beam, o.penalty, missing=o.missing)
        found |= zip(part, best, strict=True)
    return [found[i] for i in range(len(sources))], time.perf_counter() - began


def bleu(lines, references, tokenize):
    """-> BLEU and sacrebleu's signature. tokenize "none" is for text that is tokenised already."""
    metric = sacrebleu.BLEU(tokenize=tokenize, force=tokenize == "none")
    return metric.corpus_score(lines, [references]).score, str(metric.get_signature())


def cost_of(model, read, name, S, missing):
    """What was read (`visited`, `exit_at`, perhaps `parent`, `worked`) -> MFLOPs by both accountings; keys
    and values kept, as a share of those that a dense model keeps at full depth."""
    both = ("computed", "computed") if missing == "compute" else ("paper", "needed")
    kind = name.partition(":")[0]
    decides = {"confidence": kind, "learned": model.config.halting}.get(kind, "")
    visited, exit_at, parent = np.array(read["visited"]), np.array(read["exit_at"]), read.get("parent")
    costs = [cost.decoding(model.config, model.vocab_size, visited, exit_at, decides, S, copies,
                           parent=parent, worked=read.get("worked")) for copies in both]
    return [*(c.flops / 1e6 for c in costs), costs[0].cache]


def mean_of(each):
    return dict(zip(("mflops_paper", "mflops_needed", "cache"), np.mean(each, 0).tolist(), strict=True))


def measured(found, sources, model, name, missing):
    """Mean exit and blocks of the tokens that were kept; FLOPs of a sentence both ways, all hypotheses."""
    exit_at = np.concatenate([text.exit_at for text, _ in found])
    blocks = np.concatenate([text.visited for text, _ in found])
    each = [cost_of(model, vars(reads), name, len(s), missing) for (_, reads), s in
            zip(found, sources, strict=True)]
    return {"exit": float(exit_at.mean()), "blocks": float(blocks.sum(1).mean()), **mean_of(each)}


def translate_split(model, trained, encoding, name, lines, references, tokenize, folder, o, rules):
    """The rules on one list of sentences -> rows for evaluation.json; prints a table."""
    sources, rows = source_ids(encoding, lines, model.config.block_size, name), []
    print(f"\n{name}, {len(lines)} sentences, beam {o.beam}\n"
          "| rule | BLEU | exit | blocks | MFLOPs a sentence, all hypotheses: paper | needed | seconds |\n"
          + "|---" * 7 + "|")
    for label in (r for r in rules if not r.startswith("oracle")):
        rule = run.rule_of(label, trained, model)
        best, seconds = translations(model, sources, encoding.eot_token, rule, o)
        outputs = [sentence(encoding, text.ids) for text, _ in best]
        row = {"rule": label, **measured(best, sources, model, label, o.missing), "seconds": seconds}
        if references is not None:
            row["bleu"], row["signature"] = bleu(outputs, references, tokenize)
        path = folder / "outputs" / f"{name}.{label.replace(':', '-').replace(',', '_')}.txt"
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
    if not o.bleu and not o.source:
        run.refuse(o, ("beam", "penalty", "batch"), "nothing is translated (--bleu, --source)")
    if o.search and trained.model.exits == "last":
        raise UserError("--search finds thresholds, and this run has one classifier: train with --exits all")
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
    if o.search < 0:
        raise UserError("--search is a number of draws; 0 searches nothing")
    folder, trained, device, model = run.open_run(o.run, o.out, o.device)
    _, data = open_data(o.data or trained.data, trained.translate)
    if data.meta["vocab_size"] != model.vocab_size:
        raise UserError(f"{folder} was not trained on this data: its vocabulary is {model.vocab_size}")
    wanted, rules = list(texts_to_translate(data, trained, o)), rules_of(o, trained, model)
    context = run.autocast(device, trained.dtype)
    batches = batches_of(data, "val", trained, trained.accumulate).fixed(trained.eval_windows)
    found = {"options": json.loads(json.dumps(vars(o), default=str)), **run.environment(device),
             "parameters": sum(p.numel() for p in model.parameters()),
             "val": losses(model, batches, data.encoding, context), "translated": {}}
    for route, each in found["val"].items():
        print(f"val, {route}: loss by exit " + " ".join(f"{v:.3f}" for v in each["loss"])
              + f" | {each['bits_per_byte'][-1]:.3f} bits/byte")
    named = o.named(trained)
    depth = under_rule(model, batches, named, trained, context, o.missing)
    if not trained.translate:
        depth["kind"] = kinds_in(data, trained)
    depth["routed"] = np.array([n in trained.model.routed_blocks() for n in range(trained.model.n_layer)])
    depth["rule"] = np.array(named.replace(":", " ") + ", causal routing" * bool(depth["routed"].any()))
    run.write_atomically(folder / "depth.npz", lambda f: np.savez_compressed(f, **depth))
    if o.search:
        found["search"] = search_thresholds(model, batches, o.search, context)
        for depth_, right, rule in found["search"]:
            print(f"search: exit {depth_:.2f}, right {right:.1%}: {rule}")
        rules += [rule for *_, rule in found["search"]]     # confirmed by reading and translating for real
    found["forced"] = forced(model, batches, rules, trained, context, o, {named: depth})
    for name, lines, references in wanted:
        found["translated"][name] = translate_split(model, trained, data.encoding, name, lines, references,
                                                    data.meta["tokenize"], folder, o, rules)
        run.write_text(folder / "evaluation.json", json.dumps(found, indent=1) + "\n")
    run.write_text(folder / "evaluation.json", json.dumps(found, indent=1) + "\n")
    print(f"wrote {folder}/evaluation.json and {folder}/depth.npz")


if __name__ == "__main__":
    main()
