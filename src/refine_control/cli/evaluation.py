"""The verbs `evaluate`, `reproduce`, `cost` and `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from refine_control.cli.options import (
    DryRun,
    Guidance,
    Injection,
    Json,
    MetricWeights,
    Model,
    Scale,
    Seed,
    SmallPhotos,
    Steps,
    make_app,
    output_folder,
    sampling,
)
from refine_control.cli.output import named_folders, named_sources, progress_bar, show
from refine_control.signals import interruptible

bench_app = make_app(help="Benchmarks of this machine.")


@interruptible("nothing is written")
def evaluate(
    student: Annotated[list[str], typer.Option(help="NAME=FOLDER; may be repeated.")],
    test: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Shards of test samples.")],
    out: Annotated[
        Path, typer.Option(callback=output_folder("EVALUATION", "RUN"), help="Folder of tables and report.")
    ],
    teacher: Annotated[str | None, typer.Option(help="Hub id or folder; default: the model's own.")] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER, or dreamshaper8, sd2, flux; may be repeated.")
    ] = None,
    model: Model = "mini",
    steps: Steps = None,
    guidance: Guidance = None,
    scale: Scale = None,
    injection: Injection = "exact",
    seed: Seed = 0,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Precision of the denoisers.")] = "fp32",
    weights: MetricWeights = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare teacher and students on the same test samples: metrics with intervals, cost, tables, images."""
    students = named_folders(student, "--student")
    baselines = named_sources(baseline or [], "--baseline", students)
    sampler = sampling(model, steps, guidance, scale, seed=seed, injection=injection, precision=precision)
    if dry_run:
        named = {"teacher": teacher, "students": students, "baselines": baselines}
        return show({**named, "test": test, "out": out, **sampler.model_dump()}, as_json)
    from refine_control.study.evaluate import evaluate as run

    bar = progress_bar("evaluate")
    report = run(model, teacher, students, test, out, sampler, baselines=baselines, weights=weights, progress=bar)
    show(report.summary if as_json else report.text, as_json)


