"""The verbs of the data: photographs or scenes into shards, shards into caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from refine_control.cli.options import DryRun, InFolder, Json, Model, Seed, make_app
from refine_control.cli.output import progress_bar, show
from refine_control.errors import DamagedError

data_app = make_app(help="Photos or scenes, masks and prompts into shards; their inspection.")


Images = Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Photos of a COCO .json.")]
Masks = Annotated[
    Literal["given", "sam", "felzenszwalb"],
    typer.Option(help="given by the source; proposed by SAM; or by a segmentation that needs no weights."),
]
Prompts = Annotated[
    Literal["given", "qwen", "server"],
    typer.Option(help="given by the source; by Qwen2.5-VL here; or by the model behind --server."),
]
Segmenter = Annotated[str, typer.Option(help="Hub id or folder of a SAM model.")]
Describer = Annotated[str, typer.Option(help="Hub id or folder of Qwen2.5-VL, or the server's name for its model.")]
Server = Annotated[str, typer.Option(help="Address of an OpenAI-compatible server, such as vLLM's.")]
EngineName = Annotated[Literal["local", "ray"], typer.Option(help="Processes of this machine, or a Ray cluster.")]
Workers = Annotated[int, typer.Option(min=1, max=1024, help="Processes, or actors of Ray.")]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs of each actor of Ray.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many.")]
SAM, QWEN, SERVER = "facebook/sam2.1-hiera-large", "Qwen/Qwen2.5-VL-7B-Instruct", "http://127.0.0.1:8000"


def _engine(name: str, workers: int, gpus: float) -> Any:
    from refine_control.annotation.engines import local, ray_actors

    return ray_actors(workers, gpus) if name == "ray" else local(workers)


@data_app.command("annotate")
def data_annotate(
    source: Annotated[Path, typer.Argument(exists=True)],
    out: Path,
    masks: Masks = "given",
    segmenter: Segmenter = SAM,
    prompts: Prompts = "given",
    describer: Describer = QWEN,
    server: Server = SERVER,
    api_key_variable: Annotated[
        str | None, typer.Option(help="Environment variable that holds the server's key.")
    ] = None,
    global_prompts: Annotated[bool, typer.Option("--global-prompts", help="Describe whole photos too.")] = False,
    min_area: Annotated[float, typer.Option(min=0, max=1, help="Smallest share of the photo for a region.")] = 0.05,
    max_area: Annotated[float, typer.Option(min=0, max=1, help="Largest share.")] = 0.4,
    per_photo: Annotated[int, typer.Option(min=1, help="Regions of a photo at most.")] = 2,
    dilate: Annotated[int, typer.Option(min=0, help="Pixels by which proposed regions are grown.")] = 0,
    shape: Annotated[
        Literal["none", "box", "brush"], typer.Option(help="Cover proposed regions by what hides their outline.")
    ] = "none",
    images: Images = None,
    engine: EngineName = "local",
    workers: Workers = 1,
    gpus: Gpus = 0.0,
    seed: Seed = 0,
    limit: Limit = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try the photos again that a model refused or failed on.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Find regions and prompts for the photos of SOURCE: OUT/manifest.jsonl, for `data review` and `data build`."""
    options: dict[str, Any] = {"masks": masks, "segmenter": segmenter, "prompts": prompts, "describer": describer}
    options |= {"api_key_variable": api_key_variable}
    options |= {"server": server, "global_prompts": global_prompts, "min_area": min_area, "max_area": max_area}
    options |= {"per_photo": per_photo, "dilate": dilate, "shape": shape, "seed": seed, "limit": limit}
    if dry_run:
        return show({"verb": "data annotate", "source": source, "out": out, "engine": engine, **options}, as_json)
    from refine_control.annotation.annotate import annotate
    from refine_control.annotation.annotator import Annotation

    chosen, how = Annotation(**options), _engine(engine, workers, gpus)
    bar = progress_bar("photos")
    summary = annotate(source, out, chosen, images=images, engine=how, progress=bar, retry_failed=retry_failed)
    show(summary if as_json else str(summary), as_json)


