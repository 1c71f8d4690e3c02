"""Tiny Shakespeare: 1.1 MB of plays, the first 90 % to train on and the rest to validate.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --source input.txt      (without network)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

if not __package__:  # started as a script: let it find the package `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import command, cut_at_line, download, read_texts, write_set

HERE = Path(__file__).resolve().parent
FILE = "data/tinyshakespeare/input.txt"
URLS = (
    f"https://raw.githubusercontent.com/karpathy/char-rnn/master/{FILE}",
    f"https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/{FILE}",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",  # the same file
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of 1,115,394 bytes


@dataclass
class Options:
    source: Path | None = None  # input.txt if you already have it; otherwise it is downloaded
    vocab_size: int = 1024  # tokens, the 256 bytes and the end of text included
    out: Path = HERE  # folder to write to


@command
def main(argv=None):
    opt = tyro.cli(Options, args=argv, description=__doc__)
    path = opt.source or HERE / "input.txt"
    if opt.source is None:
        download(URLS, path, SHA256)
    [(_, text), *_] = read_texts([path])
    documents = cut_at_line(text, val_share=0.1)
    write_set(opt.out, documents, opt.vocab_size, name="shakespeare", source=path.name, prompt="ROMEO:")


if __name__ == "__main__":
    main()

# Expected output (2 CPU cores):
# shakespeare: input.txt, vocabulary 1024
#  train: 1 documents, 1,003,856 bytes, 408,438 tokens, 2.46 bytes per token
#    val: 1 documents, 111,538 bytes, 48,844 tokens, 2.28 bytes per token
# wrote data/shakespeare in 0.1 s
