"""`data annotate`: photographs -> regions and their prompts, one row for each region in `manifest.jsonl`.

The result is a source for `data review` and `data build`. An engine does the work in parts, and `annotation.parts`
keeps the finished ones: the same command after a kill ends with the same bytes, and annotates again only photos whose
content has changed. A photo that a model fails on is a line of `rejects.jsonl`, tried again only by `retry_failed`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from refine_control import __version__
from refine_control.annotation.annotator import Annotation, Annotator
from refine_control.annotation.engines import Engine, local
from refine_control.annotation.parts import REJECTS, Parts
from refine_control.errors import InvalidInputError
from refine_control.photos.decisions import DECISIONS_NAME, read_decisions
from refine_control.photos.sources import MANIFEST_NAME, entries, photos_of
from refine_control.progress import Progress
from refine_control.records import Entry, RejectReason
from refine_control.storage import TEMPORARY, only_writer, write_json

PARAMETERS = "annotate.json"
FORMAT = 3
"""Incremented when the same parameters no longer give the same rows."""


@dataclass(frozen=True)
class AnnotateSummary:
    """What came of it: photos = those with a row + those all of whose entries were refused."""

    out: Path
    photos: int
    rows: int
    problems: dict[str, int]
    """Rows whose prompt is doubtful and waits for review, by what is wrong with it."""
    rejects: dict[str, int]
    """By reason code."""
    seconds: float
    did_nothing: bool = field(default=False)
    changed: int = 0
    """Photos that had another content when they were annotated before."""
    void_decisions: int = 0
    """Decisions on the former rows of these photos."""

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {count}" for name, count in sorted(self.rejects.items()))
        doubts = ", ".join(f"{name} {count}" for name, count in sorted(self.problems.items()))
        done = f"{self.out} was already annotated" if self.did_nothing else f"annotated in {self.seconds:.1f} s"
        if self.changed:
            done += f"; {self.changed} photos had changed"
            done += f", {self.void_decisions} decisions on them no longer count" if self.void_decisions else ""
        if RejectReason.MODEL_FAILED.value in self.rejects:
            done += f"; {self.out / REJECTS} names what a model failed on: --retry-failed tries again"
        head = f"{self.photos} photos -> {self.rows} regions; rejected {sum(self.rejects.values())}"
        return f"{head}{': ' + listed if listed else ''}\n{'for review: ' + doubts + chr(10) if doubts else ''}{done}"


def annotate(
    source: Path,
    out: Path,
    chosen: Annotation,
    *,
    images: Path | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
    retry_failed: bool = False,
) -> AnnotateSummary:
    """Creates or continues `out` from `source` (see `photos.sources`).

    Does nothing where the same is there already; photos whose content has changed since are annotated again, with
    `retry_failed` also those that a model refused or failed on. Raises InvalidInputError for a source without photos,
    or an `out` that holds something else; InUseError, MissingError for models that are not there, WorkerDiedError."""
    began = time.monotonic()
    listing, count = _survey(source, images, chosen.limit)
    if not count:
        raise InvalidInputError(f"no photo was found in {source}; name a folder of photos, tars or a manifest")
    parameters = {**asdict(chosen), "format": FORMAT, "source": str(source.resolve())}
    parameters |= {"listing": listing, "photos": count}
    with only_writer(out):
        _check_folder(out, parameters)
        parts = Parts(out, lambda: _photos(source, images, chosen.limit), chosen.masks == "given", retry_failed)
        if not parts.begin():
            return _summary(out, count, 0.0, did_nothing=True)
        write_json(out / PARAMETERS, parameters)
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            if progress:
                progress(done, count)

        for part, result in (engine or local())(parts.missing(advance), partial(Annotator, chosen)):
            parts.add(part, result.photos)
            if result.error is not None:
                raise result.error
            advance(part.size)
        root = next(_photos(source, images, 1))[0].root
        header = {"root": str(root.resolve()), "made_by": {"refine_control": __version__}, "annotation": parameters}
        parts.publish(header, count)
        summary = _summary(out, count, time.monotonic() - began)
        void = sum(id in parts.dropped for id in read_decisions(out / DECISIONS_NAME)) if parts.dropped else 0
        return replace(summary, changed=parts.changed, void_decisions=void)


def _photos(source: Path, images: Path | None, limit: int | None) -> Iterator[list[Entry]]:
    return itertools.islice(photos_of(entries(source, images)), limit)


def _survey(source: Path, images: Path | None, limit: int | None) -> tuple[str, int]:
    """The hash of what the source lists (of files, their names), and how many photos."""
    digest, count = hashlib.sha256(), 0
    for count, group in enumerate(_photos(source, images, limit), 1):  # noqa: B007 -- the last count is used
        for entry in group:
            listed = [entry.key, entry.image, entry.mask, entry.prompt, entry.global_prompt, entry.meta]
            digest.update(json.dumps(listed, sort_keys=True).encode() + b"\n")
    return digest.hexdigest(), count


def _check_folder(out: Path, parameters: Mapping[str, Any]) -> None:
    """Refuses a folder of something else, or of another annotation."""
    path = out / PARAMETERS
    if not path.is_file():
        strangers = [each.name for each in out.iterdir() if each.name != ".lock" and not each.name.endswith(TEMPORARY)]
        if strangers:
            raise InvalidInputError(f"{out} holds {sorted(strangers)[0]!r} and no annotations; name a new folder")
        return
    try:
        previous = json.loads(path.read_bytes())
        differing = sorted(key for key in parameters if previous.get(key) != parameters[key])
    except (ValueError, AttributeError):
        raise InvalidInputError(f"{path} cannot be read; delete {out} and annotate again") from None
    if differing:
        raise InvalidInputError(
            f"{out} was annotated with other settings ({', '.join(differing)} differ); name a new folder"
        )


def _summary(out: Path, photos: int, seconds: float, did_nothing: bool = False) -> AnnotateSummary:
    """Counted from what was published."""
    rows, problems = -1, Counter[str]()  # the first line is the manifest's header
    with (out / MANIFEST_NAME).open() as manifest, (out / REJECTS).open() as lines:
        for line in manifest:
            rows += 1
            problems.update(json.loads(line).get("prompt_problems", ()))
        rejects = Counter(json.loads(line)["reason"] for line in lines)
    return AnnotateSummary(out, photos, rows, dict(problems), dict(rejects), seconds, did_nothing)
