"""Where networks run: the best device of this machine, and how much it takes at once.

The CPU is asked for nothing here: there everything fits, and batches are what the caller says."""

# H W pixels

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from itertools import chain

import torch

USABLE = 0.9
"""Of a GPU's free memory, for weights; the rest is to work in."""
PAINTED_PIXELS = 2**22
"""Painted together on a GPU: 4 pictures of 1024 x 1024, 16 of 512 x 512; their residuals have 2.3 GB in SD3, fp32."""
ENCODED_PIXELS = 2**20
"""Through the VAE together on a GPU: SD3's works on one picture of 1024 x 1024 in about 4 GB."""


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU. Training asks accelerate, which gives each process its own."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def first_weight(network: torch.nn.Module) -> torch.Tensor:
    """The first weight that is a float, by whose type and device a network is called.

    diffusers' own `dtype` and `device` look for hooks in every module, 2 to 5 ms in the miniature: more than its text
    encoders take."""
    return next(weight for weight in network.parameters() if weight.is_floating_point())


def compute_in_type(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """States the type in which a network computes where it is not that of its parameters, which are sharded masters."""
    network.compute_type = dtype  # type: ignore[assignment]


def compute_type(network: torch.nn.Module) -> torch.dtype:
    """The type in which a network takes its inputs."""
    return getattr(network, "compute_type", None) or first_weight(network).dtype


def send(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor on a device, in a type; to a GPU through pinned memory, and cast there.

    From other memory of the host a copy begins when the GPU has done all its work, and the host waits for it."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True).to(dtype)
    return tensor.to(device, dtype)


def device_name(device: torch.device) -> str:
    """As its maker calls a GPU, else the device's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_bytes(device: torch.device) -> float:
    """Memory that a GPU has left, what torch holds in reserve included; of other devices nothing is known."""
    if device.type != "cuda":
        return math.inf
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def memory_bytes(device: torch.device) -> int:
    """The whole memory of a GPU or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def missing_bytes(device: torch.device, modules: Iterable[torch.nn.Module]) -> int:
    """What the weights of `modules` that are not there yet will take on `device`."""
    weights = (weight for module in modules for weight in chain(module.parameters(), module.buffers()))
    return sum(weight.nbytes for weight in weights if weight.device.type != device.type)


def pictures_at_once(device: torch.device, height: int, width: int, most: int, pixels: int = PAINTED_PIXELS) -> int:
    """How many pictures (H, W) of a batch of `most` go through together: all on the CPU, else as `pixels` says."""
    return most if device.type == "cpu" else max(1, min(most, pixels // (height * width)))
