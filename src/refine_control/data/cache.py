"""The cache: every image and prompt encoded once, then read by row from memory-mapped arrays.

Training never runs the VAE or a text encoder. A cache knows what made it; a cache of another model, or of
shards that have changed since, is refused. Each distinct prompt is stored once; prompt 0 is the empty one.
"""

# N samples, P distinct prompts, h w latents, T text tokens

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine_control.config import SamplerConfig
from refine_control.data.cache_writer import (
    SAMPLES,
    CacheWriter,
    Progress,
    PromptStorage,
    numbered_prompts,
    write_completions,
    write_pictures,
    write_prompts,
)
from refine_control.data.compact import Layout, Packed, unpack
from refine_control.data.records import LABELED, ROLES, UNLABELED, Photo
from refine_control.errors import InvalidInputError
from refine_control.models.backbone import Backbone
from refine_control.storage import MANIFEST, only_writer, read_manifest, sha256_file

CACHE_VERSION = 2


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


def write_cache(
    photos: Sequence[Photo],
    out: Path,
    backbone: Backbone,
    role: str,
    *,
    source: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    prompts: PromptStorage = "full",
    completions: SamplerConfig | None = None,
    progress: Progress | None = None,
) -> None:
    """Encodes photos of one size into `out`, replacing what is there only when whole; continues where it was killed.

    With `completions` the model's own ControlNet (the teacher) also paints every hole once. `prompts`: int8 stores
    prompt embeddings in 8 bits (`compact`). The role `unlabeled` stores no latents of the picture, only of the
    picture without its hole. Raises ValueError for an unknown role, InvalidInputError for an empty source."""
    if role not in ROLES:
        raise ValueError(f"role is one of {ROLES}, not {role!r}")
    if not len(photos):
        raise InvalidInputError(f"nothing to cache for the role {role}; the source holds no sample")
    described = {
        "kind": "cache",
        "role": role,
        "count": len(photos),
        "model": model_mark(backbone),
        "source": source,
        **_storage(dtype, prompts, completions),
    }
    writer = CacheWriter(out, described, progress)
    write_pictures(writer, photos, backbone, role, dtype)
    stored = write_prompts(writer, backbone, dtype, prompts)
    if completions is not None:

        def read_prompts(numbers: np.ndarray) -> torch.Tensor:
            if prompts == "full":
                return writer.read("prompt_embeds", numbers)
            names = ("prompt_codes", "prompt_scales")
            return unpack(Packed(*(writer.read(n, numbers) for n in names)), Layout(*stored["prompt_layout"]))

        write_completions(writer, backbone, completions, dtype, read_prompts, len(photos))
    writer.finish(**stored)


def _storage(dtype: torch.dtype, prompts: PromptStorage, completions: SamplerConfig | None) -> dict[str, Any]:
    """What a cache of the same shards and model may differ in."""
    painted = completions.model_dump(mode="json") if completions else None
    return {"dtype": str(dtype).removeprefix("torch."), "prompts": prompts, "completions": painted}


def build_cache(
    source: Path,
    out: Path,
    backbone: Backbone,
    dtype: torch.dtype = torch.float32,
    prompts: PromptStorage = "full",
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
        wanted = {"source": described, **_storage(dtype, prompts, completions)}
        if had and {k: had.get(k) for k in wanted} == wanted and had["model"] == model_mark(backbone):
            return False
        stored: Any = {"dtype": dtype, "prompts": prompts, "completions": completions}
        write_cache(shards, out, backbone, role, source=described, **stored, progress=progress)
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

    def __len__(self) -> int:
        return self.manifest["count"]

    def take(self, name: str, rows: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Rows of one array as a tensor (a copy); prompt embeddings that are stored in 8 bits come as fp32."""
        if name == "prompt_embeds" and "prompt_layout" in self.manifest:
            packed = Packed(*(self.take(part, rows) for part in ("prompt_codes", "prompt_scales")))
            return unpack(packed, Layout(*self.manifest["prompt_layout"]))
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
