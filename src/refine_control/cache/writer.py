"""Encoding shards into a cache, in three phases that a kill does not lose: pictures, prompts, completions.

What is encoded lies in `.NAME.partial` beside the cache until all is there. Every few hundred samples the arrays are
flushed and `state.json` says how far each phase is; the same call goes on from there and ends with the same bytes,
because the batches are the same.

Samples of several sizes are put in the order of their sizes, and what has h and w is an array for each size:
`latents-6x10.npy` holds the latents (16, 6, 10) of the rows of its size, in their order.
"""

# N samples, P distinct prompts, B of a batch, h w latents, T text tokens

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from refine_control.cache.compact import Layout, layout_of, pack, relative_error, unpack
from refine_control.conditions.inpainting import mask_at_latents, masked_pixels
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models.backbone import Backbone, by_parts
from refine_control.photos.buckets import Size, grouped
from refine_control.pixels import from_images
from refine_control.progress import Progress
from refine_control.records import UNLABELED, Photo
from refine_control.storage import finish_folder, fsync_path, storage_errors, write_json

SAMPLES = "samples.jsonl"
BATCH = 32
_STATE = "state.json"
_SECONDS_BETWEEN_SAVES = 30.0
PromptStorage = Literal["full", "int8", "none"]
Posterior = Literal["mean", "mean_std"]


class Stored(NamedTuple):
    """What a cache of the same shards and model may differ in."""

    dtype: torch.dtype = torch.float32
    prompts: PromptStorage = "full"
    """Embeddings in `dtype`, in 8 bits (`compact`), or none, to be encoded in training."""
    completions: SamplerConfig | None = None
    """How the model's own ControlNet (the teacher) paints every hole once."""
    posterior: Posterior = "mean"
    """mean_std: beside the mean of the VAE's posterior its standard deviation, for training to draw from."""

    def described(self) -> dict[str, Any]:
        """For the manifest; `posterior` where it is not the mean alone, so that other caches stay what they were."""
        painted = self.completions.model_dump(mode="json") if self.completions else None
        told = {"dtype": str(self.dtype).removeprefix("torch."), "prompts": self.prompts, "completions": painted}
        return told if self.posterior == "mean" else {**told, "posterior": self.posterior}


def row_groups(sizes: Mapping[Size, int]) -> dict[Size, range]:
    """The rows of each size, from the number of samples of each in the order of the rows."""
    groups, first = {}, 0
    for size, count in sizes.items():
        groups[size] = range(first, first + count)
        first += count
    return groups


def stored_name(name: str, size: Size) -> str:
    """The array of `name` for one of several sizes (h, w)."""
    return f"{name}-{size[0]}x{size[1]}"


def photos_as_tensors(photos: Sequence[Photo]) -> tuple[torch.Tensor, torch.Tensor]:
    """Photos of one size -> pixel_values (B,3,H,W) in [-1, 1] and mask (B,1,H,W), 1 = inpaint.

    Raises InvalidInputError where they have several."""
    sizes = grouped(photo.mask.shape for photo in photos)
    if len(sizes) > 1:
        told = ", ".join(f"{width} x {height}" for height, width in sizes)
        raise InvalidInputError(f"samples of several sizes ({told}) are no batch; take those of one size")
    images = from_images(np.stack([p.image for p in photos]))
    return images, torch.from_numpy(np.stack([p.mask for p in photos]))[:, None].float()


