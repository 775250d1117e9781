"""The verb `inpaint`: which options go together, and what they become."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from refine_control.cli.app import app
from refine_control.errors import RefineControlError
from refine_control.models.fit import Geometry
from refine_control.pipeline.inpainter import Inpainter

IMAGE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)


class Red:
    """A painter that remembers how it was asked."""

    geometry = Geometry(multiple=16, largest=192, side=64)

    def __init__(self):
        self.samplers = []

    def paint(self, image, mask, prompt, sampler, progress=None):
        self.samplers.append(sampler)
        return np.broadcast_to(np.array([255, 0, 0], np.uint8), image.shape).copy()


@pytest.fixture
def painter(monkeypatch):
    painter = Red()

    def load(model="mini", controlnet=None, *, runtime="torch"):
        painter.loaded = (model, controlnet, runtime)
        return Inpainter(painter, model, controlnet)

    monkeypatch.setattr(Inpainter, "load", load)
    return painter


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((70, 90), np.uint8)
    mask[10:30, 20:60] = 255
    Image.fromarray(IMAGE).save("photo.png")
    Image.fromarray(mask).save("photo.mask.png")

    def call(*words, expected=0):
        result = CliRunner().invoke(app, ["inpaint", *words])
        if expected:
            assert isinstance(result.exception, RefineControlError), result.exception or result.output
            assert result.exception.exit_code == expected
            return str(result.exception)
        assert result.exception is None, result.exception
        return result.stdout

    return call


ONE = ("--image", "photo.png", "--prompt", "a cup", "--out", "out.png")
MASK = ("--mask", "photo.mask.png")


def picture(name):
    with Image.open(name) as opened:
        return np.asarray(opened)


@pytest.mark.parametrize("region", [MASK, ("--box", "20,10,60,30")])
def test_one_photograph_in_its_own_size(run, painter, region):
    assert run(*ONE, *region, "--composite", "--steps", "3", "--seed", "4") == "out.png\n"
    expected = IMAGE.copy()
    expected[10:30, 20:60] = (255, 0, 0)
    assert np.array_equal(picture("out.png"), expected)
    assert (painter.samplers[0].num_inference_steps, painter.samplers[0].seed) == (3, 4)
    assert painter.loaded == ("mini", None, "torch")


def test_the_edge_student_is_sampled_as_its_card_says(run, painter):
    run(*ONE, *MASK)
    run(*ONE, *MASK, "--controlnet", "mini")
    assert [(each.num_inference_steps, each.guidance_scale) for each in painter.samplers] == [(4, 1), (20, 3)]
    assert "controlnet: edge" in run(*ONE, *MASK, "--dry-run")


def test_feather_context_and_whole_reach_the_painter(run, painter):
    run(*ONE, *MASK, "--feather", "0", "--whole")
    sharp = picture("out.png")
    run(*ONE, *MASK, "--feather", "30", "--context", "0")
    assert (sharp != IMAGE).any(2).sum() == 800
    assert (picture("out.png") != IMAGE).any(2).sum() > 1500


def test_variants_are_numbered(run, painter):
    assert run(*ONE, *MASK, "--seeds", "2", "--seed", "5") == "out-0.png\nout-1.png\n"
    assert [sampler.seed for sampler in painter.samplers] == [5, 6]


def test_a_point_selects_the_region_under_it(run, painter):
    shape = Image.new("RGB", (120, 100), "white")
    shape.paste("navy", (30, 30, 80, 70))
    shape.save("photo.png")
    run(*ONE, "--point", "50,50", "--feather", "0")
    painted = (picture("out.png") == (255, 0, 0)).all(2)
    assert painted[32:68, 32:78].all()
    assert painted.sum() < 1.2 * 40 * 50
    assert "not in the photograph of 120 x 100" in run(*ONE, "--point", "120,5", expected=2)


def test_a_folder_is_painted_and_the_same_command_does_nothing(run, painter):
    from pathlib import Path

    Path("photos").mkdir()
    for name in ("photo.png", "photo.mask.png"):
        Path(name).rename(f"photos/{name}")
    batch = ("--image", "photos", "--out", "out", "--prompt", "a cup")
    assert "1 entries -> 1 painted" in run(*batch)
    assert "0 painted" in run(*batch)
    assert len(painter.samplers) == 1
    (out,) = Path("out").glob("*.png")
    assert picture(out).shape == (70, 90, 3)
    assert Path("out/rejects.jsonl").read_text() == ""
    rows = {"image": "photo.png", "mask": "photo.mask.png", "local_prompt": "a jug"}
    Path("photos/list.jsonl").write_text(json.dumps(rows) + "\n")
    assert "1 painted" in run("--image", "photos/list.jsonl", "--out", "other")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*ONE,), "--mask FILE, --box"),
        ((*ONE, *MASK, "--box", "1,1,5,5"), "--mask and --box each say"),
        ((*ONE, "--box", "1,1,5"), "give x0,y0,x1,y1"),
        ((*ONE, "--box", "1,1,5,a"), "give x0,y0,x1,y1"),
        ((*ONE, "--box", "50,50,95,60"), "does not lie in the photograph of 90 x 70"),
        ((*ONE, "--point", "1"), "give x,y"),
        ((*ONE, *MASK, "--segmenter", "author/sam"), "--point"),
        ((*ONE[:2], *ONE[4:], *MASK), "the prompt is empty"),
        ((*ONE, *MASK, "--prompt", " "), "the prompt is empty"),
        ((*ONE, *MASK, "--out", "out.gif"), "ends in none of"),
        ((*ONE, *MASK, "--composite", "--feather", "4"), "--feather"),
        ((*ONE, "--box", "1,1,5,5", "--size", "64"), "leave out --box"),
        ((*ONE, *MASK, "--whole", "--size", "64"), "leave out --whole"),
        (("--image", ".", "--out", "out", *MASK), "--mask is for one photograph"),
        ((*ONE, "--mask", "photo.png", "--image", "photo.mask.png", "--box", "1,1,2,2"), "each say"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_model_is_loaded(run, painter, words, said):
    assert said in run(*words, expected=2)
    assert not hasattr(painter, "loaded")


def test_another_runtime_needs_an_exported_folder(run):
    assert "refine-control export" in run(*ONE, *MASK, "--runtime", "onnx", expected=2)
    assert "runs/none is no folder" in run(*ONE, *MASK, "--runtime", "onnx", "--controlnet", "runs/none", expected=2)
