"""Options that several verbs share, checks of outputs, and the settings of an app of verbs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from refine_control.config import SamplerConfig


def sampling(
    model: str, steps: int | None, guidance: float | None, scale: float | None, **others: Any
) -> SamplerConfig:
    """The sampling options that are given; the model's defaults or else SD3's for the others."""
    from refine_control.config import SamplerConfig
    from refine_control.models.card import own_sampling

    given = {"num_inference_steps": steps, "guidance_scale": guidance, "conditioning_scale": scale}
    chosen = {**own_sampling(model), **{name: value for name, value in given.items() if value is not None}, **others}
    return SamplerConfig(**chosen)


def make_app(**options: Any) -> typer.Typer:
    """An app without shell completion, boxes and formatted tracebacks."""
    return typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **options
    )


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


def output_file(path: Path | None) -> Path | None:
    """The callback of an output file."""
    if path is not None:
        from refine_control.storage import check_output_file

        check_output_file(path)
    return path


InFolder = typer.Argument(exists=True, file_okay=False)
InFile = typer.Option(exists=True, dir_okay=False)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Model = Annotated[str, typer.Option(help="mini, a hub id, or a folder in diffusers layout.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random numbers.")]
MetricWeights = Annotated[
    Path | None,
    typer.Option(
        exists=True, file_okay=False, help="Folder with the networks of FID, LPIPS and CMMD; default: the hub's cache."
    ),
]
SmallPhotos = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder of tars of small photographs with category and box."),
]
Steps = Annotated[
    int | None, typer.Option(min=1, max=1000, help="Number of denoising steps; default: 28 for SD3, 20 for mini.")
]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, max=100, help="Guidance scale, 1 or less disables guidance; default: 7 for SD3, 3 for mini."),
]
Scale = Annotated[
    float | None,
    typer.Option(
        "--conditioning-scale", min=0, max=2, help="Factor on control residuals; default: 0.95 for SD3, 1 for mini."
    ),
]
Injection = Annotated[
    Literal["exact", "diffusers"],
    typer.Option(help="Injection of control residuals: as in training, or by the rule of diffusers."),
]
