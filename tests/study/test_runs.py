"""A row's numbers are made once, known by what made them, and become tables with intervals."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refine_control.errors import InvalidInputError
from refine_control.metrics.distances import SetScore
from refine_control.study import reproduce as reproducing
from refine_control.study import row_tables, runs
from refine_control.study.materials import Comparison
from refine_control.study.plan import TARGETS, anchor_row, measured_rows, read_budget, read_rows, select_rows
from refine_control.study.reproduce import plan, reproduce
from refine_control.study.row_results import RowFacts, RowResult, read_pictures, read_row, save_pictures, write_row
from refine_control.study.row_tables import gap_table, numerics_note
from refine_control.study.row_tables import row_tables as make_tables
from refine_control.study.runs import finished, make_sampler, row_mark
from refine_control.study.summary import rows_json, summarise_rows

ROWS = read_rows()
TINY = {"labeled": 4, "unlabeled": 4, "test": 3, "alike": 2, "steps": 2, "batch_size": 2, "num_inference_steps": 1}
BUDGET = read_budget("demo").model_copy(update={**TINY, "train_seeds": [0]})
HERE = Comparison(BUDGET, Path("a"))


def quiet(label):
    return None


def refuse(*args, **kwargs):
    raise AssertionError("a finished row is made again")


def result(key: str, seed: int, values: dict[str, np.ndarray]) -> RowResult:
    sets = {"fid": SetScore(2.0, np.array([2.5, 3.5]))}
    return RowResult(key, seed, "mark", values, sets, steps=int(key != "teacher"), numerics=2)


def test_the_mark_knows_every_setting_and_nothing_else(tmp_path):
    for name, content in (("one", b"1"), ("two", b"2"), ("same", b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(content)
    row = ROWS["ours"]
    mark = row_mark(row, HERE, 0)
    assert mark == row_mark(
        row, replace(HERE, budget=BUDGET.model_copy(update={"train_seeds": [0, 1]}), out=Path("b")), 0
    )
    others = [
        row_mark(row, HERE, 1),
        row_mark(ROWS["sl"], HERE, 0),
        row_mark(row, replace(HERE, budget=BUDGET.model_copy(update={"steps": 4})), 0),
        row_mark(row, replace(HERE, budget=BUDGET.model_copy(update={"test_seed": 4})), 0),
        row_mark(row, HERE, 0, "figure2"),
        row_mark(row, replace(HERE, photos=tmp_path / "one"), 0),
        row_mark(row, replace(HERE, photos=tmp_path / "two"), 0),
    ]
    assert len({mark, *others}) == 8
    assert row_mark(row, replace(HERE, photos=tmp_path / "same"), 0) == others[5]
    assert row_mark(ROWS["teacher"], HERE, 0) == row_mark(ROWS["teacher"], HERE, 5)
    assert row_mark(ROWS["teacher"], HERE, 0) != row_mark(ROWS["teacher_diffusers"], HERE, 0)


def test_a_result_goes_there_and_back(tmp_path):
    made = result("ours", 3, {"psnr": np.array([1.25, 2.5])})
    write_row(made, tmp_path / "a" / "ours-3.json")
    read = read_row(tmp_path / "a" / "ours-3.json", "mark")
    assert read is not None
    assert read._replace(scores={}, sets={}) == made._replace(scores={}, sets={})
    assert np.array_equal(read.scores["psnr"], made.scores["psnr"])
    assert (read.sets["fid"].value, *read.sets["fid"].drawn) == (2.0, 2.5, 3.5)
    assert read_row(tmp_path / "a" / "ours-3.json", "another") is None
    assert read_row(tmp_path / "nothing.json", "mark") is None
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InvalidInputError, match="delete it"):
        read_row(tmp_path / "bad.json", "mark")


def test_a_file_of_earlier_code_is_read_and_unknown_facts_are_kept(tmp_path):
    path = tmp_path / "ours-3.json"
    write_row(result("ours", 3, {"psnr": np.array([1.25, 2.5])}), path)
    document = json.loads(path.read_text())
    assert (document["steps"], document["facts"]["steps"], document["numerics"]) == (1, 1, 2)
    del document["steps"], document["numerics"]  # as earlier code wrote it
    document["facts"] = {"steps": 320, "num_layers": 12, "machine": "x86_64", "colour": "red"}
    path.write_text(json.dumps(document))
    read = read_row(path)
    assert read is not None
    assert (read.steps, read.numerics, read.facts.num_layers, read.facts.other) == (320, None, 12, {"colour": "red"})
    write_row(read, path)
    assert json.loads(path.read_text())["facts"] == document["facts"]
    document["facts"] = {"num_layers": 12}
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidInputError, match="delete it"):
        read_row(path)


def test_the_typed_steps_decide_what_is_paired_and_facts_do_not():
    scenes = np.arange(40.0)
    facts = RowFacts(other={"steps": 7})
    teacher = result("teacher", 0, {"psnr_region": scenes + 4})._replace(facts=facts)
    found = {
        "teacher": [teacher],
        "fc": [result("fc", s, {"psnr_region": scenes}) for s in (1, 2)],
        "ours": [result("ours", s, {"psnr_region": scenes + s}) for s in (2, 3)],
    }
    summary = summarise_rows(found, "ours")
    assert summary.differences["fc", "ours"]["psnr_region"].mean == pytest.approx(-2)  # seed 2, which both have
    assert summary.differences["teacher", "ours"]["psnr_region"].mean == pytest.approx(1.5)  # every seed
    assert list(summary.gap_closed) == ["ours"]


def test_a_table_says_which_numerics_made_its_rows():
    values = {"psnr_region": np.arange(9.0)}
    found = {key: [result(key, s, values) for s in (0, 1)] for key in ("fc", "ours", "inherit")}
    found["teacher"] = [result("teacher", 0, values)._replace(numerics=None)]
    assert numerics_note(summarise_rows(found, "fc")) == []
    found["ours"][1] = found["ours"][1]._replace(numerics=1)
    found["inherit"] = [each._replace(numerics=None) for each in found["inherit"]]
    (note,) = numerics_note(summarise_rows(found, "fc"))
    assert note.startswith("Rows by numerics version: 1 and 2: ours; 2: fc; unknown: inherit.")
    tables = make_tables(summarise_rows(found, "fc"), ROWS, "fc", HERE, "Table 1")
    assert note in tables[0].notes


def test_an_unbounded_share_of_the_gap_is_named_so_with_the_reason():
    sign, scenes = np.tile([-1.0, 1.0], 20), np.arange(40.0)
    found = {
        "teacher": [result("teacher", 0, {"psnr_region": scenes + sign + 0.1, "both": scenes})],
        "fc": [result("fc", 0, {"psnr_region": scenes - sign, "both": scenes + 1})],
        "ours": [result("ours", 0, {"psnr_region": scenes, "both": scenes})],
    }
    summary = summarise_rows(found, "ours")
    assert json.loads(json.dumps(rows_json(summary, "ours")))["gap_closed"]["ours"]["psnr_region"]["low"] is None
    table = gap_table(summary, ROWS)
    assert table.rows == [[ROWS["ours"].title, "not bounded", ""]]
    assert "not statistically distinguishable from Student_fc" in table.notes[1]
    assert "mean is not above" in table.notes[2]


def test_the_command_in_a_report_is_one_for_a_shell(tmp_path):
    here = replace(HERE, out=Path("my runs"), photos=Path("it's here"), model="bundle")
    request = reproducing._Request(here, [0, 1], Path("the results") / "photos", quiet, 1)
    words = shlex.split(reproducing._command("table1", request, ["ours"], None))
    assert words[:6] == ["refine-control", "reproduce", "table1", "--scale", "mini", "--budget"]
    assert words[-4:] == ["--out", "my runs", "--results", "the results"]
    assert words[words.index("--photos") + 1] == "it's here"
    assert "--against" not in words


def test_a_row_that_lacks_what_given_networks_measure_is_made_again(tmp_path, monkeypatch):
    row, path = ROWS["ours"], tmp_path / "ours-0.json"
    measured = result("ours", 0, {"psnr": np.array([1.0])})._replace(mark=row_mark(row, HERE, 0))
    write_row(measured, path)
    looking = replace(HERE, weights=tmp_path)
    monkeypatch.setattr(runs, "not_computed", lambda folder: {"lpips": "needs A", "cmmd": "needs B"})
    assert finished(path, row, HERE, 0) is not None
    assert finished(path, row, looking, 0) is not None  # FID is there, and nothing else can be had
    monkeypatch.setattr(runs, "not_computed", lambda folder: {"cmmd": "needs B"})
    assert finished(path, row, looking, 0) is None
    assert finished(path, row, HERE, 0) is not None  # nobody asked for more
    assert finished(path, row, replace(looking, out=Path("b")), 1) is None


def test_pictures_are_shown_only_where_today_would_paint_them(tmp_path):
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    save_pictures(tmp_path / "a", images, "mark")
    shown = read_pictures(tmp_path / "a", "mark")
    assert shown is not None
    np.testing.assert_array_equal(shown, images)
    assert read_pictures(tmp_path / "a", "another") is None
    assert read_pictures(tmp_path / "b", "mark") is None
    save_pictures(tmp_path / "c", [images[0], images[1, :2]], "mark")  # of two sizes: nothing that a grid could show
    assert read_pictures(tmp_path / "c", "mark") is None


def test_tables_say_which_metric_needs_which_file(tmp_path, monkeypatch):
    monkeypatch.setattr(row_tables, "not_computed", lambda folder: {"cmmd": "CMMD not computed: needs FILE"})
    found = {
        key: [result(key, 0, {"psnr_region": np.arange(9.0), "psnr_kept": np.arange(9.0)})] for key in ("teacher", "fc")
    }
    tables = make_tables(summarise_rows(found, "teacher"), ROWS, "teacher", HERE, "Table 1", ["a bound"])
    notes = " ".join(tables[0].notes)
    assert "CMMD not computed: needs FILE" in notes
    assert "LPIPS not computed: some rows were measured without" in notes
    assert "FID not computed" not in notes  # every row has it
    assert "a bound" in notes
    assert {"PSNR kept dB", "paper's FID", "paper's CMMD"} <= set(tables[0].columns)
    assert not any("Baselines" in t.caption for t in tables)


def test_models_of_another_kind_tell_how_they_were_run():
    way = {"model": "M", "resolution": "512 x 512", "sampler": "S", "license": "L"}
    facts = RowFacts(baseline=way, denoiser_params=1234)
    values = {"psnr_region": np.arange(9.0)}
    found = {
        "teacher": [result("teacher", 0, values)],
        "sd2": [result("sd2", 0, values)._replace(facts=facts, steps=0)],
    }
    tables = make_tables(summarise_rows(found, "teacher"), ROWS, "teacher", HERE, "Table 2")
    ways = next(t for t in tables if t.caption == "Baselines")
    assert [list(r) for r in ways.rows] == [["SD2 inpainting", "M", "512 x 512", "S", "L", "1,234"]]


def test_all_seeds_stand_against_a_row_that_nobody_trains():
    scenes = np.arange(40.0)
    found = {
        "teacher": [result("teacher", 0, {"psnr_region": scenes})],
        "ours": [result("ours", s, {"psnr_region": scenes - s}) for s in range(3)],
    }
    minus = summarise_rows(found, against="teacher").differences["ours", "teacher"]
    assert minus["psnr_region"].mean == pytest.approx(-1)
    minus = summarise_rows(found, against="ours").differences["teacher", "ours"]
    assert minus["psnr_region"].mean == pytest.approx(1)


def test_a_table_of_known_numbers():
    scenes = np.arange(40.0)
    make = {"teacher": 4.0, "ours": 3.0, "fc": 0.0}
    found = {
        key: [
            result(key, s, {"psnr_region": scenes + up, "both": scenes + up})
            for s in range(1 if key == "teacher" else 3)
        ]
        for key, up in make.items()
    }
    summary = summarise_rows(found, against="ours")
    assert summary.models["ours"].mean["psnr_region"].mean == pytest.approx(scenes.mean() + 3)
    minus = summary.differences["fc", "ours"]["both"]
    assert (*minus, minus.excludes_zero) == pytest.approx((-3, -3, -3, True))
    assert summary.gap_closed["ours"]["psnr_region"].mean == pytest.approx(0.75)
    assert "teacher" not in summary.gap_closed
    assert summary.minus("ours", "ours") is None
    turned = summarise_rows(found, against="fc")
    assert turned.differences["ours", "fc"]["both"].mean == pytest.approx(3)
    assert turned.minus("fc", "fc") is None
    written = json.loads(json.dumps(rows_json(summary, "ours")))
    assert written["rows"]["fc"]["minus"]["both"] == {"mean": -3, "low": -3, "high": -3, "excludes_zero": True}
    assert written["rows"]["fc"]["teacher_minus"]["both"]["mean"] == 4
    assert "minus" not in written["rows"]["ours"]
    assert "teacher_minus" not in written["rows"]["teacher"]
    assert written["gap_closed"]["ours"]["both"]["mean"] == 0.75


def test_a_table_holds_its_rows_and_what_they_are_anchor_row():
    assert list(select_rows(TARGETS["table1"])) == [
        "teacher",
        "teacher_diffusers",
        "fc",
        "fc_plain",
        "fc_random",
        "ours",
        "inherit",
        "balanced",
        "fc_inherit",
    ]
    assert {"wo_cf", "wo_mask", "one_stage", "sl", "ssd", "fc", "teacher", "inherit"} <= set(
        select_rows(TARGETS["table3"])
    )
    assert list(select_rows(TARGETS["table3"], ["wo_cf"])) == ["teacher", "fc", "inherit", "wo_cf"]
    assert set(measured_rows("alike", TARGETS["figure2"])) == {"teacher", "fc", "ours", "inherit", "balanced"}
    shown = {"teacher", "fc", "ours", "inherit", "balanced", "fc_inherit", "edge_shipped@1"}
    assert set(measured_rows("figure3", TARGETS["figure3"])) == shown
    for figure, target in (("figure3", "table1"), ("figure3", "figure2"), ("alike", "figure3"), ("figure3", "all")):
        assert not measured_rows(figure, TARGETS[target])
    assert list(select_rows(TARGETS["table1"], ["teacher_diffusers"])) == ["teacher", "teacher_diffusers"]
    assert anchor_row(TARGETS["table1"], ["teacher_diffusers"]) == "teacher"
    scarce = select_rows(TARGETS["scarce"])
    assert anchor_row(TARGETS["scarce"]) == "labeled_1" in scarce
    assert {row.data.labeled for key, row in scarce.items() if key not in ("teacher", "fc")} == {0.01}
    assert anchor_row(TARGETS["scarce"], against="fc") == "fc"
    assert anchor_row(TARGETS["table3"]) == "inherit"
    assert anchor_row(TARGETS["parts"]) == "balanced" in select_rows(TARGETS["parts"])
    with pytest.raises(InvalidInputError, match="no rows of scarce at the scale sd3"):
        select_rows(TARGETS["scarce"], scale="sd3")
    with pytest.raises(InvalidInputError, match="there is no row our"):
        select_rows(TARGETS["table1"], ["our"])


def test_the_spread_is_that_of_the_seeds_means():
    scenes = np.arange(40.0)
    found = {"ours": [result("ours", s, {"psnr_region": scenes + 3 * s}) for s in range(3)]}
    found["teacher"] = [result("teacher", 0, {"psnr_region": scenes})]
    models = summarise_rows(found, against="ours").models
    assert models["ours"].spread == {"psnr_region": pytest.approx(3.0)}
    assert models["teacher"].spread == {}


def test_a_budget_says_how_everything_is_sampled():
    sampler = make_sampler(read_budget("paper", scale="sd3"), ROWS["teacher_diffusers"])
    assert (sampler.num_inference_steps, sampler.guidance_scale, sampler.conditioning_scale) == (28, 7.0, 0.95)
    assert sampler.injection == "diffusers"
    assert make_sampler(BUDGET).conditioning_scale == 1.0


def test_where_the_teacher_is_no_better_there_is_no_gap_to_close():
    scenes = np.arange(40.0)
    up = {"teacher": 0.0, "ours": 3.0, "fc": 4.0}
    found = {key: [result(key, 0, {"psnr_region": scenes + up[key]})] for key in up}
    assert summarise_rows(found, "ours").gap_closed == {"ours": {}}


def test_rows_are_paired_by_the_seeds_that_both_have():
    base = np.arange(10.0)
    ours = [result("ours", s, {"psnr": base + 10 * s}) for s in range(3)]
    found = {
        "ours": ours,
        "layers_8": [result("layers_8", 2, {"psnr": base + 19})],
        "teacher": [result("teacher", 0, {"psnr": base + 12})],
    }
    differences = summarise_rows(found, against="ours").differences
    assert differences["layers_8", "ours"]["psnr"].mean == pytest.approx(-1)
    assert differences["teacher", "ours"]["psnr"].mean == pytest.approx(2)
    assert differences["layers_8", "ours"]["fid"].mean == 0
    turned = summarise_rows(found, against="layers_8").differences
    assert turned["ours", "layers_8"]["psnr"].mean == pytest.approx(1)


@pytest.mark.slow
def test_what_is_finished_is_not_made_again(tmp_path, monkeypatch):
    here, results = Comparison(BUDGET, tmp_path / "runs"), tmp_path / "results"
    asked = {"rows": ["wo_cf"], "results": results, "bar": lambda label: None}
    assert set(plan("table3", here, [0], ["wo_cf"], results)["rows"].values()) == {"to do"}
    made = reproduce("table3", here, **asked)
    files = {p.name: p.read_bytes() for p in results.iterdir()}
    assert set(files) == {"teacher-0.json", "fc-0.json", "inherit-0.json", "wo_cf-0.json"}
    assert set(plan("table3", here, [0], ["wo_cf"], results)["rows"].values()) == {"finished"}
    assert {"tables.md", "tables.tex", "tables.json", "report.html", "figure3.png"} <= {
        p.name for p in (tmp_path / "runs").iterdir()
    }
    monkeypatch.setattr(runs, "_run", refuse)
    again = reproduce("table3", here, **asked)
    assert json.dumps(again.summary) == json.dumps(made.summary)
    assert "Student_ours" in again.text
    elsewhere = reproduce("table3", replace(here, out=tmp_path / "fresh"), **asked)
    assert elsewhere.text == made.text
    monkeypatch.undo()
    for path in results.iterdir():
        path.unlink()
    reproduce("table3", here, **asked, workers=2)
    for name, data in files.items():  # other counts of threads may round otherwise
        one, two = json.loads(data), json.loads((results / name).read_bytes())
        assert one["mark"] == two["mark"]
        assert {m: len(v) for m, v in one["scores"].items()} == {m: len(v) for m, v in two["scores"].items()}
