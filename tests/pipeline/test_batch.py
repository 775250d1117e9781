"""A folder of photographs through `Inpainter`: counts, rejects, and the same command again."""

import json

import numpy as np
import pytest
from PIL import Image

from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models import loading
from refine_control.pipeline.batch import Plan, inpaint_photograph, inpaint_source
from refine_control.pipeline.inpainter import Inpainter
from refine_control.pipeline.pictures import read_mask, read_photograph

PLAN = Plan(SamplerConfig(num_inference_steps=1))


NOISE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)


@pytest.fixture
def inpainter(painter, monkeypatch):
    monkeypatch.setattr(loading, "weights_mark", str)
    monkeypatch.setattr(Inpainter, "exported", False)
    return Inpainter(painter)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    mask = np.zeros((70, 90), np.uint8)
    mask[10:30, 10:30] = 255
    for name in ("a", "b", "c", "nomask", "noprompt", "broken"):
        Image.fromarray(NOISE).save(folder / f"{name}.jpg")
        if name != "nomask":
            Image.fromarray(mask).save(folder / f"{name}.mask.png")
        if name != "noprompt":
            (folder / f"{name}.txt").write_text("a cup")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.pdf").write_bytes(b"")
    return folder


def reasons(out):
    return sorted(json.loads(line)["reason"] for line in (out / "rejects.jsonl").read_text().splitlines())


def test_counts_add_up_and_what_is_bad_becomes_a_line(inpainter, photos, tmp_path):
    out, steps = tmp_path / "out", []
    summary = inpaint_source(
        inpainter, photos, out, PLAN, progress=lambda done, total, _="": steps.append((done, total))
    )
    assert (summary.painted, summary.kept) == (3, 0)
    assert summary.entries == summary.painted + sum(summary.rejects.values())
    assert reasons(out) == sorted(reason for reason, count in summary.rejects.items() for _ in range(count))
    assert {"no_mask", "no_prompt", "unreadable", "unused"} <= set(reasons(out))
    assert steps[-1][0] == steps[-1][1] == len(steps)
    assert sorted(path.name.split("-")[0] for path in out.glob("*.png")) == ["a", "b", "c"]
    assert f"{summary.entries} entries -> 3 painted" in str(summary)


def test_the_same_command_keeps_what_is_there_and_paints_the_rest(inpainter, photos, tmp_path):
    out, painter = tmp_path / "out", inpainter.painter
    inpaint_source(inpainter, photos, out, PLAN)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    painter.calls.clear()
    assert inpaint_source(inpainter, photos, out, PLAN)[2:4] == (0, 3)
    assert painter.calls == []
    first = next(out.glob("a-*.png"))
    first.write_bytes(first.read_bytes()[:50])
    (photos / "b.txt").write_text("a bowl")
    assert inpaint_source(inpainter, photos, out, PLAN)[2:4] == (2, 1)
    assert [call[2] for call in painter.calls] == ["a cup", "a bowl"]
    assert first.read_bytes() == before[first.name]
    other = PLAN._replace(feather=9)
    assert inpaint_source(inpainter, photos, out, other)[2:4] == (3, 0)
    assert inpaint_source(inpainter, photos, out, other, "a jug")[2:4] == (1, 3)  # that without a prompt


def test_variants_have_the_seeds_that_follow(inpainter, photos, tmp_path):
    plan = Plan(SamplerConfig(num_inference_steps=1, seed=5), seeds=3)
    inpaint_source(inpainter, photos, tmp_path / "out", plan)
    assert [call[3].seed for call in inpainter.painter.calls[:3]] == [5, 6, 7]
    assert len(list((tmp_path / "out").glob("a-*-[012].png"))) == 3
    photograph, steps = read_photograph(photos / "a.jpg"), []
    mask = read_mask((5, 5, 9, 9), photograph)
    written = inpaint_photograph(
        inpainter, photograph, mask, "a cup", tmp_path / "p.png", plan, lambda *each: steps.append(each[:2])
    )
    assert [path.name for path in written] == ["p-0.png", "p-1.png", "p-2.png"]
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_rows_of_a_manifest_are_painted(inpainter, photos, tmp_path):
    row = {"image": "a.jpg", "mask": "a.mask.png", "local_prompt": "a jug"}
    (photos / "list.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "mask": "b.mask.png"}) + "\n[]\n")
    summary = inpaint_source(inpainter, photos / "list.jsonl", tmp_path / "out", PLAN)
    assert (summary.entries, summary.painted, summary.rejects) == (3, 2, {"bad_row": 1})
    assert len(list((tmp_path / "out").glob("a-*.png"))) == 2


def test_a_source_without_a_usable_photograph_and_an_output_in_it_are_refused(inpainter, photos, tmp_path):
    with pytest.raises(InvalidInputError, match="lies in"):
        inpaint_source(inpainter, photos, photos / "out", PLAN)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidInputError, match="none of the 0 entries"):
        inpaint_source(inpainter, empty, tmp_path / "out", PLAN)


def test_a_photograph_too_large_to_be_painted_whole_is_a_line(inpainter, photos, tmp_path):
    mask = np.zeros((70, 200), np.uint8)
    mask[:9, :9] = 255
    Image.new("RGB", (200, 70)).save(photos / "big.jpg")
    Image.fromarray(mask).save(photos / "big.mask.png")
    (photos / "big.txt").write_text("a cup")
    summary = inpaint_source(inpainter, photos, tmp_path / "out", PLAN._replace(whole=True))
    assert (summary.painted, summary.rejects["refused"]) == (3, 1)
    assert "too large" in (tmp_path / "out" / "rejects.jsonl").read_text()