@interruptible("finished rows are kept")
def reproduce(
    target: Annotated[
        Literal[
            "table1",
            "table2",
            "table3",
            "figure2",
            "figure3",
            "layers",
            "split",
            "init",
            "losses",
            "data",
            "prompts",
            "scarce",
            "parts",
            "all",
        ],
        typer.Argument(help="A table or figure of the paper, an ablation, or all: Tables 1 and 3 and Figure 2."),
    ],
    scale: Annotated[
        Literal["mini", "sd3"], typer.Option(help="Recipes and rows of the mini model or of SD3.")
    ] = "mini",
    budget: Annotated[
        str | None,
        typer.Option(
            help="A row of the scale's budgets.yaml: tables, photos, folder, long, demo; paper, short for sd3."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number N of training seeds, 0 to N - 1; default: the budget's.")
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this row, the teacher, the row of --against and, where anything is trained, fc; may be repeated."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Row that the others are compared with; default: that of the scale or study.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=output_folder("REPRODUCTION"),
            help="Folder of runs, tables and report; default: such as runs/reproduce/mini/tables.",
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            callback=output_folder(), help="Folder of finished rows, read and written; default: such as results/mini."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Another model: a bundle trained on photographs, a folder or a hub id.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Another teacher: a folder or a hub id.")] = None,
    photos: SmallPhotos = None,
    data: Annotated[
        Path | None, typer.Option(help="Output of `data build` in place of rendered scenes; required for sd3.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Rows computed in parallel, which share the cores.")] = 1,
    weights: MetricWeights = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train and evaluate the missing rows of a table or figure, and write it with intervals."""
    from refine_control.study.materials import Comparison, results_name
    from refine_control.study.plan import read_budget
    from refine_control.study.reproduce import plan
    from refine_control.study.reproduce import reproduce as run

    usual = "paper" if scale == "sd3" else "photos" if photos else "folder" if data else "tables"
    name = budget or usual
    material = {"model": model, "teacher": teacher, "photos": photos, "data": data, "weights": weights}
    kept = Path(results_name(scale, photos, data)) / name
    comparison = Comparison(read_budget(name, scale=scale), out or "runs/reproduce" / kept, scale, **material)
    comparison.check()
    rows, chosen = row or (), list(range(seeds)) if seeds else comparison.budget.train_seeds
    folder = results / name if results else "results" / kept
    if dry_run:
        return show(plan(target, comparison, chosen, rows, folder, against), as_json)
    how: dict[str, Any] = {"results": folder, "bar": progress_bar, "workers": workers}
    report = run(target, comparison, seeds=chosen, rows=rows, against=against, **how)
    show(report.summary if as_json else f"{report.text}\n\nin {report.folder}", as_json)


@interruptible("nothing is written")
def cost(
    controlnet: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER; may be repeated.")] = None,
    model: Model = "mini",
    teacher: Annotated[str | None, typer.Option(help="Hub id or folder; default: the model's own.")] = None,
    as_json: Json = False,
) -> None:
    """Print parameters, operations and time of a denoising step with each ControlNet, the teacher first."""
    from refine_control.study.model_cost import compare

    show(compare(model, named_folders(controlnet or [], "--controlnet"), teacher), as_json)


@bench_app.command("data")
@interruptible("nothing is written")
def bench_data(
    source: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of photos; default: rendered ones.")
    ] = None,
    photos: Annotated[int, typer.Option(min=2, help="Number of photos.")] = 200,
    many: Annotated[
        int, typer.Option(min=0, help="Number of photos of the memory measurement besides 1,000 and 8,000; 0: none.")
    ] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 3,
    as_json: Json = False,
) -> None:
    """Time build, cache and batches against the unavoidable work alone."""
    from refine_control.bench.data import bench_data as run

    show(run(source, photos, many, repeats)._asdict(), as_json)


@bench_app.command("step")
@interruptible("nothing is written")
def bench_step(
    recipe: Annotated[str, typer.Argument(help="A packaged name or a .yaml file.")] = "mini/ours_stage1",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed steps.")] = 5,
    as_json: Json = False,
) -> None:
    """Print time, memory and operations of one training step."""
    from refine_control.bench.step import bench_step as run
    from refine_control.recipe_files import load_recipe

    show(run(load_recipe(recipe, overrides or []), repeats=repeats), as_json)


@bench_app.command("features")
@interruptible("nothing is written")
def bench_features(
    pictures: Annotated[int, typer.Option(min=1, help="Number of images of random noise.")] = 64,
    size: Annotated[int, typer.Option(min=31, help="Side of an image in pixels.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 3,
    clip_pictures: Annotated[
        int, typer.Option(min=0, help="Number of images for CLIP, seconds each on a CPU; 0: none.")
    ] = 0,
    set_size: Annotated[
        int, typer.Option(min=0, help="Set size N: distances at N, 2 N and 4 N (2 or more); 0: none.")
    ] = 500,
    resamples: Annotated[int, typer.Option(min=2, help="Number of resampled sets.")] = 200,
    as_json: Json = False,
) -> None:
    """Time the networks of FID, LPIPS and CMMD against the networks alone, and set distances as N grows."""
    from refine_control.bench.features import bench_features as run

    report = run(pictures, size, repeats, clip_pictures=clip_pictures, set_size=set_size, resamples=resamples)
    show(report._asdict(), as_json)


@bench_app.command("threads")
@interruptible("nothing is written")
def bench_threads(
    recipe: Annotated[str, typer.Argument(help="A packaged name or a .yaml file.")] = "mini/balanced_stage1",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time of each of the eight measurements.")] = 15,
    as_json: Json = False,
) -> None:
    """Time a training step alone and beside a second training, by how torch's threads wait for each other."""
    from refine_control.bench.threads import bench_threads as run
    from refine_control.recipe_files import load_recipe

    result = run(load_recipe(recipe, overrides or []), repeats=repeats, seconds=seconds)
    show(result if as_json else result.text, as_json)
