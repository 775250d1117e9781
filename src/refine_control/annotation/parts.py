"""What of an annotation is done, photo by photo, and of which bytes: the same command again does only the rest.

A part of `PHOTOS_PER_PART` photos that is done is a file under `.parts`. When all are done, `rejects.jsonl`,
`photos.jsonl` and, last, `manifest.jsonl` are written from the parts.

Each photo has a mark: size and times of its files before they were read, and the hash of their bytes. A photo whose
files still have that size and these times counts as unchanged; only the others are hashed. A photo with other bytes is
annotated again: the published rows go back into parts, and stay published until the new ones replace them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from refine_control.errors import InvalidInputError
from refine_control.photos.files import locate, read_bytes
from refine_control.photos.sources import MANIFEST_NAME
from refine_control.records import Entry, Rejected, RejectReason
from refine_control.storage import TEMPORARY, open_atomic, storage_errors, write_atomic

PHOTOS_PER_PART = 16
REJECTS = "rejects.jsonl"
MARKS = "photos.jsonl"
_PARTS, _PART = ".parts", "{:07d}.json"
_REOPENED = "reopened"
_ABSENT = "-"
_Item = TypeVar("_Item")


class Part(NamedTuple):
    """Photos out of PHOTOS_PER_PART consecutive ones, each with its entries."""

    number: int
    photos: list[list[Entry]]
    places: list[int]
    """Which of the consecutive ones they are."""
    size: int
    """How many the consecutive ones are."""


ManifestRow = dict[str, Any]
"""A line of the manifest: what is known of a region, and whatever else the source says of it."""


@dataclass(frozen=True)
class Mark:
    """What a photo was when it was annotated."""

    files: list[Any]
    """Of `states`."""
    content: str
    """Of `Contents.whole`."""


@dataclass(frozen=True)
class Reject:
    """A line of `rejects.jsonl`."""

    key: str
    path: str
    reason: str
    """A code of `RejectReason`."""
    detail: str


@dataclass(frozen=True)
class Done:
    """One photo that has been annotated."""

    mark: Mark
    rows: list[ManifestRow]
    rejects: list[Reject]


class Contents(NamedTuple):
    """Hashes of a photo's bytes, and of the region of each of its entries where regions are given."""

    photo: str
    regions: list[str]

    @property
    def whole(self) -> str:
        return _hash(" ".join([self.photo, *self.regions]).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash_file(root: Path, name: str | None) -> str:
    with contextlib.suppress(Rejected):
        return _ABSENT if name is None else _hash(read_bytes(root, name))
    return _ABSENT


def contents(group: Sequence[Entry], given: bool) -> Contents:
    """What the files of a photo hold; with `given` its masks and segmentations count too."""
    first = group[0]
    regions = [_hash_file(each.root, each.mask) + _drawn(each) for each in group] if given else []
    return Contents(_hash_file(first.root, first.image), regions)


def _drawn(entry: Entry) -> str:
    return "" if entry.segmentation is None else _hash(json.dumps(entry.segmentation, sort_keys=True).encode())


def states(group: Sequence[Entry], given: bool) -> list[Any]:
    """What can be said of a photo's files without reading them, as JSON: size and times, None for what is absent."""
    names = [group[0].image, *(each.mask for each in group if given and each.mask)]
    drawn = [_drawn(each) for each in group if given and each.segmentation is not None]
    return [*(_state(group[0].root, name) for name in names), *drawn]


def _state(root: Path, name: str) -> list[int] | None:
    with contextlib.suppress(Rejected, OSError):
        state = locate(root, name).path.stat()
        return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    return None


def _still(mark: Mark, group: Sequence[Entry], given: bool) -> Mark | None:
    """The mark as it is now; None where the photo has other bytes than when it was annotated."""
    now = states(group, given)
    if now == mark.files:
        return mark
    return replace(mark, files=now) if contents(group, given).whole == mark.content else None


def _failed(done: Done) -> bool:
    """Whether a model refused the photo or failed on it."""
    return any(reject.reason == RejectReason.MODEL_FAILED.value for reject in done.rejects)


class Parts:
    """The parts of one annotation in `out`; hold `storage.only_writer` around it.

    `photos()` iterates over the source; `given`: its regions are annotated; `retry_failed`: photos that a model failed
    on are done again. Raises StorageError when the disk refuses, InvalidInputError where published files lack lines."""

    def __init__(
        self, out: Path, photos: Callable[[], Iterator[list[Entry]]], given: bool, retry_failed: bool = False
    ) -> None:
        self.out, self.photos, self.given, self.retry_failed = out, photos, given, retry_failed
        self.folder = out / _PARTS
        self.changed = 0
        """How many photos of a finished annotation have other bytes now."""
        self.dropped: set[str] = set()
        """The ids of their rows."""

    def begin(self) -> bool:
        """Whether anything is to be done: all of it, the rest of it, or the photos that have changed."""
        with storage_errors(self.out):
            if not (self.out / MANIFEST_NAME).is_file() or (self.folder / _REOPENED).is_file():
                self.folder.mkdir(exist_ok=True)
                return True
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                changed = self._changed()
                to_do = len(changed) > 0 or (self.retry_failed and any(map(_failed, self._published())))
                if to_do:
                    self._reopen(changed)
                return to_do
            except InvalidInputError:  # of the source
                raise
            except (FileNotFoundError, ValueError, KeyError, TypeError, RuntimeError):
                raise InvalidInputError(
                    f"{self.out} lacks lines of {MARKS}, {REJECTS} or {MANIFEST_NAME}; delete it and annotate again"
                ) from None

    def missing(self, skipped: Callable[[int], None]) -> Iterator[Part]:
        """What is to be done; `skipped` is called with the number of photos of every part that is done."""
        for number, chunk in enumerate(_batched(self.photos())):
            previous = zip(self._read(number, len(chunk)), chunk, strict=True)
            places = [
                i
                for i, (done, group) in enumerate(previous)
                if not done or (self.retry_failed and _failed(done)) or not _still(done.mark, group, self.given)
            ]
            if places:
                yield Part(number, [chunk[place] for place in places], places, len(chunk))
            else:
                skipped(len(chunk))

    def add(self, part: Part, results: Iterable[Done | None]) -> None:
        """Keeps the results of a part beside what is done of it already; None is a photo that is still to be done.

        Where a photo is retried because a model failed on it, its former rows stay: people may have decided on them."""
        photos = self._read(part.number, part.size)
        for place, done in zip(part.places, results, strict=True):
            previous = photos[place]
            if done and previous and previous.mark.content == done.mark.content:
                former = {row["id"]: row for row in previous.rows}
                done = replace(done, rows=[former.get(row["id"], row) for row in done.rows])
            photos[place] = done or previous
        self._write(part.number, photos)

    def publish(self, header: ManifestRow, count: int) -> None:
        """The parts of `count` photos in their order as rejects, marks and, last, the manifest; then the parts go."""
        for name, first, lines_of in (
            (REJECTS, [], lambda done: map(asdict, done.rejects)),
            (MARKS, [], lambda done: [_marked(done.mark, len(done.rows), len(done.rejects))]),
            (MANIFEST_NAME, [header], lambda done: done.rows),
        ):
            with open_atomic(self.out / name) as file:
                _write_lines(file, first)
                for start in range(0, count, PHOTOS_PER_PART):
                    for done in self._read(start // PHOTOS_PER_PART, min(PHOTOS_PER_PART, count - start)):
                        _write_lines(file, lines_of(done))
        with storage_errors(self.out):
            (self.folder / _REOPENED).unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def _read(self, number: int, size: int) -> list[Done | None]:
        """What is done of a part of `size` photos, a Done each; None for what is not."""
        try:
            photos = json.loads((self.folder / _PART.format(number)).read_bytes())["photos"]
            done = [
                each and Done(Mark(**each["mark"]), each["rows"], [Reject(**reject) for reject in each["rejects"]])
                for each in photos
            ]
        except (OSError, ValueError, KeyError, TypeError):
            done = []
        return done if len(done) == size else [None] * size

    def _write(self, number: int, photos: Sequence[Done | None]) -> None:
        content = [photo and asdict(photo) for photo in photos]
        write_atomic(self.folder / _PART.format(number), json.dumps({"photos": content}, sort_keys=True))

    def _changed(self) -> Sequence[int]:
        """The numbers of the published photos that have other bytes now; where there is none, the marks are renewed."""
        changed, touched = array("Q"), False
        temporary = self.out / f".{MARKS}{TEMPORARY}"
        with temporary.open("wb") as file, (self.out / MARKS).open() as lines:
            for number, (group, line) in enumerate(zip(self.photos(), lines, strict=True)):
                mark, *counts = _unmarked(line)
                now = _still(mark, group, self.given)
                touched = touched or now != mark
                if now is None:
                    changed.append(number)
                _write_lines(file, [_marked(now or mark, *counts)])
        if touched and not changed:
            temporary.replace(self.out / MARKS)
        temporary.unlink(missing_ok=True)
        return changed

    def _reopen(self, changed: Sequence[int]) -> None:
        """Turns what was published into parts, which lack the photos that have changed."""
        anew = set(changed)
        self.folder.mkdir()
        for number, chunk in enumerate(_batched(enumerate(self._published()))):
            self._write(number, [None if i in anew else done for i, done in chunk])
            self.dropped.update(row["id"] for i, done in chunk if i in anew for row in done.rows)
        self.changed = len(anew)
        write_atomic(self.folder / _REOPENED, "")

    def _published(self) -> Iterator[Done]:
        """Every photo as it was published."""
        names = (MARKS, MANIFEST_NAME, REJECTS)
        with contextlib.ExitStack() as stack:
            marks, rows, rejects = (stack.enter_context((self.out / name).open()) for name in names)
            next(rows)
            for mark, num_rows, num_rejects in map(_unmarked, marks):
                of_photo = [json.loads(next(rows)) for _ in range(num_rows)]
                yield Done(mark, of_photo, [Reject(**json.loads(next(rejects))) for _ in range(num_rejects)])


def _marked(mark: Mark, rows: int, rejects: int) -> Mapping[str, Any]:
    """A line of `photos.jsonl`."""
    return {**asdict(mark), "rows": rows, "rejects": rejects}


def _unmarked(line: str) -> tuple[Mark, int, int]:
    """The mark of a line of `photos.jsonl`, and how many rows and rejects the photo has."""
    values = json.loads(line)
    return Mark(values["files"], values["content"]), values["rows"], values["rejects"]


def _batched(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    while chunk := list(itertools.islice(items, PHOTOS_PER_PART)):
        yield chunk


def _write_lines(file: BinaryIO, values: Iterable[Mapping[str, Any]]) -> None:
    file.writelines(json.dumps(value, sort_keys=True).encode() + b"\n" for value in values)