@data_app.command("build")
def data_build(
    source: Annotated[Path, typer.Argument(exists=True)],
    out: Path,
    masks: Masks = "given",
    segmenter: Segmenter = SAM,
    prompts: Prompts = "given",
    describer: Describer = QWEN,
    server: Server = SERVER,
    size: Annotated[
        int, typer.Option(help="Side of the square samples in pixels; 64 is the mini model's, 1024 SD3's.")
    ] = 64,
    buckets: Annotated[
        bool, typer.Option("--buckets", help="Keep the photo's shape: sizes of about --size^2 pixels, 1:2 to 2:1.")
    ] = False,
    test_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of photos kept for the test.")] = 0.2,
    unlabeled_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the others that become D_ssl.")
    ] = 0.5,
    seed: Seed = 0,
    image_format: Annotated[
        Literal["webp", "png", "jpg"], typer.Option("--format", help="webp is lossless here.")
    ] = "webp",
    images: Images = None,
    engine: EngineName = "local",
    workers: Workers = 1,
    gpus: Gpus = 0.0,
    limit: Limit = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Photos, masks and prompts of SOURCE into shards under OUT; what is refused is told in rejects.jsonl.

    Masks or prompts that are not given are first found by `data annotate` into OUT-annotations."""
    options: dict[str, Any] = {"size": size, "test_fraction": test_fraction, "unlabeled_fraction": unlabeled_fraction}
    options |= {"seed": seed, "image_format": image_format, "limit": limit, "buckets": buckets}
    if dry_run:
        plan = {"verb": "data build", "source": source, "out": out, "masks": masks, "prompts": prompts, **options}
        return show(plan, as_json)
    from refine_control.photos.build import build

    if (masks, prompts) != ("given", "given"):
        from refine_control.annotation.annotate import annotate
        from refine_control.annotation.annotator import Annotation

        found: dict[str, Any] = {"masks": masks, "segmenter": segmenter, "prompts": prompts, "describer": describer}
        chosen = Annotation(**found, server=server, seed=seed, limit=limit)
        annotated, how = out.with_name(f"{out.name}-annotations"), _engine(engine, workers, gpus)
        annotate(source, annotated, chosen, images=images, engine=how, progress=progress_bar("annotate"))
        source, images, options["limit"] = annotated, None, None
    summary = build(source, out, images=images, workers=workers, progress=progress_bar("photos"), **options)
    show(summary if as_json else str(summary), as_json)


@data_app.command("review")
def data_review(
    folder: Annotated[Path, InFolder],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8765,
    host: Annotated[str, typer.Option(help="Loopback only, unless --allow-remote.")] = "127.0.0.1",
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Let other machines in.")] = False,
    reviewer: Annotated[str | None, typer.Option(help="Who decides; the page asks otherwise.")] = None,
    to_label_studio: Annotated[
        Path | None, typer.Option(help="Write Label Studio's tasks to this folder instead.")
    ] = None,
    from_label_studio: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Take over the decisions of Label Studio's export.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Serve a page where people accept, mend or reject the prompts of FOLDER/manifest.jsonl: decisions.jsonl."""
    if dry_run:
        return show({"verb": "data review", "folder": folder, "host": host, "port": port}, as_json=False)
    if to_label_studio or from_label_studio:
        from refine_control.annotation.label_studio import export_tasks, import_annotations

        if to_label_studio:
            show(export_tasks(folder, to_label_studio), as_json=False)
        if from_label_studio:
            show(import_annotations(from_label_studio, folder), as_json=False)
        return None
    from refine_control.annotation.review import serve

    serve(folder, host, port, reviewer=reviewer, allow_remote=allow_remote)


