"""Files that are whole or absent: publish by temp name, fsync, rename, fsync folder.

One writer for each output folder, by `flock`, which the kernel frees on kill -9.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refine_control.errors import DamagedError, InUseError, StorageError

MANIFEST = "manifest.json"
TEMPORARY = ".tmp"


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk under `path` into a StorageError (exit code 74)."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EFBIG):
            raise StorageError(
                f"cannot write under {path}: {os.strerror(error.errno)}; free some space or choose another folder, "
                "then run the same command again"
            ) from error
        raise


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flushes a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes `path` so that a reader sees the old bytes or the new ones, never a part.

    Raises StorageError when the disk refuses."""
    with storage_errors(path):
        temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON with sorted keys: equal values give equal bytes."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


@contextlib.contextmanager
def publish_folder(final: Path, **described: Any) -> Iterator[Path]:
    """Yields an empty temporary folder beside `final`; on success writes its manifest last and renames it.

    The manifest holds each file's size and sha256 and whatever is `described`. An existing `final`
    is replaced only after the new folder is complete."""
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{os.getpid()}{TEMPORARY}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            finish_folder(temporary, final, **described)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def finish_folder(unfinished: Path, final: Path, **described: Any) -> None:
    """Makes a folder that is complete the published one: its manifest last, then the name, then the old one goes."""
    with storage_errors(final):
        files = {}
        for path in sorted(p for p in unfinished.rglob("*") if p.is_file()):
            fsync_path(path)
            name = path.relative_to(unfinished).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_json(unfinished / MANIFEST, {**described, "files": files})
        replaced = final.with_name(f".{final.name}.old{TEMPORARY}")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        unfinished.rename(final)
        fsync_path(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def read_manifest(folder: Path, verify: bool = True) -> dict[str, Any]:
    """The manifest of a published folder; with `verify`, each file's size and sha256 are checked.

    Raises DamagedError naming the first file that differs, FileNotFoundError without a manifest."""
    text = (folder / MANIFEST).read_bytes()
    try:
        manifest = json.loads(text)
        files = manifest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{folder / MANIFEST} is damaged; delete {folder} and make it again") from None
    for name, expected in files if verify else ():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
            raise DamagedError(f"{path} is not the file its manifest describes; delete {folder} and make it again")
    return manifest


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process alone; raises InUseError (exit code 73) when another one has it."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InUseError(f"another process is writing to {folder}; wait for it or choose another folder") from error
        yield
    finally:
        lock.close()
