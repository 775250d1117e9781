"""Repainting one photograph from files, as `refine-control inpaint` does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models.devices import best_device
from refine_control.pipeline.painting import make_pipeline, run_pipeline

logger = logging.getLogger(__name__)


def warn_unknown_words(model: str | Path, prompts: Sequence[str]) -> None:
    """For the mini model's closed vocabulary: says which words of the prompts it does not know, and their share."""
    from refine_control.models.loading import closed_vocabulary
    from refine_control.models.words import unknown_words

    vocabulary = closed_vocabulary(model)
    if vocabulary is None:
        return
    unknown, share = unknown_words(prompts, vocabulary)
    if unknown:
        shown = ", ".join(repr(w) for w in unknown[:8]) + (" ..." if len(unknown) > 8 else "")
        logger.warning(
            "the mini model does not know %d words (%.0f %% of all words in the prompts): %s; it leaves them out",
            len(unknown),
            100 * share,
            shown,
        )


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
    """Repaints the white part of `mask` in the photograph `image` by `prompt` and writes a PNG.

    The photo is read by the rules of `data build` (EXIF turns, 16 bits, CMYK, ...) and cropped to a square of
    `size` pixels around the hole (the model's own size by default).
    Raises InvalidInputError for files that cannot be used, MissingError for weights that are not there."""
    from refine_control.models.loading import load_backbone, load_controlnet
    from refine_control.photos.load import load
    from refine_control.records import Entry, Rejected
    from refine_control.storage import write_atomic

    for path in (image, mask):
        if not path.is_file():
            raise InvalidInputError(f"no file at {path}; give a photograph and its mask (white = inpaint)")
    if not prompt.strip():
        raise InvalidInputError("the prompt is empty; say what belongs in the hole")
    warn_unknown_words(model, [prompt])
    loaded = load_controlnet(controlnet) if controlnet else None
    backbone = load_backbone(model, loaded, device=best_device())
    side = size or backbone.side
    root = Path(image.resolve().anchor)  # whoever names two files by hand may have them anywhere
    entry = Entry("input", root, str(image.resolve()), str(mask.resolve()), prompt)
    try:
        photo = load(entry, side, enlarge=True)
    except Rejected as rejected:
        raise InvalidInputError(f"{image} with {mask}: {rejected.detail} ({rejected.reason.value})") from None
    sampler = sampler or SamplerConfig()
    pipeline = make_pipeline(backbone, loaded or backbone.pipeline.controlnet, sampler.injection, sampler.latents)
    painted = run_pipeline(pipeline, backbone, photo.image, photo.mask, prompt, sampler)
    if composite:
        painted = np.where(photo.mask[..., None], painted, photo.image)
    import io

    buffer = io.BytesIO()
    Image.fromarray(painted).save(buffer, format="PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, buffer.getvalue())
    return out
