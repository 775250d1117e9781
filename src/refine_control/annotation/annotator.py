"""Annotation of one part of the photographs, in any process: propose regions and describe them.

The id of a row depends on the bytes of its photo, and of its region where that is given: a decision about a photo does
not apply to another photo of the same name. The id of the source is kept as `source_id`.
"""

# H W pixels of a photo as shown

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from refine_control.annotation.masks import Selection, augment, box_of, dilate, select
from refine_control.annotation.parts import Contents, Done, ManifestRow, Mark, Part, Reject, contents, states
from refine_control.annotation.prompts import Described, describe_many, global_request, local_request
from refine_control.annotation.refusals import CONTROL_PICTURE, fault_of_picture
from refine_control.errors import RefineControlError
from refine_control.photos.decisions import id_of
from refine_control.photos.load import load_mask, load_whole
from refine_control.photos.regions import encode_rle
from refine_control.records import Entry, Proposal, Rejected, RejectReason, Request, make_key

Masks = Literal["given", "sam", "felzenszwalb"]
Prompts = Literal["given", "qwen", "server"]
Shape = Literal["none", "box", "brush"]
OF_PROMPT = (RejectReason.NO_PROMPT, RejectReason.NEEDS_REVIEW)
"""Problems of an entry that concern its prompt alone."""
Region = tuple[ManifestRow, np.ndarray]
"""A row of the manifest and its mask, (H, W) bool."""


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


@dataclass(frozen=True)
class PartResult:
    """What came of the photos of a part."""

    photos: list[Done | None]
    """None: to be annotated by the next run, because this one ends with `error`."""
    error: RefineControlError | None = None


class Question(NamedTuple):
    """A question about one photo of a part, and the rows that its answer goes to."""

    photo: int
    rows: list[ManifestRow]
    request: Request
    field: str


class Annotator:
    """Annotates parts in one process: loads what `chosen` needs once. Calling it gives the result of a part."""

    def __init__(self, chosen: Annotation) -> None:
        self.chosen = chosen
        self.propose = _proposer(chosen)
        self.describer = _describer(chosen)
        self.selection = Selection(min_area=chosen.min_area, max_area=chosen.max_area, per_photo=chosen.per_photo)

    def __call__(self, part: Part) -> PartResult:
        given, photos = self.propose is None, list[Done | None]()
        questions: list[Question] = []
        for group in part.photos:
            files = states(group, given)  # before anything is read: a change from here on is seen later
            content = contents(group, given)
            rows, rejects, image = self._regions(group, content)
            if image is not None:
                questions += self._questions(len(photos), group[0], image, rows)
            photos.append(Done(Mark(files, content.whole), [row for row, _ in rows], rejects))
        return self._describe(photos, questions)

    def _regions(
        self, group: Sequence[Entry], content: Contents
    ) -> tuple[list[Region], list[Reject], np.ndarray | None]:
        """The rows of a photo with their masks, its rejects, and the photo itself where a model is to see it."""
        entries, rejects = list(group), list[Reject]()
        if self.propose or self.describer:  # the prompts are replaced, and with them their problems
            of_prompt = [entry.problem is not None and entry.problem[0] in OF_PROMPT for entry in group]
            entries = [replace(e, problem=None) if bad else e for e, bad in zip(group, of_prompt, strict=True)]
        rows = [] if self.propose else _given(entries, content, rejects)
        if self.propose is None and not (rows and self.describer):
            return rows, rejects, None
        try:
            image = load_whole(entries[0] if self.propose else replace(entries[0], problem=None))
            return rows or self._proposed(entries[0], image, content), rejects, image
        except Rejected as error:
            known = {reject.key for reject in rejects}
            at_fault = [entries[0]] if self.propose else [each for each in entries if each.key not in known]
            return [], rejects + [_reject(each, error) for each in at_fault], None

    def _questions(self, photo: int, entry: Entry, image: np.ndarray, rows: Sequence[Region]) -> list[Question]:
        """The questions about a photo."""
        if self.describer is None:
            return []
        questions = [Question(photo, [row], local_request(image, mask), "local_prompt") for row, mask in rows]
        if self.chosen.global_prompts and not entry.global_prompt:
            questions.append(Question(photo, [row for row, _ in rows], global_request(image), "global_prompt"))
        return questions

    def _proposed(self, entry: Entry, image: np.ndarray, content: Contents) -> list[Region]:
        """Rows of the regions that are selected among the proposals. Raises Rejected where none is suitable."""
        entry = replace(entry, prompt=None)  # a prompt that was given is of another region
        fallen: Counter[str] = Counter()
        selected = select(self._proposals(image), self.selection, fallen)
        if not selected:
            why = ", ".join(f"{name} {count}" for name, count in sorted(fallen.items()) if count) or "none was proposed"
            raise Rejected(RejectReason.NO_REGION, f"no proposed region is fit for inpainting: {why}")
        rows = []
        for number, each in enumerate(selected):
            place = f"{Path(entry.image).stem}-{number}"
            mask = dilate(each.mask, self.chosen.dilate) if self.chosen.dilate else each.mask
            mask = augment(mask, self.chosen.shape, self.chosen.seed, make_key(entry.image, None, place))
            region = {"segmentation": encode_rle(mask), "mask_source": each.source, **each.scores}
            rows.append((_row(entry, make_key(entry.image, content.photo, place), mask, region), mask))
        return rows

    def _proposals(self, image: np.ndarray) -> list[Proposal]:
        """The proposals for one photo. Raises Rejected where the segmenter fails on this photo alone."""
        assert self.propose is not None
        try:
            return self.propose(image)
        except RefineControlError:
            raise
        except Exception as error:  # transformers raises nearly anything at a picture that it cannot process
            failure = error.with_traceback(None)  # whose frames hold tensors
        propose, name = self.propose, self.chosen.segmenter
        raise Rejected(RejectReason.MODEL_FAILED, fault_of_picture(failure, name, lambda: propose(CONTROL_PICTURE)))

    def _describe(self, photos: list[Done | None], questions: Sequence[Question]) -> PartResult:
        """Asks for all prompts of a part at once and puts them into their rows."""
        if self.describer is None or not questions:
            return PartResult(photos)
        ends_run = None
        for each, answer in zip(questions, describe_many(self.describer, [q.request for q in questions]), strict=True):
            done = photos[each.photo]
            if isinstance(answer, Described):
                for row in each.rows:
                    row[each.field] = answer.prompt
                    row[f"{each.field}_source"] = answer.source
                    row["prompt_problems"] = sorted({*row["prompt_problems"], *answer.problems})
            elif answer.ends_run:
                photos[each.photo], ends_run = None, answer.ends_run
            elif done is not None:
                photos[each.photo] = _without(done, each.rows, f"{each.field}: {answer.why}")
        return PartResult(photos, ends_run)


