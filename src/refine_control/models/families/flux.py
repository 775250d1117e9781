"""FLUX.1: 19 double blocks, then 38 single ones; tokens of 2 x 2 latent pixels, positions from ids.

ControlNets of 6 + 0 layers (alimama, with or without 4 channels of a packed mask; Union-Pro-2.0), 5 + 10 (InstantX) and
4 + 1 (Shakker, depth)."""

from __future__ import annotations

from functools import partial

from refine_control.injection import flux_layer_of_block
from refine_control.models.families.family import Config, Family, Sites

NAME = "FLUX.1"
BLOCKS = {"num_layers": 19, "num_single_layers": 38}
"""Of the published transformers."""


def is_flux_folder(description: Config) -> bool:
    """Whether a config.json or model_index.json is that of a network or a pipeline of FLUX."""
    return str(description.get("_class_name")).startswith("Flux")


def matches(transformer: Config) -> bool:
    """Whether a transformer's config is of this family."""
    return "num_single_layers" in transformer


def embeds_picture(controlnet: Config) -> bool:
    """Whether a ControlNet embeds the picture itself (XLabs): diffusers then repeats its double layers in turn."""
    return controlnet.get("conditioning_embedding_channels") is not None


def stock_layer_of_site(controlnet: Config) -> list[int]:
    """What the installed diffusers injects at the sites of a ControlNet whose config holds a map, which tells how many
    there are."""
    layers, counts = controlnet["layer_of_site"], (controlnet["num_layers"], controlnet["num_single_layers"])
    double = sum(layer < counts[0] for layer in layers)
    blocks = {"num_layers": double, "num_single_layers": len(layers) - double}
    return family(blocks, controlnet).layer_of_site(counts, stock=True)


def _stock(num_blocks: int, repeat: bool, num_layers: int) -> list[int]:
    return flux_layer_of_block(num_layers, num_blocks, repeat)


def family(transformer: Config, controlnet: Config) -> Family:
    """The family of a ControlNet on this backbone: it reads the pooled projection, and its latents are shifted.

    The scale is the middle of what is advised for Shakker's depth (.3 to .7); with the mask's channels the .9 of
    alimama's."""
    repeat = embeds_picture(controlnet)
    kinds = (("transformer_blocks", "num_layers", repeat), ("single_transformer_blocks", "num_single_layers", False))
    sites = (Sites(blocks, n := transformer[name], partial(_stock, n, repeats)) for blocks, name, repeats in kinds)
    return Family(
        NAME,
        tuple(sites),
        pooled=True,
        own_positions=False,
        qk_norm="rms_norm",
        guidance=bool(transformer.get("guidance_embeds")),
        conditioning_scale=0.9 if controlnet.get("extra_condition_channels") else 0.5,
    )


def differences(family: Family, controlnet: Config) -> list[str]:
    """How a ControlNet differs from all that are known of `family`, as parts of a sentence."""
    if "num_single_layers" not in controlnet:
        return ["has no single layers in its config, which FLUX's have"]
    double, single = controlnet["num_layers"], controlnet["num_single_layers"]
    extra, modes = controlnet.get("extra_condition_channels") or 0, controlnet.get("num_mode")
    facts = {
        f"has {double} double layers": double > family.sites[0].count,
        f"has {single} single layers": single > family.sites[1].count,
        "has no double layers": not double,
        f"chooses one of {modes} kinds of condition by a number": modes is not None,
        "embeds the picture by convolutions of its own": embeds_picture(controlnet),
        f"reads {extra} channels beside the latents": extra not in (0, 4),
    }
    return [text for text, differs in facts.items() if differs]