@data_app.command("reword")
def data_reword(
    source: Annotated[Path, typer.Argument(exists=True)],
    out: Path,
    kind: Annotated[
        Literal["template", "shuffled", "global"],
        typer.Option("--as", help="`a CATEGORY`; those of other photos; or of whole photos."),
    ],
    images: Images = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """The regions of SOURCE with prompts of another quality: OUT/manifest.jsonl, to measure what prompts are worth."""
    if dry_run:
        return show({"verb": "data reword", "source": source, "out": out, "as": kind, "seed": seed}, as_json)
    from refine_control.annotation.reword import reword

    show(reword(source, out, kind, seed, images)._asdict(), as_json)


@data_app.command("download")
def data_download(
    urls: Annotated[Path, typer.Argument(exists=True)],
    out: Path,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fetch a list of URLS (Unsplash-Lite's TSV, LAION's parquet, or one a line) as WebDataset by img2dataset."""
    from refine_control.photos.download import command_for, download

    if dry_run:
        return show({"verb": "data download", "command": command_for(urls, out)}, as_json)
    show(download(urls, out), as_json)


@data_app.command("verify")
def data_verify(folder: Annotated[Path, InFolder], as_json: Json = False) -> None:
    """Read every byte of the shards in FOLDER; exit code 65 if any is not as it was written."""
    from refine_control.photos.shards import verify

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
    html: Annotated[Path | None, typer.Option(help="Page to browse, one file.")] = None,
    as_json: Json = False,
) -> None:
    """Counts of the shards in FOLDER and, with --sheet or --html, what the samples look like."""
    from refine_control.photos.inspect import contact_sheet, inspect

    show(inspect(folder), as_json)
    if sheet is not None:
        contact_sheet(folder, sheet)
    if html is not None:
        from refine_control.photos.inspect_page import write_page

        write_page(folder, html)


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
    from refine_control.miniature.scene_shards import build_scenes

    show(build_scenes(out, progress=progress_bar("scenes"), **counts), as_json)


def cache(
    shards: Annotated[Path, InFolder],
    out: Path,
    model: Model = "mini",
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Number type of what is stored.")] = "fp32",
    prompts: Annotated[
        Literal["full", "int8", "none"],
        typer.Option(help="Embeddings in --dtype, in 8 bits with scales, or none: train by data.prompts=encode."),
    ] = "full",
    teacher: Annotated[
        str | None,
        typer.Option(help="ControlNet that --complete paints with, a folder or hub id; by default the model's."),
    ] = None,
    posterior: Annotated[
        Literal["mean", "mean_std"],
        typer.Option(help="Of the VAE: the mean; mean_std keeps the deviation too, and training draws its x0."),
    ] = "mean",
    complete: Annotated[int, typer.Option(min=0, max=1000, help="Steps of the teacher's completions; 0: none.")] = 0,
    guidance: Annotated[float, typer.Option(min=0, max=100, help="Guidance of the completions; 1: none.")] = 1.0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Encode SHARDS once: latents and prompt embeddings under OUT (and, with --complete, the teacher's pictures)."""
    options: dict[str, Any] = {"model": model, "dtype": dtype, "prompts": prompts, "complete": complete}
    options |= {"guidance": guidance, "posterior": posterior, "teacher": teacher}
    if dry_run:
        return show({"verb": "cache", "shards": shards, "out": out, **options}, as_json)
    import torch

    from refine_control.cache.building import build_cache, completion_sampler
    from refine_control.models.devices import best_device
    from refine_control.models.loading import load_backbone, load_controlnet

    stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    sampler = completion_sampler(complete, guidance) if complete else None
    painting = sampler is not None
    controlnet = load_controlnet(teacher) if teacher else None
    backbone = load_backbone(model, controlnet, cpu_kernels=painting, device=best_device(), painting=painting)
    made = build_cache(shards, out, backbone, stored, prompts, sampler, progress_bar("cache"), posterior)
    show({"cache": out, "made": made}, as_json)
