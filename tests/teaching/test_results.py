"""Every decimal in docs/results.md and in the README's results is in a file of results/.

Every results/*/table.md is drawn again from its JSON files; the pages are compared with those tables, and
with what evaluate.py prints of the other runs in results/.
"""
import contextlib
import io
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT

import evaluate
import reproduce
import run

PAGE = (ROOT / "docs" / "results.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
CLAIMS = "## The claims" + PAGE.partition("## The claims")[2].partition("\n## ")[0]


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


@pytest.mark.parametrize("folder", [path.name for path in ROOT.glob("results/*-cpu*")])
def test_committed_results_are_drawn_as_they_were(folder, tmp_path):
    """Results that only the version that made them can read."""
    committed, results = ROOT / "results" / folder, tmp_path / folder
    shutil.copytree(committed, results, ignore=shutil.ignore_patterns("*.md", "*.png"))
    name, scale = folder.split("-cpu")
    done = {path.stem for path in results.glob("*.json")}
    done &= {p.name for p in reproduce.points_of(name, f"cpu{scale}", {}, done)}
    reproduce.main([name, "--scale", f"cpu{scale}", "--points", *done, "--out", str(tmp_path)])
    assert (results / "table.md").read_text("utf-8") == (committed / "table.md").read_text("utf-8")
    assert (results / "figure.png").stat().st_size > 5000


def test_every_row_of_a_table_is_a_row_of_results(known):
    """A table that was typed, or copied before the last run; rows of claims join several."""
    unknown = [row for row in rows_of(PAGE.replace(CLAIMS, ""))
               if not any(decimals(row) <= numbers for numbers in known)]
    assert unknown == []


def test_every_number_in_the_text_is_one_of_results(known):
    """Prose with a number that nobody can look up; the papers' own are in the second column of the claims."""
    ours = re.sub(r"(?m)^(\|[^|]*)\|[^|]*\|", r"\1|", CLAIMS)
    of_readme = README[README.index("## Results"):README.index("## What it does not do")]
    said = set().union(*map(decimals, (ours, PAGE.replace(CLAIMS, ""), of_readme)))
    assert sorted(said - set().union(*known)) == []


def test_tenths_of_texts():
    """A tenth of the padded length; an empty first or last tenth; an order by name that is not by place."""
    mask = np.arange(30) < np.array([[20], [30], [3]])
    tenths = evaluate.tenths_of(mask)
    for row, length in zip(tenths, (20, 30), strict=False):
        assert row[:length].tolist() == np.repeat(np.unique(row[:length]), length // 10).tolist()
    assert tenths[1, 0] == "tenth 01" and tenths[1, 29] == "tenth 10"
    assert tenths[2, :3].tolist() == ["tenth 02", "tenth 06", "tenth 09"]       # the same from both ends


def translated(rule, val, test, exit):
    rows = {"val": val, "test": test}
    return {split: [{"rule": rule, "bleu": bleu, "exit": exit, "flops_of": "x", "signature": "y"}]
            for split, bleu in rows.items()}


def test_the_frontier_is_chosen_on_validation():
    """The best of the test set; an exit that loses more than 0.1; the effort of another rule."""
    found = {"aligned": translated("full", 30.0, 29.0, 6.0),
             "geometric-lambda0.1": translated("learned:0.5", 29.95, 20.0, 2.0),
             "geometric-lambda0.3": translated("learned:0.5", 29.89, 40.0, 1.0),
             "geometric-lambda0.9": translated("learned:0.5", 30.5, 40.0, 3.0),
             "binary-lambda0.1": translated("learned:0.5", 10.0, 50.0, 1.0),
             "binary-lambda0.2": translated("learned:0.5", 20.0, 10.0, 2.0)}
    found = {name: {"evaluation": {"options": {"beam": 5}, "translated": rows, "forced": []}}
             for name, rows in found.items()}
    rows = {r["line"]: r for r in reproduce.ROWS["frontier"](found)}
    assert {line: (r["model"], r["bleu"], r["tried"]) for line, r in rows.items()} == {
        "aligned": ("aligned", 29.0, 1), "geometric": ("geometric-lambda0.1", 20.0, 3),
        "binary": ("binary-lambda0.2", 10.0, 2)}
    at = reproduce.ROWS["by_exit"](found)[0]["at"]
    assert [at[n] for n in ("random", *range(1, 7))] == [*[""] * 6, "30.00"]


def test_a_cell_of_a_grid_has_all_seeds():
    """Seeds that overwrite each other, cells in another row, an arm that is not measured yet as an error."""
    runs = ("4 x 8", "dense", 2.5), ("8 x 8", "dense", 3.0), ("4 x 8", "dense", 2.25), ("8 x 8", "mod", 2.0)
    rows = [dict(zip(("shape", "line", "score"), measured, strict=True)) for measured in runs]
    shallow, deep = reproduce.pivot(rows, "shape", "line", "{score:.3f}")
    assert shallow == {"shape": "4 x 8", "at": {"dense": "2.500 2.250"}} and shallow["at"]["mod"] == ""
    assert deep == {"shape": "8 x 8", "at": {"dense": "3.000", "mod": "2.000"}}


def test_seeds_of_the_best_shape_and_of_those_asked_for():
    """A seed of a shape that nobody chose, with the seed of another; a start that had another seed."""
    worse, done = ({"metrics": [{"loss": {"top_k": [3.0], "causal": [loss]}}]} for loss in (3.0, 2.0))
    for found, asked, more in (({}, (), set()), ({}, ["mod-6x64-seed2"], {"mod-6x64-seed2"})):
        points = {p.name: p for p in reproduce.points_of("mod-isoflop", "cpu", found, asked)}
        assert {name for name in points if "seed" in name} == more
        assert all(points[name].train.endswith("--seed 1002") for name in more)
    shapes = reproduce.SCALES["cpu"]["shapes"].split()
    found = {f"mod-25-{shape}": done if shape == "4x96" else worse for shape in shapes}
    names = {p.name for p in reproduce.points_of("mod-isoflop", "cpu", found)}
    assert {name for name in names if "seed" in name} == {"mod-25-4x96-seed1", "mod-25-4x96-seed2"}
    found["mod-25-4x96-seed1"] = {"metrics": [{"loss": {"top_k": [3.0], "causal": [9.0]}}]}     # now behind
    names = {p.name for p in reproduce.points_of("mod-isoflop", "cpu", found)}
    assert "mod-25-4x96-seed1" not in names and len([name for name in names if "seed" in name]) == 2
    found = {"one": done, "exits": done, "learned": done}
    points = {p.name: p for p in reproduce.points_of("hops", "cpu", found)}
    assert points["learned-seed2"].start == "exits-seed2" and points["learned"].start == "exits"
    assert points["one-seed1"].train.endswith("--seed 1001") and not points["one-seed1"].start
    again = {p.name: p for p in reproduce.points_of("mode", "cpu", {"dense": done})}["dense-seed1"]
    assert again.start == "../mod-isoflop-cpu/dense-8x64-seed1" and not again.train


def test_the_run_of_another_experiment(tmp_path):
    """A point that begins with the weights of another experiment, before its own folder is there."""
    (tmp_path / "one-cpu" / "a" / "001").mkdir(parents=True)
    (tmp_path / "one-cpu" / "a" / "001" / "ckpt.pt").touch()
    assert reproduce.run_of(tmp_path / "two-cpu" / "../one-cpu/a").name == "001"
    with pytest.raises(reproduce.UserError, match="make that point first"):
        reproduce.run_of(tmp_path / "two-cpu" / "../one-cpu/b")


def test_a_point_that_another_experiment_has_measured(tmp_path):
    """A run that must be at hand for what its JSON has; a missing JSON that nobody names."""
    point = reproduce.Point("one", "", "", "../dat-table1-cpu/aligned")
    taken = reproduce.measured(point, ROOT / "results" / "not-there", None)
    known = run.read_json(ROOT / "results" / "dat-table1-cpu" / "aligned.json")
    assert {key for key in known if known[key] != taken[key]} == {"point", "train", "start"}
    assert (taken["point"], taken["train"], taken["start"]) == ("one", "", point.start)
    with pytest.raises(reproduce.UserError, match="aligned.json"):
        reproduce.measured(point, tmp_path / "dat-weights-cpu", None)


def test_every_link_to_a_section_leads_to_one():
    """A section that got another name; the links to files are in test_project.py."""
    dead = []
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("lessons/*.md")):
        for file, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", page.read_text("utf-8")):
            target = (page.parent / file if file else page).read_text("utf-8")
            heads = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
                     for head in re.findall(r"^#+ (.*)$", target, re.MULTILINE)]
            dead += [f"{page.name}: {file}#{anchor}"] if anchor not in heads else []
    assert dead == []
