"""Validation images: what the student paints with its averaged weights, beside the originals."""

# B pictures, H W pixels, h w latents

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from refine_control.conditions.condition import control_cond, show
from refine_control.config import Recipe
from refine_control.models.families import condition_encoding
from refine_control.photos.buckets import sizes_of
from refine_control.photos.shards import Shards
from refine_control.picture_grid import picture_grid, repaint_grid
from refine_control.pipeline.painting import complete_latents, warn_wasted_steps
from refine_control.pixels import to_images
from refine_control.randomness import slot_normals
from refine_control.storage import write_atomic
from refine_control.training.objectives import Networks


class Validation:
    """Paints `num_validation_images` of the shards in `data.test` with the recipe's sampler: the first of the size of
    the first.

    Raises what `Shards` raises when `data.test` holds none."""

    def __init__(self, recipe: Recipe, networks: Networks, run_dir: Path):
        shards = Shards(Path(str(recipe.data.test)))
        size = next(sizes_of(shards))
        alike = (number for number, each in enumerate(sizes_of(shards)) if each == size)
        self.photos = [shards[i] for i in islice(alike, recipe.training.num_validation_images)]
        count = len(self.photos)
        self.networks, self.sampler, self.folder = networks, recipe.sampler, run_dir / "validation"
        backbone = networks.backbone
        warn_wasted_steps(backbone, self.sampler)
        pixels, mask = show(self.photos).tensors()
        cond_latents = backbone.encode_condition(pixels, condition_encoding(networks.student.config))
        self.cond = control_cond(cond_latents, None if mask is None else mask.to(cond_latents.device))
        self.text = backbone.encode_prompts([p.prompt for p in self.photos])
        self.empty = backbone.encode_prompts([""] * count)
        self.noise = slot_normals(cond_latents.shape[1:], range(count), self.sampler.seed, "initial noise")

    @torch.no_grad()
    def __call__(self, step: int, weights: dict[str, torch.Tensor]) -> np.ndarray:
        """Writes `validation/step_XXXXXXXX.png` and returns it, (H,W,3) uint8; the student is left as it was."""
        from PIL import Image

        networks, student = self.networks, self.networks.whole
        shared = student is not networks.student
        trained = {} if shared else {n: p.detach().clone() for n, p in networks.trainable.parameters.items()}
        device = student.device
        try:
            networks.load(weights, student)
            text, empty = (tuple(t.to(device) for t in pair) for pair in (self.text, self.empty))
            latents = complete_latents(
                networks.whole_backbone,
                student,
                self.cond.to(device),
                text,  # type: ignore[arg-type]
                empty,  # type: ignore[arg-type]
                self.sampler,
                self.noise.to(device),
            )
        finally:
            networks.load(trained, student)
        decoded = networks.backbone.decode_latents(latents.to(networks.backbone.vae.device))
        painted = to_images(decoded)
        png = picture_grid(repaint_grid(self.photos, {f"student at step {step}": painted}))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"step_{step:08d}.png", png)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
