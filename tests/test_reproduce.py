"""reproduce.py: point by point, resumable, drawn from the JSON files alone."""
import shutil

import pytest
from conftest import TINY
from test_scripts import refused

import cost
import evaluate
import reproduce
import run
import train
from options import read_options


@pytest.fixture
def main(tmp_path, monkeypatch):
    """reproduce.main with folders here, in this process; main.calls: the scripts that it has run."""
    def main(words):
        reproduce.main([*words, "--out", str(tmp_path), "--runs", str(tmp_path / "runs"), "--device", "cpu"])

    def script(name, *words):
        main.calls.append(f"{name} --resume" if "--resume" in words else name)
        {"train.py": train.main, "evaluate.py": evaluate.main}[name](list(map(str, words)))

    main.calls, main.script = [], reproduce.script
    monkeypatch.setattr(reproduce, "script", script)
    monkeypatch.setattr(train, "finish", lambda folder, o: evaluate.main(["--run", str(folder)]))
    return main


def test_an_experiment_goes_on_point_by_point(main, pairs, tmp_path, monkeypatch, capsys):
    """Points that run twice, an interrupted point that begins again, rows or files of something else."""
    tiny = " ".join(TINY).replace("--batch_size 4", "").replace("--device cpu", "--enc_layer 1 --routed none")
    tiny += f" --data {pairs} --translate aa-bb --enc_head 2 --enc_embd 16 --batch_tokens 128"
    points = [{"name": "tied", "train": f"{tiny} --stop_at 5", "evaluate": "--bleu {test} --beam 2"},
              {"name": "apart", "train": f"{tiny} --classifier separate", "evaluate": "--bleu test --beam 2"},
              {"name": "one", "train": "", "start": "tied",
               "evaluate": "--bleu test --beam 2 --rules fixed:1 --exited_kv compute"}]
    monkeypatch.setitem(reproduce.EXPERIMENTS["dat-table1"], "points", points)
    monkeypatch.setitem(reproduce.SCALES["cpu"], "test", "test")
    folder = tmp_path / "dat-table1-cpu"
    assert "the same command goes on" in refused(capsys, main, "dat-table1", "--points", "tied")
    main(["dat-table1", "--points", "tied"])
    assert [p.name for p in folder.glob("*.json")] == ["tied.json"]
    main(["dat-table1"])
    main(["dat-table1"])
    assert " ".join(main.calls) == "train.py train.py --resume evaluate.py train.py evaluate.py evaluate.py"
    found, table = run.read_json(folder / "apart.json"), (folder / "table.md").read_text("utf-8")
    bleu = found["evaluation"]["translated"]["test"][3]["bleu"]
    assert found["options"]["classifier"] == "separate" and found["training_seconds"] > 0 and found["torch"]
    assert f"| apart | full | {bleu:.2f} | 4.00 |" in table
    assert table.count("--classifier separate") == table.count("| one | fixed:1 |") == 1  # no other rules
    assert "beam 2, FLOPs of the best hypothesis" in table
    assert "there are tied, apart" in refused(capsys, main, "dat-table1", "--points", "x")
    shutil.rmtree(tmp_path / "runs")
    (folder / "one.json").unlink()
    assert "tied holds no run: make that point first" in refused(capsys, main, "dat-table1")
    with pytest.raises(reproduce.UserError, match="train.py failed"):
        main.script("train.py", "--steps", 0)
    (folder / "bench.json").write_text("{}", "utf-8")
    assert "bench.json" in refused(capsys, main, "dat-table1")


@pytest.mark.slow
def test_equal_flops_and_more_seeds_for_the_best(main, dataset, tmp_path, monkeypatch):
    tiny = {"text": f"--data {dataset} --block_size 32 --batch_size 4", "head_size": 8, "vocab_size": 300}
    monkeypatch.setitem(reproduce.SCALES, "cpu", tiny | {"flops": 3e8})
    points = [{"name": name, "train": words, "shapes": "2x16 4x24 6x24", "seeds": 3}
              for name, words in (("dense", "--routed none"), ("mod", ""))]
    monkeypatch.setitem(reproduce.EXPERIMENTS["mod-isoflop"], "points", points)
    main(["mod-isoflop"])
    found = {p.stem: run.read_json(p) for p in tmp_path.glob("mod-isoflop-cpu/*.json")}
    for arm, rule in ("dense", "top_k"), ("mod", "causal"):
        loss = {n: p["metrics"][-1]["loss"][rule][-1] for n, p in found.items() if n.startswith(arm)}
        seeds = {shape: [v for n, v in loss.items() if shape in n] for shape in ("2x16", "4x24", "6x24")}
        best = min(seeds, key=lambda shape: sum(seeds[shape]) / len(seeds[shape]))
        assert len(seeds[best]) == 3 and found[f"{arm}-{best}-seed2"]["options"]["seed"] == 1002
        assert all(min(v) <= max(seeds[best]) for v in seeds.values() if len(v) > 1)    # was the best once
    for point in found.values():
        o = read_options(point["train"].split()[1:], run.stored_options)
        assert o.steps * 128 / 32 * cost.training(o.model, 300, 32) == pytest.approx(3e8, rel=0.05)


@pytest.mark.parametrize("scale", reproduce.SCALES)
def test_every_argument_of_the_experiments_is_known(scale):
    """A point that fails after hours, since an option has another name now."""
    for name in reproduce.EXPERIMENTS:
        for point in reproduce.points_of(name, scale, {}):
            reproduce.parse(point.evaluate.split(), evaluate.Options)
            if "--objective exit_predictor" in point.train:     # needs a run to begin with
                reproduce.parse(point.train[point.train.index("--"):].split())
            elif point.train:
                read_options(point.train.split(), run.stored_options)
