"""The bytes of an image file -> a picture of 8 bits a channel, as a viewer shows it.

The content of a file decides its format, not its name. EXIF orientation is applied. An embedded colour profile
is applied (-> sRGB) and then, like all metadata, dropped. Broken metadata (EXIF, profile, texts) count as absent, as
long as the pixels are whole. Pillow checks no checksum of a PNG's pixels and refuses the whole file for a broken text;
here it is the other way round. A JPEG has no checksums: an interrupted download that was filled up with zeros is
recognised by its end. 16-bit grey is scaled by 1/257; transparent pixels become white in
a photo and black (keep) in a mask. The first picture of a phone's multi-picture JPEG is the photo; any other file with
two frames or pages is refused.
"""

# H W pixels as shown

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms

from refine_control.records import MAX_PIXELS, Rejected, RejectReason

Result = TypeVar("Result")
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
_ORIENTATION = 0x0112
_NO_PROFILE = (ImageCms.PyCMSError, OSError, TypeError, ValueError)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_PNG_METADATA = frozenset(
    b"tEXt zTXt iTXt tIME gAMA cHRM sRGB iCCP cICP mDCv cLLi sBIT bKGD hIST sPLT pHYs oFFs pCAL sCAL sTER eXIf".split()
)
"""Chunks without which every viewer shows the picture; tRNS is no metadata."""
_JPEG_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
"""APP1 to APP13, APP15 and comments. APP0 and APP14 say how colours are stored."""
_SCAN, _END = 0xDA, b"\xff\xd9"
_ZEROS = 64
"""So many zero bytes at the end of a JPEG without an end mark are no picture."""


