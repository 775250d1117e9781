"""One picture from files: a region of a photograph, as `refine-control inpaint` repaints it, or a whole picture under
conditions, as `refine-control generate` paints it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from refine_control.conditions.condition import Shown
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models.card import choose_sampler
from refine_control.models.controlnet import Control
from refine_control.models.devices import best_device
from refine_control.pipeline.inpainter import Inpainter
from refine_control.pipeline.painting import paint, warn_wasted_steps
from refine_control.pipeline.pictures import A_PICTURE_EACH, check_ending, check_files, check_prompt, encode_picture
from refine_control.pipeline.together import (
    Reading,
    conditioning_scales,
    load_beside,
    name_conditions,
    readings,
    refuse_own_transformer,
    refuse_region,
)

if TYPE_CHECKING:
    from refine_control.records import Photo


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
    `size` pixels around the hole (the model's own size by default), and sampled as `choose_sampler` says by default;
    `Inpainter` paints photographs in their own size. The ControlNet is that of `Inpainter.load`.
    Raises InvalidInputError for files that cannot be used, sizes that the model cannot paint and a ControlNet that is
    shown no region, MissingError for weights that are not there."""
    check_files([image, mask], "a photograph and its mask (white = inpaint)")
    side = _check(prompt, "the content of the masked region", out, model, size)
    photo = _read(image, prompt, side, mask=mask)
    inpainter = Inpainter.load(model, controlnet)
    painted = inpainter.painter.paint(photo.image, photo.mask, prompt, sampler or inpainter.sampler())
    if composite:
        painted = np.where(photo.mask[..., None], painted, photo.image)
    return _write(painted, out)


def generate_file(
    controls: Sequence[tuple[str, Path]],
    prompt: str,
    out: Path,
    *,
    model: str = "mini",
    scales: Sequence[float] = (),
    sampler: SamplerConfig | None = None,
    size: int | None = None,
    conditions: Sequence[str] = (),
    prepared: bool = False,
    preparer: str | None = None,
) -> Path:
    """Paints a picture by `prompt` under one or several conditions and writes it: .png, .jpg, .webp.

    `controls` are ControlNets that are shown no region, each with a picture: a photograph, of which the condition's
    `prepare` or the model `preparer` makes what the ControlNet is shown, or that itself where it is `prepared` or the
    condition has no preparation. Pictures are read as `inpaint_file` does, each cropped to its central square.
    `scales` are the conditioning scales, one for all or one for each; by default each ControlNet's own. `conditions`
    are the kinds of ControlNets whose configs do not say them, one for each. The rest of
    `sampler` is by default what `choose_sampler` says for the first. Raises InvalidInputError for ControlNets and files
    that cannot be used, MissingError for what is not there."""
    from refine_control.models.loading import load_painter

    names, pictures = zip(*controls, strict=True)
    check_files(pictures, A_PICTURE_EACH)
    sampler = sampler or choose_sampler(model, names[0], {})
    factors = conditioning_scales(model, names, scales, sampler.conditioning_scale)
    side = _check(prompt, "the picture", out, model, size)
    refuse_own_transformer(names)
    backbone, network = load_painter(model, names[0], best_device())
    refuse_region([network], names[:1])
    networks = [network, *load_beside(backbone, names[1:])]
    name_conditions(networks, names, conditions)
    shown = [
        _show(picture, reading, prompt, side)
        for picture, reading in zip(pictures, readings(networks, prepared, preparer), strict=True)
    ]
    warn_wasted_steps(backbone, sampler)
    first, *others = map(Control, networks, shown, factors)
    sampler = sampler.model_copy(update={"conditioning_scale": first.scale})
    painted = paint(backbone, first.controlnet, first.seen, [prompt], sampler, others=others)
    return _write(painted[0], out)


def _check(prompt: str, what: str, out: Path, model: str, size: int | None) -> int:
    """The side of the picture in pixels. Raises InvalidInputError for what is wrong before anything is loaded."""
    from refine_control.models.loading import read_geometry

    check_prompt(prompt, what)
    check_ending(out)
    sizes = read_geometry(model)
    side = sizes.side if size is None else size
    sizes.check(side, side)
    return side


def _read(image: Path, prompt: str, side: int, *, mask: Path | None = None, given: bool = False, **how: Any) -> Photo:
    """A sample of one photograph by the rules of `data build`; `given`: it is its own condition picture."""
    from refine_control.photos.load import load
    from refine_control.records import Entry, Rejected

    root, name = Path(image.resolve().anchor), str(image.resolve())  # the files may be in any folders
    region = None if mask is None else str(mask.resolve())
    try:
        entry = Entry("input", root, name, region, prompt, condition=name if given else None)
        return load(entry, side, enlarge=True, **how)
    except Rejected as rejected:
        files = image if mask is None else f"{image} with {mask}"
        raise InvalidInputError(f"{files}: {rejected.detail} ({rejected.reason.value})") from None


def _show(picture: Path, reading: Reading, prompt: str, side: int) -> Shown:
    """What a ControlNet is shown of a picture's central square. Raises what `Reading.check` raises."""
    how = {"condition": reading.record.name, "preparer": reading.preparer}
    cond = _read(picture, prompt, side, given=reading.given, **how).cond
    assert cond is not None
    reading.check(cond, picture)
    return Shown(cond[None])


def _write(painted: np.ndarray, out: Path) -> Path:
    from refine_control.storage import write_output

    write_output(out, encode_picture(Image.fromarray(painted), out))
    return out
