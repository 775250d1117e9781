"""One unsharded fp16 safetensors file with diffusers' names, which ComfyUI loads from models/controlnet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from refine_control.errors import InvalidInputError
from refine_control.export.format import Format, Velocity, Work
from refine_control.export.source import Source
from refine_control.export.stock import (
    comfy_layers,
    comfy_state,
    comfy_warning,
    refuse_comfy,
    unshifted,
    velocity_by,
)
from refine_control.models.controlnet import ControlNet
from refine_control.models.own_transformer import own_folder

FILE = "controlnet.safetensors"
logger = logging.getLogger(__name__)


def _refuse(source: Source) -> None:
    refuse_comfy(source)
    if source.folder and (beside := own_folder(source.folder)):
        raise InvalidInputError(
            f"{source.name} was trained together with {beside.name}, for which a single file has no place; export it "
            "with --to diffusers or --to onnx"
        )


def _write(work: Work, folder: Path) -> None:
    from safetensors.torch import save_file

    if warning := comfy_warning(work.source):
        logger.warning("%s", warning)
    save_file(comfy_state(work.source), folder / FILE, {"format": "pt"})


def _load(work: Work, folder: Path) -> Velocity:
    from safetensors.torch import load_file

    source = work.source
    controlnet = cast(ControlNet, ControlNet.from_config(dict(source.controlnet.config)))
    controlnet.load_state_dict(load_file(folder / FILE))
    layers = comfy_layers(len(controlnet.controlnet_blocks), source.backbone.num_blocks)
    return velocity_by(work, controlnet.float().eval(), layers, lambda cond: unshifted(source, cond))


FORMAT = Format("single-file", "ComfyUI, fp16", 5e-3, _write, _load, _refuse)
