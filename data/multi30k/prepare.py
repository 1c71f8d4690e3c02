"""Multi30k: 29,000 image captions in English and German, with the test sets of 2016 and 2017.

    python data/multi30k/prepare.py
    python data/multi30k/prepare.py --source DIR     (without network: train.de.gz and so on)

For research and education, not for sale: see the terms of the Flickr30k images and of github.com/multi30k.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # for `python data/multi30k/prepare.py`

from data.common import download, script
from data.parallel import read_pairs, write_pairs

URLS = (
    "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/",
    "https://cdn.jsdelivr.net/gh/multi30k/dataset@master/data/task1/raw/",
)
SPLITS = "train", "val", "test_2016_flickr", "test_2017_flickr"


@script(source="a folder that has the files; without it, they are downloaded")
def main(source: Path | None = None, vocab_size: int = 4096, out: Path = HERE):
    if source is None:
        for line in (HERE / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
            checksum, name = line.split()
            download([url + name for url in URLS], HERE / name, checksum)
    folder = source or HERE
    splits = {name: read_pairs([folder / f"{name}.de", folder / f"{name}.en"], name) for name in SPLITS}
    write_pairs(out, splits, vocab_size, languages=("de", "en"), name="multi30k",
                source="captions, English and German")
