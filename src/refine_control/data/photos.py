"""Photographs with given masks and prompts -> square samples, by written rules.

Sources: a JSONL manifest (rows `image`, `mask`, `local_prompt`, paths relative to the manifest), or a
folder searched recursively for `name.jpg|png|webp|tif...` + `name.mask.png` + `name.txt`.

What a file holds decides its format, not its name. EXIF orientation is applied. An embedded colour profile
is applied (-> sRGB) and then, like all metadata, dropped. 16-bit grey is scaled by 1/257; transparency is
laid on white in a photo and on black in a mask, so what is transparent in a mask is kept. Of a phone's
multi-picture JPEG the first picture is the photo; anything else with two frames or pages is refused.

Mask: grey > 127 = inpaint. It has the size of the photo as shown, or of the stored pixels, and then it
turns with them. Where both sizes are the same (a square photo, or a turn by 180 degrees) it is taken as shown.

Crop: the largest square (side = the photo's shorter side) placed to hold as much of the hole as it can,
as centred on the hole as possible. The hole of a wide photo may be wider than the square: it is cut, not
the photo padded, because invented borders would enter the reference images of FID; at least half of the
hole must remain. Image LANCZOS, mask area average > 0.5. The filter blends up to three pixels across the hole's
outline, as any camera does.
"""

# H W pixels of the photo as shown, S = size, the side of a sample

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from refine_control.data.records import Entry, Photo, Rejected, RejectReason
from refine_control.errors import InvalidInputError

MANIFEST_NAME = "manifest.jsonl"
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm")
MASK_SUFFIX = ".mask.png"
MAX_PIXELS = 100_000_000
MIN_HOLE_KEPT = 0.5
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def make_key(image: str, mask: str | None, name: object = None) -> str:
    """A shard-safe key, a pure function of the relative paths and the row's own id: `an-owl-5f0c...`."""
    identity = "\0".join((image, mask or "", "" if name is None else str(name)))
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    words = re.sub(r"[^A-Za-z0-9_]+", "-", Path(image).stem if name is None else str(name)).strip("-")[:40]
    return f"{words or 'photo'}-{digest}"


def entries(source: Path) -> Iterator[Entry]:
    """Streams the entries of a manifest (`.jsonl`, or a folder with `manifest.jsonl`) or of a plain folder.

    The order is that of the rows, or of the sorted names. Raises InvalidInputError when `source` is neither."""
    if source.is_dir():
        listed = (source / MANIFEST_NAME).is_file()
        found = _manifest_entries(source / MANIFEST_NAME) if listed else _folder_entries(source)
    elif source.is_file() and source.suffix == ".jsonl":
        found = _manifest_entries(source)
    else:
        fault = "is not" if source.exists() else "does not exist; name"
        raise InvalidInputError(f"{source} {fault} a folder of photos or a .jsonl manifest")
    return _unique(found)


def _unique(found: Iterator[Entry]) -> Iterator[Entry]:
    seen: set[str] = set()
    for entry in found:
        if entry.key in seen and entry.problem is None:
            entry = replace(entry, problem=(RejectReason.DUPLICATE, "an earlier entry has this image, mask and id"))
        seen.add(entry.key)
        yield entry


def _words(value: object) -> str:
    """One line of valid Unicode with single spaces; empty when `value` is not text."""
    return " ".join(value.encode("utf-8", "replace").decode().split()) if isinstance(value, str) else ""


def _manifest_entries(path: Path) -> Iterator[Entry]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _manifest_entry(path.parent, number, line)


def _manifest_entry(root: Path, number: int, line: bytes) -> Entry:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        row = None
    image = row.get("image") if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(image, str) or not image:
        detail = f"line {number} is not a JSON object with an `image`"
        return Entry(f"row-{number}", root, "", None, None, problem=(RejectReason.BAD_ROW, detail))
    mask = row.get("mask") if isinstance(row.get("mask"), str) and row["mask"] else None
    name = row.get("id") if isinstance(row.get("id"), str | int) else None
    captions = row["captions"] if isinstance(row.get("captions"), list) else []
    meta = {
        key: _words(value) if isinstance(value, str) else value
        for key, value in row.items()
        if key not in ("image", "mask", "local_prompt", "global_prompt")
        and (isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)))
    }
    return Entry(
        key=make_key(image, mask, name),
        root=root,
        image=image,
        mask=mask,
        prompt=_words(row.get("local_prompt")) or None,
        global_prompt=_words(row.get("global_prompt")) or next(filter(None, map(_words, captions)), ""),
        meta=meta,
    )


