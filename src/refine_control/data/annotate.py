"""`data annotate`: photographs -> regions and their prompts, one row for each region in `manifest.jsonl`.

The result is a source like any other: `data review` shows it to people, `data build` makes shards of it.
The work is done in parts, by whichever engine; what of it is done is kept by `data.annotation_parts`. So the same
command after a kill ends with the same bytes, and after a photo got another content it annotates that photo anew.

The id of a row depends on the bytes of its photo, and of its region where that is given: people decide by id, and a
decision on a photo that has changed since is not one on what stands in its place. A source's own id is `source_id`.
"""

# H W pixels of a photo as shown

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from refine_control import __version__
from refine_control.data.annotation_parts import REJECTS, Contents, Done, Part, Parts, contents, states
from refine_control.data.decisions import DECISIONS_NAME, id_of, read_decisions
from refine_control.data.engines import Engine, local
from refine_control.data.masks import Selection, augment, dilate, select
from refine_control.data.photos import load_mask, load_whole
from refine_control.data.prompts import describe_many, global_request, local_request
from refine_control.data.records import Entry, Proposal, Rejected, RejectReason, Request, make_key
from refine_control.data.regions import encode_rle
from refine_control.data.sources import MANIFEST_NAME, entries, photos_of
from refine_control.errors import InvalidInputError
from refine_control.storage import TEMPORARY, only_writer, write_json

PARAMETERS = "annotate.json"
FORMAT = 3
"""Raised when the same parameters no longer give the same rows."""
Progress = Callable[[int, int], None]
"""Called with (photos done, photos in all)."""
Masks = Literal["given", "sam", "felzenszwalb"]
Prompts = Literal["given", "qwen", "server"]
Shape = Literal["none", "box", "brush"]


