"""The CPU's operators have the results and the gradients of stock diffusers, to rounding."""

import copy

import pytest
import torch
from diffusers.models.activations import GELU

from refine_control.models.backbone import predict_velocity
from refine_control.models.controlnet import control_residuals
from refine_control.models.cpu_kernels import FusedGelu, use_cpu_kernels


def layer(kind=GELU, approximate="tanh"):
    torch.manual_seed(0)
    made = GELU(32, 128, approximate=approximate)
    made.__class__ = kind
    return made


def layer_answers(made, dtype):
    made = made.to(dtype)
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1)).mul(4).to(dtype).requires_grad_()
    out = made(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    return [t.detach().float() for t in (out, x.grad, made.proj.weight.grad, made.proj.bias.grad)]


def worst(found, expected):
    """The largest error of each tensor, relative to its norm."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


def test_a_fused_gelu_is_the_layer_of_diffusers_in_fp32():
    assert max(worst(layer_answers(layer(FusedGelu), torch.float32), layer_answers(layer(), torch.float32))) < 2e-6


def test_a_fused_gelu_is_as_near_the_truth_in_bf16_as_the_layer_of_diffusers():
    truth = layer_answers(layer(), torch.float32)
    fused, stock = (worst(layer_answers(layer(kind), torch.bfloat16), truth) for kind in (FusedGelu, GELU))
    assert all(ours <= 1.1 * theirs for ours, theirs in zip(fused, stock, strict=True)), (fused, stock)


def test_a_gelu_of_another_form_is_left_as_it_is():
    stock, fused = (layer_answers(layer(kind, "none"), torch.float32) for kind in (GELU, FusedGelu))
    assert all(torch.equal(a, b) for a, b in zip(stock, fused, strict=True))


def network_answers(backbone, student, dtype):
    """Residuals and velocity, and the gradients of the student behind the frozen transformer."""
    transformer = copy.deepcopy(backbone.transformer).to(dtype)
    controlnet = copy.deepcopy(student).to(dtype)
    generator = torch.Generator().manual_seed(3)
    noisy, cond = (torch.randn(3, n, 8, 8, generator=generator) for n in (16, 17))
    sigmas, (embeds, pooled) = torch.tensor([0.1, 0.5, 0.9]), backbone.encode_prompts(["a red circle"] * 3)
    residuals = control_residuals(controlnet, noisy, sigmas, embeds, cond, backbone.pooled_width)
    velocity = predict_velocity(transformer, noisy, sigmas, embeds, pooled, residuals)
    sum(out.float().square().mean() for out in (*residuals, velocity)).backward()
    grads = [p.grad.flatten().float() for p in controlnet.parameters() if p.grad is not None]
    return [velocity.detach().float(), torch.stack(residuals).detach().float(), torch.cat(grads)]


@pytest.fixture
def networks(tiny_backbone, tiny_student):
    """The same networks twice: stock, and with the CPU's operators."""
    fast = copy.copy(tiny_backbone)
    fast.transformer = copy.deepcopy(tiny_backbone.transformer)
    stock_student, fast_student = tiny_student(3), tiny_student(3)
    use_cpu_kernels(fast.transformer, fast_student)
    return (tiny_backbone, stock_student), (fast, fast_student)


def test_whole_networks_answer_and_learn_as_stock_ones_do_in_fp32(networks):
    stock, fast = networks
    assert [n for n, _ in stock[1].named_parameters()] == [n for n, _ in fast[1].named_parameters()]
    errors = worst(network_answers(*fast, torch.float32), network_answers(*stock, torch.float32))
    assert max(errors) < 5e-6, errors


def test_whole_networks_round_no_worse_than_stock_ones_in_bf16(networks):
    stock, fast = networks
    truth = network_answers(*stock, torch.float32)
    ours, theirs = (worst(network_answers(*nets, torch.bfloat16), truth) for nets in (fast, stock))
    assert all(a <= 1.2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
