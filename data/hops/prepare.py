"""Questions whose number of steps is known: generated cycles, and where k steps from a symbol lead.

    python data/hops/prepare.py

In " ab ca bc2 a c0 b b" the cycle is a -> b -> c -> a; 2 steps from a lead to c, 0 steps from b to b.
"""
import sys
from pathlib import Path
from string import ascii_lowercase

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # for `python data/hops/prepare.py`

from data.common import UserError, script, write_set


@script(symbols="letters to draw from", cycle="letters of a document", hops="most steps of a question")
def main(symbols: int = 16, cycle: int = 6, hops: int = 3, questions: int = 16, documents: int = 20000,
         out: Path = HERE):
    enough = documents > 999 and documents * cycle > 20 * symbols**2        # every pair occurs
    if not (2 <= cycle <= symbols <= 26 and 0 <= hops <= 9 and questions > 0 and enough):
        raise UserError("use 2 <= cycle <= symbols <= 26, 0 <= hops <= 9, a question, and enough documents")
    rng, texts = np.random.default_rng(0), []
    for _ in range(documents):
        names = [ascii_lowercase[i] for i in rng.permutation(symbols)[:cycle]]  # each leads to the next
        text = "".join(f" {names[i - 1]}{names[i]}" for i in rng.permutation(cycle))
        for k, i in zip(rng.integers(0, hops + 1, questions), rng.integers(0, cycle, questions), strict=True):
            text += f"{k} {names[i]} {names[(i + k) % cycle]}"
        texts.append(text)
    splits, vocab_size = {"train": texts[500:], "val": texts[:500]}, 257 + symbols**2   # " a", " ab": a token
    write_set(out, splits, vocab_size, name="hops", source="generated", listing=cycle,
              size=cycle + 3 * questions + 1, prompt=text[:3 * cycle] + f"{hops} {names[0]}")
