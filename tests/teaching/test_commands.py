"""The commands of all pages are run as they stand, with further options that make them tiny."""
import importlib
import inspect
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from test_scripts import no_figures  # noqa: F401

import options
import reproduce
from options import parse

SHAPE = "--n_layer 4 --n_head 2 --n_embd 16 --block_size 38 --steps 2 --stop_at 1 --device cpu"
PAIRS = "--batch_tokens 128 --enc_layer 1 --enc_head 2 --enc_embd 16"
BENCH = "--n_layer 2 --n_head 2 --n_embd 16 --vocab_size 64 --block_size 560 --repeats 1 --batch_size 1"
TINY = {"evaluate.py": "", "plot.py": "--first 0", "sample.py": "", "bench.py": BENCH,
        "reproduce.py": "--out results --runs runs",
        "data/hops/prepare.py": "--documents 1000", "data/pairs/prepare.py": "--vocab-size 300",
        "data/text/prepare.py": "--vocab-size 300", "data/pysource/prepare.py": "--vocab-size 300"}
PAGES = [str(p.relative_to(ROOT)) for names in ("README.md", "docs/*.md", "configs/*.toml", "lessons/*.md")
         for p in sorted(ROOT.glob(names))]
ELSEWHERE = "agreement|above_mean|sums|lessons/"    # the diffs of the README and the lessons have their tests


def commands(page):
    """Commands in code blocks, in `inline code` and in comments of a preset, split into words."""
    text = (ROOT / page).read_text("utf-8")
    text = re.sub(r"^```diff\n.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"\n#  +(?=--)", " ", text)       # a long command in the comments of a preset
    found = re.findall(r"(?:^(?:# +)?|`|&& )(python [\w/]+\.py[^`\n]*)", text, re.M)
    return [shlex.split(line, comments=True)[1:] for line in found if not re.search(ELSEWHERE, line)]


def module_of(script):
    """data/text/prepare.py -> the module data.text.prepare."""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@pytest.fixture
def desk(finished, dataset, pairs, tmp_path, monkeypatch):
    """A folder with a finished run and the files that the commands read -> a function that runs a command."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "001")
    (tmp_path / "results").mkdir()
    for name in "FILE_OR_FOLDER input.txt".split():
        (tmp_path / name).mkdir()
        code = "".join(f"def f{i}(x):\n    return {i} + x\n" for i in range(300))
        (tmp_path / name / "a.py").write_text(code)
    for name in "talks train valid test".split():
        for language in "de", "en":
            lines = "".join(f"{name} {language} {i} {i * 7}\n" for i in range(300))
            (tmp_path / f"{name}.{language}").write_text(lines)
    for experiment in reproduce.EXPERIMENTS.values():
        monkeypatch.setitem(experiment, "points", [])

    def run(script, *words):
        words = [{"test_2016_flickr": "test", "test_2017_flickr": "test", "...": "full", "10000": "50",
                  "A dog runs over the grass.": "otter heron",
                  "stdlib": "FILE_OR_FOLDER", "site-packages": "input.txt"}.get(word, word) for word in words]
        if script == "plot.py" and "2" in words:        # training was too short to end with an evaluation
            run("evaluate.py", "--run", "2")
        more = TINY[script].split() if script in TINY else ["--device", "cpu"]
        if script == "train.py" and "--resume" not in words:
            translates = {"multi30k", "iwslt14"} & {*words}
            more = [*SHAPE.split(), *(PAIRS.split() if translates else ())]
            name = Path(words[words.index("--data") + 1]).name if "--data" in words else "none"
            if (tmp_path / "data" / name).exists():         # a command before this one has prepared it
                more += ["--data", f"data/{name}"]
            elif translates:
                more += ["--data", str(pairs), "--translate", "aa-bb"]
            else:
                more += ["--data", str(dataset)]
        module_of(script).main([*words, *more])
    return run


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_understood(page):
    """An option that was renamed."""
    for script, *words in commands(page):
        module = module_of(script)
        if script.endswith("prepare.py"):
            given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
            assert given <= inspect.signature(module.main).parameters.keys(), words
        else:
            preset = script == "train.py" and words[:1] and not words[0].startswith("-")
            parse(words[bool(preset):], options.Options if script == "train.py" else module.Options)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(desk, page):
    """A command that needs another run than the one before it left."""
    for words in commands(page):
        desk(*words)


def test_commands_are_found():
    """A pattern that matches nothing."""
    assert len(commands("README.md")) >= 18 and len(commands("docs/results.md")) >= 8
