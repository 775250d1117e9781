"""The cache: every image and prompt encoded once, then read by row from memory-mapped arrays.

Training never runs the VAE or a text encoder. A cache knows what made it; a cache of another model, or of
shards that have changed since, is refused. Each distinct prompt is stored once; prompt 0 is the empty one.
"""

# N samples, P distinct prompts, h w latents, T text tokens

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine_control.config import SamplerConfig
from refine_control.data.records import LABELED, ROLES, UNLABELED, Photo
from refine_control.errors import DamagedError, InvalidInputError
from refine_control.models.backbone import Backbone, masked_pixels
from refine_control.models.controlnet import mask_at_latents
from refine_control.pipeline import complete_latents
from refine_control.randomness import slot_normals
from refine_control.storage import MANIFEST, only_writer, publish_folder, read_manifest, sha256_file

CACHE_VERSION = 1
_BATCH = 32
Progress = Callable[[int, int, str], None]


def model_mark(backbone: Backbone) -> str:
    """What a cache depends on in a model: its VAE, text encoders and number of T5 tokens, by hash of the weights."""
    import hashlib

    mark = hashlib.sha256(f"{CACHE_VERSION} {backbone.max_sequence_length}".encode())
    config = backbone.vae.config
    mark.update(f"{config['scaling_factor']} {config['shift_factor']}".encode())
    for part in (backbone.vae, *backbone.text_encoders):
        for name, tensor in sorted(part.state_dict().items()):
            mark.update(name.encode())
            mark.update(tensor.detach().to(torch.float32).cpu().contiguous().numpy().tobytes())
    return mark.hexdigest()


