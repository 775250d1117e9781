"""Files that are whole or absent: publish by temp name, fsync, rename, fsync folder.

One writer for each output folder, by `flock`, which the kernel frees on kill -9. (The library filelock makes the same
call; it falls back to a lock that a kill leaves behind where a file system has none, so it is not used.)

What is being written is named `.NAME.PID.tmp`, what is being deleted `.NAME.old.tmp`. Whoever holds the lock of a
folder removes what killed writers left of these.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from refine_control.errors import DamagedError, InUseError, InvalidInputError, RefineControlError, StorageError

MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
LOCK = ".lock"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+|old)\.tmp")
_LONGEST_NAME = 255
_LONGEST_OUTPUT = _LONGEST_NAME - len("." + ".4194304.tmp")
"""Bytes of an output's name: the name of its temporary file must fit, too (a process id has up to seven digits)."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_REFUSED = (*_FULL, errno.EIO, errno.EACCES, errno.EPERM)
_NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EILSEQ)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def storage_failure(error: BaseException, path: Path | str | None = None) -> RefineControlError | None:
    """The error with exit code 74 for a disk that is full or read-only, 2 for a path that cannot be; None for others.

    safetensors reports the same as errors of its own type. Without `path`, where an error of reading looks the same,
    only a full or read-only disk counts."""
    number = error.errno if isinstance(error, OSError) else None
    if (library := sys.modules.get("safetensors")) and isinstance(error, library.SafetensorError):
        number = int(code[1]) if (code := _OS_ERROR.search(str(error))) else None
    if number is None:
        return None
    fault = f"under {path}" if path else str(getattr(error, "filename", None) or "the output")
    fault = f"cannot write {fault}: {os.strerror(number)}"
    if number in (_REFUSED if path else _FULL):
        return StorageError(f"{fault}; free some space or choose another folder, then run the same command again")
    return InvalidInputError(f"{fault}; choose another path") if path and number in _NO_PATH else None


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raises StorageError (exit code 74) for a disk that refuses to write under `path`."""
    try:
        yield
    except Exception as error:
        if failure := storage_failure(error, path):
            raise failure from error
        raise


def check_output_folder(folder: Path) -> None:
    """Raises InvalidInputError where no folder can be at this path, StorageError where nothing may be written there."""
    _check_names(folder)
    existing = next(each for each in (folder, *folder.parents, Path(os.sep)) if os.path.lexists(each))
    if not existing.is_dir():
        fault = "is no folder" if existing == folder else f"cannot be made, because {existing} is no folder"
        raise InvalidInputError(f"{folder} {fault}; choose another path for the output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write under {existing}: permission denied; choose another folder")


def check_output_file(path: Path) -> None:
    """As `check_output_folder`, for a file: its folder may be missing, and an older file is replaced."""
    _check_names(path)
    check_output_folder(path.parent)
    if path.exists() and not path.is_file():
        raise InvalidInputError(f"{path} is a folder or a device; name a file for the output")


def _check_names(path: Path) -> None:
    """Raises InvalidInputError for a path that no file system takes."""
    try:
        names = [os.fsencode(part) for part in path.parts]
    except UnicodeEncodeError:
        names = [b"\0"]
    if any(b"\0" in name for name in names):
        raise InvalidInputError(f"{str(path)!r} holds a character that no file name may have; choose another path")
    if any(len(name) > _LONGEST_NAME for name in names[:-1]) or len(b"".join(names[-1:])) > _LONGEST_OUTPUT:
        raise InvalidInputError(f"a name in {path} is longer than {_LONGEST_OUTPUT} bytes; choose a shorter one")


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raises StorageError where the disk of `folder` has less than `needed` bytes left; `purpose` says what for."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    _, _, free = shutil.disk_usage(existing)
    if free < needed:
        sizes = f"{needed / 1e6:.0f} MB under {folder} and {free / 1e6:.0f} MB are free"
        raise StorageError(f"{purpose} needs {sizes}; free some space or choose another folder")


def allocate(path: Path, size: int) -> None:
    """Reserves the blocks of a file of `size` bytes: a write into its memory map then never meets a full disk (SIGBUS).

    What the file holds stays. Raises OSError where the disk has no room."""
    if hasattr(os, "posix_fallocate"):  # macOS has no such call
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)


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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write; it gets its name at the end of the block, when all of it is on the disk.

    Raises StorageError when the disk refuses; then, and after any other error, the old file is as it was."""
    with storage_errors(path):
        temporary = _temporary(path)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_path(path.parent)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes `path` so that a reader sees the old bytes or the new ones, never a part. Raises as `open_atomic`."""
    with open_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON with sorted keys: equal values give equal bytes."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_output(path: Path, data: bytes | str) -> None:
    """`write_atomic` of a file that a user named, its folder included; what killed writers left of it is removed.

    Raises InvalidInputError where no file can be there, StorageError."""
    check_output_file(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_beside(path)
    write_atomic(path, data)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole JSON objects; a line that a kill or a full disk has cut is left out."""
    objects = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            objects.append(json.loads(line))
    return [each for each in objects if isinstance(each, dict)]


