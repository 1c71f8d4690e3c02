"""Multi30k: 29,000 image captions in English and German, with the test sets of 2016 and 2017.

    python data/multi30k/prepare.py
    python data/multi30k/prepare.py --source DIR     (without network: train.de.gz and so on)

For research and education, not for sale: see the terms of the Flickr30k images and of github.com/multi30k.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

if not __package__:  # started as a script: let it find the package `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import command, download
from data.parallel import find_file, read_pairs, write_pairs

HERE = Path(__file__).resolve().parent
URLS = (
    "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/",
    "https://cdn.jsdelivr.net/gh/multi30k/dataset@master/data/task1/raw/",
    "https://github.com/multi30k/dataset/raw/master/data/task1/raw/",
)
SHA256 = {  # of the compressed files
    "train.de": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "test_2016_flickr.de": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2017_flickr.de": "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee",
    "test_2017_flickr.en": "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074",
}


@dataclass
class Options:
    source: Path | None = None  # a folder that has the files; otherwise they are downloaded
    vocab_size: int = 4096  # tokens for both languages, the 256 bytes and the end of text included
    out: Path = HERE  # folder to write to


@command
def main(argv=None):
    opt = tyro.cli(Options, args=argv, description=__doc__)
    if opt.source is None:
        for name, digest in SHA256.items():
            download([f"{url}{name}.gz" for url in URLS], HERE / f"{name}.gz", digest)
    folder, splits = opt.source or HERE, {}
    for split in ("train", "val", "test_2016_flickr", "test_2017_flickr"):
        splits[split] = read_pairs({lang: find_file(folder, [f"{split}.{lang}"]) for lang in ("de", "en")})
    write_pairs(opt.out, splits, opt.vocab_size, name="multi30k", source="captions, English and German")


if __name__ == "__main__":
    main()
