"""What travels between the rooms of the data: one photograph with its hole and its words."""

# H W pixels

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

LABELED = "labeled"
"""Photo, mask and prompt: the supervised stage may see the pixels of the hole."""
UNLABELED = "unlabeled"
"""Photo, mask and prompt without the pixels of the hole: they exist nowhere in the shards."""
TEST = "test"
"""Photo, mask and prompt that no training sees."""
ROLES: tuple[str, ...] = (LABELED, UNLABELED, TEST)


@dataclass(frozen=True)
class Photo:
    """A photograph, the region to inpaint and what it shows."""

    key: str
    """Letters, digits, `_` and `-`: a name that any file system, tar reader and URL takes."""
    image: np.ndarray
    """(H, W, 3) uint8, sRGB."""
    mask: np.ndarray
    """(H, W) bool, True = inpaint."""
    prompt: str
    """What belongs in the hole."""
    global_prompt: str = ""
    """What the whole photo shows; empty where nobody said."""
    meta: dict[str, Any] = field(default_factory=dict)
    """JSON values: source, license, photo (which photograph this is, whatever the mask) and the like."""


class RejectReason(Enum):
    """Why a photo did not become a sample; the value is the code in `rejects.jsonl`."""

    BAD_ROW = "bad_row"
    """A manifest line that is not a JSON object, or names no image."""
    DUPLICATE = "duplicate"
    """The same image, mask and id as an earlier entry."""
    OUTSIDE_TREE = "outside_tree"
    """A link or path that leaves the source folder, or a linked folder, which is not followed."""
    UNREADABLE = "unreadable"
    """Absent, not a file, not an image of a known format, or with a header that cannot be read."""
    TRUNCATED = "truncated"
    """The header can be read; the pixels end too early or are broken."""
    ANIMATED = "animated"
    """More than one frame or page."""
    BOMB = "bomb"
    """More pixels than photographs have: a decompression bomb."""
    TOO_SMALL = "too_small"
    """The shorter side is less than the size of a sample."""
    NO_MASK = "no_mask"
    """No mask is named or there is no such file."""
    MASK_UNREADABLE = "mask_unreadable"
    """The mask's file is there and cannot be decoded."""
    MASK_SIZE_MISMATCH = "mask_size_mismatch"
    """The mask has neither the size of the photo as shown nor that of its stored pixels."""
    MASK_EMPTY = "mask_empty"
    """No pixel to inpaint, in the photo or after resizing."""
    MASK_FULL = "mask_full"
    """No pixel to keep, in the photo or after cropping."""
    MASK_DOES_NOT_FIT = "mask_does_not_fit"
    """Less than half of the hole fits into a square crop."""
    NO_PROMPT = "no_prompt"
    """No words, or a prompt that is not UTF-8 text."""


class Rejected(Exception):
    """An entry that becomes a line in `rejects.jsonl`, not a sample."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason, self.detail = reason, detail


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
    meta: dict[str, Any] = field(default_factory=dict)
    problem: tuple[RejectReason, str] | None = None
    """Why the entry cannot be loaded, where this is known before any file is opened."""

    @property
    def image_path(self) -> Path:
        """Where the source says the photo is; nothing is checked."""
        return self.root / self.image

    @property
    def mask_path(self) -> Path | None:
        """Where the source says the mask is; None without one."""
        return None if self.mask is None else self.root / self.mask

    @property
    def photo(self) -> str:
        """Which photograph this is, whatever the mask: the source's own photo id, or the path."""
        number = self.meta.get("source_image_id")
        return os.path.normpath(self.image) if number in (None, "") else f"{self.meta.get('source', '')}/{number}"
