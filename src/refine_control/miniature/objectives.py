"""Objectives and batches of `refine-control mini train`, which trains the miniature in stages.

autoencoder -> base (transformer and both text encoders, text to image) -> teacher (23-layer inpainting ControlNet on
the frozen base) -> joint (base and teacher together). Every stage can be resumed and runs in `training.loop.fit`.
Last the classifier that measures obedience is trained, on renders degraded like generated images. Scenes are rendered
on demand and do not repeat between stages; `worlds` has batches of photographs.
"""

# N scenes, B batch, H = W = 64 pixels, h = w = 8 latents; crops are 32 x 32

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from refine_control.conditions.condition import Shown, control_cond, mask_at_latents
from refine_control.miniature import scenes
from refine_control.miniature.obedience import Classifier, region_crops
from refine_control.miniature.tasks.task import Task, find_task
from refine_control.models.backbone import encode_images, encode_prompts, predict_velocity
from refine_control.models.controlnet import control_residuals, trainable_parameters
from refine_control.pixels import from_images
from refine_control.randomness import derive_seed, permutation
from refine_control.training.loop import Batches, Draw, Objective
from refine_control.training.objectives import noised
from refine_control.training.optimizer import Trainable, compute_in

EACH, REPEATS = 16, 2
"""A slot's scenes in a pool, and how often each is shown."""
INSIDE_WEIGHT = 4.0
"""How many times a latent in the hole counts in the losses of the teacher."""
FREE = 0.15
"""Share of the samples without control in the joint stage, so that the base remains a text-to-image model."""


class StageLosses(NamedTuple):
    """The logged terms of base, teacher and joint."""

    loss: torch.Tensor
    inside: torch.Tensor
    """Mean squared error in the hole."""
    outside: torch.Tensor


class AutoencoderLosses(NamedTuple):
    """The terms of the autoencoder's loss."""

    loss: torch.Tensor
    squared: torch.Tensor
    absolute: torch.Tensor
    divergence: torch.Tensor


class SceneBatch(NamedTuple):
    """Encoded scenes: latents and cond_latents (B,16,h,w), mask (B,1,h,w) 1 = inpaint, prompts as text."""

    latents: torch.Tensor
    cond_latents: torch.Tensor
    mask: torch.Tensor | None
    """None: the condition has no region."""
    local_prompts: list[str]
    global_prompts: list[str]

    def take(self, rows: np.ndarray) -> SceneBatch:
        """Some of them, by their numbers."""
        index = torch.from_numpy(rows).to(self.latents.device)
        mask = None if self.mask is None else self.mask[index]
        prompts = ([texts[row] for row in rows] for texts in (self.local_prompts, self.global_prompts))
        return SceneBatch(self.latents[index], self.cond_latents[index], mask, *prompts)


@torch.no_grad()
def encode_scenes(
    vae: Any, pixels: torch.Tensor, shown: Shown, local_prompts: list[str], global_prompts: list[str]
) -> SceneBatch:
    """Encodes pixels (N,3,H,W) in [-1, 1] and what the ControlNet is shown of them, 64 at a time."""
    pictures, mask = shown.tensors()
    latents, cond_latents = (
        torch.cat([encode_images(vae, part.to(vae.device), shift) for part in each.split(64)])
        for each, shift in ((pixels, True), (pictures, mask is not None))
    )
    small = None if mask is None else mask_at_latents(mask.to(vae.device), latents)
    return SceneBatch(latents, cond_latents, small, local_prompts, global_prompts)


class PictureBatches(Batches):
    """Half scenes, half images with the statistics of photographs: (B,3,64,64) in [-1, 1]."""

    def batch(self, draw: Draw) -> torch.Tensor:
        """The images of a micro-batch; no image is shown twice."""
        start = draw.step * 100_000 + draw.slots[0]
        return scenes.photo_mixture(derive_seed(draw.seed, draw.stage), start, len(draw.slots))


