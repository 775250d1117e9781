"""Laws of aspect-ratio buckets: few sizes of one area, the nearest for each photo, holes kept, bytes as promised."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from refine_control.errors import InvalidInputError
from refine_control.photos.buckets import grouped, nearest, sizes_for, sizes_of
from refine_control.photos.build import Parameters, build
from refine_control.photos.inspect import contact_sheet, inspect, write_page
from refine_control.photos.load import crop_box, crop_window
from refine_control.photos.shards import Shards, read_shards, verify
from refine_control.records import ROLES, Rejected

CHOSEN = {"size": 48, "samples_per_shard": 4, "seed": 1, "buckets": True}
SHAPES = [(64, 96), (96, 64), (64, 64), (50, 140), (70, 100)]
"""(H, W) of the photos in turn."""


def test_the_sizes_are_these():
    assert sizes_for(64) == [(48, 80), (64, 64), (80, 48)]
    assert sizes_for(128) == [(96, 176), (112, 144), (128, 128), (144, 112), (176, 96)]
    assert len(sizes_for(512)) == 19
    assert sizes_for(512)[0] == (368, 720)
    for wrong in (0, 8, 63, 72):
        with pytest.raises(InvalidInputError, match="multiple of 16"):
            sizes_for(wrong)


@pytest.mark.parametrize("size", [16, 64, 208, 512, 1024])
def test_sizes_are_multiples_of_16_with_about_the_area_and_at_most_twice_as_long(size):
    sizes = sizes_for(size)
    assert (size, size) in sizes
    assert sizes == [(w, h) for h, w in reversed(sizes)]
    assert len({min(pair) for pair in sizes}) == len(sizes) // 2 + 1  # each shorter side has one longer one
    for h, w in sizes:
        assert h % 16 == w % 16 == 0
        assert max(h, w) <= 2 * min(h, w)
        off = abs(h * w - size * size)
        assert off <= min(abs(min(h, w) * (max(h, w) + step) - size * size) for step in (-16, 16))
    ratios = [w / h for h, w in sizes]
    assert ratios == sorted(ratios, reverse=True)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([64, 512]))
def test_a_photo_gets_the_size_nearest_in_ratio(width, height, size):
    sizes = sizes_for(size)
    h, w = nearest(width, height, sizes)
    assert (
        abs(math.log(width * h / (height * w)))
        <= min(abs(math.log(width * b / (height * a))) for a, b in sizes) + 1e-12
    )
    assert nearest(height, width, sizes) in ((w, h), *sizes)
    assert nearest(7 * width, 7 * height, sizes) == (h, w)


@given(data=st.data(), width=st.integers(1, 30), height=st.integers(1, 30), size=st.sampled_from(sizes_for(128)))
def test_the_crop_is_the_largest_of_its_shape_and_holds_the_most(data, width, height, size):
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    h, w = size
    wide, high = min(width, max(1, height * w / h)), min(height, max(1, width * h / w))
    try:
        x, y, crop_width, crop_height = crop_window(mask, size)
    except Rejected:  # under half of the hole fits into the window that can hold the most of it
        most = min(x1 - x0, int(wide + 0.5)) * min(y1 - y0, int(high + 0.5))
        assert most < mask.sum() / 2
        return
    assert abs(crop_width - wide) <= 0.5
    assert abs(crop_height - high) <= 0.5
    assert width in (crop_width, width) and (crop_width == width or crop_height == height)  # noqa: PT018
    places = [(a, b) for a in range(width - crop_width + 1) for b in range(height - crop_height + 1)]
    held = {(a, b): mask[b : b + crop_height, a : a + crop_width].sum() for a, b in places}
    assert held[x, y] == max(held.values()) >= mask.sum() / 2
    if h == w:
        assert crop_box(mask) == (x, y, crop_width)


@pytest.fixture
def source(tmp_path):
    """15 photos of five shapes, each with a hole at its edge, and one that is too small for its bucket."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(16):
        h, w = (30, 90) if number == 15 else SHAPES[number % len(SHAPES)]
        pixels = np.random.default_rng(number).integers(0, 256, (h, w, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        mask = np.zeros((h, w), np.uint8)
        mask[h // 4 : h // 2, 1 : w // 4] = 255
        Image.fromarray(mask).save(folder / f"{number:02d}.mask.png")
        (folder / f"{number:02d}.txt").write_text(f"thing {number}")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_samples_keep_the_shape_of_their_photos_and_the_hole(source, tmp_path):
    wide, square, tall = sizes_for(48)
    summary = build(source, tmp_path / "out", **CHOSEN)
    assert summary.rejects == {"too_small": 1}
    assert verify(tmp_path / "out") == []
    seen = {}
    for role in ROLES:
        shards = Shards(tmp_path / "out" / role)
        found = grouped(sizes_of(shards))
        assert shards.manifest["image_sizes"] == [[*size, len(numbers)] for size, numbers in found.items()]
        assert shards.manifest["image_size"] == (list(next(iter(found))) if len(found) == 1 else None)
        for photo, size in zip(read_shards(tmp_path / "out" / role), sizes_of(shards), strict=True):
            assert photo.image.shape == (*size, 3)
            assert photo.mask.shape == size == nearest(photo.meta["width"], photo.meta["height"], (wide, square, tall))
            x, y, width, height = photo.meta["crop"]
            assert 0 <= x <= photo.meta["width"] - width
            assert 0 <= y <= photo.meta["height"] - height
            assert photo.mask.any()
            seen[size] = seen.get(size, 0) + 1
    assert set(seen) == {wide, square, tall}
    assert inspect(tmp_path / "out")["entries"] == 16
    contact_sheet(tmp_path / "out", tmp_path / "sheet.png", count=9)
    write_page(tmp_path / "out", tmp_path / "page.html")


def test_without_buckets_nothing_tells_of_them_and_the_two_do_not_mix(source, tmp_path):
    assert "buckets" not in Parameters().as_dict()
    build(source, tmp_path / "squares", **{**CHOSEN, "buckets": False})
    told = b"".join(data for name, data in tree(tmp_path / "squares").items() if name.endswith(".json"))
    assert b"bucket" not in told
    assert b"image_sizes" not in told
    build(source, tmp_path / "buckets", **CHOSEN)
    assert json.loads((tmp_path / "buckets" / "build.json").read_text())["buckets"] is True
    assert build(source, tmp_path / "buckets", **CHOSEN).did_nothing
    for name, buckets, told in (
        ("squares", True, "False there, True now"),
        ("buckets", False, "True there, False now"),
    ):
        with pytest.raises(InvalidInputError, match=rf"buckets \({told}\)"):
            build(source, tmp_path / name, **{**CHOSEN, "buckets": buckets})
    with pytest.raises(InvalidInputError, match="multiple of 16"):
        build(source, tmp_path / "new", size=24, buckets=True)


KILLED = """
    import itertools, os, signal, sys
    from pathlib import Path
    from refine_control.photos.build import build
    source, outs = Path(sys.argv[1]), Path(sys.argv[2])

    for stop in (1, 6, 11, 16):
        pid = os.fork()
        if not pid:
            calls = itertools.count(1)
            die = lambda *_: next(calls) == stop and os.kill(os.getpid(), signal.SIGKILL)
            build(source, outs / str(stop), size=48, samples_per_shard=4, seed=1, buckets=True, progress=die)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
"""


def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(source, tmp_path):
    build(source, tmp_path / "whole", **CHOSEN)
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(source), str(tmp_path / "outs")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    subprocess.run(script, env=environment, check=True, timeout=100)
    for out in (tmp_path / "outs").iterdir():
        assert not build(source, out, **CHOSEN).did_nothing
        assert tree(out) == tree(tmp_path / "whole"), out.name
