"""Frozen layers in 8 bits: gradients pass through them, and nothing but the codes is kept for the backward pass."""

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel

from refine_control.errors import InvalidInputError
from refine_control.models.backbone import predict_velocity
from refine_control.models.cpu_kernels import use_cpu_kernels
from refine_control.models.quantised import FrozenLinear, quantise, quantise_rows, refuse_fp8


@pytest.fixture(scope="module")
def transformer(tiny_backbone):
    torch.manual_seed(0)
    config = {**tiny_backbone.transformer.config, "num_layers": 2}
    return SD3Transformer2DModel.from_config(config).requires_grad_(False)


def residual_gradient(transformer):
    generator = torch.Generator().manual_seed(0)
    config = transformer.config

    def normals(*shape):
        return torch.randn(2, *shape, generator=generator)

    given = normals(config["in_channels"], 8, 8), torch.full((2,), 0.5), normals(5, config["joint_attention_dim"])
    residual = normals((8 // config["patch_size"]) ** 2, config["caption_projection_dim"]).requires_grad_()
    velocity = predict_velocity(transformer, *given, normals(config["pooled_projection_dim"]), [residual])
    velocity.square().sum().backward()
    return residual.grad


def dequantised(transformer):
    """The network with the values of its codes, in plain layers."""
    plain = copy.deepcopy(transformer)
    for module in list(plain.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, FrozenLinear):
                linear = torch.nn.Linear(layer.codes.shape[1], layer.codes.shape[0])
                linear.weight, linear.bias = torch.nn.Parameter(layer.weight), layer.bias
                setattr(module, name, linear.requires_grad_(False))
    return plain


@pytest.mark.parametrize("kernels", [False, True], ids=["stock", "cpu"])
def test_gradients_pass_through_the_frozen_transformer(transformer, kernels):
    exact, frozen = residual_gradient(transformer), copy.deepcopy(transformer)
    if kernels:
        use_cpu_kernels(frozen)
    quantise(frozen, "int8")
    assert not any(isinstance(each, torch.nn.Linear) for each in frozen.transformer_blocks.modules())
    gradient = residual_gradient(frozen)
    assert torch.allclose(gradient, residual_gradient(dequantised(frozen)), rtol=1e-4, atol=1e-4 * float(exact.std()))
    assert 0 < float((gradient - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("fp8", 0.05)])
def test_the_backward_pass_keeps_no_weight(kind, most):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48).requires_grad_(False)
    frozen, x = FrozenLinear(copy.deepcopy(layer), kind), torch.randn(2, 3, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = frozen.to(torch.bfloat16)(x.bfloat16()) if kind == "fp8" else frozen(x)
    assert sum(each.nbytes for each in kept if each.ndim) <= frozen.codes.numel() + 4 * len(frozen.scale)
    assert frozen.codes.element_size() == 1
    assert frozen.scale.dtype == torch.float32, "a cast leaves the scales in fp32"
    exact = layer(x.detach())
    assert float((out.detach().float() - exact).norm() / exact.norm()) < most
    grad = torch.randn_like(out)
    out.backward(grad)
    expected = grad.float() @ layer.weight
    assert float((x.grad - expected).norm() / expected.norm()) < most


def test_rows_have_scales_of_their_own():
    x = torch.tensor([[1.0, -2.0], [1e-3, 0.0], [0.0, 0.0]])
    for kind in ("int8", "fp8"):
        codes, scale = quantise_rows(x, kind)
        assert torch.allclose(codes.float() * scale, x, rtol=0.07)


def test_a_gpu_without_fp8_products_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InvalidInputError, match="set it to int8"):
        refuse_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refuse_fp8(torch.device("cuda"))
