"""`data build`: a source of photos -> shards in out/labeled, out/unlabeled and out/test, and out/rejects.jsonl.

The split is by photograph, never by mask, and hits the shares to the nearest photograph; see `photos.survey` for what
one photograph is and what happens to the roles when the set grows.

Killed anywhere, the same command ends with the same bytes. `build.json` (the parameters, and the sha256 of
everything that is read) is written first; the entries of a role are taken in runs of `samples_per_shard`, each
run becomes one shard and then one record under `.parts`; a run with a record is not done again. `manifest.json`
is written last. A shard is therefore shorter than `samples_per_shard` by the rejects of its run. Photos are read,
resized and encoded by `workers` processes; the bytes do not depend on how many.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from refine_control.conditions.condition import find_condition
from refine_control.errors import InvalidInputError
from refine_control.folders import Kind, refuse_output_kind
from refine_control.photos.buckets import Size, nearest, sizes_for
from refine_control.photos.load import load
from refine_control.photos.shard_index import SampleRecord
from refine_control.photos.shards import (
    IMAGE_FORMATS,
    MADE_BY,
    Shards,
    ShardWriter,
    encode,
    open_manifest,
    write_manifest,
)
from refine_control.photos.sources import entries
from refine_control.photos.survey import Survey, split, survey
from refine_control.progress import Progress
from refine_control.records import INPAINT, LABELED, ROLES, Entry, Photo, Rejected, RejectReason, Row
from refine_control.storage import (
    MANIFEST,
    TEMPORARY,
    only_writer,
    sha256_file,
    storage_errors,
    write_atomic,
    write_json,
)
from refine_control.workers import InOrder
from refine_control.workers import workers as worker_processes

PARAMETERS = "build.json"
REJECTS = "rejects.jsonl"
FORMAT = 2
"""Raised when the same parameters no longer give the same bytes."""
_PARTS = ".parts"
_LATER = {"buckets": False, "condition": INPAINT, "preparer": None}
"""Parameters that are named only where they differ, so that earlier builds stay what they were."""


@dataclass(frozen=True)
class Parameters:
    """Everything the bytes of a build depend on, besides the source."""

    size: int = 64
    """Side of a sample in pixels, a multiple of 8, 8 to 4096; of 16 with buckets."""
    test_fraction: float = 0.2
    """Share of the photographs that go to `test`, 0 to 1."""
    unlabeled_fraction: float = 0.5
    """Share of the other photographs that go to `unlabeled`, 0 to 1."""
    seed: int = 0
    image_format: str = "webp"
    """webp (lossless), png, or jpg."""
    limit: int | None = None
    """Only the first so many entries."""
    samples_per_shard: int = 1000
    enlarge: bool = False
    """Whether photos smaller than `size` are enlarged rather than refused."""
    buckets: bool = False
    """Whether samples have the sizes of `buckets.sizes_for(size)`, each the nearest to its photo's shape."""
    condition: str = INPAINT
    """What a ControlNet is shown, a kind of `conditions`."""
    preparer: str | None = None
    """Hub id or folder of the model that makes the condition pictures that are not given."""

    def __post_init__(self) -> None:
        for name in ("test_fraction", "unlabeled_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.size % 8 or not 8 <= self.size <= 4096:
            raise InvalidInputError(f"size is {self.size}; it must be a multiple of 8 between 8 and 4096")
        if self.image_format not in IMAGE_FORMATS:
            raise InvalidInputError(f"image_format is {self.image_format!r}; choose {', '.join(IMAGE_FORMATS)}")
        if self.samples_per_shard < 1 or (self.limit is not None and self.limit < 1):
            raise InvalidInputError("samples_per_shard and limit must be at least 1")
        if self.buckets:
            sizes_for(self.size)  # raises for a size that is no multiple of 16
        _ = self.prepares  # raises for a condition that is not there, and for a model that it does not take

    @property
    def prepares(self) -> bool:
        """Whether condition pictures that are not given are made."""
        return find_condition(self.condition).preparation(self.preparer) is not None

    @property
    def sizes(self) -> int | list[Size]:
        """What `photos.load` takes."""
        return sizes_for(self.size) if self.buckets else self.size

    def fits(self, width: int, height: int) -> bool:
        """Whether a photo is large enough for its sample."""
        h, w = nearest(width, height, sizes_for(self.size)) if self.buckets else (self.size, self.size)
        return self.enlarge or (width >= w and height >= h)

    def as_dict(self) -> Row:
        """For manifests."""
        return {name: value for name, value in asdict(self).items() if name not in _LATER or value != _LATER[name]}


@dataclass(frozen=True)
class BuildSummary:
    """The result of a build: entries = all samples + all rejects, those of left-out files included."""

    out: Path
    entries: int
    samples: dict[str, int]
    """By role."""
    photos: dict[str, int]
    """Photographs with at least one sample, by role."""
    rejects: dict[str, int]
    """By reason code."""
    seconds: float
    did_nothing: bool = False
    """True where an earlier run finished all of it."""

    def __str__(self) -> str:
        roles = ", ".join(f"{role} {self.samples[role]} ({self.photos[role]} photos)" for role in self.samples)
        rejected = f"rejected {sum(self.rejects.values())}" + ": " * bool(self.rejects) + _listed(self.rejects)
        done = f"{self.out} was already built; nothing to do" if self.did_nothing else f"built in {self.seconds:.1f} s"
        return f"{self.entries} entries -> {sum(self.samples.values())} samples: {roles}\n{rejected}\n{done}"


def _listed(rejects: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(rejects.items()))


class _Part(TypedDict):
    """The record of a run of entries that is done."""

    records: list[SampleRecord]
    rejects: list[Row]
    shard_sha256: str | None
    """None without records."""


def build(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    **parameters: Any,
) -> BuildSummary:
    """Builds or continues `out` from `source` (see `photos.sources`); `parameters` are those of `Parameters`.

    `images` is the folder of COCO's photos where it is not that of the JSON. Does nothing where the same build is
    already there. Raises InvalidInputError for a source without usable photos, and for an `out` made from another
    source or with other parameters; InUseError while another process builds there; DamagedError where what an
    earlier run finished is no longer whole; WorkerDiedError when a worker dies: the same command then continues."""
    started = time.monotonic()
    source, out, chosen = Path(source), Path(out), Parameters(**parameters)
    with worker_processes(workers) as in_order:
        taken = {"limit": chosen.limit, "fits": chosen.fits, "condition": chosen.condition}
        surveyed = survey(source, in_order, images=images, prepared=chosen.prepares, **taken)
        if not surveyed.photos:
            others = f", only others such as {surveyed.left_out[0].image}" if surveyed.left_out else ""
            raise InvalidInputError(
                f"no photo was found in {source}{others}; want a manifest.jsonl, tars, or name.jpg files"
            )
        expected = {**chosen.as_dict(), "format": FORMAT, "source_sha256": surveyed.sha256}
        _check_folder(out, expected)
        with only_writer(out):
            _check_folder(out, expected)  # again: nobody else can change it now
            done = (out / MANIFEST).is_file()
            if not done:
                if not (out / PARAMETERS).is_file():
                    write_json(out / PARAMETERS, {**expected, "entries": surveyed.count, "made_by": MADE_BY})
                _Build(source, images, out, chosen, surveyed, in_order, progress).run()
            with storage_errors(out):
                shutil.rmtree(out / _PARTS, ignore_errors=True)
            return _summary(out, time.monotonic() - started, done)


def _check_folder(out: Path, expected: Row) -> None:
    """Refuses an `out` that is anything but this build, begun or done.

    What is left out of a source is no part of `expected`: no shard depends on it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InvalidInputError(f"{out} is a file; name a folder")
    refuse_output_kind(out, Kind.BUILD)
    path = out / PARAMETERS
    if not path.is_file():
        strangers = [each.name for each in out.iterdir() if each.name != ".lock" and not each.name.endswith(TEMPORARY)]
        if strangers:
            raise InvalidInputError(f"{out} holds {min(strangers)!r} and is not a build; name a new folder")
        return
    try:
        there = {**_LATER, **json.loads(path.read_bytes())}
    except (ValueError, TypeError):
        raise InvalidInputError(f"{path} cannot be read; delete {out} and build it again") from None
    now = {**_LATER, **expected}
    if there["condition"] != now["condition"]:  # which parts of the source are read depends on it
        now = {"condition": now["condition"]}
    differing = [
        f"{key.replace('source_sha256', 'the content of the source')} ({there.get(key)} there, {value} now)"
        for key, value in now.items()
        if there.get(key) != value
    ]
    if differing:
        raise InvalidInputError(f"{out} was built differently: {', '.join(differing)}; delete it or name a new folder")


@dataclass
class _Build:
    """What is built, from what, and how."""

    source: Path
    images: Path | None
    out: Path
    chosen: Parameters
    surveyed: Survey
    in_order: InOrder
    progress: Progress | None
    finished: int = 0
    """Entries that are samples or rejects by now."""

    def run(self) -> None:
        """Every role's shards, then the rejects, then the manifest of the whole."""
        chosen, surveyed = self.chosen, self.surveyed
        described = {"parameters": chosen.as_dict(), "source_sha256": surveyed.sha256}
        roles = split(surveyed.usable, chosen.seed, chosen.test_fraction, chosen.unlabeled_fraction)
        rejects: list[Row] = []
        for role in ROLES:
            writer = ShardWriter(
                self.out / role,
                role,
                chosen.samples_per_shard,
                chosen.image_format,
                several_sizes=chosen.buckets,
                condition=chosen.condition,
            )
            coming = self._entries(role, roles)
            runs = iter(lambda coming=coming: list(itertools.islice(coming, chosen.samples_per_shard)), [])
            for number, run in enumerate(runs):
                rejects += self._run(writer, run, self.out / _PARTS / f"{role}-{number:05d}.json")
            writer.finish(**described)
        rejects.sort(key=lambda line: line["row"])
        all_rejected = len(rejects) == len(surveyed.photos)
        rejects += [_reject_line(each, *each.problem) for each in surveyed.left_out if each.problem is not None]
        write_atomic(self.out / REJECTS, "".join(json.dumps(line, sort_keys=True) + "\n" for line in rejects))
        reasons = dict(Counter(line["reason"] for line in rejects))
        if all_rejected:
            where = f"{_listed(reasons)}; see {self.out / REJECTS}"
            raise InvalidInputError(f"all {surveyed.count} entries of {self.source} were rejected: {where}")
        facts = {"kind": "build", "entries": surveyed.count, "rejects": reasons, **described}
        write_manifest(self.out, facts, [PARAMETERS, REJECTS, *(f"{role}/{MANIFEST}" for role in ROLES)])

    def _entries(self, role: str, roles: dict[str, str]) -> Iterator[tuple[int, Entry]]:
        """The entries of a role by row; those of photographs that cannot be used are refused with `labeled`."""
        photos = self.surveyed.photos
        left_out = lambda entry: None  # noqa: E731 - the survey has them already
        coming = entries(self.source, self.images, left_out, self.chosen.condition)
        for row, (entry, photo) in enumerate(zip(coming, photos, strict=False)):
            if roles.get(photo, LABELED) == role:
                yield row, entry

    def _run(self, writer: ShardWriter, run: list[tuple[int, Entry]], path: Path) -> list[Row]:
        """Makes the shard of a run of entries, unless it is there with its record `path`; the rejects of the run."""
        part = _read_part(path, writer.folder)
        if part is not None:
            if part["records"]:
                writer.adopt(part["records"])
            for _ in run:
                self._report()
            return part["rejects"]
        rejects: list[Row] = []
        making = functools.partial(_sample, self.chosen, writer.role)
        tasks = ((entry, self.surveyed.photos[row]) for row, entry in run)
        for (row, entry), sample in zip(run, self.in_order(making, tasks), strict=True):
            if isinstance(sample, Rejected):
                rejects.append({"row": row, **_reject_line(entry, sample.reason, sample.detail)})
            else:
                writer.add(*sample)
            self._report()
        records = writer.cut()
        with storage_errors(self.out):
            path.parent.mkdir(exist_ok=True)
        sha256 = _shard_sha256(writer.folder, records)
        write_json(path, {"rejects": rejects, "records": records, "shard_sha256": sha256})
        return rejects

    def _report(self) -> None:
        self.finished += 1
        if self.progress is not None:
            self.progress(self.finished, len(self.surveyed.photos))


def _reject_line(entry: Entry, reason: RejectReason, detail: str) -> Row:
    """A line of `rejects.jsonl`; without a `row` for what was left out."""
    return {"key": entry.key, "path": entry.image, "reason": reason.value, "detail": detail}


def _sample(chosen: Parameters, role: str, task: tuple[Entry, str]) -> tuple[Photo, dict[str, bytes]] | Rejected:
    """Loads and encodes an entry of the photograph that the task names: the sample with its files."""
    entry, photo = task
    try:
        how = {"condition": chosen.condition, "preparer": chosen.preparer}
        loaded = load(entry, chosen.sizes, enlarge=chosen.enlarge, **how)
    except Rejected as error:
        return error
    named = replace(loaded, meta={**loaded.meta, "photo": photo})
    return named, encode(named, role, chosen.image_format)


def _shard_sha256(folder: Path, records: list[SampleRecord]) -> str | None:
    path = folder / records[0]["shard"] if records else None
    return sha256_file(path) if path is not None and path.is_file() else None


def _read_part(path: Path, folder: Path) -> _Part | None:
    """The record of a run that is done and whose shard is whole, None where it must be done (again)."""
    try:
        part = json.loads(path.read_bytes())
        whole = part["shard_sha256"] == _shard_sha256(folder, part["records"])
        return part if whole and (part["shard_sha256"] or not part["records"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _summary(out: Path, seconds: float, did_nothing: bool) -> BuildSummary:
    """Read back from what was published; a damaged manifest, index or a cut shard raises DamagedError."""
    whole = open_manifest(out)
    manifests = {role: Shards(out / role).manifest for role in ROLES}
    samples = {role: manifest["samples"] for role, manifest in manifests.items()}
    photos = {role: manifest["photos"] for role, manifest in manifests.items()}
    return BuildSummary(out, whole["entries"], samples, photos, whole["rejects"], seconds, did_nothing)
