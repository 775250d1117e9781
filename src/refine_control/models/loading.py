"""Strict loading of models in diffusers layout: what is on disk is what you get, or a sentence says why not.

A model is named `mini`, by a folder, or by a hub id. Weights are safetensors only. diffusers itself accepts
a folder whose config and weights disagree in layer count, without a word (docs/paper.md, trap 5).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetInpaintingPipeline

from refine_control.errors import InvalidInputError, MissingError
from refine_control.models.backbone import Backbone
from refine_control.models.card import BUNDLE, CARD
from refine_control.models.controlnet import warn_if_stock_differs
from refine_control.models.cpu_kernels import use_cpu_kernels
from refine_control.models.hub import folder_of
from refine_control.storage import MANIFEST, publish_folder, read_manifest

WEIGHTS = "diffusion_pytorch_model.safetensors"
SD3_MAX_SEQUENCE_LENGTH = 256


def resolve(model: str | Path) -> Path:
    """The folder of a model named `mini`, by a path, or by a hub id (downloaded once, then offline).

    Raises MissingError when a hub id is neither cached nor reachable, InvalidInputError for a missing folder."""
    if str(model) == "mini":
        if not (BUNDLE / "model_index.json").is_file():
            raise MissingError(f"the mini bundle is not in {BUNDLE}; make it with `refine-control mini train`")
        return BUNDLE
    files = ["*.json", "*.safetensors", "*.txt", "*.model"]
    return folder_of(model, files, "`mini`, a folder in diffusers layout, or a hub id")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise InvalidInputError(f"{folder} has no config.json; give a ControlNet folder in diffusers layout") from None
    except ValueError:
        raise InvalidInputError(f"{folder / 'config.json'} is not JSON; save the model again") from None


def _compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], folder: Path) -> None:
    """Key sets and shapes both ways, all finite."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [k for k in expected.keys() & found.keys() if expected[k].shape != found[k].shape]
    for names, what in ((missing, "lacks"), (unknown, "holds unknown"), (sorted(shapes), "has another shape for")):
        if names:
            raise InvalidInputError(
                f"the weights in {folder} disagree with its config.json: it {what} {len(names)} tensors, "
                f"first {names[0]}; use the config that belongs to these weights"
            )
    bad = next((k for k, v in found.items() if v.is_floating_point() and not torch.isfinite(v).all()), None)
    if bad:
        raise InvalidInputError(f"{folder}: the tensor {bad} holds values that are not finite; use another checkpoint")


def load_controlnet(folder: str | Path, extra_channels: int = 1) -> SD3ControlNetModel:
    """An fp32 ControlNet on the CPU from a folder or hub id, loaded strictly.

    `extra_channels` stands in for a config without `extra_conditioning_channels` (the published teacher's;
    docs/paper.md, trap 6). Raises InvalidInputError when config and weights disagree or a weight is not finite."""
    from safetensors.torch import load_file

    path = resolve(folder)
    config = _read_config(path)
    files = sorted(path.glob("diffusion_pytorch_model*.safetensors"))
    files = [f for f in files if "fp16" not in f.name] or files
    if not files:
        raise InvalidInputError(f"{path} has no {WEIGHTS}; only safetensors are read")
    known = set(SD3ControlNetModel._get_init_keys(SD3ControlNetModel))
    arguments = {"extra_conditioning_channels": extra_channels, **{k: v for k, v in config.items() if k in known}}
    arguments["dual_attention_layers"] = tuple(arguments.get("dual_attention_layers") or ())
    try:
        tensors = {k: v for file in files for k, v in load_file(file).items()}
    except Exception as error:  # safetensors raises its own Rust error type for a cut or foreign file
        raise InvalidInputError(f"{path}: {error}; copy the weights again") from error
    with torch.device("meta"):
        controlnet = SD3ControlNetModel(**arguments)
    table = "pos_embed.pos_embed"  # a fixed table that some files leave out; where it is, it must fit
    expected = {k: v for k, v in controlnet.state_dict().items() if k != table or k in tensors}
    _compare(tensors, expected, path)
    controlnet = SD3ControlNetModel(**arguments)
    controlnet.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    return controlnet.eval()


