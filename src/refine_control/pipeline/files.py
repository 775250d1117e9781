"""Repainting one photograph from files, as `refine-control inpaint` does."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models.card import choose_sampler
from refine_control.models.devices import best_device
from refine_control.pipeline.painting import make_pipeline, run_pipeline, warn_wasted_steps

_JPEG = {"quality": 95, "subsampling": 0}
_OPTIONS: Mapping[str, Mapping[str, Any]] = {".png": {}, ".jpg": _JPEG, ".jpeg": _JPEG, ".webp": {"lossless": True}}
"""How a picture is written, by the end of its file's name."""


def inpaint_file(
    image: Path,
    mask: Path,
    prompt: str,
    out: Path,
    *,
    model: str = "mini",
    controlnet: str | None = None,
    sampler: SamplerConfig | None = None,
    size: int | None = None,
    composite: bool = False,
) -> Path:
    """Repaints the white part of `mask` in the photograph `image` by `prompt` and writes a picture: .png, .jpg, .webp.

    The photo is read by the rules of `data build` (EXIF turns, 16 bits, CMYK, ...) and cropped to a square of
    `size` pixels around the hole (the model's own size by default), and sampled as `choose_sampler` says by default.
    Raises InvalidInputError for files that cannot be used and sizes that the model cannot paint, MissingError for
    weights that are not there."""
    from refine_control.models.loading import load_painter, read_geometry
    from refine_control.photos.load import load
    from refine_control.records import Entry, Rejected
    from refine_control.storage import write_output

    for path in (image, mask):
        if not path.is_file():
            raise InvalidInputError(f"no file at {path}; give a photograph and its mask (white = inpaint)")
    if not prompt.strip():
        raise InvalidInputError("the prompt is empty; describe the content of the masked region")
    if out.suffix.lower() not in _OPTIONS:
        raise InvalidInputError(f"{out} ends in none of {', '.join(_OPTIONS)}; name the picture to write so")
    sizes = read_geometry(model)
    side = sizes.side if size is None else size
    sizes.check(side, side)
    root = Path(image.resolve().anchor)  # the two files may be in any folders
    entry = Entry("input", root, str(image.resolve()), str(mask.resolve()), prompt)
    try:
        photo = load(entry, side, enlarge=True)
    except Rejected as rejected:
        raise InvalidInputError(f"{image} with {mask}: {rejected.detail} ({rejected.reason.value})") from None
    backbone, network = load_painter(model, controlnet, best_device())
    sampler = sampler or choose_sampler(model, controlnet, {})
    warn_wasted_steps(backbone, sampler)
    pipeline = make_pipeline(backbone, network, sampler.injection, sampler.latents)
    painted = run_pipeline(pipeline, backbone, photo.image, photo.mask, prompt, sampler)
    if composite:
        painted = np.where(photo.mask[..., None], painted, photo.image)
    buffer, kind = io.BytesIO(), Image.registered_extensions()[out.suffix.lower()]
    Image.fromarray(painted).save(buffer, kind, **_OPTIONS[out.suffix.lower()])
    write_output(out, buffer.getvalue())
    return out
