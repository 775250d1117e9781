"""Which ControlNet layer feeds which transformer block, for any number of layers.

The transformer has N blocks; the last is `context_pre_only` and takes no residual, so there are
N - 1 injection sites. One map explains the one-to-many injection and the many-to-one alignment:
site s <- layer s * L // (N - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

Injection = Literal["exact", "diffusers"]
T = TypeVar("T")


def _check(num_layers: int, num_sites: int) -> None:
    if not 1 <= num_layers <= num_sites:
        raise ValueError(f"a ControlNet has 1 to {num_sites} layers for {num_sites} injection sites, not {num_layers}")


def layer_of_site(num_layers: int, num_sites: int = 23) -> list[int]:
    """Site s -> layer s * L // num_sites; every layer is used. L = 12: s // 2, layer 11 feeds site 22 alone."""
    _check(num_layers, num_sites)
    return [site * num_layers // num_sites for site in range(num_sites)]


def groups(num_layers: int, num_sites: int = 23) -> list[list[int]]:
    """G_j of Eq. 5: the sites of each layer, in order."""
    sites = layer_of_site(num_layers, num_sites)
    return [[s for s, layer in enumerate(sites) if layer == j] for j in range(num_layers)]


def diffusers_layer_of_block(num_layers: int, num_blocks: int = 24) -> list[int]:
    """What diffusers >= 0.32 injects after block i: layer int(i / (N / L)). Exact for 23 layers it is not."""
    return [int(block / (num_blocks / num_layers)) for block in range(num_blocks)]


def stock_injects_exactly(num_layers: int, num_blocks: int = 24) -> bool:
    """Does diffusers' own rule equal ours? True for 1, 2, 3, 4, 6, 8 and 12 layers of 24 blocks."""
    return diffusers_layer_of_block(num_layers, num_blocks)[: num_blocks - 1] == layer_of_site(
        num_layers, num_blocks - 1
    )


def expand_residuals(residuals: Sequence[T], num_blocks: int = 24, injection: Injection = "exact") -> list[T]:
    """L residuals -> a list of N, one for each block, which every diffusers version injects one-to-one.

    The last entry is never read; it repeats the last layer's. `diffusers` reproduces the upstream shift.
    Raises ValueError unless 1 <= L <= N - 1."""
    _check(len(residuals), num_blocks - 1)
    if injection == "diffusers":
        return [residuals[layer] for layer in diffusers_layer_of_block(len(residuals), num_blocks)]
    sites = layer_of_site(len(residuals), num_blocks - 1)
    return [residuals[layer] for layer in [*sites, sites[-1]]]
