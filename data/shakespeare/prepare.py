"""Tiny Shakespeare: 1.1 MB of plays, the first 90 % to train on and the rest to validate.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --source input.txt      (without network)
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # for `python data/shakespeare/prepare.py`

from data.common import cut_at_line, download, read_texts, script, write_set

FILE = "data/tinyshakespeare/input.txt"
URLS = (
    f"https://raw.githubusercontent.com/karpathy/char-rnn/master/{FILE}",
    f"https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/{FILE}",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",  # the same file
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of 1,115,394 bytes


@script(source="input.txt; without it, the file is downloaded")
def main(source: Path | None = None, vocab_size: int = 1024, out: Path = HERE):
    path = source or download(URLS, HERE / "input.txt", SHA256)
    [(_, text), *_] = read_texts([path])
    splits = cut_at_line(text, val_share=0.1)
    write_set(out, splits, vocab_size, name="shakespeare", source=path.name, prompt="ROMEO:")
