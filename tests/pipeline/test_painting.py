"""Ours is the stock pipeline where stock is right, and a hand-written loop where it is not."""

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from refine_control.conditions.condition import Shown, control_cond
from refine_control.config import SamplerConfig, StudentCard
from refine_control.injection import layer_of_site
from refine_control.models.backbone import Backbone
from refine_control.models.controlnet import Control, for_condition
from refine_control.models.loading import load_controlnet, save_controlnet
from refine_control.pipeline import painting
from refine_control.pipeline.files import inpaint_file
from refine_control.pipeline.painting import complete_latents, make_pipeline, paint, run_pipeline, warn_wasted_steps

PROMPTS = ["a red circle", "an orange star on a tan background"]
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
MASKS = np.zeros((4, 64, 64), bool)
MASKS[:, 10:40, 20:50] = True
SHOWN = Shown(IMAGES, MASKS)
STEPS, GUIDANCE, SCALE = 2, 3.0, 0.95
NOISE = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(4))


def arguments(**changed):
    pixels = torch.from_numpy(IMAGES[:2]).permute(0, 3, 1, 2).float() / 127.5 - 1
    return {
        "prompt": PROMPTS,
        "control_image": pixels,
        "control_mask": torch.from_numpy(MASKS[:2])[:, None].float(),
        "height": 64,
        "width": 64,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "controlnet_conditioning_scale": SCALE,
        "latents": NOISE.clone(),
        "max_sequence_length": 0,
        "output_type": "pt",
        **changed,
    }


def by_pipeline(pipeline, **changed):
    torch.manual_seed(11)
    with torch.no_grad():
        return pipeline(**arguments(**changed)).images


def stock_of(backbone, controlnet):
    pipeline = StableDiffusion3ControlNetInpaintingPipeline(
        **{**backbone.pipeline.components, "controlnet": controlnet}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def by_hand(backbone, controlnet):
    """The exact pipeline written out: posterior draw, one residual by site, guidance, Euler, decoding."""
    given, vae, transformer = arguments(), backbone.vae, backbone.transformer
    hidden = given["control_image"].clone()
    hidden[given["control_mask"].expand_as(hidden) > 0.5] = -1
    torch.manual_seed(11)
    masked = (vae.encode(hidden).latent_dist.sample() - 0.1) * 1.7
    keep = 1 - torch.nn.functional.interpolate(given["control_mask"], size=(8, 8))
    cond = torch.cat([torch.cat([masked, keep], 1)] * 2)
    embeds, pooled = backbone.encode_prompts(["", "", *PROMPTS])
    latents = NOISE.clone()
    sigmas = torch.tensor([*np.linspace(1.0, 1 / 1000, STEPS), 0.0], dtype=torch.float32)
    feeds = layer_of_site(len(controlnet.transformer_blocks))
    for now, following in pairwise(sigmas):
        twice, time = torch.cat([latents] * 2), (now * 1000).expand(4)
        own = controlnet(twice, cond, SCALE, embeds, torch.zeros_like(pooled), time, return_dict=False)[0]
        residuals = [own[feeds[min(block, 22)]] for block in range(24)]
        v_empty, v = transformer(twice, embeds, pooled, time, residuals, return_dict=False)[0].chunk(2)
        latents = latents + (following - now) * (v_empty + GUIDANCE * (v - v_empty))
    return (vae.decode(latents / 1.7 + 0.1).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 6, 8, 12])
def test_ours_is_stock_bit_for_bit_where_stock_is_exact(tiny_backbone, tiny_student, layers):
    student = tiny_student(layers)
    ours = by_pipeline(make_pipeline(tiny_backbone, student, latents_mode="sample"))
    assert torch.equal(ours, by_pipeline(stock_of(tiny_backbone, student)))
    assert ours.std() > 0.01


