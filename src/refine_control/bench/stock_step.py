"""The peers of `bench step`: training steps over stock diffusers modules, with the losses of a recipe.

`StockStep` is a plain eager loop over cached latents. `ScriptStep` is the step of diffusers' train_controlnet_sd3.py
with a teacher beside the student: the VAE encodes image and condition in every step.

The losses of Eq. 1 to 6 are written here by hand, without `losses`, `flow` and `injection`, and so check them. Those of
few steps are the objective's own equations over these modules.
"""

# B batch, H W pixels, h w latents, N image tokens, D width

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from refine_control.conditions.condition import control_cond
from refine_control.config import Recipe
from refine_control.models.backbone import encode_images, encode_prompts
from refine_control.training.assembly import make_objective
from refine_control.training.loop import Draw
from refine_control.training.objectives import Batch, Networks

Load = Callable[[Recipe, torch.device], Networks]
"""How the networks of a recipe come onto a device."""


class Step(Protocol):
    """A training step: its loss, its student's parameters by name, and the update, which clears their gradients."""

    networks: Networks

    def loss(self, batch: Batch, draw: Draw) -> torch.Tensor: ...
    @property
    def parameters(self) -> dict[str, torch.Tensor]: ...
    def update(self) -> None: ...

    def backward(self, batch: Batch, draw: Draw) -> float:
        """The loss, with gradients in `parameters`."""
        loss = self.loss(batch, draw)
        loss.backward()
        return float(loss.detach())


