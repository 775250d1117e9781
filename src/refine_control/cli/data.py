"""The verbs of `data` and `cache`: photographs or scenes into shards, shards into caches."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from refine_control.cli import options as opt
from refine_control.cli.output import progress_bar, show
from refine_control.errors import DamagedError
from refine_control.signals import interruptible

if TYPE_CHECKING:
    from refine_control.annotation.engines import Engine

data_app = opt.make_app(help="Build and inspect shards of photos or scenes with masks and prompts.")
Images = Annotated[Path | None, opt.folder("Folder of the photos of a COCO .json.")]
Masks = Annotated[
    Literal["given", "sam", "felzenszwalb"],
    typer.Option(help="given by the source; proposed by SAM; or by a segmentation without weights."),
]
Prompts = Annotated[
    Literal["given", "qwen", "server"],
    typer.Option(help="given by the source; written by Qwen2.5-VL; or by the model behind --server."),
]
Segmenter = Annotated[str, typer.Option(help="Hub id or folder of a SAM model.")]
Describer = Annotated[str, typer.Option(help="Hub id or folder of Qwen2.5-VL, or the name of the server's model.")]
Server = Annotated[str, typer.Option(help="Address of an OpenAI-compatible server such as vLLM.")]
EngineName = Annotated[Literal["local", "ray"], typer.Option(help="Processes on this machine, or a Ray cluster.")]
Workers = Annotated[int, opt.number("Number of processes or Ray actors.", 1, 1024)]
Gpus = Annotated[float, opt.number("GPUs of each Ray actor.", 0)]
Condition = Annotated[str, typer.Option(help="What the ControlNet is shown: inpaint, or a kind without masks.")]
Limit = Annotated[int | None, opt.number("Only the first entries, this many.")]
SAM, QWEN, SERVER = "facebook/sam2.1-hiera-large", "Qwen/Qwen2.5-VL-7B-Instruct", "http://127.0.0.1:8000"


def _engine(name: str, workers: int, gpus: float) -> Engine:
    from refine_control.annotation.engines import local, ray_actors

    return ray_actors(workers, gpus) if name == "ray" else local(workers)


@data_app.command("annotate")
@interruptible()
def data_annotate(
    source: opt.Source,
    out: Annotated[Path, opt.output("ANNOTATIONS")],
    masks: Masks = "given",
    segmenter: Segmenter = SAM,
    prompts: Prompts = "given",
    describer: Describer = QWEN,
    server: Server = SERVER,
    api_key_variable: Annotated[str | None, typer.Option(help="Environment variable of the server's API key.")] = None,
    global_prompts: Annotated[bool, typer.Option("--global-prompts", help="Describe whole photos as well.")] = False,
    min_area: Annotated[float, opt.number("Smallest area of a region as a share of the photo.", 0, 1)] = 0.05,
    max_area: Annotated[float, opt.number("Largest area of a region.", 0, 1)] = 0.4,
    per_photo: Annotated[int, opt.number("Largest number of regions of a photo.")] = 2,
    dilate: Annotated[int, opt.number("Pixels by which proposed regions are dilated.", 0)] = 0,
    shape: Annotated[
        Literal["none", "box", "brush"],
        typer.Option(help="Cover proposed regions with a shape that hides their outline."),
    ] = "none",
    images: Images = None,
    engine: EngineName = "local",
    workers: Workers = 1,
    gpus: Gpus = 0.0,
    seed: opt.Seed = 0,
    limit: Limit = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try the photos again that a model refused or failed on.")
    ] = False,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Find regions and prompts for the photos of SOURCE: OUT/manifest.jsonl, for `data review` and `data build`."""
    from refine_control.annotation.annotate import annotate
    from refine_control.annotation.annotator import Annotation

    chosen = Annotation(**{name: value for name, value in locals().items() if name in Annotation.__dataclass_fields__})
    if dry_run:
        plan = {"verb": "data annotate", "source": source, "out": out, "engine": engine, **asdict(chosen)}
        return show(plan, as_json)
    how, bar = _engine(engine, workers, gpus), progress_bar("photos")
    summary = annotate(source, out, chosen, images=images, engine=how, progress=bar, retry_failed=retry_failed)
    show(summary if as_json else str(summary), as_json)


