import json
import shutil
from pathlib import Path

import pytest

from refine_control import folders
from refine_control.errors import InvalidInputError
from refine_control.folders import (
    A_CACHE,
    A_CONTROLNET,
    A_MODEL,
    ALL_ROLES,
    ONE_ROLE,
    PHOTOGRAPHS,
    ROWS_TO_REVIEW,
    SHARDS_OR_BUILD,
    Kind,
    kind_of_folder,
    refuse_other_kind,
    refuse_output_kind,
)
from refine_control.models.card import BUNDLE
from refine_control.storage import publish_folder


def published(folder: Path, *files: str, **described) -> Path:
    with publish_folder(folder, **described) as temporary:
        for name in files:
            (temporary / name).write_text("{}")
    return folder


def written(folder: Path, **files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))
    return folder


@pytest.fixture
def made(tmp_path) -> dict[Kind, Path]:
    """One folder of each kind, with the files by which the writers leave them."""
    for role in ("labeled", "test"):
        published(tmp_path / "out" / role, "index.jsonl", "shard-00000.tar", kind="shards", role=role)
    run = written(tmp_path / "run", recipe__yaml={}, metrics__jsonl={})
    published(run / "student", "config.json", kind="student", fingerprint="f")
    return {
        Kind.SHARDS: tmp_path / "out" / "labeled",
        Kind.BUILD: tmp_path / "out",
        Kind.CACHE: published(tmp_path / "cache", "samples.jsonl", "prompt_index.npy", kind="cache", role="test"),
        Kind.RUN: run,
        Kind.STUDENT: run / "student",
        Kind.CONTROLNET: written(tmp_path / "net", config__json={"_class_name": "SD3ControlNetModel"}),
        Kind.CHECKPOINT: published(run / "checkpoints" / "step_00000001", "state.safetensors", step=1, fingerprint="f"),
        Kind.MODEL: published(tmp_path / "trained" / "bundle", "model_index.json", kind="bundle"),
        Kind.TRAINED_MODEL: tmp_path / "trained",
        Kind.ANNOTATIONS: written(tmp_path / "annotations", annotate__json={}, manifest__jsonl={"made_by": {}}),
        Kind.TASKS: written(tmp_path / "tasks", tasks__json=[], labels__xml=""),
        Kind.DOWNLOAD: written(tmp_path / "download", request={"urls_sha256": "0"}),
        Kind.EVALUATION: written(tmp_path / "evaluation", metrics__json={}, report__html=""),
        Kind.REPRODUCTION: written(tmp_path / "reproduced", tables__json={}, report__html=""),
        Kind.EXPORT: published(tmp_path / "exported", "pipeline.json", kind="export"),
        Kind.UNFINISHED: written(tmp_path / ".cache.partial", state__json={}),
    }


def test_each_folder_is_recognised_as_what_it_is(made):
    assert {kind: kind_of_folder(folder) for kind, folder in made.items()} == {kind: kind for kind in Kind}
    assert kind_of_folder(made[Kind.RUN] / "checkpoints") is Kind.CHECKPOINT
    assert kind_of_folder(BUNDLE) is Kind.MODEL


def test_a_folder_whose_manifest_is_damaged_is_still_what_it_is(made):
    for kind in (Kind.SHARDS, Kind.CACHE, Kind.CHECKPOINT, Kind.MODEL):
        for damage in (b"", b"[1]", b"\xff"):
            (made[kind] / "manifest.json").write_bytes(damage)
            assert kind_of_folder(made[kind]) is kind


def test_folders_of_other_people_and_files_have_no_kind(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    written(tmp_path / "mine", manifest__json={"kind": "cache"}, config__json={"_class_name": "UNet"}, request=[1])
    (tmp_path / "mine" / "manifest.jsonl").write_text('{"image": "a.jpg"}\n')
    for path in ("photos", "photos/a.jpg", "mine", "nowhere", "a\0b", "x" * 300):
        assert kind_of_folder(tmp_path / path) is None
        refuse_other_kind(tmp_path / path, ONE_ROLE)
        refuse_output_kind(tmp_path / path)


EXPECTED = [PHOTOGRAPHS, ONE_ROLE, SHARDS_OR_BUILD, ALL_ROLES, A_CACHE, A_CONTROLNET, A_MODEL, ROWS_TO_REVIEW]


def test_every_other_kind_is_refused_by_name_and_never_to_be_deleted(made):
    for expected in EXPECTED:
        for kind, folder in made.items():
            if kind in expected.kinds:
                refuse_other_kind(folder, expected)
                continue
            with pytest.raises(InvalidInputError) as refused:
                refuse_other_kind(folder, expected)
            assert kind.what in str(refused.value)
            assert expected.what in str(refused.value)
            assert "delete" not in str(refused.value)
            assert "damaged" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "expected", "advice"),
    [
        (Kind.SHARDS, A_CACHE, "`refine-control cache {0}/out/labeled CACHE`"),
        (Kind.BUILD, A_CACHE, "`refine-control cache {0}/out/labeled CACHE`"),
        (Kind.BUILD, ONE_ROLE, "give {0}/out/labeled or {0}/out/test"),
        (Kind.SHARDS, ALL_ROLES, "give {0}/out"),
        (Kind.RUN, A_CONTROLNET, "give {0}/run/student"),
        (Kind.CHECKPOINT, A_CONTROLNET, "give {0}/run/student"),
        (Kind.TRAINED_MODEL, A_MODEL, "give {0}/trained/bundle"),
        (Kind.UNFINISHED, A_CACHE, "give {0}/cache"),
        (Kind.ANNOTATIONS, ONE_ROLE, "`refine-control data build {0}/annotations OUT`"),
        (Kind.DOWNLOAD, ROWS_TO_REVIEW, "`refine-control data annotate {0}/download OUT`"),
        (Kind.CACHE, ONE_ROLE, "which `refine-control train` reads with --set data.labeled"),
    ],
)
def test_the_right_folder_or_command_is_named(made, tmp_path, kind, expected, advice):
    with pytest.raises(InvalidInputError) as refused:
        refuse_other_kind(made[kind], expected)
    assert advice.format(tmp_path) in str(refused.value)


def test_a_run_without_a_student_is_to_be_finished(made):
    shutil.rmtree(made[Kind.STUDENT])
    with pytest.raises(InvalidInputError, match="run its `refine-control train` command again"):
        refuse_other_kind(made[Kind.RUN], A_CONTROLNET)


def test_an_output_does_not_go_into_another_kind_of_folder(made):
    refuse_output_kind(made[Kind.RUN], Kind.RUN)
    with pytest.raises(InvalidInputError, match=r"is a cache, .* choose a new folder"):
        refuse_output_kind(made[Kind.CACHE], Kind.RUN, Kind.EVALUATION)


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_LARGEST_MANIFEST", 10)
    assert kind_of_folder(published(tmp_path / "a", kind="cache")) is None
