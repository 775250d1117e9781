"""The verbs of the data: photographs or scenes into shards, shards into caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from refine_control.cli_options import DryRun, Guidance, InFolder, Json, Model, Seed, make_app
from refine_control.cli_output import progress_bar, show
from refine_control.errors import DamagedError

data_app = make_app(help="Photos or scenes, masks and prompts into shards; their inspection.")


@data_app.command("build")
def data_build(
    source: Annotated[Path, typer.Argument(exists=True)],
    out: Path,
    masks: Annotated[Literal["given"], typer.Option(help="given: a mask stands beside each photo.")] = "given",
    prompts: Annotated[
        Literal["given"], typer.Option(help="given: a local prompt stands beside each photo.")
    ] = "given",
    size: Annotated[int, typer.Option(help="Side of the square samples in pixels.")] = 64,
    test_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of photos kept for the test.")] = 0.2,
    unlabeled_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of the others without pixels.")] = 0.5,
    seed: Seed = 0,
    image_format: Annotated[
        Literal["webp", "png", "jpg"], typer.Option("--format", help="webp is lossless here.")
    ] = "webp",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many entries.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Photos, masks and prompts of SOURCE into shards under OUT; what is refused is told in rejects.jsonl."""
    options: dict[str, Any] = {"size": size, "test_fraction": test_fraction, "unlabeled_fraction": unlabeled_fraction}
    options |= {"seed": seed, "image_format": image_format, "limit": limit}
    if dry_run:
        plan = {"verb": "data build", "source": source, "out": out, "masks": masks, "prompts": prompts, **options}
        return show(plan, as_json)
    from refine_control.data.build import build

    summary = build(source, out, progress=progress_bar("photos"), **options)
    show(summary if as_json else str(summary), as_json)


@data_app.command("verify")
def data_verify(folder: Annotated[Path, InFolder], as_json: Json = False) -> None:
    """Read every byte of the shards in FOLDER; exit code 65 if any is not as it was written."""
    from refine_control.data.shards import verify

    problems = verify(folder)
    show({"folder": folder, "problems": problems} if as_json else "\n".join(problems) or f"{folder} is whole", as_json)
    if problems:
        raise DamagedError(
            f"{len(problems)} fault{'s' * (len(problems) > 1)} in {folder}; delete what is named above and build again"
        )


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[Path, InFolder],
    sheet: Annotated[Path | None, typer.Option(help="PNG to draw samples into.")] = None,
    as_json: Json = False,
) -> None:
    """Counts of the shards in FOLDER and, with --sheet, a picture of samples."""
    from refine_control.data.inspect import contact_sheet, inspect

    show(inspect(folder), as_json)
    if sheet is not None:
        contact_sheet(folder, sheet)


@data_app.command("scenes")
def data_scenes(
    out: Path,
    labeled: Annotated[int, typer.Option(min=0, help="Scenes with everything.")] = 1000,
    unlabeled: Annotated[int, typer.Option(min=0, help="Scenes without the pixels of their holes.")] = 4000,
    test: Annotated[int, typer.Option(min=0, help="Scenes for evaluation.")] = 200,
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Render scenes of the mini world as shards of the three roles under OUT."""
    counts: dict[str, Any] = {"labeled": labeled, "unlabeled": unlabeled, "test": test, "seed": seed}
    if dry_run:
        return show({"verb": "data scenes", "out": out, **counts}, as_json)
    from refine_control.data.scene_shards import build_scenes

    show(build_scenes(out, progress=progress_bar("scenes"), **counts), as_json)


def cache(
    shards: Annotated[Path, InFolder],
    out: Path,
    model: Model = "mini",
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Of what is stored.")] = "fp32",
    prompts: Annotated[
        Literal["full", "int8"], typer.Option(help="Prompt embeddings in --dtype, or in 8 bits with scales.")
    ] = "full",
    complete: Annotated[int, typer.Option(min=0, max=1000, help="Steps of the teacher's completions; 0: none.")] = 0,
    guidance: Guidance = 1.0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Encode SHARDS once: latents and prompt embeddings under OUT (and, with --complete, the teacher's pictures)."""
    options: dict[str, Any] = {"model": model, "dtype": dtype, "prompts": prompts, "complete": complete}
    options |= {"guidance": guidance}
    if dry_run:
        return show({"verb": "cache", "shards": shards, "out": out, **options}, as_json)
    import torch

    from refine_control.config import SamplerConfig
    from refine_control.data.cache import build_cache
    from refine_control.models.loading import load_backbone

    stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    sampler = SamplerConfig(num_inference_steps=complete, guidance_scale=guidance) if complete else None
    made = build_cache(shards, out, load_backbone(model), stored, prompts, sampler, progress_bar("cache"))
    show({"cache": out, "made": made}, as_json)
