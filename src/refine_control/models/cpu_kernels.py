"""What makes SD3's blocks fast on a CPU, results unchanged: plain attention, and oneDNN's linear layers and GELU."""

# B batch, N tokens, D width, F width of the result

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from torch import nn

from refine_control.models.attention import use_plain_attention
from refine_control.models.backbone import Backbone
from refine_control.models.onednn import linear


class FusedLinear(nn.Linear):
    """A linear layer by oneDNN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B,N,D) -> (B,N,F)"""
        return linear(input, self.weight, self.bias)


class FusedGelu(GELU):
    """diffusers' GELU layer, a linear layer and its activation, as one operator."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B,N,D) -> (B,N,F)"""
        if self.approximate != "tanh":
            return super().forward(hidden_states)
        return linear(hidden_states, self.proj.weight, self.proj.bias, gelu=True)


def use_cpu_kernels(*modules: nn.Module) -> None:
    """Gives transformers and ControlNets, in place, the operators that are fast on a CPU.

    Parameters and their names stay. On another device the modules compute right, and slower than they could."""
    use_plain_attention(*modules)
    for module in modules:
        for part in module.modules():
            if type(part) is GELU:
                part.__class__ = FusedGelu
            elif type(part) is nn.Linear:
                part.__class__ = FusedLinear


def in_precision(precision: str, backbone: Backbone, *controlnets: Any) -> None:
    """Casts transformer and ControlNets in place, all where the backbone is; bf16 on a CPU gets its own kernels."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if dtype == torch.bfloat16 and backbone.device.type == "cpu":
        use_cpu_kernels(backbone.transformer, *controlnets)
    for network in (backbone.transformer, *controlnets):
        network.to(backbone.device, dtype)
