"""Formats: how a student is written for other programs and how what was written is run, as a record for each.

Each format is a module of the folder `formats/` with a `FORMAT`; `find_format` loads it by name, in which a hyphen
stands for the underscore of the module's name.
"""

# B batch, h w latents

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np

from refine_control.errors import InvalidInputError
from refine_control.export import formats
from refine_control.export.source import Samples, Source

ALL = "all"
"""In place of a name: every format."""
Velocity = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""The inputs of `graphs.Denoiser` by name -> velocity (B,16,h,w)."""


@dataclass(frozen=True)
class Work:
    """One export under way."""

    source: Source
    samples: Samples
    graphs: Path
    """Folder of the fp32 ONNX graphs, which several formats start from; filled by `pipeline_folder.fp32_graphs`."""
    separate: bool = False
    """Whether ControlNet and transformer are graphs by themselves."""
    ort: Path | None = None
    """The npm package onnxruntime-web, for a page; None: fetched by npm."""


@dataclass(frozen=True)
class Format:
    """A kind of export."""

    name: str
    """As the command line names it."""
    title: str
    """In a few words: who reads it."""
    bound: float
    """Largest relative error of the velocity, |v - v_torch| / |v_torch|, with which an export is published."""
    write: Callable[[Work, Path], None]
    """Writes the files into an empty folder."""
    load: Callable[[Work, Path], Velocity]
    """What the files in that folder compute, on one thread, as their own runtime does."""
    refuse: Callable[[Source], None] = lambda source: None
    """Raises InvalidInputError for a student that cannot be written so."""
    flux: bool = False
    """Whether students of FLUX are written, too."""

    def check(self, source: Source) -> None:
        """Raises InvalidInputError for a student that cannot be written so."""
        if source.backbone.is_flux and not self.flux:
            raise InvalidInputError(
                f"{source.name} is of FLUX, and the format {self.name} is for SD3's students; use --to diffusers"
            )
        self.refuse(source)


def format_names() -> list[str]:
    """The formats of the folder, in the order of the alphabet."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(formats.__path__))


@cache
def find_format(name: str) -> Format:
    """The record of a format. Raises InvalidInputError for another name."""
    if name not in format_names():
        raise InvalidInputError(f"there is no export format {name!r}; choose one of {', '.join(format_names())}, {ALL}")
    return import_module(f"{formats.__name__}.{name.replace('-', '_')}").FORMAT
