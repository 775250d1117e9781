"""What is special about a backbone and the ControlNets that it takes, as one record, read from their configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from refine_control.injection import is_layer_of_site, layer_of_site

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]


class Encoding(NamedTuple):
    """How a ControlNet's condition picture becomes latents."""

    shift: bool = True
    """Whether the VAE's shift is taken off them."""
    levels: tuple[float, float] = (-1.0, 1.0)
    """What the VAE is given for black and for white."""

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] in these levels."""
        black, white = self.levels
        return pixels if self.levels == (-1.0, 1.0) else black + (pixels + 1) * ((white - black) / 2)


@dataclass(frozen=True)
class Sites:
    """The blocks of one kind that take a residual, in order: Eq. 5 holds for each kind by itself."""

    blocks: str
    """The transformer's list of them, and that of a ControlNet's layers for them."""
    count: int
    stock: Callable[[int], list[int]]
    """Number of layers -> the layer that the installed diffusers injects at each site."""
    even: bool = False
    """Whether layers without a map go evenly, s L // count, even where stock's groups use all of them."""

    def layer_of_site(self, num_layers: int) -> list[int]:
        """The layer of each site for a ControlNet without a map of its own: stock's groups where they use every layer,
        so that it runs in stock, else even ones. Raises ValueError unless 1 <= num_layers <= count."""
        even, stock = layer_of_site(num_layers, self.count), self.stock(num_layers)
        return even if self.even or not is_layer_of_site(stock, num_layers, self.count) else stock

    def dead_layers(self, num_layers: int) -> list[int]:
        """The layers that stock never reads."""
        return sorted(set(range(num_layers)) - set(self.stock(num_layers)))


@dataclass(frozen=True)
class Family:
    """A backbone with one of its kinds of ControlNet, by what stock diffusers does with them."""

    name: str
    sites: tuple[Sites, ...]
    """One entry for each kind of block that takes residuals."""
    pooled: bool = False
    """Whether the ControlNet reads the prompt's pooled projection; else it is fed zeros."""
    shift: bool = True
    """Whether the VAE's shift is taken off the condition's latents. Stock ties it to `pooled`."""
    own_positions: bool = True
    """Whether the ControlNet has a table of positions; else it reads the transformer's."""
    text: bool = True
    """Whether the ControlNet reads the prompt's embeddings, and so has a context embedder and two streams."""
    dual_attention_layers: tuple[int, ...] = ()
    """The transformer's blocks with a second attention of the image; a student's follow its source layers."""
    qk_norm: str | None = None
    guidance: bool = False
    """Whether the transformer reads the guidance scale as a number."""
    conditioning_scale: float = 1.0
    """That its publishers advise."""

    def layer_of_site(self, counts: Sequence[int], stock: bool = False) -> list[int]:
        """The layer of each site for a ControlNet without a map of its own, by its number of layers of each kind.

        Sites and layers are counted through all kinds; a kind without layers has no sites. `stock`: as the installed
        diffusers injects them, even where it leaves layers out."""
        layers, first = list[int](), 0
        for sites, count in zip(self.sites, counts, strict=True):
            of_kind = (sites.stock(count) if stock else sites.layer_of_site(count)) if count else []
            layers += [first + layer for layer in of_kind]
            first += count
        return layers

    def is_layer_of_site(self, layers: object, counts: Sequence[int]) -> bool:
        """Whether a value is such a map: contiguous groups within each kind, and every layer is used."""
        if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
            return False
        first = 0
        for sites, count in zip(self.sites, counts, strict=True):
            of_kind, layers = layers[: sites.count * bool(count)], layers[sites.count * bool(count) :]
            if count and not is_layer_of_site([layer - first for layer in of_kind], count, sites.count):
                return False
            first += count
        return not layers
