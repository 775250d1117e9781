"""Full disks, kills and damaged files of a cache: an exit code and a sentence, and the same bytes afterwards."""

import errno
import json
import os

import numpy as np
import pytest

from refine_control import storage
from refine_control.cache import writer as cache_writer
from refine_control.cache.building import build_cache
from refine_control.cache.reader import Cache
from refine_control.cache.writer import CacheWriter
from refine_control.errors import DamagedError, InvalidInputError, StorageError
from refine_control.photos.shards import ShardWriter
from refine_control.records import LABELED, Photo
from refine_control.storage import MANIFEST, publish_folder

ROWS = {(2, 2): range(4)}


def fill(writer: CacheWriter) -> None:
    """A small cache without any model."""

    def batch(rows: range) -> None:
        writer.put("prompt_index", 0, 4, np.arange(4, dtype=np.int32))
        writer.put_sized("masked_latents", rows, np.ones((4, 16, 2, 2), np.float32))
        for row in rows:
            writer.note(f"k{row}", "a cup")

    writer.phase("labeled", ROWS.values(), batch)


DESCRIBED = {"kind": "cache", "role": LABELED, "count": 4, "model": "m", "dtype": "float32", "prompts": "none"}


def make(out):
    writer = CacheWriter(out, DESCRIBED, ROWS)
    fill(writer)
    writer.finish()
    return json.loads((out / MANIFEST).read_text())


def test_an_array_has_its_blocks_before_anything_is_written_into_its_map(tmp_path):
    writer = CacheWriter(tmp_path / "cache", DESCRIBED, ROWS)
    writer.put("latents", 0, 1000, np.ones((1, 100), np.float32))
    stat = (writer.folder / "latents.npy").stat()
    assert stat.st_size == 1000 * 400 + 128
    assert stat.st_blocks * 512 >= stat.st_size


def test_a_disk_without_room_for_an_array_is_a_storage_error(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"No space left .* run the same command again") as refused:
        make(tmp_path / "cache")
    assert refused.value.exit_code == 74
    monkeypatch.undo()
    assert make(tmp_path / "cache") == make(tmp_path / "whole")


def test_a_kill_while_the_state_is_written_changes_no_byte_of_the_cache(tmp_path, monkeypatch):
    whole = make(tmp_path / "whole")

    def killed(path, value):
        storage.write_json(path, value)
        path.with_name(f".{path.name}.7{storage.TEMPORARY}").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_writer, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cache")
    monkeypatch.undo()
    assert list((tmp_path / ".cache.partial").glob(".*.tmp"))
    assert make(tmp_path / "cache") == whole
    assert set(whole["files"]) == {"samples.jsonl", "masked_latents.npy", "prompt_index.npy"}
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {MANIFEST, *whole["files"]}


def test_a_kill_before_the_manifest_loses_nothing(tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cache")
    monkeypatch.undo()
    writer = CacheWriter(tmp_path / "cache", DESCRIBED, ROWS)
    assert writer.state.done == {"labeled": 4}
    writer.finish()
    assert len(Cache(tmp_path / "cache")) == 4


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"described": 1, "new": 2}'])
def test_a_damaged_state_is_a_fresh_start(tmp_path, text):
    (tmp_path / ".cache.partial").mkdir()
    (tmp_path / ".cache.partial" / "state.json").write_text(text)
    assert make(tmp_path / "cache") == make(tmp_path / "whole")


BAD_FILES = {
    "objects": lambda folder: np.save(folder / "masked_latents.npy", np.array([{}, None]), allow_pickle=True),
    "text": lambda folder: np.save(folder / "masked_latents.npy", np.array(["a"])),
    "no array": lambda folder: (folder / "masked_latents.npy").write_text("masks"),
    "empty": lambda folder: (folder / "masked_latents.npy").touch(),
    "one number": lambda folder: np.save(folder / "masked_latents.npy", np.float32(1)),
    "none": lambda folder: None,
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_file_that_is_no_array_of_numbers_is_damage(tmp_path, fault):
    with publish_folder(tmp_path / "cache", **DESCRIBED) as folder:
        (folder / "samples.jsonl").write_text('{"key": "a", "prompt": ""}\n')
        BAD_FILES[fault](folder)
    with pytest.raises(DamagedError, match=r"delete .*make"):
        Cache(tmp_path / "cache")


@pytest.mark.parametrize("line", ["[1]", "{", '{"key": 1}', "\\ud800"])
def test_a_line_that_is_no_sample_is_damage(tmp_path, line):
    with publish_folder(tmp_path / "cache", **DESCRIBED) as folder:
        (folder / "samples.jsonl").write_text(line)
        np.save(folder / "masked_latents.npy", np.ones((1, 1, 2, 2), np.uint8))
    with pytest.raises(DamagedError, match="is not whole"):
        Cache(tmp_path / "cache")


@pytest.mark.parametrize("key", ["role", "count", "model", "dtype", "prompts"])
def test_a_manifest_that_lacks_a_key_is_damage(tmp_path, key):
    with publish_folder(tmp_path / "cache", **{k: v for k, v in DESCRIBED.items() if k != key}):
        pass
    with pytest.raises(DamagedError, match=f"has no '{key}'"):
        Cache(tmp_path / "cache")


@pytest.mark.parametrize("name", ["file", "file/inner", "a\0b", "n" * 300])
def test_a_path_that_is_no_folder_is_no_cache(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="is no cache; make it with"):
        Cache(tmp_path / name)


def test_other_folders_are_named_before_any_model_is_used(tmp_path):
    writer = ShardWriter(tmp_path / "shards" / LABELED, LABELED)
    writer.add(Photo("k", np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=bool), "a cup"))
    writer.finish()
    make(tmp_path / "cache")
    refusals = [
        (tmp_path / "cache", tmp_path / "new", "is a cache, which `refine-control train` reads"),
        (tmp_path / "shards", tmp_path / "new", f"give {tmp_path}/shards/labeled"),
        (tmp_path / "shards" / LABELED, tmp_path / "shards", "choose a new folder for the output"),
        (tmp_path / "shards" / LABELED, tmp_path / "cache" / MANIFEST, "is no folder"),
        (tmp_path / "shards" / LABELED, tmp_path / "cache" / MANIFEST / "out", "cannot be made"),
    ]
    for source, out, said in refusals:
        with pytest.raises(InvalidInputError, match=said):
            build_cache(source, out, None)
    with pytest.raises(
        InvalidInputError, match=f"make one with `refine-control cache {tmp_path}/shards/labeled CACHE`"
    ):
        Cache(tmp_path / "shards")
