"""Batches from a cache: the sample of a slot, and whose prompt is empty, are pure functions of (seed, step, slot)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import torch

from refine_control.cache.building import path_noise
from refine_control.cache.reader import Cache
from refine_control.errors import InvalidInputError
from refine_control.models.devices import send
from refine_control.models.prompt_memory import Encode
from refine_control.photos.buckets import Size
from refine_control.training.loop import Batches, Draw
from refine_control.training.objectives import Batch
from refine_control.training.order import Order, Turn

logger = logging.getLogger(__name__)


class CacheBatches(Batches):
    """Global shuffle (`order`) with one size in each step; `prompt_dropout` of the slots get the empty prompt.

    Args:
        batch_size: of one update over all processes.
        device: where batches go.
        encode: makes the prompt embeddings that a cache without them lacks.
        x0: the array of clean latents: `latents`, the ground truth of D_sl; `cond_latents` (the masked image's) or the
            teacher's `completions` for D_ssl.
        adds: fields of `Batch` that objectives for few steps read: the `empty` prompt; of completions `noise`, `path`.
    """

    def __init__(
        self,
        cache: Cache,
        batch_size: int,
        prompt_dropout: float = 0.1,
        device: str | torch.device = "cpu",
        encode: Encode | None = None,
        *,
        x0: str = "latents",
        adds: Collection[str] = (),
    ):
        self.cache, self.prompt_dropout, self.device, self.encode = cache, prompt_dropout, device, encode
        self.x0, self.order, self.adds = x0, Order(cache.groups, batch_size), adds

    def batch(self, draw: Draw, turn: Turn | None = None) -> Batch:
        """The samples of `draw.slots` at `draw.step`, or of another `turn`."""
        rows = self.rows(draw, turn)
        cond_latents = self._take("cond_latents", rows)
        mask = self._take("masks", rows) if self.cache.has("masks") else None
        clean, num_labeled = self._clean(rows, draw), len(rows) if self.x0 == "latents" else 0
        batch = Batch(clean, cond_latents, mask, *self._text(rows, draw), draw.slots, num_labeled)
        if "empty" in self.adds:
            batch = batch._replace(empty=self._embedded(np.zeros(1, int)))
        if "noise" in self.adds:
            noise = path_noise(clean.shape[1:], rows.tolist(), self.cache.manifest["completions"]["seed"])
            batch = batch._replace(noise=send(noise, self.device))
        return batch._replace(path=self._take("path", rows)) if "path" in self.adds else batch

    def not_finite(self, draw: Draw, turn: Turn | None = None) -> list[str]:
        """Keys of the samples of `draw.slots` whose latents, mask or prompt embeddings are not all finite."""
        batch = self.batch(draw, turn)
        tensors = [tensor for tensor in (*batch[:5], batch.path) if tensor is not None]
        return [
            f"sample {self.cache.keys[row]} of {self.cache.folder}"
            for number, row in enumerate(self.rows(draw, turn))
            if not all(bool(tensor[number].isfinite().all()) for tensor in tensors)
        ]

    @property
    def sizes(self) -> Iterable[Size]:
        """Of the samples, in latents."""
        return self.order.groups

    def turn(self, draw: Draw) -> Turn:
        """The size of this step, and which of its batches it is."""
        return self.order.turn(draw.seed, draw.stage, draw.step)

    def rows(self, draw: Draw, turn: Turn | None = None) -> np.ndarray:
        """(B,) which samples fill the slots of this step, or of another `turn`."""
        return self.order.rows(draw.seed, draw.stage, turn or self.turn(draw), draw.slots)

    def _text(self, rows: np.ndarray, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and pooled embeddings of the prompts."""
        dropped = draw.uniforms("prompt_dropout").numpy() < self.prompt_dropout
        return self._embedded(np.where(dropped, 0, self.cache.arrays["prompt_index"][rows]))

    def _embedded(self, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and pooled embeddings of numbered prompts."""
        if self.encode is None:
            return self._take("prompt_embeds", numbers), self._take("pooled_prompt_embeds", numbers)
        embeds, pooled = self.encode([self.cache.prompts[number] for number in numbers])
        return embeds.to(self.device, torch.float32), pooled.to(self.device, torch.float32)

    def _take(self, name: str, rows: np.ndarray) -> torch.Tensor:
        return send(self.cache.take(name, rows), self.device, torch.float32)

    def _clean(self, rows: np.ndarray, draw: Draw) -> torch.Tensor:
        """Clean latents: the posterior's mean, or a draw of (seed, stage, step, slot) where its deviation is cached."""
        mean = self._take(self.x0, rows)
        if not self.cache.has(f"{self.x0}_std"):
            return mean
        drawn = send(draw.normals("posterior", *mean.shape[1:]), self.device)
        return mean + self._take(f"{self.x0}_std", rows) * drawn


class MixedBatches(Batches):
    """Half of the slots from D_sl, half from D_ssl, each shuffled by itself; the even slots are labelled.

    Both halves have one size: the turns are those of D_sl, and D_ssl gives its batch of the same size and number. The
    samples of sizes that only one of them has are left out, with a warning. Raises InvalidInputError where they have
    no size in common."""

    def __init__(self, labeled: CacheBatches, unlabeled: CacheBatches):
        self.labeled, self.unlabeled = labeled, unlabeled
        common = labeled.order.groups.keys() & unlabeled.order.groups.keys()
        if not common:
            raise InvalidInputError(
                "data.labeled and data.unlabeled hold samples of different sizes, and a mixed batch has one; "
                "build both with the same --size"
            )
        for half in (labeled, unlabeled):
            alone = sum(len(rows) for size, rows in half.order.groups.items() if size not in common)
            if alone:
                logger.warning(
                    "%d samples of %s have a size that the other half lacks; left out", alone, half.cache.folder
                )
                groups = {size: rows for size, rows in half.order.groups.items() if size in common}
                half.order = Order(groups, half.order.batch_size)

    @property
    def sizes(self) -> Iterable[Size]:
        """Of the samples, in latents."""
        return self.labeled.sizes

    def batch(self, draw: Draw) -> Batch:
        """The samples of `draw.slots` at `draw.step`, the labelled ones first."""
        labeled, unlabeled = self._halves(draw)
        halves = self.labeled.batch(labeled), self.unlabeled.batch(unlabeled, self.labeled.turn(labeled))
        pairs = zip(*(half[:5] for half in halves), strict=True)
        tensors: list[Any] = [None if first is None else torch.cat([first, second]) for first, second in pairs]
        slots = sorted(draw.slots, key=lambda slot: slot % 2)
        return Batch(*tensors, slots=slots, num_labeled=halves[0].num_labeled)

    def not_finite(self, draw: Draw) -> list[str]:
        """Those of both halves."""
        labeled, unlabeled = self._halves(draw)
        return self.labeled.not_finite(labeled) + self.unlabeled.not_finite(unlabeled, self.labeled.turn(labeled))

    def _halves(self, draw: Draw) -> tuple[Draw, Draw]:
        """The even and the odd slots, counted and seeded by themselves."""
        even, odd = ([slot // 2 for slot in draw.slots if slot % 2 == half] for half in (0, 1))
        if not even or not odd:
            raise InvalidInputError(
                "objective.kind mixed halves every batch, and one sample has no halves; make training.batch_size a "
                "multiple of twice the processes"
            )
        return (
            draw._replace(slots=even, stage=f"{draw.stage} labeled"),
            draw._replace(slots=odd, stage=f"{draw.stage} unlabeled"),
        )
