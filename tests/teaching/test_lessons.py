"""Every lesson runs to its end; its checker takes the solution and refuses each mutant."""
import re
import runpy

import pytest
import torch
from conftest import ROOT

from data.hops import prepare

LESSONS = sorted(ROOT.glob("lessons/[0-9]*.py"))


@pytest.fixture(scope="session")
def desk(tmp_path_factory):
    """The folder in which all lessons keep their models and figures."""
    return tmp_path_factory.mktemp("lessons")


@pytest.fixture(scope="session")
def hops(tmp_path_factory):
    """A small set of questions."""
    folder = tmp_path_factory.mktemp("data") / "hops"
    prepare.main(["--documents", "1000", "--questions", "4", "--out", str(folder)])
    return folder


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson(path, desk, dataset, hops, monkeypatch, capsys):
    """A lesson that runs no longer, has no figure or changes torch for the next; a checker that takes a wrong
    answer, refuses a right one, or has been solved already."""
    monkeypatch.setenv("LESSON_STEPS", "2")
    monkeypatch.setenv("LESSON_PYSOURCE", str(dataset))
    monkeypatch.setenv("LESSON_HOPS", str(hops))
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(path.parent)
    lesson = runpy.run_path(str(path))
    answers = runpy.run_path(str(ROOT / "tests" / "teaching" / f"lesson_{path.stem[0]}.py"))
    assert "exercise: not begun" in capsys.readouterr().out
    assert (desk / "lessons" / "figures" / f"{path.stem}.png").stat().st_size > 5000
    assert lesson["check"](answers["solution"]) and len(answers["mutants"]) >= 4
    assert not any(lesson["check"](mutant) for mutant in answers["mutants"])
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_what_a_lesson_looks_like(path):
    """A lesson that is too long, redefines what the project has, or has no committed figure."""
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 120 and text.count("# %%") >= 5 and "def specification(" in text
    project = "".join(path.read_text("utf-8") for path in ROOT.glob("*.py"))
    ours, theirs = (set(re.findall(r"^(?:def|class) (\w+)", code, re.M)) for code in (project, text))
    assert ours & theirs <= {"check"}
    assert (ROOT / "lessons" / "figures" / f"{path.stem}.png").stat().st_size < 200_000
