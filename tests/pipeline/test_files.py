"""What `inpaint` refuses before any weight is read, and what it writes."""

import numpy as np
import pytest
from diffusers import SD3Transformer2DModel
from PIL import Image
from typer.testing import CliRunner

from refine_control.cli.app import app
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models import loading
from refine_control.models.card import BUNDLE
from refine_control.models.controlnet import from_transformer
from refine_control.pipeline import painting
from refine_control.pipeline.files import inpaint_file
from refine_control.recipe_files import load_recipe
from refine_control.training.run import student_card

SAMPLER = SamplerConfig(num_inference_steps=1, guidance_scale=1.0)


@pytest.fixture
def files(tmp_path):
    mask = np.zeros((70, 80), np.uint8)
    mask[20:50, 20:50] = 255
    Image.new("RGB", (80, 70), "teal").save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    return tmp_path / "a.png", tmp_path / "m.png"


@pytest.fixture
def unread(monkeypatch):
    """No weights are read."""

    def fail(*_given, **_more):
        raise AssertionError("weights were read")

    for name in ("load_backbone", "load_controlnet"):
        monkeypatch.setattr(loading, name, fail)


@pytest.mark.parametrize("size", [0, 17, 60, 100, 104, 1_000_000])
def test_a_size_that_the_model_cannot_paint_is_refused_from_its_config(files, unread, tmp_path, size):
    with pytest.raises(InvalidInputError, match=rf"size {size} "):
        inpaint_file(*files, "a red circle", tmp_path / "out.png", size=size)


@pytest.mark.parametrize("name", ["out", "out.gif", "out.png.txt", ".png"])
def test_a_picture_of_another_kind_is_not_written(files, unread, tmp_path, name):
    with pytest.raises(InvalidInputError, match=r"\.png, \.jpg"):
        inpaint_file(*files, "a red circle", tmp_path / name)


@pytest.mark.parametrize(("name", "kind"), [("a.PNG", "PNG"), ("b.jpg", "JPEG"), ("c.webp", "WEBP")])
def test_the_extension_says_what_is_written(files, tmp_path, monkeypatch, tiny_backbone, name, kind):
    monkeypatch.setattr(loading, "load_backbone", lambda *_, **__: tiny_backbone)
    out = inpaint_file(*files, "a red circle", tmp_path / name, sampler=SAMPLER)
    with Image.open(out) as picture:
        assert (picture.format, picture.size) == (kind, (64, 64))


def test_a_student_for_few_steps_is_sampled_as_its_card_says(files, tiny_backbone, tmp_path, monkeypatch):
    """On the mini bundle, from the command line: no option is given, and four network calls are made."""
    transformer = SD3Transformer2DModel.from_pretrained(BUNDLE / "transformer")
    card = student_card(load_recipe("mini/end_points"))
    loading.save_controlnet(
        from_transformer(transformer, 1), tmp_path / "student", 24, card=card, backbone=tiny_backbone
    )
    calls, samplers, forward, run = [], [], SD3Transformer2DModel.forward, painting.run_pipeline

    def counted(self, *given, **more):
        calls.append(len(more["hidden_states"]))
        return forward(self, *given, **more)

    def recorded(*given):
        samplers.append(given[5])
        return run(*given)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted)
    monkeypatch.setattr(painting, "run_pipeline", recorded)
    words = ["inpaint", "--image", str(files[0]), "--mask", str(files[1]), "--prompt", "a red circle"]
    words += ["--out", str(tmp_path / "out.png"), "--controlnet", str(tmp_path / "student")]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert (result.exit_code, calls) == (0, [1] * 4)
    assert (samplers[0].sigmas, samplers[0].guidance_scale, samplers[0].conditioning_scale) == ("even", 1, 1)
    assert Image.open(tmp_path / "out.png").size == (80, 70)