@contextlib.contextmanager
def publish_folder(final: Path, **described: Any) -> Iterator[Path]:
    """Yields an empty temporary folder beside `final`; on success writes its manifest last and renames it.

    The manifest holds each file's size and sha256 and whatever is `described`. An existing `final`
    is replaced only after the new folder is complete."""
    check_output_folder(final)
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(final)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            files = (path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
            finish_folder(temporary, final, sorted(files), **described)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def finish_folder(unfinished: Path, final: Path, files: Collection[str], **described: Any) -> None:
    """Makes a complete folder the published one: its manifest last, then the name, then the old one goes.

    `files` are the names of what was written; anything else in the folder is removed."""
    with storage_errors(final):
        listed = {}
        for name in sorted(files):
            fsync_path(path := unfinished / name)
            listed[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_json(unfinished / MANIFEST, {**described, "files": listed})
        for path in unfinished.iterdir():
            if path.name not in (MANIFEST, *(name.split("/")[0] for name in files)):
                _remove(path)
        replaced = _emptied_old(final)
        if final.exists():
            final.rename(replaced)
        unfinished.rename(final)
        fsync_path(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Deletes a published folder: first its name, so that a kill leaves no half of it under that name."""
    shutil.rmtree(folder.rename(_emptied_old(folder)))


def _emptied_old(folder: Path) -> Path:
    """The name under which `folder` is deleted, free to take."""
    old = folder.with_name(f".{folder.name}.old{TEMPORARY}")
    shutil.rmtree(old, ignore_errors=True)
    return old


def read_manifest(folder: Path, verify: bool = True, required: Iterable[str] = ()) -> dict[str, Any]:
    """The manifest of a published folder; with `verify`, each file's size and sha256 are checked.

    Raises DamagedError naming the first file that differs or the first `required` key that is missing,
    FileNotFoundError without a manifest."""
    path = folder / MANIFEST
    if not os.path.isfile(path):  # False for every path that cannot be one, too
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        manifest = json.loads(path.read_bytes())
        files = {name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{path} is damaged; delete {folder} and make it again") from None
    if (missing := next((key for key in required if key not in manifest), None)) is not None:
        raise DamagedError(f"{path} has no {missing!r}; delete {folder} and make it again")
    for name, (size, sha256) in files.items() if verify else ():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or sha256_file(file) != sha256:
            raise DamagedError(f"{file} is not the file its manifest describes; delete {folder} and make it again")
    return manifest


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process alone, and removes what killed writers left in it if it was held before.

    Raises InUseError (exit code 73) when another process holds it, and as `check_output_folder`."""
    check_output_folder(folder)
    with contextlib.ExitStack() as until_done:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held_before = (folder / LOCK).exists()
            lock = until_done.enter_context((folder / LOCK).open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                said = f"another process is writing to {folder}; wait for it or choose another folder"
                raise InUseError(said) from error
            if held_before:  # in other folders nothing is a leftover of ours
                sweep(folder)
        yield


def sweep(folder: Path) -> None:
    """Removes what killed writers left in a folder and the folders in it; call it as the folder's only writer.

    A folder with a lock of its own is left to whoever holds that."""
    inside = (each for each in folder.iterdir() if each.is_dir() and not each.is_symlink())
    for each in [folder, *(each for each in inside if not (each / LOCK).exists())]:
        for leftover, _ in _leftovers(each):
            _remove(leftover)


def sweep_beside(path: Path) -> None:
    """Removes what killed writers left of `path` itself; what a running process writes is kept."""
    for leftover, match in _leftovers(path.parent):
        if match["name"] == path.name and not _is_running(match["pid"]):
            _remove(leftover)


def _leftovers(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    """What lies in a folder under the name of something that was being written or deleted."""
    try:
        return [(folder / name, match) for name in os.listdir(folder) if (match := _LEFTOVER.fullmatch(name))]
    except (FileNotFoundError, PermissionError):
        return []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    """Whether a process of this number runs, other than this one."""
    if pid == "old" or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
