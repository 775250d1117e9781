"""Laws of reading photographs: what a file shows decides the sample, and what is wrong with it has a reason."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from refine_control.errors import InvalidInputError
from refine_control.photos.load import crop_box, load
from refine_control.photos.sources import entries
from refine_control.records import Entry, Rejected, make_key
from refine_control.records import RejectReason as R

W, H, S = 48, 32, 16


def picture(width: int = W, height: int = H) -> np.ndarray:
    """Smooth colours, different in every quarter, so that a turn or a flip is seen."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x // 12 % 2) * 120 + 40], -1).astype(np.uint8)


def hole(width: int = W, height: int = H) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 3 : width // 2] = 255
    return mask


def bytes_of(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def put(folder: Path, photo=None, mask=None, prompt: str | None = "a red kite", name: str = "a.jpg") -> Entry:
    """A folder of one photo; arrays are saved as PNG whatever the name says; returns its entry."""
    photo, mask = (picture() if photo is None else photo), (hole() if mask is None else mask)
    stem = folder / Path(name).stem
    for path, data in ((folder / name, photo), (Path(f"{stem}.mask.png"), mask)):
        if isinstance(data, bytes | np.ndarray):
            path.write_bytes(data if isinstance(data, bytes) else bytes_of(Image.fromarray(data)))
    if prompt is not None:
        Path(f"{stem}.txt").write_text(prompt)
    (entry,) = entries(folder)
    return entry


def reason(entry: Entry, size: int = S) -> R:
    with pytest.raises(Rejected) as caught:
        load(entry, size)
    assert caught.value.detail
    return caught.value.reason


def outcome(entry: Entry, size: int) -> np.ndarray | R:
    """The sample's image, or why there is none."""
    try:
        return load(entry, size).image
    except Rejected as error:
        return error.reason


def test_a_plain_photo_becomes_a_square_sample(tmp_path):
    photo = load(put(tmp_path), S)
    assert photo.image.shape == (S, S, 3)
    assert photo.image.dtype == np.uint8
    assert photo.mask.shape == (S, S)
    assert photo.mask.dtype == bool
    assert (photo.prompt, photo.meta["crop"], photo.meta["photo"]) == ("a red kite", [4, 0, 32], "a.jpg")
    # at the photo's own scale nothing is resampled: the sample is the crop itself
    same = load(put(tmp_path), H)
    assert np.array_equal(same.image, picture()[:, 4:36])
    assert np.array_equal(same.mask, hole()[:, 4:36] > 127)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_turn_shows_the_same_photo(tmp_path, orientation, file_format):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the PIL transpose that stores what `orientation` will undo
    turned, mask = Image.fromarray(picture()), Image.fromarray(hole())
    if orientation > 1:
        turned, stored_mask = turned.transpose(undo[orientation]), mask.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    data = bytes_of(turned, format=file_format, exif=exif, quality=95, **lossless)
    photo = load(put(tmp_path, data), H)
    assert np.abs(photo.image.astype(int) - picture()[:, 4:36]).mean() < 4
    assert np.array_equal(photo.mask, hole()[:, 4:36] > 127)
    if orientation >= 5:  # a mask made on the stored pixels turns with them
        stored = load(put(tmp_path, data, np.asarray(stored_mask)), H)
        assert np.array_equal(stored.mask, photo.mask)


def test_sixteen_bits_grey_become_eight(tmp_path):
    grey = picture()[..., 0]
    for data in (
        bytes_of(Image.fromarray(grey.astype(np.uint16) * 257)),
        bytes_of(Image.fromarray(grey.astype(np.uint16) * 257), format="TIFF"),
        bytes_of(Image.fromarray(grey.astype(np.int32) * 257), format="TIFF"),
        bytes_of(Image.fromarray(grey)),
    ):
        image = load(put(tmp_path, data), H).image
        assert np.array_equal(image, np.repeat(grey[:, 4:36, None], 3, 2))
    assert reason(put(tmp_path, bytes_of(Image.fromarray(grey.astype(np.float32)), format="TIFF"))) is R.UNREADABLE


def test_cmyk_and_palette_and_alpha_show_what_a_viewer_shows(tmp_path):
    red = np.full((H, W, 3), (220, 20, 20), np.uint8)
    for name, image, options in (
        ("cmyk", Image.fromarray(red).convert("CMYK"), {"format": "JPEG", "quality": 95}),
        ("cmyk tiff", Image.fromarray(red).convert("CMYK"), {"format": "TIFF"}),
        ("palette", Image.fromarray(red).quantize(8), {}),
        ("gif", Image.fromarray(red).quantize(8), {"format": "GIF"}),
        ("opaque", Image.fromarray(red).convert("RGBA"), {}),
    ):
        seen = load(put(tmp_path, bytes_of(image, **options)), S).image.reshape(-1, 3).mean(0)
        assert np.abs(seen - (220, 20, 20)).max() < 6, name
    clear = np.dstack([red, np.zeros((H, W), np.uint8)])
    assert (load(put(tmp_path, bytes_of(Image.fromarray(clear, "RGBA"))), S).image == 255).all()
    half = Image.fromarray(red).quantize(8)
    assert (load(put(tmp_path, bytes_of(half, transparency=half.getpixel((0, 0)))), S).image == 255).all()


def test_a_colour_profile_is_applied_and_a_broken_one_is_as_none(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")  # red means green
    plain = load(put(tmp_path), S).image.astype(int)
    for profile, expected in ((srgb, plain), (swapped, plain[..., [1, 0, 2]]), (b"no profile", plain)):
        image = load(put(tmp_path, bytes_of(Image.fromarray(picture()), icc_profile=profile)), S).image
        assert np.abs(image - expected).max() <= 3


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_are_refused(tmp_path, file_format):
    frames = [Image.fromarray(picture()), Image.fromarray(255 - picture())]
    data = bytes_of(frames[0], format=file_format, save_all=True, append_images=frames[1:])
    assert reason(put(tmp_path, data)) is R.ANIMATED


def test_a_phones_multi_picture_jpeg_is_its_first_picture(tmp_path):
    frames = [Image.fromarray(picture()), Image.fromarray(255 - picture())]
    data = bytes_of(frames[0], format="MPO", save_all=True, append_images=frames[1:], quality=95)
    assert np.abs(load(put(tmp_path, data), H).image.astype(int) - picture()[:, 4:36]).mean() < 4


@pytest.mark.parametrize(
    "options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {}, {"format": "GIF"}]
)
def test_a_cut_file_is_refused_or_has_lost_no_pixel(tmp_path, options):
    data = bytes_of(Image.fromarray(np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)), **options)
    whole = load(put(tmp_path, data), H).image
    places = [0, 1, 10, *range(20, len(data) - 1, max(1, len(data) // 12))]
    seen = [outcome(put(tmp_path, data[:place]), H) for place in places]
    images = [each for each in seen if not isinstance(each, R)]
    assert all(np.array_equal(image, whole) for image in images)
    assert len(images) <= 2
    assert {each for each in seen if isinstance(each, R)} == {R.TRUNCATED, R.UNREADABLE}
    assert reason(put(tmp_path, data[: len(data) // 2])) is R.TRUNCATED


@pytest.mark.parametrize("side", [10_001, 60_000])
def test_decompression_bombs_are_refused_by_their_header(tmp_path, side):
    data = bytearray(bytes_of(Image.new("1", (8, 8))))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    assert reason(put(tmp_path, bytes(data))) is R.BOMB
    (tmp_path / "a.jpg").write_bytes(bytes_of(Image.fromarray(picture())))
    (tmp_path / "a.mask.png").write_bytes(data)
    assert reason(next(entries(tmp_path))) is R.MASK_UNREADABLE


def test_what_is_no_photo_is_unreadable(tmp_path):
    for data in (
        b"",
        b"hello",
        b"<svg/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\xff\xd8\xff\xe0" * 9,
    ):
        assert reason(put(tmp_path, data)) is R.UNREADABLE
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "a.jpg").mkdir()
    row = {"image": "a.jpg", "mask": "a.mask.png", "local_prompt": "x"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    assert reason(next(entries(tmp_path))) is R.UNREADABLE


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), which=st.sampled_from(["JPEG", "PNG", "TIFF", "GIF"]))
def test_a_changed_byte_raises_nothing_but_a_refusal(tmp_path_factory, place, value, which):
    folder = tmp_path_factory.mktemp("byte")
    data = bytearray(bytes_of(Image.fromarray(picture()), format=which))
    data[place % min(len(data), 400)] = value
    seen = outcome(put(folder, bytes(data)), S)
    assert isinstance(seen, R) or seen.shape == (S, S, 3)


def test_content_decides_the_format_and_nothing_of_the_metadata_stays(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "secret"
    data = bytes_of(Image.fromarray(picture()), format="JPEG", exif=exif, quality=95, comment=b"secret")
    photo = load(put(tmp_path, data, name="a.png"), H)
    assert np.abs(photo.image.astype(int) - picture()[:, 4:36]).mean() < 4
    assert "secret" not in repr(photo)


def test_mask_kinds_agree(tmp_path):
    mask = Image.fromarray(hole())
    clear = Image.merge("LA", (Image.new("L", (W, H), 255), mask))
    expected = load(put(tmp_path), S).mask
    for kind in (mask.convert("1"), mask.convert("RGB"), mask.convert("P"), mask.convert("RGBA"), clear):
        assert np.array_equal(load(put(tmp_path, mask=bytes_of(kind)), S).mask, expected), kind.mode
    sixteen = Image.fromarray(hole().astype(np.uint16) * 257)
    assert np.array_equal(load(put(tmp_path, mask=bytes_of(sixteen)), S).mask, expected)
    grey = np.where(hole() > 0, 128, 127).astype(np.uint8)  # the threshold itself
    assert np.array_equal(load(put(tmp_path, mask=grey), S).mask, expected)


def test_masks_and_prompts_that_do_not_serve_have_a_reason(tmp_path):
    assert reason(put(tmp_path, mask=hole(W + 1))) is R.MASK_SIZE_MISMATCH
    assert reason(put(tmp_path, mask=np.ascontiguousarray(hole().T))) is R.MASK_SIZE_MISMATCH
    assert reason(put(tmp_path, mask=hole() * 0)) is R.MASK_EMPTY
    assert reason(put(tmp_path, mask=hole() // 255)) is R.MASK_EMPTY
    assert reason(put(tmp_path, mask=hole() * 0 + 255)) is R.MASK_FULL
    assert reason(put(tmp_path, mask=b"no image")) is R.MASK_UNREADABLE
    speck = hole() * 0
    speck[9, 20] = 255
    assert reason(put(tmp_path, mask=speck)) is R.MASK_EMPTY  # a quarter of a sample's pixel
    middle = hole() * 0
    middle[:, 1:-1] = 255
    assert reason(put(tmp_path, mask=middle)) is R.MASK_FULL  # nothing to keep in the square
    assert reason(put(tmp_path, prompt=" \n\t")) is R.NO_PROMPT
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert reason(next(entries(tmp_path))) is R.NO_PROMPT
    (tmp_path / "a.txt").unlink()
    assert reason(put(tmp_path, prompt=None)) is R.NO_PROMPT
    put(tmp_path)
    (tmp_path / "a.mask.png").unlink()
    assert reason(next(entries(tmp_path))) is R.NO_MASK
    assert reason(put(tmp_path), size=40) is R.TOO_SMALL
    assert load(put(tmp_path), 40, enlarge=True).image.shape == (40, 40, 3)


def test_links_and_paths_do_not_leave_the_folder(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    put(outside)
    put(inside)
    for name in ("a.jpg", "a.mask.png", "a.txt"):
        (inside / name).unlink()
        (inside / name).symlink_to(outside / name)
        assert reason(next(entries(inside))) is R.OUTSIDE_TREE, name
        (inside / name).unlink()
        put(inside)
    (inside / "b.jpg").symlink_to(inside / "a.jpg")  # a link that stays is a photo
    (inside / "b.mask.png").symlink_to("a.mask.png")
    (inside / "b.txt").symlink_to("a.txt")
    first, second = (load(entry, S) for entry in entries(inside))
    assert np.array_equal(first.image, second.image)
    (inside / "linked").symlink_to(outside)
    assert sorted(e.problem[0] for e in entries(inside) if e.problem) == [R.OUTSIDE_TREE]
    for name in ("../out/a.jpg", str(outside / "a.jpg")):
        row = {"image": name, "mask": "a.mask.png", "local_prompt": "x"}
        (inside / "manifest.jsonl").write_text(json.dumps(row))
        assert reason(next(entries(inside))) is R.OUTSIDE_TREE
        row = {"image": "a.jpg", "mask": name, "local_prompt": "x"}
        (inside / "manifest.jsonl").write_text(json.dumps(row))
        assert reason(next(entries(inside))) is R.OUTSIDE_TREE


def test_odd_names_are_read_and_get_safe_keys(tmp_path):
    names = [
        "ünï 日本.jpg",
        "new\nline.jpg",
        "../.jpg".replace("/", "%"),
        "a b'\"$`.jpg",
        "-rf.jpg",
        "x" * 200 + ".jpg",
    ]
    names += ["same.jpg", "sub.dir.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(bytes_of(Image.fromarray(picture())))
        (tmp_path / f"{Path(name).stem}.mask.png").write_bytes(bytes_of(Image.fromarray(hole())))
        (tmp_path / f"{Path(name).stem}.txt").write_text("a  thing\nhere")
    (tmp_path / "deep").mkdir()
    put(tmp_path / "deep", name="same.jpg")
    found = list(entries(tmp_path))
    names = [name for name in names if not name.startswith(".")]  # hidden files are no photos
    assert sorted(entry.image for entry in found) == sorted([*names, "deep/same.jpg"])
    keys = [load(entry, S).key for entry in found]
    assert len({key.lower() for key in keys}) == len(keys)
    assert all(key.isascii() and key.replace("-", "").replace("_", "").isalnum() for key in keys)
    assert keys == [entry.key for entry in entries(tmp_path)]
    assert {entry.prompt for entry in found} == {"a thing here", "a red kite"}


@given(st.text(max_size=30), st.text(max_size=30), st.none() | st.text(max_size=9) | st.integers())
def test_keys_are_safe_for_any_name(image, mask, name):
    key = make_key(image, mask, name)
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    assert 17 < len(key) <= 57
    assert key == make_key(image, mask, name) != make_key(image + "x", mask, name)
    assert key != make_key(image, mask + "x", name)


def test_manifest_rows_bad_and_good(tmp_path):
    put(tmp_path)
    good = {
        "id": "k1",
        "image": "a.jpg",
        "mask": "a.mask.png",
        "local_prompt": "a\u2028 kite",
        "captions": ["", "sky "],
    }
    rows = [
        json.dumps({**good, "license": "by", "bbox": [1], "odd": float("nan"), "source_image_id": 7, "source": "Z"}),
        "{not json",
        "[1]",
        json.dumps({"mask": "a.mask.png"}),
        json.dumps({**good, "image": "a\0.jpg", "id": "nul"}),
        json.dumps({**good, "image": "\ud800.jpg", "id": "lone"}),
        json.dumps({**good, "mask": "absent.png", "id": "k2"}),
        json.dumps({**good, "mask": None, "id": "k3"}),
        json.dumps({**good, "local_prompt": 3, "id": "k4"}),
        "",
        "[" * 100_000,
        json.dumps(good),
        json.dumps({**good, "id": "k5", "global_prompt": "kites"}),
    ]
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    first, *rest, last = entries(tmp_path / "other.jsonl")
    expected = [R.BAD_ROW] * 3 + [R.UNREADABLE] * 2 + [R.NO_MASK] * 2 + [R.NO_PROMPT, R.BAD_ROW, R.DUPLICATE]
    assert [reason(entry) for entry in rest] == expected
    photo = load(first, S)
    assert (photo.prompt, photo.global_prompt, first.photo) == ("a kite", "sky", "Z/7")
    assert set(photo.meta) == {"id", "license", "source", "source_image_id", "photo", "width", "height", "crop"}
    json.dumps(photo.meta, allow_nan=False)
    assert load(last, S).global_prompt == "kites"
    for wrong in (tmp_path / "nowhere", tmp_path / "a.jpg"):
        with pytest.raises(InvalidInputError, match="photos"):
            entries(wrong)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), width=st.integers(1, 40), height=st.integers(1, 40))
def test_the_crop_is_the_best_square(data, width, height):
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    side = min(width, height)
    places = [(x, y) for x in range(width - side + 1) for y in range(height - side + 1)]
    most = max(mask[y : y + side, x : x + side].sum() for x, y in places)
    if most < mask.sum() / 2:
        with pytest.raises(Rejected) as caught:
            crop_box(mask)
        assert caught.value.reason is R.MASK_DOES_NOT_FIT
        return
    x, y, got = crop_box(mask)
    assert got == side
    assert (x, y) in places
    assert mask[y : y + side, x : x + side].sum() == most

    def off_centre(place):
        return abs(2 * place[0] + side - x0 - x1) * (width > height) + abs(2 * place[1] + side - y0 - y1) * (
            height > width
        )

    best = [place for place in places if mask[place[1] : place[1] + side, place[0] : place[0] + side].sum() == most]
    assert off_centre((x, y)) == min(map(off_centre, best))
