"""The CPU's operators have the results and the gradients of stock diffusers, to rounding."""

import copy

import pytest
import torch
from diffusers import SD3ControlNetModel
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import JointAttnProcessor2_0

from refine_control.miniature.networks import TRANSFORMER
from refine_control.models import cpu_kernels
from refine_control.models.backbone import predict_velocity
from refine_control.models.controlnet import control_residuals
from refine_control.models.cpu_kernels import FusedGelu, PlainJointAttention, linear, use_cpu_kernels


def layer(kind=GELU, approximate="tanh"):
    torch.manual_seed(0)
    part = GELU(32, 128, approximate=approximate)
    part.__class__ = kind
    return part


def gelu_results(part, dtype):
    part = part.to(dtype)
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1)).mul(4).to(dtype).requires_grad_()
    out = part(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    return [t.detach().float() for t in (out, x.grad, part.proj.weight.grad, part.proj.bias.grad)]


def worst(results, expected):
    """The largest error of each tensor, relative to its norm."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True)]


def test_a_fused_gelu_is_the_layer_of_diffusers_in_fp32():
    assert max(worst(gelu_results(layer(FusedGelu), torch.float32), gelu_results(layer(), torch.float32))) < 2e-6


def test_a_fused_gelu_is_as_near_the_truth_in_bf16_as_the_layer_of_diffusers():
    truth = gelu_results(layer(), torch.float32)
    fused, stock = (worst(gelu_results(layer(kind), torch.bfloat16), truth) for kind in (FusedGelu, GELU))
    assert all(ours <= 1.1 * theirs for ours, theirs in zip(fused, stock, strict=True)), (fused, stock)


def test_a_gelu_of_another_form_is_left_as_it_is():
    stock, fused = (gelu_results(layer(kind, "none"), torch.float32) for kind in (GELU, FusedGelu))
    assert all(torch.equal(a, b) for a, b in zip(stock, fused, strict=True))


def network_results(backbone, student, dtype):
    """Residuals and velocity, and the gradients of the student behind the frozen transformer."""
    transformer = copy.deepcopy(backbone.transformer).to(dtype)
    controlnet = copy.deepcopy(student).to(dtype)
    generator = torch.Generator().manual_seed(3)
    noisy, cond = (torch.randn(3, n, 8, 8, generator=generator) for n in (16, 17))
    sigmas, (embeds, pooled) = torch.tensor([0.1, 0.5, 0.9]), backbone.encode_prompts(["a red circle"] * 3)
    residuals = control_residuals(controlnet, noisy, sigmas, embeds, cond, pooled)
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
    errors = worst(network_results(*fast, torch.float32), network_results(*stock, torch.float32))
    assert max(errors) < 5e-6, errors


def test_whole_networks_round_no_worse_than_stock_ones_in_bf16(networks):
    stock, fast = networks
    truth = network_results(*stock, torch.float32)
    ours, theirs = (worst(network_results(*nets, torch.bfloat16), truth) for nets in (fast, stock))
    assert all(a <= 1.2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


# linear layers by oneDNN and by torch


def linear_results(x, weight, bias, gelu):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = linear(*leaves, *([None] if bias is None else []), gelu=gelu)
    out[:, ::2].transpose(0, 1).sum().backward()  # a gradient that is neither dense nor contiguous
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "transposed"])
def test_onednn_and_torch_agree(monkeypatch, gelu, with_bias, contiguous):
    torch.manual_seed(0)
    x = 2 * (torch.randn(3, 7, 32) if contiguous else torch.randn(7, 3, 32).transpose(0, 1))
    weight, bias = torch.randn(48, 32), torch.randn(48) if with_bias else None
    fast = linear_results(x, weight, bias, gelu)
    monkeypatch.setattr(cpu_kernels, "_computes", lambda _: False)
    plain = linear_results(x, weight, bias, gelu)
    assert len(fast) == len(plain) == 3 + with_bias
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_wanted_gradients_are_made():
    x, weight, bias = torch.randn(2, 5, 8, requires_grad=True), torch.randn(4, 8), torch.randn(4)
    linear(x, weight, bias).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert bias.grad is None


def test_a_type_that_onednn_does_not_know_goes_to_torch():
    x, weight, bias = torch.randn(2, 5, 8).double(), torch.randn(4, 8).double(), torch.randn(4).double()
    assert not cpu_kernels._computes(x)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


# joint attention


def attention_results(attention, image, text):
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    attention.zero_grad()
    outputs = [o for o in attention(hidden_states=leaves[0], encoder_hidden_states=leaves[1]) if o is not None]
    generator = torch.Generator().manual_seed(2)
    sum((o * torch.randn(o.shape, generator=generator)).sum() for o in outputs).backward()
    grads = [*(leaf.grad for leaf in leaves), *(p.grad for p in attention.parameters() if p.grad is not None)]
    return [o.detach() for o in outputs], [g.clone() for g in grads]


@pytest.mark.parametrize("block", [0, 23], ids=["inner", "context_pre_only"])
def test_outputs_and_gradients_are_those_of_diffusers(tiny_backbone, block):
    attention = copy.deepcopy(tiny_backbone.transformer.transformer_blocks[block].attn).requires_grad_(True)
    assert attention.context_pre_only == (block == 23)
    generator = torch.Generator().manual_seed(1)
    image, text = (3 * torch.randn(2, n, 32, generator=generator) for n in (64, 18))
    results = {}
    for name, processor in (("stock", JointAttnProcessor2_0()), ("plain", PlainJointAttention())):
        attention.set_processor(processor)
        results[name] = attention_results(attention, image, text)
    for stock, plain in zip(results["stock"], results["plain"], strict=True):
        assert len(stock) == len(plain) >= 2
        for a, b in zip(stock, plain, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * max(1.0, a.abs().max().item()))


def test_every_attention_of_a_network_is_set():
    controlnet = SD3ControlNetModel(**{**TRANSFORMER, "num_layers": 3})
    use_cpu_kernels(controlnet)
    assert [type(b.attn.processor) for b in controlnet.transformer_blocks] == [PlainJointAttention] * 3


def test_a_mask_or_single_stream_is_refused(tiny_backbone):
    attention = tiny_backbone.transformer.transformer_blocks[0].attn
    with pytest.raises(ValueError, match="joint blocks"):
        PlainJointAttention()(attention, torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="joint blocks"):
        PlainJointAttention()(attention, torch.zeros(1, 4, 32), torch.zeros(1, 4, 32), torch.ones(1, 4))
