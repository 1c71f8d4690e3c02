"""reproduce.py: point by point, resumable, drawn from JSON files of this and of the older version."""
import json
import math
import shutil

import pytest
from conftest import ROOT, TINY
from test_scripts import refused

import cost
import evaluate
import reproduce
import run
import train as script
from options import read_options

SMALL = [w for n, w in enumerate(TINY) if not {"--batch_size", "--device"} & {*TINY[max(0, n - 1):n + 1]}]
SMALL += ["--translate", "aa-bb", "--enc_layer", "1", "--enc_head", "2", "--enc_embd", "16",
          "--routed", "none", "--batch_tokens", "128"]


def test_an_experiment_goes_on_point_by_point(pairs, tmp_path, monkeypatch, capsys):
    """Points that run twice, an interrupted point that begins again, a table of something else."""
    points = [reproduce.Point(name, " ".join(["--data", str(pairs), *SMALL, *more]), "--bleu test --beam 2")
              for name, more in (("tied", []), ("separate", ["--classifier", "separate"]))]
    computed = "--bleu test --beam 2 --rules fixed:1 --exited_kv compute"
    points.append(reproduce.Point("computed", "", computed, "tied"))
    monkeypatch.setitem(reproduce.EXPERIMENTS, "dat", (
        lambda scale: (str(pairs), "", []), lambda scale, found: points, *reproduce.EXPERIMENTS["dat"][2:]))
    words = ["dat", "--out", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    honest, calls = reproduce.script, []

    def stopped(name, *more):
        calls.append(name)
        return honest(name, *more, *(["--stop_at", 5] if name == "train.py" else []))
    monkeypatch.setattr(reproduce, "script", stopped)
    assert "the same command goes on" in refused(capsys, reproduce.main, *words, "--points", "tied")
    monkeypatch.setattr(reproduce, "script", lambda *w: calls.append(w[0]) or honest(*w))
    reproduce.main([*words, "--points", "tied"])
    folder = tmp_path / "results" / "dat-cpu"
    assert [p.name for p in folder.glob("*.json")] == ["tied.json"]
    assert "--resume" in capsys.readouterr().out and calls == ["train.py", "train.py", "evaluate.py"]
    reproduce.main(words)
    assert calls[3:] == ["train.py", "evaluate.py", "evaluate.py"]
    assert "3 points, 2 to do" in capsys.readouterr().out
    table = (folder / "table.md").read_text("utf-8")
    (folder / "table.md").unlink()
    reproduce.main(words)
    assert len(calls) == 6 and (folder / "table.md").read_text("utf-8") == table
    found = json.loads((folder / "separate.json").read_text("utf-8"))
    assert found["options"]["classifier"] == "separate" and found["training_seconds"] > 0 and found["torch"]
    bleu = found["evaluation"]["translated"]["test"][3]["bleu"]
    assert f"| separate | full | {bleu:.2f} | 4.00 | 4.00 |" in table
    assert table.count("--classifier separate") == 1 and table.count("| computed | fixed:1 |") == 1
    assert table.count("| computed |") == 1         # and no row of the run's earlier evaluation
    assert (folder / "figure.png").stat().st_size > 5000 and len(list(folder.glob("tied.test.*.txt"))) == 5
    assert "there are tied, separate" in refused(capsys, reproduce.main, *words, "--points", "x")


def test_equal_flops_and_more_seeds_for_the_best(dataset, tmp_path, monkeypatch, capsys):
    sizes = ((2, 1, 8), (2, 2, 16), (4, 2, 24), (6, 2, 24))
    monkeypatch.setitem(reproduce.SIZES, "cpu", (3e8, 300, 32, 128, sizes))
    monkeypatch.setattr(reproduce, "ARMS", {"dense": "--routed none", "mod": ""})
    monkeypatch.setattr(reproduce, "isoflop_data", lambda scale: (str(dataset), "", []))
    monkeypatch.setitem(reproduce.EXPERIMENTS, "mod-isoflop", (
        reproduce.isoflop_data, *reproduce.EXPERIMENTS["mod-isoflop"][1:]))

    def here(name, *words):
        script.main(list(map(str, words)))
        return 1.0

    monkeypatch.setattr(reproduce, "script", here)
    monkeypatch.setattr(script, "finish", lambda folder, options: evaluate.main(["--run", str(folder)]))
    reproduce.main(["mod-isoflop", "--out", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"),
                    "--device", "cpu"])
    results = tmp_path / "results" / "mod-isoflop-cpu"
    found = {p.stem: json.loads(p.read_text("utf-8")) for p in results.glob("*.json")}
    assert len(found) == 3 + 2 + 4 and (results / "figure.png").stat().st_size > 5000
    for arm in ("dense", "mod"):
        best = min((n for n in found if n.startswith(arm) and "seed" not in n),
                   key=lambda n: reproduce.held_out(found[n]))
        assert {f"{best}-seed1", f"{best}-seed2"} == {n for n in found if n.startswith(arm) and "seed" in n}
        assert found[f"{best}-seed2"]["options"]["seed"] == 1002
    for point in found.values():
        model = read_options(point["train"].split()[1:], run.stored_options).model
        spent = point["options"]["steps"] * 128 / 32 * cost.training(model, 300, 32)
        assert abs(spent / 3e8 - 1) < 0.05
    table = (results / "table.md").read_text("utf-8")
    assert table.count("| dense-") - 1 == table.count("| mod-") == 4 and "| 3 |" in table
    capsys.readouterr()


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_committed_results_are_drawn_as_they_were(name, tmp_path):
    """Results that only the version that made them can read."""
    results = shutil.copytree(ROOT / "results" / f"{name}-cpu", tmp_path / "results")
    (results / "figure.png").unlink()
    _, found = reproduce.read_points(name, "cpu", results)
    reproduce.draw(name, results, found)
    new, old = ((folder / "table.md").read_text("utf-8").splitlines()
                for folder in (results, ROOT / "results" / f"{name}-cpu"))
    rows = [line for line in new if line.startswith("| ")]
    assert rows == [line for line in old if line.startswith("| ")] and len(rows) > len(found)
    assert (results / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
def test_every_argument_of_the_experiments_is_known(scale):
    """A point that fails after hours, since an option has another name now."""
    for _, points, *_ in reproduce.EXPERIMENTS.values():
        for point in points(scale, {}):
            reproduce.parse(point.evaluate.split(), evaluate.Options)
            train = point.train.split()
            if "exit_predictor" in train:       # needs a run to begin with
                reproduce.parse([word for word in train if word != "multi30k"])
            elif train:
                read_options(train, run.stored_options)


def test_parabola():
    """The lowest point of three on a parabola in log N; a line has none."""
    rows = [{"parameters": n, "held_out": 3 + (math.log(n) - math.log(1e6))**2} for n in (3e5, 1e6, 5e6)]
    assert reproduce.parabola(rows)[0] == pytest.approx(1e6)
    rows = [{"parameters": n, "held_out": -(math.log(n) - 14)**2} for n in (3e5, 1e6, 5e6)]
    assert reproduce.parabola(rows)[0] is None and reproduce.parabola(rows[:2]) == (None, None)
    rows = [{"parameters": n, "held_out": (math.log(n) - 14)**2} for n in (3e3, 1e4, 5e4)]
    assert reproduce.parabola(rows)[0] is None              # far outside what was measured