def photos_as_tensors(photos: Sequence[Photo]) -> tuple[torch.Tensor, torch.Tensor]:
    """Photos of one size -> pixel_values (B,3,H,W) in [-1, 1] and mask (B,1,H,W), 1 = inpaint."""
    images = torch.from_numpy(np.stack([p.image for p in photos])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.from_numpy(np.stack([p.mask for p in photos]))[:, None].float()


def _to_numpy(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """bf16 travels as uint16, numpy having no such type."""
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    return tensor.view(torch.uint16).numpy() if dtype == torch.bfloat16 else tensor.numpy()


class _Writer:
    """Arrays that grow by batches and end as .npy files."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count, self.arrays = folder, count, {}

    def put(self, name: str, first: int, values: np.ndarray) -> None:
        if name not in self.arrays:
            shape = (self.count, *values.shape[1:])
            self.arrays[name] = np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", values.dtype, shape)
        self.arrays[name][first : first + len(values)] = values

    def close(self) -> None:
        for array in self.arrays.values():
            array.flush()
        self.arrays = {}


def write_cache(
    photos: Iterable[Photo],
    count: int,
    out: Path,
    backbone: Backbone,
    role: str,
    *,
    source: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    completions: SamplerConfig | None = None,
    progress: Progress | None = None,
) -> None:
    """Encodes `count` photos of one size into `out`, replacing what is there only when whole.

    With `completions` the model's own ControlNet (the teacher) also paints every hole once.
    The role `unlabeled` stores no latents of the picture, only of the picture without its hole.
    Raises ValueError for an unknown role, InvalidInputError for an empty source."""
    if role not in ROLES:
        raise ValueError(f"role is one of {ROLES}, not {role!r}")
    if count < 1:
        raise InvalidInputError(f"nothing to cache for the role {role}; the source holds no sample")
    prompts: dict[str, int] = {"": 0}
    keys: list[str] = []
    rows = iter(photos)
    described = {
        "kind": "cache",
        "role": role,
        "count": count,
        "dtype": str(dtype).removeprefix("torch."),
        "model": model_mark(backbone),
        "source": source,
        "completions": completions.model_dump(mode="json") if completions else None,
    }
    with publish_folder(out, **described) as folder:
        writer = _Writer(folder, count)
        while chunk := list(islice(rows, _BATCH)):
            first = len(keys)
            pixels, mask = photos_as_tensors(chunk)
            latents = backbone.encode_images(masked_pixels(pixels, mask))
            writer.put("masked_latents", first, _to_numpy(latents, dtype))
            writer.put("masks", first, mask_at_latents(mask, latents).to(torch.uint8).numpy())
            if role != UNLABELED:
                writer.put("latents", first, _to_numpy(backbone.encode_images(pixels), dtype))
            numbers = [prompts.setdefault(p.prompt, len(prompts)) for p in chunk]
            writer.put("prompt_index", first, np.asarray(numbers, np.int32))
            keys += [p.key for p in chunk]
            if progress:
                progress(len(keys), count, role)
        if len(keys) != count:
            raise DamagedError(f"the source of {out} promised {count} samples and gave {len(keys)}; build it again")
        texts = list(prompts)
        text_writer = _Writer(folder, len(texts))
        for first in range(0, len(texts), _BATCH):
            embeds, pooled = backbone.encode_prompts(texts[first : first + _BATCH])
            text_writer.put("prompt_embeds", first, _to_numpy(embeds, dtype))
            text_writer.put("pooled_prompt_embeds", first, _to_numpy(pooled, dtype))
        if completions is not None:
            _write_completions(writer, text_writer, backbone, completions, dtype, progress)
        writer.close()
        text_writer.close()
        (folder / "samples.json").write_text(json.dumps({"keys": keys, "prompts": texts}, ensure_ascii=False))


def _write_completions(
    writer: _Writer,
    text_writer: _Writer,
    backbone: Backbone,
    sampler: SamplerConfig,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    """The teacher's completion of every sample; the noise of a sample is a function of (sampler.seed, row)."""

    def read(name: str, rows: np.ndarray, arrays: dict[str, np.ndarray]) -> torch.Tensor:
        values = torch.from_numpy(np.ascontiguousarray(arrays[name][rows]))
        return (values.view(torch.bfloat16) if values.dtype == torch.uint16 else values).float()

    for first in range(0, writer.count, _BATCH):
        rows = np.arange(first, min(first + _BATCH, writer.count))
        latents, mask = (read(n, rows, writer.arrays) for n in ("masked_latents", "masks"))
        numbers = np.asarray(writer.arrays["prompt_index"][rows])
        names = ("prompt_embeds", "pooled_prompt_embeds")
        text = tuple(read(n, numbers, text_writer.arrays) for n in names)
        empty = tuple(read(n, np.zeros_like(numbers), text_writer.arrays) for n in names)
        noise = slot_normals(latents.shape[1:], rows.tolist(), sampler.seed, "completion")
        teacher = backbone.pipeline.controlnet
        painted = complete_latents(backbone, teacher, latents, mask, text, empty, sampler, noise)  # type: ignore[arg-type]
        writer.put("completions", first, _to_numpy(painted, dtype))
        if progress:
            progress(int(rows[-1]) + 1, writer.count, "completions")


def build_cache(
    source: Path,
    out: Path,
    backbone: Backbone,
    dtype: torch.dtype = torch.float32,
    completions: SamplerConfig | None = None,
    progress: Progress | None = None,
) -> bool:
    """Shards of one role -> a cache in `out`. False when `out` already is the cache of these shards and this model.

    Raises InvalidInputError when `source` holds no shards, or `out` holds something that is no cache."""
    from refine_control.data.shards import Shards

    if not (source / MANIFEST).is_file():
        raise InvalidInputError(f"{source} holds no shards; give the folder of one role, as `data build` writes it")
    shards = Shards(source)
    role = json.loads((source / MANIFEST).read_text())["role"]
    described = {"shards": sha256_file(source / MANIFEST)}
    with only_writer(out.with_name(f".{out.name}.writer")):
        had = read_manifest(out, verify=False) if (out / MANIFEST).is_file() else {}
        if had.get("kind") != "cache" and out.exists() and any(out.iterdir()):
            raise InvalidInputError(f"{out} holds something that is no cache; choose another folder")
        if had:
            wanted = completions.model_dump(mode="json") if completions else None
            name = str(dtype).removeprefix("torch.")
            same = (had["source"], had["dtype"], had["completions"]) == (described, name, wanted)
            if same and had["model"] == model_mark(backbone):
                return False
        photos = (shards[i] for i in range(len(shards)))
        write_cache(
            photos,
            len(shards),
            out,
            backbone,
            role,
            source=described,
            dtype=dtype,
            completions=completions,
            progress=progress,
        )
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
        samples = json.loads((folder / "samples.json").read_text())
        self.keys, self.prompts = samples["keys"], samples["prompts"]

    def __len__(self) -> int:
        return self.manifest["count"]

    def take(self, name: str, rows: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Rows of one array as a tensor (a copy)."""
        if name not in self.arrays:
            raise InvalidInputError(f"the cache {self.folder} of role {self.role} has no {name}")
        values = np.ascontiguousarray(self.arrays[name][np.asarray(rows)])
        if values.dtype == np.uint16 and self.bfloat16:
            return torch.from_numpy(values).view(torch.bfloat16)
        return torch.from_numpy(values)

    def require(self, role: str) -> Cache:
        """Itself, if it has the role; a labelled cache also serves as an unlabelled one (its latents are not read)."""
        if self.role != role and (self.role, role) != (LABELED, UNLABELED):
            raise InvalidInputError(f"{self.folder} is a cache of role {self.role}; this needs {role}")
        return self
