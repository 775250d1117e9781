"""Photographs with given masks and prompts -> samples, by written rules; how files are decoded: `photos.decode`.

Mask: a file, grey > 127 = inpaint, or a segmentation (`photos.regions`). It has the size of the photo as shown, or of
the stored pixels, and then it turns with them. Where both sizes are the same (a square photo, or a turn by 180
degrees) it is taken as shown. Polygons lie on the photo as shown, or on a plane of the `width` and `height` that the
source gives.

Crop: the largest square (side = the photo's shorter side) placed to hold as much of the hole as it can,
as centred on the hole as possible. The hole of a wide photo may be wider than the square: it is cut, not
the photo padded, because invented borders would enter the reference images of FID; at least half of the
hole must remain. Image LANCZOS, mask area average > 0.5. The filter blends up to three pixels across the hole's
outline, as any camera does. With buckets (`photos.buckets`) the same with the largest rectangle of the bucket's shape.

Condition picture, for conditions without a region: a file of the size of the photo or of its stored pixels, as a mask,
cropped and resized with the photo; or made from the sample's own pixels. The crop is then central.
"""

# H W pixels of the photo as shown, h w pixels of a sample

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from refine_control.conditions.condition import Condition, find_condition
from refine_control.photos.buckets import Size, nearest
from refine_control.photos.decode import Header, decode, on_ground, read_header, turn
from refine_control.photos.files import exists, read_bytes
from refine_control.photos.regions import decode_rle, polygons_to_mask
from refine_control.photos.values import take_whole
from refine_control.records import INPAINT, MAX_PIXELS, Entry, Photo, Rejected, RejectReason

MIN_HOLE_KEPT = 0.5


class _Part(NamedTuple):
    """A picture that belongs to a photo, and the reasons for which it is refused."""

    title: str
    absent: RejectReason
    unreadable: RejectReason
    mismatch: RejectReason


_MASK = _Part("mask", RejectReason.NO_MASK, RejectReason.MASK_UNREADABLE, RejectReason.MASK_SIZE_MISMATCH)
_CONDITION = _Part(
    "condition picture",
    RejectReason.NO_CONDITION,
    RejectReason.CONDITION_UNREADABLE,
    RejectReason.CONDITION_SIZE_MISMATCH,
)


def load_whole(entry: Entry) -> np.ndarray:
    """(H, W, 3) uint8 sRGB: the whole photo as shown. Raises Rejected with the reason."""
    return np.asarray(on_ground(_picture(entry)[0], "white"))


def _picture(entry: Entry) -> tuple[Image.Image, Header]:
    if entry.problem is not None:
        raise Rejected(*entry.problem)
    return decode(read_bytes(entry.root, entry.image))


def load_mask(entry: Entry, header: Header | None = None) -> np.ndarray:
    """(H, W) bool: the entry's region on the whole photo as shown, whose `header` is read where it is not given.

    Raises Rejected with the reason."""
    header = header or read_header(read_bytes(entry.root, entry.image))
    given = _drawn(entry, header) if entry.mask is None else _open(entry, entry.mask, _MASK).convert("L")
    return region(given, header)


def region(given: Image.Image, header: Header) -> np.ndarray:
    """A mask in grey, of the size of a photograph as shown or as stored -> (H, W) bool as shown.

    Raises Rejected with the reason."""
    grey = np.asarray(_as_shown(given, header, _MASK))
    if grey.max() <= 127:
        raise Rejected(RejectReason.MASK_EMPTY, f"the largest value is {grey.max()}; over 127 means inpaint")
    if grey.min() > 127:
        raise Rejected(RejectReason.MASK_FULL, "every pixel is masked")
    return grey > 127


def condition_picture(given: Image.Image, header: Header) -> np.ndarray:
    """A condition picture in RGB, of the size of a photograph as shown or as stored -> (H, W, 3) uint8 as shown.

    Raises Rejected with the reason."""
    return np.asarray(_as_shown(given, header, _CONDITION))


