"""What fits what: the components of a model to each other, and the sizes of pictures to a model, by their configs.

Everything here is arithmetic on configurations, done before weights are read.
"""

# H W pixels

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refine_control.errors import InvalidInputError

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
    multiple, side = factor * transformer["patch_size"], transformer["sample_size"] * factor
    table = transformer.get("pos_embed_max_size") or transformer["sample_size"] // transformer["patch_size"]
    return Geometry(multiple, multiple * table, side)


def check_controlnet(controlnet: Mapping[str, Any], transformer: Mapping[str, Any], name: str | Path) -> None:
    """Raises InvalidInputError where a ControlNet of this config does not fit the transformer; both are configs."""
    width = ("attention_head_dim", "num_attention_heads")
    for key in ("in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim"):
        if controlnet[key] != transformer[key]:
            raise _misfit(f"the ControlNet of {name}", key, controlnet[key], "the transformer", transformer[key])
    inner, outer = (config[width[0]] * config[width[1]] for config in (controlnet, transformer))
    if inner != outer:
        raise _misfit(f"the ControlNet of {name}", "width", inner, "the transformer", outer)
    if controlnet["extra_conditioning_channels"] != 1:
        raise InvalidInputError(
            f"the ControlNet of {name} reads {controlnet['extra_conditioning_channels']} channels beside the latents; "
            "one that inpaints reads 1, the mask"
        )
    if controlnet["num_layers"] >= transformer["num_layers"]:
        raise InvalidInputError(
            f"the ControlNet of {name} has {controlnet['num_layers']} layers for a transformer of "
            f"{transformer['num_layers']}, which admits {transformer['num_layers'] - 1}; name another ControlNet"
        )
    if (controlnet.get("pos_embed_max_size") or 0) < (transformer.get("pos_embed_max_size") or 0):
        key = "pos_embed_max_size"
        raise _misfit(f"the ControlNet of {name}", key, controlnet.get(key), "the transformer", transformer[key])


def _misfit(part: str, what: str, value: Any, other: str, expected: Any) -> InvalidInputError:
    return InvalidInputError(
        f"{part} does not fit: its {what} is {value}, that of {other} {expected}; use components of one model"
    )


def check_neighbours(components: Mapping[str, Any], folder: Path) -> None:
    """Raises InvalidInputError where a component of an SD3 pipeline does not fit the others."""
    transformer, vae = components["transformer"].config, components["vae"].config
    encoders = [components[f"text_encoder{suffix}"].config for suffix in ("", "_2")]
    where = f"of {folder}"
    if vae["latent_channels"] != transformer["in_channels"]:
        raise _misfit(
            f"the vae {where}",
            "latent_channels",
            vae["latent_channels"],
            "the transformer's in_channels",
            transformer["in_channels"],
        )
    if not vae["scaling_factor"] or vae["shift_factor"] is None:
        unset = "scaling_factor" if not vae["scaling_factor"] else "shift_factor"
        raise InvalidInputError(f"the vae {where} has no {unset} in its config.json; SD3's have one: write it there")
    if transformer["out_channels"] != transformer["in_channels"]:
        raise _misfit(
            f"the transformer {where}",
            "out_channels",
            transformer["out_channels"],
            "its in_channels",
            transformer["in_channels"],
        )
    joint, pooled = transformer["joint_attention_dim"], transformer["pooled_projection_dim"]
    widths, projections = (sum(getattr(e, key) for e in encoders) for key in ("hidden_size", "projection_dim"))
    if widths > joint:
        raise _misfit(
            f"text_encoder with text_encoder_2 {where}",
            "hidden_size",
            widths,
            "the transformer's joint_attention_dim",
            joint,
        )
    if projections != pooled:
        raise _misfit(
            f"text_encoder with text_encoder_2 {where}",
            "projection_dim",
            projections,
            "the transformer's pooled_projection_dim",
            pooled,
        )
    t5 = components["text_encoder_3"]
    if t5 is not None and t5.config.d_model != joint:
        raise _misfit(
            f"text_encoder_3 {where}", "d_model", t5.config.d_model, "the transformer's joint_attention_dim", joint
        )
    for suffix in ("", "_2", "_3"):
        if components[f"tokenizer{suffix}"] is not None:
            _check_tokenizer(
                components[f"tokenizer{suffix}"], components[f"text_encoder{suffix}"].config, suffix, where
            )
    check_controlnet(components["controlnet"].config, transformer, folder)


def _check_tokenizer(tokenizer: Any, encoder: Any, suffix: str, where: str) -> None:
    name, other = f"tokenizer{suffix} {where}", f"text_encoder{suffix}"
    if len(tokenizer) > encoder.vocab_size:
        raise _misfit(name, "vocabulary", len(tokenizer), f"{other}'s vocab_size", encoder.vocab_size)
    if suffix == "_3":
        return
    if tokenizer.model_max_length > encoder.max_position_embeddings:
        most = encoder.max_position_embeddings
        raise _misfit(name, "model_max_length", tokenizer.model_max_length, f"{other}'s max_position_embeddings", most)
    if encoder.eos_token_id not in (tokenizer.eos_token_id, _LEGACY_END):
        raise _misfit(name, "eos_token_id", tokenizer.eos_token_id, f"{other}'s", encoder.eos_token_id)
