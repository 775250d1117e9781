"""Laws of damage: broken metadata do not cost a picture, and a broken picture does not pass for a whole one."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from refine_control.photos.decode import decode, read_header, thumbnail
from refine_control.records import MAX_PIXELS, Rejected
from refine_control.records import RejectReason as R

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
EXIF_TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def saved(**options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_with(*chunks: bytes) -> bytes:
    """The chunks stand behind IHDR."""
    data = saved()
    return data[:33] + b"".join(chunks) + data[33:]


def jpeg_with(marker: int, content: bytes) -> bytes:
    data = saved(format="JPEG", quality=95, dpi=(72, 72))
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


def refusal(data: bytes) -> Rejected:
    with pytest.raises(Rejected) as caught:
        decode(data)
    return caught.value


BROKEN_PNG_METADATA = {
    "exif without a TIFF header": chunk(b"eXIf", b"\x01\x02" * 12),
    "exif that is text": chunk(b"eXIf", b"b'Exif\\x00'"),
    "empty exif": chunk(b"eXIf", b""),
    "text with a wrong checksum": chunk(b"tEXt", b"Comment\0hello", 7),
    "exif with a wrong checksum": chunk(b"eXIf", EXIF_TURNED, 7),
    "gamma of one byte": chunk(b"gAMA", b"\1"),
    "empty sRGB": chunk(b"sRGB", b""),
    "short resolution": chunk(b"pHYs", b"\1\2"),
    "short chromaticities": chunk(b"cHRM", b"\1" * 7),
    "profile of an unknown compression": chunk(b"iCCP", b"name\0\7" + b"x" * 20),
    "profile that cannot be unpacked": chunk(b"iCCP", b"name\0\0" + b"x" * 20),
    "text of an unknown compression": chunk(b"zTXt", b"name\0\7" + b"x" * 20),
    "text that unpacks without end": chunk(b"zTXt", b"name\0\0" + zlib.compress(bytes(10**7))),
    "exif as text that is not hexadecimal": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzz"),
}


@pytest.mark.parametrize("name", BROKEN_PNG_METADATA)
def test_broken_metadata_of_a_png_count_as_absent(name):
    picture, header = decode(png_with(BROKEN_PNG_METADATA[name]))
    assert np.array_equal(picture, PIXELS)
    assert header.orientation == 1


def test_a_broken_text_does_not_cost_the_orientation():
    turned, header = decode(png_with(chunk(b"eXIf", EXIF_TURNED), BROKEN_PNG_METADATA["gamma of one byte"]))
    assert header == ((24, 40), 6)
    assert np.array_equal(turned, np.rot90(PIXELS, -1))


def test_a_broken_text_behind_the_pixels_is_ignored():
    data = saved()
    end = data.index(b"IEND") - 4
    for name in ("text that unpacks without end", "text with a wrong checksum"):
        assert np.array_equal(decode(data[:end] + BROKEN_PNG_METADATA[name] + data[end:])[0], PIXELS)


@pytest.mark.parametrize("content", [b"", b"II*\0\xff\xff\xff\xff", b"b'Exif'", b"\1" * 30, b"MM\0*\0\0\0\x08\0\x09"])
def test_a_broken_exif_of_a_jpeg_counts_as_absent(content):
    expected = decode(saved(format="JPEG", quality=95))[0]
    data = jpeg_with(0xE1, b"Exif\0\0" + content)
    assert np.array_equal(decode(data)[0], expected)
    assert read_header(data) == ((40, 24), 1)
    assert thumbnail(data, 8)[0].shape == (8, 8)


@pytest.mark.parametrize("marker", [0xE2, 0xED, 0xEE - 1, 0xFE])
def test_other_broken_segments_of_a_jpeg_are_ignored(marker):
    expected = decode(saved(format="JPEG", quality=95))[0]
    for content in (b"MPF\0garbage", b"ICC_PROFILE\0", b"Photoshop 3.0\x008BIM\4", b""):
        assert np.array_equal(decode(jpeg_with(marker, content))[0], expected)


def test_pixels_that_fail_their_checksum_are_refused():
    data = bytearray(saved())
    place = data.index(b"IDAT") + 300
    for bit in range(8):
        changed = data.copy()
        changed[place] ^= 1 << bit
        for read in (decode, read_header, lambda each: thumbnail(each, 8)):
            with pytest.raises(Rejected, match=r"truncated.*checksum.*IDAT"):
                read(bytes(changed))
    changed = data.copy()
    changed[data.index(b"IDAT")] ^= 0x20  # `iDAT`: no kind of metadata that is known
    assert refusal(bytes(changed)).reason is R.TRUNCATED
    palette = io.BytesIO()
    Image.fromarray(PIXELS).quantize(8).save(palette, "PNG")
    changed = bytearray(palette.getvalue())
    changed[changed.index(b"PLTE") + 5] ^= 1
    assert "PLTE" in refusal(bytes(changed)).detail


def test_a_jpeg_that_was_filled_up_with_zeros_is_refused():
    data = saved(format="JPEG", quality=95)
    assert np.array_equal(decode(data + bytes(500))[0], decode(data)[0])  # behind its end they do no harm
    for kept in (len(data) // 2, len(data) - 100):
        assert refusal(data[:kept] + bytes(len(data) - kept)).reason is R.TRUNCATED


@pytest.mark.parametrize("side", [10_000, 10_001])
def test_the_limit_of_pixels_is_the_one_that_the_reason_names(side):
    data = bytearray(saved())
    for width, height, refused in ((side, 10_000, True), (9_999, 10_000, False)):
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        if refused:
            with pytest.raises(Rejected, match=f"bomb.*fewer than {MAX_PIXELS:,}"):
                read_header(bytes(data))
        else:
            assert read_header(bytes(data)).size == (width, height)