@dataclass(frozen=True)
class Annotation:
    """How regions and prompts are found: everything the rows depend on, besides the source."""

    masks: Masks = "given"
    """given: of the source; sam: proposed by SAM; felzenszwalb: by a segmentation that needs no weights."""
    segmenter: str = "facebook/sam2.1-hiera-large"
    """Hub id or folder of a SAM 1 or SAM 2 model."""
    prompts: Prompts = "given"
    """given: of the source; qwen: by Qwen2.5-VL here; server: by a vision-language model behind a URL."""
    describer: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Hub id, folder, or the name under which the server knows the model."""
    server: str = "http://127.0.0.1:8000"
    api_key_variable: str | None = None
    """The environment variable that holds the server's key; the key itself is written nowhere."""
    global_prompts: bool = False
    """Whether the whole photo is described too; what the source says of it goes before."""
    min_area: float = 0.05
    """Smallest and largest share of the photo that a proposed region may cover."""
    max_area: float = 0.40
    per_photo: int = 2
    dilate: int = 0
    """Pixels by which a proposed region is grown."""
    shape: Shape = "none"
    """box and brush cover a proposed region by what does not give its outline away."""
    seed: int = 0
    limit: int | None = None
    """Only the first so many photos."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InvalidInputError(f"limit is {self.limit}; it must be at least 1")
        if self.dilate < 0:
            raise InvalidInputError(f"dilate is {self.dilate}; it must be 0 or more pixels")


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
) -> AnnotateSummary:
    """Makes or continues `out` from `source` (see `data.sources`).

    Does nothing where the same is there already; photos whose content has changed since are annotated anew. Raises
    InvalidInputError for a source without photos, or an `out` that holds something else; InUseError, MissingError for
    models that are not there, WorkerDiedError."""
    began = time.monotonic()
    listing, count = _survey(source, images, chosen.limit)
    if not count:
        raise InvalidInputError(f"no photo was found in {source}; name a folder of photos, tars or a manifest")
    wanted = {**asdict(chosen), "format": FORMAT, "source": str(source.resolve()), "listing": listing, "photos": count}
    with only_writer(out):
        _check_folder(out, wanted)
        parts = Parts(out, lambda: _photos(source, images, chosen.limit), chosen.masks == "given")
        if not parts.begin():
            return _summary(out, count, 0.0, did_nothing=True)
        write_json(out / PARAMETERS, wanted)
        report = progress or (lambda done, total: None)
        done = 0

        def told(more: int) -> None:
            nonlocal done
            done += more
            report(done, count)

        for part, made in (engine or local())(parts.missing(told), partial(Annotator, chosen)):
            parts.add(part, [Done(**photo) for photo in made["photos"]])
            told(part.size)
        root = next(_photos(source, images, 1))[0].root
        header = {"root": str(root.resolve()), "made_by": {"refine_control": __version__}, "annotation": wanted}
        parts.publish(header, count)
        summary = _summary(out, count, time.monotonic() - began)
        void = sum(id in parts.dropped for id in read_decisions(out / DECISIONS_NAME)) if parts.dropped else 0
        return replace(summary, changed=parts.changed, void_decisions=void)


def _photos(source: Path, images: Path | None, limit: int | None) -> Iterator[list[Entry]]:
    return itertools.islice(photos_of(entries(source, images)), limit)


def _survey(source: Path, images: Path | None, limit: int | None) -> tuple[str, int]:
    """The hash of what the source lists (of files, their names), and how many photos."""
    whole, count = hashlib.sha256(), 0
    for count, group in enumerate(_photos(source, images, limit), 1):  # noqa: B007 -- the last count is wanted
        for entry in group:
            told = [entry.key, entry.image, entry.mask, entry.prompt, entry.global_prompt, entry.meta]
            whole.update(json.dumps(told, sort_keys=True).encode() + b"\n")
    return whole.hexdigest(), count


def _check_folder(out: Path, wanted: dict[str, Any]) -> None:
    """Refuses a folder of something else, or of another annotation."""
    path = out / PARAMETERS
    if not path.is_file():
        strangers = [each.name for each in out.iterdir() if each.name != ".lock" and not each.name.endswith(TEMPORARY)]
        if strangers:
            raise InvalidInputError(f"{out} holds {sorted(strangers)[0]!r} and no annotations; name a new folder")
        return
    try:
        found = json.loads(path.read_bytes())
        differing = sorted(key for key in wanted if found.get(key) != wanted[key])
    except (ValueError, AttributeError):
        raise InvalidInputError(f"{path} cannot be read; delete {out} and annotate again") from None
    if differing:
        raise InvalidInputError(f"{out} was annotated otherwise ({', '.join(differing)} differ); name a new folder")


def _summary(out: Path, photos: int, seconds: float, did_nothing: bool = False) -> AnnotateSummary:
    """Counted from what was published."""
    rows, problems, rejects = 0, Counter[str](), Counter[str]()
    with (out / MANIFEST_NAME).open() as lines:
        next(lines)
        for rows, line in enumerate(lines, 1):  # noqa: B007 -- the last number is wanted
            problems.update(json.loads(line)["prompt_problems"])
    with (out / REJECTS).open() as lines:
        rejects.update(json.loads(line)["reason"] for line in lines)
    return AnnotateSummary(out, photos, rows, dict(problems), dict(rejects), seconds, did_nothing)


class Annotator:
    """Does parts in one process: loads what `chosen` needs once. Calling it gives the rows and rejects of a part."""

    def __init__(self, chosen: Annotation) -> None:
        self.chosen = chosen
        self.propose = _proposer(chosen)
        self.describer = _describer(chosen)
        self.selection = Selection(min_area=chosen.min_area, max_area=chosen.max_area, per_photo=chosen.per_photo)

    def __call__(self, part: Part) -> dict[str, Any]:
        given, asked, made = self.propose is None, [], []
        for group in part.photos:
            mark = {"files": states(group, given)}  # before anything is read: a change from here on is seen later
            content = contents(group, given)
            rows, rejects = self._photo(group, content, asked)
            made.append(Done({**mark, "content": content.whole}, rows, rejects)._asdict())
        self._describe(asked)
        return {"photos": made}

    def _photo(
        self, group: Sequence[Entry], content: Contents, asked: list[Asked]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The rows and rejects of a photo; what is to be asked about it goes to `asked`."""
        rejects: list[dict[str, Any]] = []
        try:
            propose = self.propose is not None
            found = self._proposed(group[0], content) if propose else self._given(group, content, rejects)
        except Rejected as error:
            return [], [_reject(group[0], error)]
        rows = [row for row, _ in found]
        if found and self.describer:
            image = load_whole(group[0])
            asked += [Asked([row], local_request(image, mask), "local_prompt") for row, mask in found]
            if self.chosen.global_prompts and not group[0].global_prompt:
                asked.append(Asked(rows, global_request(image), "global_prompt"))
        return rows, rejects

    def _given(
        self, group: Sequence[Entry], content: Contents, rejects: list[dict[str, Any]]
    ) -> list[tuple[dict[str, Any], np.ndarray]]:
        """A row for each entry whose photo and region can be read."""
        found = []
        for entry, region in zip(group, content.regions, strict=True):
            try:
                mask = load_mask(entry)
            except Rejected as error:
                rejects.append(_reject(entry, error))
            else:
                name = make_key(entry.image, content.photo + region, id_of(entry))
                facts: dict[str, Any] = {"source_id": entry.meta["id"]} if "id" in entry.meta else {}
                facts |= {"mask": entry.mask} if entry.mask else {"segmentation": entry.segmentation}
                found.append((_row(entry, name, mask, {**facts, "mask_source": "given"}), mask))
        return found

    def _proposed(self, entry: Entry, content: Contents) -> list[tuple[dict[str, Any], np.ndarray]]:
        """Rows of the regions that are chosen among the proposals. Raises Rejected where none is fit."""
        image = load_whole(entry)
        entry = replace(entry, prompt=None)  # a prompt that was given is of another region
        proposals = self.propose(image) if self.propose else []
        fallen: Counter[str] = Counter()
        chosen = select(proposals, self.selection, fallen)
        if not chosen:
            why = ", ".join(f"{name} {count}" for name, count in sorted(fallen.items()) if count) or "none was proposed"
            raise Rejected(RejectReason.NO_REGION, f"no proposed region is fit for inpainting: {why}")
        found = []
        for number, each in enumerate(chosen):
            place = f"{Path(entry.image).stem}-{number}"
            mask = dilate(each.mask, self.chosen.dilate) if self.chosen.dilate else each.mask
            mask = augment(mask, self.chosen.shape, self.chosen.seed, make_key(entry.image, None, place))
            region = {"segmentation": encode_rle(mask), "mask_source": each.source, **each.scores}
            found.append((_row(entry, make_key(entry.image, content.photo, place), mask, region), mask))
        return found

    def _describe(self, asked: Sequence[Asked]) -> None:
        """Asks for all prompts of a part at once and puts them into their rows."""
        if self.describer is None or not asked:
            return
        for each, told in zip(asked, describe_many(self.describer, [a.request for a in asked]), strict=True):
            for row in each.rows:
                row[each.field] = told.prompt
                row[f"{each.field}_source"] = told.source
                row["prompt_problems"] = sorted({*row["prompt_problems"], *told.problems})


