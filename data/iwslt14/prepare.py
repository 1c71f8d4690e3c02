"""IWSLT14 German-English: TED talks, tokenised and in lower case.

    python data/iwslt14/prepare.py --source DIR

DIR has train, valid and test .de and .en, plain or .gz, as the usual recipe makes them from the talks:
160,239, 7,283 and 6,750 pairs after Moses tokenisation.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # for `python data/iwslt14/prepare.py`

from data.common import script
from data.parallel import read_folder, write_pairs


@script(source="a folder that has the tokenised files")
def main(source: Path, vocab_size: int = 10_000, out: Path = HERE):
    splits = read_folder(source, {"train": "train", "val": "valid", "test": "test"}, ("de", "en"))
    write_pairs(out, splits, vocab_size, languages=("de", "en"), name="iwslt14",
                source="TED talks, German and English", tokenize="none")
