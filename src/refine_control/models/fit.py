"""Compatibility of the components of a model with each other, and of image sizes with a model, by their configs."""

# H W pixels

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refine_control.errors import InvalidInputError
from refine_control.models.families import find_family, flux, layer_counts

_FLUX_SIDE, _UNBOUNDED = 128, 2**20
"""Side in latents that FLUX was made for; its rotary positions have no end."""
_LEGACY_END = 2
"""`eos_token_id` of CLIP configs that were written wrongly once; transformers then takes the largest token."""


class Geometry(NamedTuple):
    """The sizes that a model paints."""

    multiple: int
    """Width and height are a multiple of it, in pixels: a pixel of the latents times a patch."""
    largest: int
    """Most pixels of a side, by the table of positions."""
    side: int
    """Of the square pictures that the model was made for."""

    def check(self, height: int, width: int) -> None:
        """Raises InvalidInputError where the model cannot paint such a picture."""
        size = f"{width} x {height}" if width != height else f"{width}"
        if height < 1 or width < 1 or height % self.multiple or width % self.multiple:
            raise InvalidInputError(
                f"the size {size} does not suit this model; width and height must be multiples of {self.multiple}"
            )
        if max(height, width) > self.largest:
            raise InvalidInputError(
                f"the size {size} is beyond this model, which has positions for {self.largest} pixels a side; choose a "
                f"size up to that (it was made for {self.side})"
            )


def geometry(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> Geometry:
    """The sizes that a VAE and a transformer of these configs paint. A table of positions bounds the side."""
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if flux.matches(transformer):
        return Geometry(2 * factor, _UNBOUNDED, _FLUX_SIDE * factor)
    multiple, side = factor * transformer["patch_size"], transformer["sample_size"] * factor
    table = transformer.get("pos_embed_max_size") or transformer["sample_size"] // transformer["patch_size"]
    return Geometry(multiple, multiple * table, side)


def check_controlnet(controlnet: Mapping[str, Any], transformer: Mapping[str, Any], name: str | Path) -> None:
    """Raises InvalidInputError where a ControlNet of this config does not fit the transformer; both are configs."""
    part, other = f"the ControlNet of {name}", "the transformer"
    family = find_family(transformer, controlnet, name)
    text = ("joint_attention_dim",) if family.text else ()
    for key in ("in_channels", "patch_size", *text, "pooled_projection_dim"):
        _check(part, key, controlnet[key], other, transformer[key])
    inner, outer = (each["attention_head_dim"] * each["num_attention_heads"] for each in (controlnet, transformer))
    _check(part, "width", inner, other, outer)
    counts, sites = layer_counts(controlnet), [sites.count for sites in family.sites]
    if counts[0] > sites[0]:
        raise InvalidInputError(
            f"{part} has {controlnet['num_layers']} layers for a transformer of {transformer['num_layers']}, which "
            f"admits {sites[0]}; name another ControlNet"
        )
    layers = controlnet.get("layer_of_site")
    if layers is not None and not family.is_layer_of_site(layers, counts):
        raise InvalidInputError(
            f"{part} has a layer_of_site in its config.json that is not the layer of each of {sum(sites)} sites in "
            "order; copy its folder again"
        )
    sizes = [each.get("pos_embed_max_size") for each in (controlnet, transformer)]
    fits = not family.own_positions or (sizes[0] or 0) >= (sizes[1] or 0)
    _check(part, "pos_embed_max_size", sizes[0], other, sizes[1], fits=fits)


def check_transformer(student: Mapping[str, Any], transformer: Mapping[str, Any], name: str | Path) -> None:
    """Raises InvalidInputError where a student's own transformer has another config than the model's."""
    for key in (key for key in transformer if not key.startswith("_")):
        _check(f"the transformer of {name}", key, student.get(key), "the model's transformer", transformer[key])


def _check(part: str, key: str, value: Any, other: str, expected: Any, fits: bool | None = None) -> None:
    """Raises InvalidInputError unless the value is the expected one or, where it need not be that, `fits`."""
    if not (value == expected if fits is None else fits):
        raise InvalidInputError(
            f"{part} does not fit: its {key} is {value}, that of {other} {expected}; use components of one model"
        )


def check_neighbours(components: Mapping[str, Any], folder: Path, controlnet: str | Path) -> None:
    """Raises InvalidInputError where a component of an SD3 or FLUX pipeline does not fit the others.

    `folder` and `controlnet` name the pipeline and its ControlNet."""
    transformer, vae = components["transformer"].config, components["vae"].config
    packed = flux.matches(transformer)
    channels = transformer["in_channels"] // (4 if packed else 1)
    part, named = f"the vae of {folder}", "a quarter of the transformer's in_channels"
    _check(part, "latent_channels", vae["latent_channels"], named if packed else named[13:], channels)
    for key, absent in (("scaling_factor", not vae["scaling_factor"]), ("shift_factor", vae["shift_factor"] is None)):
        if absent:
            raise InvalidInputError(
                f"{part} has no {key} in its config.json; those of this model have one: write it there"
            )
    if not packed:
        _check(f"the transformer of {folder}", "out_channels", transformer["out_channels"], "its in_channels", channels)
    _check_text(components, transformer, packed, folder)
    if components["controlnet"] is not None:
        check_controlnet(components["controlnet"].config, transformer, controlnet)


def _check_text(components: Mapping[str, Any], transformer: Mapping[str, Any], packed: bool, folder: Path) -> None:
    """The widths of text encoders and tokenizers: CLIP, in SD3 (not `packed`) twice, and T5."""
    names = ["text_encoder"] if packed else ["text_encoder", "text_encoder_2"]
    clips, last = [components[name].config for name in names], f"_{len(names) + 1}"
    joint, pooled = transformer["joint_attention_dim"], transformer["pooled_projection_dim"]
    key = "hidden_size" if packed else "projection_dim"
    both, other = f"{' with '.join(names)} of {folder}", "the transformer's joint_attention_dim"
    if not packed:
        width = sum(each.hidden_size for each in clips)
        _check(both, "hidden_size", width, other, joint, fits=width <= joint)
    _check(both, key, sum(getattr(each, key) for each in clips), "the transformer's pooled_projection_dim", pooled)
    if (t5 := components[f"text_encoder{last}"]) is not None:
        _check(f"text_encoder{last} of {folder}", "d_model", t5.config.d_model, other, joint)
    for suffix in ("", "_2", "_3"):
        if (tokenizer := components.get(f"tokenizer{suffix}")) is not None:
            _check_tokenizer(tokenizer, components[f"text_encoder{suffix}"].config, suffix, folder, suffix != last)


def _check_tokenizer(tokenizer: Any, encoder: Any, suffix: str, folder: Path, clip: bool) -> None:
    part, other, count = f"tokenizer{suffix} of {folder}", f"text_encoder{suffix}'s", len(tokenizer)
    _check(part, "vocabulary", count, f"{other} vocab_size", encoder.vocab_size, fits=count <= encoder.vocab_size)
    if clip:
        length, most = tokenizer.model_max_length, encoder.max_position_embeddings
        _check(part, "model_max_length", length, f"{other} max_position_embeddings", most, fits=length <= most)
        end, expected = tokenizer.eos_token_id, encoder.eos_token_id
        _check(part, "eos_token_id", end, other, expected, fits=expected in (end, _LEGACY_END))
