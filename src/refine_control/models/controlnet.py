"""ControlNets: residuals for training, exact injection for the pipeline, and how a student is born."""

# B batch, h w latents, N image tokens, D width, L control layers, S student layers, T teacher layers

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetOutput
from torch import nn

from refine_control.errors import InvalidInputError
from refine_control.injection import Injection, expand_residuals, layer_of_site, sites_of_layer
from refine_control.models import flux
from refine_control.models.devices import compute_type
from refine_control.models.families import extra_channels, find_family, layer_counts
from refine_control.models.families.flux import stock_layer_of_site
from refine_control.models.families.sd3 import reads_pooled
from refine_control.models.packed import packed
from refine_control.records import INPAINT

ControlNet = SD3ControlNetModel
"""Any ControlNet, teacher or student, by the name that rooms without diffusers use."""
StudentInit = Literal["transformer", "teacher", "random"]
Seen = TypeVar("Seen")
_forward = cast(Any, SD3ControlNetModel.forward)  # its annotations ask for long timesteps and promise one tensor
ADDED_OPTIONS = ("layer_of_site", "condition_shift", "condition")
"""Of a config, which stock does not know and leaves alone: the layer of each site, what `families.sd3.takes_shift`
says, and the kind of condition (`conditions.condition.own_condition`)."""
_EMBEDDERS = ("pos_embed", "x_embedder", "time_text_embed", "context_embedder")
_CONDITION_EMBEDDERS = ("pos_embed_input", "controlnet_x_embedder")
"""Of SD3's classes and of FLUX's; each has some."""
_KIND = ("joint_attention_dim", "use_pos_embed", "pos_embed_type", "qk_norm", "force_zeros_for_pooled_projection")
"""Options of a teacher that its students have."""
_NO_GRADIENT = ("attn.to_add_out.", "ff_context.")
"""Of the last block: its text stream is read by nobody, so these never get a gradient."""


def own_layer_of_site(controlnet: SD3ControlNetModel) -> list[int] | None:
    """The layer of each injection site where a ControlNet has its own map; None: `injection.layer_of_site`.

    It is an entry of the ControlNet's config, and so in its folder and in its copies."""
    return controlnet.config.get("layer_of_site")


def place(controlnet: SD3ControlNetModel, layers: Sequence[int] | None) -> None:
    """Gives a ControlNet a map of its own, the layer of each injection site; None leaves it as it is."""
    if layers is not None:
        controlnet.register_to_config(layer_of_site=layers)


def equal_layer_of_site(counts: Sequence[int], transformer: SD3Transformer2DModel) -> list[int]:
    """The layer of each injection site for a student without a map by relevance, with so many layers of each kind."""
    return find_family(transformer.config).layer_of_site(counts)


def _layer_of_site(controlnet: SD3ControlNetModel, transformer: SD3Transformer2DModel) -> list[int]:
    """A ControlNet's own map, or how those of its family without one were trained: FLUX's by stock's rule."""
    stock = flux.is_flux(controlnet)
    family = find_family(transformer.config)
    return own_layer_of_site(controlnet) or family.layer_of_site(layer_counts(controlnet.config), stock)


def join(controlnet: SD3ControlNetModel, transformer: SD3Transformer2DModel) -> None:
    """Gives a ControlNet what its family takes from the transformer: a map where the family's groups are not the even
    ones, and positions where it has no table (they stay the transformer's: neither saved nor trained with it)."""
    layers = _layer_of_site(controlnet, transformer)
    if flux.is_flux(controlnet) or layers != layer_of_site(max(layers) + 1, len(layers)):
        place(controlnet, layers)
    if not controlnet.config.get("use_pos_embed", True):
        controlnet.__dict__["pos_embed"] = transformer.pos_embed  # no submodule, as stock's copy would be


def injection_of(controlnet: SD3ControlNetModel, injection: Injection = "exact") -> Injection | list[int]:
    """The `injection` of `predict_velocity` for a ControlNet: its own map, unless stock's rule is asked for."""
    if injection != "exact":
        return stock_layer_of_site(controlnet.config) if flux.is_flux(controlnet) else injection
    return own_layer_of_site(controlnet) or injection


def site_groups(controlnet: SD3ControlNetModel, num_sites: int) -> list[list[int]]:
    """G_j of Eq. 5: the sites that each layer of a ControlNet feeds."""
    return sites_of_layer(own_layer_of_site(controlnet) or layer_of_site(len(controlnet.controlnet_blocks), num_sites))


