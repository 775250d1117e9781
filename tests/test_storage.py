import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from refine_control import storage
from refine_control.errors import DamagedError, InUseError, InvalidInputError, StorageError
from refine_control.storage import (
    allocate,
    check_output_file,
    check_output_folder,
    finish_folder,
    only_writer,
    publish_folder,
    read_json_lines,
    read_manifest,
    remove_folder,
    require_space,
    sha256_file,
    storage_failure,
    write_atomic,
    write_json,
    write_output,
)


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


WRITERS = {
    "python": '(folder / "weights").write_bytes(bytes(5000))',
    "safetensors": "import numpy, safetensors.numpy\n        "
    'safetensors.numpy.save_file({"a": numpy.zeros(5000)}, folder / "weights")',
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_refuses_to_grow_a_file_is_a_storage_error(tmp_path, writer):
    """The kernel itself refuses here: a file size limit, as a quota does."""
    code = f"""
import pathlib, resource, sys
from refine_control.errors import StorageError
from refine_control.storage import publish_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with publish_folder(pathlib.Path(sys.argv[1])) as folder:
        {WRITERS[writer]}
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


# What killed writers left.


def leave(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
            (path / "weights").touch()
        else:
            path.touch()


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != ".lock")


def test_the_writer_of_a_folder_removes_what_killed_writers_left(tmp_path):
    leave(tmp_path, ".student.7.tmp/", "inner/.step_2.old.tmp/", "inner/.p.png.4194303.tmp", "kept", ".mine.tmp", ".7")
    leave(tmp_path, "another/.a.7.tmp", "another/.lock", ".lock")
    with only_writer(tmp_path):
        assert names_in(tmp_path) == [".7", ".mine.tmp", "another", "another/.a.7.tmp", "inner", "kept"]


def test_nobody_else_removes_them_nor_files_in_a_folder_of_another_origin(tmp_path):
    leave(tmp_path / "home", ".a.7.tmp")
    with only_writer(tmp_path / "home"):
        assert names_in(tmp_path / "home") == [".a.7.tmp"]
    with only_writer(tmp_path):
        leave(tmp_path, ".b.7.tmp")
        with pytest.raises(InUseError), only_writer(tmp_path):
            pass
        assert ".b.7.tmp" in names_in(tmp_path)


def test_an_output_file_replaces_what_a_killed_writer_left_of_it(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    leave(tmp_path, f".p.png.{gone.pid}.tmp", f".p.png.{os.getppid()}.tmp", f".q.png.{gone.pid}.tmp")
    write_output(tmp_path / "p.png", b"picture")
    assert names_in(tmp_path) == [f".p.png.{os.getppid()}.tmp", f".q.png.{gone.pid}.tmp", "p.png"]
    write_output(tmp_path / "new" / "inner" / "p.png", b"picture")
    assert (tmp_path / "new" / "inner" / "p.png").read_bytes() == b"picture"


def test_a_manifest_lists_what_was_written_and_nothing_else_is_published(tmp_path):
    leave(tmp_path / "work", "a.npy", ".state.json.7.tmp", "stray.npy", "inner/b", "old/c")
    finish_folder(tmp_path / "work", tmp_path / "out", ["inner/b", "a.npy"])
    assert set(read_manifest(tmp_path / "out")["files"]) == {"a.npy", "inner/b"}
    assert names_in(tmp_path / "out") == ["a.npy", "inner", "inner/b", "manifest.json"]


def test_a_kill_while_a_folder_is_deleted_leaves_nothing_under_its_name(tmp_path, monkeypatch):
    publish(tmp_path / "step_1", b"one")

    def killed(path, **options):
        if path.name.startswith(".step_1") and path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(storage.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(tmp_path / "step_1")
    monkeypatch.undo()
    assert names_in(tmp_path)[0] == ".step_1.old.tmp"
    leave(tmp_path, ".lock")
    with only_writer(tmp_path):
        assert names_in(tmp_path) == []


# What an output may be.


@pytest.fixture
def taken(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path


def lock(folder):
    with only_writer(folder):
        pass


USES = {"check": check_output_folder, "lock": lock, "publish": lambda folder: publish(folder, b"one")}
BAD = ["file/out", "file/inner/out", "n" * 250, "é" * 200 + "/out", "a\0b", "a\0b/out", "\ud800", "loop/out"]


@pytest.mark.parametrize("name", [*BAD, "file", "broken", "loop"])
@pytest.mark.parametrize("use", USES)
def test_an_output_folder_that_cannot_be_is_refused(taken, name, use):
    before = names_in(taken)
    with pytest.raises(InvalidInputError, match="choose a") as refused:
        USES[use](taken / name)
    assert refused.value.exit_code == 2
    assert names_in(taken) == before


@pytest.mark.parametrize("name", [*BAD, "folder"])
def test_an_output_file_that_cannot_be_is_refused(taken, name):
    before = names_in(taken)
    with pytest.raises(InvalidInputError):
        write_output(taken / name, b"")
    assert names_in(taken) == before


def test_outputs_that_can_be_pass(taken, monkeypatch):
    for name in ("folder", "new", "new/inner", "n" * 200, "é" * 100):
        check_output_folder(taken / name)
    for name in ("file", "new.png", "folder/new.png"):
        check_output_file(taken / name)
    monkeypatch.chdir(taken)
    for name in (".", "..", "new", "new/inner"):
        check_output_folder(storage.Path(name))


def test_a_folder_that_may_not_be_written_is_a_storage_error(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.os, "access", lambda path, mode: False)  # root may write everywhere
    for check in (check_output_folder, check_output_file):
        with pytest.raises(StorageError, match=f"cannot write under {tmp_path}: permission denied"):
            check(tmp_path / "new" / "out")


# Disks.


def test_free_space_is_asked_for_before_work_begins(tmp_path, monkeypatch):
    require_space(tmp_path / "not" / "there", 1000, "the run")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: (2e9, 1e9, 1e9))
    with pytest.raises(StorageError, match=f"the run needs 1001 MB under {tmp_path}/a and 1000 MB are free"):
        require_space(tmp_path / "a", 1_001_000_000, "the run")


def test_allocated_blocks_are_there_and_keep_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"head")
    allocate(tmp_path / "a", 1 << 20)
    assert (tmp_path / "a").stat().st_blocks * 512 >= 1 << 20
    assert (tmp_path / "a").read_bytes()[:5] == b"head\0"


def test_only_a_disk_that_refuses_is_a_storage_failure():
    assert storage_failure(FileNotFoundError(errno.ENOENT, "no"), "a") is None
    assert storage_failure(PermissionError(errno.EACCES, "no")) is None  # of reading, perhaps
    assert storage_failure(ValueError("(os error 28)"), "a") is None
    assert storage_failure(PermissionError(errno.EACCES, "no"), "a").exit_code == 74
    assert storage_failure(OSError(errno.ENAMETOOLONG, "no"), "a").exit_code == 2
    assert storage_failure(OSError(errno.ENOSPC, "no", "f")).exit_code == 74


# What is read.


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"files": 1}', '{"files": {"a": 1}}', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_none_is_damage(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, "latin-1")
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_a_manifest_without_a_required_key_is_damage(tmp_path):
    publish(tmp_path / "out", b"one")
    with pytest.raises(DamagedError, match="has no 'fingerprint'"):
        read_manifest(tmp_path / "out", required=["made_by", "fingerprint"])


@pytest.mark.parametrize("name", ["file", "file/inner", "a\0b", "n" * 300])
def test_what_is_no_folder_has_no_manifest(taken, name):
    with pytest.raises(FileNotFoundError):
        read_manifest(taken / name)


def test_garbage_in_a_log_is_left_out(tmp_path):
    (tmp_path / "log").write_bytes(b'{"step": 1}\n{"step": 2\n\xff\xfe}\n[3]\n\n{"step": 4}\n{"ste')
    assert read_json_lines(tmp_path / "log") == [{"step": 1}, {"step": 4}]
