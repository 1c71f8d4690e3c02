"""Sample from a run, or translate with it, each token coloured by the number of blocks that ran to write it.

    python sample.py --run 3 --prompt "def main(" --rule confidence:0.8     (--prompt -: standard input)
    python sample.py --run 4 --prompt "A dog runs over the grass."          (a translator: a sentence a line)
"""
import codecs
import json
import os
import re
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import run
from data.common import EOT, command, load_tokenizer, reading, write_file
from data.parallel import source_ids
from decode import generate, translate
from exits import parse_rule
from options import RunOptions, parse, refuse, rule_name, within

END = " </s>"
SHADES = (153, 159, 158, 157, 193, 229, 223, 217, 210, 203)     # of the 256 terminal colours: shallow to deep


@dataclass
class Options(RunOptions):
    """Continue a prompt with the model of a run, or translate it."""
    prompt: str | None = None   # a text, or sentences line by line; "-": standard input; None: the data's
    max_new_tokens: int = 200
    samples: int = 1            # this many texts, side by side in one batch
    temperature: float = 0.8    # 0: always the most likely token
    top_k: int = 50             # choose among this many most likely tokens; 0: all
    seed: int = 0
    beam: int = 5               # translator: hypotheses; 1: greedy
    length_penalty: float = 1.0     # translator: hypotheses compare by log-probability / length^this
    color: Literal["auto", "always", "never"] = "auto"


def check(o, trained):
    """UserError for values that cannot be and for options that would do nothing in this run."""
    within(vars(o), {(1, 2**31): "max_new_tokens", (1, 4096): "samples beam", (0, 2**31): "top_k seed",
                     (0, 1e6): "temperature", (-100, 100): "length_penalty"})
    if trained.translate:
        refuse(o, ("max_new_tokens", "samples", "temperature", "top_k"),
               f"this run is a translator ({trained.translate})")
    else:
        refuse(o, ("beam", "length_penalty"), "this run is a GPT")


def tokens_of(row, encoding, source):
    """A Generated -> [[string, exit, blocks] of every token]. exit and blocks are those of the step that
    wrote it, None in the prompt. In a translation the words of `source` replace the prompt."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")   # split characters
    strings = [decoder.decode(part) for part in encoding.decode_tokens_bytes(row.ids)]
    strings[-1] += decoder.decode(b"", final=True)
    prompt = [None] * row.prompt
    exit_at = prompt + row.exit_at[row.prompt - 1:].tolist()
    blocks = prompt + row.visited[row.prompt - 1:].sum(1).tolist()
    tokens = list(map(list, zip(strings, exit_at, blocks, strict=True)))
    if source:
        tokens[row.prompt][0] = tokens[row.prompt][0].lstrip()
        tokens[-1][0] = tokens[-1][0].replace(EOT, END)
        tokens[:row.prompt] = [[f"{word} ", None, None] for word in source.split()] + [["\n", None, None]]
    return tokens


def paint(tokens, L):
    """Tokens -> one string with terminal colours by number of blocks, line ends left plain."""
    painted = []
    for text, _, blocks in tokens:
        if blocks is not None:
            color = SHADES[max(0, round((blocks - 1) / max(1, L - 1) * (len(SHADES) - 1)))]
            text = re.sub(".+", rf"\033[30;48;5;{color}m\g<0>\033[0m", text)
        painted.append(text)
    return "".join(painted)


@command
def main(argv=None):
    o = parse(argv, Options)
    folder, trained, _, model, _ = run.open_run(o.run, o.out, o.device)
    check(o, trained)
    torch.manual_seed(o.seed)
    name, L = rule_name(o, trained), trained.model.n_layer
    rule, encoding, text = parse_rule(name, model), load_tokenizer(folder / "tokenizer.json"), o.prompt
    if text is None:
        text = run.read_json(folder / "meta.json", "prompt")
        text = text[trained.translate.split("-")[0]] if trained.translate else text
    with reading("the prompt"):
        text = sys.stdin.read() if text == "-" else text
        text.encode("utf-8")        # a wrong byte would only be seen in decoding
    if trained.translate:
        lines = [line.strip() for line in text.strip().split("\n")]
        sources = source_ids(encoding, lines, model.config.block_size, "the prompt")
        rows = translate(model, sources, encoding.eot_token, rule, o.beam, o.length_penalty)
    else:
        prompt, room = encoding.encode_ordinary(text), model.config.block_size
        new = min(o.max_new_tokens, room - len(prompt))
        if 0 < new < o.max_new_tokens:
            print(f"(room for {new} new tokens: the context is {room})", file=sys.stderr)
        rows = generate(model, [prompt] * o.samples, new, rule, temperature=o.temperature,
                        top_k=o.top_k or None, seed=o.seed, eos_id=encoding.eot_token)
        lines = [""] * len(rows)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ if o.color == "auto" else o.color == "always"
    texts = [tokens_of(row, encoding, line) for row, line in zip(rows, lines, strict=True)]
    plain = ["".join(text for text, *_ in tokens).removesuffix(END) for tokens in texts]
    for tokens, text in zip(texts, plain, strict=True):
        print(paint(tokens, L) if color else text)
        print("-" * 60)
    if color:
        print("blocks run to write a token:", paint([[f" {n} ", n, n] for n in range(1, L + 1)], L))
    written = [counted for tokens in texts for _, *counted in tokens if counted != [None, None]]
    exit_at, blocks = np.mean(written, 0)
    print(f"{folder}, {name}: {len(written)} tokens, exit after block {exit_at:.2f} of {L} on average, "
          f"{blocks:.2f} blocks run")
    write_file(folder / "sample.txt", f"\n{'-' * 60}\n".join(plain) + "\n")
    write_file(folder / "sample.json", json.dumps({"n_layer": L, "texts": texts}) + "\n")
    print(f"wrote {folder}/sample.txt and {folder}/sample.json (string, exit and blocks of each token)")


if __name__ == "__main__":
    main()
