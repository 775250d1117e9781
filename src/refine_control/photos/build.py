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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from refine_control.errors import InvalidInputError
from refine_control.folders import Kind, refuse_output_kind
from refine_control.photos.build_parameters import Parameters
from refine_control.photos.load import load
from refine_control.photos.shards import MADE_BY, Shards, ShardWriter, encode, open_manifest, write_manifest
from refine_control.photos.sources import entries
from refine_control.photos.survey import Survey, split, survey
from refine_control.progress import Progress
from refine_control.records import LABELED, ROLES, Entry, Photo, Rejected
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


class _Job(NamedTuple):
    """What is built, and how."""

    source: Path
    images: Path | None
    chosen: Parameters


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
        head = f"{self.entries} entries -> {sum(self.samples.values())} samples: {roles}"
        tail = f"rejected {sum(self.rejects.values())}"
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejects.items()))
        done = f"{self.out} was already built; nothing to do" if self.did_nothing else f"built in {self.seconds:.1f} s"
        return f"{head}\n{tail}{': ' + reasons if reasons else ''}\n{done}"


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
    chosen = Parameters(**parameters)
    job = _Job(Path(source), images, chosen)
    out = Path(out)
    with worker_processes(workers) as in_order:
        surveyed = survey(job.source, in_order, images=images, limit=chosen.limit, fits=chosen.fits)
        if not surveyed.photos:
            others = f", only others such as {surveyed.left_out[0].image}" if surveyed.left_out else ""
            raise InvalidInputError(
                f"no photo was found in {source}{others}; want a manifest.jsonl, tars, or name.jpg files"
            )
        entries_in_all = len(surveyed.photos) + len(surveyed.left_out)
        expected = {**chosen.as_dict(), "format": FORMAT, "source_sha256": surveyed.sha256, "entries": entries_in_all}
        _check_folder(out, expected)
        with only_writer(out):
            _check_folder(out, expected)  # again: nobody else can change it now
            done = (out / MANIFEST).is_file()
            if not done:
                if not (out / PARAMETERS).is_file():
                    write_json(out / PARAMETERS, {**expected, "made_by": MADE_BY})
                _build_roles(job, out, surveyed, in_order, progress)
            with storage_errors(out):
                shutil.rmtree(out / _PARTS, ignore_errors=True)
            return _summary(out, time.monotonic() - started, done)


def _check_folder(out: Path, expected: dict[str, Any]) -> None:
    """Refuses an `out` that is anything but this build, begun or done."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InvalidInputError(f"{out} is a file; name a folder")
    refuse_output_kind(out, Kind.BUILD)
    path = out / PARAMETERS
    if not path.is_file():
        strangers = [each.name for each in out.iterdir() if each.name != ".lock" and not each.name.endswith(TEMPORARY)]
        if strangers:
            raise InvalidInputError(f"{out} holds {sorted(strangers)[0]!r} and is not a build; name a new folder")
        return
    try:
        there, now = ({"buckets": False, **facts} for facts in (json.loads(path.read_bytes()), expected))
        differing = [
            f"{key.replace('source_sha256', 'the content of the source')} ({there.get(key)} there, {value} now)"
            for key, value in now.items()
            if there.get(key) != value
        ]
    except (ValueError, AttributeError, TypeError):
        raise InvalidInputError(f"{path} cannot be read; delete {out} and build it again") from None
    if differing:
        raise InvalidInputError(f"{out} was built differently: {', '.join(differing)}; delete it or name a new folder")


def _build_roles(job: _Job, out: Path, surveyed: Survey, in_order: InOrder, progress: Progress | None) -> None:
    """Every role's shards, then the rejects, then the manifest of the whole."""
    report = progress or (lambda done, total: None)
    chosen, total, count = job.chosen, len(surveyed.photos), itertools.count(1)
    rejects: list[dict[str, Any]] = []
    described = {"parameters": chosen.as_dict(), "source_sha256": surveyed.sha256}
    roles = split(surveyed.usable, chosen.seed, chosen.test_fraction, chosen.unlabeled_fraction)
    for role in ROLES:
        writer = ShardWriter(out / role, role, chosen.samples_per_shard, chosen.image_format, chosen.buckets)
        runs = _batched(_role_entries(role, job, surveyed, roles), chosen.samples_per_shard)
        for number, run in enumerate(runs):
            part = out / _PARTS / f"{role}-{number:05d}.json"
            kept = _kept(part, out / role)
            if kept is None:
                refused = []
                for _ in _add(writer, run, surveyed.photos, chosen, in_order, refused):
                    report(next(count), total)
                kept = {"rejects": refused, "records": writer.cut()}
                kept["shard_sha256"] = _shard_sha256(out / role, kept["records"])
                with storage_errors(out):
                    part.parent.mkdir(exist_ok=True)
                write_json(part, kept)
            else:
                if kept["records"]:
                    writer.adopt(kept["records"])
                for _ in run:
                    report(next(count), total)
            rejects += kept["rejects"]
        writer.finish(**described)
    rejects.sort(key=lambda line: line["row"])
    all_rejected = len(rejects) == total
    rejects += [
        _reject_line(entry, _Refusal(entry.problem[0].value, entry.problem[1]))
        for entry in surveyed.left_out
        if entry.problem is not None
    ]
    total += len(surveyed.left_out)
    write_atomic(out / REJECTS, "".join(json.dumps(line, sort_keys=True) + "\n" for line in rejects))
    reasons = dict(Counter(line["reason"] for line in rejects))
    if all_rejected:
        listed = ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items()))
        raise InvalidInputError(f"all {total} entries of {job.source} were rejected: {listed}; see {out / REJECTS}")
    facts = {"kind": "build", "entries": total, "rejects": reasons, **described}
    write_manifest(out, facts, [PARAMETERS, REJECTS, *(f"{role}/{MANIFEST}" for role in ROLES)])


