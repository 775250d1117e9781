"""Options that mean the same in every verb, and how an app of verbs is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from refine_control.config import SamplerConfig


def sampling(
    model: str, steps: int | None, guidance: float | None, scale: float | None, **others: Any
) -> SamplerConfig:
    """What was given, else the model's own, else SD3's."""
    from refine_control.config import SamplerConfig
    from refine_control.models.card import own_sampling

    given = {"num_inference_steps": steps, "guidance_scale": guidance, "conditioning_scale": scale}
    chosen = {**own_sampling(model), **{name: value for name, value in given.items() if value is not None}, **others}
    return SamplerConfig(**chosen)


def make_app(**options: Any) -> typer.Typer:
    """An app that answers plainly: no shell completion, no boxes, no pretty tracebacks."""
    return typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **options
    )


InFolder = typer.Argument(exists=True, file_okay=False)
InFile = typer.Option(exists=True, dir_okay=False)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, write nothing.")]
Model = Annotated[str, typer.Option(help="mini, a hub id, or a folder in diffusers layout.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything that is drawn.")]
MetricWeights = Annotated[
    Path | None,
    typer.Option(
        exists=True, file_okay=False, help="Folder with the networks of FID, LPIPS, CMMD; by default the hub's cache."
    ),
]
SmallPhotos = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Tars of small photographs with category and box."),
]
Steps = Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps; 28 for SD3, 20 for mini.")]
Guidance = Annotated[
    float | None, typer.Option(min=0, max=100, help="Guidance scale, 1 or less is none; 7 for SD3, 3 for mini.")
]
Scale = Annotated[
    float | None,
    typer.Option("--conditioning-scale", min=0, max=2, help="Factor on control residuals; 0.95 for SD3, 1 for mini."),
]
Injection = Annotated[Literal["exact", "diffusers"], typer.Option(help="As trained, or by the stock rule.")]
