"""The models that visitors choose between, and what a picture costs with each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from refine_control.conditions.condition import has_region
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models.backbone import Backbone
from refine_control.models.controlnet import ControlNet
from refine_control.models.loading import load_student
from refine_control.pipeline.inpainter import Inpainter, TorchPainter
from refine_control.pipeline.picture_cost import PictureCost, network_calls, picture_cost

TEACHER = "teacher"


class Offer(NamedTuple):
    """A ControlNet with its model, ready to paint."""

    inpainter: Inpainter
    backbone: Backbone
    controlnet: ControlNet

    costs: dict[int, PictureCost]
    """What was counted, by network calls."""

    def cost(self, sampler: SamplerConfig) -> PictureCost:
        """Network calls and operations of one frame with the sampler's steps and guidance."""
        calls = network_calls(sampler)
        if calls not in self.costs:
            self.costs[calls] = picture_cost(self.backbone, self.controlnet, sampler)
        return self.costs[calls]


def load_offers(model: str, teacher: str | None, students: Mapping[str, Path]) -> dict[str, Offer]:
    """Students by name, and the teacher (None: the model's own) last; all of them share the model.

    The usual cost of each is counted here, so that no visitor waits for it. Raises what
    `Inpainter.load` and `load_student` raise."""
    first = Inpainter.load(model, teacher or model)
    assert isinstance(first.painter, TorchPainter)
    backbone, offers = first.painter.backbone, dict[str, Offer]()
    for name, folder in students.items():
        around, network = load_student(backbone, folder, name)
        if not has_region(network.config):
            raise InvalidInputError(f"the student {name} is shown no mask; name one for inpainting")
        offers[name] = Offer(Inpainter(TorchPainter(around, network), model, folder), around, network, {})
    offers[TEACHER] = Offer(first, backbone, first.painter.controlnet, {})
    for offer in offers.values():
        offer.cost(offer.inpainter.sampler())
    return offers
