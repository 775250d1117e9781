"""Encoding samples into a cache, in three phases: pictures, prompts, completions by the teacher.

A cache knows what made it; a cache of another model, or of shards that have changed since, is made again.
"""

# N samples, P distinct prompts, B of a batch, h w latents, T text tokens

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from refine_control.cache.compact import Layout, Packed, find_layout, pack, relative_error, unpack
from refine_control.cache.marks import model_mark, teacher_mark
from refine_control.cache.stored import (
    SAMPLES,
    Posterior,
    PromptStorage,
    Stored,
    numbered_prompts,
    row_groups,
    shown_array,
)
from refine_control.cache.writer import CacheWriter, to_numpy
from refine_control.conditions.condition import (
    INPAINT,
    check_condition,
    control_cond,
    find_condition,
    has_region,
    mask_at_latents,
    show,
    take_condition,
)
from refine_control.config import Precision, SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.folders import ONE_ROLE, Kind, refuse_other_kind, refuse_output_kind
from refine_control.models.backbone import Backbone, by_parts
from refine_control.models.cpu_kernels import in_precision
from refine_control.models.devices import best_device, pictures_at_once
from refine_control.models.families import Encoding, condition_encoding
from refine_control.models.fit import geometry
from refine_control.models.loading import has_controlnet, load_backbone, load_controlnet
from refine_control.models.prompt_memory import PromptMemory
from refine_control.photos.buckets import Size, grouped, sizes_of
from refine_control.photos.shards import Shards, open_manifest
from refine_control.pipeline.painting import asks_twice, sampling_path
from refine_control.pixels import from_images
from refine_control.progress import Progress
from refine_control.randomness import slot_normals
from refine_control.records import ROLES, UNLABELED, Photo
from refine_control.storage import MANIFEST, check_output_folder, only_writer, read_manifest, sha256_file, sweep_beside

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
logger = logging.getLogger(__name__)
Note = Callable[[str], object]
"""Called once with what completions cost, before any work is done."""


def completion_sampler(
    steps: int = 8, guidance: float = 1.0, even: bool = False, precision: Precision = "fp32"
) -> SamplerConfig:
    """The sampler of the teacher's completions: unscaled residuals, as in training, no guidance by default.

    28 guided steps would cost as much as nineteen epochs of the stage that reads them. `even` noise levels are those
    of paths."""
    sigmas: Literal["even", "scheduler"] = "even" if even else "scheduler"
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "sigmas": sigmas}
    return SamplerConfig(**options, conditioning_scale=1.0, precision=precision)


def refuse_sizes(sizes: Iterable[Size], backbone: Backbone, *controlnets: Any) -> None:
    """Raises InvalidInputError for latents (h, w) that the transformer or a ControlNet has no positions for."""
    factor = backbone.pipeline.vae_scale_factor
    networks = [backbone.transformer, backbone.pipeline.controlnet, *controlnets]
    for h, w in sizes:
        for network in (each for each in networks if each is not None):
            geometry(backbone.vae.config, network.config).check(factor * h, factor * w)


def encoding_of(backbone: Backbone, condition: str) -> Encoding:
    """How a condition's pictures are encoded: as the model's ControlNet has it, where that takes the condition, else
    as stock has it for one of FLUX, or of SD3 that reads no pooled projection."""
    controlnet, region = backbone.pipeline.controlnet, find_condition(condition).region
    fits = controlnet is not None and has_region(controlnet.config) == region
    if controlnet is not None and fits:
        return condition_encoding({**controlnet.config, "condition": condition})
    return Encoding(region or backbone.is_flux)


