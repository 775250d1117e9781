"""Encoding shards into a cache, in three phases that a kill does not lose: pictures, prompts, completions.

What is encoded lies in `.NAME.partial` beside the cache until all is there. Every few hundred samples the arrays are
flushed and `state.json` says how far each phase is; the same call goes on from there and ends with the same bytes,
because the batches are the same.
"""

# N samples, P distinct prompts, B of a batch, h w latents, T text tokens

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from refine_control.config import SamplerConfig
from refine_control.data.compact import Layout, layout_of, pack, relative_error, unpack
from refine_control.data.records import UNLABELED, Photo
from refine_control.models.backbone import Backbone, masked_pixels
from refine_control.models.controlnet import mask_at_latents
from refine_control.pipeline import complete_latents
from refine_control.randomness import slot_normals
from refine_control.storage import finish_folder, fsync_path, storage_errors, write_json

SAMPLES = "samples.jsonl"
BATCH = 32
_STATE = "state.json"
_SECONDS_BETWEEN_SAVES = 30.0
Progress = Callable[[int, int, str], None]
PromptStorage = Literal["full", "int8"]


def photos_as_tensors(photos: Sequence[Photo]) -> tuple[torch.Tensor, torch.Tensor]:
    """Photos of one size -> pixel_values (B,3,H,W) in [-1, 1] and mask (B,1,H,W), 1 = inpaint."""
    images = torch.from_numpy(np.stack([p.image for p in photos])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.from_numpy(np.stack([p.mask for p in photos]))[:, None].float()


def to_numpy(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """bf16 travels as uint16, numpy having no such type."""
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    return tensor.view(torch.uint16).numpy() if dtype == torch.bfloat16 else tensor.numpy()


class CacheWriter:
    """One cache in the making; `described` is what its manifest will say and what a partial one must have said."""

    def __init__(self, out: Path, described: dict[str, Any], progress: Progress | None = None):
        self.out, self.described = out, described
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

    def read(self, name: str, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Rows that have been put, as fp32."""
        if name not in self.arrays:
            self.arrays[name] = np.lib.format.open_memmap(self.folder / f"{name}.npy", "r+")
        values = torch.from_numpy(np.ascontiguousarray(self.arrays[name][np.asarray(rows)]))
        return (values.view(torch.bfloat16) if values.dtype == torch.uint16 else values).float()

    def note(self, key: str, prompt: str) -> None:
        """The next sample's key and words."""
        self.samples.write(json.dumps({"key": key, "prompt": prompt}, ensure_ascii=False).encode() + b"\n")

    def phase(self, name: str, total: int, batch: Callable[[range], None]) -> None:
        """Calls `batch` for all rows that are not done yet, BATCH at a time, and saves now and then."""
        with storage_errors(self.out):
            for first in range(self.state["done"].get(name, 0), total, BATCH):
                rows = range(first, min(first + BATCH, total))
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


def write_pictures(writer: CacheWriter, photos: Sequence[Photo], backbone: Backbone, role: str, dtype: Any) -> None:
    """`masked_latents`, `masks` and, unless the role is unlabelled, `latents`."""
    total = len(photos)

    def batch(rows: range) -> None:
        chunk = [photos[row] for row in rows]
        pixels, mask = photos_as_tensors(chunk)
        latents = backbone.encode_images(masked_pixels(pixels, mask))
        writer.put("masked_latents", rows.start, total, to_numpy(latents, dtype))
        writer.put("masks", rows.start, total, mask_at_latents(mask, latents).to(torch.uint8).numpy())
        if role != UNLABELED:
            writer.put("latents", rows.start, total, to_numpy(backbone.encode_images(pixels), dtype))
        for photo in chunk:
            writer.note(photo.key, photo.prompt)

    writer.phase(role, total, batch)


def write_prompts(writer: CacheWriter, backbone: Backbone, dtype: Any, storage: PromptStorage) -> dict[str, Any]:
    """`prompt_index`, `prompt_embeds` (in 8 bits where wanted) and `pooled_prompt_embeds`, each prompt once.

    Returns what the manifest must say to read them."""
    _, prompts, numbers = numbered_prompts(writer.folder / SAMPLES)
    writer.put("prompt_index", 0, len(numbers), np.asarray(numbers, np.int32))
    layout: Layout | None = None
    errors = writer.state.setdefault("prompt_errors", [])

    def batch(rows: range) -> None:
        nonlocal layout
        embeds, pooled = (t.cpu() for t in backbone.encode_prompts([prompts[row] for row in rows]))
        if storage == "int8":
            if layout is None:
                layout = Layout(*writer.state.setdefault("prompt_layout", list(layout_of(embeds))))
            packed = pack(embeds, layout)
            writer.put("prompt_codes", rows.start, len(prompts), packed.codes.numpy())
            writer.put("prompt_scales", rows.start, len(prompts), packed.scales.numpy())
            errors.append([relative_error(kept, embeds) for kept in (unpack(packed, layout), embeds.bfloat16())])
        else:
            writer.put("prompt_embeds", rows.start, len(prompts), to_numpy(embeds, dtype))
        writer.put("pooled_prompt_embeds", rows.start, len(prompts), to_numpy(pooled, dtype))

    writer.phase("prompts", len(prompts), batch)
    if storage != "int8":
        return {}
    mean = np.mean(errors, 0)
    return {
        "prompt_layout": writer.state["prompt_layout"],
        "prompt_relative_error": {"int8": float(mean[0]), "bfloat16": float(mean[1])},
    }


def write_completions(
    writer: CacheWriter,
    backbone: Backbone,
    sampler: SamplerConfig,
    dtype: torch.dtype,
    read_prompts: Callable[[np.ndarray], torch.Tensor],
    total: int,
) -> None:
    """The teacher's completion of every sample; the noise of a sample is a function of (sampler.seed, row)."""
    index = writer.read("prompt_index", range(total)).long().numpy()

    def batch(rows: range) -> None:
        latents, mask = (writer.read(n, rows) for n in ("masked_latents", "masks"))
        numbers = index[rows.start : rows.stop]
        text, empty = (
            (read_prompts(n), writer.read("pooled_prompt_embeds", n)) for n in (numbers, np.zeros_like(numbers))
        )
        noise = slot_normals(latents.shape[1:], list(rows), sampler.seed, "completion")
        teacher = backbone.pipeline.controlnet
        painted = complete_latents(backbone, teacher, latents, mask, text, empty, sampler, noise)  # type: ignore[arg-type]
        writer.put("completions", rows.start, total, to_numpy(painted, dtype))

    writer.phase("completions", total, batch)
