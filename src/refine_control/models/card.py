"""Cards: where the packaged models lie, and how a bundle or a student for few steps is to be sampled."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_control.config import CHOSEN_BY_MODEL, SamplerConfig, StudentCard
from refine_control.errors import InvalidInputError, MissingError
from refine_control.models.families import Encoding, find_family, flux
from refine_control.models.hub import folder_of
from refine_control.records import INPAINT
from refine_control.storage import write_atomic, write_json

if TYPE_CHECKING:
    from refine_control.models.backbone import Backbone

logger = logging.getLogger(__name__)
MODELS = Path(__file__).parent
BUNDLE = MODELS / "mini_bundle"
"""The shipped pipeline folder in diffusers layout."""
EDGE = MODELS / "mini_edge"
"""The shipped student of the mini model for few steps, a ControlNet folder."""
CONTROLNETS = {
    "edge": "train mini/end_points",
    "canny": "mini train --condition canny",
    "lowres": "mini train --condition lowres",
}
"""The ControlNets of the mini model that may be packaged, in folders mini_NAME, and the verbs that make them."""
CARD = "refine_control.json"
"""The file in which a bundle or a student describes itself, beside the files that diffusers reads."""
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 3.0, "conditioning_scale": 1.0}
"""What a bundle paints well with; a trial of guidance is in docs/trials.md."""
FLUX_GUIDANCE = 3.5
"""The scale that FLUX.1-dev's publishers and those of its ControlNets advise."""


def packaged(name: str | Path) -> Path | None:
    """The folder of the packaged model `mini` or of a ControlNet of `CONTROLNETS`; None for every other name.

    Raises MissingError where it is not in the package."""
    if str(name) == "mini":
        file, what, verb = BUNDLE / "model_index.json", "the mini bundle", "mini train"
    elif verb := CONTROLNETS.get(str(name)):
        file, what = MODELS / f"mini_{name}" / "config.json", f"the ControlNet {name}"
    else:
        return None
    if not file.is_file():
        raise MissingError(f"{what} is not in {file.parent}; make it with `refine-control {verb}`")
    return file.parent


def default_controlnet(model: str | Path, controlnet: str | Path | None) -> str | Path | None:
    """The ControlNet that inpaints where nobody names one: the packaged student for the mini model.

    None is the model's own, which is also named by the model's name."""
    if controlnet is None:
        return "edge" if str(model) == "mini" else None
    return None if str(controlnet) == str(model) else controlnet


def read_card(controlnet: str | Path) -> StudentCard | None:
    """The card of a ControlNet named as `packaged`, by a folder or a hub id; None where it has none or is not there.

    Raises InvalidInputError for a card that cannot be read, MissingError for a packaged one that is not there."""
    folder = packaged(controlnet)
    with contextlib.suppress(InvalidInputError, MissingError):  # the loader says what is wrong with the name
        folder = folder or folder_of(controlnet, [CARD], "a ControlNet")
    if folder is None or not (folder / CARD).is_file():
        return None
    try:
        content = json.loads((folder / CARD).read_bytes())
        if isinstance(content, dict) and "sampling" not in content:  # that of a bundle
            return None
        return StudentCard.model_validate(content)
    except (OSError, ValueError, RecursionError):
        raise InvalidInputError(
            f"{folder / CARD} is no card of a ControlNet that can be read; copy the folder again"
        ) from None


def own_sampling(model: str, controlnet: str | Path | None = None) -> dict[str, Any]:
    """Fields of SamplerConfig for a model with a ControlNet (None: its own), where nobody says: those of the
    ControlNet's card, else the bundle's or of the published family; the others have their defaults. Raises what
    `read_card` raises."""
    if controlnet is not None and (card := read_card(controlnet)):
        return card.fields
    bundle = model == "mini" or (Path(model) / CARD).is_file()
    return dict(SAMPLING) if bundle else _published_sampling(model, controlnet)


