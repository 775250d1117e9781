"""Linear layers by oneDNN, with GELU inside the product: what torch does not choose by itself on a CPU.

torch's own tanh GELU takes four times as long on a CPU as the product before it; oneDNN computes it on the result
while that is still in the cache. And torch gives fp32 products to MKL, which on an AMD processor reaches 40 % of
oneDNN's speed. Measure with `refine-control bench step`.
"""

# B batch, N tokens, D width, F width of the result

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False) -> Any:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")


def _computes(x: torch.Tensor) -> bool:
    """Has this torch oneDNN (x86 builds have), and this processor what it needs for the type of `x`?"""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Linear(torch.autograd.Function):
    """x W' + b, or its tanh GELU, whose backward makes the sum again rather than keep it.

    In bf16 that backward takes the derivative of the erf form, three times faster: the two differ by 9e-4 at most,
    half of what bf16 can tell apart just below 1."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.gelu = gelu
        return _product(x, weight, bias, gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad, wanted, by_mkl = grads[0], ctx.needs_input_grad, x.dtype == torch.float32
        if ctx.gelu:
            form = "tanh" if by_mkl else "none"
            grad = torch.ops.aten.gelu_backward(grad, _product(x, weight, bias), approximate=form)
        grad_x = grad_weight = None
        rows = grad.flatten(0, -2)
        if wanted[0]:
            grad_x = _product(grad, weight.T) if by_mkl else grad @ weight
        if wanted[1]:
            columns = x.flatten(0, -2).T
            grad_weight = _product(rows.T, columns) if by_mkl else rows.T @ columns.T
        return grad_x, grad_weight, rows.sum(0) if wanted[2] else None, None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False) -> torch.Tensor:
    """x W' + b, then tanh GELU if wanted: (B,N,D) -> (B,N,F). By oneDNN where there is one, else by torch."""
    if _computes(x):
        return _Linear.apply(x, weight, bias, gelu)
    out = functional.linear(x, weight, bias)
    return functional.gelu(out, approximate="tanh") if gelu else out
