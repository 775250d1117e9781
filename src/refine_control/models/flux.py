"""FLUX's transformer and ControlNets: tokens, residuals of double and single layers, injection, and students.

Stock diffusers runs them but knows no control input with a mask: `FluxInpaintingControlNet` is the stock ControlNet
with a wider first layer.
"""

# B batch, h w latents, N = h w / 4 image tokens, D width, T text tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from refine_control import losses
from refine_control.errors import InvalidInputError
from refine_control.injection import is_layer_of_site, sites_of_layer
from refine_control.models.components import load_network, read_config
from refine_control.models.controlnet import StudentInit
from refine_control.models.controlnet import trainable_parameters as _trainable_without_text
from refine_control.models.families import Family, find_family
from refine_control.models.families.flux import own_map
from refine_control.storage import publish_folder

_EMBEDDERS = ("time_text_embed", "context_embedder", "x_embedder")
_WIDTHS = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim")


class FluxInpaintingControlNet(FluxControlNetModel):
    """A FluxControlNetModel whose control tokens carry `extra_condition_channels` numbers more: the packed mask.

    Loads the published folders as they are; their config names the width so."""

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        extra_condition_channels: int = 4,
    ):
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=list(axes_dims_rope),
        )
        self.controlnet_x_embedder = nn.Linear(in_channels + extra_condition_channels, self.inner_dim)
        nn.init.zeros_(self.controlnet_x_embedder.weight)
        nn.init.zeros_(self.controlnet_x_embedder.bias)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B,C,h,w) -> tokens (B,N,4C): a token is a 2 x 2 square, channel by channel, each row by row."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens (B,N,4C) -> (B,C,h,w): the inverse of `pack`."""
    squares = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return nn.functional.pixel_shuffle(squares, 2)


def position_ids(height: int, width: int) -> torch.Tensor:
    """(N,3): zero, row and column of each token of latents of size h x w."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


class Condition(NamedTuple):
    """What a picture's velocity depends on beside its noisy tokens."""

    control: torch.Tensor
    """(B,N,64) of a condition's packed latents; (B,N,68) with the packed mask."""
    prompt_embeds: torch.Tensor
    """(B,T,D_text) of T5."""
    pooled_prompt_embeds: torch.Tensor
    """(B,D_pooled) of CLIP."""
    guidance_scale: float
    """A number that a guidance-distilled network reads."""
    conditioning_scale: float
    size: tuple[int, int]
    """h w of the latents."""


class Residuals(NamedTuple):
    """What the layers of both kinds give, (B,N,D) each; None where a ControlNet has no layer of a kind."""

    double: Sequence[torch.Tensor] | None
    single: Sequence[torch.Tensor] | None


