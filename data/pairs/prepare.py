"""Your own two aligned files: line n of one translates line n of the other.

    python data/pairs/prepare.py --source FILE.de FILE.en --languages de en
    python data/pairs/prepare.py --source talks.de talks.en --languages de en --out data/talks
"""
import sys
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # for `python data/pairs/prepare.py`

from data.common import UserError, script, split_by_document
from data.parallel import read_pairs, write_pairs

Files = tuple[Path, Path]
Tokenize = Literal["13a", "intl", "char", "zh", "none"]


@script(source="two text files, plain or .gz, with as many lines",
        languages="their names, in the same order: de en",
        val="two files to validate on; without them, one pair in twenty", test="two files to test on",
        tokenize="sacrebleu's tokenisation for scoring; none: the files are tokenised already")
def main(source: Files, languages: tuple[str, str], val: Files | None = None, test: Files | None = None,
         tokenize: Tokenize = "13a", vocab_size: int = 4096, out: Path = HERE):
    if len(set(languages)) != 2 or not all(language.isalpha() for language in languages):
        raise UserError(f"--languages {' '.join(languages)}: give two different names made of letters")
    files = {"train": source, "val": val, "test": test}
    splits = {split: read_pairs(paths, split) for split, paths in files.items() if paths}
    if not val:
        if len(splits["train"]) < 2:
            raise UserError("one pair cannot be split into train and val: give more, or --val")
        splits |= split_by_document([(f"pair {n}", pair) for n, pair in enumerate(splits["train"])])
    write_pairs(out, splits, vocab_size, languages=languages, name=out.resolve().name,
                source=" and ".join(path.name for path in source), tokenize=tokenize)
