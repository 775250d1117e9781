"""A student's own transformer: a copy of the frozen one that is trained whole, or through LoRA adapters (peft).

In training an adapter adds to the product of its layer. From a folder it is added to the layer's weight, so painting
costs what it costs with the frozen transformer, and needs no peft.
"""

# r rank, D_in and D_out widths of a linear layer

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3ControlNetInpaintingPipeline
from torch import nn

from refine_control.errors import InvalidInputError
from refine_control.models.components import find_weights, load_network, read_headers, read_tensors
from refine_control.models.fit import check_transformer

WHOLE, LORA = "transformer", "transformer_lora"
"""Folders beside the ControlNet, in the layout of `save_pretrained` and of `save_lora_weights`.

Stock diffusers needs the path of the folder: for a local path with `subfolder=` it reads the ControlNet's weights."""
_LORA_STEM, _PREFIX = "pytorch_lora_weights", "transformer."
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Layers of the attentions, which LoRA adapts (as diffusers' SD3 training script does)."""
_NO_GRADIENT = ("attn.add_q_proj", "attn.norm_added_q")
"""Of the last block: nobody reads what its text stream attends to."""


def sharing_copy(network: Any) -> Any:
    """A copy with modules and trainable parameters of its own that shares the frozen parameters and the buffers."""
    shared = [*(p for p in network.parameters() if not p.requires_grad), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def _is_dead(name: str, transformer: SD3Transformer2DModel) -> bool:
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}."
    return name.startswith(tuple(last + part for part in _NO_GRADIENT))


def trainable_copy(
    transformer: SD3Transformer2DModel, kind: Literal["lora", "whole"], rank: int, seed: int
) -> SD3Transformer2DModel:
    """A copy of a frozen transformer whose parameters that get a gradient are trainable; it starts equal to it.

    `lora`: adapters of a rank on the attentions' projections, scaled by 1, drawn from `seed`; all else is shared with
    `transformer`. `whole`: a copy of all parameters. Raises ModuleNotFoundError for `lora` without peft."""
    if kind == "whole":
        copied = copy.deepcopy(transformer)
        for name, parameter in copied.named_parameters():
            parameter.requires_grad_(not _is_dead(name, copied))
        return copied
    from peft import LoraConfig

    copied = sharing_copy(transformer)
    layers = [
        name
        for name, module in copied.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(_PROJECTIONS) and not _is_dead(name, copied)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        copied.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    return copied


def own_folder(folder: Path) -> Path | None:
    """Where a student's folder holds its own transformer, whole or LoRA; None where it has none."""
    if (folder / WHOLE / "config.json").is_file():
        return folder / WHOLE
    return folder / LORA if (folder / LORA).is_dir() else None


def save_own_transformer(copied: SD3Transformer2DModel, folder: Path) -> None:
    """Writes `transformer/` or `transformer_lora/` in a student's folder, for stock diffusers to load."""
    adapters = {name: p.detach() for name, p in copied.named_parameters() if ".lora_" in name}
    if not adapters:
        copied.save_pretrained(folder / WHOLE, max_shard_size="100GB")
        return
    layers: dict[str, Any] = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in adapters.items()}
    StableDiffusion3ControlNetInpaintingPipeline.save_lora_weights(folder / LORA, transformer_lora_layers=layers)


def load_own_transformer(folder: Path, transformer: SD3Transformer2DModel) -> SD3Transformer2DModel | None:
    """The own transformer of a student's folder, frozen, where `transformer` is and in its type; None without one.

    Of a LoRA it shares with `transformer` what the adapters leave as it is. Raises what `load_network` raises, and
    InvalidInputError for one that does not belong to `transformer`."""
    own_at = own_folder(folder)
    if own_at is None:
        return None
    if own_at.name == WHOLE:
        copied = load_network(SD3Transformer2DModel, own_at)
        check_transformer(copied.config, transformer.config, folder)
        return copied.requires_grad_(False).to(transformer.device, transformer.dtype)
    copied = sharing_copy(transformer)
    for name, (a, b) in read_lora(own_at, transformer).items():
        layer = copied.get_submodule(name)
        delta = (b @ a).to(layer.weight.device)
        layer.weight = nn.Parameter((layer.weight.float() + delta).to(layer.weight.dtype), requires_grad=False)
    return copied


def read_lora(folder: Path, transformer: SD3Transformer2DModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By layer of `transformer`: A (r,D_in) and B (D_out,r) of W + B A, fp32.

    Raises MissingError without the file, InvalidInputError where it holds anything else."""
    from safetensors import safe_open

    files = find_weights(folder, _LORA_STEM)
    headers = read_headers(files)
    linears = ((name, each) for name, each in transformer.named_modules() if isinstance(each, nn.Linear))
    layers = {name.removesuffix(".base_layer"): each for name, each in linears}  # peft holds the layer inside its own
    expected: dict[str, tuple[int, ...]] = {}
    names = sorted({name.removeprefix(_PREFIX).partition(".lora_")[0] for name in headers} & layers.keys())
    for name in names:
        a, b = (f"{_PREFIX}{name}.lora_{part}.weight" for part in "AB")
        rank = headers[a].shape[0] if a in headers and headers[a].shape else 0
        expected |= {a: (rank, layers[name].in_features), b: (layers[name].out_features, rank)}
    shapes = {name: header.shape for name, header in headers.items()}
    if wrong := sorted(name for name in {**shapes, **expected} if shapes.get(name) != expected.get(name)):
        raise InvalidInputError(
            f"{folder} is no LoRA of this transformer: {wrong[0]} is {_shape(shapes.get(wrong[0]))} and should be "
            f"{_shape(expected.get(wrong[0]))}; use the model that the student was trained with"
        )
    with safe_open(files[0], "pt") as opened:
        foreign = "lora_adapter_metadata" in (opened.metadata() or {})
    if foreign or not names:
        raise InvalidInputError(
            f"{folder} holds no LoRA of this project, whose scale is 1; copy the student's own file"
        )
    tensors = read_tensors(headers, torch.float32)
    a, b = ({n: tensors[f"{_PREFIX}{n}.lora_{part}.weight"] for n in names} for part in "AB")
    return {name: (a[name], b[name]) for name in names}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


@torch.no_grad()
def set_lora(copied: SD3Transformer2DModel, folder: Path) -> None:
    """Gives the adapters of a trainable copy the values in a folder of LoRA weights.

    Raises InvalidInputError where those have another rank or other layers, and what `read_lora` raises."""
    adapters = {name: p for name, p in copied.named_parameters() if ".lora_" in name}
    values = {}
    for layer, pair in read_lora(folder, copied).items():
        values |= {f"{layer}.lora_{part}.default.weight": value for part, value in zip("AB", pair, strict=True)}
    if {n: v.shape for n, v in values.items()} != {n: p.shape for n, p in adapters.items()}:
        rank = min(min(value.shape) for value in values.values())
        raise InvalidInputError(
            f"{folder} has adapters of rank {rank} on {len(values) // 2} layers, other ones than this recipe's; set "
            "student.lora_rank to it, or student.backbone to whole"
        )
    for name, parameter in adapters.items():
        parameter.copy_(values[name])
