"""Several processes train one student: torch's FSDP2 averages gradients, or holds a part of each parameter.

`ddp`: each process has the whole student, and the gradients of a block are averaged while the blocks before it are
still going backward. `fsdp2`: each process has its rows of every parameter, moment and mean; a block's parameters are
gathered for its pass and let go after it. Both are `fully_shard`, over a mesh of one copy for each process or of one
for all; arithmetic in the recipe's type, masters and sums of gradients in fp32.

Frozen parameters are left as they are, whole on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from refine_control.config import Engine
from refine_control.models.controlnet import layer_modules
from refine_control.models.devices import compute_in_type
from refine_control.training.optimizer import Rows, Trainable


def shard(
    parts: Mapping[str, nn.Module], trainable: Trainable, dtype: torch.dtype, engine: Engine
) -> tuple[Trainable, Callable[[bool], None]]:
    """Shares networks with `transformer_blocks` over all processes, in place.

    `parts` are networks by the prefix of their parameters' names in `trainable`, whose masters become the parameters.
    Returns what each process updates: its rows of the masters, views of the parameters; and a function that says
    whether the backward passes to come average their gradients, as that of the last micro-batch does."""
    count, device = distributed.get_world_size(), next(iter(trainable.parameters.values())).device
    shape, names = ((count, 1), ("copies", "rows")) if engine == "ddp" else ((count,), ("rows",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    with torch.no_grad():
        for name, parameter in trainable.parameters.items():
            parameter.data = trainable.masters[name].detach().to(device)
    for part in parts.values():
        frozen = {parameter for parameter in part.parameters() if not parameter.requires_grad}
        for module in (*layer_modules(part), part):
            fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=frozen)
        compute_in_type(part, dtype)
    named = {prefix + name: p for prefix, part in parts.items() for name, p in part.named_parameters()}
    shared = {name: cast(DTensor, named[name]) for name in trainable.parameters}
    rows = None if engine == "ddp" else _Sharded(shared)
    masters = {name: cast(DTensor, parameter.detach()).to_local() for name, parameter in shared.items()}

    def average(now: bool) -> None:
        for part in parts.values():
            cast(Any, part).set_requires_gradient_sync(now)

    return Trainable(cast("dict[str, nn.Parameter]", shared), masters, rows), average


class _Sharded(Rows):
    """The rows of each tensor that this process has, by the parameters' names."""

    def __init__(self, parameters: Mapping[str, DTensor]):
        self.parameters = parameters
        self.number, self.count = distributed.get_rank(), distributed.get_world_size()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        parts = whole.chunk(self.count)
        return parts[self.number] if self.number < len(parts) else whole[:0]

    def whole(self, local: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return _Gathered(self.parameters, local)


class _Gathered(Mapping[str, torch.Tensor]):
    """Whole tensors, each gathered from all processes when it is read: all of them must read the same names."""

    def __init__(self, parameters: Mapping[str, DTensor], local: Mapping[str, torch.Tensor]):
        self.parameters, self.local = parameters, local

    def __getitem__(self, name: str) -> torch.Tensor:
        like = self.parameters[name]
        local = self.local[name].to(like.device)  # a mean may be in the host's memory
        shape = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, **shape).full_tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self.local)

    def __len__(self) -> int:
        return len(self.local)
