"""`Inpainter`: a region of a photograph of any size, repainted by a prompt, with whatever runs the model."""

# H W pixels of the photograph, h w pixels of a frame as the model paints it

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models.card import choose_sampler, default_controlnet
from refine_control.models.fit import Geometry
from refine_control.pipeline.framing import CONTEXT, FEATHER, Box, blend, cut, frames, opacity, uncut
from refine_control.pipeline.pictures import (
    Picture,
    check_prompt,
    encode_picture,
    read_condition,
    read_mask,
    read_photograph,
)
from refine_control.pipeline.together import (
    Beside,
    check_scales,
    conditioning_scales,
    load_beside,
    name_conditions,
    readings,
    refuse_own_transformer,
)
from refine_control.progress import Progress
from refine_control.records import INPAINT

if TYPE_CHECKING:
    from refine_control.conditions.condition import Shown
    from refine_control.models.backbone import Backbone
    from refine_control.models.controlnet import Control, ControlNet
    from refine_control.photos.decode import Original

Runtime = Literal["torch", "onnx", "openvino"]
RUNTIMES: tuple[Runtime, ...] = ("torch", "onnx", "openvino")
logger = logging.getLogger(__name__)
MOST_CONTEXT, MOST_FEATHER = 10.0, 1000


class Painter(Protocol):
    """What paints a picture of a size that its model paints."""

    @property
    def geometry(self) -> Geometry:
        """The sizes that it paints."""
        ...

    def paint(
        self,
        image: np.ndarray,
        mask: np.ndarray | None,
        prompt: str,
        sampler: SamplerConfig,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """image (h, w, 3) uint8, mask (h, w) bool, True = inpaint -> (h, w, 3) uint8."""
        ...


@runtime_checkable
class ExportedPainter(Painter, Protocol):
    """A painter that knows how it is to be sampled."""

    def choose_sampler(self, given: Mapping[str, Any]) -> SamplerConfig:
        """The fields of SamplerConfig that are given (None: not given), and else the export's."""
        ...


class TorchPainter:
    """The stock pipeline with exact injection, of a model and a ControlNet that are loaded; `painting.paint` for FLUX,
    of which stock has none that reads a mask, and for several ControlNets."""

    def __init__(self, backbone: Backbone, controlnet: ControlNet) -> None:
        self.backbone, self.controlnet = backbone, controlnet
        self._others: Sequence[Control[Shown]] = ()
        self._pipelines: dict[tuple[str, str], Any] = {}
        self._warned: set[tuple[str, int]] = set()

    @property
    def geometry(self) -> Geometry:
        """The sizes that it paints."""
        return self.backbone.geometry

    def beside(self, others: Sequence[Control[Shown]]) -> TorchPainter:
        """The same painter, of one picture, of which the other ControlNets are shown what they are."""
        painter = copy(self)
        painter._others = others
        return painter

    def paint(
        self,
        image: np.ndarray,
        mask: np.ndarray | None,
        prompt: str,
        sampler: SamplerConfig,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """As `Painter.paint`; the noise is a function of sampler.seed."""
        from refine_control.conditions.condition import Shown
        from refine_control.pipeline.painting import make_pipeline, paint, run_pipeline, warn_wasted_steps

        assert mask is not None
        if (spacing := (sampler.sigmas, sampler.num_inference_steps)) not in self._warned:
            self._warned.add(spacing)
            warn_wasted_steps(self.backbone, sampler)
        if self.backbone.is_flux or self._others:
            shown, how = Shown(image[None], mask[None]), {"others": self._others, "progress": progress}
            return paint(self.backbone, self.controlnet, shown, [prompt], sampler, **how)[0]
        kind = sampler.injection, sampler.latents
        if kind not in self._pipelines:
            self._pipelines[kind] = make_pipeline(self.backbone, self.controlnet, *kind)
        return run_pipeline(self._pipelines[kind], self.backbone, image, mask, prompt, sampler, progress)


@dataclass(frozen=True)
class Inpainted:
    """A photograph with a repainted region."""

    image: Image.Image
    """In the photograph's size, RGB or RGBA in its own colour profile; profile and EXIF are in `info`."""
    box: Box
    """The part of the photograph that the model was shown: x0, y0, x1, y1."""
    seconds: float
    seed: int
    sampler: SamplerConfig

    def save(self, path: str | Path) -> Path:
        """Writes a .png, .jpg or .webp with the photograph's profile and EXIF, and returns its path.

        Raises InvalidInputError for another ending or a path where no file can be, StorageError."""
        from refine_control.storage import write_output

        out = Path(path)
        write_output(out, encode_picture(self.image, out))
        return out


class Inpainter:
    """A model that repaints regions of photographs.

    >>> inpainter = Inpainter.load("mini")
    >>> result = inpainter.inpaint("photo.jpg", "mask.png", "a red circle", seed=0)
    >>> result.save("painted.jpg")
    """

    def __init__(self, painter: Painter, model: str = "mini", controlnet: str | Path | None = None) -> None:
        self.painter, self.model, self.controlnet = painter, model, controlnet
        self._loaded: dict[str | Path, ControlNet] = {}

    @classmethod
    def load(
        cls,
        model: str | Path = "mini",
        controlnet: str | Path | None = None,
        *,
        runtime: Runtime = "torch",
        device: str | None = None,
        threads: int | None = None,
    ) -> Inpainter:
        """A model named `mini`, by a hub id or a folder, with a ControlNet named `edge`, by a hub id or a folder.

        Without a ControlNet the model's own is used, for `mini` the packaged student `edge`; the model's name as
        `controlnet` means its own. With the runtime `onnx` or `openvino`, `controlnet` is the folder that
        `refine-control export` wrote, and neither torch nor the model is needed. `device` is torch's, the best one by
        default; `threads` are those of the other runtimes. Raises InvalidInputError for what does not fit, MissingError
        for weights and extras that are not there."""
        if runtime not in RUNTIMES:
            raise InvalidInputError(f"there is no runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}")
        if runtime != "torch":
            return cls(_load_exported(controlnet, runtime, threads), str(model), controlnet)
        from refine_control.conditions.condition import has_region
        from refine_control.models.devices import best_device
        from refine_control.models.loading import load_painter

        chosen = default_controlnet(model, controlnet)
        backbone, network = load_painter(model, chosen, best_device() if device is None else device)
        if not has_region(network.config):
            raise InvalidInputError(
                f"the ControlNet of {chosen or model} is shown no mask; use it by `refine-control generate`, or name "
                "one for inpainting"
            )
        return cls(TorchPainter(backbone, network), str(model), chosen)

    @property
    def geometry(self) -> Geometry:
        """The sizes that the model paints; photographs may have any."""
        return self.painter.geometry

    @property
    def exported(self) -> bool:
        """Whether an exported folder paints, which `controlnet` names."""
        return isinstance(self.painter, ExportedPainter)

    def sampler(self, **given: Any) -> SamplerConfig:
        """The fields of SamplerConfig that are given (None: not given), and else as the ControlNet's card says."""
        if isinstance(self.painter, ExportedPainter):
            return self.painter.choose_sampler(given)
        return choose_sampler(self.model, self.controlnet, given)

    def beside(
        self,
        controls: Sequence[tuple[str | Path, Picture]],
        photograph: Original,
        *,
        scales: Sequence[float] = (),
        conditions: Sequence[str] = (),
        prepared: bool = False,
        preparer: str | None = None,
    ) -> tuple[Beside, ...]:
        """The ControlNets that paint beside this model's, each with a picture of the photograph's size.

        `scales` are conditioning scales: none, one for all, or one for each, the model's own ControlNet first;
        `conditions` the kinds of those in `controls`: none, or one for each. Raises
        InvalidInputError for what cannot be used, MissingError for what is not there."""
        names = [name for name, _ in controls]
        every = [self.controlnet, *names]
        check_scales(scales, len(every))
        if not controls:
            return ()
        if not isinstance(self.painter, TorchPainter):
            raise InvalidInputError("an exported folder paints with its own ControlNet alone; leave out `controls`")
        refuse_own_transformer(every)
        _, *factors = conditioning_scales(self.model, every, scales, 1.0)
        absent = [name for name in names if name not in self._loaded]
        self._loaded |= zip(absent, load_beside(self.painter.backbone, absent), strict=True)
        networks = [self._loaded[name] for name in names]
        name_conditions(networks, names, conditions)
        chosen, read = list[Beside](), readings(networks, prepared, preparer)
        for network, scale, reading, (_, given) in zip(networks, factors, read, controls, strict=True):
            picture = read_condition(given, photograph, reading.ground)
            reading.check(picture, given if isinstance(given, str | Path) else "the condition picture")
            chosen.append(Beside(network, scale, reading, picture))
        return tuple(chosen)

    def inpaint(
        self,
        image: Picture,
        mask: Picture | Sequence[int],
        prompt: str,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        conditioning_scale: float | Sequence[float] | None = None,
        controls: Sequence[tuple[str | Path, Picture]] = (),
        conditions: Sequence[str] = (),
        prepared: bool = False,
        preparer: str | None = None,
        whole: bool = False,
        context: float = CONTEXT,
        feather: int | None = None,
        progress: Progress | None = None,
    ) -> Inpainted:
        """Repaints the white part of a mask by `prompt`.

        `image` is a file, a PIL image or (H, W, 3) uint8, of any size; `mask` one of them of the same size, grey > 127
        or True = inpaint, or a box x0, y0, x1, y1. Defaults of the sampling are those of the ControlNet's card.
        `whole` paints the photograph as it is, else a frame around the hole with `context` times the hole's longer side
        on each side (0 to 10; see `framing`). `feather` is the width in pixels in which the painted part fades out
        around the hole (0 to 1000; default: 1/32 of the frame); everything farther away is kept exactly. `controls`
        are ControlNets without a mask that paint with the model's own, each with a picture of the photograph's size:
        a photograph, of which the condition picture is made, or that itself where it is `prepared` or the condition has
        no preparation (`preparer`: the model that makes it); `conditions` are the kinds of ControlNets whose configs do
        not say them, one for each. `conditioning_scale` is one for all or one for each, the model's own first.
        `progress` counts the sampling steps, with `controls` the frames. Raises InvalidInputError for what cannot be
        used."""
        check_prompt(prompt)
        photograph = read_photograph(image)
        region = read_mask(mask, photograph)
        scales = [] if conditioning_scale is None else np.atleast_1d(conditioning_scale).tolist()
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        try:
            sampler = self.sampler(**given, conditioning_scale=scales[0] if scales else None, seed=seed)
        except ValueError as error:  # pydantic's names the field, the range and the value
            raise InvalidInputError(f"settings of the sampling that cannot be used: {error}") from None
        seen: Any = {"conditions": conditions, "prepared": prepared, "preparer": preparer}
        others = self.beside(controls, photograph, scales=scales, **seen)
        how: Any = {"whole": whole, "context": context, "feather": feather, "progress": progress}
        return self.repaint(photograph, region, prompt, sampler, others, **how)

    def repaint(
        self,
        photograph: Original,
        mask: np.ndarray,
        prompt: str,
        sampler: SamplerConfig,
        others: Sequence[Beside] = (),
        *,
        whole: bool = False,
        context: float = CONTEXT,
        feather: int | None = None,
        progress: Progress | None = None,
    ) -> Inpainted:
        """As `inpaint`, of a photograph that is read, mask (H, W) bool, with a sampler and what `beside` gives."""
        check_prompt(prompt)
        check_edges(context, feather)
        began, geometry = time.monotonic(), self.painter.geometry
        _warn_transparent(photograph.picture, mask)
        shown, left = np.array(photograph.shown), mask.copy()
        apart = photograph.profile is not None or photograph.picture.mode != "RGB"
        picture = np.array(photograph.picture) if apart else shown
        planned = frames(mask, geometry, context, whole)
        for number, frame in enumerate(planned):
            (x0, y0, x1, y1), (a, b, c, d) = frame.box, frame.hole
            hole = np.zeros_like(left)
            hole[b:d, a:c] = left[b:d, a:c]
            if not hole.any():  # all of it lay in the bounding box of another
                continue
            seen, painter = cut(shown, left, frame, geometry.multiple), self.painter
            if others:
                assert isinstance(painter, TorchPainter)
                painter = painter.beside([each.of_frame(frame, geometry.multiple) for each in others])
            painted = uncut(painter.paint(*seen, prompt, sampler, _later(progress, number, len(planned))), frame)
            width = round(FEATHER * max(x1 - x0, y1 - y0)) if feather is None else feather
            left_edge, top = max(x0, a - width), max(y0, b - width)
            place = np.s_[top : min(y1, d + width), left_edge : min(x1, c + width)]
            part = painted[top - y0 :, left_edge - x0 :][: shown[place].shape[0], : shown[place].shape[1]]
            weight = opacity(hole[place], width)
            shown[place] = blend(shown[place], part, weight)
            if apart:
                converted = np.asarray(photograph.in_own_colours(Image.fromarray(part)))
                picture[place][..., :3] = blend(picture[place][..., :3], converted, weight)
            left &= ~hole
        ends = np.array([frame.box for frame in planned])
        box = (*ends[:, :2].min(0).tolist(), *ends[:, 2:].max(0).tolist())
        image = Image.fromarray(picture)
        facts = {"icc_profile": photograph.profile, "exif": photograph.exif}
        image.info |= {name: value for name, value in facts.items() if value}
        return Inpainted(image, box, time.monotonic() - began, sampler.seed, sampler)


def _warn_transparent(picture: Image.Image, mask: np.ndarray) -> None:
    """Warns where a hole is mostly transparent: the transparency stays."""
    if picture.mode == "RGBA" and (share := (np.asarray(picture)[mask, 3] == 0).mean()) > 0.5:
        text = "%.0f %% of the masked region is transparent in the photograph and stays so; make it opaque before"
        logger.warning(text, 100 * share)


def _later(progress: Progress | None, number: int, count: int) -> Progress | None:
    """The progress of one of several frames as a part of all."""
    if progress is None:
        return None
    return lambda done, total, note="": progress(number * total + done, count * total, note)


def _load_exported(folder: str | Path | None, runtime: str, threads: int | None) -> Painter:
    """The painter of an exported folder. Raises InvalidInputError for a folder that is none or another runtime's."""
    make = f"`refine-control export STUDENT --to {runtime} --out FOLDER`"
    if folder is None or not Path(folder).is_dir():
        named = "no ControlNet is named" if folder is None else f"{folder} is no folder"
        raise InvalidInputError(
            f"the runtime {runtime} paints from an exported folder, and {named}; make one with {make}"
        )
    from refine_control.runtime.exported import ExportedPipeline

    painter = ExportedPipeline(folder, threads)
    about = painter.description
    if (about.engine, about.condition) != (runtime, INPAINT):
        raise InvalidInputError(
            f"{folder} is an export of the condition {about.condition} for {about.engine}, not of {INPAINT} for "
            f"{runtime}; make one with {make}"
        )
    return painter


def check_edges(context: float, feather: int | None) -> None:
    """Raises InvalidInputError for a context or a feather out of range."""
    if not 0 <= context <= MOST_CONTEXT:
        raise InvalidInputError(f"the context {context:g} is not between 0 and {MOST_CONTEXT:g} sides of the hole")
    if feather is not None and not 0 <= feather <= MOST_FEATHER:
        raise InvalidInputError(f"the feather {feather} is not between 0 and {MOST_FEATHER} pixels")
