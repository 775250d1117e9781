"""A student's folder says how it is to be sampled; what a user gives stands above it."""

import json
import logging
import re
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3ControlNetInpaintingPipeline,
)
from PIL import Image

from refine_control.cli.output import named_folders
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError, MissingError
from refine_control.models import card as cards
from refine_control.models.backbone import Backbone
from refine_control.models.card import CARD, SAMPLING, choose_sampler, own_sampling
from refine_control.models.loading import load_controlnet, resolve, save_controlnet, weights_mark
from refine_control.pipeline.painting import make_pipeline
from refine_control.recipe_files import load_recipe
from refine_control.training.run import student_card, student_folder

FOUR = {"num_inference_steps": 4, "guidance_scale": 1.0, "conditioning_scale": 1.0, "sigmas": "even"}


@pytest.fixture(scope="module")
def shifted(tiny_backbone):
    """The tiny backbone with SD3's shift."""
    components = {**tiny_backbone.pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return Backbone(StableDiffusion3ControlNetInpaintingPipeline(**components), max_sequence_length=0)


@pytest.fixture(scope="module")
def folder(shifted, tiny_student, tmp_path_factory):
    """A student for few steps as `train` saves it."""
    folder = tmp_path_factory.mktemp("few") / "student"
    save_controlnet(tiny_student(2), folder, 24, card=student_card(load_recipe("mini/end_points")), backbone=shifted)
    return folder


def chosen(controlnet, caplog, **given):
    with caplog.at_level(logging.WARNING):
        sampler = choose_sampler("mini", controlnet, given)
    return sampler, [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("recipe", "overrides", "most", "guidance"),
    [
        ("mini/end_points", [], 4, 3),
        ("mini/end_points", ["sampler.num_inference_steps=1", "objective.few_step.teacher_guidance=5"], 4, 5),
        ("mini/end_points", ["sampler.num_inference_steps=8"], 8, 3),
        ("mini/codi", [], 4, 1),  # the ground truth, its own step: no guided network is asked
        ("mini/codi", ["objective.few_step.ode=frozen"], 4, 3),
        ("mini/guidance", ["objective.x0_source=truth"], 4, 3),
    ],
)
def test_the_card_of_a_recipe(recipe, overrides, most, guidance):
    card = student_card(load_recipe(recipe, overrides))
    assert (card.most_steps, card.distilled_guidance) == (most, guidance)


def test_students_of_other_objectives_have_no_card(tiny_backbone, tiny_student, tmp_path):
    recipe = load_recipe("mini/balanced_stage2")
    assert student_card(recipe) is None
    save_controlnet(tiny_student(1), tmp_path / "student", 24, card=student_card(recipe), backbone=tiny_backbone)
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "manifest.json"}


def test_what_the_folder_of_a_student_for_few_steps_holds(folder):
    card = json.loads((folder / CARD).read_text())
    assert card == {"sampling": {**FOUR, "stochastic": False}, "most_steps": 4, "distilled_guidance": 3.0}
    scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    readme = (folder / "README.md").read_text()
    for line in (
        "from diffusers import FlowMapEulerDiscreteScheduler,",
        "num_inference_steps=4,\n    guidance_scale=1,\n    controlnet_conditioning_scale=1,\n",
        'scheduler=FlowMapEulerDiscreteScheduler.from_pretrained(FOLDER, subfolder="scheduler")',
    ):
        assert line in readme
    assert len(load_controlnet(folder).transformer_blocks) == 2
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {CARD, "README.md", "scheduler/scheduler_config.json"} < listed.keys()


def test_fresh_noise_needs_the_levels_in_the_call(shifted, tmp_path):
    (tmp_path / "a").mkdir()
    recipe = load_recipe("mini/end_points", ["sampler.stochastic=true"])
    cards.write_card(tmp_path / "a", student_card(recipe), shifted)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "a", subfolder="scheduler")
    assert (scheduler.config["stochastic_sampling"], scheduler.config["shift"]) == (True, 3.0)
    assert "    sigmas=[1.0, 0.75, 0.5, 0.25],\n" in (tmp_path / "a" / "README.md").read_text()


def test_the_code_of_the_readme_paints_in_stock_diffusers_what_our_pipeline_paints(shifted, folder, tmp_path):
    shifted.pipeline.save_pretrained(tmp_path / "model")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (10, 10, 40, 40))
    given = {"PROMPT": "a red circle", "IMAGE": Image.new("RGB", (64, 64), "teal"), "MASK": mask}
    names = {**given, "MODEL": str(tmp_path / "model"), "FOLDER": str(folder)}
    torch.manual_seed(3)
    exec(code, names)
    ours = make_pipeline(shifted, load_controlnet(folder), latents_mode="sample")
    picture = {"prompt": given["PROMPT"], "control_image": given["IMAGE"], "control_mask": mask}
    more = {"num_inference_steps": 4, "sigmas": [1, 0.75, 0.5, 0.25], "max_sequence_length": 0}
    torch.manual_seed(3)
    expected = ours(**picture, **more, guidance_scale=1.0, controlnet_conditioning_scale=1.0).images[0]
    assert expected.size == (64, 64)
    assert np.abs(np.asarray(names["picture"], int) - np.asarray(expected)).max() <= 1
    assert np.asarray(expected).std() > 1


