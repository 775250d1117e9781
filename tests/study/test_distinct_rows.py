"""Two rows of the paper's tables that end with equal weights would measure one thing twice."""

from dataclasses import replace

import pytest

from refine_control.storage import read_manifest, sha256_file
from refine_control.study.materials import Comparison, prepare_data
from refine_control.study.plan import read_budget, read_rows, row_recipes
from refine_control.study.runs import train_row
from refine_control.training import run

TINY = {"labeled": 4, "unlabeled": 4, "test": 2, "alike": 1, "steps": 2, "batch_size": 2, "num_inference_steps": 1}


def quiet(label):
    return None


@pytest.mark.slow
def test_no_two_rows_of_tables_1_and_3_end_with_equal_weights(tmp_path, monkeypatch):
    budget = read_budget("demo").model_copy(update={**TINY, "train_seeds": [0]})
    here = Comparison(budget, tmp_path)
    rows = {key: row for key, row in read_rows().items() if row.stages and {1, 3} & set(row.tables)}
    prepare_data(here, rows.values(), quiet)
    made = {}
    for key, row in rows.items():
        student = train_row(key, row, here, 0, quiet).student
        assert student is not None
        made[key] = sha256_file(next(student.glob("*.safetensors")))
    assert len(made) >= 12
    assert len(set(made.values())) == len(made), made
    # what ran before is not run again, whatever row it was for and wherever it lies
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    monkeypatch.setattr(run, "fit", lambda *given, **how: pytest.fail("an equal stage is trained again"))
    again = train_row("again", rows["inherit"], replace(here, out=moved), 0, quiet)
    assert again.student == moved / "inherit-0" / "inherit_stage2" / "student"
    assert again.seconds == 0
    # rows that differ in D_ssl alone have their first stage in common
    stage1, _ = row_recipes(rows["inherit"], budget, 0).values()
    told = read_manifest(moved / "inherit-0" / "inherit_stage1" / "student")["recipe"]
    assert told["data"]["labeled"]
    assert told["data"]["unlabeled"] is None
    assert stage1.objective.roles == ("labeled",)
