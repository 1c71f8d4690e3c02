"""The repository itself: style, size, who may import whom."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

CORE = ["model", "exits", "routing", "experts", "linear", "decode", "cost", "run", "train", "sample"]
INSTRUMENTS = ["data/common", "data/parallel", "data/batches", "evaluate", "plot", "bench", "reproduce",
               *(f"data/{name}/prepare" for name in ("pysource", "text", "shakespeare", "multi30k", "iwslt14",
                                                     "pairs"))]
# Who may import whom. Scripts stand on top and never import each other.
MAY_IMPORT = {
    "linear": set(), "exits": {"routing", "linear"}, "experts": {"routing", "linear"}, "routing": {"linear"},
    "data/common": set(),
    "model": {"exits", "experts", "routing", "linear"},
    "decode": {"model", "exits", "routing"}, "cost": {"routing"},
    "data/parallel": {"data.common"}, "data/batches": {"data.common", "data.parallel", "routing"},
    "run": {"data.common", "exits", "linear", "model"},
    "train": {"run", "data.common", "data.batches", "decode", "exits", "model", "routing"},
    "sample": {"run", "data.common", "data.parallel", "decode"},
    "evaluate": {"run", "data.common", "data.batches", "data.parallel", "decode", "exits", "routing", "cost"},
    "plot": {"run", "data.common"}, "reproduce": {"run", "data.common", "cost", "model"},
    "bench": {"run", "data.common", "data.batches", "model", "exits", "routing", "decode", "cost"},
}
OURS = {"model", "exits", "routing", "experts", "linear", "decode", "cost", "run", "train", "sample",
        "evaluate", "plot", "bench", "reproduce", "data"}


def test_ruff():
    """Unused names, unsorted imports, long lines."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", ROOT],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_line_budget(capsys):
    """Growth is a decision; see LOG.md for the last one."""
    with capsys.disabled():
        for title, names, most in (("core", CORE, 2870), ("instruments", INSTRUMENTS, 2750)):
            lines = {n: len((ROOT / f"{n}.py").read_text("utf-8").splitlines()) for n in names
                     if (ROOT / f"{n}.py").exists()}
            each = ", ".join(f"{n} {k}" for n, k in lines.items())
            print(f"\n{title} {sum(lines.values())} lines: {each}")
            assert sum(lines.values()) <= most


def test_no_function_is_long():
    """A function over 60 lines, train.main included."""
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}:{node.name}"


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_no_circle(name):
    """exits and routing that know a model; scripts that import each other."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert {m for m in found if m.split(".")[0] in OURS} <= MAY_IMPORT[name]


def test_every_open_of_text_names_its_encoding():
    """A file written on one machine and unreadable on another."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]:
        for call in re.findall(r"(?<!tarfile\.)\bopen\([^)]*\)", path.read_text("utf-8")):
            assert "b\"" in call or "encoding=" in call or call == "open()", f"{path.name}: {call}"


def test_the_readme_names_every_file_that_exists():
    """A file map that drifts."""
    text = (ROOT / "README.md").read_text("utf-8")
    for path in ROOT.glob("*.py"):
        said = re.search(rf"`{path.name}` \| (\d+) \|", text)
        assert said, path.name
        assert abs(int(said[1]) - len(path.read_text("utf-8").splitlines())) <= 15, f"{path.name}: line count"
    for name in re.findall(r"`tests/(\w+\.py)`", text):
        assert (ROOT / "tests" / name).exists(), name
    for path in re.findall(r"\]\(([\w/.-]+\.(?:png|json|md))\)", text):
        assert (ROOT / path).exists(), path
