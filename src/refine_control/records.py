"""What travels between the rooms of the data: one photograph with its hole and its words."""

# H W pixels

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

INPAINT = "inpaint"
"""The condition of the paper, and the default everywhere."""
LABELED = "labeled"
"""Photo, mask and prompt: the supervised stage may see the pixels of the hole."""
UNLABELED = "unlabeled"
"""Photo, mask and prompt without the pixels of the hole: they exist nowhere in the shards."""
TEST = "test"
"""Photo, mask and prompt that no training sees."""
Row = dict[str, Any]
"""A JSON object whose names and values somebody else chose; `photos.values` checks them."""
ROLES: tuple[str, ...] = (LABELED, UNLABELED, TEST)
MAX_PIXELS = 100_000_000
"""A picture of so many pixels or more is taken for a decompression bomb."""


@dataclass(frozen=True)
class Photo:
    """A photograph, the region to inpaint and what it shows."""

    key: str
    """Letters, digits, `_` and `-`: a name that any file system, tar reader and URL takes."""
    image: np.ndarray
    """(H, W, 3) uint8, sRGB."""
    mask: np.ndarray
    """(H, W) bool, True = inpaint; all True for a condition without a region."""
    prompt: str
    """What belongs in the hole."""
    global_prompt: str = ""
    """What the whole photo shows; empty where nobody said."""
    meta: Row = field(default_factory=dict)
    """JSON values: source, license, photo (which photograph this is, whatever the mask) and the like."""
    cond: np.ndarray | None = None
    """(H, W, 3) uint8: the condition picture; None where it is the photo without its hole."""


class RejectReason(Enum):
    """Why a photo did not become a sample; the value is the code in `rejects.jsonl`."""

    BAD_ROW = "bad_row"
    """A manifest line that is not a JSON object, or names no image."""
    DUPLICATE = "duplicate"
    """An earlier entry, annotation or member of a tar is the same."""
    AMBIGUOUS = "ambiguous"
    """Two photos of one name or id: a mask, a text or an annotation may be of either."""
    UNUSED = "unused"
    """A file of the source that is neither a photo nor a part of one."""
    CROWD = "crowd"
    """An annotation that COCO calls a crowd: no single object."""
    OUTSIDE_TREE = "outside_tree"
    """A link or path that leaves the source folder, or a linked folder, which is not followed."""
    UNREADABLE = "unreadable"
    """Absent, not a file, not an image of a known format, or with a header that cannot be read."""
    TRUNCATED = "truncated"
    """The header can be read; the pixels end too early or are broken."""
    ANIMATED = "animated"
    """More than one frame or page."""
    BOMB = "bomb"
    """MAX_PIXELS or more: a decompression bomb."""
    TOO_SMALL = "too_small"
    """The shorter side is less than the size of a sample."""
    NO_MASK = "no_mask"
    """No mask and no segmentation is named, or there is no such file."""
    MASK_UNREADABLE = "mask_unreadable"
    """The mask's file or the segmentation is there and cannot be decoded."""
    MASK_SIZE_MISMATCH = "mask_size_mismatch"
    """The mask has neither the size of the photo as shown nor that of its stored pixels."""
    MASK_EMPTY = "mask_empty"
    """No pixel to inpaint, in the photo or after resizing."""
    MASK_FULL = "mask_full"
    """No pixel to keep, in the photo or after cropping."""
    MASK_DOES_NOT_FIT = "mask_does_not_fit"
    """Less than half of the hole fits into a square crop."""
    NO_CONDITION = "no_condition"
    """No condition picture is named and none can be made, or there is no such file."""
    CONDITION_UNREADABLE = "condition_unreadable"
    """The condition picture is there and cannot be decoded."""
    CONDITION_SIZE_MISMATCH = "condition_size_mismatch"
    """The condition picture has neither the size of the photo as shown nor that of its stored pixels."""
    NO_PROMPT = "no_prompt"
    """No words, or a prompt that is not UTF-8 text."""
    REVIEW_REJECTED = "review_rejected"
    """A person refused it in the review."""
    NEEDS_REVIEW = "needs_review"
    """The prompt was found doubtful and nobody has looked at it yet."""
    NO_REGION = "no_region"
    """None of the proposed regions is fit for inpainting."""
    MODEL_FAILED = "model_failed"
    """The segmenter or describer refused this picture or failed on it; `data annotate --retry-failed` tries again."""


