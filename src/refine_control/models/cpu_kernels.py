"""What makes SD3's blocks fast on a CPU, results unchanged: plain attention, and oneDNN's linear layers and GELU."""

# B batch, N tokens, D width, F width of the result

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from torch import nn

from refine_control.models.attention import use_plain_attention
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
