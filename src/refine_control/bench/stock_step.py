"""The baseline of `bench step`: a plain eager training loop over stock diffusers modules.

It does not use `losses`, `flow` and `injection`, so that it checks them too.
"""

# B batch, h w latents, N image tokens, D width

from __future__ import annotations

from typing import Any, Protocol

import torch

from refine_control.conditions.condition import control_cond
from refine_control.config import Recipe
from refine_control.models.loading import load_backbone, load_controlnet
from refine_control.training.loop import Draw
from refine_control.training.objectives import Batch
from refine_control.training.run import new_student


class Step(Protocol):
    """A training step: its loss, its student's parameters by name, and the update, which clears their gradients."""

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
    """A supervised step in fp32: diffusers' processors, torch's AdamW, Eq. 1 by hand.

    `everything` leaves the teacher in the graph and the frozen networks unfrozen, as a first draft would."""

    def __init__(self, recipe: Recipe, device: torch.device, everything: bool = False):
        self.recipe, self.everything = recipe, everything
        self.backbone = load_backbone(recipe.model, load_controlnet(recipe.teacher) if recipe.teacher else None)
        self.student: Any = new_student(recipe, self.backbone)[1].to(device)  # type: ignore[arg-type]
        self.teacher: Any = self.backbone.pipeline.controlnet.to(device)
        self.transformer: Any = self.backbone.transformer.to(device)  # type: ignore[arg-type]
        for frozen in (self.teacher, self.transformer):
            frozen.requires_grad_(everything)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=recipe.optimizer.learning_rate)
        shift = self.backbone.shift if recipe.sigmas.shift is None else recipe.sigmas.shift
        self.sigmas = recipe.sigmas.model_copy(update={"shift": shift})

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
        sites = len(self.transformer.transformer_blocks) - 1
        injected = [residuals[site * len(residuals) // sites] for site in range(sites)]
        velocity = self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            block_controlnet_hidden_states=[*injected, injected[-1]],
        ).sample
        return injected, residuals, velocity

    def loss(self, batch: Batch, draw: Draw) -> torch.Tensor:
        """Eq. 1 at the sigmas and the noise that `ours` draws."""
        normals = draw.normals("sigmas").to(batch.latents.device)
        sigmas = torch.sigmoid(self.sigmas.logit_mean + self.sigmas.logit_std * normals)
        shift = self.sigmas.shift or 1.0
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        noise = draw.normals("noise", *batch.latents.shape[1:]).to(batch.latents.device)
        at = sigmas[:, None, None, None]
        latents = (1 - at) * batch.latents + at * noise
        with torch.set_grad_enabled(self.everything):
            teacher, _, teacher_velocity = self._answer(self.teacher, latents, sigmas, batch)
        _, student, velocity = self._answer(self.student, latents, sigmas, batch)
        weights = self.recipe.objective.weights
        assert batch.mask is not None
        w, output_w = (
            1.0 if alpha is None else alpha * batch.mask + (1 - alpha) * (1 - batch.mask)
            for alpha in (weights.alpha, weights.output_alpha)
        )
        task = ((w * (noise - batch.latents - velocity)) ** 2).mean()
        output = ((output_w * (teacher_velocity - velocity)) ** 2).mean()
        feature = torch.zeros((), device=latents.device)
        for layer, residual in enumerate(student):
            group = [f for site, f in enumerate(teacher) if site * len(student) // len(teacher) == layer]
            total = torch.stack(group).sum(0)
            size = (total**2).mean() if self.recipe.objective.feature_normalisation == "layer" else 1.0
            feature = feature + ((len(group) * residual - total) ** 2).mean() / size
        return weights.task * task + weights.output * output + weights.feature * feature

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.student.named_parameters())

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        for network in (self.student, self.teacher, self.transformer):
            network.zero_grad(set_to_none=True)
