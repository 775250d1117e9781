"""AdamW on fp32 master weights while the network computes in another type, and the EMA beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

_MASTER = "fp32"


def compute_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts a module, in place; its trainable fp32 parameters leave their values to `MasterWeights`, unrounded."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float32 != dtype:
            setattr(parameter, _MASTER, parameter.detach().clone())
    return module.to(dtype)


def _master(parameter: nn.Parameter) -> torch.Tensor:
    kept = vars(parameter).pop(_MASTER, None)
    return parameter.detach().float().clone() if kept is None else kept.to(parameter.device)


class MasterWeights:
    """fp32 copies of a module's trainable parameters, their gradients, AdamW moments and EMA.

    The module may hold the same parameters in bf16 (`compute_in`): `accumulate` adds its gradients here in fp32,
    `step` updates here and copies back. For an fp32 module the masters are its own parameters.

    Args:
        ema_decay: 0 keeps no average; otherwise the decay, warmed up as min(decay, (1 + step) / (10 + step)).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float = 0.0,
    ):
        self.named = {name: p for name, p in named_parameters if p.requires_grad}
        self.params: list[torch.Tensor] = list(self.named.values())
        same = all(p.dtype == torch.float32 for p in self.params)
        self.masters: list[torch.Tensor] = self.params if same else [_master(p) for p in self.named.values()]
        decayed = [m for m in self.masters if m.ndim > 1]
        flat = [m for m in self.masters if m.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
        self.ema_decay = ema_decay
        self.ema = [m.detach().clone() for m in self.masters] if ema_decay else []

    def accumulate(self) -> None:
        """Adds the module's gradients to the masters' in fp32 and clears them."""
        if self.masters is self.params:
            return
        for parameter, master in zip(self.params, self.masters, strict=True):
            if parameter.grad is not None:
                grad = parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    @property
    def grads(self) -> list[torch.Tensor]:
        return [m.grad for m in self.masters if m.grad is not None]

    @torch.no_grad()
    def step(self, learning_rate: float, step: int, max_grad_norm: float = math.inf) -> torch.Tensor:
        """One AdamW update (number `step` from 0) and EMA; returns the gradient norm before clipping."""
        norm = nn.utils.get_total_norm(self.grads)
        if math.isfinite(max_grad_norm):
            torch._foreach_mul_(self.grads, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        for master in self.masters:
            master.grad = None
        if self.masters is not self.params:
            torch._foreach_copy_(self.params, self.masters)
        if self.ema:
            decay = min(self.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.ema, [m.detach() for m in self.masters], 1 - decay)
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint needs, by name: `weights/`, `ema/`, `moment1/`, `moment2/`."""
        out = {}
        for index, (name, master) in enumerate(zip(self.named, self.masters, strict=True)):
            out[f"weights/{name}"] = master.detach()
            if self.ema:
                out[f"ema/{name}"] = self.ema[index]
            state = self.adamw.state.get(master)
            if state:
                out[f"moment1/{name}"], out[f"moment2/{name}"] = state["exp_avg"], state["exp_avg_sq"]
        return out

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Restores what `tensors` gave after `step` updates. Raises KeyError when one is missing."""
        for index, (name, master) in enumerate(zip(self.named, self.masters, strict=True)):
            master.copy_(tensors[f"weights/{name}"])
            if self.ema:
                self.ema[index].copy_(tensors[f"ema/{name}"])
            if f"moment1/{name}" in tensors:
                self.adamw.state[master] = {
                    "step": torch.tensor(float(step), device=master.device),
                    "exp_avg": tensors[f"moment1/{name}"].to(master.device).clone(),
                    "exp_avg_sq": tensors[f"moment2/{name}"].to(master.device).clone(),
                }
        if self.masters is not self.params:
            torch._foreach_copy_(self.params, self.masters)

    def ema_state(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name (the plain ones without EMA)."""
        return dict(zip(self.named, self.ema or [m.detach() for m in self.masters], strict=True))
