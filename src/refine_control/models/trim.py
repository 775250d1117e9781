"""Layers of a ControlNet that stock diffusers never reads: which they are, and the folder without them.

Which layer feeds which block follows from the layer counts alone. A layer can go only if nothing else changes: the
layers that stay feed the same blocks, and none of them computes from it. Holds for a ControlNet used alone;
diffusers adds the residuals of several ControlNets layer by layer before it injects them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import FluxControlNetModel, FluxTransformer2DModel, SD3ControlNetModel, SD3Transformer2DModel

from refine_control.errors import InvalidInputError
from refine_control.folders import A_CONTROLNET, A_MODEL, refuse_other_kind
from refine_control.models.card import packaged
from refine_control.models.components import find_weights, read_config, read_headers, read_json, read_tensors
from refine_control.models.families import Sites, flux, sd3
from refine_control.models.hub import folder_of
from refine_control.storage import publish_folder, write_json

STEM = "diffusion_pytorch_model"
_SD3_BLOCKS = (24, 38)
"""Blocks of the published SD3 transformers, medium and large: each has as many attention heads."""


class Stream(NamedTuple):
    """The layers of a ControlNet that feed one kind of block, and what diffusers reads of them."""

    kind: str
    """`joint` blocks of SD3; `double` or `single` ones of FLUX."""
    num_layers: int
    num_sites: int
    """Blocks that take a residual."""
    unread: list[int]
    """Indices of the layers that no block reads."""
    kept: int
    """Layers left after the cut: the first ones."""
    obstacle: str
    """Why unread layers stay; empty where none does."""


class Trimmed(NamedTuple):
    """What `trim` reports."""

    controlnet: str
    streams: list[Stream]
    num_params: int | None
    """Parameters before the cut; None where no folder is written."""
    kept_params: int | None
    out: Path | None

    @property
    def text(self) -> str:
        """The report for people."""
        lines = []
        for stream in filter(lambda stream: stream.num_layers, self.streams):
            read = stream.num_layers - len(stream.unread)
            line = f"{stream.kind}: diffusers reads {read} of {stream.num_layers} layers, for {stream.num_sites} blocks"
            never = f"; never layer {', '.join(map(str, stream.unread))}" if stream.unread else ""
            lines.append(line + never + (f", which stays: {stream.obstacle}" if stream.obstacle else ""))
        if self.out is not None:
            lines.append(f"{self.out}: {self.kept_params:,} of {self.num_params:,} parameters, the same pictures")
        elif any(stream.kept < stream.num_layers for stream in self.streams):
            lines.append("--out FOLDER writes the ControlNet without them; it gives the same pictures")
        return "\n".join(lines)


def trim(controlnet: str | Path, model: str | Path | None = None, out: Path | None = None) -> Trimmed:
    """Finds the layers that stock diffusers never reads; with `out` also writes the ControlNet without them.

    Finding reads configs alone. `model` is the one that the ControlNet is for; default: the published sizes of
    FLUX.1 and SD3. Weights keep their type. Raises MissingError for files that are not there, InvalidInputError for
    another family, an unknown number of blocks, and for `out` where no layer can go."""
    accepted = "a ControlNet folder in diffusers layout, or a hub id"
    folder = packaged(controlnet) or folder_of(controlnet, ["config.json"], accepted)
    refuse_other_kind(folder, A_CONTROLNET)
    family = read_json(folder / "config.json", "give a ControlNet folder in diffusers layout").get("_class_name")
    if family not in ("FluxControlNetModel", "SD3ControlNetModel"):
        raise InvalidInputError(f"{folder} holds a {family}; layers can be found of SD3 and FLUX ControlNets")
    streams = (_flux_streams if family == "FluxControlNetModel" else _sd3_streams)(folder, model)
    if out is None:
        return Trimmed(str(controlnet), streams, None, None, None)
    if all(stream.kept == stream.num_layers for stream in streams):
        obstacles = [f"{s.kind} layer {s.unread[0]} stays: {s.obstacle}" for s in streams if s.obstacle]
        why = obstacles[0] if obstacles else "diffusers reads all its layers"
        raise InvalidInputError(f"{controlnet} cannot be cut without loss: {why}; nothing is written")
    folder_of(controlnet, ["config.json", f"{STEM}*.safetensors"], accepted)
    before, after = _write(folder, out, streams)
    return Trimmed(str(controlnet), streams, before, after, out)


def _blocks(model: str | Path, transformer: Any, names: Iterable[str]) -> dict[str, int]:
    """The numbers of blocks that the config of a model's transformer states under `names`."""
    name = "transformer/config.json"
    folder = packaged(model) or folder_of(model, [name], "a pipeline folder in diffusers layout, or a hub id")
    refuse_other_kind(folder, A_MODEL)
    return _counts(transformer, folder / "transformer", names)


