"""AdamW on fp32 master weights while the network computes in another type, and the EMA beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from refine_control.config import OptimizerConfig


class Rows(Protocol):
    """The rows of each tensor that this process has, where each process has its own."""

    number: int
    """Of this process, from 0."""
    count: int
    """Of the processes."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a scalar over all processes."""
        ...

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's rows of a tensor."""
        ...

    def whole(self, local: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The whole tensors of which all processes have rows, by name. All of them must read the same names."""
        ...


class Trainable(NamedTuple):
    """What is trained: a network's parameters by name, and the fp32 tensors that are updated in their place."""

    parameters: dict[str, nn.Parameter]
    masters: Mapping[str, torch.Tensor]
    """By the same names; the parameters themselves where the network computes in fp32."""
    rows: Rows | None = None
    """Which rows of each parameter the masters are; None: they are whole."""

    @classmethod
    def of(cls, named_parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype | None = None) -> Trainable:
        """The parameters that get a gradient; with new masters where `dtype`, by default theirs, is not fp32."""
        parameters = {name: p for name, p in named_parameters if p.requires_grad}
        same = all((dtype or p.dtype) == torch.float32 for p in parameters.values())
        copies = {} if same else {name: p.detach().float().clone() for name, p in parameters.items()}
        return cls(parameters, copies or parameters)

    @classmethod
    def joined(cls, **parts: Trainable) -> Trainable:
        """Several networks' as one; each name begins with that of its part."""
        parameters = {f"{part}.{n}": p for part, each in parts.items() for n, p in each.parameters.items()}
        masters = {f"{part}.{n}": m for part, each in parts.items() for n, m in each.masters.items()}
        return cls(parameters, masters)


def compute_in(
    module: nn.Module, dtype: torch.dtype, parameters: Mapping[str, nn.Parameter] | None = None
) -> Trainable:
    """Casts a module in place; the values of its trainable parameters (all by default) stay unrounded as masters."""
    trainable = Trainable.of((parameters or dict(module.named_parameters())).items(), dtype)
    module.to(dtype)
    return trainable


class MasterWeights:
    """The fp32 masters of a module's trainable parameters, their gradients, AdamW moments and EMA.

    The module may hold the same parameters in bf16 (`compute_in`): `accumulate` adds its gradients here in fp32,
    `step` updates here and copies back. For an fp32 module the masters are its parameters.

    Args:
        trainable: the masters must be on the device of the parameters, or are copied there.
        ema_decay: 0 keeps no average; otherwise the decay, warmed up as min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, trainable: Trainable, config: OptimizerConfig, ema_decay: float = 0.0):
        self.named = trainable.parameters
        self.params: list[torch.Tensor] = list(self.named.values())
        self.rows = trainable.rows
        same = all(trainable.masters[name] is p for name, p in self.named.items())
        masters = (trainable.masters[name].to(p.device) for name, p in self.named.items())
        self.masters: list[torch.Tensor] = self.params if same else list(masters)
        self.copies = not same and not any(isinstance(p, DTensor) for p in self.params)
        """Whether the parameters are copies of the masters; of those that are sharded, masters are views."""
        decayed = [m for m in self.masters if m.ndim > 1]
        flat = [m for m in self.masters if m.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        self.ema_decay = ema_decay
        self.ema = [m.detach().clone() for m in self.masters] if ema_decay else []

    def accumulate(self) -> None:
        """Adds the module's gradients to the masters' in fp32 and clears them."""
        if self.masters is self.params:
            return
        for parameter, master in zip(self.params, self.masters, strict=True):
            if parameter.grad is not None:
                grad = parameter.grad
                grad = (grad.to_local() if isinstance(grad, DTensor) else grad).float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    @property
    def grads(self) -> list[torch.Tensor]:
        return [m.grad for m in self.masters if m.grad is not None]

    @torch.no_grad()
    def step(self, learning_rate: float, step: int, max_grad_norm: float = math.inf) -> torch.Tensor:
        """One AdamW update (number `step` from 0) and EMA; returns the gradient norm before clipping."""
        norm = nn.utils.get_total_norm(self.grads)
        if self.rows is not None:
            norm = self.rows.sum(norm.square()).sqrt()
        if math.isfinite(max_grad_norm):
            torch._foreach_mul_(self.grads, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        for master in self.masters:
            master.grad = None
        if self.copies:
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
    def load(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Restores what `tensors` gave after `step` updates, whole. Raises KeyError when one is missing."""

        def rows(name: str) -> torch.Tensor:
            return tensors[name] if self.rows is None else self.rows.take(tensors[name])

        for index, (name, master) in enumerate(zip(self.named, self.masters, strict=True)):
            master.copy_(rows(f"weights/{name}"))
            if self.ema:
                self.ema[index].copy_(rows(f"ema/{name}"))
            if f"moment1/{name}" in tensors:
                self.adamw.state[master] = {
                    "step": torch.tensor(float(step), device=master.device),
                    "exp_avg": rows(f"moment1/{name}").to(master.device).clone(),
                    "exp_avg_sq": rows(f"moment2/{name}").to(master.device).clone(),
                }
        if self.copies:
            torch._foreach_copy_(self.params, self.masters)

    def ema_state(self) -> Mapping[str, torch.Tensor]:
        """The averaged weights by parameter name (the plain ones without EMA), whole."""
        local = dict(zip(self.named, self.ema or [m.detach() for m in self.masters], strict=True))
        return local if self.rows is None else self.rows.whole(local)
