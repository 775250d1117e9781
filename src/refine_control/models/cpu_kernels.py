"""Operators that make SD3's blocks fast on a CPU, results unchanged: oneDNN's linear layers, and plain joint attention.

oneDNN fuses tanh GELU with the product before it; torch's own GELU takes four times as long as that product. torch
gives fp32 products to MKL, which on an AMD processor reaches 40 % of oneDNN's speed. In bf16 the backward of torch's
fused attention is slower than the rest of a small SD3 block; batched products and an fp32 softmax take a fifth of it.
Measure with `refine-control bench step`.
"""

# B batch, N image tokens, M text tokens, T = N + M, D width, F width of the result, H heads

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.autograd.function import once_differentiable


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False) -> Any:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")


def _computes(x: torch.Tensor) -> bool:
    """Whether this torch has oneDNN (x86 builds do) and this processor supports it for the type of `x`."""
    if x.device.type not in ("cpu", "meta") or not torch.backends.mkldnn.is_available():  # on meta: shapes of the CPU's
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Linear(torch.autograd.Function):
    """x W' + b, or its tanh GELU, whose backward computes the sum again instead of keeping it.

    In bf16 that backward takes the derivative of the erf form, three times faster: the two differ by 9e-4 at most,
    half of bf16's spacing just below 1."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.gelu = gelu
        return _product(x, weight, bias, gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad, needed, by_mkl = grads[0], ctx.needs_input_grad, x.dtype == torch.float32
        if ctx.gelu:
            form = "tanh" if by_mkl else "none"
            grad = torch.ops.aten.gelu_backward(grad, _product(x, weight, bias), approximate=form)
        grad_x = grad_weight = None
        rows = grad.flatten(0, -2)
        if needed[0]:
            grad_x = _product(grad, weight.T) if by_mkl else grad @ weight
        if needed[1]:
            columns = x.flatten(0, -2).T
            grad_weight = _product(rows.T, columns) if by_mkl else rows.T @ columns.T
        return grad_x, grad_weight, rows.sum(0) if needed[2] else None, None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False) -> torch.Tensor:
    """x W' + b, then tanh GELU if `gelu`: (B,N,D) -> (B,N,F). By oneDNN where available, else by torch."""
    if _computes(x):
        return _Linear.apply(x, weight, bias, gelu)
    out = nn.functional.linear(x, weight, bias)
    return nn.functional.gelu(out, approximate="tanh") if gelu else out


class _JointAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v over both streams: (B,N,3D), (B,M,3D), H -> (B,N,D), (B,M,D).

    Keeps one set of probabilities in the type of the inputs for the backward; the softmax itself is fp32."""

    @staticmethod
    def forward(ctx: Any, image: torch.Tensor, text: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        streams = [stream.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4) for stream in (image, text)]
        query, key, value = torch.cat(streams, 3).flatten(1, 2)  # (BH,T,d) each
        scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
        probabilities = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.heads, ctx.count = heads, image.shape[1]
        joined = torch.bmm(probabilities, value).unflatten(0, (-1, heads)).transpose(1, 2)  # (B,T,H,d)
        return joined[:, : ctx.count].flatten(2), joined[:, ctx.count :].flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        query, key, value, probabilities = ctx.saved_tensors
        streams = [grad.unflatten(-1, (ctx.heads, -1)).transpose(1, 2) for grad in grads]
        grad = torch.cat(streams, 2).flatten(0, 1)
        grad_scores = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, probabilities.dtype)
        scale = query.shape[-1] ** -0.5
        parts = [
            torch.bmm(grad_scores, key * scale),
            torch.bmm(grad_scores.transpose(1, 2), query * scale),
            torch.bmm(probabilities.transpose(1, 2), grad),
        ]
        parts = [part.unflatten(0, (-1, ctx.heads)).transpose(1, 2) for part in parts]  # (B,T,H,d) each
        image = torch.stack([part[:, : ctx.count] for part in parts], 2).flatten(2)
        return image, torch.stack([part[:, ctx.count :] for part in parts], 2).flatten(2), None


def _fused_linear(hidden_states: torch.Tensor, layers: Sequence[nn.Linear]) -> torch.Tensor:
    """Several linear layers of one input in one product: (B,N,D) -> (B,N,len(layers) D)."""
    if not all(isinstance(layer, nn.Linear) for layer in layers):  # peft's: their `weight` leaves the adapter out
        return torch.cat([layer(hidden_states) for layer in layers], -1)
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    return linear(hidden_states, weight, bias)


class PlainJointAttention:
    """A diffusers attention processor with the results of `JointAttnProcessor2_0` (no mask, no query norm).

    hidden_states (B,N,D) and encoder_hidden_states (B,M,D) -> the same shapes."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if attention_mask is not None or attn.norm_q is not None or encoder_hidden_states is None:
            raise ValueError("PlainJointAttention supports SD3's joint blocks without query norms or masks")
        layers: Any = attn  # diffusers leaves the types of its projections open
        image = _fused_linear(hidden_states, (layers.to_q, layers.to_k, layers.to_v))
        text = _fused_linear(encoder_hidden_states, (layers.add_q_proj, layers.add_k_proj, layers.add_v_proj))
        image, text = _JointAttention.apply(image, text, attn.heads)
        image = layers.to_out[1](layers.to_out[0](image))
        return image, text if attn.context_pre_only else layers.to_add_out(text)


class FusedLinear(nn.Linear):
    """A linear layer by oneDNN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B,N,D) -> (B,N,F)"""
        return linear(input, self.weight, self.bias)


class FusedGelu(GELU):
    """diffusers' GELU layer, a linear layer and its activation, as one operator."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B,N,D) -> (B,N,F)"""
        if self.approximate != "tanh" or not isinstance(self.proj, nn.Linear):
            return super().forward(hidden_states)
        return linear(hidden_states, self.proj.weight, self.proj.bias, gelu=True)


def use_cpu_kernels(*modules: nn.Module) -> None:
    """Gives transformers and ControlNets, in place, the operators that are fast on a CPU.

    Parameters and their names stay. On another device the modules give the same results, more slowly."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, Attention):
                part.set_processor(PlainJointAttention())  # type: ignore[arg-type]
            elif type(part) is GELU:
                part.__class__ = FusedGelu
            elif type(part) is nn.Linear:
                part.__class__ = FusedLinear


def in_precision(precision: str, backbone: Any, *controlnets: Any) -> None:
    """Casts a `Backbone`'s transformer and ControlNets in place, on its device; bf16 on a CPU uses these kernels."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if dtype == torch.bfloat16 and backbone.device.type == "cpu":
        use_cpu_kernels(backbone.transformer, *controlnets)
    for network in (backbone.transformer, *controlnets):
        network.to(backbone.device, dtype)
