"""Your own two aligned files: line n of one translates line n of the other.

    python data/pairs/prepare.py --source talks.de talks.en --languages de en --out data/talks
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

if not __package__:  # started as a script: let it find the package `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import UserError, command
from data.parallel import read_pairs, write_pairs


@dataclass
class Options:
    source: tuple[Path, Path]  # two text files, plain or .gz, with as many lines
    languages: tuple[str, str]  # their names, in the same order: de en
    val: tuple[Path, Path] | None = None  # two files to validate on; left out: one pair in twenty
    test: tuple[Path, Path] | None = None  # two files to test on
    vocab_size: int = 4096  # tokens for both languages, the 256 bytes and the end of text included
    tokenize: str = "13a"  # sacrebleu's tokenisation for scoring; none: the files are tokenised already
    out: Path = Path(__file__).resolve().parent  # folder to write to


@command
def main(argv=None):
    opt = tyro.cli(Options, args=argv, description=__doc__)
    if len(set(opt.languages)) != 2 or not all(lang.isalpha() for lang in opt.languages):
        raise UserError(f"--languages {' '.join(opt.languages)}: give two different names made of letters")
    files = {"train": opt.source, "val": opt.val, "test": opt.test}
    splits = {split: read_pairs(dict(zip(opt.languages, pair, strict=True)))
              for split, pair in files.items() if pair}
    if opt.val is None:
        splits |= hold_out(splits["train"])
    source = " and ".join(path.name for path in opt.source)
    write_pairs(opt.out, splits, opt.vocab_size, name=opt.out.resolve().name, source=source,
                tokenize=opt.tokenize)


def hold_out(pairs, share=0.05):
    """{language: lines} -> {"train": ..., "val": ...}, the pairs of val drawn with a fixed seed."""
    count = len(next(iter(pairs.values())))
    if count < 2:
        raise UserError("one pair cannot be split into train and val: give more, or --val")
    drawn = set(np.random.default_rng(0).permutation(count)[:max(1, round(share * count))].tolist())
    return {split: {lang: [line for n, line in enumerate(lines) if (n in drawn) == (split == "val")]
                    for lang, lines in pairs.items()} for split in ("train", "val")}


if __name__ == "__main__":
    main()