def control_residuals(
    controlnet: SD3ControlNetModel,
    noisy_latents: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: torch.Tensor,
    cond: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    conditioning_scale: float = 1.0,
    guidance: float = 1.0,
) -> list[torch.Tensor]:
    """The L residuals (B,N,D) after the zero-linears, before injection.

    As stock feeds it, a ControlNet reads the pooled projection (B,D_pooled) or zeros of its shape (docs/paper.md,
    trap 1), and the prompt's embeddings or, with a single stream, none. `guidance` is the scale that FLUX embeds."""
    if flux.is_flux(controlnet):
        given = noisy_latents, sigmas, prompt_embeds, cond, pooled_prompt_embeds, conditioning_scale
        return flux.control_residuals(controlnet, *given, guidance)
    dtype, config = compute_type(controlnet), controlnet.config
    zeros = torch.zeros(cond.shape[0], pooled_prompt_embeds.shape[-1], dtype=dtype, device=cond.device)
    plain = partial(_forward, controlnet) if isinstance(controlnet, InjectedControlNet) else controlnet
    return cast(Any, packed(controlnet) or plain)(
        hidden_states=noisy_latents.to(dtype),
        controlnet_cond=cond.to(dtype),
        conditioning_scale=conditioning_scale,
        encoder_hidden_states=None if config["joint_attention_dim"] is None else prompt_embeds.to(dtype),
        pooled_projections=pooled_prompt_embeds.to(dtype) if reads_pooled(config) else zeros,
        timestep=sigmas * 1000,
        return_dict=False,
    )[0]


class Control(NamedTuple, Generic[Seen]):
    """One of the ControlNets that paint a picture together."""

    controlnet: SD3ControlNetModel
    seen: Seen
    """What it reads: tensors (B,C,h,w) as `control_cond` gives them, or a `Shown` before they are encoded."""
    scale: float = 1.0
    """Factor on its residuals."""


def site_residuals(
    controls: Sequence[Control[torch.Tensor]],
    noisy_latents: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    num_sites: int,
    injection: Injection = "exact",
    guidance: float = 1.0,
) -> list[torch.Tensor]:
    """The residual (B,N,D) of each injection site: the sum over ControlNets, each expanded by its map first.

    A ControlNet without single layers (FLUX) gives those of the first sites. Stock's `SD3MultiControlNetModel` adds
    layer by layer and drops the layers that another ControlNet has not."""
    total: list[torch.Tensor] = []
    for controlnet, cond, scale in controls:
        given = noisy_latents, sigmas, prompt_embeds, cond, pooled_prompt_embeds, scale, guidance
        layers = control_residuals(controlnet, *given)
        sites = expand_residuals(layers, num_sites + 1, injection_of(controlnet, injection))[:-1]
        both = [a + b.to(a) for a, b in zip(total, sites, strict=False)]
        total = [*both, *total[len(both) :], *sites[len(both) :]]
    return total


class InjectedControlNet(SD3ControlNetModel):
    """An SD3ControlNetModel that returns one residual for each transformer block.

    Handed 24 residuals, every diffusers version injects them one-to-one, so the stock pipeline is exact
    for any layer count. `injection` "diffusers" reproduces what diffusers >= 0.32 does by itself."""

    injection: Injection | Sequence[int] = "exact"
    num_blocks: int = 24

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        residuals = _forward(self, *args, return_dict=False, **kwargs)[0]
        expanded = expand_residuals(residuals, self.num_blocks, self.injection)
        return SD3ControlNetOutput(controlnet_block_samples=tuple(expanded)) if return_dict else (expanded,)


def injected(controlnet: SD3ControlNetModel, num_blocks: int, injection: Injection = "exact") -> InjectedControlNet:
    """The same module (same parameters) as an InjectedControlNet for a transformer of `num_blocks`."""
    shallow = cast(Any, copy.copy(controlnet))
    shallow.__class__ = InjectedControlNet
    shallow._modules = dict(controlnet._modules)  # stock pipelines add positions
    shallow.injection, shallow.num_blocks = injection_of(controlnet, injection), num_blocks
    return shallow


