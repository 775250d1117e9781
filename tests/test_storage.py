import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from refine_control import storage
from refine_control.errors import DamagedError, InUseError, StorageError
from refine_control.storage import only_writer, publish_folder, read_manifest, sha256_file, write_atomic, write_json


def test_write_atomic_writes_text_and_bytes(tmp_path):
    write_atomic(tmp_path / "a", "é")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_the_old_bytes_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free some space") as caught:
        write_atomic(path, b"new")
    assert caught.value.exit_code == 74
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_refuses_to_grow_a_file_is_a_storage_error(tmp_path):
    """The kernel itself refuses here: a file size limit, as a quota does."""
    code = """
import pathlib, resource, sys
from refine_control.errors import StorageError
from refine_control.storage import publish_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with publish_folder(pathlib.Path(sys.argv[1])) as folder:
        (folder / "weights").write_bytes(bytes(5000))
except StorageError as error:
    sys.exit(error.exit_code)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, check=False)
    assert run.returncode == 74, run.stderr.decode()
    assert os.listdir(tmp_path) == []


def test_a_bug_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no folder" / "a", b"")


def test_equal_values_give_equal_json(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "y": [2]})
    write_json(tmp_path / "b", {"y": [2], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a", {"x": float("nan")})
    assert json.loads((tmp_path / "a").read_text()) == {"x": 1, "y": [2]}


def publish(final, content: bytes) -> None:
    with publish_folder(final, made_by="test") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(content)


def test_a_published_folder_has_a_manifest_of_all_its_files(tmp_path):
    publish(tmp_path / "out", b"one")
    manifest = read_manifest(tmp_path / "out")
    digest = sha256_file(tmp_path / "out" / "inner" / "weights")
    assert manifest == {"made_by": "test", "files": {"inner/weights": {"bytes": 3, "sha256": digest}}}
    assert os.listdir(tmp_path) == ["out"]


def test_publishing_again_replaces_the_whole_folder(tmp_path):
    publish(tmp_path / "out", b"one")
    (tmp_path / "out" / "stray").touch()
    publish(tmp_path / "out", b"two")
    assert sorted(os.listdir(tmp_path / "out")) == ["inner", "manifest.json"]
    assert (tmp_path / "out" / "inner" / "weights").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_while_publishing_keeps_the_old_folder(tmp_path):
    publish(tmp_path / "out", b"one")

    def fail() -> None:
        with publish_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert read_manifest(tmp_path / "out")["made_by"] == "test"
    assert os.listdir(tmp_path) == ["out"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: path.write_bytes(b"on"), lambda path: path.write_bytes(b"one."), lambda path: path.unlink()],
    ids=["bit", "short", "long", "gone"],
)
def test_any_damage_is_found_and_named(tmp_path, damage):
    publish(tmp_path / "out", b"one")
    damage(tmp_path / "out" / "inner" / "weights")
    with pytest.raises(DamagedError, match=r"inner/weights is not the file its manifest describes"):
        read_manifest(tmp_path / "out")
    assert read_manifest(tmp_path / "out", verify=False)["made_by"] == "test"


def test_a_folder_without_a_manifest_is_told_apart_from_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path)


HOLDER = """
import pathlib, sys, time
from refine_control.storage import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_writer_and_the_lock_is_free_after_kill_9(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InUseError, match="another process is writing") as caught, only_writer(tmp_path):
            pass
        assert caught.value.exit_code == 73
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    start = time.monotonic()
    with only_writer(tmp_path):
        assert time.monotonic() - start < 1


def test_the_lock_is_free_after_the_block_even_when_it_fails(tmp_path):
    with pytest.raises(RuntimeError), only_writer(tmp_path):
        raise RuntimeError
    with only_writer(tmp_path), pytest.raises(InUseError), only_writer(tmp_path):
        pass
