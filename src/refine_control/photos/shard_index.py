"""`index.jsonl` of a folder of shards, written and read a few lines at a time: memory does not grow with the samples.

A line is the record of one sample.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypedDict

from refine_control.errors import DamagedError
from refine_control.storage import TEMPORARY, fsync_path, storage_errors

INDEX = "index.jsonl"
_LINES = 16
"""Lines that are read, and checked, together."""


class SampleRecord(TypedDict):
    """A line of the index."""

    shard: str
    key: str
    photo: str
    shape: list[int]
    """[H, W]."""
    source: str
    license: str
    members: dict[str, tuple[int, int, str]]
    """Of each file by extension: its first byte in the shard, its length and its sha256."""


class IndexWriter:
    """Collects the records of `folder` in a temporary file, which `publish` gives its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder / f".{INDEX}.{os.getpid()}{TEMPORARY}"
        self._file: BinaryIO | None = None

    def write(self, records: Iterable[SampleRecord]) -> None:
        """Appends a line for each record. Raises StorageError when the disk refuses."""
        with storage_errors(self.folder):
            self._opened().writelines(json.dumps(record, sort_keys=True).encode() + b"\n" for record in records)

    def publish(self) -> None:
        """Makes what has been written the index. Raises StorageError when the disk refuses."""
        with storage_errors(self.folder):
            file, self._file = self._opened(), None
            with file:
                file.flush()
                os.fsync(file.fileno())
            self._temporary.replace(self.folder / INDEX)
            fsync_path(self.folder)

    def _opened(self) -> BinaryIO:
        self._file = self._file or self._temporary.open("wb")
        return self._file


class Index(Sequence[SampleRecord]):
    """The records of a folder's index, each read when it is asked for; less than a byte a record is held.

    Holds no open file. Raises DamagedError where the file has not the given sha256, or changes later."""

    def __init__(self, folder: Path, sha256: str) -> None:
        self.folder, self._count = folder, 0
        self._starts, self._sums = array("Q", [0]), array("I")
        whole = hashlib.sha256()
        with (folder / INDEX).open("rb") as lines:
            while block := list(itertools.islice(lines, _LINES)):
                data = b"".join(block)
                whole.update(data)
                self._count += len(block)
                self._starts.append(self._starts[-1] + len(data))
                self._sums.append(zlib.crc32(data))
        if whole.hexdigest() != sha256:
            raise self._damaged()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> SampleRecord:  # type: ignore[override]
        place = range(self._count)[index]
        with (self.folder / INDEX).open("rb") as file:
            return json.loads(self._lines(file, place // _LINES)[place % _LINES])

    def __iter__(self) -> Iterator[SampleRecord]:
        with (self.folder / INDEX).open("rb") as file:
            for block in range(len(self._sums)):
                yield from map(json.loads, self._lines(file, block))

    def _lines(self, file: BinaryIO, block: int) -> list[bytes]:
        start, end = self._starts[block], self._starts[block + 1]
        file.seek(start)
        data = file.read(end - start)
        if zlib.crc32(data) != self._sums[block]:
            raise self._damaged()
        return data.splitlines()

    def _damaged(self) -> DamagedError:
        return DamagedError(f"{self.folder / INDEX} is damaged; delete {self.folder} and build it again")
