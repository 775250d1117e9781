"""Relevance of injection sites, for students whose layers feed groups of other sizes (`student.placement`).

The relevance of a site is what dropping its residual costs: r_s = E |v - v without the residual of s|^2 of the frozen
teacher, at the noise levels of training. It belongs to a model: on the mini teacher the first and the last sites matter
most. The groups that follow are those of `injection.relevant_layer_of_site`.
"""

# B samples, R sites, P tokens, D width

from __future__ import annotations

import logging
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from refine_control.cache.reader import Cache
from refine_control.conditions.condition import control_cond
from refine_control.config import Recipe, SigmaConfig
from refine_control.injection import expand_residuals, relevant_layer_of_site, sites_of_layer
from refine_control.models.backbone import Backbone, predict_velocity
from refine_control.models.controlnet import ControlNet, control_residuals, injection_of, own_layer_of_site
from refine_control.models.families import find_family
from refine_control.models.prompt_memory import PromptMemory
from refine_control.training.batches import CacheBatches
from refine_control.training.loop import Draw
from refine_control.training.objectives import Batch, noised

logger = logging.getLogger(__name__)
SAMPLES = 16
"""Over which sites are measured, one noise level each; 16 others order the mini teacher's sites alike."""
_AT_ONCE = 4


class Sites(NamedTuple):
    """What a teacher's residuals f^s are worth, by site."""

    relevance: np.ndarray
    """(R,) E |v - v without the residual of s|^2, mean over elements."""
    products: np.ndarray
    """(R, R) E f^s f^t, mean over elements."""


@torch.no_grad()
def measure_sites(
    backbone: Backbone, teacher: ControlNet, batch: Batch, draw: Draw, sigmas: SigmaConfig, guidance: float = 1.0
) -> Sites:
    """Measures a teacher on a batch at its noise levels, in the networks' types and on their device; `guidance` is the
    scale that FLUX embeds."""
    count, size = len(batch.latents), batch.latents.shape[-2:]
    shift = backbone.shift_at(size) if sigmas.shift is None else sigmas.shift
    sites = len(own_layer_of_site(teacher) or range(backbone.num_sites))
    relevance, products = np.zeros(sites), np.zeros((sites, sites))
    for rows in torch.arange(count).split(_AT_ONCE):
        part = batch.take(rows)
        at = noised(part.latents, draw._replace(slots=part.slots), sigmas, shift)
        point, cond = (at.noisy_latents, at.sigmas, part.prompt_embeds), control_cond(part.cond_latents, part.mask)
        residuals = control_residuals(teacher, *point, cond, part.pooled_prompt_embeds, guidance=guidance)
        at_sites = expand_residuals(residuals, backbone.num_sites + 1, injection_of(teacher))[:-1]
        steered = partial(predict_velocity, backbone.transformer, *point, part.pooled_prompt_embeds)
        velocity = partial(steered, guidance=guidance)
        exact, share = velocity(at_sites).float(), len(rows) / count
        for site, residual in enumerate(at_sites):
            without = velocity([*at_sites[:site], torch.zeros_like(residual), *at_sites[site + 1 :]])
            relevance[site] += share * float((without.float() - exact).square().mean())
        flat = torch.stack(at_sites).float().flatten(1)
        products += share * (flat @ flat.T / flat.shape[1]).double().cpu().numpy()
    return Sites(relevance, products)


def relevant_placement(recipe: Recipe, backbone: Backbone, cache: Cache, device: torch.device | str) -> list[int]:
    """The layer of each site for a recipe's student of the backbone's teacher, measured on `SAMPLES` of a cache.

    The networks are measured on `device` and are on the CPU afterwards."""
    teacher, draw = backbone.pipeline.controlnet, Draw(recipe.student.seed, "placement", 0, range(SAMPLES))
    clean = next(name for name in ("latents", "completions", "cond_latents") if cache.has(name))
    encode = PromptMemory(backbone.encode_prompts) if recipe.data.prompts == "encode" else None
    batch = CacheBatches(cache, SAMPLES, 0.0, device, encode, x0=clean).batch(draw)
    networks = backbone.transformer, teacher
    for network in networks:
        network.to(device)
    measured = measure_sites(backbone, teacher, batch, draw, recipe.sigmas, recipe.sampler.guidance_scale)
    for network in networks:
        network.to("cpu")
    layers = list[int]()
    counts = (recipe.student.num_layers, recipe.student.num_single_layers)
    for kind, count in zip(find_family(backbone.transformer.config).sites, counts, strict=False):
        if count:  # each kind of block by itself
            of = slice(len(layers), len(layers) + kind.count)
            groups = relevant_layer_of_site(measured.relevance[of], measured.products[of, of], count)
            layers += [max(layers, default=-1) + 1 + layer for layer in groups]
    logger.info("student.placement relevance: the layers feed the sites %s", sites_of_layer(layers))
    return layers
