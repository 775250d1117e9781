"""The cache: every image and prompt encoded once, then read by row from memory-mapped arrays.

Training never runs the VAE or a text encoder. A cache knows what made it; a cache of another model, or of
shards that have changed since, is refused. Each distinct prompt is stored once; prompt 0 is the empty one.
Samples of several sizes (`buckets`) are stored size by size: the rows of one size follow one another.
"""

# N samples, P distinct prompts, h w latents, T text tokens

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine_control.cache.compact import Layout, Packed, unpack
from refine_control.cache.writer import (
    SAMPLES,
    CacheWriter,
    Posterior,
    PromptStorage,
    Stored,
    numbered_prompts,
    row_groups,
    stored_name,
    to_numpy,
    write_pictures,
    write_prompts,
)
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models.backbone import Backbone
from refine_control.models.devices import pictures_at_once
from refine_control.models.fit import geometry
from refine_control.models.prompt_memory import PromptMemory
from refine_control.photos.buckets import Size, grouped, sizes_of
from refine_control.photos.shards import Shards
from refine_control.pipeline.painting import complete_latents
from refine_control.progress import Progress
from refine_control.randomness import slot_normals
from refine_control.records import LABELED, ROLES, UNLABELED, Photo
from refine_control.storage import MANIFEST, only_writer, read_manifest, sha256_file

CACHE_VERSION = 2
logger = logging.getLogger(__name__)


def completion_sampler(steps: int = 8, guidance: float = 1.0) -> SamplerConfig:
    """How the teacher completes D_ssl: with its residuals as in training, and unguided if nobody says otherwise.

    28 guided steps would cost nineteen epochs of the stage that reads them."""
    return SamplerConfig(num_inference_steps=steps, guidance_scale=guidance, conditioning_scale=1.0)


def model_mark(backbone: Backbone) -> str:
    """What a cache depends on in a model: its VAE, text encoders and number of T5 tokens, by hash of the weights."""
    import hashlib

    mark = hashlib.sha256(f"{CACHE_VERSION} {backbone.max_sequence_length}".encode())
    config = backbone.vae.config
    mark.update(f"{config['scaling_factor']} {config['shift_factor']}".encode())
    for part in (backbone.vae, *backbone.text_encoders):
        _update(mark, part)
    return mark.hexdigest()


def teacher_mark(backbone: Backbone) -> str:
    """What completions depend on beside the cache's model: transformer and ControlNet, by hash of the weights."""
    import hashlib

    mark = hashlib.sha256()
    for part in (backbone.transformer, backbone.pipeline.controlnet):
        _update(mark, part)
    return mark.hexdigest()


def _update(mark: Any, part: Any) -> None:
    for name, tensor in sorted(part.state_dict().items()):
        mark.update(name.encode())
        mark.update(tensor.detach().to(torch.float32).cpu().contiguous().numpy().tobytes())


def refuse_sizes(sizes: Iterable[Size], backbone: Backbone, *controlnets: Any) -> None:
    """Raises InvalidInputError for latents (h, w) that the transformer or a ControlNet has no positions for."""
    factor = backbone.pipeline.vae_scale_factor
    for h, w in sizes:
        for network in (backbone.transformer, backbone.pipeline.controlnet, *controlnets):
            geometry(backbone.vae.config, network.config).check(factor * h, factor * w)


def _warn_small(sizes: Iterable[Size], backbone: Backbone) -> None:
    """Says so where samples, latents (h, w), have less than half of the side that the model was made for."""
    longest = max(map(max, sizes)) * backbone.pipeline.vae_scale_factor
    if 2 * longest < backbone.side:
        logger.warning(
            "samples of %d pixels for a model of %d: build them with --size %d", longest, backbone.side, backbone.side
        )


