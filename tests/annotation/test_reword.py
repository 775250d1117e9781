"""Data sets that differ in their words alone."""

import json

import numpy as np
import pytest
from PIL import Image

from refine_control.annotation.reword import reword
from refine_control.errors import InvalidInputError
from refine_control.photos.build import build
from refine_control.photos.shards import read_shards
from refine_control.records import ROLES


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    rows = []
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        mask = np.zeros((20, 24), np.uint8)
        mask[4:12, 5:15] = 255
        Image.fromarray(mask).save(folder / f"{number}.mask.png")
        names = {"id": f"r{number}", "image": f"{number}.png", "mask": f"{number}.mask.png", "category": "owl"}
        rows.append({**names, "local_prompt": f"owl number {number}", "global_prompt": f"an owl in room {number}"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("kind", ["template", "shuffled", "global"])
def test_everything_but_the_words_stays(source, tmp_path, kind):
    made = reword(source, tmp_path / kind, kind, seed=3)
    assert (made.rows, made.changed) == (8, 8)
    for folder, out in ((source, "given"), (tmp_path / kind, "other")):
        build(folder, tmp_path / out, size=16, test_fraction=0.25, seed=1)
    for role in ROLES:
        given, other = (list(read_shards(tmp_path / name / role)) for name in ("given", "other"))
        assert [p.key for p in given] == [p.key for p in other] != []
        assert all(
            np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask)
            for a, b in zip(given, other, strict=True)
        )
        assert all(a.prompt != b.prompt for a, b in zip(given, other, strict=True))
    assert reword(source, tmp_path / kind, kind, seed=3) == made
    with pytest.raises(InvalidInputError, match="says something else"):
        reword(source, tmp_path / kind, "template" if kind != "template" else "global", seed=3)


def test_what_has_no_prompt_cannot_be_reworded(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(InvalidInputError, match="no region with a prompt"):
        reword(tmp_path, tmp_path / "out", "template")
