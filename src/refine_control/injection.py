"""Which ControlNet layer feeds which transformer block, for any number of layers.

The transformer has N blocks; the last is `context_pre_only` and takes no residual, so there are
N - 1 injection sites. One map explains the one-to-many injection and the many-to-one alignment:
site s <- layer s * L // (N - 1). A student may have a map of its own, by the relevance of its sites
(`relevant_layer_of_site`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

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
    return sites_of_layer(layer_of_site(num_layers, num_sites))


def sites_of_layer(layers: Sequence[int]) -> list[list[int]]:
    """The groups of a map from sites to layers."""
    return [[s for s, layer in enumerate(layers) if layer == j] for j in range(max(layers) + 1)]


def is_layer_of_site(layers: object, num_layers: int, num_sites: int) -> bool:
    """Whether a value is a map of contiguous groups: a layer for each site in order, and every layer is used."""
    if not isinstance(layers, list) or len(layers) != num_sites or any(type(layer) is not int for layer in layers):
        return False
    return layers == sorted(layers) and set(layers) == set(range(num_layers))


def relevant_layer_of_site(relevance: np.ndarray, products: np.ndarray, num_layers: int) -> list[int]:
    """The map of contiguous groups that minimises sum_j sum_{s in G_j} r_s E|f^s - mean of G_j|^2 / E|f^s|^2.

    The mean is what Eq. 5 teaches layer j. Relevance r (R,), what dropping the residual of a site costs, over its power
    turns an error of the residual into one of the velocity. `products` (R, R) are E f^s f^t of the teacher's
    residuals. Exact, by dynamic programming over the end of each group; of equal minima the most even groups.
    Raises ValueError unless 1 <= `num_layers` <= R."""
    num_sites = len(relevance)
    _check(num_layers, num_sites)
    power = np.diag(products)
    weights = np.divide(relevance, power, out=np.zeros(num_sites), where=power > 0)
    scale = float(relevance.sum()) or 1.0

    def cost(first: int, end: int) -> float:
        part = products[first:end, first:end]
        errors = np.diag(part) - 2 * part.mean(1) + part.mean()
        return float(weights[first:end] @ errors) / scale + 1e-9 * (end - first) ** 2

    costs = {(a, b): cost(a, b) for a in range(num_sites) for b in range(a + 1, num_sites + 1)}
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # by the end: the least cost, and sizes of the groups
    for _ in range(num_layers):
        best = {
            end: min((least + costs[first, end], [*sizes, end - first]) for first, (least, sizes) in before.items())
            for end in range(1, num_sites + 1)
            if (before := {first: value for first, value in best.items() if first < end})
        }
    return [layer for layer, size in enumerate(best[num_sites][1]) for _ in range(size)]


def diffusers_layer_of_block(num_layers: int, num_blocks: int = 24) -> list[int]:
    """What diffusers >= 0.32 injects after block i: layer int(i / (N / L)). Exact for 23 layers it is not."""
    return [int(block / (num_blocks / num_layers)) for block in range(num_blocks)]


def flux_layer_of_block(num_layers: int, num_blocks: int, repeat: bool = False) -> list[int]:
    """What diffusers injects after double or single block i of FLUX: layer i // ceil(N / L), whatever L is.

    `repeat` is its rule for double blocks where the ControlNet embeds the picture itself (XLabs): layer i % L."""
    interval = -(-num_blocks // num_layers)
    return [block % num_layers if repeat else block // interval for block in range(num_blocks)]


def stock_injects_exactly(num_layers: int, num_blocks: int = 24, layers: Sequence[int] | None = None) -> bool:
    """Does diffusers' own rule equal ours? True for 1, 2, 3, 4, 6, 8 and 12 layers of 24 blocks.

    `layers` is the map of a student that has its own."""
    ours = layer_of_site(num_layers, num_blocks - 1) if layers is None else list(layers)
    return diffusers_layer_of_block(num_layers, num_blocks)[: num_blocks - 1] == ours


def expand_residuals(
    residuals: Sequence[T], num_blocks: int = 24, injection: Injection | Sequence[int] = "exact"
) -> list[T]:
    """L residuals -> a list of N, one for each block, which every diffusers version injects one-to-one.

    The last entry is never read; it repeats the last layer's. `diffusers` reproduces the upstream shift; a sequence is
    a map of its own, the layer of each site.
    Raises ValueError unless 1 <= L <= N - 1."""
    _check(len(residuals), num_blocks - 1)
    if injection == "diffusers":
        return [residuals[layer] for layer in diffusers_layer_of_block(len(residuals), num_blocks)]
    sites = layer_of_site(len(residuals), num_blocks - 1) if injection == "exact" else injection
    return [residuals[layer] for layer in [*sites, sites[-1]]]
