"""Sample from a run, or translate with it, each token coloured by the number of blocks that ran to write it.

    python sample.py --run 3 --prompt "def main(" --tau 0.8
    echo "class Stack" | python sample.py --run last --prompt -
    python sample.py --run 3 --speculate 2 --ahead 6        (as full depth would, faster)
    python sample.py --run 4 --prompt "A dog runs over the grass."      (a translator: one sentence a line)
"""
import codecs
import os
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np

import run
from data.common import EOT, UserError, command, load_tokenizer
from data.parallel import sentence, source_ids
from decode import check_drafts, encoded, generate, speculate, translate

SHADES = (153, 159, 158, 157, 193, 229, 223, 217, 210, 203)     # of the 256 terminal colours: shallow to deep


@dataclass
class Options(run.Halting):
    """Continue a prompt with the model of a run, or translate it."""
    run: str = "last"           # its folder or number, or "last"
    out: str = "runs"           # where numbered runs are
    prompt: str | None = None   # a text; translator: a sentence a line. "-": standard input
    tokens: int = 200           # new tokens at most
    samples: int = 1            # this many texts, side by side in one batch
    temperature: float = 0.8    # 0: always the most likely token
    top_k: int = 50             # choose among this many most likely tokens; 0: all
    seed: int = 0
    speculate: int = 0          # draft with so many blocks, keep what full depth agrees with; 0: do not
    ahead: int = 4              # with --speculate: tokens to draft at a time
    beam: int = 5               # translator: hypotheses; 1: greedy
    penalty: float = 1.0        # translator: hypotheses compare by log-probability / length^penalty
    color: Literal["auto", "always", "never"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def pieces(encoding, ids):
    """One string per token, together the exact text: bytes of a split character count to its last token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    content = encoding.decode_tokens_bytes(ids)
    return [decoder.decode(part, final=n == len(ids) - 1) for n, part in enumerate(content)]


def shade(depth, L):
    return SHADES[0 if L == 1 else round((depth - 1) / (L - 1) * (len(SHADES) - 1))]


def paint(texts, depths, L):
    """Strings and block counts (None: plain) -> one string with terminal colours, line ends left plain."""
    around = [("", "") if d is None else (f"\033[30;48;5;{shade(d, L)}m", "\033[0m") for d in depths]
    return "".join("\n".join(start + line + end if line else "" for line in text.split("\n"))
                   for text, (start, end) in zip(texts, around, strict=True))


@command
def main(argv=None):
    options = run.parse(argv, Options)
    if min(options.tokens, options.samples, options.beam) < 1:
        raise UserError("--tokens, --samples and --beam must be at least 1; --beam 1 is greedy")
    if not (0 <= options.temperature < float("inf")) or options.top_k < 0 or options.seed < 0:
        raise UserError("--temperature, --top_k and --seed must be at least 0")
    folder, trained, _, model = run.open_run(options.run, options.out, options.device)
    if trained.translate:
        run.refuse(options, ("tokens", "samples", "temperature", "top_k", "seed"),
                   f"this run is a translator ({trained.translate})")
    else:
        run.refuse(options, ("beam", "penalty"), "this run is a GPT")
    encoding, L = load_tokenizer(folder / "tokenizer.json"), trained.model.n_layer
    if options.speculate:
        refuse_drafts(options, trained, model)
    else:
        run.refuse(options, ("ahead",), "nothing is drafted without --speculate")
    named = options.named(trained) if not options.speculate else "full"
    rule = run.rule_of(named, trained, model)
    terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    text, color = options.prompt, terminal if options.color == "auto" else options.color == "always"
    if text is None:
        text = run.read_json(folder / "meta.json", "prompt")
        text = text[trained.translate.split("-")[0]] if trained.translate else text
    elif text == "-":
        text = sys.stdin.read()
    write = translations if trained.translate else continuations
    lines, rows = write(model, encoding, text, rule, options)
    show(rows, lines, encoding, L, f"{folder}, {named}", color)
    keep(rows, lines, encoding, folder)


def refuse_drafts(options, trained, model):
    """UserError if --speculate cannot be what is wanted."""
    run.refuse(options, ("rule", "tau", "exit"), "--speculate writes what full depth would")
    try:
        check_drafts(model, options.speculate, options.ahead)
    except ValueError as e:
        raise UserError(f"--speculate {options.speculate} --ahead {options.ahead}: {e}") from None
    if trained.translate and options.beam > 1:
        raise UserError("--speculate drafts one text, and a beam turns several: add --beam 1")


def drafts(model, prompts, new, options, end, source=None):
    """`speculate` for each prompt, `new` tokens each -> Generated, and a line about how it went."""
    temperature = 0 if source else options.temperature
    found = [speculate(model, prompt, new[b], options.speculate, options.ahead, temperature=temperature,
                       top=options.top_k or None, seed=[options.seed, b], end=end,
                       source=source and source.select([b], 1)) for b, prompt in enumerate(prompts)]
    kept, drafted = sum(f.kept for f in found), sum(f.drafted for f in found)
    print(f"drafted with {options.speculate} blocks: {drafted} tokens, {kept / max(1, drafted):.0%} accepted")
    return [f.text for f in found]


def continuations(model, encoding, text, rule, options):
    """Text -> None, `samples` Generated that begin with it."""
    prompt, room = encoding.encode_ordinary(text), model.config.block_size
    if not prompt:
        raise UserError("the prompt is empty: give --prompt at least one character")
    if len(prompt) >= room:
        raise UserError(f"the prompt has {len(prompt)} tokens, but the model reads at most {room}, what it "
                        f"writes included: give at most {room - 1}")
    new = min(options.tokens, room - len(prompt))
    if new < options.tokens:
        print(f"(room for {new} new tokens: the context is {room})", file=sys.stderr)
    prompts = [prompt] * options.samples
    if options.speculate:
        return None, drafts(model, prompts, [new] * len(prompts), options, encoding.eot_token)
    return None, generate(model, prompts, new, rule, temperature=options.temperature,
                          top=options.top_k or None, seed=options.seed, end=encoding.eot_token)


def translations(model, encoding, text, rule, options):
    """Sentences, one a line -> (the sentences, their best Generated)."""
    lines = [line.strip() for line in text.strip().split("\n")]
    sources = source_ids(encoding, lines, model.config.block_size, "the prompt")
    if options.speculate:
        (source, new), end = encoded(model, sources), encoding.eot_token
        return lines, drafts(model, [[end]] * len(lines), new, options, end, source)
    best = translate(model, sources, encoding.eot_token, rule, options.beam, options.penalty)
    return lines, [text for text, _ in best]


def show(rows, lines, encoding, L, title, color):
    """Print every row (after the line it translates), a legend and how deep the new tokens went."""
    for n, row in enumerate(rows):
        depth, ids = [None] * row.prompt + row.visited.sum(1)[row.prompt - 1:].tolist(), row.ids
        if lines:
            print(lines[n])
            depth, ids = depth[row.prompt:], ids[row.prompt:]
        texts = pieces(encoding, ids)
        if lines:
            texts = [texts[0].lstrip(), *texts[1:]]
            texts[-1] = texts[-1].replace(EOT, " </s>" if color else "")
        print(paint(texts, depth, L) if color else "".join(texts))
        print("-" * 60)
    visited = np.concatenate([r.visited[r.prompt - 1:] for r in rows])
    exit_at = np.concatenate([r.exit_at[r.prompt - 1:] for r in rows])
    if color:
        counts = range(1, L + 1)
        print("blocks run to write a token: " + paint([f" {n} " for n in counts], counts, L))
    print(f"{title}: {len(visited)} tokens, exit after block {exit_at.mean():.2f} of {L} on average, "
          f"{visited.sum(1).mean():.2f} blocks run")


def keep(rows, lines, encoding, folder):
    """sample.txt and sample.npz (all rows one after another; `row` says whose) in the run's folder."""
    if lines:
        done = zip(lines, (sentence(encoding, r.ids) for r in rows), strict=True)
        text = "\n".join(f"{line}\n{translation}\n" for line, translation in done)
    else:
        text = ("\n" + "-" * 60 + "\n").join(encoding.decode(r.ids) for r in rows) + "\n"
    run.write_atomically(folder / "sample.txt", lambda f: f.write(text.encode("utf-8")))
    arrays = {"ids": np.concatenate([r.ids[:-1] for r in rows]).astype(np.int32),
              "written": np.concatenate([r.ids[1:] for r in rows]).astype(np.int32),
              "exit_at": np.concatenate([r.exit_at for r in rows]).astype(np.uint8),
              "visited": np.concatenate([r.visited for r in rows]),
              "row": np.repeat(np.arange(len(rows)), [len(r.ids) - 1 for r in rows]),
              "prompt": np.array([r.prompt for r in rows]), "lines": np.array(lines or [])}
    run.write_atomically(folder / "sample.npz", lambda f: np.savez_compressed(f, **arrays))
    print(f"wrote {folder / 'sample.txt'} and {folder / 'sample.npz'} (ids, exit_at, visited)")


if __name__ == "__main__":
    main()