class SceneBatches(Batches):
    """Rendered scenes of a task, encoded by the frozen autoencoder in pools and shown REPEATS times with new noise.

    A slot's scenes are a function of (seed, stage, slot, step), so they do not depend on the number of processes."""

    def __init__(self, vae: Any, task: Task | None = None):
        self.vae, self.task = vae, task or find_task()
        self.pool: tuple[Any, SceneBatch] | None = None

    def _encode(self, draw: Draw, number: int) -> SceneBatch:
        seeds = [derive_seed(draw.seed, draw.stage, slot) for slot in draw.slots]
        rows = [self.task.render(seed, number * EACH, EACH) for seed in seeds]
        images = from_images(torch.cat([r.truth.images for r in rows]))
        return encode_scenes(
            self.vae,
            images,
            Shown.joined([r.shown for r in rows]),
            [p for r in rows for p in r.prompts],
            [p for r in rows for p in r.more_prompts],
        )

    def batch(self, draw: Draw) -> SceneBatch:
        """One scene for each slot."""
        number, within = divmod(draw.step, REPEATS * EACH)
        key = (draw.seed, draw.stage, number, tuple(draw.slots))
        if self.pool is None or self.pool[0] != key:
            self.pool = (key, self._encode(draw, number))
        repeat, turn = divmod(within, EACH)
        order = permutation(derive_seed(draw.seed, draw.stage, "turn", number, repeat), EACH)
        return self.pool[1].take(np.arange(len(draw.slots)) * EACH + int(order[turn]))


def draw_prompts(batch: SceneBatch, draw: Draw) -> list[str]:
    """A prompt for each slot: 10 % empty, 60 % local, 30 % global."""
    picks = draw.uniforms("prompt").tolist()
    return [
        "" if u < 0.1 else (l if u < 0.1 + 0.6 else g)
        for u, l, g in zip(picks, batch.local_prompts, batch.global_prompts, strict=True)
    ]


class StageObjective(Objective):
    """An objective that knows its parameters when it is made."""

    parameters: Trainable

    def trainable(self) -> Trainable:
        """All that the stage trains."""
        return self.parameters


class AutoencoderObjective(StageObjective):
    """Squared and 0.05 x absolute error of the reconstruction, with a small divergence from the unit normal."""

    def __init__(self, vae: Any):
        self.vae, self.parameters = vae, compute_in(vae, torch.bfloat16)

    def losses(self, batch: torch.Tensor, draw: Draw, statistics: torch.Tensor | None = None) -> AutoencoderLosses:
        """The loss of a reparametrised reconstruction; batch (B,3,H,W) in [-1, 1]."""
        batch = batch.to(self.vae.device)
        posterior = self.vae.encode(batch.to(self.vae.dtype)).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * draw.normals("posterior", *mean.shape[1:]).to(mean.device)
        error = self.vae.decode(latents.to(self.vae.dtype)).sample.float() - batch
        squared, absolute = error.square().mean(), error.abs().mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return AutoencoderLosses(squared + 0.05 * absolute + 3e-5 * divergence, squared, absolute, divergence)


def weighted_losses(error: torch.Tensor, mask: torch.Tensor | None, inside_weight: float) -> StageLosses:
    """Mean squared error in which the hole counts `inside_weight` times: error (B,16,h,w), mask (B,1,h,w).

    Without a mask all counts alike, and there is no outside."""
    square = error.float().square().mean(1, keepdim=True)
    if mask is None:
        return StageLosses(square.mean(), square.mean(), square.new_zeros(()))
    loss = (square * (1 + (inside_weight - 1) * mask)).mean()
    return StageLosses(
        loss, (square * mask).sum() / mask.sum().clamp_min(1), (square * (1 - mask)).sum() / (1 - mask).sum()
    )


