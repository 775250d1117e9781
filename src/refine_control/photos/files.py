"""The bytes of a source's files: nothing outside its folder is read, and what lies in a tar is named like a file.

`00012.tar/000120034.jpg` is the member `000120034.jpg` of the regular file `00012.tar`. A tar is listed once and its
members are then read by offset; a gzipped one (`.tar.gz`, `.tgz`) is unpacked once into a nameless temporary file.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import shutil
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from refine_control.errors import InvalidInputError
from refine_control.photos.pairing import Leftover
from refine_control.records import Rejected, RejectReason

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_BYTES = 1 << 30
"""No file of a photograph of MAX_PIXELS is larger; more is not read into memory."""
_TARS_KEPT = 4
_BLOCK = 512


class Where(NamedTuple):
    """A file, or a member of a tar, that exists inside the source."""

    path: Path
    """With links resolved."""
    member: str | None


def locate(root: Path, name: str) -> Where:
    """Finds `name`, relative to `root`. Rejected where it leaves `root` or is no regular file."""
    parts = PurePosixPath(name).parts
    for count in range(1, len(parts)):
        if parts[count - 1].lower().endswith(TAR_SUFFIXES):
            outer = Path(*parts[:count])
            if (root / outer).is_file():
                path = _inside(root, str(outer))
                members = tar_listing(path).members
                for member in _spellings("/".join(parts[count:])):
                    if member in members:
                        return Where(path, member)
                raise Rejected(RejectReason.UNREADABLE, "no such file")
    return Where(_inside(root, name), None)


def _spellings(name: str) -> Iterator[str]:
    """A name as a list spells it, then as a file system may: in either Unicode form, and with slashes."""
    other = name.replace("\\", "/")
    forms = () if other.isascii() else (unicodedata.normalize(form, other) for form in ("NFC", "NFD"))
    return iter(dict.fromkeys((name, other, *forms)))


def _inside(root: Path, name: str) -> Path:
    """The regular file `name` with links resolved; Rejected where it leaves `root` or is no such file."""
    for spelling in _spellings(name):
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            path = (root / spelling).resolve(strict=True)
            break
    else:
        raise Rejected(RejectReason.UNREADABLE, "no such file")
    if not path.is_relative_to(root.resolve()):
        raise Rejected(RejectReason.OUTSIDE_TREE, "the path leaves the source folder")
    if not path.is_file():
        raise Rejected(RejectReason.UNREADABLE, "not a regular file")
    return path


def exists(root: Path, name: str) -> bool:
    """Whether anything has this name, be it readable or not, inside `root` or not."""
    try:
        return os.path.lexists(root / name) or locate(root, name) is not None
    except (Rejected, ValueError):
        return False


def read_bytes(root: Path, name: str, most: int = MAX_BYTES) -> bytes:
    """The whole file or member `name`, relative to `root`; Rejected where there is none of at most `most` bytes."""
    path, member = locate(root, name)
    try:
        if member is not None:
            return tar_listing(path).read(member, most)
        _check_size(name, path.stat().st_size, most)
        return path.read_bytes()
    except OSError as error:
        raise Rejected(RejectReason.UNREADABLE, f"cannot be read: {os.strerror(error.errno or 0)}") from None


def _check_size(name: str, size: int, most: int) -> None:
    if size > most:
        raise Rejected(RejectReason.UNREADABLE, f"{name} has {size:,} bytes; at most {most:,} are read")


class Tar:
    """A tar's regular members by name, in their order, and their bytes. Links in it are not followed."""

    def __init__(self, path: Path) -> None:
        self.members: dict[str, tuple[int, int]] = {}
        """First byte and length of each."""
        self.unread: list[Leftover] = []
        """Members that cannot be read, and why: links, and those whose name a later member has."""
        self.problem: str | None = None
        """What is wrong with it, where it is cut or broken; the members before that are whole."""
        self._file = _unpacked(path) if path.name.lower().endswith((".gz", ".tgz")) else path.open("rb")
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for info in tar:
                    self._note(info)
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep what is kept here
                self._file.seek(tar.offset)
                mark = self._file.read(_BLOCK)
                if len(mark) < _BLOCK or any(mark):  # tarfile takes a broken header for the end
                    self.problem = f"the tar has no end mark and breaks off at byte {tar.offset}"
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            self.problem = f"the tar is cut or broken: {error}"

    def _note(self, info: tarfile.TarInfo) -> None:
        name = os.path.normpath(info.name).lstrip("/")  # as tar extracts absolute names
        if info.isreg() and not info.issparse():
            if name in self.members:
                self.unread.append(Leftover(name, "a later member of the tar has this name"))
            self.members[name] = (info.offset_data, info.size)
        elif not info.isdir():
            self.unread.append(Leftover(name, "links and special files in a tar are not read"))

    def read(self, member: str, most: int = MAX_BYTES) -> bytes:
        """The bytes of a member; Rejected when they are more, or the tar ends before them. Threads may call it."""
        offset, size = self.members[member]
        _check_size(member, size, most)
        data = os.pread(self._file.fileno(), size, offset)
        while len(data) < size and (piece := os.pread(self._file.fileno(), size - len(data), offset + len(data))):
            data += piece
        if len(data) < size:
            raise Rejected(RejectReason.TRUNCATED, "the tar ends in the middle of it")
        return data


def _unpacked(path: Path) -> BinaryIO:
    """What a gzipped file holds; of a damaged one the part before the damage."""
    plain = tempfile.TemporaryFile()  # noqa: SIM115
    with gzip.open(path) as packed:
        try:
            shutil.copyfileobj(packed, plain)
        except (OSError, EOFError) as error:
            if isinstance(error, OSError) and error.errno:  # of the disk, not of gzip
                raise InvalidInputError(
                    f"cannot unpack {path} into {tempfile.gettempdir()} ({os.strerror(error.errno)}); "
                    "name another folder by TMPDIR, or unpack it with gunzip"
                ) from error
    plain.flush()
    plain.seek(0)
    return plain  # type: ignore[return-value]


def tar_listing(path: Path) -> Tar:
    """The listing of a tar; the last few are kept while the file stays as it is."""
    state = path.stat()
    return _listing(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(_TARS_KEPT)
def _listing(path: Path, mtime_ns: int, size: int) -> Tar:
    return Tar(path)
