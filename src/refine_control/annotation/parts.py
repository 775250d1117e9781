"""What of an annotation is done, photo by photo, and of which bytes: so the same command again does only the rest.

Photos are taken in parts of `PHOTOS_PER_PART`. A part that is done is a file under `.parts`, which a later run takes
over; `manifest.jsonl`, `rejects.jsonl` and `photos.jsonl` are put together from the parts, the manifest last.

Each photo has a mark: size and times of its files as they were before they were read, and the hash of their bytes.
The hash costs nothing where the photo is annotated, for its bytes are read there anyway. To compare it again a run
would have to read the whole source, half a megabyte a photo; so a photo whose files have the size and times of the
mark is taken for the same, and only the others are hashed. Where the bytes differ the photo is annotated anew: when
all was done already, the published rows go back into parts, and stay published until the new ones take their place.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from refine_control.errors import InvalidInputError
from refine_control.photos.files import locate, read_bytes
from refine_control.photos.sources import MANIFEST_NAME
from refine_control.records import Entry, Rejected, RejectReason
from refine_control.storage import TEMPORARY, fsync_path, storage_errors, write_atomic

PHOTOS_PER_PART = 16
REJECTS = "rejects.jsonl"
MARKS = "photos.jsonl"
_PARTS = ".parts"
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


class Mark(NamedTuple):
    """What a photo was when it was annotated."""

    files: list[Any]
    """Of `states`."""
    content: str
    """Of `Contents.whole`."""


class Reject(NamedTuple):
    """A line of `rejects.jsonl`."""

    key: str
    path: str
    reason: str
    """A code of `RejectReason`."""
    detail: str


class Done(NamedTuple):
    """One photo that has been annotated."""

    mark: Mark
    rows: list[ManifestRow]
    rejects: list[Reject]


def _as_json(done: Done) -> dict[str, Any]:
    rejects = [reject._asdict() for reject in done.rejects]
    return {"mark": done.mark._asdict(), "rows": done.rows, "rejects": rejects}


def _from_json(mark: dict[str, Any], rows: list[ManifestRow], rejects: list[dict[str, Any]]) -> Done:
    return Done(Mark(**mark), rows, [Reject(**reject) for reject in rejects])


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
    try:
        return _ABSENT if name is None else _hash(read_bytes(root, name))
    except Rejected:
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
    try:
        state = locate(root, name).path.stat()
    except (Rejected, OSError):
        return None
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _still(mark: Mark, group: Sequence[Entry], given: bool) -> Mark | None:
    """The mark as it is now; None where the photo has other bytes than when it was annotated."""
    now = states(group, given)
    if now == mark.files:
        return mark
    return mark._replace(files=now) if contents(group, given).whole == mark.content else None


def _failed(done: Done) -> bool:
    """Whether a model refused the photo or failed on it."""
    return any(reject.reason == RejectReason.MODEL_FAILED.value for reject in done.rejects)


class Parts:
    """The parts of one annotation in `out`; hold `storage.only_writer` around it.

    `photos()` goes through the source; `given`: its regions are what is annotated; `retry_failed`: photos that a model
    failed on are to be done again. Raises StorageError when the disk refuses, InvalidInputError where what was
    published is not whole."""

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
        published = (self.out / MANIFEST_NAME).is_file()
        with storage_errors(self.out):
            if published and not (self.folder / _REOPENED).is_file():
                shutil.rmtree(self.folder, ignore_errors=True)
                return self._reopen_where_changed()
            self.folder.mkdir(exist_ok=True)
        return True

    def _reopen_where_changed(self) -> bool:
        try:
            changed = self._changed()
            failed = self.retry_failed and any(map(_failed, self._published()))
            if changed or failed:
                self._reopen(changed)
        except InvalidInputError:  # of the source
            raise
        except (FileNotFoundError, ValueError, KeyError, TypeError, RuntimeError):
            raise InvalidInputError(
                f"{self.out} lacks lines of {MARKS}, {REJECTS} or {MANIFEST_NAME}; delete it and annotate again"
            ) from None
        return len(changed) > 0 or failed

    def missing(self, skipped: Callable[[int], None]) -> Iterator[Part]:
        """What is to be done; `skipped` is called with the number of photos of every part that is done."""
        for number, chunk in enumerate(_batched(self.photos())):
            previous = zip(self._read(number, len(chunk)), chunk, strict=True)
            places = [i for i, (done, group) in enumerate(previous) if not (done and self._stands(done, group))]
            if places:
                yield Part(number, [chunk[place] for place in places], places, len(chunk))
            else:
                skipped(len(chunk))

    def _stands(self, done: Done, group: Sequence[Entry]) -> bool:
        """Whether a photo need not be done again."""
        return not (self.retry_failed and _failed(done)) and _still(done.mark, group, self.given) is not None

    def add(self, part: Part, results: Iterable[Done | None]) -> None:
        """Keeps the results of a part beside what is done of it already; None is a photo that is still to be done.

        Where a photo is retried because a model failed on it, its former rows stay: people may have decided on them."""
        photos = self._read(part.number, part.size)
        for place, done in zip(part.places, results, strict=True):
            previous = photos[place]
            if done and previous and previous.mark.content == done.mark.content:
                former = {row["id"]: row for row in previous.rows}
                done = done._replace(rows=[former.get(row["id"], row) for row in done.rows])
            photos[place] = done or previous
        self._write(part.number, photos)

    def publish(self, header: dict[str, Any], count: int) -> None:
        """The parts of `count` photos in their order as rejects, marks and, last, the manifest; then the parts go."""
        for name, first, lines_of in (
            (REJECTS, [], lambda done: _as_json(done)["rejects"]),
            (MARKS, [], lambda done: [_marked(done.mark, len(done.rows), len(done.rejects))]),
            (MANIFEST_NAME, [header], lambda done: done.rows),
        ):
            with publishing(self.out / name) as file:
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
            photos = json.loads(self._file(number).read_bytes())["photos"]
            done = [None if photo is None else _from_json(**photo) for photo in photos]
        except (OSError, ValueError, KeyError, TypeError):
            done = []
        return done if len(done) == size else [None] * size

    def _write(self, number: int, photos: Sequence[Done | None]) -> None:
        content = [None if photo is None else _as_json(photo) for photo in photos]
        write_atomic(self._file(number), json.dumps({"photos": content}, sort_keys=True))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:07d}.json"

    def _changed(self) -> Sequence[int]:
        """The numbers of the published photos that have other bytes now; where there is none, the marks are renewed."""
        changed, touched = array("Q"), False
        temporary = self.out / f".{MARKS}{TEMPORARY}"
        with temporary.open("w") as file, (self.out / MARKS).open() as lines:
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


def _marked(mark: Mark, rows: int, rejects: int) -> dict[str, Any]:
    """A line of `photos.jsonl`."""
    return {**mark._asdict(), "rows": rows, "rejects": rejects}


def _unmarked(line: str) -> tuple[Mark, int, int]:
    """The mark of a line of `photos.jsonl`, and how many rows and rejects the photo has."""
    values = json.loads(line)
    return Mark(values["files"], values["content"]), values["rows"], values["rejects"]


def _batched(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    while chunk := list(itertools.islice(items, PHOTOS_PER_PART)):
        yield chunk


def _write_lines(file: TextIO, values: Iterable[dict[str, Any]]) -> None:
    file.writelines(json.dumps(value, sort_keys=True) + "\n" for value in values)


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[TextIO]:
    """A file to write into, which gets its name when all is written."""
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    with storage_errors(path.parent):
        with temporary.open("w") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_path(path.parent)