def _published_sampling(model: str, controlnet: str | Path | None) -> dict[str, Any]:
    """What publishers advise, by the configs: the conditioning scale of a ControlNet's family, and the embedded
    guidance scale of FLUX.1-dev, none for FLUX without; nothing for models that are not there."""
    from refine_control.models.components import read_json  # with torch: a runtime without it reads cards

    advised = dict[str, Any]()
    with contextlib.suppress(InvalidInputError, MissingError, KeyError):  # the loader says what is wrong with the name
        folder = folder_of(model, ["transformer/config.json", "controlnet/config.json"], "a model")
        transformer = read_json(folder / "transformer" / "config.json", "")
        if flux.matches(transformer):
            advised["guidance_scale"] = FLUX_GUIDANCE if transformer.get("guidance_embeds") else 1.0
        named = folder / "controlnet" if controlnet is None else folder_of(controlnet, ["config.json"], "a ControlNet")
        family = find_family(transformer, read_json(named / "config.json", ""))
        advised["conditioning_scale"] = family.conditioning_scale
    return advised


def choose_sampler(model: str, controlnet: str | Path | None, given: Mapping[str, Any]) -> SamplerConfig:
    """The sampler with the `given` fields (None: not given) and else `own_sampling`; warns as `sampler_by_card`.

    Raises what `read_card` raises."""
    card = read_card(controlnet) if controlnet is not None else None
    return sampler_by_card(card, controlnet, given, {} if card else own_sampling(model, controlnet))


def sampler_by_card(
    card: StudentCard | None, name: str | Path | None, given: Mapping[str, Any], usual: Mapping[str, Any]
) -> SamplerConfig:
    """The sampler with the `given` fields (None: not given), else those of the card, else the `usual` ones.

    Warns of more steps than the ControlNet `name` was trained for, and of guidance for one that has learnt it: the
    latter is ignored."""
    chosen = {key: value for key, value in given.items() if value is not None}
    if card:
        scale, steps = chosen.get("guidance_scale", 1.0), chosen.get("num_inference_steps", 1)
        if card.distilled_guidance > 1 and scale > 1:
            text = "%s has the guidance scale %g distilled in: the given scale %g is ignored"
            logger.warning(text, name, card.distilled_guidance, scale)
            del chosen["guidance_scale"]
        if steps > card.most_steps:
            text = "%s was trained for at most %d steps: %d steps may give worse pictures"
            logger.warning(text, name, card.most_steps, steps)
    return SamplerConfig(**{**usual, **(card.fields if card else {}), **chosen})


def write_card(
    folder: Path, card: StudentCard, backbone: Backbone, warning: str = "", encoding: Encoding = Encoding()
) -> None:
    """Writes into a ControlNet folder its card, README.md, and scheduler/, with which stock diffusers samples the same.

    `backbone` is the model that it was trained for. FLUX has no stock pipeline for a mask, and no scheduler/: its
    pipelines space the levels evenly. FlowMatchEulerDiscreteScheduler alone would space few steps badly
    (diffusers#13243): for even levels without fresh noise the scheduler is FlowMapEulerDiscreteScheduler, with fresh
    noise README.md passes the levels. A `warning` about stock diffusers stands in README.md too, and how the condition
    is encoded where stock does it otherwise."""
    from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    sampler = card.sampling
    kept: Any = dict.fromkeys(StudentCard.model_fields, True) | {"sampling": set(CHOSEN_BY_MODEL)}
    left_out = {"condition"} if card.condition == INPAINT else set()
    write_json(folder / CARD, card.model_dump(mode="json", include=kept, exclude=left_out, exclude_none=True))
    purpose = "inpainting" if card.condition == INPAINT else f"the condition {card.condition}"
    noted = f"\nWarning: {warning}.\n" * bool(warning)
    about = {"card": card, "sampler": sampler, "purpose": purpose}
    if backbone.is_flux:
        return write_atomic(folder / "README.md", _HEAD.format(**about, model="FLUX") + "\n" + noted)
    even = sampler.sigmas == "even"
    if even and not sampler.stochastic:
        scheduler: Any = FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=backbone.shift)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(1000, backbone.shift, stochastic_sampling=sampler.stochastic)
    scheduler.save_pretrained(folder / "scheduler")
    more: Any = {
        "levels": encoding.levels,
        "without_t5": backbone.pipeline.text_encoder_3 is None,
        "max_sequence_length": backbone.max_sequence_length,
        "scheduler": type(scheduler).__name__,
    }
    code = diffusers_code(sampler, card.condition, "FOLDER", "MODEL", **more)
    text = _HEAD.format(**about, model="Stable Diffusion 3") + _IN_DIFFUSERS.format(warning=noted, code=code)
    write_atomic(folder / "README.md", text)