def _inputs(network: Any, tokens: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> Mapping[str, Any]:
    """The inputs that transformer and ControlNet share; the guidance scale only for a network that embeds it."""
    dtype, device, batch = network.dtype, tokens.device, len(tokens)
    guidance = torch.full((batch,), condition.guidance_scale, device=device)
    return {
        "hidden_states": tokens.to(dtype),
        "timestep": sigma.to(device).expand(batch),
        "guidance": guidance if network.config["guidance_embeds"] else None,
        "encoder_hidden_states": condition.prompt_embeds.to(dtype),
        "pooled_projections": condition.pooled_prompt_embeds.to(dtype),
        "img_ids": position_ids(*condition.size).to(device),
        "txt_ids": torch.zeros(condition.prompt_embeds.shape[1], 3, device=device),
        "return_dict": False,
    }


def control_residuals(
    controlnet: FluxControlNetModel, tokens: torch.Tensor, sigma: torch.Tensor, condition: Condition
) -> Residuals:
    """The residuals of a ControlNet after their zero-linears, before injection; sigma () or (B,)."""
    double, single = cast(Any, controlnet)(
        controlnet_cond=condition.control.to(controlnet.dtype),
        conditioning_scale=condition.conditioning_scale,
        **_inputs(controlnet, tokens, sigma, condition),
    )
    return Residuals(double, single)


def velocity(
    transformer: FluxTransformer2DModel,
    residuals: Residuals,
    tokens: torch.Tensor,
    sigma: torch.Tensor,
    condition: Condition,
) -> torch.Tensor:
    """v (B,N,64) in fp32 for noisy tokens (B,N,64) and sigma () or (B,); `residuals` as `at_sites` gives them, or of a
    ControlNet that goes by stock's rule, i // ceil(blocks / L)."""
    inputs = _inputs(transformer, tokens, sigma, condition)
    given = {"controlnet_block_samples": residuals.double, "controlnet_single_block_samples": residuals.single}
    return cast(Any, transformer)(**given, **inputs)[0].float()


# Sites: double blocks, then single ones


def _layers(controlnet: FluxControlNetModel) -> tuple[int, int]:
    return len(controlnet.controlnet_blocks), len(controlnet.controlnet_single_blocks)


def site_maps(controlnet: FluxControlNetModel, family: Family) -> list[list[int]]:
    """The layer of each double and of each single block, empty for a kind without layers: a map of its own, or stock's,
    which published ControlNets are trained by."""
    counts = zip(family.sites, _layers(controlnet), strict=True)
    return [(controlnet.config.get(own_map(sites)) or sites.stock(count)) if count else [] for sites, count in counts]


def at_sites(residuals: Residuals, maps: Sequence[Sequence[int]]) -> Residuals:
    """One residual for each block, which every diffusers version injects one-to-one."""
    return Residuals(*([r[j] for j in layers] if r else None for r, layers in zip(residuals, maps, strict=True)))


def feature_losses(
    teacher: Residuals, student: Residuals, teacher_maps: Sequence[Sequence[int]], maps: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Eq. 5 of each kind of block by itself: (S_double + S_single,); the maps are those of `site_maps`.

    A layer of the teacher that no block reads is in no group."""
    expanded = at_sites(teacher, teacher_maps)
    return torch.cat(
        [
            losses.layer_losses(losses.group_targets(sites, sites_of_layer(layers)), layer_residuals)
            for sites, layer_residuals, layers in zip(expanded, student, maps, strict=True)
            if sites and layer_residuals
        ]
    )


# Students


def trainable_parameters(controlnet: FluxControlNetModel) -> dict[str, nn.Parameter]:
    """Parameters by name. Without single layers the text stream of the last double one is read by nobody: frozen here;
    single layers compute from both streams."""
    if not _layers(controlnet)[1]:
        return _trainable_without_text(cast(Any, controlnet))
    return dict(controlnet.requires_grad_(True).named_parameters())


def _refuse_misfits(
    transformer: FluxTransformer2DModel, teacher: FluxControlNetModel | None, family: Family, counts: Sequence[int]
) -> None:
    """Raises InvalidInputError unless the transformer has so many blocks, and the teacher its widths and layers of the
    same kinds as the student."""
    if not any(counts):
        raise InvalidInputError("a FLUX student needs at least one double or one single layer")
    for name in _WIDTHS if teacher else ():
        if cast(Any, teacher).config[name] != transformer.config[name]:
            raise InvalidInputError(
                f"the teacher's {name} is {cast(Any, teacher).config[name]} and the transformer's "
                f"{transformer.config[name]}; name the teacher of this model"
            )
    kinds = ("double", "single")
    for kind, count, sites in zip(kinds, counts, family.sites, strict=True):
        if not 0 <= count <= sites.count:
            raise InvalidInputError(f"{count} {kind} layers: this transformer admits 0 to {sites.count}")
    for kind, count, layers in zip(kinds, counts, _layers(teacher) if teacher else counts, strict=True):
        if bool(count) != bool(layers):
            raise InvalidInputError(
                f"the student has {count} {kind} layers and the teacher {layers}; give both some, or neither"
            )


def build_student(
    transformer: FluxTransformer2DModel,
    teacher: FluxControlNetModel | None,
    num_layers: int,
    num_single_layers: int,
    init: StudentInit,
    seed: int,
) -> FluxControlNetModel:
    """A student of so many double and single layers, fp32 on the CPU, for the teacher's condition; without a teacher,
    for a condition that adds no channels.

    `transformer`: the transformer's embedders and first blocks of each kind. `teacher`: its embedders and, for each
    group of Eq. 5, the layer of the group's last site with its zero-linear. `random`: a new network from `seed` with
    zero zero-linears. Groups are stock's where they use every layer; else they are even, and the student's config
    holds the map. Raises InvalidInputError for numbers of layers that do not suit, ValueError for `teacher` without a
    teacher."""
    family = find_family(transformer.config, None if teacher is None else teacher.config, "this model")
    counts = (num_layers, num_single_layers)
    _refuse_misfits(transformer, teacher, family, counts)
    extra = 0 if teacher is None else teacher.config.get("extra_condition_channels") or 0
    component: Any = FluxInpaintingControlNet if extra else FluxControlNetModel
    source: Any = teacher if init == "teacher" else transformer
    if source is None:
        raise ValueError("a student of the teacher's layers needs a teacher")
    known = component._get_init_keys(component)
    config = {name: value for name, value in dict(source.config).items() if name in known}
    config |= {"num_layers": num_layers, "num_single_layers": num_single_layers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = component(**config, **({"extra_condition_channels": extra} if init != "teacher" and extra else {}))
    maps = [sites.layer_of_site(count) if count else [] for sites, count in zip(family.sites, counts, strict=True)]
    for sites, count, layers in zip(family.sites, counts, maps, strict=True):
        if count and layers != sites.stock(count):
            student.register_to_config(**{own_map(sites): layers})
    if init == "random":
        return student
    sources = [range(count) for count in counts]
    if teacher is not None and init == "teacher":
        taught = zip(site_maps(teacher, family), maps, strict=True)
        sources = [[of[group[-1]] for group in sites_of_layer(placed)] if placed else [] for of, placed in taught]
    _copy_layers(student, source, sources)
    return student


def _copy_layers(student: Any, source: Any, sources: Sequence[Sequence[int]]) -> None:
    """The embedders of `source` and its blocks of these numbers; of a ControlNet the zero-linears too."""
    parts = [*_EMBEDDERS, *(["controlnet_x_embedder"] if isinstance(source, FluxControlNetModel) else [])]
    for part in parts:
        getattr(student, part).load_state_dict(getattr(source, part).state_dict())
    names = ("transformer_blocks", "controlnet_blocks"), ("single_transformer_blocks", "controlnet_single_blocks")
    for kinds, numbers in zip(names, sources, strict=True):
        for kind in kinds if len(parts) > len(_EMBEDDERS) else kinds[:1]:
            for layer, number in enumerate(numbers):
                getattr(student, kind)[layer].load_state_dict(getattr(source, kind)[number].state_dict())


def load_flux_controlnet(folder: Path, family: Family, dtype: torch.dtype = torch.float32) -> FluxControlNetModel:
    """A FLUX ControlNet on the CPU from a folder, loaded strictly, with its own map of sites where it has one.

    Raises what `components.load_network` raises, InvalidInputError for a map that is none."""
    wide = bool(read_config(FluxInpaintingControlNet, folder).get("extra_condition_channels"))
    controlnet = load_network(FluxInpaintingControlNet if wide else FluxControlNetModel, folder, dtype)
    config = read_config(type(controlnet), folder)
    for sites, count in zip(family.sites, _layers(controlnet), strict=True):
        name = own_map(sites)
        if (layers := config.get(name)) is None:
            continue
        if not is_layer_of_site(layers, count, sites.count):
            raise InvalidInputError(
                f"{folder / 'config.json'}: {name} is no map of {sites.count} blocks to {count} layers; use the config "
                "that belongs to these weights"
            )
        controlnet.register_to_config(**{name: layers})
    return controlnet


def save_flux_controlnet(controlnet: FluxControlNetModel, folder: Path, **described: Any) -> None:
    """Publishes a folder that `load_flux_controlnet` loads; without channels of a mask, stock's
    `FluxControlNetModel.from_pretrained` too. `described` goes into the folder's manifest."""
    with publish_folder(folder, **described) as temporary:
        controlnet.save_pretrained(temporary, max_shard_size="100GB")