def to_numpy(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """bf16 travels as uint16, numpy having no such type."""
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    return tensor.view(torch.uint16).numpy() if dtype == torch.bfloat16 else tensor.numpy()


class CacheWriter:
    """One cache in the making; `described` is what its manifest will say and what a partial one must have said.

    `groups` are the rows of each latent size (`row_groups`)."""

    def __init__(
        self, out: Path, described: dict[str, Any], groups: Mapping[Size, range], progress: Progress | None = None
    ):
        self.out, self.described, self.groups = out, described, groups
        self.progress = progress or (lambda done, total, word: None)
        self.folder = out.with_name(f".{out.name}.partial")
        with storage_errors(out):
            state = self._read_state()
            if state is None:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                state = {"described": described, "done": {}, "bytes": 0, "arrays": []}
            self.state = state
            (self.folder / SAMPLES).touch()
            os.truncate(self.folder / SAMPLES, self.state["bytes"])
            self.samples = (self.folder / SAMPLES).open("ab")
        self.arrays: dict[str, np.memmap] = {}
        self.saved = time.monotonic()

    def _read_state(self) -> dict[str, Any] | None:
        """How far an earlier run came with the same cache; None where there is none, or another one."""
        try:
            state = json.loads((self.folder / _STATE).read_text())
            return state if state["described"] == self.described else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, name: str, first: int, total: int, values: np.ndarray) -> None:
        """Rows `first ...` of the array `name`, which has `total` rows."""
        if name not in self.arrays:
            path = self.folder / f"{name}.npy"
            if name in self.state["arrays"]:
                self.arrays[name] = np.lib.format.open_memmap(path, "r+")
            else:
                self.arrays[name] = np.lib.format.open_memmap(path, "w+", values.dtype, (total, *values.shape[1:]))
        self.arrays[name][first : first + len(values)] = values

    def put_sized(self, name: str, rows: range, values: np.ndarray) -> None:
        """`rows`, all of one size, of what has h and w."""
        stored, first, total = self._place(name, rows)
        self.put(stored, first, total, values)

    def read_sized(self, name: str, rows: range) -> torch.Tensor:
        """As `read`, of what `put_sized` has put."""
        stored, first, _ = self._place(name, rows)
        return self.read(stored, range(first, first + len(rows)))

    def size_of(self, rows: range) -> Size:
        """The latent size (h, w) of `rows`, which is one."""
        return next(size for size, group in self.groups.items() if rows.start in group)

    def _place(self, name: str, rows: range) -> tuple[str, int, int]:
        """The array that holds `rows`, the first of them in it, and how many it has."""
        size = self.size_of(rows)
        group = self.groups[size]
        stored = name if len(self.groups) == 1 else stored_name(name, size)
        return stored, rows.start - group.start, len(group)

    def read(self, name: str, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Rows that have been put, as fp32."""
        if name not in self.arrays:
            self.arrays[name] = np.lib.format.open_memmap(self.folder / f"{name}.npy", "r+")
        values = torch.from_numpy(np.ascontiguousarray(self.arrays[name][np.asarray(rows)]))
        return (values.view(torch.bfloat16) if values.dtype == torch.uint16 else values).float()

    def note(self, key: str, prompt: str) -> None:
        """The next sample's key and words."""
        self.samples.write(json.dumps({"key": key, "prompt": prompt}, ensure_ascii=False).encode() + b"\n")

    def phase(self, name: str, groups: Iterable[range], batch: Callable[[range], None]) -> None:
        """Calls `batch` for all rows that are not done yet, BATCH of a group at a time, and saves now and then."""
        batches = [
            range(first, min(first + BATCH, group.stop))
            for group in groups
            for first in range(group.start, group.stop, BATCH)
        ]
        total = batches[-1].stop if batches else 0
        with storage_errors(self.out):
            for rows in batches:
                if rows.stop <= self.state["done"].get(name, 0):
                    continue
                batch(rows)
                self.state["done"][name] = rows.stop
                if rows.stop == total or time.monotonic() - self.saved > _SECONDS_BETWEEN_SAVES:
                    self.save()
                self.progress(rows.stop, total, name)

    def save(self) -> None:
        """Everything put so far outlives a kill from here on."""
        for array in self.arrays.values():
            array.flush()
        self.samples.flush()
        fsync_path(self.folder / SAMPLES)
        self.state["arrays"] = sorted({*self.state["arrays"], *self.arrays})
        self.state["bytes"] = (self.folder / SAMPLES).stat().st_size
        write_json(self.folder / _STATE, self.state)
        self.saved = time.monotonic()

    def finish(self, **described: Any) -> None:
        """Publishes the cache."""
        self.arrays = {}
        self.samples.close()
        (self.folder / _STATE).unlink()
        finish_folder(self.folder, self.out, **self.described, **described)


def numbered_prompts(samples: Path) -> tuple[list[str], list[str], list[int]]:
    """`samples.jsonl` -> the keys, the distinct prompts (number 0 is the empty one), and each sample's number."""
    keys, numbers, prompts = [], [], {"": 0}
    with samples.open("rb") as lines:
        for line in lines:
            sample = json.loads(line)
            keys.append(sample["key"])
            numbers.append(prompts.setdefault(sample["prompt"], len(prompts)))
    return keys, list(prompts), numbers


@torch.no_grad()
def encode_posterior(vae: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,3,H,W) in [-1, 1] -> mean and standard deviation of the latents (B,16,h,w), shifted and scaled.

    The mean is that of `Backbone.encode_images`, bit for bit."""

    def both(pixels: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        factor = vae.config["scaling_factor"]
        return torch.cat([(posterior.mean - vae.config["shift_factor"]) * factor, posterior.std * factor], 1)

    mean, std = by_parts(vae, both, pixel_values).chunk(2, 1)
    return mean, std


def write_pictures(
    writer: CacheWriter, photo: Callable[[int], Photo], backbone: Backbone, role: str, stored: Stored
) -> None:
    """`masked_latents`, `masks` and, unless the role is unlabelled, `latents`; `photo` gives the sample of a row.

    With the posterior mean_std also `masked_latents_std` and `latents_std`."""

    def put_latents(name: str, rows: range, pixels: torch.Tensor) -> torch.Tensor:
        if stored.posterior == "mean":
            latents = backbone.encode_images(pixels)
        else:
            latents, std = encode_posterior(backbone.vae, pixels)
            writer.put_sized(f"{name}_std", rows, to_numpy(std, stored.dtype))
        writer.put_sized(name, rows, to_numpy(latents, stored.dtype))
        return latents

    def batch(rows: range) -> None:
        chunk = [photo(row) for row in rows]
        pixels, mask = photos_as_tensors(chunk)
        latents = put_latents("masked_latents", rows, masked_pixels(pixels, mask))
        writer.put_sized("masks", rows, mask_at_latents(mask, latents).to(torch.uint8).numpy())
        if role != UNLABELED:
            put_latents("latents", rows, pixels)
        for each in chunk:
            writer.note(each.key, each.prompt)

    writer.phase(role, writer.groups.values(), batch)


def write_prompts(writer: CacheWriter, backbone: Backbone, stored: Stored) -> dict[str, Any]:
    """`prompt_index` and, unless there are to be none, `prompt_embeds` (in 8 bits where wanted) and
    `pooled_prompt_embeds`, each prompt once.

    Returns what the manifest must say to read them."""
    _, prompts, numbers = numbered_prompts(writer.folder / SAMPLES)
    writer.put("prompt_index", 0, len(numbers), np.asarray(numbers, np.int32))
    if stored.prompts == "none":
        return {}
    backbone.warn_unread(prompts)
    layout: Layout | None = None
    errors = writer.state.setdefault("prompt_errors", [])

    def batch(rows: range) -> None:
        nonlocal layout
        embeds, pooled = (t.cpu() for t in backbone.encode_prompts([prompts[row] for row in rows]))
        if stored.prompts == "int8":
            if layout is None:
                layout = Layout(*writer.state.setdefault("prompt_layout", list(layout_of(embeds))))
            packed = pack(embeds, layout)
            writer.put("prompt_codes", rows.start, len(prompts), packed.codes.numpy())
            writer.put("prompt_scales", rows.start, len(prompts), packed.scales.numpy())
            errors.append([relative_error(kept, embeds) for kept in (unpack(packed, layout), embeds.bfloat16())])
        else:
            writer.put("prompt_embeds", rows.start, len(prompts), to_numpy(embeds, stored.dtype))
        writer.put("pooled_prompt_embeds", rows.start, len(prompts), to_numpy(pooled, stored.dtype))

    writer.phase("prompts", [range(len(prompts))], batch)
    if stored.prompts != "int8":
        return {}
    mean = np.mean(errors, 0)
    return {
        "prompt_layout": writer.state["prompt_layout"],
        "prompt_relative_error": {"int8": float(mean[0]), "bfloat16": float(mean[1])},
    }
