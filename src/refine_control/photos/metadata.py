"""What in an image file is picture and what is metadata: damage of the picture is refused, damage of the rest ignored.

Pillow checks no checksum of a PNG's pixels (IDAT) and refuses the whole file for a broken text; here it is the other
way round. A JPEG has no checksums; an interrupted download that was filled up with zeros is recognised by its end.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

from refine_control.records import Rejected, RejectReason

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


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each whole chunk of a PNG, up to IEND or to where the file is cut."""
    start, kind = len(_PNG), b""
    while kind != b"IEND" and (end := start + 12 + int.from_bytes(data[start : start + 4])) <= len(data):
        kind = data[start + 4 : start + 8]
        yield kind, start, end
        start = end


def check_pixels(data: bytes) -> bytes:
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


def without_metadata(data: bytes) -> bytes:
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