def test_the_code_of_a_condition_in_other_levels_shows_them_to_stock():
    how = {"without_t5": True, "max_sequence_length": 0}
    usual = cards.diffusers_code(SamplerConfig(), "canny", "FOLDER", "MODEL", **how)
    code = cards.diffusers_code(SamplerConfig(), "canny", "FOLDER", "MODEL", **how, levels=(0.5, 128.0))
    assert "VaeImageProcessor" not in usual
    given = MagicMock()
    names = {"PROMPT": "a", "FOLDER": "f", "MODEL": "m", "CONDITION_PICTURE": Image.new("RGB", (32, 16), (0, 51, 255))}
    with patch.multiple("diffusers", SD3ControlNetModel=MagicMock(), StableDiffusion3ControlNetPipeline=given):
        exec(code, names)
    shown = given.from_pretrained.return_value.call_args.kwargs["control_image"]
    assert shown.shape == (1, 3, 16, 32)
    torch.testing.assert_close(shown[0, :, 3, 5], torch.tensor([0.5, 26.0, 128.0]))


def test_the_card_of_a_controlnet_stands_above_that_of_the_model(folder, tmp_path):
    assert own_sampling("mini", folder) == {**FOUR, "stochastic": False}
    assert own_sampling("author/sd3", str(folder)) == own_sampling("mini", folder)
    assert own_sampling("mini") == own_sampling("mini", tmp_path) == SAMPLING
    assert own_sampling("author/sd3", tmp_path) == {}
    assert own_sampling("author/sd3", "nobody/at-all") == {}


DUAL = {"num_layers": 24, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}
FLUX = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}


@pytest.mark.parametrize(
    ("transformer", "controlnet", "advised"),
    [
        ({"num_layers": 24}, {"num_layers": 23, "joint_attention_dim": 64}, {"conditioning_scale": 0.95}),
        (DUAL, {**DUAL, "num_layers": 23, "joint_attention_dim": 64}, {"conditioning_scale": 0.8}),
        (FLUX, {"num_layers": 4, "num_single_layers": 1}, {"conditioning_scale": 0.5, "guidance_scale": 3.5}),
        (FLUX, {"num_layers": 4}, {"guidance_scale": 3.5}),  # of no family: the loader says so
    ],
)
def test_without_a_card_the_scale_is_that_of_the_family(tmp_path, transformer, controlnet, advised):
    for name, config in {"model/transformer": transformer, "net": controlnet, "model/controlnet": controlnet}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for named in (str(tmp_path / "net"), None):
        assert own_sampling(str(tmp_path / "model"), named) == advised
    sampler = choose_sampler(str(tmp_path / "model"), str(tmp_path / "net"), {})
    assert sampler.conditioning_scale == advised.get("conditioning_scale", 0.95)


def test_what_is_given_stands_above_the_card(folder, caplog):
    sampler, warnings = chosen(folder, caplog, num_inference_steps=2, guidance_scale=None, sigmas="scheduler", seed=5)
    assert sampler == SamplerConfig(**{**FOUR, "num_inference_steps": 2, "sigmas": "scheduler", "seed": 5})
    assert warnings == []


def test_guidance_for_a_student_that_has_it_is_ignored_with_one_warning(folder, caplog):
    sampler, warnings = chosen(folder, caplog, guidance_scale=7.0)
    assert sampler.guidance_scale == 1.0
    assert warnings == [f"{folder} has the guidance scale 3 distilled in: the given scale 7 is ignored"]
    caplog.clear()
    assert chosen(folder, caplog, guidance_scale=0.5)[0].guidance_scale == 0.5
    assert chosen(None, caplog, guidance_scale=7.0)[0].guidance_scale == 7.0
    assert not caplog.records


def test_more_steps_than_a_student_was_trained_for_are_taken_with_one_warning(folder, caplog):
    sampler, warnings = chosen(folder, caplog, num_inference_steps=5)
    assert sampler.num_inference_steps == 5
    assert warnings == [f"{folder} was trained for at most 4 steps: 5 steps may give worse pictures"]
    caplog.clear()
    assert chosen(folder, caplog, num_inference_steps=4)[1] == []


@pytest.mark.parametrize("text", ["", "[]", '{"sampling": {}}', '{"sampling": {"steps": 4}, "most_steps": 4}', "3"])
def test_a_card_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(InvalidInputError, match=f"{CARD} is no card"):
        own_sampling("mini", tmp_path)


@pytest.mark.parametrize("name", cards.CONTROLNETS)
def test_a_packaged_controlnet_is_named(folder, monkeypatch, tmp_path, name):
    monkeypatch.setattr(cards, "MODELS", tmp_path)
    there = tmp_path / f"mini_{name}"
    there.symlink_to(folder)
    pairs = [name, f"a={name}"]
    assert resolve(name) == student_folder(name) == named_folders(pairs, "--student")["a"] == there
    assert weights_mark(name) == weights_mark(folder)
    assert own_sampling("mini", name) == own_sampling("mini", folder)
    there.unlink()
    for ask in (resolve, student_folder, load_controlnet, lambda name: own_sampling("mini", name)):
        with pytest.raises(MissingError, match=rf"ControlNet {name} is not in .*mini_{name}; make it with `refine-con"):
            ask(name)
