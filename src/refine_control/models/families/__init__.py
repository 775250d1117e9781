"""The one door to families: the record of a transformer with a ControlNet, from their configs alone.

A family is a module of this folder with `matches` (is a transformer's config of it?), `family` (the record) and
`differences` (what makes a ControlNet unknown)."""

from __future__ import annotations

from pathlib import Path

from refine_control.errors import InvalidInputError
from refine_control.models.families import flux, sd3, sd35_large, sd35_medium
from refine_control.models.families.family import Config, Family, Sites

__all__ = ["FAMILIES", "Config", "Family", "Sites", "find_family"]
FAMILIES = (sd3, sd35_medium, sd35_large, flux)


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
