"""Several ControlNets paint together: residuals are expanded to the transformer's sites first, and added then."""

import numpy as np
import pytest
import torch
from diffusers.models.controlnets import SD3MultiControlNetModel

from refine_control.conditions.condition import Shown, control_cond, masked_pixels
from refine_control.config import SamplerConfig
from refine_control.models.controlnet import Control, for_condition, place
from refine_control.pipeline.painting import complete_latents, paint
from refine_control.pixels import from_images, to_images
from refine_control.randomness import slot_normals

GENERATOR = torch.Generator().manual_seed(4)
NOISE = torch.randn(2, 16, 8, 8, generator=GENERATOR)
LATENTS, EDGES = (torch.randn(2, 16, 8, 8, generator=GENERATOR) for _ in range(2))
MASK = torch.zeros(2, 1, 64, 64)
MASK[:, :, 10:40, 20:50] = 1
COND = control_cond(LATENTS, MASK)
SITES_OF_EDGES = [0] * 2 + [1] * 5 + [2] * 3 + [3] * 7 + [4] * 5 + [5]
PROMPTS = ["a red circle", "an orange star on a tan background"]
SCALE, OTHER_SCALE, GUIDANCE = 0.9, 0.5, 3.0
ONE_STEP = SamplerConfig(num_inference_steps=1, guidance_scale=GUIDANCE, conditioning_scale=SCALE)


@pytest.fixture(scope="module")
def inpainting(tiny_student):
    return tiny_student(12)


@pytest.fixture(scope="module")
def canny(tiny_backbone, tiny_student):
    """Six layers, with a map of its own."""
    controlnet = for_condition(tiny_student(6, seed=3), "canny", tiny_backbone.vae).eval()
    place(controlnet, SITES_OF_EDGES)
    return controlnet


@pytest.fixture(scope="module")
def together(tiny_backbone):
    texts = tiny_backbone.encode_prompts(PROMPTS), tiny_backbone.encode_prompts(["", ""])

    def latents(controlnet, cond, others=(), sampler=ONE_STEP):
        return complete_latents(tiny_backbone, controlnet, cond, *texts, sampler, NOISE, others=others)

    return latents


def one_step(backbone, residuals):
    """The clean latents of one guided step by residuals for the empty prompts and the prompts, (4,N,D) each."""
    twice, time = torch.cat([NOISE] * 2), torch.full((4,), 1000.0)
    embeds, pooled = backbone.encode_prompts(["", "", *PROMPTS])
    with torch.no_grad():
        given = residuals(twice, time, embeds, torch.zeros_like(pooled))
        v_empty, v = backbone.transformer(twice, embeds, pooled, time, given, return_dict=False)[0].chunk(2)
    return NOISE - (v_empty + GUIDANCE * (v - v_empty))


def test_residuals_of_each_are_expanded_then_added(tiny_backbone, inpainting, canny, together):
    def summed(at, time, embeds, zeros):
        more = {"encoder_hidden_states": embeds, "pooled_projections": zeros, "timestep": time, "return_dict": False}
        first = inpainting(at, torch.cat([COND] * 2), SCALE, **more)[0]
        second = canny(at, torch.cat([EDGES] * 2), OTHER_SCALE, **more)[0]
        sites = [first[site // 2] + second[SITES_OF_EDGES[site]] for site in range(23)]
        return [*sites, sites[-1]]

    ours = together(inpainting, COND, [Control(canny, EDGES, OTHER_SCALE)])
    torch.testing.assert_close(ours, one_step(tiny_backbone, summed), rtol=1e-4, atol=1e-4)


def test_stock_drops_the_layers_that_another_controlnet_has_not(tiny_backbone, inpainting, canny, together):
    counts = []

    def stock(at, time, embeds, zeros):
        conds = [torch.cat([COND] * 2), torch.cat([EDGES] * 2)]
        both = SD3MultiControlNetModel([inpainting, canny])
        given = both(at, conds, [SCALE, OTHER_SCALE], zeros, embeds, time, return_dict=False)[0]
        counts.append(len(given))
        return given

    theirs = one_step(tiny_backbone, stock)
    assert counts == [6]
    assert (together(inpainting, COND, [Control(canny, EDGES, OTHER_SCALE)]) - theirs).abs().max() > 1e-2


def test_a_scale_of_zero_leaves_the_first_alone(inpainting, canny, together):
    alone = together(inpainting, COND)
    assert torch.equal(together(inpainting, COND, [Control(canny, EDGES, 0.0)]), alone)
    assert (together(inpainting, COND, [Control(canny, EDGES, OTHER_SCALE)]) - alone).abs().max() > 1e-2


def test_the_order_does_not_matter(inpainting, canny, together):
    sampler = ONE_STEP.model_copy(update={"num_inference_steps": 2})
    ours = together(inpainting, COND, [Control(canny, EDGES, OTHER_SCALE)], sampler)
    turned = sampler.model_copy(update={"conditioning_scale": OTHER_SCALE})
    swapped = together(canny, EDGES, [Control(inpainting, COND, SCALE)], turned)
    torch.testing.assert_close(swapped, ours, rtol=1e-4, atol=1e-4)


def test_injection_as_in_stock_is_that_of_each(inpainting, canny, together):
    sampler = ONE_STEP.model_copy(update={"injection": "diffusers"})
    ours = together(inpainting, COND, [Control(canny, EDGES, OTHER_SCALE)], sampler)
    place(canny, sites := [site * 6 // 24 for site in range(23)])  # stock's rule
    try:
        expected = together(inpainting, COND, [Control(canny, EDGES, OTHER_SCALE)])
    finally:
        place(canny, SITES_OF_EDGES)
    assert sites != SITES_OF_EDGES
    assert torch.equal(ours, expected)


def test_pictures_are_painted_by_what_each_is_shown(tiny_backbone, inpainting, canny):
    random = np.random.default_rng(0)
    images, edges = (random.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8) for _ in range(2))
    shown, other = Shown(images, MASK[:, 0].numpy() > 0), Control(canny, Shown(edges), OTHER_SCALE)
    together, one_by_one = (
        paint(tiny_backbone, inpainting, shown, PROMPTS, ONE_STEP, others=[other], batch_size=size).astype(int)
        for size in (2, 1)
    )
    assert np.abs(together - one_by_one).max() <= 1

    cond = control_cond(tiny_backbone.encode_images(masked_pixels(from_images(images), MASK)), MASK)
    encoded = tiny_backbone.encode_images(from_images(edges), shift=False)
    text, empty = tiny_backbone.encode_prompts(PROMPTS), tiny_backbone.encode_prompts(["", ""])
    noise = slot_normals(NOISE.shape[1:], range(2), ONE_STEP.seed, "initial noise")
    latents = complete_latents(
        tiny_backbone, inpainting, cond, text, empty, ONE_STEP, noise, others=[Control(canny, encoded, OTHER_SCALE)]
    )
    expected = to_images(tiny_backbone.decode_latents(latents)).astype(int)
    assert np.abs(together - expected).max() <= 1
    assert np.abs(paint(tiny_backbone, inpainting, shown, PROMPTS, ONE_STEP) - expected).max() > 1
