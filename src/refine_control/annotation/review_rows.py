"""What a reviewer sees: the rows of a manifest as they were before any decision, and their pictures."""

# H W pixels of the photo as shown, h w of what a page shows

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from refine_control.annotation.masks import box_of
from refine_control.errors import InvalidInputError
from refine_control.folders import ROWS_TO_REVIEW, refuse_other_kind
from refine_control.photos.decisions import ACCEPT, EDIT, REJECT, Decision, decide, id_of
from refine_control.photos.load import load_mask, load_whole
from refine_control.photos.sources import MANIFEST_NAME, entries
from refine_control.records import Entry, Rejected, RejectReason, one_line

LONGEST = 1024
"""The longer side of a picture on a page, at most."""
LONGEST_PROMPT = 2000
"""Characters of a prompt that a reviewer writes."""
MARGIN = 0.25
"""Of the region's longer side: what a close view shows around it."""
_QUALITY = 88
_OF_REVIEW = (RejectReason.REVIEW_REJECTED, RejectReason.NEEDS_REVIEW)
"""Problems that keep an entry from the shards and are for the review to settle."""


@dataclass(frozen=True)
class Row:
    """One photo with one region, for people."""

    id: str
    entry: Entry
    """With the manifest's own prompt, whatever was decided since."""
    problems: tuple[str, ...]
    """What an annotator found doubtful in the prompt, and what the source's reader found wrong."""
    scores: dict[str, float]
    """Its fractional numbers, to sort by."""


class View(NamedTuple):
    """A photo or a part of it, small enough for a page."""

    jpeg: bytes
    mask: bytes | None
    """A grey PNG of the same size, 255 = inpaint, smooth at the outline; None without a usable region."""
    size: tuple[int, int]
    """(w, h)"""
    problem: str | None
    """Why there is no region."""


def read_rows(folder: Path) -> list[Row]:
    """The rows of `folder`, which holds manifest.jsonl (see `photos.sources`), in their order.

    Lines that name no photo or repeat an earlier one are left out. Raises InvalidInputError where no row is left, and
    where two different rows have one id: a decision would be about both."""
    refuse_other_kind(folder, ROWS_TO_REVIEW)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InvalidInputError(f"{folder} holds no {MANIFEST_NAME}; make one with `data annotate`")
    rows: dict[str, Row] = {}
    for entry, (prompt, problems) in zip(entries(folder), _as_written(path), strict=False):
        reason = entry.problem[0] if entry.problem else None
        if reason in (RejectReason.BAD_ROW, RejectReason.DUPLICATE):
            continue
        if reason in _OF_REVIEW:
            entry = replace(entry, problem=None)
        elif entry.problem is not None:
            problems = (*problems, f"{entry.problem[0].value}: {entry.problem[1]}")
        scores = {name: value for name, value in entry.meta.items() if isinstance(value, float)}  # whole ones are sizes
        row = Row(id_of(entry), replace(entry, prompt=prompt), problems, scores)
        if row.id in rows:
            raise InvalidInputError(f"two rows of {path} have the id {row.id!r}; decisions go by it: give each its own")
        rows[row.id] = row
    if not rows:
        raise InvalidInputError(f"{path} has no row to review")
    return list(rows.values())


def _as_written(path: Path) -> Iterator[tuple[str | None, tuple[str, ...]]]:
    """(prompt, problems) of each row as written: entries come with mended prompts, and without lists."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                row = None
            row = row if isinstance(row, dict) else {}
            if number > 1 or "image" in row or not isinstance(row.get("root"), str):  # else the manifest's header
                given = row.get("prompt_problems")
                problems = tuple(filter(None, map(one_line, given))) if isinstance(given, list) else ()
                yield one_line(row.get("local_prompt")) or None, problems


def load_view(entry: Entry, close: bool = False) -> View:
    """The photo, or with `close` its region and MARGIN around it, at most LONGEST pixels long, never enlarged.

    Raises Rejected where the photo cannot be shown."""
    image = load_whole(entry)
    try:
        mask, problem = load_mask(entry), None
    except Rejected as error:
        mask, problem = None, str(error)
    if close and mask is not None:
        y0, x0, y1, x1 = box_of(mask)
        margin = max(16, round(MARGIN * max(y1 - y0, x1 - x0)))
        window = np.s_[max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin]
        image, mask = image[window], mask[window]
    picture = Image.fromarray(np.ascontiguousarray(image))
    scale = min(1.0, LONGEST / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0) if scale < 1 else picture
    png = None if mask is None else _file(grey_mask(mask, size), "PNG", compress_level=3)
    return View(_file(small, "JPEG", quality=_QUALITY), png, size, problem)


def _file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_mask(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """(H, W) bool -> grey picture of `size` (w, h), each pixel the masked share of what it covers."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return grey if grey.size == size else grey.resize(size, Image.Resampling.BOX)


def decide_row(row: Row, action: str, reviewer: str, prompt: str | None) -> Decision:
    """A decision made now; an edit that changes nothing is an acceptance. Raises InvalidInputError."""
    text = one_line(prompt)
    if action not in (ACCEPT, EDIT, REJECT):
        raise InvalidInputError(f"the action is {action!r}; it must be {ACCEPT}, {EDIT} or {REJECT}")
    if action == EDIT and not text:
        raise InvalidInputError("the prompt is empty; write what belongs in the hole, or reject the region")
    if action == EDIT and len(text) > LONGEST_PROMPT:
        raise InvalidInputError(f"the prompt has more than {LONGEST_PROMPT} characters; shorten it")
    return decide(row.id, ACCEPT if text == row.entry.prompt and action == EDIT else action, reviewer, text)