def _role_entries(role: str, job: _Job, surveyed: Survey, roles: dict[str, str]) -> Iterator[tuple[int, Entry]]:
    """The entries of a role by row; those of photographs that cannot be used are refused with `labeled`."""
    coming = entries(job.source, job.images, lambda left_out: None)  # the survey has them already
    for row, entry in enumerate(itertools.islice(coming, job.chosen.limit)):
        if row < len(surveyed.photos) and roles.get(surveyed.photos[row], LABELED) == role:
            yield row, entry


def _batched(items: Iterator[tuple[int, Entry]], count: int) -> Iterator[list[tuple[int, Entry]]]:
    while run := list(itertools.islice(items, count)):
        yield run


def _add(
    writer: ShardWriter,
    run: list[tuple[int, Entry]],
    photos: list[str],
    chosen: Parameters,
    in_order: InOrder,
    refused: list[dict[str, Any]],
) -> Iterator[None]:
    """Each entry of a run becomes a sample or a line of `refused`, and is counted by the caller."""
    making = functools.partial(_sample, chosen, writer.role)
    tasks = ((entry, photos[row]) for row, entry in run)
    for (row, entry), sample in zip(run, in_order(making, tasks), strict=True):
        if isinstance(sample, _Sample):
            writer.add(sample.photo, sample.members)
        else:
            refused.append({"row": row, **_reject_line(entry, sample)})
        yield


class _Refusal(NamedTuple):
    """Why an entry is no sample; an exception would not travel between processes."""

    reason: str
    detail: str


def _reject_line(entry: Entry, refusal: _Refusal) -> dict[str, Any]:
    """A line of `rejects.jsonl`; without a `row` for what was left out."""
    return {"key": entry.key, "path": entry.image, **refusal._asdict()}


class _Sample(NamedTuple):
    """A sample with its files."""

    photo: Photo
    members: dict[str, bytes]


def _sample(chosen: Parameters, role: str, task: tuple[Entry, str]) -> _Sample | _Refusal:
    """Loads and encodes an entry of the photograph that the task names."""
    entry, photo = task
    try:
        loaded = load(entry, chosen.sizes, enlarge=chosen.enlarge)
    except Rejected as error:
        return _Refusal(error.reason.value, error.detail)
    named = replace(loaded, meta={**loaded.meta, "photo": photo})
    return _Sample(named, encode(named, role, chosen.image_format))


def _shard_sha256(folder: Path, records: list[dict[str, Any]]) -> str | None:
    path = folder / records[0]["shard"] if records else None
    return sha256_file(path) if path is not None and path.is_file() else None


def _kept(part: Path, folder: Path) -> dict[str, Any] | None:
    """The record of a run that is done and whose shard is whole, None where it must be done (again)."""
    try:
        kept = json.loads(part.read_bytes())
        whole = kept["shard_sha256"] == _shard_sha256(folder, kept["records"])
        return kept if whole and (kept["shard_sha256"] or not kept["records"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _summary(out: Path, seconds: float, did_nothing: bool) -> BuildSummary:
    """Read back from what was published; a damaged manifest, index or a cut shard raises DamagedError."""
    whole = open_manifest(out)
    manifests = {role: Shards(out / role).manifest for role in ROLES}
    samples = {role: manifest["samples"] for role, manifest in manifests.items()}
    counted = {role: manifest["photos"] for role, manifest in manifests.items()}
    return BuildSummary(out, whole["entries"], samples, counted, whole["rejects"], seconds, did_nothing)
