"""The repository itself: style, size, which module may import which, and that the README is true."""
import ast
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

CODE = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")])     # not an environment that lies here
COUNTED = [p for p in CODE if p.name != "page.py"]      # lessons and the page have limits of their own
DATA = sorted(ROOT.glob("data/**/*.py"))
README = (ROOT / "README.md").read_text("utf-8")
CORE = "model exits routing experts linear decode cost options run train sample".split()
SCRIPTS = "evaluate plot bench reproduce".split()
BUDGETS = {     # lines, or bytes of a text; never raised
    "core": ([ROOT / f"{name}.py" for name in CORE], 2020),
    "scripts": ([ROOT / f"{name}.py" for name in SCRIPTS], 1190),
    "data": (DATA, 820),
    "everything but tests and lessons": (COUNTED, 4000),
    "tests": (sorted(ROOT.glob("tests/*.py")), 3600),
    "README.md": ([ROOT / "README.md"], 16 * 1024),
    "LOG.md": ([ROOT / "LOG.md"], 15 * 1024),
}
# Which module may import which. Scripts stand on top and never import each other.
MAY_IMPORT = {
    "linear": "", "routing": "linear", "experts": "routing linear", "exits": "linear data.common",
    "model": "exits experts routing linear data.common", "cost": "routing",
    "decode": "exits routing data.common data.batches",
    "options": "data.common exits model routing", "run": "data.common options linear model",
    "train": "run options data.common data.batches decode exits routing",
    "sample": "run options data.common data.parallel decode exits",
    "evaluate": "run options data.common data.batches data.parallel decode exits routing cost",
    "plot": "run options data.common page", "page": "cost", "reproduce": "run options data.common cost model",
    "bench": "run options data.common data.batches model exits decode cost linear train",
    **{p.relative_to(ROOT).with_suffix("").as_posix(): "data routing" for p in DATA},
    "data/common": "",
}


@pytest.mark.parametrize("words", [[], ["--preview", "--select", "PLW1514"]])
def test_ruff(words):
    """Unused names, unsorted imports, long lines; a text file opened without an encoding, which is written on
    one machine and unreadable on another."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", *words, ROOT],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [p for p in CODE if "read_text()" in p.read_text("utf-8")]       # ruff knows no types


@pytest.mark.parametrize("part", BUDGETS)
def test_budget(part):
    """Growth. A budget is met by deleting concepts and repetition, not line ends."""
    paths, most = BUDGETS[part]
    sizes = {p.relative_to(ROOT).as_posix(): p.stat().st_size if p.suffix == ".md" else
             len(p.read_text("utf-8").splitlines()) for p in paths}
    said = f"{sum(sizes.values())} of {most} (harmless in a copy that you change: delete this test): {sizes}"
    assert sum(sizes.values()) <= most, said


def test_no_function_is_long():
    """A function over 60 lines, train.main included."""
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}:{node.name}"


def imported(name):
    """Modules that a file imports, at its top or in a function, and "module.name" of what it uses of them."""
    modules, names = set(), set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
            names |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return modules, names


@pytest.mark.parametrize("name", [p.relative_to(ROOT).with_suffix("").as_posix() for p in CODE])
def test_no_circle(name):
    """exits and routing that know a model; scripts that import each other."""
    for module in imported(name)[0]:
        known = {module, module.split(".")[0]} & set(MAY_IMPORT[name].split())
        assert known or module.split(".")[0] not in {*CORE, *SCRIPTS, "data"}, module


@pytest.mark.parametrize("name", ["options", "run"])
def test_options_and_run_know_no_rule(name):
    """A new rule that needs a line in another file than its own: rules are asked for by name."""
    used = {used for used in imported(name)[1] if used.split(".")[0] in ("exits", "routing")}
    assert used <= {"exits.WEIGHTS", "routing.ROUTES"}


def test_the_file_map_of_the_readme():
    """A file map that drifts."""
    for path in ROOT.glob("*.py"):
        said = re.search(rf"`{path.name}`\S* \| (\d+) \|", README)
        assert said, path.name
        assert abs(int(said[1]) - len(path.read_text("utf-8").splitlines())) <= 15, f"{path.name}: line count"


@pytest.mark.parametrize("path", [ROOT / "README.md", *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(path):
    """A page or a figure that was renamed."""
    text = path.read_text("utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (path.parent / link).exists(), link
    for name in re.findall(r"`tests/(\w+\.py)`", text):
        assert (ROOT / "tests" / name).exists(), name


def test_the_diffs_to_make_it_yours_apply_and_run(finished, dataset, tmp_path):
    """A README that tells how to change code that has changed since; a change that takes over ten lines."""
    section = re.search(r"^## Make it yours\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]
    folder, left_out = tmp_path / "code", shutil.ignore_patterns(".*", "runs", "results", "tests", "*.bin")
    shutil.copytree(ROOT, folder, ignore=left_out)
    for diff in re.findall(r"^```diff\n(.*?)^```", section, re.M | re.S):
        assert len(re.findall(r"^[+-](?!--|\+\+)", diff, re.M)) <= 10
        subprocess.run(["git", "apply", "-"], cwd=folder, input=diff.encode("utf-8"), check=True)

    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")       # run by a slow test
    [diff] = re.findall(r"^```diff\n(.*?)^```", page, re.M | re.S)
    subprocess.run(["git", "apply", "--check", "-"], cwd=folder, input=diff.encode("utf-8"), check=True)

    [rule], [route], [data] = ({*re.findall(pattern, section)} for pattern in (
        r"--rule (\S+)`", r"--route (\S+)`", r"\+\+\+ b/data/(\w+)/"))
    shutil.copytree(finished, folder / "runs" / "001")
    train = f"train --out runs {shlex.join(TINY)} --stop_at 2 --data"
    commands = [f"sample --max_new_tokens 9 --rule {rule}", f"evaluate --rules {rule}",
                f"{train} {dataset} --route {route}", f"{train} {data}",
                "sample --max_new_tokens 9 --prompt 30+40="]
    code = "import sys, shlex; [__import__(n).main(w) for n, *w in map(shlex.split, sys.argv[1:])]"
    done = subprocess.run([sys.executable, "-c", code, *commands], cwd=folder, capture_output=True, text=True)
    for said in f"{rule}: 9 tokens", f"| {rule} |", f"{route} loss by exit", "40=":
        assert said in done.stdout, done.stderr


def test_the_tests_that_the_table_of_the_papers_names():
    """A claim whose proof was renamed or deleted."""
    code = "".join(path.read_text("utf-8") for path in ROOT.glob("tests/*.py"))
    tests = re.findall(r"^def (test_\w+)", code, re.M)
    for name in re.findall(r"`(test_\w+)(?:\.\.\.)?`", (ROOT / "docs" / "papers.md").read_text("utf-8")):
        assert any(test.startswith(name) for test in tests), name