def write_cache(
    photos: Sequence[Photo],
    out: Path,
    backbone: Backbone,
    role: str,
    *,
    source: Mapping[str, str],
    condition: str = INPAINT,
    progress: Progress | None = None,
    note: Note = logger.info,
    **stored: Any,
) -> bool:
    """Encodes photos of a condition into `out`, replacing an older cache only when all is done; continues a killed run.

    False when `out` already is this cache. `stored` are fields of `Stored`. The role `unlabeled` stores no latents of
    the picture, only of the condition. Raises ValueError for an unknown role, InvalidInputError for an
    empty source, for sizes that the model has no positions for, and what `Stored.check` raises."""
    if role not in ROLES:
        raise ValueError(f"role is one of {ROLES}, not {role!r}")
    if not len(photos):
        raise InvalidInputError(f"nothing to cache for the role {role}; the source holds no sample")
    options, factor = Stored(**stored).check(), backbone.pipeline.vae_scale_factor
    by_size = grouped((height // factor, width // factor) for height, width in sizes_of(photos))
    refuse_sizes(by_size, backbone)
    groups = row_groups({size: len(numbers) for size, numbers in by_size.items()})
    described = {"kind": "cache", "role": role, "count": len(photos), "source": source, **options.described()}
    region, teacher = find_condition(condition).region, backbone.pipeline.controlnet
    described |= {"condition": condition} if condition != INPAINT else {}
    if teacher is not None and options.completions is not None:
        check_condition(teacher.config, condition, "the model, which paints the completions,")
    encoding = encoding_of(backbone, condition)
    described |= {"shift": encoding.shift} if encoding.shift != region else {}
    described |= {"levels": list(encoding.levels)} if encoding.levels != Encoding().levels else {}
    described["model"] = model_mark(backbone)
    if options.completions is not None:
        described["teacher"] = teacher_mark(backbone)
    if len(groups) > 1:
        described["sizes"] = [[*size, len(rows)] for size, rows in groups.items()]
    if (out / MANIFEST).is_file():
        defaults: dict[str, object] = {"posterior": "mean", "path": 0}
        previous = {**defaults, **read_manifest(out, verify=False)}
        if all(previous.get(key) == value for key, value in {**defaults, **described}.items()):
            return False
    longest, side = max(map(max, groups)) * factor, backbone.geometry.side
    if 2 * longest < side:
        logger.warning("samples of %d pixels for a model of %d: build them with --size %d", longest, side, side)
    order = array("q", chain.from_iterable(by_size.values()))
    writer = CacheWriter(out, described, groups, progress)
    if options.completions is not None:
        note(completions_cost(writer, backbone, options.completions, options))
    write_pictures(writer, lambda row: photos[order[row]], backbone, role, options, encoding)
    prompt_facts = write_prompts(writer, backbone, options)
    if options.completions is not None:
        write_completions(writer, backbone, options.completions, options, region)
    writer.finish(**prompt_facts)
    return True


def _read_text(writer: CacheWriter, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of prompts -> prompt_embeds and pooled_prompt_embeds, as stored."""
    pooled = writer.read("pooled_prompt_embeds", numbers)
    if (layout := writer.state.prompt_layout) is None:
        return writer.read("prompt_embeds", numbers), pooled
    packed = Packed(*(writer.read(name, numbers) for name in ("prompt_codes", "prompt_scales")))
    return unpack(packed, Layout(*layout)), pooled


def path_noise(shape: Sequence[int], rows: Sequence[int], seed: int) -> torch.Tensor:
    """The noise (B, *shape) in which the completions of these rows begin; `seed` is the sampler's."""
    return slot_normals(shape, rows, seed, "completion")


def completions_cost(writer: CacheWriter, backbone: Backbone, sampler: SamplerConfig, stored: Stored) -> str:
    """What is left of a cache's completions: samples, calls of the networks (two a step with guidance) and GB."""
    done, count = writer.state.done.get("completions", 0), sum(map(len, writer.groups.values()))
    left = {size: range(max(rows.start, done), rows.stop) for size, rows in writer.groups.items()}
    calls = (count - done) * sampler.num_inference_steps * (2 if asks_twice(backbone, sampler) else 1)
    numbers = sum(len(rows) * math.prod(size) for size, rows in left.items()) * max(1, stored.path)
    size = numbers * backbone.latent_channels * stored.dtype.itemsize / 1e9
    samples = f"{count} samples" if not done else f"{count - done} of {count} samples remain"
    return f"completions: {samples}, {calls} calls of the ControlNet and the transformer, {size:.2g} GB"


@torch.no_grad()
def write_completions(
    writer: CacheWriter, backbone: Backbone, sampler: SamplerConfig, stored: Stored, region: bool = True
) -> None:
    """The teacher's completion of every sample and, with `stored.path`, its way there below pure noise, (N,K-1,16,h,w).

    The noise of a sample is `path_noise`. Casts transformer and teacher where the sampler's precision is bf16."""
    memory, prompts = PromptMemory(backbone.encode_prompts), numbered_prompts(writer.folder / SAMPLES)[1]
    factor, teacher = backbone.pipeline.vae_scale_factor, cast(Any, backbone.pipeline.controlnet)
    if sampler.precision == "bf16":
        in_precision("bf16", backbone, teacher)
    index = writer.read("prompt_index", range(sum(map(len, writer.groups.values())))).long().numpy()

    def batch(rows: range) -> None:
        height, width = (factor * side for side in writer.latent_size(rows))
        count = pictures_at_once(backbone.device, height, width, len(rows))
        for part in (rows[first : first + count] for first in range(0, len(rows), count)):
            latents = writer.read_sized(shown_array(region), part)
            cond = control_cond(latents, writer.read_sized("masks", part) if region else None)
            each = (index[part.start : part.stop], np.zeros(len(part), int))  # the samples' prompts, and the empty one
            if stored.prompts == "none":
                text, empty = (memory([prompts[number] for number in numbers]) for numbers in each)
            else:
                text, empty = (_read_text(writer, numbers) for numbers in each)
            noise = path_noise(latents.shape[1:], part, sampler.seed)
            points = list(sampling_path(backbone, teacher, cond, text, empty, sampler, noise))
            writer.put_sized("completions", part, to_numpy(points[-1], stored.dtype))
            if stored.path > 1:
                apart = sampler.num_inference_steps // stored.path
                path = torch.stack(points[apart - 1 : -1 : apart], 1)
                writer.put_sized("path", part, to_numpy(path, stored.dtype))

    writer.phase("completions", writer.groups.values(), batch)


def check_folders(source: Path, out: Path) -> None:
    """Raises InvalidInputError where `source` holds no shards of one role, or `out` something that is no cache.

    Reads no weights and no shards, so that a wrong path is refused at once."""
    refuse_other_kind(source, ONE_ROLE)
    if not (source / MANIFEST).is_file():
        raise InvalidInputError(f"{source} holds no shards; give the folder of one role, as `data build` writes it")
    check_output_folder(out)
    refuse_output_kind(out, Kind.CACHE)
    if out.exists() and not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise InvalidInputError(f"{out} holds something that is no cache; choose another folder")


def cache_folder(
    source: Path,
    out: Path,
    model: str,
    *,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    prompts: PromptStorage = "full",
    teacher: str | None = None,
    complete: int = 0,
    guidance: float = 1.0,
    path: int = 0,
    posterior: Posterior = "mean",
    precision: Precision = "fp32",
    progress: Progress | None = None,
    note: Note = logger.info,
) -> bool:
    """`build_cache` with the model of this name, and completions of `complete` steps by `teacher` or its own.

    Folders and options are checked before the model is loaded. Raises what `build_cache` and the loaders raise."""
    check_folders(source, out)
    sampler = completion_sampler(complete, guidance, path > 0, precision) if complete else None
    stored, painting = Stored(_DTYPES[dtype], prompts, sampler, path, posterior).check(), sampler is not None
    controlnet = load_controlnet(teacher) if teacher else None
    if controlnet is not None and teacher:
        take_condition(controlnet, open_manifest(source).get("condition", INPAINT), teacher)
    if not painting and (guidance != 1 or precision != "fp32"):
        logger.warning("guidance and precision are those of completions; without --complete they change nothing")
    controlled = painting or controlnet is not None or has_controlnet(model)
    how = {"cpu_kernels": painting, "device": best_device(), "painting": painting, "controlled": controlled}
    backbone = load_backbone(model, controlnet, controlnet_name=teacher, **how)
    return build_cache(source, out, backbone, progress, note=note, **stored._asdict())


def build_cache(source: Path, out: Path, backbone: Backbone, progress: Progress | None = None, **stored: Any) -> bool:
    """Shards of one role -> a cache in `out`. False when `out` already is the cache of these shards and this model.

    `stored` are fields of `Stored`, and `note`. Raises as `check_folders` and `write_cache`."""
    check_folders(source, out)
    shards = Shards(source)
    options = {"source": {"shards": sha256_file(source / MANIFEST)}, "condition": shards.condition, **stored}
    options["progress"] = progress
    with only_writer(out.with_name(f".{out.name}.writer")):
        sweep_beside(out)
        return write_cache(shards, out, backbone, shards.manifest["role"], **options)


@torch.no_grad()
def encode_posterior(vae: Any, pixel_values: torch.Tensor, shift: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,3,H,W) in [-1, 1] -> mean and standard deviation of the latents (B,16,h,w), shifted and scaled.

    The mean is that of `Backbone.encode_images`, bit for bit."""

    def both(pixels: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        factor = vae.config["scaling_factor"]
        mean = posterior.mean - vae.config["shift_factor"] * shift
        return torch.cat([mean * factor, posterior.std * factor], 1)

    mean, std = by_parts(vae, both, pixel_values).chunk(2, 1)
    return mean, std


def write_pictures(
    writer: CacheWriter,
    photo: Callable[[int], Photo],
    backbone: Backbone,
    role: str,
    stored: Stored,
    encoding: Encoding,
) -> None:
    """Writes the condition's latents, with a region `masks`, and `latents` unless the role is unlabelled.

    `photo(row)` is a sample, `encoding` that of the condition. With mean_std both latents' deviations as well."""

    def put_latents(name: str, rows: range, pixels: torch.Tensor, shift: bool = True) -> torch.Tensor:
        if stored.posterior == "mean":
            latents = backbone.encode_images(pixels, shift)
        else:
            latents, std = encode_posterior(backbone.vae, pixels, shift)
            writer.put_sized(f"{name}_std", rows, to_numpy(std, stored.dtype))
        writer.put_sized(name, rows, to_numpy(latents, stored.dtype))
        return latents

    def batch(rows: range) -> None:
        chunk = [photo(row) for row in rows]
        pixels, mask = show(chunk).tensors()
        latents = put_latents(shown_array(mask is not None), rows, encoding.pixels(pixels), encoding.shift)
        if mask is not None:
            writer.put_sized("masks", rows, mask_at_latents(mask, latents).to(torch.uint8).numpy())
        if role != UNLABELED:
            put_latents("latents", rows, from_images(np.stack([each.image for each in chunk])))
        for each in chunk:
            writer.note(each.key, each.prompt)

    writer.phase(role, writer.groups.values(), batch)


def write_prompts(writer: CacheWriter, backbone: Backbone, stored: Stored) -> dict[str, object]:
    """Writes `prompt_index` and, unless `stored.prompts` is none, `prompt_embeds` and `pooled_prompt_embeds`.

    Returns the fields of the manifest that reading them needs."""
    _, prompts, numbers = numbered_prompts(writer.folder / SAMPLES)
    writer.put("prompt_index", 0, len(numbers), np.asarray(numbers, np.int32))
    if stored.prompts == "none":
        return {}
    backbone.warn_unread(prompts)
    state = writer.state

    def batch(rows: range) -> None:
        embeds, pooled = (t.cpu() for t in backbone.encode_prompts([prompts[row] for row in rows]))
        arrays = {"pooled_prompt_embeds": to_numpy(pooled, stored.dtype)}
        if stored.prompts == "int8":
            state.prompt_layout = state.prompt_layout or list(find_layout(embeds))
            layout = Layout(*state.prompt_layout)
            packed = pack(embeds, layout)
            arrays |= {"prompt_codes": packed.codes.numpy(), "prompt_scales": packed.scales.numpy()}
            kept = (unpack(packed, layout), embeds.bfloat16())
            state.prompt_errors.append([relative_error(each, embeds) for each in kept])
        else:
            arrays["prompt_embeds"] = to_numpy(embeds, stored.dtype)
        for name, values in arrays.items():
            writer.put(name, rows.start, len(prompts), values)

    writer.phase("prompts", [range(len(prompts))], batch)
    if stored.prompts != "int8":
        return {}
    errors = dict(zip(("int8", "bfloat16"), map(float, np.mean(state.prompt_errors, 0)), strict=True))
    return {"prompt_layout": state.prompt_layout, "prompt_relative_error": errors}
