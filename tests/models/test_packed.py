"""Packed networks answer what their modules answer, for any depth, type and residuals, and follow their weights."""

import copy

import pytest
import torch

from refine_control.conditions.condition import show
from refine_control.config import SamplerConfig
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models import backbone as backbones
from refine_control.models import controlnet as controlnets
from refine_control.models.backbone import predict_velocity
from refine_control.models.controlnet import control_residuals
from refine_control.models.packed import pack, packed
from refine_control.pipeline.painting import paint


@pytest.fixture
def networks(tiny_backbone):
    """Copies that nobody else sees, every weight and bias far from zero."""
    transformer, controlnet = copy.deepcopy((tiny_backbone.transformer, tiny_backbone.pipeline.controlnet))
    generator = torch.Generator().manual_seed(0)
    for network in (transformer, controlnet):
        for parameter in network.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return transformer, controlnet


def answers(transformer, controlnet, count=2, scale=0.9, injection="exact"):
    """Residuals and velocity of random input, in fp32."""
    generator = torch.Generator().manual_seed(1)
    size, channels = 8, transformer.config["in_channels"]
    width, pooled_width = transformer.config["joint_attention_dim"], transformer.config["pooled_projection_dim"]
    noisy, cond = (torch.randn(count, c, size, size, generator=generator) for c in (channels, channels + 1))
    embeds = torch.randn(count, 5, width, generator=generator)
    pooled, sigmas = torch.randn(count, pooled_width, generator=generator), torch.rand(count, generator=generator)
    residuals = control_residuals(controlnet, noisy, sigmas, embeds, cond, pooled, scale)
    velocity = predict_velocity(transformer, noisy, sigmas, embeds, pooled, residuals, injection)
    alone = predict_velocity(transformer, noisy, sigmas, embeds, pooled)
    return [part.float() for part in (*residuals, velocity, alone)]


@pytest.mark.parametrize("count", [1, 5])  # few rows and many: torch's and oneDNN's products
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_packed_networks_equal_their_modules(networks, count, dtype, tolerance):
    for network in networks:
        network.to(dtype)
    with torch.no_grad():
        expected = answers(*networks, count)
        pack(*networks)
        assert all(packed(network) is not None for network in networks)
        got = answers(*networks, count)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert other.abs().max() > 0.1
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_students_and_the_injection_of_diffusers(networks, tiny_student):
    transformer, student = networks[0], copy.deepcopy(tiny_student(3))
    with torch.no_grad():
        expected = [answers(transformer, student, injection=each) for each in ("exact", "diffusers")]
        pack(transformer, student)
        got = [answers(transformer, student, injection=each) for each in ("exact", "diffusers")]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_gradients_and_changed_weights_are_those_of_the_module(networks):
    networks[1].requires_grad_(True)
    pack(*networks)
    assert all(packed(network) is None for network in networks)  # gradients are enabled
    assert answers(*networks)[-2].requires_grad
    with torch.no_grad():
        before = answers(*networks)[-1]
        for network in networks:
            for parameter in network.parameters():
                parameter.mul_(1.1)
        after = answers(*networks)[-1]
        for network in networks:
            del network.packed
        torch.testing.assert_close(after, answers(*networks)[-1], rtol=1e-5, atol=2e-6)
    assert (after - before).abs().max() > 0.01


def test_packing_adds_no_parameters_and_skips_what_it_does_not_know(networks):
    transformer, _ = networks
    names = list(transformer.state_dict())
    pack(transformer)
    assert list(transformer.state_dict()) == names
    other = copy.deepcopy(transformer)
    other.transformer_blocks[0].use_dual_attention = True
    adapted = copy.deepcopy(transformer)
    adapted.transformer_blocks[0].attn.to_q.base_layer = torch.nn.Linear(2, 2)  # as peft names it
    for network in (other, adapted):
        del network.packed
        pack(network, torch.nn.Linear(2, 2))
        with torch.no_grad():
            assert packed(network) is None


def test_pictures_are_the_same_and_guidance_takes_one_call(tiny_backbone, monkeypatch):
    photos = list(scene_photos(0, 0, 3))
    calls = []
    for module, name in ((backbones, "packed"), (controlnets, "packed")):
        monkeypatch.setattr(module, name, lambda network: calls.append(type(network).__name__) or packed(network))

    def painted(backbone, guidance):
        sampler = SamplerConfig(num_inference_steps=2, guidance_scale=guidance)
        calls.clear()
        prompts = [photo.prompt for photo in photos]
        return paint(backbone, backbone.pipeline.controlnet, show(photos), prompts, sampler).astype(int), len(calls)

    fast = copy.copy(tiny_backbone)
    fast.pipeline, fast.vae, fast.transformer = (
        copy.copy(tiny_backbone.pipeline),
        *copy.deepcopy((tiny_backbone.vae, tiny_backbone.transformer)),
    )
    fast.pipeline.controlnet = copy.deepcopy(tiny_backbone.pipeline.controlnet)
    pack(fast.vae, fast.transformer, fast.pipeline.controlnet)
    for guidance, passes in ((1.0, 1), (3.0, 2)):
        (expected, separate), (got, joint) = painted(tiny_backbone, guidance), painted(fast, guidance)
        assert abs(got - expected).max() <= 1
        assert (separate, joint) == (2 * 2 * passes, 2 * 2)
