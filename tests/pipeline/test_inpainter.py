"""Laws of `Inpainter`, with a stand-in that paints one colour: sizes, edges, colours and metadata of photographs."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

import refine_control
from refine_control.errors import InvalidInputError, MissingError
from refine_control.pipeline import inpainter as module
from refine_control.pipeline.inpainter import Inpainter

GREEN = (0, 200, 0)


def noise(width, height, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def wide_gamut():
    """A profile whose colours are not sRGB's: Pillow's sRGB with its red and green columns exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = data[green : green + 4], data[red : red + 4]
    return bytes(data)


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (31, 47), (500, 20), (1, 9)])
@pytest.mark.parametrize("feather", [0, 7])
def test_a_photograph_of_any_size_comes_back_and_nothing_far_from_the_hole_is_touched(inpainter, size, feather):
    width, height = size
    image, box = noise(width, height), (0, height // 3, max(1, width // 4), height // 3 + max(1, height // 4))
    result = inpainter.inpaint(image, box, "a cup", feather=feather)
    painted, (x0, y0, x1, y1) = np.asarray(result.image), box
    assert result.image.size == size
    assert (painted[y0:y1, x0:x1] == GREEN).all()
    far = np.ones((height, width), bool)
    far[max(0, y0 - feather) : y1 + feather, max(0, x0 - feather) : x1 + feather] = False
    assert np.array_equal(painted[far], image[far])
    if feather and far.any():
        assert (painted != image)[~far].any()


def test_a_box_is_the_mask_of_that_box_whatever_the_mask_is_given_as(inpainter, tmp_path):
    image, mask = noise(90, 70), np.zeros((70, 90), bool)
    mask[10:30, 20:60] = True
    file = tmp_path / "mask.png"
    Image.fromarray(mask).save(file)
    pictures = [
        np.asarray(inpainter.inpaint(image, given, "a cup").image)
        for given in ((20, 10, 60, 30), mask, mask.astype(np.uint8) * 255, Image.fromarray(mask), file, str(file))
    ]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_holes_far_apart_are_painted_one_after_the_other_and_the_first_is_seen_by_the_second(inpainter, painter):
    mask, steps = np.zeros((60, 200), bool), []
    mask[20:30, 5:15], mask[20:30, 180:190], mask[58:60, 60:62] = True, True, True
    result = inpainter.inpaint(noise(200, 60), mask, "a cup", feather=0, progress=lambda *each: steps.append(each[:2]))
    assert len(painter.calls) == 3
    assert (np.asarray(result.image)[mask] == GREEN).all()
    assert np.array_equal((np.asarray(result.image) == noise(200, 60)).all(2) | mask, np.ones_like(mask))
    assert steps == [(number, 6) for number in range(1, 7)]
    assert result.box == (0, 0, 200, 60)
    shown = np.concatenate([image[hole] for image, hole, _, _ in painter.calls])
    assert not (shown == GREEN).all(1).any()


def test_the_model_is_shown_the_frame_around_the_hole(inpainter, painter):
    image = noise(300, 200)
    result = inpainter.inpaint(image, (100, 120, 110, 130), "a cup")
    (shown, hole, *_), (x0, y0, x1, y1) = painter.calls[0], result.box
    assert (x0, y0, x1, y1) == (73, 93, 137, 157)
    assert np.array_equal(shown, image[y0:y1, x0:x1])
    assert np.array_equal(np.argwhere(hole)[[0, -1]] + (y0, x0), [(120, 100), (129, 109)])


def test_whole_paints_the_photograph_as_it_is(inpainter, painter):
    image = noise(90, 70)
    inpainter.inpaint(image, (5, 5, 20, 20), "a cup", whole=True)
    assert painter.calls[0][0].shape == (80, 96, 3)
    assert np.array_equal(painter.calls[0][0][:70, :90], image)
    with pytest.raises(InvalidInputError, match="too large to be painted whole"):
        inpainter.inpaint(noise(193, 10), (5, 5, 9, 9), "a cup", whole=True)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_profile_and_exif_are_kept_upright_and_without_a_thumbnail(inpainter, tmp_path, ending):
    profile, exif = wide_gamut(), Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Artist] = 6, "A. Person"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] = 90
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    Image.fromarray(noise(90, 70)).save(tmp_path / f"a{ending}", exif=exif, icc_profile=profile, quality=95)
    out = inpainter.inpaint(tmp_path / f"a{ending}", (0, 0, 9, 9), "a cup").save(tmp_path / f"b{ending}")
    with Image.open(out) as picture:
        kept = picture.getexif()
        assert picture.size == (70, 90)
        assert picture.info["icc_profile"] == profile
        assert (kept[ExifTags.Base.Orientation], kept[ExifTags.Base.Artist]) == (1, "A. Person")
        assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] == 70
        assert kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"


