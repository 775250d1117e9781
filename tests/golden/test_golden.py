"""What users and results depend on is as it was recorded: a refactor moves nothing of it.

Where a change is intended, run `python tests/golden/record.py` and commit the difference with its reason.
"""

import json
import re
import shutil

import doors
import pytest
import record

TABLE_LINES = re.compile(r"^\|.*\|$", re.MULTILINE)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """What the verbs write, run once."""
    return record.run_verbs(tmp_path_factory.mktemp("golden"))


def plain(value):
    """As JSON holds it."""
    return json.loads(json.dumps(value))


def assert_close(value, expected, tolerance):
    """Numbers may differ by rounding of another processor, everything else is equal."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_close(value[key], expected[key], tolerance)
    elif isinstance(expected, list):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_close(one, other, tolerance)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, rel=tolerance, abs=tolerance)
    else:
        assert value == expected


# Recipes, rows, results, the command line.


@pytest.mark.parametrize("name", record.PLAIN)
def test_nothing_moved(name):
    value, expected = plain(record.PLAIN[name]()), record.read_json(name)
    for key, part in expected.items():
        if not isinstance(part, dict):
            assert value[key] == part
            continue
        for inner in part:  # what came after the recording is not compared, what was there is
            assert value[key].get(inner) == part[inner], f"{name}: {key}: {inner}"


@pytest.mark.parametrize("world", ["mini/tables", "mini/long"])
def test_every_finished_row_is_accepted_as_finished(world):
    names = doors.result_files(world)
    assert names
    assert [name for name in names if not doors.is_finished(name)] == []


def test_a_row_of_another_mark_is_not_accepted(tmp_path, monkeypatch):
    name = "mini/tables/ours-0.json"
    text = (doors.RESULTS / name).read_text()
    (tmp_path / name).parent.mkdir(parents=True)
    monkeypatch.setattr(doors, "RESULTS", tmp_path)
    (tmp_path / name).write_text(text)
    assert doors.is_finished(name)
    (tmp_path / name).write_text(text.replace(doors.recorded_mark(name), "0" * 64))
    assert not doors.is_finished(name)


# Files that verbs write.


def test_files_have_the_recorded_structure(written):
    value, expected = plain(record.formats(written)), record.read_json("formats")
    assert sorted(value) == sorted(expected)
    for name, structure in expected.items():
        assert value[name] == structure, name


def test_scenes_are_the_recorded_ones(written):
    assert_close(record.scenes(written), record.read_json("scenes"), 1e-2)


def test_runs_on_earlier_caches_keep_their_fingerprints_and_losses(written):
    value, expected = record.trained(written), record.read_json("trained")
    for run in expected:
        assert value[run]["fingerprint"] == expected[run]["fingerprint"]
        assert_close(value[run]["logged"], expected[run]["logged"], 5e-3)


def test_earlier_shards_and_caches_are_whole_and_taken_as_they_are(tmp_path):
    material = record.copy_fixtures(tmp_path)
    for role in ("labeled", "unlabeled", "test"):
        assert "is whole" in doors.run("data", "verify", material / "scenes" / role)
        assert json.loads(doors.run("data", "inspect", material / "scenes" / role, "--json"))
    again = doors.run(
        *("cache", material / "scenes" / "labeled", material / "cache" / "labeled", "--dtype", "fp16", "--json")
    )
    assert json.loads(again)["made"] is False


@pytest.mark.parametrize("kind", record.TOY_TYPES)
def test_a_checkpoint_of_earlier_code_is_continued(tmp_path, kind):
    expected = record.read_json("toy")[kind]
    logged = record.continue_toy(kind, tmp_path / "run")
    assert [line["step"] for line in logged] == [5, 6, 7, 8]  # not from the beginning
    assert_close(logged, expected["logged"], 1e-3 if kind == "float32" else 2e-2)
    assert plain(record.tree(tmp_path / "run" / "checkpoints")) == expected["checkpoints"]
    shutil.rmtree(tmp_path / "run")


# Tables.


def check_table(text, name):
    """First the numbers, then every word: a new wording is no new number."""
    expected = (record.RECORDED / "tables" / f"{name}.md").read_text()
    numbers, recorded = (re.findall(r"\d[\d.,]*", "\n".join(TABLE_LINES.findall(each))) for each in (text, expected))
    assert numbers == recorded
    assert text == expected


@pytest.mark.parametrize("name", record.TABLES)
def test_tables_of_finished_rows_are_the_recorded_ones(tmp_path, name):
    check_table(doors.reproduced(tmp_path, *record.TABLES[name]), name)


def test_tables_of_photographs_are_the_recorded_ones(tmp_path):
    check_table(doors.photo_tables(tmp_path, record.PHOTO_ROWS, "ours"), "photos")
