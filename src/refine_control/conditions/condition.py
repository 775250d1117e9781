"""Conditions: what a ControlNet sees beside the prompt, as a record for each kind, and as the channels that it reads.

A condition is a picture in latents. One with a region (inpainting) has a mask as well, read as one more channel.
Each kind is a module of this folder with a `CONDITION`; `find_condition` loads it by name.
"""

# N pictures, B batch, H W pixels, h w latents

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from refine_control import conditions
from refine_control.errors import InvalidInputError
from refine_control.models.families import extra_channels
from refine_control.records import INPAINT, Photo

if TYPE_CHECKING:  # imported where it is used: workers that prepare pictures need none
    import torch

    from refine_control.models.controlnet import ControlNet

_NO_KINDS = {"condition", "networks"}


@dataclass(frozen=True)
class Condition:
    """A kind of condition."""

    name: str
    """As recipes, manifests and the command line name it."""
    title: str
    """In a sentence: what the ControlNet is shown."""
    region: bool = False
    """Whether a mask says where to paint: w of Eq. 2 is then made of it, and the pixels in it are hidden. Without a
    region the whole picture is painted: w = J, and a sample without a target has no picture at all."""
    prepare: Callable[[np.ndarray], np.ndarray] | None = None
    """(H,W,3) uint8 of a photograph -> its condition picture (H,W,3) uint8; None: the picture must be given, or the
    condition is the photograph without its region."""
    network: Callable[[str], Callable[[np.ndarray], np.ndarray]] | None = None
    """Hub id or folder of a model -> a `prepare` by it. Raises MissingError where the model is not there."""
    photographic: bool = False
    """Whether the picture is a photograph, and resized as one (Lanczos); others are averaged (bilinear)."""
    grey: bool = False
    """Whether the picture has no colour."""

    @property
    def extra_channels(self) -> int:
        """Channels beside those of the latents."""
        return int(self.region)

    def preparation(self, model: str | None = None) -> Callable[[np.ndarray], np.ndarray] | None:
        """How a missing picture is made, by the `model` where one is named; None: it must be given.

        Raises InvalidInputError for a model where the condition takes none."""
        if model is None:
            return self.prepare
        if self.network is None:
            raise InvalidInputError(f"the condition {self.name} is not prepared by a model; leave {model!r} out")
        return self.network(model)


def condition_names() -> list[str]:
    """The kinds of this folder, inpainting first."""
    names = {module.name for module in pkgutil.iter_modules(conditions.__path__)} - _NO_KINDS
    return sorted(names, key=lambda name: (name != INPAINT, name))


@cache
def find_condition(name: str) -> Condition:
    """The record of a kind. Raises InvalidInputError for another name."""
    if name not in condition_names():
        raise InvalidInputError(f"there is no condition {name!r}; choose one of {', '.join(condition_names())}")
    return import_module(f"{__package__}.{name}").CONDITION


def own_condition(controlnet: Mapping[str, Any]) -> str | None:
    """The kind of condition that a ControlNet of this config takes; None where it does not say."""
    return controlnet.get("condition") or (INPAINT if extra_channels(controlnet) == 1 else None)


def has_region(controlnet: Mapping[str, Any]) -> bool:
    """Whether a ControlNet of this config reads a mask."""
    return bool(extra_channels(controlnet))


def check_condition(controlnet: Mapping[str, Any], condition: str, name: str | Path) -> None:
    """Raises InvalidInputError where a ControlNet of this config, called `name`, does not take a condition."""
    stated, channels = own_condition(controlnet), extra_channels(controlnet)
    if stated not in (None, condition) or channels != find_condition(condition).extra_channels:
        kind = stated or f"another condition, of {channels} channels beside the latents"
        raise InvalidInputError(
            f"the ControlNet of {name} is for {kind}, and the samples are of the condition {condition}; use those of "
            "one condition"
        )


def take_condition(controlnet: ControlNet, condition: str, name: str | Path) -> None:
    """`check_condition`; a ControlNet whose config does not say its condition, as published ones, says it from then on.

    How a condition is encoded may depend on its kind (`models.families.condition_encoding`)."""
    check_condition(controlnet.config, condition, name)
    if own_condition(controlnet.config) is None:
        controlnet.register_to_config(condition=condition)


class Shown(NamedTuple):
    """What a ControlNet is shown of N samples of one size."""

    pictures: np.ndarray
    """(N,H,W,3) uint8: condition pictures, or photographs where there is a region."""
    masks: np.ndarray | None = None
    """(N,H,W) bool, True = paint; None without a region: the whole picture."""

    def take(self, rows: slice) -> Shown:
        """Some of the samples."""
        return Shown(self.pictures[rows], None if self.masks is None else self.masks[rows])

    @classmethod
    def joined(cls, parts: Sequence[Shown]) -> Shown:
        """The samples of several, of one condition and size."""
        masks = [part.masks for part in parts if part.masks is not None]
        return cls(np.concatenate([part.pictures for part in parts]), np.concatenate(masks) if masks else None)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Condition pictures (N,3,H,W) in [-1, 1], the region hidden, and masks (N,1,H,W), 1 = paint."""
        import torch

        from refine_control.pixels import from_images

        pixels = from_images(self.pictures)
        if self.masks is None:
            return pixels, None
        mask = torch.from_numpy(np.ascontiguousarray(self.masks))[:, None].float()
        return masked_pixels(pixels, mask), mask


def show(photos: Sequence[Photo]) -> Shown:
    """What a ControlNet is shown of photos of one condition and size.

    Raises InvalidInputError where some have a condition picture and others none."""
    pictures = [photo.cond for photo in photos if photo.cond is not None]
    if not pictures:
        return Shown(np.stack([p.image for p in photos]), np.stack([p.mask for p in photos]))
    if len(pictures) < len(photos):
        raise InvalidInputError("some samples have a condition picture and others none; build them in one folder")
    return Shown(np.stack(pictures))


def masked_pixels(pixel_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pixels (B,3,H,W) in [-1, 1] with the hole set to -1; mask (B,1,H,W), 1 = inpaint."""
    import torch

    return torch.where(mask > 0.5, -1.0, pixel_values)


def control_cond(cond_latents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What the ControlNet reads: condition latents (B,16,h,w), with a region (B,17,h,w) = cat(cond_latents, 1 - mask).

    mask (B,1,H,W) or (B,1,h,w), 1 = inpaint. The one place where it is inverted: the 17th channel is 1 where the
    picture is kept. It is resized to the latents by nearest neighbour, as the pipeline does."""
    import torch

    if mask is None:
        return cond_latents
    return torch.cat([cond_latents, 1 - mask_at_latents(mask, cond_latents)], dim=1)


def mask_at_latents(mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Mask (B,1,H,W) -> (B,1,h,w) in the type of `latents`, nearest neighbour, 1 = inpaint."""
    from torch import nn

    return nn.functional.interpolate(mask.to(latents.dtype), size=latents.shape[-2:])
