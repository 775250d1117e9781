"""Pictures side by side: a row for each scene, a column for each method, as one labelled PNG or cell by cell; and
contact sheets, where each picture has its own caption.

# pictures (H, W, 3) uint8; masks (H, W) bool, True = inpainted
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from refine_control.errors import InvalidInputError
from refine_control.records import Photo

if TYPE_CHECKING:
    from PIL.Image import Image

CELL_PIXELS = 192
"""Small pictures are enlarged by the least whole factor that makes their longer side this long."""
LARGEST_CELL = 640
"""Pictures with a longer side than this are reduced by a whole factor: a report must travel by mail."""
SHEET_CELL, SHEET_LETTERS = 128, 60
"""Longer side of a picture of a contact sheet, by whole factors at most; letters of its caption."""
OUTLINE = (255, 0, 170)


@dataclass(frozen=True)
class PictureGrid:
    """One row for each scene: a picture for each column, its prompt in `captions`, and optionally its mask,
    outlined on the picture of `outlined_column` (the original) alone."""

    columns: Sequence[str]
    rows: Sequence[Sequence[NDArray[np.uint8]]]
    captions: Sequence[str]
    masks: Sequence[NDArray[np.bool_] | None] = ()
    outlined_column: int = 0
    title: str = "Pictures"


def repaint_grid(
    photos: Sequence[Photo],
    painted: Mapping[str, Sequence[NDArray[np.uint8]] | NDArray[np.uint8]],
    title: str = "Pictures",
    captions: Sequence[str] | None = None,
) -> PictureGrid:
    """The original (mask outlined), the original with a black hole or the condition picture, and what each model
    painted, for every photo of one condition.

    The captions are the prompts by default."""
    shown = [np.where(p.mask[..., None], 0, p.image).astype(np.uint8) if p.cond is None else p.cond for p in photos]
    rows = [[photo.image, shown[i], *(p[i] for p in painted.values())] for i, photo in enumerate(photos)]
    captions = captions or [photo.prompt for photo in photos]
    second = "masked" if all(photo.cond is None for photo in photos) else "condition"
    return PictureGrid(["original", second, *painted], rows, captions, outlines(photos), title=title)


def outlines(photos: Sequence[Photo]) -> list[NDArray[np.bool_] | None]:
    """What is outlined on each photo: its mask where it has a region."""
    return [photo.mask if photo.cond is None else None for photo in photos]


def picture_grid(grid: PictureGrid) -> bytes:
    """PNG of all rows and columns with their labels; the mask outlined on the original; same data, same bytes.

    Raises InvalidInputError for rows, captions or masks that do not fit the columns or the pictures."""
    return _page(picture_cells(grid), grid.columns, [[caption] for caption in grid.captions])


def contact_sheet(
    pictures: Sequence[NDArray[np.uint8]], masks: Sequence[NDArray[np.bool_]], captions: Sequence[str]
) -> bytes:
    """PNG of small pictures, as many across as down, each with its mask outlined and its caption below.

    Args: (H, W, 3) uint8 and (H, W) bool of any sizes, at least one; a caption for each."""
    cells = [_cell(picture, mask, sheet=True) for picture, mask in zip(pictures, masks, strict=True)]
    across = math.ceil(math.sqrt(len(cells)))
    starts = range(0, len(cells), across)
    short = [textwrap.shorten(caption, SHEET_LETTERS, placeholder="...") for caption in captions]
    return _page([cells[i : i + across] for i in starts], (), [short[i : i + across] for i in starts])


def _page(rows: Sequence[Sequence[Image]], headers: Sequence[str], captions: Sequence[Sequence[str]]) -> bytes:
    """PNG of rows of pictures under their headers. A row has one caption for all or one for each picture."""
    from PIL import Image, ImageDraw, ImageFont

    width, across = max(cell.width for row in rows for cell in row), max(len(row) for row in rows)
    unit = max(12, width // 14)  # the height of a letter grows with the pictures
    gap, margin, line = unit // 2, unit, unit + unit // 3
    font, small = ImageFont.load_default(unit), ImageFont.load_default(unit - 1)
    total = 2 * margin + across * (width + gap) - gap
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def height(texts: Sequence[str], room: int = 0) -> int:
        lines = max((text.count("\n") + 1 for text in texts if text), default=0)
        return room + line * lines if lines else 0

    wrapped = [_wrapped(draw, name, font, width) for name in headers]
    below = [
        [_wrapped(draw, text, small, total - 2 * margin if len(texts) == 1 else width) for text in texts]
        for texts in captions
    ]
    header_height = height(wrapped, gap)
    heights = [max(cell.height for cell in row) for row in rows]
    body = sum(heights) + sum(height(texts, gap) for texts in below) + 2 * gap * (len(rows) - 1)
    page = Image.new("RGB", (total, 2 * margin + header_height + body), (255, 255, 255))
    draw = ImageDraw.Draw(page)
    lefts = [margin + column * (width + gap) for column in range(across)]
    for left, header in zip(lefts, wrapped, strict=False):
        draw.multiline_text((left, margin), header, fill=(20, 24, 33), font=font, spacing=unit // 3)
    top = margin + header_height
    for row, texts, tall in zip(rows, below, heights, strict=True):
        for left, cell in zip(lefts, row, strict=False):
            page.paste(cell, (left, top))
        for left, text in zip(lefts, texts, strict=False):
            draw.multiline_text((left, top + tall + gap), text, fill=(90, 98, 112), font=small, spacing=unit // 3)
        top += tall + height(texts, gap) + 2 * gap
    return png_bytes(page)


def _check_grid(grid: PictureGrid) -> None:
    if not grid.columns or not grid.rows:
        raise InvalidInputError("a picture grid needs at least one column and one row")
    if len(grid.captions) != len(grid.rows) or (grid.masks and len(grid.masks) != len(grid.rows)):
        given = f"{len(grid.captions)} captions and {len(grid.masks)} masks"
        raise InvalidInputError(
            f"{len(grid.rows)} picture rows came with {given}; give one of each for a row, or no masks"
        )
    if not 0 <= grid.outlined_column < len(grid.columns):
        raise InvalidInputError(f"column {grid.outlined_column} cannot be outlined: there are {len(grid.columns)}")
    for number, row in enumerate(grid.rows):
        if len(row) != len(grid.columns):
            raise InvalidInputError(f"picture row {number} has {len(row)} pictures for {len(grid.columns)} columns")
        for picture in row:
            if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
                raise InvalidInputError(f"a picture in row {number} is not a uint8 array; give values from 0 to 255")
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
                raise InvalidInputError(f"a picture in row {number} has shape {picture.shape}; give (H, W, 3)")
        mask = grid.masks[number] if grid.masks else None
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != row[grid.outlined_column].shape[:2]):
            kind = f"{mask.dtype} of shape {mask.shape}"
            raise InvalidInputError(f"the mask of row {number} is {kind}; give bool of its picture's size")


def picture_cells(grid: PictureGrid) -> list[list[Image]]:
    """The pictures at the size they are shown, the outlined column with its mask's outline.

    Raises InvalidInputError as `picture_grid` does."""
    _check_grid(grid)
    return [
        [
            _cell(picture, grid.masks[number] if grid.masks and column == grid.outlined_column else None)
            for column, picture in enumerate(row)
        ]
        for number, row in enumerate(grid.rows)
    ]


def _cell(picture: NDArray[np.uint8], mask: NDArray[np.bool_] | None, sheet: bool = False) -> Image:
    """Enlarged (nearest) or reduced (mean) by a whole factor, its mask outlined."""
    from PIL import Image

    longest = max(picture.shape[:2])
    larger = SHEET_CELL // longest if sheet else math.ceil(CELL_PIXELS / longest)
    larger, smaller = max(1, larger), math.ceil(longest / (SHEET_CELL if sheet else LARGEST_CELL))
    shown = np.asarray(Image.fromarray(picture).reduce(smaller)).repeat(larger, axis=0).repeat(larger, axis=1)
    if mask is not None:
        shown = _outlined(shown, mask[::smaller, ::smaller].repeat(larger, axis=0).repeat(larger, axis=1))
    return Image.fromarray(shown)


def _outlined(picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A thin coloured line just outside the mask, white around it to be seen on any colour; inside the mask
    only where that reaches the picture's border."""
    from scipy.ndimage import binary_dilation

    line = max(1, max(mask.shape) // 96)
    square = np.ones((3, 3), dtype=bool)
    around = np.asarray(binary_dilation(mask, square, iterations=line), dtype=bool)
    wider = np.asarray(binary_dilation(around, square, iterations=max(1, line // 2)), dtype=bool)
    border = np.ones_like(mask)
    border[line:-line, line:-line] = False
    shown = picture.copy()
    shown[wider & ~around] = 255
    shown[around & (~mask | border)] = OUTLINE
    return shown


def _wrapped(draw: Any, text: str, font: Any, width: int) -> str:
    """Line breaks between words, so that no line is wider than `width` unless one word is."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def png_bytes(image: Image) -> bytes:
    """PNG without any date in it: equal pixels give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
