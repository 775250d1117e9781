"""Options that several verbs share, checks of outputs, and the settings of an app of verbs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from refine_control.config import SamplerConfig


def sampling(
    model: str,
    controlnet: str | Path | None,
    steps: int | None,
    guidance: float | None,
    scale: float | None,
    **others: Any,
) -> SamplerConfig:
    """The sampling options that are given; for the others the defaults of the ControlNet, the model or else SD3.

    The ControlNet may be an exported folder."""
    from refine_control.models.card import choose_sampler
    from refine_control.runtime.description import exported_sampler, is_exported

    given = {"num_inference_steps": steps, "guidance_scale": guidance, "conditioning_scale": scale, **others}
    if controlnet is not None and is_exported(Path(controlnet)):
        return exported_sampler(Path(controlnet), given)
    return choose_sampler(model, controlnet, given)


def make_app(**options: Any) -> typer.Typer:
    """An app without boxes and formatted tracebacks; the outermost one completes words in shells."""
    return typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, **options)


def output_folder(*kinds: str) -> Callable[[Path | None], Path | None]:
    """The callback of an output folder: refuses a path that cannot be one, before anything is loaded.

    `kinds` name the members of `folders.Kind` that the verb continues or replaces; others are refused."""

    def check(path: Path | None) -> Path | None:
        if path is None:
            return None
        from refine_control.folders import Kind, refuse_output_kind
        from refine_control.storage import check_output_folder

        check_output_folder(path)
        refuse_output_kind(path, *(Kind[name] for name in kinds))
        return path if path.name not in ("", "..") else path.resolve()

    return check


def output(*kinds: str) -> Any:
    """The argument OUT, a folder checked by `output_folder`."""
    return typer.Argument(callback=output_folder(*kinds))


def output_option(help: str, *kinds: str) -> Any:
    """An option for a folder checked by `output_folder`."""
    return typer.Option(callback=output_folder(*kinds), help=help)


def output_file(help: str, *endings: str) -> Any:
    """An option for a file to write, checked before anything is loaded; with one of the `endings` if any are given."""

    def check(path: Path | None) -> Path | None:
        from refine_control.errors import InvalidInputError
        from refine_control.storage import check_output_file

        if path is not None:
            check_output_file(path)
            if endings and path.suffix not in endings:
                raise InvalidInputError(f"{path} does not end with {', '.join(endings)}; choose one of them")
        return path

    return typer.Option(callback=check, help=help)


def folder(help: str, *names: str) -> Any:
    """An option for a folder that exists."""
    return typer.Option(*names, exists=True, file_okay=False, help=help)


def number(help: str, least: float = 1, most: float | None = None) -> Any:
    """An option for a number from `least` to `most`."""
    return typer.Option(min=least, max=most, help=help)


def _known_condition(name: str) -> str:
    from refine_control.conditions.condition import find_condition

    return find_condition(name).name


InFile = Annotated[Path, typer.Option(exists=True, dir_okay=False)]
InFolder = Annotated[Path, typer.Argument(exists=True, file_okay=False)]
Source = Annotated[Path, typer.Argument(exists=True)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Condition = Annotated[
    str,
    typer.Option(
        callback=_known_condition,
        help="What the ControlNet is shown, a kind of `conditions/`, such as inpaint or canny.",
    ),
]
Model = Annotated[str, typer.Option(help="mini, a hub id, or a folder in diffusers layout.")]
Network = Annotated[str | None, typer.Option(help="Hub id, folder, or edge; default: the model's own.")]
Named = typer.Option(help="NAME=FOLDER, or NAME=edge; may be repeated.")
Recipe = Annotated[str, typer.Argument(help="A packaged name or a .yaml file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
Precision = Literal["fp32", "bf16"]
Bars = Annotated[Path | None, output_file("Draw the times as bars.", ".svg", ".png", ".pdf")]
Rounds = Annotated[int, number("Number of rounds.")]
Seed = Annotated[int, number("Seed of all random numbers.", 0, 2**63 - 1)]
MetricWeights = Annotated[
    Path | None, folder("Folder with the networks of FID, LPIPS and CMMD; default: the hub's cache.")
]
SmallPhotos = Annotated[Path | None, folder("Folder of tars of small photographs with category and box.")]
Steps = Annotated[
    int | None,
    number("Number of denoising steps; default: 28 for SD3, 20 for mini, or as a student's card says.", 1, 1000),
]
Guidance = Annotated[
    float | None, number("Guidance scale, 1 or less disables guidance; default: 7 for SD3, 3 for mini.", 0, 100)
]
Prepared = Annotated[
    bool, typer.Option("--prepared", help="The pictures are condition pictures: nothing is made of them.")
]
Preparer = Annotated[
    str | None, typer.Option(help="Hub id or folder of the model that makes condition pictures (depth, pose).")
]
Kinds = Annotated[
    list[str] | None,
    typer.Option(
        "--condition",
        help="Condition of a ControlNet whose config does not say it, such as canny; repeated, one for each.",
    ),
]
Scales = Annotated[
    list[float] | None,
    typer.Option(
        "--conditioning-scale",
        min=0,
        max=2,
        help="Factor on control residuals; repeated, one for each ControlNet; default: as each one's card says.",
    ),
]
CONTROL = "CONTROLNET=PICTURE, such as canny=photo.png"
"""How a ControlNet is given with what it is shown."""
Scale = Annotated[
    float | None,
    typer.Option(
        "--conditioning-scale", min=0, max=2, help="Factor on control residuals; default: 0.95 for SD3, 1 for mini."
    ),
]
Sigmas = Annotated[
    Literal["scheduler", "even"] | None,
    typer.Option(help="Noise levels: as the model's scheduler spaces them (the default), or evenly, then shifted."),
]
Injection = Annotated[
    Literal["exact", "diffusers"],
    typer.Option(help="Injection of control residuals: as in training, or by the rule of diffusers."),
]
