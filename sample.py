"""Sample from a run, or translate with it, each token coloured by the number of blocks that ran to write it.

    python sample.py --run 3 --prompt "def main(" --rule confidence:0.8     (--prompt -: standard input)
    python sample.py --run 3 --speculate 2 --draft_tokens 6                 (as full depth would, faster)
    python sample.py --run 4 --prompt "A dog runs over the grass."          (a translator: a sentence a line)
"""
import codecs
import os
import re
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import run
from data.common import EOT, UserError, command, load_tokenizer
from data.parallel import sentence, source_ids
from decode import check_drafts, generate, speculate, translate
from options import RunOptions, halting_rule, parse, refuse, rule_name

SHADES = (153, 159, 158, 157, 193, 229, 223, 217, 210, 203)     # of the 256 terminal colours: shallow to deep


@dataclass
class Options(RunOptions):
    """Continue a prompt with the model of a run, or translate it."""
    prompt: str | None = None   # a text; translator: a sentence a line. "-": standard input
    max_new_tokens: int = 200
    samples: int = 1            # this many texts, side by side in one batch
    temperature: float = 0.8    # 0: always the most likely token
    top_k: int = 50             # choose among this many most likely tokens; 0: all
    seed: int = 0
    speculate: int = 0          # draft with so many blocks, keep what full depth agrees with; 0: do not
    draft_tokens: int = 4       # with --speculate: tokens to draft at a time
    beam: int = 5               # translator: hypotheses; 1: greedy
    length_penalty: float = 1.0     # translator: hypotheses compare by log-probability / length^this
    color: Literal["auto", "always", "never"] = "auto"


def check(o, trained, model):
    """UserError for values that cannot be and for options that would do nothing in this run."""
    if min(o.max_new_tokens, o.samples, o.beam) < 1 or o.samples > 4096:
        raise UserError("--max_new_tokens, --samples (at most 4096) and --beam must be at least 1")
    if not 0 <= o.temperature < float("inf") or min(o.top_k, o.seed) < 0 or not abs(o.length_penalty) < 100:
        raise UserError("--temperature, --top_k and --seed must be at least 0, "
                        "--length_penalty a small number")
    if trained.translate and o.speculate:
        raise UserError("--speculate drafts a GPT's text")
    if trained.translate:
        refuse(o, ("max_new_tokens", "samples", "temperature", "top_k", "seed"),
               f"this run is a translator ({trained.translate})")
    else:
        refuse(o, ("beam", "length_penalty"), "this run is a GPT")
    if not o.speculate:
        return refuse(o, ("draft_tokens",), "no token is drafted without --speculate")
    refuse(o, ("rule",), "--speculate writes what full depth would")
    try:
        check_drafts(model, o.speculate, o.draft_tokens)
    except ValueError as e:
        raise UserError(f"--speculate {o.speculate} --draft_tokens {o.draft_tokens}: {e}") from None


def continuations(model, encoding, text, rule, o):
    """`samples` Generated that begin with the text."""
    prompt, room = encoding.encode_ordinary(text), model.config.block_size
    if not prompt:
        raise UserError("the prompt is empty: give --prompt at least one character")
    if len(prompt) >= room:
        raise UserError(f"the prompt has {len(prompt)} tokens, but the model reads at most {room}, what it "
                        f"writes included: give at most {room - 1}")
    new = min(o.max_new_tokens, room - len(prompt))
    if new < o.max_new_tokens:
        print(f"(room for {new} new tokens: the context is {room})", file=sys.stderr)
    how = {"temperature": o.temperature, "top_k": o.top_k or None, "eos_id": encoding.eot_token}
    if not o.speculate:
        return generate(model, [prompt] * o.samples, new, rule, seed=o.seed, **how)
    results = [speculate(model, prompt, new, o.speculate, o.draft_tokens, seed=[o.seed, b], **how)
               for b in range(o.samples)]
    kept, drafted = sum(r.kept for r in results), sum(r.drafted for r in results)
    print(f"drafted with {o.speculate} blocks: {drafted} tokens, {kept / max(1, drafted):.0%} accepted")
    return [r.text for r in results]