class BaseObjective(StageObjective):
    """Text to image: the transformer and both text encoders are trained together on the velocity."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.parts = {n: getattr(pipeline, n) for n in ("transformer", "text_encoder", "text_encoder_2")}
        trained = {name: compute_in(part.requires_grad_(True), torch.bfloat16) for name, part in self.parts.items()}
        self.parameters = Trainable.joined(**trained)

    def losses(self, batch: SceneBatch, draw: Draw, statistics: torch.Tensor | None = None) -> StageLosses:
        """E ||v - v_hat||^2 with 60 % local, 30 % global and 10 % empty prompts."""
        at = noised(batch.latents, draw)
        embeds, pooled = encode_prompts(self.pipeline, draw_prompts(batch, draw), 0)
        predicted = predict_velocity(self.parts["transformer"], at.noisy_latents, at.sigmas, embeds, pooled)
        return weighted_losses(predicted.float() - at.target, batch.mask, 1.0)


class TeacherObjective(StageObjective):
    """A 23-layer ControlNet on the frozen base; in inpainting the hole counts INSIDE_WEIGHT times.

    The text stream of its last block is not trained."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
            part.to(torch.bfloat16).requires_grad_(False)
        self.controlnet: Any = pipeline.controlnet
        self.parameters = compute_in(pipeline.controlnet, torch.bfloat16, trainable_parameters(pipeline.controlnet))

    def losses(self, batch: SceneBatch, draw: Draw, statistics: torch.Tensor | None = None) -> StageLosses:
        """E ||v - v_hat||^2 with the base's prompts; both networks get the same prompt."""
        at = noised(batch.latents, draw)
        with torch.no_grad():
            embeds, pooled = encode_prompts(self.pipeline, draw_prompts(batch, draw), 0)
        cond = control_cond(batch.cond_latents, batch.mask)
        residuals = control_residuals(self.controlnet, at.noisy_latents, at.sigmas, embeds, cond, pooled)
        residuals = self.controlled(residuals, draw)
        predicted = predict_velocity(self.pipeline.transformer, at.noisy_latents, at.sigmas, embeds, pooled, residuals)
        return weighted_losses(predicted.float() - at.target, batch.mask, INSIDE_WEIGHT)

    def controlled(self, residuals: list[torch.Tensor], draw: Draw) -> list[torch.Tensor]:
        """The residuals that are injected: those of every sample."""
        return residuals


class JointObjective(TeacherObjective):
    """Base and teacher together, so that the base learns to draw what prompt and control ask for."""

    def __init__(self, pipeline: Any):
        base = compute_in(pipeline.transformer.requires_grad_(True), torch.bfloat16)
        super().__init__(pipeline)
        pipeline.transformer.requires_grad_(True)
        self.parameters = Trainable.joined(transformer=base, controlnet=self.parameters)

    def controlled(self, residuals: list[torch.Tensor], draw: Draw) -> list[torch.Tensor]:
        """Zero residuals for the free samples."""
        keep = (draw.uniforms("free") >= FREE).to(residuals[0])[:, None, None]
        return [residual * keep for residual in residuals]


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


class CropBatches(Batches):
    """New scenes at every step."""

    def batch(self, draw: Draw) -> Crops:
        """One region for each slot."""
        start = draw.step * 100_000 + draw.slots[0]
        rendered = scenes.render(derive_seed(draw.seed, draw.stage), start, len(draw.slots))
        crops = region_crops(from_images(rendered.images), rendered.masks)
        return Crops(crops, torch.from_numpy(rendered.colour), torch.from_numpy(rendered.shape))


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


class OracleObjective(StageObjective):
    """Cross-entropy of colour and shape."""

    def __init__(self, classifier: Classifier):
        self.classifier, self.parameters = classifier, Trainable.of(classifier.named_parameters())

    def losses(self, batch: Crops, draw: Draw, statistics: torch.Tensor | None = None) -> OracleLosses:
        """Their sum, and both of them."""
        logits = self.classifier(degraded(batch.pixels, draw))
        colour, shape = map(functional.cross_entropy, logits, (batch.colour, batch.shape))
        return OracleLosses(colour + shape, colour, shape)
