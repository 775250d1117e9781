"""Plots of training logs hold what the logs hold, and nothing of runs that left none."""

import json

import numpy as np

from refine_control.study.curves import layer_curves, seed_curves, term_curves


def log(folder, **terms):
    folder.mkdir()
    lines = [{"step": n, **{name: value / n for name, value in terms.items()}} for n in (1, 2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_every_term_has_a_line_for_each_run_that_has_it(tmp_path):
    runs = {
        "fc": log(tmp_path / "fc", loss=4, task_loss=1, output_loss=0, feature_loss=0),
        "ours": log(tmp_path / "ours", loss=4, task_loss=2, output_loss=3, feature_loss=5),
        "elsewhere": tmp_path / "none",
    }
    task, output, feature = term_curves(runs)
    assert set(task.series) == {"fc", "ours"}
    assert set(output.series) == set(feature.series) == {"ours"}
    assert np.allclose(task.series["ours"][1], [2, 1, 0.5])
    assert task.series["fc"][0].tolist() == [1, 2, 4]


def test_layers_are_those_of_one_run(tmp_path):
    terms = {"loss": 1, "feature_losses/00": 1, "feature_losses/01": 2}
    (curve,) = layer_curves("ours", log(tmp_path / "ours", **terms))
    assert list(curve.series) == ["00", "01"]
    assert not layer_curves("fc", log(tmp_path / "fc", loss=1))
    assert not layer_curves("none", tmp_path / "none")


def test_seeds_are_shown_where_there_are_several(tmp_path):
    runs = {f"seed {n}": log(tmp_path / str(n), loss=n + 1) for n in range(2)}
    (curve,) = seed_curves("Loss", runs)
    assert [line[1][0] for line in curve.series.values()] == [1, 2]
    assert not seed_curves("Loss", {"seed 0": runs["seed 0"], "seed 9": tmp_path / "9"})