class Header(NamedTuple):
    """What a file says of its picture before any pixel is decoded."""

    size: tuple[int, int]
    """(W, H) as shown."""
    orientation: int
    """EXIF, 1 to 8: how the stored pixels are turned to be shown."""

    @property
    def stored(self) -> tuple[int, int]:
        """(W, H) of the stored pixels."""
        width, height = self.size
        return (height, width) if self.orientation >= 5 else (width, height)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The file as Pillow sees it, one picture of fewer than MAX_PIXELS; an error inside becomes TRUNCATED."""
    with warnings.catch_warnings():  # Pillow warns of odd metadata, and of bombs that are refused below
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise Rejected(RejectReason.BOMB, f"{MAX_PIXELS:,} pixels or more") from None
        except Exception:  # Pillow's plugins raise nearly anything at bytes that are not an image
            raise Rejected(RejectReason.UNREADABLE, f"not an image; known: {', '.join(FORMATS)}") from None
        with image:
            if image.width * image.height >= MAX_PIXELS:
                detail = f"{image.width} x {image.height} pixels; a photo has fewer than {MAX_PIXELS:,}"
                raise Rejected(RejectReason.BOMB, detail)
            try:
                if image.format != "MPO" and getattr(image, "is_animated", False):
                    raise Rejected(RejectReason.ANIMATED, f"{getattr(image, 'n_frames', 2)} frames or pages")
                yield image
            except Exception as error:  # as above, at bytes that stop or change half-way
                raise error if isinstance(error, Rejected) else Rejected(RejectReason.TRUNCATED, str(error)) from None


def _read(data: bytes, work: Callable[[Image.Image], Result]) -> Result:
    """`work` on the opened picture; once more without the metadata where these may be what cannot be read."""
    data = _check_pixels(data)
    try:
        with _opened(data) as image:
            return work(image)
    except Rejected as error:
        plain = _without_metadata(data) if error.reason in (RejectReason.UNREADABLE, RejectReason.TRUNCATED) else data
        if plain != data:
            with contextlib.suppress(Rejected), _opened(plain) as image:
                return work(image)
        raise


def _header(image: Image.Image) -> Header:
    """Before the pixels are loaded; a TIFF is loaded here, because Pillow turns it while loading."""
    orientation = _orientation(image)
    if image.format == "TIFF":
        image.load()
        return Header(image.size, orientation)
    return Header((image.height, image.width) if orientation >= 5 else image.size, orientation)


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where the EXIF is broken or says anything else."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        return int(orientation) if orientation in _TURNS else 1
    except Exception:  # whatever Pillow meets in bytes that are no EXIF
        return 1


def decode(data: bytes) -> tuple[Image.Image, Header]:
    """The first picture, 8 bits a channel, as shown. Raises Rejected with the reason."""

    def work(image: Image.Image) -> tuple[Image.Image, Header]:
        header = _header(image)
        image.load()
        return turn(_eight_bit(image), 1 if image.format == "TIFF" else header.orientation), header

    return _read(data, work)


class Original(NamedTuple):
    """A photograph as it is edited: in its own colours, beside what a model is shown of it."""

    picture: Image.Image
    """RGB or RGBA as shown, with the file's values in its own colour profile. Grey and palettes become colours, 16 bits
    8; CMYK, and what lies in a profile that nothing can be converted back to, sRGB."""
    shown: Image.Image
    """RGB, sRGB, transparency on white."""
    header: Header
    profile: bytes | None
    """ICC profile of `picture`; None is sRGB."""
    exif: bytes | None
    """Without a thumbnail, for upright pixels."""

    def in_own_colours(self, painted: Image.Image) -> Image.Image:
        """RGB in sRGB -> RGB in the profile of `picture`."""
        return painted if self.profile is None else _converted(painted, None, self.profile, "RGB")


def read_original(data: bytes) -> Original:
    """The photograph in the bytes of a file. Raises Rejected with the reason."""
    return _read(data, as_original)


def as_original(image: Image.Image) -> Original:
    """An opened photograph. Raises Rejected where its pixels have no known range, and what Pillow raises."""
    header, embedded = _header(image), image.info.get("icc_profile")
    image.load()
    stored, profile, turned = image, None, 1 if image.format == "TIFF" else header.orientation
    shown = _eight_bit(image)
    if embedded and image.mode in ("RGB", "RGBA"):
        with contextlib.suppress(*_NO_PROFILE):
            _converted(Image.new("RGB", (1, 1)), None, embedded, "RGB")
            profile = embedded
    if profile is None:
        stored = shown
    picture = turn(stored.convert("RGBA" if stored.has_transparency_data else "RGB"), turned)
    exif = _upright_exif(image, picture.size)
    return Original(picture, turn(on_ground(shown, "white"), turned), header, profile, exif)


def _upright_exif(image: Image.Image, size: tuple[int, int]) -> bytes | None:
    """The EXIF of a picture that was turned as it says, without its thumbnail; None where there is none to be read."""
    try:
        exif = image.getexif()
        if not len(exif):
            return None
        inner = exif.get_ifd(ExifTags.IFD.Exif)
        exif[_ORIENTATION] = 1
        for tag, side in zip((ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight), size, strict=True):
            if tag in inner:
                inner[tag] = side
        return exif.tobytes()
    except Exception:  # as in `_orientation`
        return None


def read_header(data: bytes) -> Header:
    """Size and orientation of a picture. Raises Rejected with the reason."""
    return _read(data, _header)


def thumbnail(data: bytes, side: int) -> tuple[np.ndarray, Header]:
    """(side, side) uint8 grey: the whole picture as shown, without its aspect ratio. Raises Rejected with the reason.

    A JPEG is decoded at the smallest scale that suffices; colour profiles are ignored."""

    def work(image: Image.Image) -> tuple[np.ndarray, Header]:
        header = _header(image)
        whole = image.size
        if image.format in ("JPEG", "MPO"):
            image.draft("L", (2 * side, 2 * side))
        image.load()
        shrunk = round(whole[0] / image.width)  # by 1, 2, 4 or 8: the last column and row are then cut short
        grey = on_ground(_eight_bit(image, profile=False), "white").convert("L")
        box = (0.0, 0.0, min(whole[0] / shrunk, grey.width), min(whole[1] / shrunk, grey.height))
        small = grey.resize((side, side), Image.Resampling.BOX, box=box)
        return np.asarray(turn(small, 1 if image.format == "TIFF" else header.orientation)), header

    return _read(data, work)


def _eight_bit(image: Image.Image, *, profile: bool = True) -> Image.Image:
    """Modes I, I;16 -> L by v / 257; a profile -> sRGB; other modes as they are, apart from the file."""
    if image.mode == "F":
        raise Rejected(RejectReason.UNREADABLE, "floating-point pixels have no known range")
    if image.mode.startswith("I"):
        return Image.fromarray(np.clip((np.asarray(image).astype(np.int64) + 128) // 257, 0, 255).astype(np.uint8))
    embedded = image.info.get("icc_profile") if profile else None
    if embedded and image.mode in ("RGB", "RGBA", "CMYK"):
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        with contextlib.suppress(*_NO_PROFILE):  # a broken profile is ignored
            return _converted(image, embedded, None, mode)
    return image.copy()


def _converted(image: Image.Image, source: bytes | None, target: bytes | None, mode: str) -> Image.Image:
    """From one ICC profile to another; one of them is None, sRGB. Raises one of _NO_PROFILE for a broken profile."""
    srgb, theirs = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(source or target or b""))
    ends = (theirs, srgb) if source else (srgb, theirs)
    converted = ImageCms.profileToProfile(image, *ends, outputMode=mode)
    return converted if converted is not None else image.copy()


def on_ground(image: Image.Image, ground: str) -> Image.Image:
    """RGB, with transparency laid on the colour `ground`."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA")).convert("RGB")