def pieces(encoding, ids):
    """One string per token, together the exact text: bytes of a split character count to its last token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(part) for part in encoding.decode_tokens_bytes(ids)]
    return [*texts[:-1], texts[-1] + decoder.decode(b"", final=True)]


def paint(texts, depths, L):
    """Strings and block counts (None: plain) -> one string with terminal colours, line ends left plain."""
    painted = []
    for text, depth in zip(texts, depths, strict=True):
        if depth is not None:
            color = SHADES[max(0, round((depth - 1) / max(1, L - 1) * (len(SHADES) - 1)))]
            text = re.sub(".+", rf"\033[30;48;5;{color}m\g<0>\033[0m", text)
        painted.append(text)
    return "".join(painted)


def show(rows, lines, encoding, L, title, color):
    """Print every row (after the line it translates), a legend and how deep the new tokens went."""
    visited = [row.visited[row.prompt - 1:] for row in rows]
    exit_at = np.concatenate([row.exit_at[row.prompt - 1:] for row in rows])
    for n, row in enumerate(rows):
        depths, texts = [None] * row.prompt + visited[n].sum(1).tolist(), pieces(encoding, row.ids)
        if lines:
            print(lines[n])
            depths, texts = depths[row.prompt:], texts[row.prompt:]
            texts[0] = texts[0].lstrip()
            texts[-1] = texts[-1].replace(EOT, " </s>" if color else "")
        print(paint(texts, depths, L) if color else "".join(texts))
        print("-" * 60)
    visited = np.concatenate(visited)
    if color:
        counts = range(1, L + 1)
        print("blocks run to write a token: " + paint([f" {n} " for n in counts], counts, L))
    print(f"{title}: {len(visited)} tokens, exit after block {exit_at.mean():.2f} of {L} on average, "
          f"{visited.sum(1).mean():.2f} blocks run")


def save(rows, lines, encoding, folder):
    """sample.txt and sample.npz (all rows one after another; `row` numbers them) in the run's folder."""
    text = ("\n" + "-" * 60 + "\n").join(encoding.decode(row.ids) for row in rows) + "\n"
    if lines:
        pairs = zip(lines, (sentence(encoding, row.ids) for row in rows), strict=True)
        text = "\n".join(f"{line}\n{translation}\n" for line, translation in pairs)
    run.write_atomically(folder / "sample.txt", text)
    ids, prompt, exit_at, visited, _ = zip(*rows, strict=True)
    arrays = {"ids": np.concatenate([row[:-1] for row in ids]).astype(np.int32),
              "written": np.concatenate([row[1:] for row in ids]).astype(np.int32),
              "exit_at": np.concatenate(exit_at).astype(np.uint8), "visited": np.concatenate(visited),
              "row": np.repeat(range(len(ids)), [len(row) - 1 for row in ids]),
              "prompt": np.array(prompt), "lines": np.array(lines)}
    run.write_atomically(folder / "sample.npz", lambda f: np.savez_compressed(f, **arrays))
    print(f"wrote {folder / 'sample.txt'} and {folder / 'sample.npz'} (ids, exit_at, visited)")


@command
def main(argv=None):
    o = parse(argv, Options)
    folder, trained, _, model = run.open_run(o.run, o.out, o.device)
    check(o, trained, model)
    torch.manual_seed(o.seed)
    name = "full" if o.speculate else rule_name(o, trained)
    rule, encoding, text = halting_rule(name, model), load_tokenizer(folder / "tokenizer.json"), o.prompt
    if text is None:
        text = run.read_json(folder / "meta.json", "prompt")
        text = text[trained.translate.split("-")[0]] if trained.translate else text
    elif text == "-":
        text = sys.stdin.read()
    if trained.translate:
        lines = [line.strip() for line in text.strip().split("\n")]
        sources = source_ids(encoding, lines, model.config.block_size, "the prompt")
        best = translate(model, sources, encoding.eot_token, rule, o.beam, o.length_penalty)
        rows = [row for row, _ in best]
    else:
        lines, rows = [], continuations(model, encoding, text, rule, o)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ if o.color == "auto" else o.color == "always"
    show(rows, lines, encoding, trained.model.n_layer, f"{folder}, {name}", color)
    save(rows, lines, encoding, folder)


if __name__ == "__main__":
    main()