@pytest.mark.parametrize("layers", [5, 23])
def test_ours_is_the_exact_loop_where_stock_is_shifted(tiny_backbone, tiny_student, layers):
    controlnet = tiny_backbone.pipeline.controlnet if layers == 23 else tiny_student(layers)
    ours, stock = (by_pipeline(make_pipeline(tiny_backbone, controlnet, i, "sample")) for i in ("exact", "diffusers"))
    torch.testing.assert_close(ours, by_hand(tiny_backbone, controlnet), rtol=0, atol=1e-4)
    assert torch.equal(stock, by_pipeline(stock_of(tiny_backbone, controlnet)))
    assert (ours - stock).abs().max() > 1e-3


def test_the_mean_is_deterministic_and_no_draw(tiny_backbone, tiny_student):
    student = tiny_student(2)
    mean = make_pipeline(tiny_backbone, student)
    first = by_pipeline(mean)
    torch.manual_seed(12)
    with torch.no_grad():
        assert torch.equal(first, mean(**arguments()).images)
    assert not torch.equal(first, by_pipeline(make_pipeline(tiny_backbone, student, latents_mode="sample")))


def test_pictures_and_tensors_are_prepared_alike(tiny_backbone, tiny_student):
    from PIL import Image

    pipeline = make_pipeline(tiny_backbone, tiny_student(2))
    same = {"control_image": Image.fromarray(IMAGES[0]), "control_mask": Image.fromarray(MASKS[0])}
    one = {"prompt": PROMPTS[0], "latents": NOISE[:1].clone()}
    tensors = {k: arguments()[k][:1] for k in same}
    torch.testing.assert_close(
        by_pipeline(pipeline, **one, **same), by_pipeline(pipeline, **one, **tensors), rtol=0, atol=1e-5
    )


def test_the_noise_of_a_picture_does_not_know_its_batch(tiny_backbone, tiny_student):
    student, sampler = tiny_student(2), SamplerConfig(num_inference_steps=2)
    prompts = [*PROMPTS, *PROMPTS]
    alone, together = (paint(tiny_backbone, student, SHOWN, prompts, sampler, batch_size=size) for size in (1, 4))
    assert alone.shape == IMAGES.shape
    assert alone.dtype == np.uint8
    assert np.abs(alone.astype(int) - together).max() <= 1
    part = paint(tiny_backbone, student, SHOWN.take(slice(2, 4)), prompts[2:], sampler, first=2)
    assert np.abs(alone[2:].astype(int) - part).max() <= 1
    other = paint(tiny_backbone, student, SHOWN.take(slice(2, 4)), prompts[2:], sampler, first=0)
    assert np.abs(alone[2:].astype(int) - other).max() > 1


@pytest.mark.parametrize("injection", ["exact", "diffusers"])
def test_a_batch_is_painted_as_the_pipeline_paints(tiny_backbone, tiny_student, injection):
    student = tiny_student(5)
    sampler = SamplerConfig(num_inference_steps=2, guidance_scale=3.0, injection=injection)
    pipeline = make_pipeline(tiny_backbone, student, injection)
    one = run_pipeline(pipeline, tiny_backbone, IMAGES[0], MASKS[0], PROMPTS[0], sampler)
    batch = paint(tiny_backbone, student, SHOWN.take(slice(2)), PROMPTS, sampler)
    assert np.abs(one.astype(int) - batch[0]).max() <= 1
    other = sampler.model_copy(update={"injection": "exact" if injection == "diffusers" else "diffusers"})
    assert np.abs(paint(tiny_backbone, student, SHOWN.take(slice(2)), PROMPTS, other)[0] - batch[0]).max() > 1


