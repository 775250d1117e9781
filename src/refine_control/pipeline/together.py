"""ControlNets without a region that paint together, alone or beside an inpainting one: which can, what each is shown of
a picture, and by which scale."""

# H W pixels of the photograph, h w pixels of a frame as the model paints it

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from refine_control.conditions.condition import (
    Condition,
    Shown,
    find_condition,
    has_region,
    own_condition,
    take_condition,
)
from refine_control.errors import InvalidInputError
from refine_control.models.card import choose_sampler
from refine_control.models.families.sd35_large import is_single_stream
from refine_control.pipeline.framing import Frame, cut_picture

if TYPE_CHECKING:
    from refine_control.models.backbone import Backbone
    from refine_control.models.controlnet import Control, ControlNet

logger = logging.getLogger(__name__)
_COLOUR = 16
"""Mean difference between channels of a picture in colour; that of a grey one is noise of its JPEG."""
_MAP = "depth"
"""The kind by whose rules a picture is read for a ControlNet that does not say its kind."""


class Reading(NamedTuple):
    """How what a ControlNet is shown is made of a picture."""

    kind: str | None
    """Its condition; None where its config does not say: the picture is given, as a map is."""
    given: bool
    """Whether the picture is the condition picture; else it is a photograph, of which that is made."""
    preparer: str | None
    """The model that makes it, where one does."""

    @property
    def record(self) -> Condition:
        """The condition by whose rules the picture is read."""
        return find_condition(self.kind or _MAP)

    @property
    def ground(self) -> str:
        """What lies under a transparent picture."""
        return "black" if self.given and not self.record.photographic else "white"

    def check(self, cond: np.ndarray, picture: object) -> None:
        """Raises InvalidInputError for a given condition picture (H,W,3) uint8, in colour where it should be grey."""
        if self.given and self.kind and self.record.grey and np.ptp(cond, axis=2).mean() > _COLOUR:
            raise InvalidInputError(
                f"{picture} is in colour, and the condition {self.kind} is {self.record.title}, in grey; give such a "
                "picture"
            )

    def of_frame(self, picture: np.ndarray, frame: Frame, multiple: int) -> Shown:
        """(H,W,3) uint8 of a photograph's size -> what the ControlNet is shown of a frame: one picture (h,w,3) uint8.

        A condition picture is made of the frame as the model paints it, as in training of the sample."""
        smooth = self.record.photographic or not self.given
        how = Image.Resampling.LANCZOS if smooth else Image.Resampling.BILINEAR
        part = cut_picture(picture, frame, multiple, how)
        prepare = None if self.given else self.record.preparation(self.preparer)
        return Shown((part if prepare is None else prepare(part))[None])


class Beside(NamedTuple):
    """A ControlNet that paints beside an inpainting one, with its picture."""

    controlnet: ControlNet
    scale: float
    reading: Reading
    picture: np.ndarray
    """(H,W,3) uint8, of the photograph's size."""

    def of_frame(self, frame: Frame, multiple: int) -> Control[Shown]:
        """What it is shown of a frame."""
        from refine_control.models.controlnet import Control

        return Control(self.controlnet, self.reading.of_frame(self.picture, frame, multiple), self.scale)


def name_conditions(networks: Sequence[ControlNet], names: Sequence[str | Path], conditions: Sequence[str]) -> None:
    """Notes the kind of each ControlNet, of which configs of published ones say nothing: `conditions` are none, or one
    for each. Raises InvalidInputError for another kind than a config says."""
    check_conditions(conditions, len(networks))
    for network, name, condition in zip(networks, names, conditions, strict=bool(conditions)):
        take_condition(network, condition, name)
    for network, name in zip(networks, names, strict=True):
        if own_condition(network.config) is None and is_single_stream(network.config):
            logger.warning(
                "the config of %s does not say its condition; if it was trained on canny edges, name it with "
                "`--condition canny`, for it reads their pixels in levels of their own",
                name,
            )


def check_conditions(conditions: Sequence[str], count: int) -> None:
    """Raises InvalidInputError unless there are no kinds or one for each of `count` ControlNets, all of them known."""
    if len(conditions) not in (0, count):
        raise InvalidInputError(f"{len(conditions)} conditions for {count} ControlNets; give one for each")
    for condition in conditions:
        find_condition(condition)


def readings(networks: Sequence[ControlNet], prepared: bool, preparer: str | None) -> list[Reading]:
    """How each ControlNet's picture is read: as it is where it is `prepared` or where nothing makes the condition.

    Raises InvalidInputError for a model `preparer` that has nothing to make."""
    kinds = [own_condition(network.config) for network in networks]
    if preparer and (prepared or not any(kind and find_condition(kind).network for kind in kinds)):
        raise InvalidInputError(f"no condition picture is to be made by the model {preparer}; leave it out")
    chosen = list[Reading]()
    for kind in kinds:
        record = find_condition(kind or _MAP)
        model = preparer if record.network else None
        chosen.append(Reading(kind, prepared or kind is None or not (record.prepare or model), model))
    return chosen


def refuse_region(networks: Sequence[ControlNet], names: Sequence[str | Path]) -> None:
    """Raises InvalidInputError where one of the ControlNets called `names` reads a mask."""
    for name, network in zip(names, networks, strict=True):
        if has_region(network.config):
            raise InvalidInputError(
                f"the ControlNet of {name} reads a mask; use it by `refine-control inpaint`, once and as --controlnet, "
                "or name one that is shown no region"
            )


def refuse_own_transformer(names: Sequence[str | Path | None]) -> None:
    """Raises InvalidInputError where one of several ControlNets has a transformer of its own; None is the model's."""
    from refine_control.models.loading import resolve
    from refine_control.models.own_transformer import own_folder

    joint = [name for name in names if name is not None and own_folder(resolve(name))]
    if len(names) > 1 and joint:
        raise InvalidInputError(f"{joint[0]} was trained together with a transformer; use it without other ControlNets")


def load_beside(backbone: Backbone, names: Sequence[str | Path]) -> list[ControlNet]:
    """ControlNets that are shown no region, for a model that is loaded with another. Raises InvalidInputError for those
    that do not fit it."""
    from refine_control.models.loading import load_student

    networks = [load_student(backbone, name)[1] for name in names]
    refuse_region(networks, names)
    return networks


def check_scales(given: Sequence[float], count: int) -> None:
    """Raises InvalidInputError unless there is no scale, one for all or one for each of `count` ControlNets."""
    if len(given) not in (0, 1, count):
        raise InvalidInputError(f"{len(given)} conditioning scales for {count} ControlNets; give one for each")


def conditioning_scales(
    model: str, names: Sequence[str | Path | None], given: Sequence[float], first: float
) -> list[float]:
    """The scale of each ControlNet: those `given`, else `first` and what the others' cards say.

    Raises what `check_scales` raises."""
    check_scales(given, len(names))
    if given:
        return list(given) * (len(names) if len(given) == 1 else 1)
    return [first, *(choose_sampler(model, name, {}).conditioning_scale for name in names[1:])]
