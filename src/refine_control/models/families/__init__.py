"""The one door to families: the record of a transformer with a ControlNet, from their configs alone.

A family is a module of this folder with `matches` (is a transformer's config of it?), `family` (the record) and
`differences` (what makes a ControlNet unknown)."""

from __future__ import annotations

from pathlib import Path

from refine_control.errors import InvalidInputError
from refine_control.models.families import flux, sd3, sd35_large, sd35_medium
from refine_control.models.families.family import Config, Encoding, Family, Sites

__all__ = [
    "FAMILIES",
    "Config",
    "Encoding",
    "Family",
    "Sites",
    "condition_encoding",
    "extra_channels",
    "find_family",
    "layer_counts",
]
FAMILIES = (sd3, sd35_medium, sd35_large, flux)


def extra_channels(controlnet: Config) -> int:
    """Channels that a ControlNet reads beside the latents', by its config; FLUX packs squares of 2 x 2."""
    return controlnet.get("extra_conditioning_channels") or (controlnet.get("extra_condition_channels") or 0) // 4


def condition_encoding(controlnet: Config) -> Encoding:
    """How a ControlNet's condition is encoded, by its config alone."""
    if flux.matches(controlnet):
        return Encoding()
    return Encoding(sd3.takes_shift(controlnet), sd35_large.levels(controlnet))


def layer_counts(config: Config) -> tuple[int, ...]:
    """Layers of a ControlNet, or blocks of a transformer, of each kind, by its config."""
    return (config["num_layers"], *([config["num_single_layers"]] if flux.matches(config) else []))


def find_family(transformer: Config, controlnet: Config | None = None, name: str | Path = "") -> Family:
    """The family of a transformer's config with that of a ControlNet; None: with one born of its blocks.

    Raises InvalidInputError that says what is different about a transformer or ControlNet (`name`) of no family."""
    known = ", ".join(module.NAME for module in FAMILIES)
    for module in FAMILIES:
        if module.matches(transformer):
            family = module.family(transformer, controlnet or {})
            if controlnet is not None and (unknown := module.differences(family, controlnet)):
                raise InvalidInputError(
                    f"the ControlNet of {name} {' and '.join(unknown)}, as none that is known of {family.name} does; "
                    "name another ControlNet"
                )
            return family
    raise InvalidInputError(
        f"the transformer normalises queries by {transformer.get('qk_norm')} and has dual attention in blocks "
        f"{list(transformer.get('dual_attention_layers') or ())}, as none of {known} does; name another model"
    )