def _counts(component: Any, folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Numbers of layers from a config. Raises InvalidInputError where it does not state one that can be."""
    config = read_config(component, folder)
    for name in names:
        if not isinstance(config.get(name), int) or not 0 <= config[name] < 1000:
            raise InvalidInputError(
                f"{folder / 'config.json'}: {name} is {config.get(name)}; a {component.__name__} has a number of "
                "layers there, use the config that belongs to these weights"
            )
    return {name: config[name] for name in names}


def _flux_streams(folder: Path, model: str | Path | None) -> list[Stream]:
    counts, config = _counts(FluxControlNetModel, folder, flux.BLOCKS), read_config(FluxControlNetModel, folder)
    blocks = flux.BLOCKS if model is None else _blocks(model, FluxTransformer2DModel, flux.BLOCKS)
    obstacles = ["the single layers compute from it" if counts["num_single_layers"] else "", ""]
    rows = zip(("double", "single"), counts.values(), flux.family(blocks, config).sites, obstacles, strict=True)
    placed = "refine-control reads it by the map in the config"
    return [
        _stream(kind, count, sites, placed if "layer_of_site" in config else obstacle)
        for kind, count, sites, obstacle in rows
    ]


def _sd3_streams(folder: Path, model: str | Path | None) -> list[Stream]:
    (layers,) = _counts(SD3ControlNetModel, folder, ["num_layers"]).values()
    heads = read_config(SD3ControlNetModel, folder)["num_attention_heads"]
    if model is None and heads not in _SD3_BLOCKS:
        raise InvalidInputError(
            f"{folder} has {heads} attention heads, as no published SD3 model has; name the model that it is for with "
            "--model"
        )
    blocks = {"num_layers": heads} if model is None else _blocks(model, SD3Transformer2DModel, ["num_layers"])
    return [_stream("joint", layers, sd3.two_streams("", blocks, {}).sites[0])]


def _stream(kind: str, num_layers: int, sites: Sites, obstacle: str = "") -> Stream:
    """What stock reads of `num_layers`, and how many of them can stay alone."""
    unread = sites.dead_layers(num_layers) if num_layers else []
    kept = num_layers
    while kept - 1 in unread:
        kept -= 1
    if unread and not obstacle and sites.stock(kept) != sites.stock(num_layers):
        obstacle = "without it diffusers would feed other layers to the blocks"
    fixed = bool(unread and obstacle)
    return Stream(kind, num_layers, sites.count, unread, num_layers if fixed else kept, obstacle if fixed else "")


def _write(folder: Path, out: Path, streams: list[Stream]) -> tuple[int, int]:
    """Writes the first layers of each stream and everything else, bit for bit; the parameters before and after."""
    from safetensors.torch import save_file

    headers = read_headers(find_weights(folder, STEM))
    config = read_json(folder / "config.json", "give a ControlNet folder in diffusers layout")
    kept = dict(headers)
    for stream in streams:
        single = "single_" if stream.kind == "single" else ""
        layer = re.compile(rf"(?:{single}transformer_blocks|controlnet_{single}blocks)\.(\d+)\.")
        numbers = {name: int(match[1]) for name in headers if (match := layer.match(name))}
        if {*numbers.values()} != {*range(stream.num_layers)}:
            raise InvalidInputError(
                f"the weights in {folder} hold {len({*numbers.values()})} {stream.kind} layers, and its config.json "
                f"says {stream.num_layers}; use the config that belongs to these weights"
            )
        kept = {name: header for name, header in kept.items() if numbers.get(name, -1) < stream.kept}
        config[f"num_{single}layers"] = stream.kept
    with publish_folder(out) as temporary:
        write_json(temporary / "config.json", config)
        save_file(read_tensors(kept, None), temporary / f"{STEM}.safetensors", {"format": "pt"})
    before, after = (sum(math.prod(header.shape) for header in each.values()) for each in (headers, kept))
    return before, after