def test_a_thumbnail_is_dropped(inpainter, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "A. Person"
    small = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(small, "JPEG")
    plain = exif.tobytes()
    # a second directory behind the first, with a thumbnail in it
    start = len(plain) - 6
    entries = [(0x0103, 3, 1, 6), (0x0201, 4, 1, start + 2 + 3 * 12 + 4), (0x0202, 4, 1, len(small.getvalue()))]
    order = "little" if plain[6:8] == b"II" else "big"
    directory = len(entries).to_bytes(2, order) + b"".join(
        tag.to_bytes(2, order)
        + kind.to_bytes(2, order)
        + count.to_bytes(4, order)
        + (value.to_bytes(2, order) + b"\0\0" if kind == 3 else value.to_bytes(4, order))
        for tag, kind, count, value in entries
    )
    link = 6 + 8 + 2 + 12 * len(exif)
    data = plain[:link] + start.to_bytes(4, order) + plain[link + 4 :] + directory + bytes(4) + small.getvalue()
    Image.fromarray(noise(90, 70)).save(tmp_path / "a.jpg", exif=data)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.getexif().get_ifd(ExifTags.IFD.IFD1)
    out = inpainter.inpaint(tmp_path / "a.jpg", (0, 0, 9, 9), "a cup").save(tmp_path / "b.jpg")
    with Image.open(out) as picture:
        assert picture.getexif()[ExifTags.Base.Artist] == "A. Person"
        assert not picture.getexif().get_ifd(ExifTags.IFD.IFD1)
    assert small.getvalue() not in out.read_bytes()


def test_values_that_nobody_painted_are_the_file_s_in_its_own_profile_and_the_painted_ones_are_converted(
    inpainter, painter, tmp_path
):
    image = noise(90, 70)
    Image.fromarray(image).save(tmp_path / "a.png", icc_profile=wide_gamut())
    painted = np.asarray(inpainter.inpaint(tmp_path / "a.png", (20, 20, 40, 40), "a cup", feather=0).image)
    far = np.ones((70, 90), bool)
    far[20:40, 20:40] = False
    assert np.array_equal(painted[far], image[far])
    red, green, blue = painted[30, 30].astype(int)
    assert red > 150 > 50 > max(green, blue)  # green by this profile's names
    assert not np.array_equal(painter.calls[0][0], image[:64, :64])  # the model is shown sRGB


def test_transparency_is_kept_and_laid_on_white_in_a_jpeg(inpainter, painter, tmp_path, caplog):
    image = noise(90, 70, 4)
    image[..., 3] = np.where(np.arange(90) < 45, 255, 0)
    Image.fromarray(image).save(tmp_path / "a.png")
    result = inpainter.inpaint(tmp_path / "a.png", (10, 10, 20, 20), "a cup")
    assert np.array_equal(np.asarray(result.image)[..., 3], image[..., 3])
    assert not caplog.records
    with Image.open(result.save(tmp_path / "b.jpg")) as picture:
        assert min(picture.convert("L").crop((60, 0, 80, 70)).tobytes()) > 240
    inpainter.inpaint(tmp_path / "a.png", (60, 10, 70, 20), "a cup")
    assert "100 % of the masked region is transparent" in caplog.text


@pytest.mark.parametrize(
    ("picture", "mode"),
    [
        (Image.fromarray(noise(90, 70, 1)[..., 0]), "RGB"),
        (Image.fromarray(noise(90, 70, 1)[..., 0].astype(np.uint16) * 257), "RGB"),
        (Image.fromarray(noise(90, 70)).convert("P"), "RGB"),
        (Image.fromarray(noise(90, 70)).convert("CMYK"), "RGB"),
        (Image.fromarray(noise(90, 70, 4)).convert("LA"), "RGBA"),
    ],
    ids=["grey", "16 bits", "palette", "CMYK", "grey with alpha"],
)
def test_other_kinds_of_pictures_come_back_in_colours_with_the_same_values(inpainter, picture, mode):
    result = inpainter.inpaint(picture, (0, 0, 9, 9), "a cup", feather=0)
    eight_bit = Image.fromarray(noise(90, 70, 1)[..., 0]) if picture.mode == "I;16" else picture
    before = np.asarray(eight_bit.convert(mode))
    assert result.image.mode == mode
    assert np.array_equal(np.asarray(result.image)[20:], before[20:])


SQUARE = np.zeros((70, 90), bool)
SQUARE[5:9, 5:9] = True


@pytest.mark.parametrize(
    ("image", "mask", "prompt", "options", "words"),
    [
        (noise(90, 70), SQUARE, " \n", {}, "the prompt is empty"),
        (noise(90, 70), SQUARE.T, "a cup", {}, "mask 70 x 90, photo 90 x 70"),
        (noise(90, 70), ~SQUARE | SQUARE, "a cup", {}, "every pixel is masked"),
        (noise(90, 70), SQUARE & False, "a cup", {}, "mask_empty"),
        (noise(90, 70), (0, 0, 90, 70), "a cup", {}, "every pixel is masked"),
        (noise(90, 70), (0, 0, 91, 70), "a cup", {}, "does not lie in the photograph of 90 x 70"),
        (noise(90, 70), (0, 0, 9), "a cup", {}, "is no box"),
        (noise(90, 70), (0, 0, 0.5, 1), "a cup", {}, "is no box"),
        (noise(90, 70), None, "a cup", {}, "NoneType"),
        (noise(90, 70).astype(float), SQUARE, "a cup", {}, "float64"),
        (noise(90, 70), SQUARE, "a cup", {"context": -1.0}, "context -1"),
        (noise(90, 70), SQUARE, "a cup", {"feather": 5000}, "feather 5000"),
        (noise(90, 70), SQUARE, "a cup", {"num_inference_steps": 0}, "num_inference_steps"),
        (Image.new("1", (10_000, 10_000)), SQUARE, "a cup", {}, "10000 x 10000 pixels"),
        ("gone.jpg", SQUARE, "a cup", {}, "no file at gone.jpg"),
        (__file__, SQUARE, "a cup", {}, "not an image"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_painted(
    inpainter, painter, image, mask, prompt, options, words
):
    with pytest.raises(InvalidInputError, match=words):
        inpainter.inpaint(image, mask, prompt, **options)
    assert painter.calls == []


def test_the_sampler_is_the_card_s_where_nothing_is_given(inpainter, painter):
    result = inpainter.inpaint(noise(90, 70), SQUARE, "a cup", seed=7, num_inference_steps=3)
    assert (result.seed, result.sampler.num_inference_steps, result.sampler.seed) == (7, 3, 7)
    assert painter.calls[0][2:] == ("a cup", result.sampler)
    assert result.seconds >= 0


def test_the_edge_student_is_the_default_of_the_mini_model_and_the_teacher_has_the_model_s_name(monkeypatch):
    from refine_control.models import loading

    asked = []

    def load_painter(model, controlnet, device):
        asked.append((model, controlnet))
        raise MissingError("asked")

    monkeypatch.setattr(loading, "load_painter", load_painter)
    for given in (("mini",), ("mini", "mini"), ("mini", "runs/student"), ("author/sd3",), ("author/sd3", "author/sd3")):
        with pytest.raises(MissingError):
            Inpainter.load(*given)
    assert asked == [
        ("mini", "edge"), ("mini", None), ("mini", "runs/student"), ("author/sd3", None), ("author/sd3", None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("runtime", "words"), [("tensorrt", "torch, onnx, openvino"), ("onnx", "refine-control export")]
)
def test_a_runtime_that_is_none_or_has_no_exported_folder_is_refused(runtime, words):
    with pytest.raises(InvalidInputError, match=words):
        Inpainter.load("mini", runtime=runtime)


def test_the_readme_s_lines_run(painter, tmp_path, monkeypatch):
    code = (Path(__file__).parents[2] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Inpainter, "load", lambda model: Inpainter(painter, model))
    Image.fromarray(noise(90, 70)).save("photo.jpg")
    Image.fromarray(SQUARE).save("photo.mask.png")
    exec(code, {})  # noqa: S102
    with Image.open("painted.jpg") as picture:
        assert picture.size == (90, 70)


def test_the_package_offers_it_and_is_light_to_import():
    code = "import sys, refine_control; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules); "
    code += "from refine_control import Inpainter; assert 'torch' not in sys.modules; print(Inpainter.__name__); "
    code += "import logging; logging.getLogger('torchao').warning('an extension was not built')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert run.stdout == "Inpainter\n"
    assert refine_control.Inpainter is module.Inpainter
    with pytest.raises(AttributeError):
        refine_control.nothing  # noqa: B018
