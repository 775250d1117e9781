"""Laws of the page of `data inspect --html`: it needs nothing else, shows every role, and believes no prompt."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from refine_control.errors import InvalidInputError
from refine_control.photos.build import build
from refine_control.photos.inspect import area_bars, length_bars, outline, write_page
from refine_control.photos.shards import Shards
from refine_control.records import ROLES

W, H, S = 24, 20, 16
EVIL = '<script>alert("x")</script> & "thing"'


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build of 12 photos, one with a prompt that would like to be a script, and two entries that are refused."""
    folder = tmp_path_factory.mktemp("page")
    source = folder / "source"
    source.mkdir()
    rows = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (H, W, 3), np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
        mask = np.zeros((H, W), np.uint8)
        mask[4:14, 5:15] = 255
        Image.fromarray(mask).save(source / f"{number}.mask.png")
        rows.append({"image": f"{number}.png", "mask": f"{number}.mask.png", "local_prompt": f"a red thing {number}"})
        rows[-1] |= {"source": "noise", "license": "CC0"}
    rows[3]["local_prompt"] = EVIL
    rows += [{"image": "<gone>.png"}, {"image": "0.png", "mask": "0.mask.png", "id": "wordless"}]
    (source / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(source, folder / "out", size=S, seed=1)
    assert all(len(Shards(folder / "out" / role)) for role in ROLES), "choose a seed that fills every role"
    return folder / "out"


def page_of(folder, path, **options) -> str:
    write_page(folder, path, **options)
    return path.read_text()


def test_a_build_is_one_file_with_every_sample_and_every_refusal(built, tmp_path):
    page = page_of(built, tmp_path / "deep" / "page.html")
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:)(https?:|/|\w+\.)""", page)
    figures = re.findall(r'<figure data-role="(\w+)"', page)
    assert {role: figures.count(role) for role in ROLES} == {role: len(Shards(built / role)) for role in ROLES}
    assert all(f"<b>{reason}</b>" in page for reason in ("unreadable", "no prompt"))
    assert "&lt;gone&gt;.png" in page
    assert len(re.findall(r"<section data-role=", page)) == len(ROLES) + 1


def test_no_prompt_becomes_markup(built, tmp_path):
    page = page_of(built, tmp_path / "page.html")
    assert "alert" in page
    assert page.count("<script>") == 1
    assert 'data-prompt="&lt;script&gt;' in page


def test_a_role_alone_has_neither_tabs_nor_refusals(built, tmp_path):
    page = page_of(built / "test", tmp_path / "page.html")
    assert re.findall(r'<button data-role="(\w*)"', page) == ["test"]
    assert len(re.findall(r"<section data-role=", page)) == 1
    assert "Refused" not in page


def test_the_pictures_are_those_of_the_samples(built, tmp_path):
    page = page_of(built / "labeled", tmp_path / "page.html")
    pairs = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)".*?<img src="data:image/png;base64,([^"]+)"', page)
    shards = Shards(built / "labeled")
    assert len(pairs) == len(shards)
    for (picture, line), photo in zip(pairs, shards, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).astype(int)
        assert np.abs(pixels.mean(axis=(0, 1)) - photo.image.mean(axis=(0, 1))).max() < 6
        marks = Image.open(io.BytesIO(base64.b64decode(line)))
        hole = np.asarray(Image.fromarray(photo.mask).resize(marks.size, Image.Resampling.NEAREST))
        marked = np.asarray(marks)[..., 3] > 0
        assert not (marked & ~hole).any()
        assert marked[outline(hole)].all()
        assert 0 < marked.sum() < hole.sum()


def test_the_count_bounds_the_page(built, tmp_path):
    page = page_of(built, tmp_path / "page.html", count=4)
    assert page.count("<figure") == 4
    assert "4 of 12" in page
    with pytest.raises(InvalidInputError, match="at least one"):
        write_page(built, tmp_path / "page.html", count=0)
    with pytest.raises(InvalidInputError, match="data build"):
        write_page(tmp_path, tmp_path / "page.html")


def test_an_empty_role_is_shown_as_empty(tmp_path):
    from refine_control.photos.shards import ShardWriter

    ShardWriter(tmp_path / "test", "test").finish()
    page = page_of(tmp_path / "test", tmp_path / "page.html")
    assert "0 samples" in page
    assert "<figure" not in page


def test_the_bars_of_a_histogram_count_everything_once():
    areas = [0, 0.049, 0.05, 0.5, 1]
    bars = area_bars(areas)
    assert [bar.count for bar in bars if bar.count] == [2, 1, 1, 1]
    assert (len(bars), bars[0].share, bars[-1].count) == (20, 1, 1)
    lengths = length_bars([1, 3, 3, 90])
    assert (len(lengths), lengths[2].count, lengths[-1].count) == (40, 2, 1)
    assert lengths[-1].label.endswith("and more")
    assert length_bars([]) == []
    assert [bar.label for bar in length_bars([1, 2])] == ["1", "2"]