def _given(entries: Sequence[Entry], content: Contents, rejects: list[Reject]) -> list[Region]:
    """A row for each entry whose region can be read; the others go to `rejects`."""
    rows = []
    for entry, region in zip(entries, content.regions, strict=True):
        try:
            if entry.problem is not None:
                raise Rejected(*entry.problem)
            mask = load_mask(entry)
        except Rejected as error:
            rejects.append(_reject(entry, error))
            continue
        name = make_key(entry.image, content.photo + region, id_of(entry))
        facts: ManifestRow = {"source_id": entry.meta["id"]} if "id" in entry.meta else {}
        facts |= {"mask": entry.mask} if entry.mask else {"segmentation": entry.segmentation}
        rows.append((_row(entry, name, mask, {**facts, "mask_source": "given"}), mask))
    return rows


def _without(done: Done, rows: Sequence[ManifestRow], why: str) -> Done:
    """The photo with `rows` moved to its rejects; those that were moved before stay where they are."""
    moved = {row["id"]: row["image"] for row in done.rows if row in rows}
    rejects = [Reject(id, image, RejectReason.MODEL_FAILED.value, why) for id, image in moved.items()]
    return replace(done, rows=[row for row in done.rows if row["id"] not in moved], rejects=done.rejects + rejects)


def _row(entry: Entry, name: str, mask: np.ndarray, region: Mapping[str, Any]) -> ManifestRow:
    """What the manifest says of one region; the source's own facts stay."""
    (height, width), (y0, x0, y1, x1) = mask.shape, box_of(mask)
    prompt = {"local_prompt": entry.prompt, "local_prompt_source": "given"} if entry.prompt else {}
    whole = {"global_prompt": entry.global_prompt} if entry.global_prompt else {}
    measured = {"width": width, "height": height, "bbox": [x0, y0, x1 - x0, y1 - y0]}
    measured |= {"area_fraction": round(float(mask.mean()), 5)}
    named = {"id": name, "image": entry.image, "photo": entry.photo, "prompt_problems": []}
    return {**entry.meta, **measured, **named, **prompt, **whole, **region}


def _reject(entry: Entry, error: Rejected) -> Reject:
    return Reject(entry.key, entry.image, error.reason.value, error.detail)


def _proposer(chosen: Annotation) -> Callable[[np.ndarray], list[Proposal]] | None:
    """(H,W,3) uint8 -> proposals; None for masks that are given."""
    if chosen.masks == "given":
        return None
    if chosen.masks == "felzenszwalb":
        from refine_control.annotation.offline_masks import propose_felzenszwalb

        return propose_felzenszwalb
    from refine_control.annotation.segmenter import load_segmenter

    return load_segmenter(chosen.segmenter).propose


def _describer(chosen: Annotation) -> Any:
    """Who answers requests; None for prompts that are given."""
    if chosen.prompts == "given":
        return None
    if chosen.prompts == "server":
        from refine_control.annotation.vlm_server import ServerDescriber

        return ServerDescriber(chosen.server, chosen.describer, api_key_variable=chosen.api_key_variable)
    from refine_control.annotation.describer import load_describer

    return load_describer(chosen.describer)
