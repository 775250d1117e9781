"""Batches from a cache: the sample of a slot, and whose prompt is empty, are pure functions of (seed, step, slot)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from refine_control.data.cache import Cache
from refine_control.randomness import derive_seed, permutation
from refine_control.training.loop import Draw
from refine_control.training.objectives import LabeledBatch, MixedBatch, UnlabeledBatch


class _Text(NamedTuple):
    embeds: torch.Tensor
    pooled: torch.Tensor


class CacheBatches:
    """Global shuffle without replacement in each epoch; `prompt_dropout` of the slots get the empty prompt.

    Args:
        batch_size: of one update over all processes.
        device: where batches go.
    """

    def __init__(self, cache: Cache, batch_size: int, prompt_dropout: float = 0.1, device: str | torch.device = "cpu"):
        self.cache, self.batch_size, self.prompt_dropout, self.device = cache, batch_size, prompt_dropout, device
        self.epochs: dict[tuple[int, str, int], np.ndarray] = {}

    def rows(self, draw: Draw) -> np.ndarray:
        """(B,) which samples fill the slots of this step."""
        out = []
        for slot in draw.slots:
            epoch, position = divmod(draw.step * self.batch_size + slot, len(self.cache))
            key = (draw.seed, draw.stage, epoch)
            if key not in self.epochs:
                self.epochs = {k: v for k, v in self.epochs.items() if k[2] >= epoch - 1}
                self.epochs[key] = permutation(derive_seed(draw.seed, draw.stage, "order", epoch), len(self.cache))
            out.append(self.epochs[key][position])
        return np.asarray(out)

    def _text(self, rows: np.ndarray, draw: Draw) -> _Text:
        dropped = draw.uniforms("prompt_dropout").numpy() < self.prompt_dropout
        numbers = np.where(dropped, 0, self.cache.arrays["prompt_index"][rows])
        embeds, pooled = (self._take(name, numbers) for name in ("prompt_embeds", "pooled_prompt_embeds"))
        return _Text(embeds, pooled)

    def _take(self, name: str, rows: np.ndarray) -> torch.Tensor:
        return self.cache.take(name, rows).to(self.device, torch.float32)


class LabeledBatches(CacheBatches):
    """D_sl: reads the latents of the picture."""

    def batch(self, draw: Draw) -> LabeledBatch:
        """The samples of `draw.slots` at `draw.step`."""
        rows = self.rows(draw)
        latents, masked_latents, mask = (self._take(name, rows) for name in ("latents", "masked_latents", "masks"))
        return LabeledBatch(latents, masked_latents, mask, *self._text(rows, draw))


class UnlabeledBatches(CacheBatches):
    """D_ssl: reads what is around the hole, and `x0`: `masked_latents`, or the teacher's `completions`."""

    def __init__(self, *args: object, x0: str = "masked_latents", **kwargs: object):
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.x0 = x0

    def batch(self, draw: Draw) -> UnlabeledBatch:
        """The samples of `draw.slots` at `draw.step`."""
        rows = self.rows(draw)
        x0, masked_latents, mask = (self._take(name, rows) for name in (self.x0, "masked_latents", "masks"))
        return UnlabeledBatch(x0, masked_latents, mask, *self._text(rows, draw))


class MixedBatches:
    """Half of the slots from D_sl, half from D_ssl, each shuffled by itself; the even slots are labelled."""

    def __init__(self, labeled: LabeledBatches, unlabeled: UnlabeledBatches):
        self.labeled, self.unlabeled = labeled, unlabeled

    def batch(self, draw: Draw) -> MixedBatch:
        """The samples of `draw.slots` at `draw.step`, the labelled ones first."""
        even, odd = ([slot // 2 for slot in draw.slots if slot % 2 == turn] for turn in (0, 1))
        return MixedBatch(
            self.labeled.batch(draw._replace(slots=even, stage=f"{draw.stage} labeled")),
            self.unlabeled.batch(draw._replace(slots=odd, stage=f"{draw.stage} unlabeled")),
        )