def diffusers_code(
    sampler: SamplerConfig,
    condition: str,
    folder: str,
    model: str,
    *,
    without_t5: bool,
    max_sequence_length: int,
    scheduler: str | None = None,
    levels: tuple[float, float] = Encoding().levels,
) -> str:
    """Python that paints with a ControlNet in stock diffusers; it takes PROMPT, IMAGE and MASK or CONDITION_PICTURE.

    `folder` and `model` are Python expressions of where the ControlNet and its model are. `scheduler` is the class of
    the folder's own scheduler/; None: the model's. `levels` are those of the condition (`Encoding`)."""
    steps = sampler.num_inference_steps
    loading = ["text_encoder_3=None", "tokenizer_3=None"] if without_t5 else []
    if scheduler:
        loading = [f'scheduler={scheduler}.from_pretrained({folder}, subfolder="scheduler")', *loading]
    fresh = sampler.sigmas == "even" and (sampler.stochastic or not scheduler)
    calling = [f"sigmas={[1 - i / steps for i in range(steps)]}"] if fresh else []
    calling += [f"max_sequence_length={max_sequence_length}"]
    shown, prepared = ["control_image=CONDITION_PICTURE,"], list[str]()
    pipe = "StableDiffusion3ControlNetPipeline"
    if levels != Encoding().levels:
        black, span = levels[0], levels[1] - levels[0]
        prepared = [
            "in_unit = VaeImageProcessor(vae_scale_factor=16, do_normalize=False).preprocess(CONDITION_PICTURE)"
        ]
        shown = [f"control_image={black:g} + {span:g} * in_unit,  # the levels that it was trained with"]
    if condition == INPAINT:
        shown = ["control_image=IMAGE,", "control_mask=MASK,  # white = inpaint"]
        pipe = "StableDiffusion3ControlNetInpaintingPipeline"
    imported = [*([scheduler] if scheduler else []), "SD3ControlNetModel", pipe]
    loading = [model, f"controlnet=SD3ControlNetModel.from_pretrained({folder})", *loading]
    calling = [
        "prompt=PROMPT,",
        *shown,
        f"num_inference_steps={steps},",
        f"guidance_scale={sampler.guidance_scale:g},",
        f"controlnet_conditioning_scale={sampler.conditioning_scale:g},",
        *(f"{each}," for each in calling),
    ]
    lines = [f"from diffusers import {', '.join(imported)}"]
    lines += ["from diffusers.image_processor import VaeImageProcessor"] if prepared else []
    lines += ["", f"pipeline = {pipe}.from_pretrained(", *(f"    {each}," for each in loading), ")", *prepared]
    lines += ["picture = pipeline(", *(f"    {each}" for each in calling)]
    return "\n".join([*lines, ").images[0]"])


_HEAD = """---
library_name: diffusers
---
A ControlNet for {purpose} with {model}, trained by refine-control.

- sampling steps: {sampler.num_inference_steps}, at most {card.most_steps}
- guidance scale: {sampler.guidance_scale:g}; distilled in: {card.distilled_guidance:g} (1 is none)

`refine-control` reads this from `refine_control.json`."""
_IN_DIFFUSERS = """ In diffusers, with this folder as
FOLDER and the model that it was trained for as MODEL:
{warning}
```python
{code}
```
"""