def _open(entry: Entry, name: str, part: _Part, ground: str = "black") -> Image.Image:
    """The file of a part in RGB, turned by its own EXIF."""
    if not exists(entry.root, name):
        raise Rejected(part.absent, f"the {part.title}'s file is not there")
    try:
        return on_ground(decode(read_bytes(entry.root, name))[0], ground)
    except Rejected as error:
        outside = error.reason is RejectReason.OUTSIDE_TREE
        raise Rejected(error.reason if outside else part.unreadable, f"{part.title}: {error.detail}") from None


def _as_shown(given: Image.Image, header: Header, part: _Part) -> Image.Image:
    """A part in the size of the photo as shown: what has that of the stored pixels turns with them."""
    if given.size == header.stored != header.size:
        given = turn(given, header.orientation)
    if given.size != header.size:
        detail = f"{part.title} {given.width} x {given.height}, photo {header.size[0]} x {header.size[1]}"
        raise Rejected(part.mismatch, detail)
    return given


def _drawn(entry: Entry, header: Header) -> Image.Image:
    """The segmentation in grey: run lengths in their own size, polygons on the photo or on the plane they name."""
    if entry.segmentation is None:
        raise Rejected(RejectReason.NO_MASK, "neither a mask nor a region of one object is named")
    if isinstance(entry.segmentation, dict):
        return Image.fromarray(decode_rle(entry.segmentation)).convert("L")
    sides = take_whole(entry.meta, "width"), take_whole(entry.meta, "height")
    # exporters write 0 or -1 for a size that they do not know
    width, height = (side if side is not None and side > 0 else s for side, s in zip(sides, header.size, strict=True))
    if width * height >= MAX_PIXELS:
        detail = f"the list says {width} x {height}, photo {header.size[0]} x {header.size[1]}"
        raise Rejected(RejectReason.MASK_SIZE_MISMATCH, detail)
    return Image.fromarray(polygons_to_mask(entry.segmentation, height, width)).convert("L")


def crop_box(mask: np.ndarray) -> tuple[int, int, int]:
    """(H, W) bool, not empty -> (x, y, side) of the largest square that holds the most of the hole.

    Of equal places the one nearest to the hole's centre. Rejected when under half of the hole fits."""
    return crop_window(mask, (1, 1))[:3]


def crop_window(mask: np.ndarray, shape: Size) -> tuple[int, int, int, int]:
    """(H, W) bool, not empty -> (x, y, width, height) of the largest window as h : w that holds the most of the hole.

    The photo's own shorter way is kept whole, the other is h : w to the nearest pixel. As `crop_box` otherwise."""
    (height, width), (h, w) = mask.shape, shape
    slides_along_x, side = _largest(width, height, shape)
    line = mask.sum(axis=0 if slides_along_x else 1)  # pixels of the hole in each column, or in each row
    total = np.concatenate([[0], np.cumsum(line)])
    held = total[side:] - total[:-side]
    occupied = np.flatnonzero(line)
    centre = (occupied[0] + occupied[-1] + 1 - side) / 2
    best = np.flatnonzero(held == held.max())
    start = int(best[np.argmin(np.abs(best - centre))])
    if held[start] < MIN_HOLE_KEPT * total[-1]:
        share, crop = held[start] / total[-1], "a square" if h == w else f"a crop as {w} : {h}"
        raise Rejected(RejectReason.MASK_DOES_NOT_FIT, f"{share:.0%} of the hole fits into {crop}")
    return (start, 0, side, height) if slides_along_x else (0, start, width, side)