def write_cache(
    photos: Sequence[Photo],
    out: Path,
    backbone: Backbone,
    role: str,
    *,
    source: dict[str, Any],
    progress: Progress | None = None,
    **stored: Any,
) -> None:
    """Encodes photos into `out`, replacing what is there only when whole; continues where it was killed.

    `stored` are fields of `Stored`. The role `unlabeled` stores no latents of the picture, only of the picture
    without its hole. Raises ValueError for an unknown role, InvalidInputError for an empty source and for sizes that
    the model has no positions for."""
    if role not in ROLES:
        raise ValueError(f"role is one of {ROLES}, not {role!r}")
    if not len(photos):
        raise InvalidInputError(f"nothing to cache for the role {role}; the source holds no sample")
    wanted, factor = Stored(**stored), backbone.pipeline.vae_scale_factor
    by_size = grouped((height // factor, width // factor) for height, width in sizes_of(photos))
    refuse_sizes(by_size, backbone)
    _warn_small(by_size, backbone)
    groups = row_groups({size: len(numbers) for size, numbers in by_size.items()})
    described: dict[str, Any] = {
        "kind": "cache",
        "role": role,
        "count": len(photos),
        "model": model_mark(backbone),
        "source": source,
        **wanted.described(),
    }
    if wanted.completions is not None:
        described["teacher"] = teacher_mark(backbone)
    if len(groups) > 1:
        described["sizes"] = [[*size, len(rows)] for size, rows in groups.items()]
    order = array("q", chain.from_iterable(by_size.values()))
    writer = CacheWriter(out, described, groups, progress)
    write_pictures(writer, lambda row: photos[order[row]], backbone, role, wanted)
    told = write_prompts(writer, backbone, wanted)
    if wanted.completions is not None:
        write_completions(writer, backbone, wanted, told.get("prompt_layout"))
    writer.finish(**told)


def _text_reader(
    writer: CacheWriter, backbone: Backbone, stored: Stored, layout: Sequence[Any] | None
) -> Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]:
    """Numbers of prompts -> prompt_embeds and pooled_prompt_embeds: as they are stored, else encoded."""
    if stored.prompts == "none":
        memory, prompts = PromptMemory(backbone.encode_prompts), numbered_prompts(writer.folder / SAMPLES)[1]
        return lambda numbers: memory([prompts[number] for number in numbers])

    def read(numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = writer.read("pooled_prompt_embeds", numbers)
        if layout is None:
            return writer.read("prompt_embeds", numbers), pooled
        packed = Packed(*(writer.read(name, numbers) for name in ("prompt_codes", "prompt_scales")))
        return unpack(packed, Layout(*layout)), pooled

    return read


def write_completions(
    writer: CacheWriter, backbone: Backbone, stored: Stored, layout: Sequence[Any] | None = None
) -> None:
    """The teacher's completion of every sample; the noise of a sample is a function of (sampler.seed, row).

    `layout` is that of prompt embeddings in 8 bits."""
    sampler, teacher = stored.completions or SamplerConfig(), backbone.pipeline.controlnet
    read_text, factor = _text_reader(writer, backbone, stored, layout), backbone.pipeline.vae_scale_factor
    total = sum(map(len, writer.groups.values()))
    index = writer.read("prompt_index", range(total)).long().numpy()

    def painted(rows: range) -> torch.Tensor:
        latents, mask = (writer.read_sized(n, rows) for n in ("masked_latents", "masks"))
        numbers = index[rows.start : rows.stop]
        text, empty = read_text(numbers), read_text(np.zeros_like(numbers))
        noise = slot_normals(latents.shape[1:], list(rows), sampler.seed, "completion")
        return complete_latents(backbone, teacher, latents, mask, text, empty, sampler, noise)  # type: ignore[arg-type]

    def batch(rows: range) -> None:
        height, width = (factor * side for side in writer.size_of(rows))
        count = pictures_at_once(backbone.device, height, width, len(rows))
        for first in range(0, len(rows), count):
            part = rows[first : first + count]
            writer.put_sized("completions", part, to_numpy(painted(part), stored.dtype))

    writer.phase("completions", writer.groups.values(), batch)


def build_cache(
    source: Path,
    out: Path,
    backbone: Backbone,
    dtype: torch.dtype = torch.float32,
    prompts: PromptStorage = "full",
    completions: SamplerConfig | None = None,
    progress: Progress | None = None,
    posterior: Posterior = "mean",
) -> bool:
    """Shards of one role -> a cache in `out`. False when `out` already is the cache of these shards and this model.

    Raises InvalidInputError when `source` holds no shards, or `out` holds something that is no cache."""
    if not (source / MANIFEST).is_file():
        raise InvalidInputError(f"{source} holds no shards; give the folder of one role, as `data build` writes it")
    shards = Shards(source)
    role = json.loads((source / MANIFEST).read_text())["role"]
    described = {"shards": sha256_file(source / MANIFEST)}
    stored = Stored(dtype, prompts, completions, posterior)
    with only_writer(out.with_name(f".{out.name}.writer")):
        had = read_manifest(out, verify=False) if (out / MANIFEST).is_file() else {}
        if had.get("kind") != "cache" and out.exists() and any(out.iterdir()):
            raise InvalidInputError(f"{out} holds something that is no cache; choose another folder")
        wanted = {"source": described, "posterior": posterior, **stored.described()}
        wanted |= {"teacher": teacher_mark(backbone)} if completions is not None else {}
        same = {key: {"posterior": "mean", **had}.get(key) for key in wanted} == wanted
        if had and same and had["model"] == model_mark(backbone):
            return False
        write_cache(shards, out, backbone, role, source=described, progress=progress, **stored._asdict())
    return True


class Cache:
    """A finished cache, opened for reading by row.

    Raises InvalidInputError when there is none, or it was made by another model, DamagedError when it is damaged."""

    def __init__(self, folder: Path, model: str | None = None):
        try:
            self.manifest = read_manifest(folder)
        except FileNotFoundError:
            raise InvalidInputError(
                f"{folder} is no cache; make it with `refine-control cache SHARDS {folder}`"
            ) from None
        if self.manifest.get("kind") != "cache":
            raise InvalidInputError(f"{folder} is no cache; make one with `refine-control cache`")
        if model is not None and self.manifest["model"] != model:
            raise InvalidInputError(
                f"the cache {folder} was made by another model (other VAE, text encoders or token count); make it again"
            )
        self.folder, self.role = folder, self.manifest["role"]
        self.bfloat16 = self.manifest["dtype"] == "bfloat16"
        self.arrays = {p.stem: np.load(p, mmap_mode="r") for p in sorted(folder.glob("*.npy"))}
        self.keys, self.prompts, _ = numbered_prompts(folder / SAMPLES)
        sizes = self.manifest.get("sizes") or [[*self.arrays["masks"].shape[2:], len(self)]]
        self.groups = row_groups({(h, w): count for h, w, count in sizes})
        """The rows of each latent size (h, w)."""

    def __len__(self) -> int:
        return self.manifest["count"]

    def has(self, name: str) -> bool:
        """Whether there is such an array, or one for each size."""
        return any(n in self.arrays for n in (name, *(stored_name(name, size) for size in self.groups)))

    def take(self, name: str, rows: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Rows of one array as a tensor (a copy); prompt embeddings that are stored in 8 bits come as fp32.

        Raises ValueError for rows of several sizes of what has h and w."""
        if name == "prompt_embeds" and "prompt_layout" in self.manifest:
            packed = Packed(*(self.take(part, rows) for part in ("prompt_codes", "prompt_scales")))
            return unpack(packed, Layout(*self.manifest["prompt_layout"]))
        if not self.has(name):
            raise InvalidInputError(f"the cache {self.folder} of role {self.role} has no {name}")
        stored, places = (name, np.asarray(rows)) if name in self.arrays else self._place(name, np.asarray(rows))
        values = np.ascontiguousarray(self.arrays[stored][places])
        if values.dtype == np.uint16 and self.bfloat16:
            return torch.from_numpy(values).view(torch.bfloat16)
        return torch.from_numpy(values)

    def _place(self, name: str, rows: np.ndarray) -> tuple[str, np.ndarray]:
        """The array of the size that all `rows` have, and where they are in it."""
        for size, group in self.groups.items():
            if ((rows >= group.start) & (rows < group.stop)).all():
                return stored_name(name, size), rows - group.start
        raise ValueError(f"{name} was asked for rows of several sizes")

    def require(self, role: str) -> Cache:
        """Itself, if it has the role; a labelled cache also serves as an unlabelled one (its latents are not read)."""
        if self.role != role and (self.role, role) != (LABELED, UNLABELED):
            raise InvalidInputError(f"{self.folder} is a cache of role {self.role}; this needs {role}")
        return self
