"""The verb `inpaint`: one photograph of any size, or a folder of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from refine_control.cli import options as opt
from refine_control.cli.output import paired, progress_bar, show
from refine_control.errors import InvalidInputError
from refine_control.signals import KEPT, interruptible

if TYPE_CHECKING:
    import numpy as np

    from refine_control.photos.decode import Original

_SOURCES = (".jsonl", ".json", ".tar", ".tar.gz", ".tgz")
"""Endings of files that hold or name several photographs."""
_CONTROLNET = "Hub id, folder, edge, or the model's name for its own; with another --runtime an exported folder; "
_CONTROLNET += "default: edge for mini, else the model's own."
_CONTROL = (
    "CONTROLNET=PICTURE: one without a mask that paints with --controlnet, as in `generate`, and a picture of the "
)
_CONTROL += "photograph's size; may be repeated."


@interruptible(f"of a photograph nothing is written, of a folder {KEPT}")
def inpaint(
    *,
    image: Annotated[
        Path, typer.Option(exists=True, help="A photograph; or a folder or manifest of several, as `data build` reads.")
    ],
    mask: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Picture of the photograph's size, white = inpaint."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt for the masked region; of several photographs, where none is given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .jpg or .webp; of several photographs a folder.")],
    box: Annotated[str | None, typer.Option(help="Region as x0,y0,x1,y1 in pixels, x1 and y1 excluded.")] = None,
    point: Annotated[str | None, typer.Option(help="Point x,y: the proposed region under it.")] = None,
    segmenter: Annotated[
        str | None, typer.Option(help="Hub id or folder of a SAM model for --point; default: needs no weights.")
    ] = None,
    model: opt.Model = "mini",
    controlnet: Annotated[str | None, typer.Option(help=_CONTROLNET)] = None,
    control: Annotated[list[str] | None, typer.Option(help=_CONTROL)] = None,
    conditions: opt.Kinds = None,
    prepared: opt.Prepared = False,
    preparer: opt.Preparer = None,
    runtime: Annotated[
        Literal["torch", "onnx", "openvino"], typer.Option(help="What computes; all but torch take an exported folder.")
    ] = "torch",
    whole: Annotated[bool, typer.Option("--whole", help="Paint the photograph as it is, not a frame.")] = False,
    context: Annotated[float, opt.number("Width of a frame around the hole, in sides of the hole.", 0, 10)] = 0.5,
    feather: Annotated[
        int | None, opt.number("Pixels around the hole in which the edge fades; default: 1/32 of the frame.", 0, 1000)
    ] = None,
    size: Annotated[
        int | None, opt.number("Write a square of this side in pixels around the hole, painted as a whole.", 16)
    ] = None,
    composite: Annotated[bool, typer.Option("--composite", help="Keep the original pixels outside the mask.")] = False,
    seeds: Annotated[int, opt.number("Number of variants: OUT-0, OUT-1, ..., each with its seed.", 1, 1000)] = 1,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    scale: opt.Scales = None,
    sigmas: opt.Sigmas = None,
    injection: opt.Injection = "exact",
    seed: opt.Seed = 0,
    dry_run: opt.DryRun = False,
) -> None:
    """Inpaint the white region of a mask, a box or the region at a point in one image or many, of any size."""
    given = {**locals(), "control": paired(control or [], "--control", opt.CONTROL)}
    given |= {"scale": scale or [], "conditions": conditions or []}
    sampling = {"num_inference_steps": steps, "guidance_scale": guidance}
    sampling["conditioning_scale"] = scale[0] if scale else None
    _run(given, {**sampling, "sigmas": sigmas, "seed": seed, "injection": injection})


_SAMPLING = ("steps", "guidance", "scale", "sigmas", "injection", "seed", "dry_run")


def _run(given: dict[str, Any], sampling: dict[str, Any]) -> None:
    """Checks the options of the verb, by name, then loads the model and paints."""
    from refine_control.models.card import choose_sampler, default_controlnet

    image, out, model, exported = given["image"], given["out"], given["model"], given["runtime"] != "torch"
    several = image.is_dir() or image.name.lower().endswith(_SOURCES)
    region = _check(given, several)
    controlnet = given["controlnet"] if exported else default_controlnet(model, given["controlnet"])
    sampler = None if exported else choose_sampler(model, controlnet, sampling)
    if given["dry_run"]:
        plan = {name: value for name, value in given.items() if name not in _SAMPLING} | {"controlnet": controlnet}
        return show({**plan, **(sampling if sampler is None else sampler.model_dump())}, as_json=False)
    from refine_control.pipeline.batch import Plan, inpaint_photograph, inpaint_source
    from refine_control.pipeline.inpainter import Inpainter
    from refine_control.pipeline.pictures import read_condition

    if given["size"] is not None:
        from refine_control.pipeline.files import inpaint_file

        square = {name: given[name] for name in ("model", "controlnet", "size", "composite")}
        return print(inpaint_file(image, given["mask"], given["prompt"], out, sampler=sampler, **square))
    photograph, hole = (None, None) if several else _read(given, region)
    for _, picture in given["control"]:
        assert photograph is not None
        read_condition(picture, photograph, "white")  # refused before the model is loaded
    inpainter = Inpainter.load(model, given["controlnet"], runtime=given["runtime"])
    feather = 0 if given["composite"] else given["feather"]
    chosen = sampler or inpainter.sampler(**sampling)
    plan = Plan(chosen, given["seeds"], given["whole"], given["context"], feather)
    bar = progress_bar("inpaint")
    if photograph is None or hole is None:
        return print(inpaint_source(inpainter, image, out, plan, given["prompt"], bar))
    how = {name: given[name] for name in ("conditions", "prepared", "preparer")}
    others = inpainter.beside(given["control"], photograph, scales=given["scale"], **how)
    for path in inpaint_photograph(inpainter, photograph, hole, given["prompt"], out, plan, bar, others):
        print(path)


def _check(given: dict[str, Any], several: bool) -> tuple[str, list[int]] | None:
    """The box or point that is given, with its numbers. Raises InvalidInputError for options that do not go together,
    and for an output that cannot be written."""
    from refine_control.folders import refuse_output_kind
    from refine_control.pipeline.pictures import check_ending, check_prompt
    from refine_control.storage import check_output_file, check_output_folder

    regions = [f"--{name}" for name in ("mask", "box", "point") if given[name] is not None]
    if several and regions:
        raise InvalidInputError(
            f"{regions[0]} is for one photograph; {given['image']} brings a mask for each of its own"
        )
    if len(regions) > 1:
        raise InvalidInputError(f"{' and '.join(regions)} each say what to inpaint; give one of them")
    if not several and not regions:
        raise InvalidInputError("nothing says what to inpaint; give --mask FILE, --box x0,y0,x1,y1 or --point x,y")
    if not several or given["prompt"] is not None:
        check_prompt(given["prompt"] or "")
    if several:
        check_output_folder(given["out"])
        refuse_output_kind(given["out"])
    else:
        check_output_file(given["out"])
        check_ending(given["out"])
    if given["composite"] and given["feather"]:
        raise InvalidInputError("--composite keeps every pixel outside the mask, and --feather fades there; give one")
    if given["segmenter"] and not given["point"]:
        raise InvalidInputError("--segmenter proposes the regions of --point; give a point, or leave it out")
    _check_control(given, several)
    if given["size"] is not None:
        usual = {"box": None, "point": None, "runtime": "torch", "whole": False, "context": 0.5, "feather": None}
        usual["control"] = []
        other = [name for name, value in {**usual, "seeds": 1}.items() if given[name] != value]
        if several or other:
            raise InvalidInputError(
                f"--size writes a square around the hole of one --mask; leave out --{other[0] if other else 'size'}"
            )
    name = next((name for name in ("box", "point") if given[name] is not None), None)
    return None if name is None else (name, _numbers(name, given[name]))


def _check_control(given: dict[str, Any], several: bool) -> None:
    """Raises InvalidInputError for options of further ControlNets that do not go together."""
    from refine_control.pipeline.pictures import EACH_OF_ITS_SIZE, check_files
    from refine_control.pipeline.together import check_conditions, check_scales

    control = given["control"]
    check_files([Path(picture) for _, picture in control], EACH_OF_ITS_SIZE)
    if control and several:
        raise InvalidInputError(f"--control is for one photograph, and {given['image']} holds several; leave it out")
    if control and given["runtime"] != "torch":
        raise InvalidInputError("an exported folder paints with its own ControlNet alone; leave out --control")
    if not control and (unused := [name for name in ("prepared", "preparer") if given[name]]):
        raise InvalidInputError(f"--{unused[0]} is about the pictures of --control; give one, or leave it out")
    check_scales(given["scale"], 1 + len(control))
    check_conditions(given["conditions"], len(control))


def _numbers(name: str, text: str) -> list[int]:
    """The whole numbers of --box or --point. Raises InvalidInputError for other text."""
    form = {"box": "x0,y0,x1,y1", "point": "x,y"}[name]
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != form.count(",") + 1:
        raise InvalidInputError(f"--{name} {text}: give {form} in whole pixels")
    return numbers


def _read(given: dict[str, Any], region: tuple[str, list[int]] | None) -> tuple[Original, np.ndarray]:
    """The photograph and the region to inpaint on it, (H, W) bool."""
    import numpy as np

    from refine_control.pipeline.pictures import read_mask, read_photograph

    photograph = read_photograph(given["image"])
    name, numbers = region or ("mask", [])
    if name != "point":
        return photograph, read_mask(numbers or given["mask"], photograph)
    from refine_control.annotation.pick import segment_at

    propose = None
    if given["segmenter"]:
        from refine_control.annotation.segmenter import load_segmenter

        propose = load_segmenter(given["segmenter"]).propose
    return photograph, segment_at(np.asarray(photograph.shown), (numbers[0], numbers[1]), propose)
