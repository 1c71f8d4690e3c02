"""The default data set, without network: the Python source files of the standard library you are running.

    python data/pysource/prepare.py
    python data/pysource/prepare.py --source stdlib site-packages --vocab-size 4096 --out data/more-python
"""
import platform
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # for `python data/pysource/prepare.py`

from data.common import read_texts, script, split_by_document, write_set

LIBRARIES = {"stdlib": "stdlib", "site-packages": "purelib"}    # word after --source -> name in sysconfig
# Tests, tables of data and old copies of other code are left out.
SKIP = "test tests idlelib lib2to3 encodings pydoc_data site-packages dist-packages __pycache__".split()


@script(source="folders or archives; also the words stdlib and site-packages")
def main(source: tuple[str, ...] = ("stdlib",), vocab_size: int = 2048, out: Path = HERE):
    folders = [sysconfig.get_path(LIBRARIES[name]) if name in LIBRARIES else name for name in source]
    splits = split_by_document(read_texts(folders, suffixes=[".py"], skip=SKIP))
    origin = f"Python {platform.python_version()}: " + ", ".join(Path(name).name for name in source)
    write_set(out, splits, vocab_size, name="pysource", source=origin, prompt="def main(")