@pytest.fixture(scope="module")
def shifted(tiny_backbone):
    """The tiny backbone with SD3's shift."""
    components = {**tiny_backbone.pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return Backbone(StableDiffusion3ControlNetInpaintingPipeline(**components), max_sequence_length=0)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_stock_with_the_scheduler_of_a_student_folder_is_ours(
    shifted, tiny_student, tmp_path, monkeypatch, steps, stochastic
):
    few = {"num_inference_steps": steps, "guidance_scale": 1.0, "conditioning_scale": 1.0, "sigmas": "even"}
    sampler = SamplerConfig(**few, stochastic=stochastic)
    card = StudentCard(sampling=sampler, most_steps=8, distilled_guidance=3.0)
    save_controlnet(tiny_student(2), tmp_path / "student", 24, card=card, backbone=shifted)
    kind = FlowMatchEulerDiscreteScheduler if stochastic else FlowMapEulerDiscreteScheduler
    stock = stock_of(shifted, SD3ControlNetModel.from_pretrained(tmp_path / "student"))
    stock.scheduler = kind.from_pretrained(tmp_path / "student", subfolder="scheduler")
    passed = {"sigmas": [1 - i / steps for i in range(steps)]} if stochastic else {}  # as the README says
    more = {"guidance_scale": 1.0, "controlnet_conditioning_scale": 1.0, "output_type": "latent"}
    expected = by_pipeline(stock, num_inference_steps=steps, **passed, **more)
    # the global generator, from which stock draws
    monkeypatch.setattr(painting, "slot_normals", lambda shape, rows, *_: torch.randn(len(rows), *shape))
    given = arguments()
    hidden = torch.where(given["control_mask"] > 0.5, -1.0, given["control_image"])
    small = torch.nn.functional.interpolate(given["control_mask"], size=(8, 8))
    torch.manual_seed(11)
    with torch.no_grad():
        masked = (shifted.vae.encode(hidden).latent_dist.sample() - 0.1) * 1.7
    text, student = shifted.encode_prompts(PROMPTS), load_controlnet(tmp_path / "student")
    ours = complete_latents(shifted, student, control_cond(masked, small), text, None, sampler, NOISE.clone())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stochastic", [False, True])
def test_even_levels_and_fresh_noise_are_the_same_in_batches_and_the_pipeline(shifted, tiny_student, stochastic):
    student = tiny_student(5)
    sampler = SamplerConfig(num_inference_steps=2, guidance_scale=1.0, sigmas="even", stochastic=stochastic, seed=3)
    pipeline = make_pipeline(shifted, student)
    one = run_pipeline(pipeline, shifted, IMAGES[0], MASKS[0], PROMPTS[0], sampler).astype(int)
    batch = paint(shifted, student, SHOWN.take(slice(2)), PROMPTS, sampler)
    assert np.abs(one - batch[0]).max() <= 1
    second = paint(shifted, student, SHOWN.take(slice(1, 2)), PROMPTS[1:], sampler, first=1)
    assert np.abs(batch[1].astype(int) - second[0]).max() <= 1
    for changed in ({"sigmas": "scheduler"}, {"stochastic": not stochastic}):  # and nothing of it stays behind
        other = sampler.model_copy(update=changed)
        assert np.abs(run_pipeline(pipeline, shifted, IMAGES[0], MASKS[0], PROMPTS[0], other) - one).max() > 1
    again = run_pipeline(pipeline, shifted, IMAGES[0], MASKS[0], PROMPTS[0], sampler)
    np.testing.assert_array_equal(one, again)


def test_steps_that_the_scheduler_wastes_are_named(shifted, tiny_backbone, caplog):
    warn_wasted_steps(shifted, SamplerConfig(num_inference_steps=4))
    (record,) = caplog.records
    assert "shift 3 twice (diffusers#13243), so the last of the 4 steps is wasted" in record.getMessage()
    assert "1, 0.86, 0.6, 0.0089, 0; choose evenly spaced ones, `--sigmas even`" in record.getMessage()
    for backbone, steps, sigmas in ((shifted, 4, "even"), (shifted, 28, "scheduler"), (shifted, 1, "scheduler")):
        warn_wasted_steps(backbone, SamplerConfig(num_inference_steps=steps, sigmas=sigmas))
    warn_wasted_steps(tiny_backbone, SamplerConfig(num_inference_steps=4))
    assert len(caplog.records) == 1


def test_a_batch_of_draws_is_refused(tiny_backbone, tiny_student):
    with pytest.raises(ValueError, match="mean"):
        paint(tiny_backbone, tiny_student(2), SHOWN, PROMPTS * 2, SamplerConfig(latents="sample"))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_completions_are_what_the_pipeline_paints(tiny_backbone, guidance):
    teacher = tiny_backbone.pipeline.controlnet
    pipeline = make_pipeline(tiny_backbone, teacher)
    latents = by_pipeline(pipeline, output_type="latent", guidance_scale=guidance)
    given = arguments()
    hidden = torch.where(given["control_mask"] > 0.5, -1.0, given["control_image"])
    small = torch.nn.functional.interpolate(given["control_mask"], size=(8, 8))
    sampler = SamplerConfig(num_inference_steps=STEPS, guidance_scale=guidance, conditioning_scale=SCALE)
    text, empty = tiny_backbone.encode_prompts(PROMPTS), tiny_backbone.encode_prompts(["", ""])
    ours = complete_latents(
        *(tiny_backbone, teacher, control_cond(tiny_backbone.encode_images(hidden), small)),
        *(text, empty, sampler, NOISE.clone()),
    )
    torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_without_a_region_a_picture_is_the_one_of_stock_s_other_pipeline(
    tiny_backbone, tiny_student, monkeypatch, guidance
):
    student = for_condition(tiny_student(2), "canny", tiny_backbone.vae)
    stock = StableDiffusion3ControlNetPipeline(**{**tiny_backbone.pipeline.components, "controlnet": student})
    stock.set_progress_bar_config(disable=True)
    # stock draws from the posterior and reads no mask
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    given = arguments(guidance_scale=guidance)
    del given["control_mask"]
    with torch.no_grad():
        expected = stock(**given).images
    monkeypatch.setattr(painting, "slot_normals", lambda *_: NOISE.clone())
    sampler = SamplerConfig(num_inference_steps=STEPS, guidance_scale=guidance, conditioning_scale=SCALE)
    ours = paint(tiny_backbone, student, Shown(IMAGES[:2]), PROMPTS, sampler)
    assert np.abs(ours - 255 * expected.permute(0, 2, 3, 1).numpy()).max() < 1
    other = paint(tiny_backbone, student, Shown(IMAGES[2:]), PROMPTS, sampler)
    assert np.abs(ours.astype(int) - other).max() > 1  # it sees the condition


def test_on_an_accelerator_all_tensors_are_on_it(tiny_backbone, tiny_student):
    pipeline = copy.copy(tiny_backbone.pipeline)
    pipeline.transformer = copy.deepcopy(pipeline.transformer).to("meta")  # the device that refuses tensors of the CPU
    backbone, student = Backbone(pipeline, max_sequence_length=0), tiny_student(1).to("meta")
    texts = tiny_backbone.encode_prompts(PROMPTS)
    seen, sampler = torch.zeros(2, 17, 8, 8), SamplerConfig(num_inference_steps=1, stochastic=True)
    painted = complete_latents(backbone, student, seen, texts, texts, sampler, NOISE, others=[Control(student, seen)])
    assert (painted.device.type, painted.shape) == ("meta", NOISE.shape)


def test_photo_and_mask_may_lie_anywhere(tiny_backbone, tmp_path, monkeypatch):
    from PIL import Image

    from refine_control.models import loading

    for folder in ("here", "photos", "masks"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (80, 70), "teal").save(tmp_path / "photos" / "a.jpg")
    mask = Image.new("L", (80, 70))
    mask.paste(255, (20, 20, 50, 50))
    mask.save(tmp_path / "masks" / "a.png")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(loading, "load_backbone", lambda *_, **__: tiny_backbone)
    sampler = SamplerConfig(num_inference_steps=1, guidance_scale=1.0)
    out = inpaint_file(Path("../photos/a.jpg"), Path("../masks/a.png"), "a disc", Path("out.png"), sampler=sampler)
    assert Image.open(out).size == (64, 64)
