"""Sample from a run, each token coloured by the number of blocks that ran to write it.

    python sample.py --run 3 --prompt "def main(" --tau 0.8
    echo "class Stack" | python sample.py --run last --prompt -
"""
import codecs
import os
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np

import exits
import run
from data.common import UserError, command, load_tokenizer
from decode import generate

SHADES = (153, 159, 158, 157, 193, 229, 223, 217, 210, 203)     # of the 256 terminal colours: shallow to deep


@dataclass
class Options:
    """Continue a prompt with the model of a run."""
    run: str = "last"           # its folder or number, or "last"
    out: str = "runs"           # where numbered runs are
    prompt: str | None = None   # "-" reads standard input; left out: the data set's own
    tokens: int = 200           # new tokens at most
    samples: int = 1            # this many texts, side by side in one batch
    temperature: float = 0.8    # 0: always the most likely token
    top_k: int = 50             # choose among this many most likely tokens; 0: all
    seed: int = 0
    rule: Literal["auto", "confidence", "fixed", "full"] = "auto"   # when to exit; auto: confidence if it can
    tau: tuple[float, ...] = ()     # confidence: one threshold, or one for each block but the last
    exit: int = 0               # fixed: leave after this block
    color: Literal["auto", "always", "never"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def halting_rule(options, trained):
    """The rule that the options name, for the run's training options. -> (rule, its description)."""
    L, kind = trained.model.n_layer, options.rule
    if kind == "auto":
        wants_confidence = options.tau or trained.model.exits == "all"
        kind = "fixed" if options.exit else "confidence" if wants_confidence else "full"
    if kind != "full" and trained.model.exits != "all":
        raise UserError("this run has a classifier after its last block only, so no token can leave "
                        "early: use --rule full, or train with --exits all")
    for name, used in (("tau", "confidence"), ("exit", "fixed")):
        if getattr(options, name) and kind != used:
            raise UserError(f"--{name} would do nothing: the rule is {kind}")
    if kind == "full":
        return exits.full_depth, "full depth"
    if kind == "fixed":
        if not 1 <= options.exit <= L:
            raise UserError(f"--exit {options.exit} must be a block from 1 to {L}")
        return exits.fixed_exit(options.exit), f"exit after block {options.exit}"
    tau = options.tau or (trained.tau,)
    if len(tau) not in (1, L - 1):
        raise UserError(f"--tau takes one threshold or {L - 1}, one for each block but the last, "
                        f"not {len(tau)}")
    named = "exit at confidence " + " ".join(map(str, tau))
    return exits.confidence(tau * (L - 1) if len(tau) == 1 else tau), named


def pieces(encoding, ids):
    """One string per token, together the exact text: bytes of a split character count to its last token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    content = encoding.decode_tokens_bytes(ids)
    return [decoder.decode(part, final=n == len(ids) - 1) for n, part in enumerate(content)]


def shade(depth, L):
    return SHADES[0 if L == 1 else round((depth - 1) / (L - 1) * (len(SHADES) - 1))]


def paint(texts, depths, L):
    """Strings and block counts (None: plain) -> one string with terminal colours, line ends left plain."""
    out = []
    for text, depth in zip(texts, depths, strict=True):
        if depth is None:
            out.append(text)
            continue
        start = f"\033[30;48;5;{shade(depth, L)}m"
        out.append("\n".join(f"{start}{line}\033[0m" if line else "" for line in text.split("\n")))
    return "".join(out)


def use_color(wish):
    if wish == "auto":
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return wish == "always"


@command
def main(argv=None):
    options = run.parse(argv, Options)
    if options.tokens < 1 or options.samples < 1:
        raise UserError("--tokens and --samples must be at least 1")
    if not (0 <= options.temperature < float("inf")) or options.top_k < 0 or options.seed < 0:
        raise UserError("--temperature, --top_k and --seed must be at least 0")
    folder, trained, device, model = run.open_run(options.run, options.out, options.device)
    encoding = load_tokenizer(folder / "tokenizer.json")
    rule, named = halting_rule(options, trained)
    text = options.prompt
    if text is None:
        text = run.read_json(folder / "meta.json", "prompt")
    elif text == "-":
        text = sys.stdin.read()
    prompt, room = encoding.encode_ordinary(text), trained.model.block_size
    if not prompt:
        raise UserError("the prompt is empty: give --prompt at least one character")
    if len(prompt) >= room:
        raise UserError(f"the prompt has {len(prompt)} tokens, but the model reads at most {room}, what it "
                        f"writes included: give at most {room - 1}")
    new, L = min(options.tokens, room - len(prompt)), trained.model.n_layer
    if new < options.tokens:
        print(f"(room for {new} new tokens: the context is {room})", file=sys.stderr)
    rows = generate(model, [prompt] * options.samples, new, rule, temperature=options.temperature,
                    top=options.top_k or None, seed=options.seed, end=encoding.eot_token)
    show(rows, encoding, L, f"{folder}, {named}", use_color(options.color))
    keep(rows, encoding, folder)


def show(rows, encoding, L, title, color):
    """Print every row, a legend and how deep the new tokens went."""
    for row in rows:
        depth = [None] * row.prompt + row.visited.sum(1)[row.prompt - 1:].tolist()
        texts = pieces(encoding, row.ids)
        print(paint(texts, depth, L) if color else "".join(texts))
        print("-" * 60)
    visited = np.concatenate([r.visited[r.prompt - 1:] for r in rows])
    exit_at = np.concatenate([r.exit_at[r.prompt - 1:] for r in rows])
    if color:
        counts = range(1, L + 1)
        print("blocks run to write a token: " + paint([f" {n} " for n in counts], counts, L))
    print(f"{title}: {len(visited)} tokens, exit after block {exit_at.mean():.2f} of {L} on average, "
          f"{visited.sum(1).mean():.2f} blocks run")


def keep(rows, encoding, folder):
    """sample.txt and sample.npz (all rows one after another; `row` says whose) in the run's folder."""
    text = ("\n" + "-" * 60 + "\n").join(encoding.decode(r.ids) for r in rows) + "\n"
    run.write_atomically(folder / "sample.txt", lambda f: f.write(text.encode("utf-8")))
    arrays = {"ids": np.concatenate([r.ids[:-1] for r in rows]).astype(np.int32),
              "written": np.concatenate([r.ids[1:] for r in rows]).astype(np.int32),
              "exit_at": np.concatenate([r.exit_at for r in rows]).astype(np.uint8),
              "visited": np.concatenate([r.visited for r in rows]),
              "row": np.repeat(np.arange(len(rows)), [len(r.ids) - 1 for r in rows]),
              "prompt": np.array([r.prompt for r in rows])}
    run.write_atomically(folder / "sample.npz", lambda f: np.savez_compressed(f, **arrays))
    print(f"wrote {folder / 'sample.txt'} and {folder / 'sample.npz'} (ids, exit_at, visited)")


if __name__ == "__main__":
    main()
