"""Pictures as the page shows them: a photograph of any size in one that a brush handles well, and masks back."""

# H W pixels of the photograph, h w of its view

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from refine_control.errors import InvalidInputError
from refine_control.photos.decode import Original, read_header, read_original
from refine_control.records import Rejected

SIDE = 512
"""The longer side of a view in pixels, and both sides of the canvas it is first laid on."""
MAX_PHOTO = 40_000_000
"""Pixels of a photograph."""
BRUSH = (224, 36, 94)
OPACITY = 0.65
_PROPORTIONS = 0.05
"""Strokes may have proportions that differ from the view's by rounding."""
_COVERED = 63
"""A pixel of the photograph is repainted where the brush covers a quarter of it (63 / 255)."""


def read_upload(path: Path) -> Original:
    """An uploaded photograph. Raises InvalidInputError for what is no photograph or too large."""
    if not path.is_file():
        raise InvalidInputError("the photograph is no longer on the server; upload it again")
    data = path.read_bytes()
    try:
        width, height = read_header(data).size
        if width * height <= MAX_PHOTO:
            return read_original(data)
    except Rejected as error:
        raise InvalidInputError(f"the file is no photograph that can be used: {error.detail}") from None
    raise InvalidInputError(
        f"the photograph has {width} x {height} pixels; upload one of at most {MAX_PHOTO // 10**6} million pixels"
    )


def view_size(size: tuple[int, int]) -> tuple[int, int]:
    """(W, H) -> (w, h) with a longer side of SIDE."""
    width, height = (max(1, round(side * SIDE / max(size))) for side in size)
    return width, height


def view(picture: Image.Image) -> Image.Image:
    """The picture in RGB, enlarged or reduced to `view_size`."""
    return picture.convert("RGB").resize(view_size(picture.size), Image.Resampling.LANCZOS)


def layer(mask: np.ndarray) -> np.ndarray:
    """A mask (h, w) bool as strokes of the brush on the whole canvas, (SIDE, SIDE, 4) uint8, the view at its top left.

    gradio's editor would centre strokes of the size of the view on the canvas, beside what they belong to."""
    canvas = np.zeros((SIDE, SIDE, 4), np.uint8)
    canvas[: len(mask), : mask.shape[1]][mask] = [*BRUSH, round(255 * OPACITY)]
    return canvas


def read_strokes(layers: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) bool of a photograph of `size` (W, H): where the brush left any colour on the view.

    Raises InvalidInputError where there is nothing, or no picture of the photograph's proportions."""
    covered = np.zeros(size[::-1], bool)
    for file in layers:
        try:
            with Image.open(file, formats=("PNG", "WEBP")) as strokes:
                (width, height), shown = strokes.size, view_size(size)
                whole = (width, height) == (SIDE, SIDE)  # as `layer` proposed them, and not the view alone
                fits = abs(width / height / (shown[0] / shown[1]) - 1) < _PROPORTIONS or whole
                if max(width, height) > 4 * SIDE or not fits:  # a screen may have several pixels a point
                    raise InvalidInputError("the strokes do not fit the photograph; choose the photograph again")
                alpha = strokes.convert("RGBA").getchannel("A").point([0] + [255] * 255)
                alpha = alpha.crop((0, 0, *shown)) if whole else alpha
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError("the strokes cannot be read; reload the page") from None
        covered |= np.asarray(alpha.resize(size, Image.Resampling.BOX)) > _COVERED
    if not covered.any():
        raise InvalidInputError("nothing is painted over; paint over the part that is to change")
    return covered


class Region(NamedTuple):
    """A proposed part of a view."""

    shown: np.ndarray
    """(h, w, 3) uint8, the rest of the view pale."""
    mask: bytes
    """PNG."""


def propose(shown: Image.Image, count: int) -> list[Region]:
    """The best `count` regions of a view. Raises MissingError without scikit-image."""
    from refine_control.annotation.offline_masks import propose_felzenszwalb

    pixels = np.asarray(shown)
    pale = (pixels // 4 + 180).astype(np.uint8)
    regions = []
    for proposal in propose_felzenszwalb(pixels, count):
        buffer = io.BytesIO()
        Image.fromarray(proposal.mask).save(buffer, "PNG")
        regions.append(Region(np.where(proposal.mask[..., None], pixels, pale), buffer.getvalue()))
    return regions