LEFT_OUT = frozenset({RejectReason.UNUSED, RejectReason.CROWD})
"""Reasons of what never was a sample to be: such lines change neither the shards nor what a limit counts."""


class Rejected(Exception):
    """An entry that becomes a line in `rejects.jsonl`, not a sample."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)  # what pickle gives back to `__init__`
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


@dataclass(frozen=True)
class Entry:
    """One photo with one mask, as named by the source; nothing is decoded yet."""

    key: str
    root: Path
    """No file outside this folder is read."""
    image: str
    """Relative to `root`, as the source spells it."""
    mask: str | None
    prompt: str | None
    global_prompt: str = ""
    meta: Row = field(default_factory=dict)
    problem: tuple[RejectReason, str] | None = None
    """Why the entry cannot be loaded, where this is known before any file is opened."""
    segmentation: Row | list[Any] | None = None
    """The region as COCO's run lengths or polygons (see `photos.regions`), instead of a mask's file."""
    condition: str | None = None
    """The file of the condition picture, for conditions without a region."""

    @classmethod
    def refused(cls, root: Path, image: str, reason: RejectReason, detail: str, key: str = "") -> Entry:
        """An entry of which nothing else is known than why it cannot be loaded."""
        return cls(key or make_key(image, None), root, image, None, None, problem=(reason, detail))

    @property
    def image_path(self) -> Path:
        """Where the source says the photo is; nothing is checked."""
        return self.root / self.image

    @property
    def photo(self) -> str:
        """Which photograph this is, whatever the mask: the source's own photo id, or the path."""
        number = self.meta.get("source_image_id")
        return os.path.normpath(self.image) if number in (None, "") else f"{self.meta.get('source', '')}/{number}"


def make_key(image: str, mask: str | None, name: object = None) -> str:
    """A shard-safe key, a pure function of the relative paths and the row's own id: `an-owl-5f0c...`."""
    identity = "\0".join((image, mask or "", "" if name is None else str(name)))
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    words = re.sub(r"[^A-Za-z0-9_]+", "-", PurePosixPath(image).stem if name is None else str(name)).strip("-")[:40]
    return f"{words or 'photo'}-{digest}"


def one_line(value: object) -> str:
    """One line of valid Unicode with single spaces; empty when `value` is not text."""
    return " ".join(value.encode("utf-8", "replace").decode().split()) if isinstance(value, str) else ""


def flat_meta(row: Row, without: frozenset[str]) -> Row:
    """The texts and finite numbers of a source's row, for `Entry.meta`."""
    return {
        key: one_line(value) if isinstance(value, str) else value
        for key, value in row.items()
        if key not in without and (isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)))
    }


def with_article(name: str) -> str:
    """The name of a category as a prompt: `a dog`, `an apple`, `scissors`."""
    name = one_line(name.replace("_", " "))
    several = name.endswith("s") and not name.endswith(("ss", "us"))
    return name if several or not name else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


class Proposal(NamedTuple):
    """A region that a segmenter, or a stand-in for one, found in a photo."""

    mask: np.ndarray
    """(H, W) bool in the photo's size, True = region."""
    predicted_iou: float
    """0 to 1: how well the finder believes its outline to be; what that is worth depends on `source`."""
    stability_score: float
    """0 to 1: how little the region changes when the finder's threshold does."""
    source: str
    """Which model and revision, or which method."""


@dataclass(frozen=True, eq=False)
class Request:
    """One question to a vision-language model about one or more pictures, which come before the words."""

    pictures: tuple[np.ndarray, ...]
    """Each (h, w, 3) uint8."""
    text: str
    whole: bool = False
    """Whether the answer describes the whole photo; else one region of it."""
