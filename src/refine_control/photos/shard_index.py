"""`index.jsonl` of a folder of shards, written and read a few lines at a time: memory does not grow with the samples.

A line is the record of one sample: `shard`, `key`, `photo`, `shape`, `source`, `license`, and `members`, where each
file of the sample lies and its sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from refine_control.errors import DamagedError
from refine_control.storage import TEMPORARY, fsync_path, storage_errors

INDEX = "index.jsonl"
_LINES = 16
"""Lines that are read, and checked, together."""


class IndexWriter:
    """Collects the records of `folder` in a temporary file, which `publish` gives its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder / f".{INDEX}.{os.getpid()}{TEMPORARY}"
        self._file: BinaryIO | None = None

    def write(self, records: Iterable[dict[str, Any]]) -> None:
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


class Index(Sequence[dict[str, Any]]):
    """The records of a folder's index, each read when it is asked for; less than a byte a record is held.

    Holds no open file. Raises DamagedError where the file has not the given sha256, or changes later."""

    def __init__(self, folder: Path, sha256: str) -> None:
        self.folder, self._count = folder, 0
        self._starts, self._sums = array("Q", [0]), array("I")
        whole, block, end = hashlib.sha256(), 0, 0
        with (folder / INDEX).open("rb") as lines:
            for self._count, line in enumerate(lines, 1):
                whole.update(line)
                block, end = zlib.crc32(line, block), end + len(line)
                if self._count % _LINES == 0:
                    block = self._close(block, end)
        if self._count % _LINES:
            self._close(block, end)
        if whole.hexdigest() != sha256:
            raise self._damaged()

    def _close(self, block: int, end: int) -> int:
        """Notes a block of lines that ends at byte `end`; the checksum of an empty one."""
        self._starts.append(end)
        self._sums.append(block)
        return 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        place = range(self._count)[index]
        with (self.folder / INDEX).open("rb") as file:
            return json.loads(self._lines(file, place // _LINES)[place % _LINES])

    def __iter__(self) -> Iterator[dict[str, Any]]:
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
