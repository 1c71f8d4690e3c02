"""The commands of the README are run as they stand, with further options that make them tiny."""
import re
import shlex
import shutil

from conftest import ROOT
from test_scripts import no_figures  # noqa: F401

import bench
import evaluate
import plot
import sample
import train

SHAPE = "--n_layer 4 --n_head 2 --n_embd 16 --block_size 32 --steps 2 --stop_at 1 --device cpu"
PAIRS = "--translate aa-bb --batch_tokens 128 --enc_layer 1 --enc_head 2 --enc_embd 16"
BENCH = "--n_layer 2 --n_head 2 --n_embd 16 --vocab_size 64 --block_size 560 --repeats 1 --batch_size 1"


def commands():
    """The lines of the README's section "What next", split into words; the two for translators come last."""
    section = re.search(r"^## What next\n(.*?)^## ", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)[1]
    block = re.search(r"```sh\n(.*?)```", section, re.S)[1].splitlines()
    inline = re.findall(r"`(python (?:sample|evaluate)\.py [^`]*)`", section)
    return [shlex.split(line, comments=True) for line in [*block, *inline]]


def test_the_commands_of_the_readme(finished, dataset, pairs, tmp_path, monkeypatch):
    """A command that was renamed, or needs another run than the one before it left."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "001")
    tiny = {"sample.py": [], "evaluate.py": [], "plot.py": ["--first", "0"], "bench.py": BENCH.split()}
    mains = {f"{script.__name__}.py": script.main for script in (train, sample, evaluate, plot, bench)}
    for _, script, *words in commands():
        if script == "train.py" and "multi30k" in words:
            more = [*SHAPE.split(), *PAIRS.split(), "--data", str(pairs)]
        elif script == "train.py":
            more = ["--device", "cpu"] if "--resume" in words else [*SHAPE.split(), "--data", str(dataset)]
        else:
            more = tiny[script]
        words = [word.replace("test_2016_flickr", "test").replace("A dog runs over the grass.", "otter heron")
                 for word in words]
        mains[script]([*words, *more])
    assert len(list((tmp_path / "runs").iterdir())) == 6
