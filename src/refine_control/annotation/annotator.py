"""What `data annotate` does to one part of the photographs, in whichever process: find regions, describe them.

The id of a row depends on the bytes of its photo, and of its region where that is given: people decide by id, and a
decision on a photo that has changed since is not one on what stands in its place. A source's own id is `source_id`.
"""

# H W pixels of a photo as shown

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from refine_control.annotation.masks import Selection, augment, dilate, select
from refine_control.annotation.parts import Contents, Done, Part, contents, states
from refine_control.annotation.prompts import describe_many, global_request, local_request
from refine_control.errors import InvalidInputError
from refine_control.photos.decisions import id_of
from refine_control.photos.load import load_mask, load_whole
from refine_control.photos.regions import encode_rle
from refine_control.records import Entry, Proposal, Rejected, RejectReason, Request, make_key

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