class StockStep(Step):
    """A step with diffusers' processors and torch's AdamW, the teacher without a graph and all but the student frozen.

    In fp32, or `mixed`: frozen networks in bf16 and the student under autocast, as `--mixed_precision bf16`."""

    def __init__(self, recipe: Recipe, device: torch.device, load: Load, mixed: bool = False):
        plain = recipe.training.model_copy(update={"precision": "fp32", "compile": False})
        self.recipe = recipe.model_copy(update={"training": plain})
        self.networks = load(self.recipe, device)
        self.type = torch.bfloat16 if mixed else torch.float32
        frozen: list[Any] = [self.networks.backbone.transformer, self.networks.teacher]
        for network in frozen:
            if network is not None:
                network.to(self.type)
        trainable = list(self.parameters.values())
        self.optimizer: Any = torch.optim.AdamW(trainable, lr=recipe.optimizer.learning_rate)
        few = recipe.objective.is_few_step
        self.objective = make_objective(recipe.objective, self.networks) if few else None

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.networks.trainable.parameters)

    def loss(self, batch: Batch, draw: Draw) -> torch.Tensor:
        """At the sigmas and the noise that `ours` draws."""
        mixed = self.type != torch.float32
        with torch.autocast(batch.latents.device.type, self.type) if mixed else nullcontext():
            if self.objective is not None:
                return self.objective.losses(batch, draw).loss
            return self._distillation(batch, draw._replace(slots=batch.slots))

    def _answer(self, controlnet: Any, latents: torch.Tensor, sigmas: torch.Tensor, batch: Batch) -> Any:
        """What is injected at each site, the residuals, and the velocity."""
        text, pooled, timestep = batch.prompt_embeds, batch.pooled_prompt_embeds, 1000 * sigmas
        residuals = controlnet(
            hidden_states=latents,
            controlnet_cond=control_cond(batch.cond_latents, batch.mask),
            conditioning_scale=self.recipe.training.conditioning_scale,
            encoder_hidden_states=text,
            pooled_projections=torch.zeros_like(pooled),
            timestep=timestep,
        ).controlnet_block_samples
        transformer: Any = self.networks.backbone.transformer
        sites = len(transformer.transformer_blocks) - 1
        injected = [residuals[site * len(residuals) // sites] for site in range(sites)]
        velocity = transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            block_controlnet_hidden_states=[*injected, injected[-1]],
        ).sample
        return injected, residuals, velocity.float()

    def _distillation(self, batch: Batch, draw: Draw) -> torch.Tensor:
        """Eq. 1, Eq. 6, Eq. 3 alone, both in one batch, or the one-to-one loss."""
        config, recipe, latents = self.recipe.objective, self.recipe, batch.latents
        normals = draw.normals("sigmas").to(latents.device)
        sigmas = torch.sigmoid(recipe.sigmas.logit_mean + recipe.sigmas.logit_std * normals)
        shift = self.networks.backbone.shift if recipe.sigmas.shift is None else recipe.sigmas.shift
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        noise = draw.normals("noise", *latents.shape[1:]).to(latents.device)
        at = sigmas[:, None, None, None]
        noisy = ((1 - at) * latents + at * noise).to(self.type)
        _, student, velocity = self._answer(self.networks.student, noisy, sigmas, batch)
        weights, truth, loss = config.weights, batch.num_labeled, torch.zeros((), device=latents.device)
        alphas = None if config.kind == "one_to_one" else weights.alpha, weights.output_alpha
        w, output_w = (
            torch.ones_like(latents[:, :1])
            if alpha is None or batch.mask is None
            else alpha * batch.mask + (1 - alpha) * (1 - batch.mask)
            for alpha in alphas
        )
        if truth:
            error = w * (noise - latents - velocity)
            loss = loss + weights.task * (error[:truth] ** 2).sum() / error.numel()
        if config.kind == "from_scratch":
            return loss
        with torch.no_grad():
            teacher, _, teacher_velocity = self._answer(self.networks.teacher, noisy, sigmas, batch)
        loss = loss + weights.output * ((output_w * (teacher_velocity - velocity)) ** 2).mean()
        for layer, residual in enumerate(student):
            group = [f.float() for site, f in enumerate(teacher) if site * len(student) // len(teacher) == layer]
            group = group[-1:] if config.kind == "one_to_one" else group
            total = torch.stack(group).sum(0)
            size = (total**2).mean() if config.feature_normalisation == "layer" else 1.0
            loss = loss + weights.feature * ((len(group) * residual.float() - total) ** 2).mean() / size
        return loss

    def update(self) -> None:
        trainable = list(self.parameters.values())
        torch.nn.utils.clip_grad_norm_(trainable, self.recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Pictures(NamedTuple):
    """What a batch is encoded from."""

    pixels: torch.Tensor
    """(B,3,H,W) in [-1, 1]."""
    cond_pixels: torch.Tensor
    prompts: Sequence[str]


def samples_at_once(recipe: Recipe) -> int:
    """B of a recipe's step: one batch of a device."""
    return recipe.training.device_batch_size or recipe.training.batch_size


def make_pictures(recipe: Recipe, side: int, device: torch.device) -> Pictures:
    """Random images and conditions of `side` pixels, and prompts."""
    draw = Draw(recipe.training.seed, "bench", 0, range(samples_at_once(recipe)))
    pixels, cond = (draw.normals(name, 3, side, side).clamp(-1, 1).to(device) for name in ("pixels", "condition"))
    return Pictures(pixels, cond, [("a red circle", "a blue ring")[slot % 2] for slot in draw.slots])


@torch.no_grad()
def encode_pictures(batch: Batch, pictures: Pictures, vae: Any) -> Batch:
    """The batch with the latents of `pictures`, fp32."""
    latents, cond_latents = (encode_images(vae, each).float() for each in (pictures.pixels, pictures.cond_pixels))
    return batch._replace(latents=latents, cond_latents=cond_latents)


class ScriptStep(StockStep):
    """`StockStep` that encodes the pictures of its batch in every step; `text`: the prompts too.

    The published script encodes all prompts once, before the training. Where it draws from the VAE's posterior this
    takes the mean, for equal losses."""

    def __init__(self, recipe: Recipe, device: torch.device, load: Load, mixed: bool = False, text: bool = False):
        super().__init__(recipe, device, load, mixed)
        backbone = self.networks.backbone
        self.text, self.pictures = text, make_pictures(recipe, backbone.geometry.side, device)
        for part in (backbone.vae, *(backbone.text_encoders if text else ())):
            part.to(device, self.type)

    def loss(self, batch: Batch, draw: Draw) -> torch.Tensor:
        return super().loss(self.encoded(batch), draw)

    @torch.no_grad()
    def encoded(self, batch: Batch) -> Batch:
        """The batch with the latents of the pictures and, where `text`, the embeddings of the prompts."""
        backbone = self.networks.backbone
        batch = encode_pictures(batch, self.pictures, backbone.vae)
        if not self.text:
            return batch
        texts = backbone.readable(self.pictures.prompts)
        pairs = encode_prompts(backbone.pipeline, texts, backbone.max_sequence_length)
        embeds, pooled = (each.to(batch.latents.device, torch.float32) for each in pairs)
        return batch._replace(prompt_embeds=embeds, pooled_prompt_embeds=pooled)