@data_app.command("build")
@interruptible()
def data_build(
    source: opt.Source,
    out: Annotated[Path, opt.output("BUILD")],
    masks: Masks = "given",
    segmenter: Segmenter = SAM,
    prompts: Prompts = "given",
    describer: Describer = QWEN,
    server: Server = SERVER,
    size: Annotated[int, typer.Option(help="Side of the samples in pixels; 64 for the mini model, 1024 for SD3.")] = 64,
    buckets: Annotated[
        bool, typer.Option("--buckets", help="Keep the aspect ratio, 1:2 to 2:1, at about --size^2 pixels.")
    ] = False,
    test_fraction: Annotated[float, opt.number("Share of the photos in the test set.", 0, 1)] = 0.2,
    unlabeled_fraction: Annotated[float, opt.number("Share of the other photos in D_ssl.", 0, 1)] = 0.5,
    seed: opt.Seed = 0,
    image_format: Annotated[
        Literal["webp", "png", "jpg"], typer.Option("--format", help="Image format; webp is lossless.")
    ] = "webp",
    condition: Condition = "inpaint",
    preparer: Annotated[
        str | None, typer.Option(help="Hub id or folder of the model that makes condition pictures (depth, pose).")
    ] = None,
    images: Images = None,
    engine: EngineName = "local",
    workers: Workers = 1,
    gpus: Gpus = 0.0,
    limit: Limit = None,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Build shards under OUT from photos, masks and prompts of SOURCE; rejects.jsonl lists what is refused, and why.

    Masks or prompts that are not given are first made by `data annotate` in OUT-annotations. A --condition other than
    inpaint needs no masks: its pictures are given by SOURCE, or made of the photos."""
    from refine_control.conditions.condition import find_condition
    from refine_control.errors import InvalidInputError

    if not find_condition(condition).region and (masks, prompts) != ("given", "given"):
        raise InvalidInputError(
            f"--masks and --prompts are about regions, and the condition {condition} has none; leave both out"
        )
    shares = {"test_fraction": test_fraction, "unlabeled_fraction": unlabeled_fraction}
    options = {"size": size, **shares, "seed": seed, "image_format": image_format, "limit": limit, "buckets": buckets}
    options |= {"condition": condition, "preparer": preparer}
    if dry_run:
        plan = {"verb": "data build", "source": source, "out": out, "masks": masks, "prompts": prompts, **options}
        return show(plan, as_json)
    from refine_control.photos.build import build

    if (masks, prompts) != ("given", "given"):
        from refine_control.annotation.annotate import annotate
        from refine_control.annotation.annotator import Annotation

        chosen = Annotation(masks, segmenter, prompts, describer, server, seed=seed, limit=limit)
        annotated, how = out.with_name(f"{out.name}-annotations"), _engine(engine, workers, gpus)
        report = annotate(source, annotated, chosen, images=images, engine=how, progress=progress_bar("annotate"))
        typer.echo(f"{annotated}: {report}", err=True)
        source, images, options["limit"] = annotated, None, None
    summary = build(source, out, images=images, workers=workers, progress=progress_bar("photos"), **options)
    show(summary if as_json else str(summary), as_json)


@data_app.command("review")
def data_review(
    folder: opt.InFolder,
    port: Annotated[int, opt.number("Port; 0: any free one.", 0, 65535)] = 8765,
    host: Annotated[str, typer.Option(help="Address; only loopback without --allow-remote.")] = "127.0.0.1",
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Allow other machines.")] = False,
    reviewer: Annotated[str | None, typer.Option(help="Name of the reviewer; default: the page asks.")] = None,
    to_label_studio: Annotated[
        Path | None, opt.output_option("Write tasks for Label Studio to this folder instead.", "TASKS", "ANNOTATIONS")
    ] = None,
    from_label_studio: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Import the decisions of a Label Studio export.")
    ] = None,
    dry_run: opt.DryRun = False,
) -> None:
    """Serve a page to accept, edit or reject the prompts of FOLDER/manifest.jsonl; writes decisions.jsonl."""
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
@interruptible("nothing is written")
def data_reword(
    source: opt.Source,
    out: Annotated[Path, opt.output("ANNOTATIONS")],
    kind: Annotated[
        Literal["template", "shuffled", "global"],
        typer.Option("--as", help="`a CATEGORY`; prompts of other photos; or of whole photos."),
    ],
    images: Images = None,
    seed: opt.Seed = 0,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Write OUT/manifest.jsonl: the regions of SOURCE with prompts of another quality, for ablations."""
    if dry_run:
        return show({"verb": "data reword", "source": source, "out": out, "as": kind, "seed": seed}, as_json)
    from refine_control.annotation.reword import reword

    show(reword(source, out, kind, seed, images)._asdict(), as_json)


@data_app.command("download")
@interruptible()
def data_download(
    urls: opt.Source,
    out: Annotated[Path, opt.output("DOWNLOAD")],
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Download a list of URLS (Unsplash-Lite's TSV, LAION's parquet, or one a line) as WebDataset by img2dataset."""
    from refine_control.photos.download import command_for, download

    if dry_run:
        return show({"verb": "data download", "command": command_for(urls, out)}, as_json)
    show(download(urls, out), as_json)


@data_app.command("verify")
@interruptible("nothing is written")
def data_verify(folder: opt.InFolder, as_json: opt.Json = False) -> None:
    """Read every byte of the shards in FOLDER; exit code 65 if any has changed since it was written."""
    from refine_control.photos.shards import verify

    problems = verify(folder)
    show({"folder": folder, "problems": problems} if as_json else "\n".join(problems) or f"{folder} is whole", as_json)
    if problems:
        raise DamagedError(
            f"{len(problems)} fault{'s' * (len(problems) > 1)} in {folder}; delete what is named above and build again"
        )


@data_app.command("inspect")
@interruptible("nothing is written")
def data_inspect(
    folder: opt.InFolder,
    sheet: Annotated[Path | None, opt.output_file("PNG to write, with samples.")] = None,
    html: Annotated[Path | None, opt.output_file("HTML page to write, one file.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Print counts of the shards in FOLDER; --sheet and --html show samples."""
    from refine_control.photos.inspect import contact_sheet, inspect, write_page

    show(inspect(folder), as_json)
    if sheet is not None:
        contact_sheet(folder, sheet)
    if html is not None:
        write_page(folder, html)


@data_app.command("scenes")
@interruptible()
def data_scenes(
    out: Annotated[Path, opt.output("BUILD")],
    labeled: Annotated[int, opt.number("Number of complete scenes.", 0)] = 1000,
    unlabeled: Annotated[int, opt.number("Number of scenes without the masked pixels.", 0)] = 4000,
    test: Annotated[int, opt.number("Number of test scenes.", 0)] = 200,
    condition: opt.Condition = "inpaint",
    seed: opt.Seed = 0,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Render synthetic scenes as shards of the three roles under OUT."""
    counts = {"labeled": labeled, "unlabeled": unlabeled, "test": test, "seed": seed}
    if dry_run:
        return show({"verb": "data scenes", "out": out, **counts, "condition": condition}, as_json)
    from refine_control.miniature.scene_shards import build_scenes

    show(build_scenes(out, **counts, condition=condition, progress=progress_bar("scenes")), as_json)


@interruptible()
def cache(
    shards: opt.InFolder,
    out: Annotated[Path, opt.output("CACHE")],
    model: opt.Model = "mini",
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Number type of stored arrays.")] = "fp32",
    prompts: Annotated[
        Literal["full", "int8", "none"],
        typer.Option(
            help="Embeddings in --dtype; in 8 bits with scales; or none, for training with data.prompts=encode."
        ),
    ] = "full",
    teacher: Annotated[
        str | None, typer.Option(help="ControlNet that the cache is for, a folder or hub id; default: the model's own.")
    ] = None,
    posterior: Annotated[
        Literal["mean", "mean_std"],
        typer.Option(help="Posterior of the VAE: mean, or mean_std, from which training draws its latents."),
    ] = "mean",
    complete: Annotated[
        int, opt.number("Denoising steps of the teacher's completions; 0: no completions.", 0, 1000)
    ] = 0,
    guidance: Annotated[float, opt.number("Guidance scale of the completions; 1 disables guidance.", 0, 100)] = 1.0,
    path: Annotated[
        int, opt.number("Noise levels of each completion's path to keep, a divisor of --complete; 0: none.", 0, 1000)
    ] = 0,
    precision: Annotated[
        opt.Precision, typer.Option(help="Precision of transformer and teacher in --complete; the rest is fp32.")
    ] = "fp32",
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Encode SHARDS into the cache OUT: latents, prompt embeddings and, with --complete, the teacher's completions."""
    options: dict[str, Any] = {"model": model, "dtype": dtype, "prompts": prompts, "complete": complete}
    options |= {"guidance": guidance, "posterior": posterior, "teacher": teacher, "path": path, "precision": precision}
    if dry_run:
        return show({"verb": "cache", "shards": shards, "out": out, **options}, as_json)
    from refine_control.cache.building import cache_folder

    note = partial(typer.echo, err=True)
    written = cache_folder(shards, out, progress=progress_bar("cache"), note=note, **options)
    show({"cache": out, "made": written}, as_json)
