"""Your own text: a file, a folder (all text files below it) or a .tar archive. One file is one document.

    python data/text/prepare.py --source my_book.txt
    python data/text/prepare.py --source novels.tar.xz --suffix .txt --vocab-size 4096 --out data/novels
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

if not __package__:  # started as a script: let it find the package `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import command, read_texts, split_by_document, write_set


@dataclass
class Options:
    source: Path  # a text file, a folder or a .tar, .tar.gz, .tar.xz archive
    suffix: tuple[str, ...] = ()  # in a folder or archive take only file names that end so, e.g. .txt .md
    vocab_size: int = 2048  # tokens, the 256 bytes and the end of text included
    out: Path = Path(__file__).resolve().parent  # folder to write to


@command
def main(argv=None):
    opt = tyro.cli(Options, args=argv, description=__doc__)
    documents = split_by_document(read_texts([opt.source], suffixes=opt.suffix))
    prompt = " ".join(documents["val"][0].split()[:3])[:40]  # how the held-out text begins
    name, origin = opt.out.resolve().name, opt.source.resolve().name
    write_set(opt.out, documents, opt.vocab_size, name=name, source=origin, prompt=prompt)


if __name__ == "__main__":
    main()

# Expected output of the second command, on 97 novels of 1839-1929 (2 CPU cores):
# novels: novels.tar.xz, vocabulary 4096
#  train: 92 documents, 71,842,790 bytes, 20,929,084 tokens, 3.43 bytes per token
#    val: 5 documents, 2,880,631 bytes, 844,520 tokens, 3.41 bytes per token
# wrote data/novels in 6.0 s