class Asked(NamedTuple):
    """A question and the rows that its answer goes to."""

    rows: list[dict[str, Any]]
    request: Request
    field: str


def _row(entry: Entry, name: str, mask: np.ndarray, region: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of one region; the source's own facts stay."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [int(v) for v in (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)]
    prompt = {"local_prompt": entry.prompt, "local_prompt_source": "given"} if entry.prompt else {}
    whole = {"global_prompt": entry.global_prompt} if entry.global_prompt else {}
    measured = {"width": width, "height": height, "bbox": box, "area_fraction": round(float(mask.mean()), 5)}
    own = {"id": name, "image": entry.image, "photo": entry.photo, "prompt_problems": []}
    return {**entry.meta, **measured, **own, **prompt, **whole, **region}


def _reject(entry: Entry, error: Rejected) -> dict[str, Any]:
    return {"key": entry.key, "path": entry.image, "reason": error.reason.value, "detail": error.detail}


def _proposer(chosen: Annotation) -> Callable[[np.ndarray], list[Proposal]] | None:
    """(H,W,3) uint8 -> proposals; None for masks that are given."""
    if chosen.masks == "given":
        return None
    if chosen.masks == "felzenszwalb":
        from refine_control.data.offline_masks import propose_felzenszwalb

        return propose_felzenszwalb
    from refine_control.models.segmenter import load_segmenter

    return load_segmenter(chosen.segmenter).propose


def _describer(chosen: Annotation) -> Any:
    """Who answers requests; None for prompts that are given."""
    if chosen.prompts == "given":
        return None
    if chosen.prompts == "server":
        from refine_control.data.vlm_server import ServerDescriber

        return ServerDescriber(chosen.server, chosen.describer, api_key_variable=chosen.api_key_variable)
    from refine_control.models.describer import load_describer

    return load_describer(chosen.describer)