def central_window(width: int, height: int, shape: Size) -> tuple[int, int, int, int]:
    """(x, y, width, height) of the window of `crop_window` where no mask steers it."""
    slides_along_x, side = _largest(width, height, shape)
    return ((width - side) // 2, 0, side, height) if slides_along_x else (0, (height - side) // 2, width, side)


def _largest(width: int, height: int, shape: Size) -> tuple[bool, int]:
    """Whether the largest window as h : w has its place along x or along y, and its side in that direction."""
    h, w = shape
    if width * h >= height * w:
        return True, min(width, max(1, (2 * height * w + h) // (2 * h)))
    return False, min(height, max(1, (2 * width * h + w) // (2 * w)))


def load(
    entry: Entry,
    size: int | Sequence[Size],
    *,
    enlarge: bool = False,
    condition: str = INPAINT,
    preparer: str | None = None,
) -> Photo:
    """Decodes, crops and resizes one entry to image (h, w, 3) uint8 and mask (h, w) bool.

    `size` is the side of a square, or the sizes (h, w) of which the photo gets the nearest in shape. `meta` gains
    `photo`, `width`, `height` (as shown) and `crop`: [x, y, side] of a square, [x, y, width, height] with several
    sizes. `enlarge` admits photos that are smaller than their sample. For a `condition` without a region, an entry of
    `sources.entries` for it, the mask is all True and the condition picture (h, w, 3) uint8 given, or made by the model
    `preparer` or by the condition itself. Raises Rejected with the reason, MissingError where what makes condition
    pictures is not there."""
    kind = find_condition(condition)
    picture, header = _picture(entry)
    h, w = (size, size) if isinstance(size, int) else nearest(picture.width, picture.height, size)
    if (picture.width < w or picture.height < h) and not enlarge:
        raise Rejected(RejectReason.TOO_SMALL, f"{picture.width} x {picture.height}, a sample has {w} x {h}")
    mask = load_mask(entry, header) if kind.region else None
    make = None if kind.region else _condition_maker(entry, header, kind, preparer)
    if entry.prompt is None:
        raise Rejected(RejectReason.NO_PROMPT, "no words for the hole" if kind.region else "no words for the photo")
    if mask is None:
        x, y, width, height = central_window(picture.width, picture.height, (h, w))
    else:
        x, y, width, height = crop_window(mask, (h, w))
    window = (x, y, x + width, y + height)
    part = on_ground(picture.crop(window), "white")
    image = np.asarray(part.resize((w, h), Image.Resampling.LANCZOS))
    hole = np.ones((h, w), bool) if mask is None else _hole(mask[y : y + height, x : x + width], (h, w))
    crop = [x, y, width] if isinstance(size, int) else [x, y, width, height]
    meta = entry.meta | {"photo": entry.photo, "width": picture.width, "height": picture.height, "crop": crop}
    cond = None if make is None else make(image, window)
    return Photo(entry.key, image, hole, entry.prompt, entry.global_prompt, meta, cond)


def _hole(mask: np.ndarray, size: Size) -> np.ndarray:
    """(H, W) bool of the crop -> (h, w) bool. Rejected where nothing is left to inpaint or to keep."""
    h, w = size
    shares = Image.fromarray(mask.astype(np.float32)).resize((w, h), Image.Resampling.BOX)
    hole = np.asarray(shares) > 0.5
    if not hole.any():
        left_at = f"{w} pixels" if h == w else f"{w} x {h} pixels"
        raise Rejected(RejectReason.MASK_EMPTY, f"nothing of the hole is left at {left_at}")
    if hole.all():
        raise Rejected(RejectReason.MASK_FULL, "nothing but the hole is left in the crop")
    return hole


def _condition_maker(
    entry: Entry, header: Header, kind: Condition, preparer: str | None
) -> Callable[[np.ndarray, tuple[int, int, int, int]], np.ndarray]:
    """(h, w, 3) uint8 of the sample and its window (left, top, right, bottom) -> condition picture (h, w, 3) uint8."""
    if entry.condition is None:
        prepare = kind.preparation(preparer)
        if prepare is None:
            raise Rejected(RejectReason.NO_CONDITION, f"no condition picture is named, and {kind.name} must be given")
        return lambda image, _: prepare(image)
    given = _open(entry, entry.condition, _CONDITION, "white" if kind.photographic else "black")
    whole = _as_shown(given, header, _CONDITION)
    how = Image.Resampling.LANCZOS if kind.photographic else Image.Resampling.BILINEAR
    return lambda image, window: np.asarray(whole.crop(window).resize(image.shape[1::-1], how))
