"""Every number in docs/results.md and in the README's results is in a file of results/.

test_reproduce.py draws every results/*/table.md again from its JSON files and compares; here the pages are
compared with those tables, and with what evaluate.py prints of the other runs in results/.
"""
import contextlib
import io
import re

import pytest
from conftest import ROOT

import evaluate
import run

PAGE = (ROOT / "docs" / "results.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
CLAIMS = PAGE[PAGE.index("## The claims"):PAGE.index("## The default run")]


def rows_of(text):
    """The rows of all Markdown tables in a text, without those of dashes."""
    return [line for line in text.splitlines() if line.startswith("|") and set(line) - set("|- ")]


def decimals(text):
    """The numbers with a decimal point outside of code, links and versions."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|torch \S+", "", text, flags=re.DOTALL)
    return set(re.findall(r"(?<![\w.])\d[\d,]*\.\d+", text))


@pytest.fixture(scope="module")
def known():
    """[numbers of a row] for all rows that come from JSON."""
    rows = [row for path in ROOT.glob("results/*/table.md") for row in rows_of(path.read_text("utf-8"))]
    for path in ROOT.glob("results/*/metrics.jsonl"):
        last = run.read_metrics(path.parent)[-1]
        losses = [x for loss in last["loss"].values() for x in loss]
        rows.append(" ".join([*(f"{x:.2f} {x:.3f}" for x in losses), f"{last['bits_per_byte']:.3f}",
                              *(f"{share:.1%}" for share in last.get("predictor", {}).values())]))
    for path in ROOT.glob("results/*/evaluation.json"):
        measured, printed = run.read_json(path), io.StringIO()
        with contextlib.redirect_stdout(printed):
            for row in (*measured["forced"], *sum(measured["translated"].values(), [])):
                evaluate.print_row(row, first=False)
        rows += rows_of(printed.getvalue())
    return list(map(decimals, rows))


def test_every_row_of_a_table_is_a_row_of_results(known):
    """A table that was typed, or copied before the last run; rows of claims join several."""
    unknown = [row for row in rows_of(PAGE.replace(CLAIMS, ""))
               if not any(decimals(row) <= numbers for numbers in known)]
    assert not unknown


def test_every_number_in_the_text_is_one_of_results(known):
    """Prose with a number that nobody can look up; the papers' own are in the second column of the claims."""
    ours = re.sub(r"(?m)^(\|[^|]*)\|[^|]*\|", r"\1|", CLAIMS)
    of_readme = README[README.index("## Results"):README.index("## What it does not do")]
    said = set().union(*map(decimals, (ours, PAGE.replace(CLAIMS, ""), of_readme)))
    assert not said - set().union(*known)
