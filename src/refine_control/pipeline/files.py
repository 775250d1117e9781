"""One picture from files: a region of a photograph, as `refine-control inpaint` repaints it, or a whole picture under
conditions, as `refine-control generate` paints it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from refine_control.conditions.condition import Shown, find_condition, has_region, own_condition
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models.card import choose_sampler
from refine_control.models.controlnet import Control, ControlNet
from refine_control.models.devices import best_device
from refine_control.pipeline.inpainter import Inpainter
from refine_control.pipeline.painting import paint, warn_wasted_steps
from refine_control.pipeline.pictures import check_ending, encode_picture

if TYPE_CHECKING:
    from refine_control.models.backbone import Backbone
    from refine_control.records import Photo

_COLOUR = 16
"""Mean difference between channels of a picture in colour; that of a grey one is noise of its JPEG."""
_MAP = "depth"
"""The kind by whose rules a picture is read for a ControlNet that does not say its kind."""


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
    _check_files([image, mask], "a photograph and its mask (white = inpaint)")
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
    prepared: bool = False,
    preparer: str | None = None,
) -> Path:
    """Paints a picture by `prompt` under one or several conditions and writes it: .png, .jpg, .webp.

    `controls` are ControlNets that are shown no region, each with a picture: a photograph, of which the condition's
    `prepare` or the model `preparer` makes what the ControlNet is shown, or that itself where it is `prepared` or the
    condition has no preparation. Pictures are read as `inpaint_file` does, each cropped to its central square.
    `scales` are the conditioning scales, one for all or one for each; by default each ControlNet's own. The rest of
    `sampler` is by default what `choose_sampler` says for the first. Raises InvalidInputError for ControlNets and files
    that cannot be used, MissingError for what is not there."""
    names, pictures = zip(*controls, strict=True)
    _check_files(pictures, "a picture for each ControlNet")
    if len(scales) not in (0, 1, len(names)):
        raise InvalidInputError(f"{len(scales)} conditioning scales for {len(names)} ControlNets; give one for each")
    side = _check(prompt, "the picture", out, model, size)
    backbone, networks = _load_several(model, names)
    kinds = [own_condition(network.config) for network in networks]
    if preparer and (prepared or not any(kind and find_condition(kind).network for kind in kinds)):
        raise InvalidInputError(f"no condition picture is to be made by the model {preparer}; leave it out")
    shown = [_show(*given, prompt, side, prepared, preparer) for given in zip(pictures, kinds, strict=True)]
    sampler = sampler or choose_sampler(model, names[0], {})
    warn_wasted_steps(backbone, sampler)
    usual = [sampler.conditioning_scale, *(choose_sampler(model, name, {}).conditioning_scale for name in names[1:])]
    factors = list(scales) * (len(names) if len(scales) == 1 else 1) or usual
    first, *others = map(Control, networks, shown, factors)
    sampler = sampler.model_copy(update={"conditioning_scale": first.scale})
    painted = paint(backbone, first.controlnet, first.seen, [prompt], sampler, others=others)
    return _write(painted[0], out)


def _check_files(paths: Sequence[Path], what: str) -> None:
    for path in paths:
        if not path.is_file():
            raise InvalidInputError(f"no file at {path}; give {what}")


def _check(prompt: str, what: str, out: Path, model: str, size: int | None) -> int:
    """The side of the picture in pixels. Raises InvalidInputError for what is wrong before anything is loaded."""
    from refine_control.models.loading import read_geometry

    if not prompt.strip():
        raise InvalidInputError(f"the prompt is empty; describe {what}")
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


def _show(picture: Path, kind: str | None, prompt: str, side: int, prepared: bool, preparer: str | None) -> Shown:
    """What a ControlNet is shown of a picture; of one that does not say its kind the picture is given, as a map is.

    Raises InvalidInputError for a given picture in colour where it should be grey."""
    record = find_condition(kind or _MAP)
    model = preparer if record.network else None
    given = prepared or kind is None or not (record.prepare or model)
    cond = _read(picture, prompt, side, given=given, condition=record.name, preparer=model).cond
    assert cond is not None
    if given and kind and record.grey and np.ptp(cond, axis=2).mean() > _COLOUR:
        raise InvalidInputError(
            f"{picture} is in colour, and the condition {kind} is {record.title}, in grey; give such a picture"
        )
    return Shown(cond[None])


def _load_several(model: str, names: Sequence[str]) -> tuple[Backbone, list[ControlNet]]:
    """The model and ControlNets that are shown no region. Raises InvalidInputError for others, and for several of which
    one has a transformer of its own."""
    from refine_control.models.loading import load_painter, load_student, resolve
    from refine_control.models.own_transformer import own_folder

    if len(names) > 1 and (joint := [name for name in names if own_folder(resolve(name))]):
        raise InvalidInputError(f"{joint[0]} was trained together with a transformer; use it without other ControlNets")
    backbone, first = load_painter(model, names[0], best_device())
    networks = [first, *(load_student(backbone, name)[1] for name in names[1:])]
    for name, network in zip(names, networks, strict=True):
        if has_region(network.config):
            raise InvalidInputError(
                f"the ControlNet of {name} reads a mask; use it by `refine-control inpaint`, or name one that is shown "
                "no region"
            )
    return backbone, networks


def _write(painted: np.ndarray, out: Path) -> Path:
    from refine_control.storage import write_output

    write_output(out, encode_picture(Image.fromarray(painted), out))
    return out
