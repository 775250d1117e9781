"""What is exported: a student with the model that it paints with, and real samples that exports are checked on."""

# N samples, H W pixels, h w latents

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from refine_control import flow
from refine_control.cache.marks import model_mark
from refine_control.cache.reader import Cache
from refine_control.conditions.condition import control_cond, own_condition, take_condition
from refine_control.config import SamplerConfig, StudentCard
from refine_control.errors import InvalidInputError
from refine_control.miniature.tasks.task import find_task
from refine_control.models.backbone import Backbone
from refine_control.models.card import choose_sampler, read_card
from refine_control.models.controlnet import ControlNet
from refine_control.models.families import condition_encoding
from refine_control.models.loading import load_painter, resolve
from refine_control.randomness import slot_normals
from refine_control.records import INPAINT

SAMPLES = 8
_SEED = 1016
"""Of the rendered scenes, unlike those of training and evaluation."""


class Samples(NamedTuple):
    """Real inputs of one denoiser call for N samples, and what their pictures and prompts are."""

    inputs: Mapping[str, torch.Tensor]
    """Of `graphs.Denoiser`, by name: noise levels evenly from 1/N to 1."""
    latents: torch.Tensor
    """Clean (N,16,h,w)."""
    prompts: list[str]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The inputs for runtimes without torch."""
        return {name: value.numpy() for name, value in self.inputs.items()}


class Source(NamedTuple):
    """A student, in fp32 on the CPU."""

    name: str
    folder: Path | None
    """Of its files, None for the model's own ControlNet."""
    backbone: Backbone
    """With the student's own transformer where it has one."""
    controlnet: ControlNet
    sampler: SamplerConfig

    @property
    def condition(self) -> str:
        """The kind of picture that it is shown."""
        return own_condition(self.controlnet.config) or INPAINT

    @property
    def card(self) -> StudentCard | None:
        """That of a student for few steps, else None."""
        return read_card(self.name) if self.folder else None


def load_source(student: str, model: str = "mini") -> Source:
    """A student named `edge` or another packaged ControlNet, by a folder or a hub id, or as the model itself for the
    model's own ControlNet. Raises what `load_painter` raises."""
    name = None if student == model else student
    backbone, controlnet = load_painter(model, name)
    sampler = choose_sampler(model, name, {})
    controlnet.requires_grad_(False).eval()
    return Source(student, None if name is None else resolve(name), backbone, controlnet, sampler)


def load_samples(source: Source, model: str, cache: Path | None, count: int = SAMPLES) -> Samples:
    """Samples of a cache, or for the mini model rendered scenes. Raises InvalidInputError for a cache of another model
    or condition, and where none is given for another model."""
    if cache is not None:
        return cached_samples(source, cache, count)
    if model != "mini":
        raise InvalidInputError(
            f"exports of {model} are checked on real samples; give --cache FOLDER, which `refine-control cache` writes"
        )
    return scene_samples(source, count)


def scene_samples(source: Source, count: int = SAMPLES) -> Samples:
    """Rendered scenes under the student's condition, encoded."""
    rendered, backbone = find_task(source.condition).render(_SEED, 0, count), source.backbone
    pictures, masks = rendered.shown.tensors()
    cond = backbone.encode_condition(pictures, condition_encoding(source.controlnet.config))
    truth = rendered.truth.images.numpy()
    latents = backbone.encode_images(torch.from_numpy(truth).permute(0, 3, 1, 2).float() / 127.5 - 1)
    return _samples(source, latents, control_cond(cond, masks), rendered.prompts)


def cached_samples(source: Source, folder: Path, count: int = SAMPLES) -> Samples:
    """The first samples of a cache that have one size."""
    cache = Cache(folder, model_mark(source.backbone))
    take_condition(source.controlnet, cache.condition, source.name)
    rows = np.array(next(iter(cache.groups.values()))[:count])
    mask = cache.take("masks", rows).float() if cache.has("masks") else None
    shown = cache.take("cond_latents", rows).float()
    latents = cache.take("latents", rows).float() if cache.has("latents") else shown
    prompts = [cache.prompts[number] for number in cache.arrays["prompt_index"][rows]]
    return _samples(source, latents, control_cond(shown, mask), prompts)


def _samples(source: Source, latents: torch.Tensor, cond: torch.Tensor, prompts: list[str]) -> Samples:
    """Clean latents noised to as many levels as there are samples."""
    count = len(latents)
    sigmas = torch.arange(1, count + 1) / count
    noise = slot_normals(tuple(latents.shape[1:]), range(count), 0, "export")
    embeds, pooled = source.backbone.encode_prompts(prompts)
    inputs = {
        "noisy_latents": flow.interpolate(latents, noise, sigmas),
        "control_cond": cond,
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "sigmas": sigmas,
        "conditioning_scale": torch.tensor(source.sampler.conditioning_scale),
    }
    return Samples({name: value.float() for name, value in inputs.items()}, latents, prompts)
