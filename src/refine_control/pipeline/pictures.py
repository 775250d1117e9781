"""Photographs and masks from files, PIL images and arrays, and pictures as files.

A photograph is read by the rules of `photos.decode` and comes back RGB or RGBA with 8 bits a channel, upright, in its
own colour profile and with its EXIF: values that nobody painted are those of the file. Its transparency stays as it is;
a JPEG has none, and gets the photograph on white.
"""

# H W pixels of the photograph as shown

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from refine_control.errors import InvalidInputError
from refine_control.photos.decode import Original, as_original, decode, on_ground, read_original
from refine_control.photos.files import read_bytes
from refine_control.photos.load import condition_picture, region
from refine_control.pipeline.framing import box_mask
from refine_control.records import MAX_PIXELS, Rejected

Picture = str | Path | Image.Image | np.ndarray
_JPEG = {"quality": 95, "subsampling": 0}
FORMATS: dict[str, dict[str, Any]] = {".png": {}, ".jpg": _JPEG, ".jpeg": _JPEG, ".webp": {"lossless": True}}
"""How a picture is written, by the end of its file's name."""
A_PICTURE_EACH, EACH_OF_ITS_SIZE = (
    "a picture for each ControlNet",
    "a picture of the photograph's size for each ControlNet",
)


def read_photograph(image: Picture) -> Original:
    """A photograph from a file, a PIL image or (H, W, 3) uint8. Raises InvalidInputError for what is none."""
    if isinstance(image, str | Path):
        with _refusing(image):
            return read_original(_read(Path(image), "a photograph"))
    picture = _as_pil(image, "the photograph")
    with _refusing("the photograph"):
        return as_original(picture)


def read_mask(mask: Picture | Sequence[int], photograph: Original) -> np.ndarray:
    """(H, W) bool of a photograph as shown, from a file, a PIL image, (H, W) bool or uint8, or a box x0, y0, x1, y1.

    Raises InvalidInputError for what is no mask of this photograph."""
    if isinstance(mask, Sequence) and not isinstance(mask, str):
        if len(mask) != 4 or not all(isinstance(side, int | np.integer) for side in mask):
            raise InvalidInputError(f"{tuple(mask)} is no box; give x0, y0, x1, y1 in whole pixels")
        x0, y0, x1, y1 = map(int, mask)
        mask = box_mask((x0, y0, x1, y1), *photograph.header.size)
    picture = _open(mask, "the mask", "a mask (white = inpaint)")
    with _refusing(mask if isinstance(mask, str | Path) else "the mask"):
        return region(on_ground(picture, "black").convert("L"), photograph.header)


def read_condition(picture: Picture, photograph: Original, ground: str) -> np.ndarray:
    """(H, W, 3) uint8 of a photograph as shown, from a file, a PIL image or an array, with `ground` under transparency.

    Raises InvalidInputError for what is no picture of its size."""
    opened = _open(picture, "the condition picture", EACH_OF_ITS_SIZE)
    with _refusing(picture if isinstance(picture, str | Path) else "the condition picture"):
        return condition_picture(on_ground(opened, ground), photograph.header)


def _open(given: Picture, what: str, advice: str) -> Image.Image:
    """A picture from a file, upright, from a PIL image or an array."""
    if not isinstance(given, str | Path):
        return _as_pil(given, what)
    with _refusing(given):
        return decode(_read(Path(given), advice))[0]


def encode_picture(image: Image.Image, out: Path, **more: Any) -> bytes:
    """The bytes of a file called `out`, with the image's profile and EXIF, and `more` as Pillow takes it.

    Raises InvalidInputError for another ending."""
    check_ending(out)
    ending, buffer = out.suffix.lower(), io.BytesIO()
    kept = {name: image.info[name] for name in ("icc_profile", "exif") if image.info.get(name)}
    flat = on_ground(image, "white") if FORMATS[ending] is _JPEG else image
    flat.save(buffer, Image.registered_extensions()[ending], **FORMATS[ending], **kept, **more)
    return buffer.getvalue()


def check_prompt(prompt: str, what: str = "the content of the masked region") -> None:
    """Raises InvalidInputError for an empty prompt."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidInputError(f"the prompt is empty; describe {what}")


def check_ending(out: Path) -> None:
    """Raises InvalidInputError for a file name that does not say how a picture is written."""
    if out.suffix.lower() not in FORMATS:
        raise InvalidInputError(f"{out} ends in none of {', '.join(FORMATS)}; name the picture to write so")


def check_files(paths: Sequence[Path], what: str) -> None:
    """Raises InvalidInputError, which asks for `what`, where one of the files is not there."""
    for path in paths:
        if not path.is_file():
            raise InvalidInputError(f"no file at {path}; give {what}")


def _read(path: Path, what: str) -> bytes:
    check_files([path], what)
    whole = path.resolve()
    return read_bytes(Path(whole.anchor), str(whole))


@contextlib.contextmanager
def _refusing(given: str | Path) -> Iterator[None]:
    """What is wrong with a file or picture, as an error for its user."""
    try:
        yield
    except Rejected as error:
        raise InvalidInputError(f"{given}: {error.detail} ({error.reason.value})") from None
    except (OSError, SyntaxError) as error:  # Pillow's, of an image that it has opened but not read
        raise InvalidInputError(f"{given} cannot be read: {error}") from None


def _as_pil(given: Image.Image | np.ndarray, what: str) -> Image.Image:
    """Raises InvalidInputError for anything else, and for pictures that are too large."""
    picture = _from_array(given, what) if isinstance(given, np.ndarray) else given
    if not isinstance(picture, Image.Image):
        raise InvalidInputError(f"{what} is a {type(given).__name__}; give a file, a PIL image or an array")
    if picture.width * picture.height >= MAX_PIXELS:
        raise InvalidInputError(f"{what} has {picture.width} x {picture.height} pixels; give fewer than {MAX_PIXELS:,}")
    return picture


def _from_array(given: np.ndarray, what: str) -> Image.Image:
    usable = given.dtype in (bool, np.uint8) and given.ndim in (2, 3) and given.shape[2:] in ((), (3,), (4,))
    if not usable or not given.size:
        shape = "(H, W) bool or uint8" if what == "the mask" else "(H, W, 3) uint8"
        raise InvalidInputError(f"{what} is an array {given.shape} of {given.dtype}; give {shape}")
    return Image.fromarray(given.astype(np.uint8) * np.uint8(255) if given.dtype == bool else given)
