"""A finished cache, read by row from memory-mapped arrays: training runs neither the VAE nor a text encoder."""

# N samples, P distinct prompts, h w latents

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from refine_control.cache.compact import Layout, Packed, unpack
from refine_control.cache.stored import SAMPLES, SHOWN, numbered_prompts, row_groups, shown_array, stored_name
from refine_control.conditions.condition import find_condition
from refine_control.errors import DamagedError, InvalidInputError
from refine_control.folders import A_CACHE, refuse_other_kind
from refine_control.models.families import Encoding
from refine_control.records import INPAINT, LABELED, UNLABELED
from refine_control.storage import read_manifest


def _open_array(path: Path) -> np.ndarray:
    """The array of a file, memory-mapped. Raises DamagedError for a file that holds anything but numbers."""
    try:
        stored = np.load(path, mmap_mode="r")
        if isinstance(stored, np.ndarray) and stored.dtype.kind in "fiu":
            return stored
    except (OSError, ValueError, EOFError, SyntaxError):
        pass
    raise DamagedError(f"{path} is no array of numbers; delete {path.parent} and make the cache again")


class Cache:
    """A finished cache, opened for reading by row.

    Raises InvalidInputError where there is none, or one of another model, DamagedError where it is damaged."""

    def __init__(self, folder: Path, model: str | None = None):
        refuse_other_kind(folder, A_CACHE)
        try:
            self.manifest = read_manifest(folder, required=("role", "count", "model", "dtype", "prompts"))
        except FileNotFoundError:
            self.manifest = {}
        if self.manifest.get("kind") != "cache":
            raise InvalidInputError(f"{folder} is no cache; make it with `refine-control cache SHARDS {folder}`")
        if model is not None and self.manifest["model"] != model:
            raise InvalidInputError(
                f"the cache {folder} was made by another model (other VAE, text encoders or token count); make it again"
            )
        self.folder, self.role = folder, self.manifest["role"]
        self.condition = str(self.manifest.get("condition", INPAINT))
        region = find_condition(self.condition).region
        shift, levels = bool(self.manifest.get("shift", region)), self.manifest.get("levels", Encoding().levels)
        self.encoding = Encoding(shift, tuple(levels))
        """How the condition's latents were encoded."""
        self.bfloat16 = self.manifest["dtype"] == "bfloat16"
        opened = {Path(n).stem: _open_array(folder / n) for n in self.manifest["files"] if n.endswith(".npy")}
        self.arrays = {name.replace(shown_array(region), SHOWN): array for name, array in opened.items()}
        try:
            self.keys, self.prompts, _ = numbered_prompts(folder / SAMPLES)
            sizes = self.manifest.get("sizes") or [[*self.arrays[SHOWN].shape[2:], len(self)]]
            self.groups = row_groups({(h, w): count for h, w, count in sizes})
            """The rows of each latent size (h, w)."""
        except (OSError, ValueError, KeyError, TypeError):
            raise DamagedError(f"the cache {folder} is not whole; delete it and make it again") from None

    def __len__(self) -> int:
        return self.manifest["count"]

    def has(self, name: str) -> bool:
        """Whether there is an array of this name, or one for each size."""
        return any(n in self.arrays for n in (name, *(stored_name(name, size) for size in self.groups)))

    def take(self, name: str, rows: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Rows of one array as a tensor (a copy); prompt embeddings stored in 8 bits become fp32.

        Raises ValueError for rows of several sizes of an array that has h and w."""
        if name == "prompt_embeds" and "prompt_layout" in self.manifest:
            packed = Packed(*(self.take(part, rows) for part in ("prompt_codes", "prompt_scales")))
            return unpack(packed, Layout(*self.manifest["prompt_layout"]))
        if not self.has(name):
            raise InvalidInputError(f"the cache {self.folder} of role {self.role} has no {name}")
        stored, places = self._place(name, np.asarray(rows))
        values = torch.from_numpy(np.ascontiguousarray(self.arrays[stored][places]))
        return values.view(torch.bfloat16) if values.dtype == torch.uint16 and self.bfloat16 else values

    def _place(self, name: str, rows: np.ndarray) -> tuple[str, np.ndarray]:
        """The name of the array that holds `rows`, and their places in it."""
        if name in self.arrays:
            return name, rows
        for size, group in self.groups.items():
            if ((rows >= group.start) & (rows < group.stop)).all():
                return stored_name(name, size), rows - group.start
        raise ValueError(f"{name} was asked for rows of several sizes")

    def require(self, role: str) -> Cache:
        """Itself, if it has the role; a labelled cache also serves as an unlabelled one (its latents are not read)."""
        if self.role != role and (self.role, role) != (LABELED, UNLABELED):
            raise InvalidInputError(f"{self.folder} is a cache of role {self.role}; this needs {role}")
        return self
