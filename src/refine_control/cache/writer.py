"""The files of a cache while it is written, and how a killed run continues.

What is encoded lies in `.NAME.partial` beside the cache until all is there. Every 30 seconds the arrays are flushed
and `state.json` says how far each phase is; the same call continues from there and ends with the same bytes, because
the batches are the same. An array gets its blocks on the disk when it is created: a full disk is an error there.
"""

# N samples, P distinct prompts, B of a batch, h w latents, T text tokens

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine_control.cache.stored import SAMPLES, stored_name
from refine_control.photos.buckets import Size
from refine_control.progress import Progress
from refine_control.storage import allocate, finish_folder, fsync_path, storage_errors, sweep, write_json

BATCH = 32
_STATE = "state.json"
_SECONDS_BETWEEN_SAVES = 30.0


def to_numpy(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """The tensor as an array; bf16 becomes uint16, numpy having no such type."""
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    return tensor.view(torch.uint16).numpy() if dtype == torch.bfloat16 else tensor.numpy()


@dataclass
class Progressed:
    """How far a cache is: `state.json`."""

    described: dict[str, object]
    """What the manifest will hold."""
    done: dict[str, int] = field(default_factory=dict)
    """Rows done, by phase."""
    bytes: int = 0
    """Of samples.jsonl."""
    arrays: list[str] = field(default_factory=list)
    prompt_errors: list[list[float]] = field(default_factory=list)
    """Relative errors of 8 bits and of bf16, by batch of prompts."""
    prompt_layout: list[Any] | None = None
    """Of prompt embeddings in 8 bits."""


class CacheWriter:
    """Writes one cache. An unfinished one is continued if its manifest would hold the same: `described`.

    `groups` are the rows of each latent size (`row_groups`). Raises StorageError when the disk refuses."""

    def __init__(
        self, out: Path, described: dict[str, object], groups: Mapping[Size, range], progress: Progress | None = None
    ):
        self.out, self.described, self.groups = out, described, groups
        self.progress = progress or (lambda done, total, word: None)
        self.folder = out.with_name(f".{out.name}.partial")
        with storage_errors(out):
            self.state = self._read_state()
            sweep(self.folder)
            (self.folder / SAMPLES).touch()
            os.truncate(self.folder / SAMPLES, self.state.bytes)
            self.samples = (self.folder / SAMPLES).open("ab")
        self.arrays: dict[str, np.memmap] = {}
        self.saved = time.monotonic()

    def _read_state(self) -> Progressed:
        """The state of an earlier run for the same cache, or else the first one, in an empty folder."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            state = Progressed(**json.loads((self.folder / _STATE).read_text()))
            if state.described == self.described:
                return state
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return Progressed(self.described)

    def put(self, name: str, first: int, total: int, values: np.ndarray) -> None:
        """Stores rows `first ...` of the array `name`, which has `total` rows."""
        if name not in self.arrays:
            path, shape = self._path(name), (total, *values.shape[1:])
            if name in self.state.arrays:
                self.arrays[name] = np.lib.format.open_memmap(path, "r+")
            else:
                self.arrays[name] = np.lib.format.open_memmap(path, "w+", values.dtype, shape)
                allocate(path, path.stat().st_size)
        self.arrays[name][first : first + len(values)] = values

    def put_sized(self, name: str, rows: range, values: np.ndarray) -> None:
        """Stores `rows`, all of one size, of an array that has h and w."""
        stored, group = self._place(name, rows)
        self.put(stored, rows.start - group.start, len(group), values)

    def read_sized(self, name: str, rows: range) -> torch.Tensor:
        """Rows that `put_sized` stored, as fp32."""
        stored, group = self._place(name, rows)
        return self.read(stored, range(rows.start - group.start, rows.stop - group.start))

    def latent_size(self, rows: range) -> Size:
        """The latent size (h, w) of `rows`, the same for all of them."""
        return next(size for size, group in self.groups.items() if rows.start in group)

    def _place(self, name: str, rows: range) -> tuple[str, range]:
        """The name of the array that holds `rows`, and all its rows."""
        size = self.latent_size(rows)
        return name if len(self.groups) == 1 else stored_name(name, size), self.groups[size]

    def read(self, name: str, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Stored rows, as fp32."""
        if name not in self.arrays:
            self.arrays[name] = np.lib.format.open_memmap(self._path(name), "r+")
        values = torch.from_numpy(np.ascontiguousarray(self.arrays[name][np.asarray(rows)]))
        return (values.view(torch.bfloat16) if values.dtype == torch.uint16 else values).float()

    def note(self, key: str, prompt: str) -> None:
        """Stores the next sample's key and prompt."""
        self.samples.write(json.dumps({"key": key, "prompt": prompt}, ensure_ascii=False).encode() + b"\n")

    def phase(self, name: str, groups: Iterable[range], batch: Callable[[range], None]) -> None:
        """Calls `batch` for all rows that are not done, BATCH of a group at a time, and saves every 30 seconds."""
        batches = [group[first : first + BATCH] for group in groups for first in range(0, len(group), BATCH)]
        total = batches[-1].stop if batches else 0
        with storage_errors(self.out):
            for rows in batches:
                if rows.stop <= self.state.done.get(name, 0):
                    continue
                batch(rows)
                self.state.done[name] = rows.stop
                if rows.stop == total or time.monotonic() - self.saved > _SECONDS_BETWEEN_SAVES:
                    self.save()
                self.progress(rows.stop, total, name)

    def save(self) -> None:
        """Flushes what is stored, and notes it in the state: a killed run continues from here."""
        for array in self.arrays.values():
            array.flush()
        self.samples.flush()
        fsync_path(self.folder / SAMPLES)
        self.state.arrays = self._names()
        self.state.bytes = (self.folder / SAMPLES).stat().st_size
        write_json(self.folder / _STATE, asdict(self.state))
        self.saved = time.monotonic()

    def finish(self, **described: Any) -> None:
        """Publishes the cache."""
        files = [SAMPLES, *(f"{name}.npy" for name in self._names())]
        self.arrays = {}
        with storage_errors(self.out):
            self.samples.close()
        finish_folder(self.folder, self.out, files, **self.described, **described)

    def _names(self) -> list[str]:
        return sorted({*self.state.arrays, *self.arrays})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"
