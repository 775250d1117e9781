"""AdamW on fp32 master weights while the network computes in another type, and the EMA beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from refine_control.config import Offload, OptimizerConfig, OptimizerKind


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


LEAST_BLOCK, MOST_BLOCK = 32, 256
"""Numbers of a moment that share a scale."""


def new_moments(master: torch.Tensor, kind: OptimizerKind) -> list[torch.Tensor]:
    """Both moments of AdamW, zero: like the master, or torchao's `OptimState8bit` where its rows are whole blocks.

    Blocks that cross no row keep a checkpoint exact at any number of processes, which have rows of their own. Raises
    ModuleNotFoundError for adamw8bit without torchao."""
    block = math.gcd(math.prod(master.shape[1:]), MOST_BLOCK)
    if kind == "adamw" or master.ndim < 2 or block < LEAST_BLOCK:
        return [torch.zeros_like(master) for _ in range(2)]
    from torchao.optim.subclass_8bit import OptimState8bit

    return [OptimState8bit.zeros(master.shape, signed, block, master.device, master.dtype) for signed in (True, False)]


def _new_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    options = {"betas": config.betas, "eps": config.eps}
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True, **options)
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, lr=torch.tensor(0.0), **options)  # type: ignore[arg-type]


def _in_host_memory(tensor: Any) -> Any:
    """A copy that a GPU reads and writes without the host, which must not read it before the GPU is done."""
    if hasattr(tensor, "codes"):
        parts, more = tensor.__tensor_flatten__()
        return tensor.__tensor_unflatten__({name: _in_host_memory(getattr(tensor, name)) for name in parts}, more)
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def _bring(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host's memory on a device, after what the device does now."""
    return tensor.to(device, non_blocking=True)


class MasterWeights:
    """The fp32 masters of a module's trainable parameters, their gradients, AdamW moments and EMA.

    The module may hold the same parameters in bf16 (`compute_in`): `accumulate` adds its gradients here in fp32,
    `step` updates here and copies back. For an fp32 module the masters are its parameters.

    Args:
        trainable: the masters must be on the device of the parameters, or are copied there.
        ema_decay: 0 keeps no average; otherwise the decay, warmed up as min(decay, (1 + step) / (10 + step)).
        offload: what is in the host's memory between updates. An update brings it to the masters' device tensor by
            tensor, so the numbers are the same.
    """

    def __init__(
        self, trainable: Trainable, config: OptimizerConfig, ema_decay: float = 0.0, offload: Offload = "none"
    ):
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
        self.kind: OptimizerKind = config.kind
        self.adamw = _new_optimizer(groups, config)
        self.ema_decay, self.offload = ema_decay, offload
        copied = torch.clone if offload == "none" else _in_host_memory
        self.ema: list[torch.Tensor] = [copied(m.detach()) for m in self.masters] if ema_decay else []

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
        self._update(learning_rate)
        for master in self.masters:
            master.grad = None
        if self.copies:
            torch._foreach_copy_(self.params, self.masters)
        if self.ema:
            decay = min(self.ema_decay, (1 + step) / (10 + step))
            masters = [m.detach() for m in self.masters]
            if self.offload == "none":
                torch._foreach_lerp_(self.ema, masters, 1 - decay)
            else:
                for mean, master in zip(self.ema, masters, strict=True):
                    here = _bring(mean, master.device)
                    torch._foreach_lerp_([here], [master], 1 - decay)
                    mean.copy_(here, non_blocking=True)
        return norm

    def _update(self, learning_rate: float) -> None:
        groups, stock, stance = self.adamw.param_groups, self.kind == "adamw", nullcontext()
        for group in groups:
            group["lr"] = learning_rate if stock else group["lr"].fill_(learning_rate)
        if not stock or self.offload == "moments":
            for master in self.masters:
                if not self.adamw.state[master]:
                    self._set_moments(master, 0, new_moments(master, self.kind))
        if not stock:  # torchao compiles its update for each shape, which on a CPU takes longer than a short run
            cpu = self.masters[0].device.type == "cpu"
            stance = torch.compiler.set_stance("force_eager" if cpu else "default")
        with stance:
            if self.offload != "moments":
                self.adamw.step()
                return
            for group in groups:
                for master in group["params"]:
                    self.adamw.param_groups = [{**group, "params": [master]}]
                    self._step_alone(self.adamw.state[master], master.device)
            self.adamw.param_groups = groups

    def _step_alone(self, state: Any, device: torch.device) -> None:
        """The update of the one tensor in the optimizer's groups, whose moments are in the host's memory."""
        waiting = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        state.update({name: _bring(moment, device) for name, moment in waiting.items()})
        self.adamw.step()
        for name, moment in waiting.items():
            moment.copy_(state[name], non_blocking=True)
            state[name] = moment

    def settle(self) -> None:
        """Waits until a GPU has written what the host is to read."""
        if self.offload != "none" and self.masters[0].is_cuda:
            torch.cuda.synchronize(self.masters[0].device)

    def _set_moments(self, master: torch.Tensor, step: int, moments: Sequence[torch.Tensor]) -> None:
        device = master.device if self.kind == "adamw" else "cpu"
        if self.offload == "moments":
            moments = [_in_host_memory(moment) for moment in moments]
        values = torch.tensor(float(step), device=device), *moments
        self.adamw.state[master] = dict(zip(("step", "exp_avg", "exp_avg_sq"), values, strict=True))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint needs, by name: `weights/`, `ema/`, `moment1/`, `moment2/`; of moments in 8 bits the
        codes, and `scale1/`, `scale2/`."""
        self.settle()
        out = {}
        for index, (name, master) in enumerate(zip(self.named, self.masters, strict=True)):
            out[f"weights/{name}"] = master.detach()
            if self.ema:
                out[f"ema/{name}"] = self.ema[index]
            state: Any = self.adamw.state.get(master)
            for number, moment in enumerate((state["exp_avg"], state["exp_avg_sq"]) if state else (), 1):
                if (codes := getattr(moment, "codes", None)) is None:
                    out[f"moment{number}/{name}"] = moment
                else:
                    scales = moment.scale.view(len(codes), -1)
                    out |= {f"moment{number}/{name}": codes, f"scale{number}/{name}": scales}
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
                moments: list[Any] = new_moments(master, self.kind)
                for number, moment in enumerate(moments, 1):
                    values = rows(f"moment{number}/{name}")
                    if hasattr(moment, "codes"):
                        moment.codes.copy_(values)
                        moment.scale.copy_(rows(f"scale{number}/{name}").flatten())
                    else:
                        moment.copy_(values)
                self._set_moments(master, step, moments)
        if self.copies:
            torch._foreach_copy_(self.params, self.masters)

    def ema_state(self) -> Mapping[str, torch.Tensor]:
        """The averaged weights by parameter name (the plain ones without EMA), whole.

        A GPU may still write those in the host's memory: it reads them in order, the host after `settle`."""
        local = dict(zip(self.named, self.ema or [m.detach() for m in self.masters], strict=True))
        return local if self.rows is None else self.rows.whole(local)