def _folder_entries(root: Path) -> Iterator[Entry]:
    def refuse(error: OSError) -> None:
        raise InvalidInputError(f"cannot read the folder {error.filename}: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(folder).relative_to(root)
        for name in [each for each in folders if os.path.islink(os.path.join(folder, each))]:
            image = (here / name).as_posix()
            problem = (RejectReason.OUTSIDE_TREE, "a linked folder is not followed")
            yield Entry(make_key(image, None), root, image, None, None, problem=problem)
        for name in sorted(files):
            low = name.lower()
            if low.endswith(SUFFIXES) and not low.endswith(MASK_SUFFIX) and not name.startswith("."):
                yield _folder_entry(root, here / name, set(files))


def _folder_entry(root: Path, relative: Path, siblings: set[str]) -> Entry:
    image, mask, text = relative.as_posix(), relative.stem + MASK_SUFFIX, relative.stem + ".txt"
    mask_name = relative.with_name(mask).as_posix() if mask in siblings else None
    entry = Entry(make_key(image, mask_name), root, image, mask_name, None)
    if text not in siblings:
        return entry
    try:
        path = _inside(root, relative.with_name(text).as_posix())
        return replace(entry, prompt=_words(path.read_text("utf-8-sig")) or None)
    except Rejected as error:
        return replace(entry, problem=(error.reason, f"prompt: {error.detail}"))
    except (OSError, UnicodeDecodeError):
        return replace(entry, problem=(RejectReason.NO_PROMPT, f"{text} is not a readable UTF-8 text"))


def _inside(root: Path, name: str) -> Path:
    """The regular file `name` with links resolved; Rejected where it leaves `root` or is no such file."""
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise Rejected(RejectReason.UNREADABLE, "no such file") from None
    if not path.is_relative_to(root.resolve()):
        raise Rejected(RejectReason.OUTSIDE_TREE, "the path leaves the source folder")
    if not path.is_file():
        raise Rejected(RejectReason.UNREADABLE, "not a regular file")
    return path


def source_file(entry: Entry, name: str | None) -> Path | None:
    """The file that `load` would open for `entry.image` or `entry.mask`, None where it would refuse."""
    try:
        return None if name is None else _inside(entry.root, name)
    except Rejected:
        return None


def _decode(path: Path) -> tuple[Image.Image, int]:
    """The first picture, 8 bits a channel, as shown, and the EXIF orientation (1 to 8) it was stored with."""
    with warnings.catch_warnings():  # Pillow warns of odd metadata, and of bombs that are refused below
        warnings.simplefilter("ignore")
        try:
            image = Image.open(path, formats=FORMATS)
        except Image.DecompressionBombError:
            raise Rejected(RejectReason.BOMB, f"more than {MAX_PIXELS:,} pixels") from None
        except Exception:  # Pillow's plugins raise nearly anything at bytes that are not an image
            raise Rejected(RejectReason.UNREADABLE, f"not an image; known: {', '.join(FORMATS)}") from None
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected(RejectReason.BOMB, f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS:,}")
            try:
                if image.format != "MPO" and getattr(image, "is_animated", False):
                    raise Rejected(RejectReason.ANIMATED, f"{getattr(image, 'n_frames', 2)} frames or pages")
                stored = image.getexif().get(_ORIENTATION, 1)
                image.load()
                left = image.getexif().get(_ORIENTATION, 1)  # Pillow has turned a TIFF by itself: 1 here
                shown = _eight_bit(image)
                return shown.transpose(_TURNS[left]) if left in _TURNS else shown, stored
            except Exception as error:  # as above, at bytes that stop or change half-way
                raise error if isinstance(error, Rejected) else Rejected(RejectReason.TRUNCATED, str(error)) from None


def _eight_bit(image: Image.Image) -> Image.Image:
    """Modes I, I;16 -> L by v / 257; a profile -> sRGB; other modes as they are, apart from the file."""
    if image.mode == "F":
        raise Rejected(RejectReason.UNREADABLE, "floating-point pixels have no known range")
    if image.mode.startswith("I"):
        return Image.fromarray(np.clip((np.asarray(image).astype(np.int64) + 128) // 257, 0, 255).astype(np.uint8))
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "RGBA", "CMYK"):
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile means what no profile means
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode=mode) or image
    return image.copy()


def _on(image: Image.Image, ground: str) -> Image.Image:
    """RGB, with transparency laid on the colour `ground`."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA")).convert("RGB")


def _load_mask(entry: Entry, size: tuple[int, int], orientation: int) -> np.ndarray:
    """(H, W) bool of a photo whose shown size is `size` = (W, H); Rejected by the rules above."""
    if entry.mask is None:
        raise Rejected(RejectReason.NO_MASK, "no mask is named")
    if not os.path.lexists(entry.root / entry.mask):
        raise Rejected(RejectReason.NO_MASK, "the mask's file is not there")
    try:
        picture, _ = _decode(_inside(entry.root, entry.mask))
    except Rejected as error:
        outside = error.reason is RejectReason.OUTSIDE_TREE
        raise Rejected(error.reason if outside else RejectReason.MASK_UNREADABLE, f"mask: {error.detail}") from None
    stored = size[::-1] if orientation in (5, 6, 7, 8) else size
    if picture.size == stored != size:
        picture = picture.transpose(_TURNS[orientation])
    if picture.size != size:
        detail = f"mask {picture.width} x {picture.height}, photo {size[0]} x {size[1]}"
        raise Rejected(RejectReason.MASK_SIZE_MISMATCH, detail)
    grey = np.asarray(_on(picture, "black").convert("L"))
    if grey.max() <= 127:
        raise Rejected(RejectReason.MASK_EMPTY, f"the largest value is {grey.max()}; over 127 means inpaint")
    if grey.min() > 127:
        raise Rejected(RejectReason.MASK_FULL, "every pixel is masked")
    return grey > 127


def crop_box(mask: np.ndarray) -> tuple[int, int, int]:
    """(H, W) bool, not empty -> (x, y, side) of the largest square that holds the most of the hole.

    Of equal places the one nearest to the hole's centre. Rejected when under half of the hole fits."""
    height, width = mask.shape
    side, along = min(height, width), int(width < height)
    line = mask.sum(axis=along)  # pixels of the hole in each column of a wide photo, each row of a tall one
    total = np.concatenate([[0], np.cumsum(line)])
    held = total[side:] - total[:-side]
    occupied = np.flatnonzero(line)
    centre = (occupied[0] + occupied[-1] + 1 - side) / 2
    best = np.flatnonzero(held == held.max())
    start = int(best[np.argmin(np.abs(best - centre))])
    if held[start] < MIN_HOLE_KEPT * total[-1]:
        share = held[start] / total[-1]
        raise Rejected(RejectReason.MASK_DOES_NOT_FIT, f"{share:.0%} of the hole fits into a square")
    return (start, 0, side) if along == 0 else (0, start, side)


def load(entry: Entry, size: int, *, enlarge: bool = False) -> Photo:
    """Decodes, crops and resizes one entry to image (S, S, 3) uint8 and mask (S, S) bool.

    `meta` gains `photo`, `width`, `height` (as shown) and `crop` [x, y, side]. `enlarge` admits photos whose
    shorter side is less than `size`. Raises Rejected with the reason."""
    if entry.problem is not None:
        raise Rejected(*entry.problem)
    picture, orientation = _decode(_inside(entry.root, entry.image))
    if min(picture.size) < size and not enlarge:
        raise Rejected(RejectReason.TOO_SMALL, f"{picture.width} x {picture.height}, a sample has {size} x {size}")
    mask = _load_mask(entry, picture.size, orientation)
    if entry.prompt is None:
        raise Rejected(RejectReason.NO_PROMPT, "no words for the hole")
    x, y, side = crop_box(mask)
    image = _on(picture.crop((x, y, x + side, y + side)), "white").resize((size, size), Image.Resampling.LANCZOS)
    hole = Image.fromarray(mask[y : y + side, x : x + side].astype(np.float32))
    hole = np.asarray(hole.resize((size, size), Image.Resampling.BOX)) > 0.5
    if not hole.any():
        raise Rejected(RejectReason.MASK_EMPTY, f"nothing of the hole is left at {size} pixels")
    if hole.all():
        raise Rejected(RejectReason.MASK_FULL, "nothing but the hole is left in the crop")
    where = {"photo": entry.photo, "width": picture.width, "height": picture.height, "crop": [x, y, side]}
    return Photo(entry.key, np.asarray(image), hole, entry.prompt, entry.global_prompt, {**entry.meta, **where})