def layer_modules(network: Any) -> list[nn.Module]:
    """The blocks of a transformer or a ControlNet, of all kinds."""
    return [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", ())]


def _zero_linears(controlnet: Any) -> list[nn.Module]:
    """The layer of each residual."""
    return [*controlnet.controlnet_blocks, *getattr(controlnet, "controlnet_single_blocks", ())]


def trainable_parameters(controlnet: SD3ControlNetModel) -> dict[str, nn.Parameter]:
    """Parameters by name, without the last block's six that never get a gradient; those are frozen here.

    Single layers (FLUX) compute from both streams: with them every parameter gets one."""
    blocks = len(controlnet.transformer_blocks)
    last = f"transformer_blocks.{blocks - 1}."
    dead = tuple(last + part for part in _NO_GRADIENT if len(layer_modules(controlnet)) == blocks)
    for name, parameter in controlnet.named_parameters():
        parameter.requires_grad_(not name.startswith(dead))
    return {name: parameter for name, parameter in controlnet.named_parameters() if parameter.requires_grad}


def student_counts(num_layers: int, num_single_layers: int, transformer: SD3Transformer2DModel) -> tuple[int, ...]:
    """The numbers of layers of each kind that the transformer has blocks for.

    Raises InvalidInputError unless it has so many that take a residual."""
    names, sites = ("num_layers", "num_single_layers"), find_family(transformer.config).sites
    most = [*(kind.count for kind in sites), 0]
    for name, count, limit in zip(names, (num_layers, num_single_layers), most, strict=False):
        least = int(name == "num_layers")
        if not least <= count <= limit:
            raise InvalidInputError(f"student.{name} is {count}; this transformer admits {least} to {limit}")
    return (num_layers, num_single_layers)[: len(sites)]


def _refuse_other_kinds(counts: Sequence[int], teacher: SD3ControlNetModel) -> None:
    """Raises InvalidInputError where a FLUX student has single layers and its teacher none, or the reverse."""
    for count, taught in zip(counts[1:], layer_counts(teacher.config)[1:], strict=True):
        if bool(count) != bool(taught):
            raise InvalidInputError(
                f"student.num_single_layers is {count} and the teacher has {taught} single layers; give both some, or "
                "neither"
            )


def _new(
    transformer: SD3Transformer2DModel,
    counts: Sequence[int],
    extra: int,
    dual_attention_layers: Sequence[int],
    teacher: SD3ControlNetModel | None,
) -> SD3ControlNetModel:
    """A ControlNet of the transformer's sizes and of the teacher's kind, untrained.

    Built from a copy of the config: diffusers' own `from_transformer` writes into the transformer's (docs/paper.md,
    trap 4)."""
    known = set(SD3ControlNetModel._get_init_keys(SD3ControlNetModel))
    config = {k: v for k, v in dict(transformer.config).items() if k in known}
    config |= {} if teacher is None else {key: teacher.config[key] for key in _KIND}
    config |= {"num_layers": counts[0], "extra_conditioning_channels": extra}
    controlnet = SD3ControlNetModel(**{**config, "dual_attention_layers": tuple(dual_attention_layers)})
    if teacher is not None and (shift := teacher.config.get("condition_shift")) is not None:
        controlnet.register_to_config(condition_shift=shift)
    return controlnet


def _copy(network: Any, controlnet: SD3ControlNetModel, parts: Sequence[str], layers: Sequence[int]) -> None:
    """Copies `parts` of a transformer or ControlNet, and blocks: the one of each of the ControlNet's layers.

    A single stream takes the image's stream of a block with two."""
    for part in parts:
        if (copied := getattr(controlnet, part, None)) is not None:
            copied.load_state_dict(getattr(network, part).state_dict())
    blocks = layer_modules(network)
    for copied, layer in zip(layer_modules(controlnet), layers, strict=True):
        single = type(copied) is not type(blocks[layer])
        weights, names = blocks[layer].state_dict(), copied.state_dict().keys()
        copied.load_state_dict({name: weights[name] for name in names} if single else weights)


def from_transformer(
    transformer: SD3Transformer2DModel,
    num_layers: int,
    extra_channels: int = 1,
    teacher: SD3ControlNetModel | None = None,
    num_single_layers: int = 0,
) -> SD3ControlNetModel:
    """A ControlNet born of the transformer's first blocks of each kind, its zero-linears zero; of the teacher's kind,
    with `extra_channels` beside the latents'.

    Raises InvalidInputError when the transformer has no such number of blocks that take a residual."""
    counts = student_counts(num_layers, num_single_layers, transformer)
    first = [*range(num_layers), *(len(transformer.transformer_blocks) + layer for layer in range(num_single_layers))]
    if flux.is_flux(transformer):
        controlnet: Any = flux.new_controlnet(transformer.config, counts, extra_channels)
    else:
        dual = [layer for layer in transformer.config["dual_attention_layers"] or () if layer in first]
        controlnet = _new(transformer, counts, extra_channels, dual, teacher)
    _copy(transformer, controlnet, _EMBEDDERS, first)
    join(controlnet, transformer)
    return controlnet


def build_student(
    transformer: SD3Transformer2DModel,
    teacher: SD3ControlNetModel | None,
    num_layers: int,
    init: StudentInit,
    seed: int,
    layers: Sequence[int] | None = None,
    condition: str = INPAINT,
    num_single_layers: int = 0,
) -> SD3ControlNetModel:
    """A student of `num_layers` (of FLUX double ones, and `num_single_layers`), fp32 on the CPU, for a `condition`.

    `transformer` (the paper): the transformer's first blocks. `teacher`: its embedders and the last layer of
    each group of Eq. 5 with its zero-linear. `random`: a new network from `seed` with zero zero-linears. `layers` is
    the map of its own (`place`). Raises InvalidInputError as `from_transformer`, and where only one of a FLUX student
    and its teacher has single layers."""
    extra = int(condition == INPAINT) if teacher is None else extra_channels(teacher.config)
    counts = student_counts(num_layers, num_single_layers, transformer)
    if teacher is not None:
        _refuse_other_kinds(counts, teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if init == "teacher":
            assert teacher is not None
            student = _from_teacher(transformer, teacher, counts, layers)
        else:
            student = from_transformer(transformer.float(), num_layers, extra, teacher, num_single_layers)
        if init == "random":
            config = {key: value for key, value in student.config.items() if key != "layer_of_site"}
            student = cast(SD3ControlNetModel, type(student).from_config(config))
    place(student, layers or (equal_layer_of_site(counts, transformer) if flux.is_flux(student) else None))
    if condition != INPAINT:
        student.register_to_config(condition=condition)
    join(student, transformer)
    return student


def _from_teacher(
    transformer: SD3Transformer2DModel,
    teacher: SD3ControlNetModel,
    counts: Sequence[int],
    layers: Sequence[int] | None,
) -> SD3ControlNetModel:
    """The teacher's embedders and the last layer of each group; dual attention is where those layers have it."""
    groups = sites_of_layer(layers or equal_layer_of_site(counts, transformer))
    of_site = _layer_of_site(teacher, transformer)
    sources, extra = [of_site[group[-1]] for group in groups], extra_channels(teacher.config)
    if flux.is_flux(transformer):
        student: Any = flux.new_controlnet(teacher.config, counts, extra)
    else:
        dual = [layer for layer, source in enumerate(sources) if source in teacher.config["dual_attention_layers"]]
        student = _new(transformer, counts, extra, dual, teacher)
    _copy(teacher, student, (*_EMBEDDERS, *_CONDITION_EMBEDDERS), sources)
    for copied, source in zip(_zero_linears(student), sources, strict=True):
        copied.load_state_dict(_zero_linears(teacher)[source].state_dict())
    return student


def for_condition(controlnet: SD3ControlNetModel, condition: str, vae: Any) -> SD3ControlNetModel:
    """A copy of an inpainting ControlNet that takes a condition without a region, and answers as if all were kept.

    The channel of the region is 1 there, and the condition's latents are not shifted (`families.sd3.takes_shift`):
    both are constants, which the bias of the first convolution takes up. `vae` is that of the model."""
    config = dict(controlnet.config) | {"extra_conditioning_channels": 0}
    copied = cast(SD3ControlNetModel, SD3ControlNetModel.from_config(config))
    copied.register_to_config(condition=condition)
    weights = {name: value.detach().clone() for name, value in controlnet.state_dict().items()}
    channels, first = controlnet.config["in_channels"], "pos_embed_input.proj"
    taps = weights[f"{first}.weight"].sum((2, 3))  # (D, C + 1)
    unshifted = vae.config["shift_factor"] * vae.config["scaling_factor"]
    weights[f"{first}.bias"] += taps[:, channels:].sum(1) - unshifted * taps[:, :channels].sum(1)
    weights[f"{first}.weight"] = weights[f"{first}.weight"][:, :channels].contiguous()
    copied.load_state_dict(weights)
    return copied
