"""`data inspect`: what a folder of shards holds, in numbers and on one sheet."""

# H W pixels of a sample

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from refine_control import picture_grid
from refine_control.errors import InvalidInputError
from refine_control.photos.shards import Shards, open_manifest
from refine_control.records import ROLES
from refine_control.storage import write_output

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def inspect(folder: Path) -> dict[str, Any]:
    """Statistics of one role's folder, or of a build: `{"roles": {role: statistics}, "entries", "rejects"}`.

    Statistics: role, samples, photos, bytes, image_size (with buckets also image_sizes: [H, W, samples] of each),
    image_format, sources, licenses, and quantiles of the
    masked share (`mask_fraction`, 0 to 1) and of the words in a prompt (`prompt_words`).
    Raises InvalidInputError where there are no shards, DamagedError where they are damaged."""
    manifest = open_manifest(Path(folder))
    if manifest.get("kind") != "build":
        return _role_statistics(Shards(folder))
    roles = {role: _role_statistics(Shards(Path(folder) / role)) for role in ROLES}
    return {"roles": roles, "entries": manifest["entries"], "rejects": manifest["rejects"]}


def _role_statistics(shards: Shards) -> dict[str, Any]:
    """One pass over the samples of a role."""
    named = ("role", "samples", "photos", "image_size", "image_format", "sources", "licenses")
    rows = [(photo.mask.mean(), len(photo.prompt.split()), bool(photo.global_prompt)) for photo in shards]
    return {
        **{name: shards.manifest[name] for name in named},
        **{name: shards.manifest[name] for name in ("image_sizes",) if name in shards.manifest},
        "bytes": sum(file["bytes"] for file in shards.manifest["files"].values()),
        "mask_fraction": _quantiles([row[0] for row in rows]),
        "prompt_words": _quantiles([row[1] for row in rows]),
        "with_global_prompt": sum(row[2] for row in rows),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    """`{"min", "p10", "p25", "p50", "p75", "p90", "max"}`; nothing of nothing."""
    if not values:
        return {}
    names = ["min", *(f"p{100 * q:.0f}" for q in QUANTILES[1:-1]), "max"]
    return {name: round(float(value), 4) for name, value in zip(names, np.quantile(values, QUANTILES), strict=True)}


def outline(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (H, W) bool: pixels of the mask with a neighbour, left, right, above or below, outside it.

    The border of the picture is no neighbour."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def contact_sheet(folder: Path, path: Path, count: int = 64) -> None:
    """Writes a PNG of `count` samples, evenly spread, each with its hole outlined and its prompt below.

    Of a build every role is shown, each in its share. Raises InvalidInputError where there is no sample, StorageError
    when the disk refuses."""
    if count < 1:
        raise InvalidInputError(f"count is {count}; a sheet shows at least one sample")
    build = open_manifest(Path(folder)).get("kind") == "build"
    folders = [Path(folder) / role for role in ROLES] if build else [Path(folder)]
    places = [(shards, index) for shards in map(Shards, folders) for index in range(len(shards))]
    if not places:
        raise InvalidInputError(f"{folder} holds no sample to show")
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    shown = [shards[index] for shards, index in (places[number] for number in chosen)]
    sheet = picture_grid.contact_sheet([p.image for p in shown], [p.mask for p in shown], [p.prompt for p in shown])
    write_output(Path(path), sheet)
