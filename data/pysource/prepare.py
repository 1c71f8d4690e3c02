"""The default data set, without network: the Python source files of the standard library you are running.

    python data/pysource/prepare.py
    python data/pysource/prepare.py --source stdlib site-packages --vocab-size 4096 --out data/more-python
"""

import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import tyro

if not __package__:  # started as a script: let it find the package `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import command, read_texts, split_by_document, write_set

PLACES = {"stdlib": "stdlib", "site-packages": "purelib"}  # word after --source -> name in sysconfig
# Tests, tables of data and old copies of other code; the rest is what people read.
SKIP = "test tests idlelib lib2to3 encodings pydoc_data site-packages dist-packages __pycache__".split()


@dataclass
class Options:
    source: tuple[str, ...] = ("stdlib",)  # folders or archives; also the words stdlib and site-packages
    vocab_size: int = 2048  # tokens, the 256 bytes and the end of text included
    out: Path = Path(__file__).resolve().parent  # folder to write to


@command
def main(argv=None):
    opt = tyro.cli(Options, args=argv, description=__doc__)
    sources = [sysconfig.get_path(PLACES[place]) if place in PLACES else place for place in opt.source]
    documents = split_by_document(read_texts(sources, suffixes=[".py"], skip=SKIP))
    origin = f"Python {platform.python_version()}: " + ", ".join(Path(place).name for place in opt.source)
    write_set(opt.out, documents, opt.vocab_size, name="pysource", source=origin, prompt="def main(")


if __name__ == "__main__":
    main()

# Expected output (2 CPU cores; another version of Python has slightly different files):
# files left out: 2 duplicate, 2 empty
# pysource: Python 3.11.7: stdlib, vocabulary 2048
#  train: 449 documents, 8,644,214 bytes, 2,708,941 tokens, 3.19 bytes per token
#    val: 24 documents, 249,493 bytes, 81,590 tokens, 3.06 bytes per token
# wrote data/pysource in 0.7 s
