"""Figure 2: the hole became what was asked for, another object of the picture, or neither."""

import json
from dataclasses import replace

import numpy as np
import pytest

from refine_control.errors import InvalidInputError
from refine_control.miniature.obedience import Reading, load_classifier, read_regions
from refine_control.miniature.vocabulary import COLOURS, SHAPES
from refine_control.models.card import BUNDLE
from refine_control.study import runs
from refine_control.study.alike import alike_grid, alike_photos, alike_scores, alike_table, summarise_alike
from refine_control.study.materials import Comparison
from refine_control.study.plan import read_budget, read_rows
from refine_control.study.reproduce import plan, reproduce
from refine_control.study.row_results import RowResult
from refine_control.study.tables import to_markdown

TINY = {"labeled": 4, "unlabeled": 4, "test": 3, "alike": 3, "steps": 2, "batch_size": 2, "num_inference_steps": 1}
BUDGET = read_budget("demo").model_copy(update={**TINY, "train_seeds": [0]})
PHOTOS = alike_photos(BUDGET.model_copy(update={"alike": 40}))


def test_every_scene_has_another_object_that_is_alike_and_none_that_is_the_same():
    for number, photo in enumerate(PHOTOS):
        expected = (photo.meta["colour"], photo.meta["shape"])
        others = [tuple(o) for o in photo.meta["others"]]
        part = 1 if number < 40 else 0  # first other colours of the shape, then other shapes of the colour
        assert expected not in others
        assert any(o[part] == expected[part] for o in others)
        named = photo.global_prompt
        assert all(f"{list(COLOURS)[c]} {list(SHAPES)[s]}" in named for c, s in [expected, *others])
    assert len({p.image.tobytes() for p in PHOTOS}) == 80


def test_what_the_oracle_reads_becomes_obedience_and_interference():
    photos = PHOTOS[:3]
    other = photos[1].meta["others"][0]
    nothing = next(
        (c, s)
        for c in range(len(COLOURS))
        for s in range(len(SHAPES))
        if [c, s] not in [*photos[2].meta["others"], [photos[2].meta["colour"], photos[2].meta["shape"]]]
    )
    seen = [(photos[0].meta["colour"], photos[0].meta["shape"]), other, nothing]
    scores = alike_scores(Reading(*(np.array(part) for part in zip(*seen, strict=True))), photos)
    np.testing.assert_array_equal(scores["both"], [100, 0, 0])
    np.testing.assert_array_equal(scores["interference"], [0, 100, 0])


def test_the_pictures_themselves_obey_and_do_not_interfere():
    images, masks = np.stack([p.image for p in PHOTOS]), np.stack([p.mask for p in PHOTOS])
    scores = alike_scores(read_regions(load_classifier(BUNDLE), images, masks), PHOTOS)
    assert scores["both"].mean() > 95
    assert scores["interference"].mean() < 5


def refuse(*args, **kwargs):
    raise AssertionError("a finished row is made again")


def result(key: str, local: float, others: float) -> RowResult:
    """By global prompts ten points less obedience and ten more interference."""
    noise = np.tile([-5.0, 5.0], 10)
    values = {"local both": local, "local interference": others, "global both": local - 10}
    scores = {name: value + noise for name, value in values.items()}
    return RowResult(key, 0, "mark", {**scores, "global interference": others + 10 + noise}, {})


def test_a_table_of_known_numbers():
    results = {"teacher": [result("teacher", 90, 5)], "ours": [result("ours", 70, 10), result("ours", 80, 10)]}
    summary = summarise_alike(results)
    assert summary["ours"].mean["local both"].mean == pytest.approx(75)
    assert summary["ours"].global_minus_local["both"].mean == pytest.approx(-10)
    assert summary["teacher"].global_minus_local["interference"].excludes_zero
    text = to_markdown(alike_table(summary, read_rows(), BUDGET))
    assert f"| {read_rows()['teacher'].title} | 1 | 90.0 [" in text


@pytest.mark.slow
def test_figure_2_is_made_once_from_the_rows(tmp_path, monkeypatch):
    here, results = Comparison(BUDGET, tmp_path / "runs"), tmp_path / "results"
    todo = plan("figure2", here, [0], ["ours"], results)["rows"]
    assert todo == dict.fromkeys(["alike/teacher-0", "alike/fc-0", "alike/ours-0", "alike/inherit-0"], "to do")
    made = reproduce("figure2", here, rows=["ours"], results=results, bar=lambda label: None)
    assert set(plan("figure2", here, [0], ["ours"], results)["rows"].values()) == {"finished"}
    written = json.loads((tmp_path / "runs" / "tables.json").read_text())["figure2"]["rows"]
    assert set(written["ours"]["mean"]) == {f"{k} {m}" for k in ("local", "global") for m in ("both", "interference")}
    assert "figure2.png" in {p.name for p in (tmp_path / "runs").iterdir()}
    assert "Figure 2" in (tmp_path / "runs" / "report.html").read_text()
    monkeypatch.setattr(runs, "_run", refuse)
    again = reproduce("figure2", here, rows=["ours"], results=results, bar=lambda label: None)
    assert again.text == made.text
    # pictures of another budget in the same folder are not shown as this one's
    rows = {key: row for key, row in read_rows().items() if key in ("teacher", "inherit")}
    grid = alike_grid(rows, here, 0)["figure2.png"]
    assert list(grid.columns[2:]) == [f"{key}, {kind}" for key in rows for kind in ("local", "global")]
    assert len(grid.rows) == 6
    assert alike_grid(rows, replace(here, budget=BUDGET.model_copy(update={"alike": 2})), 0) == {}


def test_photographs_have_no_figure_2(tmp_path):
    here = Comparison(BUDGET, tmp_path, model="bundle", photos=tmp_path)
    with pytest.raises(InvalidInputError, match="the oracle, which reads rendered scenes alone"):
        reproduce("figure2", here, results=tmp_path, bar=lambda label: None)