def turn(picture: Image.Image, orientation: int) -> Image.Image:
    """Stored pixels as shown, by an EXIF orientation from 1 to 8."""
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


# Which bytes of a file are metadata


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each whole chunk of a PNG, up to IEND or to where the file is cut."""
    start, kind = len(_PNG), b""
    while kind != b"IEND" and (end := start + 12 + int.from_bytes(data[start : start + 4])) <= len(data):
        kind = data[start + 4 : start + 8]
        yield kind, start, end
        start = end


def _check_pixels(data: bytes) -> bytes:
    """The file without metadata that fail their checksum; Rejected where this is a part of the picture."""
    if data.startswith(_PNG):
        view, broken = memoryview(data), []
        for kind, start, end in _chunks(data):
            if zlib.crc32(view[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end]):
                continue
            if kind not in _PNG_METADATA:
                reason = RejectReason.UNREADABLE if kind == b"IHDR" else RejectReason.TRUNCATED
                raise Rejected(reason, f"the checksum of its {kind.decode('ascii', 'backslashreplace')} chunk is wrong")
            broken.append((start, end))
        return _without(data, broken)
    zeros = len(data) - len(data.rstrip(b"\0"))
    if data.startswith(_JPEG) and zeros >= _ZEROS and not data.endswith(_END, 0, len(data) - zeros):
        raise Rejected(RejectReason.TRUNCATED, f"its last {zeros:,} bytes are zeros")
    return data


def _without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG with nothing but its picture and its EXIF; files of other formats as they are."""
    if data.startswith(_PNG):
        return _without(data, [each[1:] for each in _chunks(data) if each[0] in _PNG_METADATA - {b"eXIf"}])
    return _without(data, list(_jpeg_metadata(data))) if data.startswith(_JPEG) else data


def _jpeg_metadata(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of the segments before the first scan that are metadata and no EXIF."""
    start = 2
    while start + 4 <= len(data) and data[start] == 0xFF and (marker := data[start + 1]) != _SCAN:
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker in _JPEG_METADATA and data[start + 4 : start + 8] != b"Exif":
            yield start, end
        start = end


def _without(data: bytes, parts: Sequence[tuple[int, int]]) -> bytes:
    """The bytes outside the given parts, which are in order."""
    starts, ends = [start for start, _ in parts], [end for _, end in parts]
    pieces = zip((0, *ends), (*starts, len(data)), strict=True)
    return b"".join(data[start:end] for start, end in pieces) if parts else data
