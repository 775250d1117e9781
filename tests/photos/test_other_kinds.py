"""Laws of folders given in the place of photographs or of shards: each is called what it is, and stays as it is."""

import json

import pytest

from refine_control.errors import InvalidInputError
from refine_control.miniature.small_photos import read_small_photos
from refine_control.photos.build import build
from refine_control.photos.inspect import inspect
from refine_control.photos.shards import Shards, open_manifest, verify
from refine_control.photos.sources import entries

FOLDERS = {
    "a cache": {"manifest.json": {"kind": "cache", "files": {}}},
    "a trained ControlNet": {"manifest.json": {"kind": "student", "files": {}}},
    "the folder of a training run": {"recipe.yaml": {}, "metrics.jsonl": {}},
    "a model in diffusers layout": {"model_index.json": {}},
    "the shards of one role": {"manifest.json": {"kind": "shards", "files": {}}},
    "the output of `data build`": {"build.json": {}},
    "annotations": {"annotate.json": {}, "manifest.jsonl": {"made_by": {}}},
}


@pytest.fixture(params=FOLDERS)
def other(request, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in FOLDERS[request.param].items():
        (folder / name).write_text(json.dumps(content))
    return request.param, folder


def test_what_is_no_folder_of_photographs_is_called_what_it_is(other, tmp_path):
    what, folder = other
    readers = [lambda: list(entries(folder)), lambda: build(folder, tmp_path / "out")]
    readers.append(lambda: read_small_photos(folder, "teacher"))
    for read in readers if what != "annotations" else ():
        with pytest.raises(InvalidInputError, match=what) as caught:
            read()
        assert not any(word in str(caught.value) for word in ("delete", "damaged"))
    assert not (tmp_path / "out").exists()


def test_what_is_no_folder_of_shards_is_called_what_it_is(other):
    what, folder = other
    readers = [Shards] if "build" in what else [Shards, open_manifest, verify, inspect]
    for read in readers if "shards" not in what else ():
        with pytest.raises(InvalidInputError, match=what) as caught:
            read(folder)
        assert not any(word in str(caught.value) for word in ("delete", "damaged"))


def test_a_build_does_not_write_into_another_kind_of_folder(other, tmp_path):
    what, folder = other
    if "build" in what:
        return
    before = sorted(folder.iterdir())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match=what):
        build(tmp_path / "in", folder)
    assert sorted(folder.iterdir()) == before
