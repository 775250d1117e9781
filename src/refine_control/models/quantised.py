"""Linear layers of frozen networks in 8 bits: int8 or fp8 weights with one scale for each row.

Gradients pass through them to their inputs. torchao's layers of this kind keep a whole weight in the type of the
arithmetic for the backward pass, one for each layer, which is what they should save; these keep the codes alone.
"""

# D width of the input, F of the result

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from refine_control.errors import InvalidInputError

_TYPES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""By kind, the type of the codes and its largest number."""


def quantise_rows(x: torch.Tensor, kind: Literal["int8", "fp8"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes like x (..., D) and scales (..., 1) in fp32, whose product is x up to rounding."""
    dtype, most = _TYPES[kind]
    scale = (x.float().abs().amax(-1, keepdim=True) / most).clamp(min=1e-12)
    codes = x.float() / scale
    return (codes.round() if kind == "int8" else codes.clamp(-most, most)).to(dtype), scale


class _Product(torch.autograd.Function):
    """x W' + b for a weight in 8 bits; the backward pass unpacks it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.save_for_backward(codes, scale)
        if codes.dtype == torch.int8:
            return functional.linear(x, _unpacked(codes, scale, x.dtype), bias)
        rows, row_scale = quantise_rows(x.flatten(0, -2), "fp8")
        out = torch._scaled_mm(rows, codes.T, row_scale, scale.T, bias, out_dtype=x.dtype)
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        codes, scale = ctx.saved_tensors
        return grads[0] @ _unpacked(codes, scale, grads[0].dtype), None, None, None


def _unpacked(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.to(dtype) * scale.to(dtype)


class FrozenLinear(nn.Module):
    """A linear layer that is not trained, its weight in 8 bits and its bias as it was.

    A cast moves it and leaves its codes and scales in their types."""

    def __init__(self, layer: nn.Linear, kind: Literal["int8", "fp8"]):
        super().__init__()
        codes, scale = quantise_rows(layer.weight.detach(), kind)
        self.codes: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """(F,D) in fp32."""
        return _unpacked(self.codes, self.scale, torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B,N,D) -> (B,N,F), in the type of x."""
        return _Product.apply(x, self.codes, self.scale, self.bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FrozenLinear:
        before = self.codes, self.scale
        super()._apply(fn, recurse)
        self.codes, self.scale = (
            each.to(now.device) for each, now in zip(before, (self.codes, self.scale), strict=True)
        )
        return self


def refuse_fp8(device: torch.device) -> None:
    """Raises InvalidInputError for a GPU without products in fp8; a CPU computes them slowly."""
    known = device.type in ("cpu", "meta")
    if not known and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise InvalidInputError(
            "training.frozen fp8 needs a GPU of capability 8.9 or later (Ada, Hopper); set it to int8"
        )


@torch.no_grad()
def quantise(network: nn.Module, kind: Literal["int8", "fp8"]) -> None:
    """Replaces the linear layers of a frozen network's blocks, in place. Embeddings and outputs stay as they are."""
    blocks: Any = network.transformer_blocks
    for module in list(blocks.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, FrozenLinear(layer, kind))
