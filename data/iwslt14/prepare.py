"""IWSLT14 German-English: 160,000 pairs of TED talks, tokenised and lowercased as the field compares them.

    python data/iwslt14/prepare.py --source DIR     (train, valid and test .de and .en, plain or .gz)
    python data/iwslt14/prepare.py                  (downloads the talks; needs pip install sacremoses)

Without --source the original archive is cut, tokenised and split by the usual recipe: Moses tokenisation and
lower case, pairs of 1 to 175 words whose lengths differ by less than a factor of 1.5, every 23rd pair of the
training file for validation, four years' development and test talks for testing.
"""

import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import unescape

import tyro

if not __package__:  # started as a script: let it find the package `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import UserError, command, download
from data.parallel import find_file, read_pairs, write_pairs

HERE = Path(__file__).resolve().parent
URLS = (
    "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz",
    "https://wit3.fbk.eu/archive/2014-01/texts/de/en/de-en.tgz",
)
MD5 = "md5:10936dfdf616504ddbd844e91b94ef4a"  # of the archive
TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
LINES = {"train": 160_239, "val": 7_283, "test": 6_750}  # what the recipe yields


@dataclass
class Options:
    source: Path | None = None  # a folder that has the tokenised files; otherwise the talks are downloaded
    vocab_size: int = 10_000  # tokens for both languages, the 256 bytes and the end of text included
    out: Path = HERE  # folder to write to


@command
def main(argv=None):
    opt = tyro.cli(Options, args=argv, description=__doc__)
    splits = from_folder(opt.source) if opt.source else from_archive()
    write_pairs(opt.out, splits, opt.vocab_size, name="iwslt14", source="TED talks, German and English",
                tokenize="none")


def from_folder(folder):
    names = {"train": ["train"], "val": ["valid", "val"], "test": ["test"]}
    return {split: read_pairs({lang: find_file(folder, [f"{name}.{lang}" for name in stems])
                               for lang in ("de", "en")}) for split, stems in names.items()}


# ---- the usual recipe


def from_archive():
    try:
        from sacremoses import MosesTokenizer
    except ImportError:
        raise UserError("the talks must be tokenised: pip install sacremoses, or give --source DIR") from None
    download(URLS, HERE / "de-en.tgz", MD5)
    raw = {language: texts_of(HERE / "de-en.tgz", language) for language in ("de", "en")}
    found = {split: {} for split in LINES}
    for part in ("train", "test"):
        sides = []
        for language, texts in raw.items():
            cut = MosesTokenizer(lang=language)
            sides.append([cut.tokenize(line, return_str=True).lower() for line in texts[part]])
        kept = [pair for pair in zip(*sides, strict=True) if part == "test" or fits(*map(str.split, pair))]
        chosen = {"test": kept} if part == "test" else {
            "train": [p for n, p in enumerate(kept, 1) if n % 23], "val": kept[22::23]}
        for split, pairs in chosen.items():
            found[split] = dict(zip(raw, map(list, zip(*pairs, strict=True)), strict=True))
    for split, expected in LINES.items():
        if len(found[split]["de"]) != expected:
            print(f"note: {split} has {len(found[split]['de']):,} pairs, elsewhere {expected:,}")
    return found


def fits(a, b):
    """Lists of words: is the pair kept for training?"""
    return 0 < len(a) <= 175 and 0 < len(b) <= 175 and max(len(a), len(b)) <= 1.5 * min(len(a), len(b))


def texts_of(archive, language):
    """The archive -> {"train": lines, "test": lines} of one language, tags and their contents removed."""
    with tarfile.open(archive) as tar:
        def lines(name):
            return tar.extractfile(f"de-en/{name}").read().decode("utf-8").split("\n")
        train = [re.sub(r"</?(title|description)>", "", line).strip()
                 for line in lines(f"train.tags.de-en.{language}")
                 if not re.search("<(url|talkid|keywords)>", line)]
        talks = [line for name in TESTS for line in lines(f"IWSLT14.{name}.de-en.{language}.xml")]
    test = [unescape(re.sub(r"<[^>]*>", "", line)).strip() for line in talks if line.startswith("<seg")]
    return {"train": train, "test": [line.replace("’", "'") for line in test]}


if __name__ == "__main__":
    main()
