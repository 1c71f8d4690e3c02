"""Your own text: a file, a folder (all text files below it) or a .tar archive. One file is one document.

    python data/text/prepare.py --source FILE_OR_FOLDER
    python data/text/prepare.py --source novels.tar.xz --suffix .txt --vocab-size 4096 --out data/novels
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # for `python data/text/prepare.py`

from data.common import read_texts, script, split_by_document, write_set


@script(source="a text file, a folder or a .tar, .tar.gz, .tar.xz archive",
        val="the same, to validate on; without it, one document in twenty",
        suffix="in a folder or archive take only file names that end so, e.g. .txt .md")
def main(source: Path, val: Path | None = None, suffix: tuple[str, ...] = (), vocab_size: int = 2048,
         out: Path = HERE):
    texts = {split: read_texts([path], suffix) for split, path in (("train", source), ("val", val)) if path}
    splits = {split: [text for _, text in named] for split, named in texts.items()}
    if not val:
        splits = split_by_document(texts["train"])
    prompt = " ".join(splits["val"][0].split()[:3])[:40]    # how the held-out text begins
    write_set(out, splits, vocab_size, name=out.resolve().name, source=source.resolve().name, prompt=prompt)