def weights_mark(name: str | Path) -> str:
    """A hash of a folder's weights and configurations; a hub's id as it is.

    From the manifest where this project wrote the folder; else of each file, which may hold gigabytes, the size and
    three pieces."""
    folder = Path(name)
    if not folder.is_dir():
        return str(name)
    marks = (".safetensors", "config.json")
    if (folder / MANIFEST).is_file():
        files = read_manifest(folder, verify=False)["files"]
        weights = {path: file["sha256"] for path, file in files.items() if path.endswith(marks)}
    else:
        found = sorted(path for path in folder.rglob("*") if path.name.endswith(marks) and path.is_file())
        weights = {path.relative_to(folder).as_posix(): _pieces_hash(path) for path in found}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def _pieces_hash(path: Path) -> str:
    piece, size, told = 1 << 20, path.stat().st_size, hashlib.sha256()
    told.update(str(size).encode())
    with path.open("rb") as file:
        for start in (0, (size - piece) // 2, size - piece):
            file.seek(max(0, start))
            told.update(file.read(piece))
    return told.hexdigest()


def save_controlnet(controlnet: SD3ControlNetModel, folder: Path, num_blocks: int, **described: Any) -> None:
    """Publishes a folder that stock `SD3ControlNetModel.from_pretrained` loads; warns where stock injects wrongly.

    `described` goes into the folder's manifest: what made it."""
    warn_if_stock_differs(len(controlnet.transformer_blocks), num_blocks)
    with publish_folder(folder, **described) as temporary:
        controlnet.save_pretrained(temporary, max_shard_size="100GB")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars for the seconds that loading takes."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def load_pipeline(
    model: str | Path, controlnet: SD3ControlNetModel | None = None, dtype: torch.dtype = torch.float32
) -> StableDiffusion3ControlNetInpaintingPipeline:
    """The stock inpainting pipeline of a model; the folder may lack a ControlNet (plain SD3) if one is given."""
    path = resolve(model)
    try:
        index = json.loads((path / "model_index.json").read_text())
    except FileNotFoundError:
        raise InvalidInputError(f"{path} has no model_index.json; give a pipeline folder in diffusers layout") from None
    if controlnet is None:
        if "controlnet" not in index:
            raise InvalidInputError(
                f"{path} holds no ControlNet; name one with --controlnet, --teacher or `teacher:` in the recipe"
            )
        controlnet = load_controlnet(path / "controlnet")
    given: dict[str, Any] = {"controlnet": controlnet}
    if index.get("text_encoder_3", [None])[0] is None:
        given |= {"text_encoder_3": None, "tokenizer_3": None}
    with _quiet():
        return StableDiffusion3ControlNetInpaintingPipeline.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, **given
        )


def _card(model: str | Path) -> dict[str, Any]:
    """What a bundle of this project says of itself; other models say nothing."""
    card = resolve(model) / CARD
    return json.loads(card.read_text()) if card.is_file() else {}


def _vocabulary(card: dict[str, Any]) -> frozenset[str] | None:
    """The words that a bundle's text encoders were trained on; None where any word may be read."""
    return frozenset(card["vocabulary"]) if card.get("vocabulary") else None


def closed_vocabulary(model: str | Path) -> frozenset[str] | None:
    """The words that a model reads, by its card, without loading it; None where any word may be read."""
    return _vocabulary(_card(model))


def load_backbone(
    model: str | Path,
    controlnet: SD3ControlNetModel | None = None,
    cpu_kernels: bool = False,
    device: torch.device | str = "cpu",
    painting: bool = True,
) -> Backbone:
    """The frozen parts of a model, put on `device` as `Backbone.to` does.

    `cpu_kernels` takes the operators that are fast on a CPU, where the model runs there.

    Raises what `load_pipeline` raises, and InvalidInputError for a VAE that does not say how SD3 scales its latents."""
    pipeline = load_pipeline(model, controlnet)
    unsaid = [name for name in ("scaling_factor", "shift_factor") if pipeline.vae.config.get(name) is None]
    if unsaid:
        raise InvalidInputError(
            f"the VAE of {model} has no {unsaid[0]} in its config.json; SD3's have one: write it there"
        )
    card = _card(model)
    backbone = Backbone(
        pipeline,
        card.get("max_sequence_length", SD3_MAX_SEQUENCE_LENGTH),
        vocabulary=_vocabulary(card),
    ).to(device, painting)
    if cpu_kernels and backbone.device.type == "cpu":
        use_cpu_kernels(backbone.transformer, pipeline.controlnet)
    return backbone
