"""A folder for stock diffusers in fp16 (`variant="fp16"`), the student's card and scheduler beside the weights."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refine_control.export.format import Format, Velocity, Work
from refine_control.export.source import Source
from refine_control.export.stock import refuse_shifted, velocity_by
from refine_control.injection import diffusers_layer_of_block
from refine_control.models.card import CARD
from refine_control.models.families.flux import stock_layer_of_site
from refine_control.models.loading import controlnet_class
from refine_control.models.own_transformer import LORA, WHOLE, load_own_transformer
from refine_control.storage import write_atomic

_KEPT = (CARD, "scheduler", LORA)


def _write(work: Work, folder: Path) -> None:
    source = work.source
    _save_half(source.controlnet, folder)
    if source.folder is None:
        return
    for name in _KEPT:
        if (kept := source.folder / name).is_dir():
            shutil.copytree(kept, folder / name)
        elif kept.is_file():
            shutil.copyfile(kept, folder / name)
    if (readme := source.folder / "README.md").is_file():
        text = readme.read_text().replace("from_pretrained(FOLDER)", 'from_pretrained(FOLDER, variant="fp16")')
        write_atomic(folder / readme.name, text)
    if (source.folder / WHOLE).is_dir():
        _save_half(source.backbone.transformer, folder / WHOLE)


def _save_half(network: Any, folder: Path) -> None:
    half = copy.deepcopy(network).half()
    half.save_pretrained(folder, variant="fp16", max_shard_size="100GB")


def load(work: Work, folder: Path, change: Callable[[Any], Any] = lambda network: network) -> Velocity:
    """What stock diffusers computes with the folder, its networks changed after loading."""
    backbone = work.source.backbone
    controlnet = controlnet_class(folder).from_pretrained(folder, variant="fp16").float().eval()
    if backbone.is_flux:
        layers = stock_layer_of_site(work.source.controlnet.config)
    else:
        layers = diffusers_layer_of_block(len(controlnet.controlnet_blocks), backbone.num_blocks)[:-1]
    trained = load_own_transformer(folder, backbone.transformer) if (folder / WHOLE).is_dir() else None
    return velocity_by(work, change(controlnet), layers, transformer=change(trained or backbone.transformer))


def _refuse(source: Source) -> None:
    refuse_shifted(source, "stock diffusers")


FORMAT = Format("diffusers", "stock diffusers, fp16", 5e-3, _write, load, _refuse, flux=True)
