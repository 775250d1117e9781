"""Training of the classifier that measures obedience, on renders degraded like generated images."""

# B batch; crops are 32 x 32

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from refine_control.miniature import scenes
from refine_control.miniature.obedience import Classifier, region_crops
from refine_control.pixels import from_images
from refine_control.randomness import derive_seed
from refine_control.training.loop import Batches, Draw, Objective
from refine_control.training.optimizer import Trainable


class OracleLosses(NamedTuple):
    """Cross-entropies of the classifier."""

    loss: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor


class Crops(NamedTuple):
    """Regions of scenes: pixels (B,3,32,32) in [-1, 1], colour and shape (B,) indices."""

    pixels: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor


def scene_crops(seed: int, start: int, count: int) -> Crops:
    """The regions of scenes as the classifier reads them."""
    rendered = scenes.render(seed, start, count)
    pixels = from_images(rendered.images)
    crops = region_crops(pixels, rendered.masks)
    return Crops(crops, torch.from_numpy(rendered.colour), torch.from_numpy(rendered.shape))


class CropBatches(Batches):
    """New scenes at every step."""

    def batch(self, draw: Draw) -> Crops:
        """One region for each slot."""
        start = draw.step * 100_000 + draw.slots[0]
        return scene_crops(derive_seed(draw.seed, draw.stage), start, len(draw.slots))


def _blurred(pixels: torch.Tensor) -> torch.Tensor:
    return functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)


def degraded(pixels: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Blurs half of the crops once or twice; adds noise up to 0.15 and a colour cast of 0.1 to all (range 2)."""
    pick = draw.uniforms("blur")[:, None, None, None]
    once = _blurred(pixels)
    pixels = torch.where(pick < 0.3, once, torch.where(pick < 0.5, _blurred(once), pixels))
    strength = 0.15 * draw.uniforms("strength")[:, None, None, None]
    cast = 0.1 * draw.normals("cast", 3, 1, 1)
    return (pixels + strength * draw.normals("grain", *pixels.shape[1:]) + cast).clamp(-1, 1)


class OracleObjective(Objective):
    """Cross-entropy of colour and shape."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier

    def trainable(self) -> Trainable:
        """All of the classifier."""
        return Trainable.of(self.classifier.named_parameters())

    def losses(self, batch: Crops, draw: Draw, statistics: torch.Tensor | None = None) -> OracleLosses:
        """Their sum, and both of them."""
        colour, shape = self.classifier(degraded(batch.pixels, draw))
        a = functional.cross_entropy(colour, batch.colour)
        b = functional.cross_entropy(shape, batch.shape)
        return OracleLosses(a + b, a, b)
