"""The verbs `evaluate`, `reproduce`, `cost`, `plan`, `trim` and `bench`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from refine_control.cli import options as opt
from refine_control.cli.output import named_folders, named_sources, progress_bar, show
from refine_control.errors import InvalidInputError
from refine_control.signals import interruptible

if TYPE_CHECKING:
    from refine_control.metrics.cost import Spread

bench_app = opt.make_app(help="Benchmarks of this machine.")
Figure = Literal["table1", "table2", "table3", "figure2", "figure3"]
Ablation = Literal[
    "layers",
    "split",
    "init",
    "losses",
    "data",
    "prompts",
    "scarce",
    "parts",
    "steps",
    "codi",
    "pairs",
    "orders",
    "placement",
    "conditions",
]


@interruptible("nothing is written")
def evaluate(
    student: Annotated[list[str], opt.Named],
    test: Annotated[Path, opt.folder("Shards of test samples.")],
    out: Annotated[Path, opt.output_option("Folder of tables and report.", "EVALUATION", "RUN")],
    teacher: opt.Network = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER, or dreamshaper8, sd2, flux; may be repeated.")
    ] = None,
    model: opt.Model = "mini",
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    scale: opt.Scale = None,
    sigmas: opt.Sigmas = None,
    injection: opt.Injection = "exact",
    seed: opt.Seed = 0,
    precision: Annotated[opt.Precision, typer.Option(help="Precision of the denoisers.")] = "fp32",
    weights: opt.MetricWeights = None,
    noise_seeds: Annotated[
        int, opt.number("Number of noise seeds to compare the images of a scene by; 0: none.", 0, 64)
    ] = 0,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Compare teacher and students on the same test samples: metrics with intervals, cost, tables, images."""
    students = named_folders(student, "--student")
    baselines = named_sources(baseline or [], "--baseline", students)
    others = {"sigmas": sigmas, "seed": seed, "injection": injection, "precision": precision}
    samplers = {
        name: opt.sampling(model, controlnet, steps, guidance, scale, **others)
        for name, controlnet in {"teacher": teacher, **students}.items()
    }
    if noise_seeds == 1:
        raise InvalidInputError("--noise-seeds 1: one seed has nothing to differ from; give 2 or more, or 0 for none")
    if dry_run:
        named = {"teacher": teacher, "students": students, "baselines": baselines}
        shared = samplers.pop("teacher")
        different = {name: each for name, each in samplers.items() if each != shared}
        differing = {"samplers": different} if different else {}
        return show({**named, "test": test, "out": out, **shared.model_dump(), **differing}, as_json)
    from refine_control.study.evaluate import evaluate as run

    more = {"baselines": baselines, "weights": weights, "noise_seeds": noise_seeds}
    report = run(model, teacher, students, test, out, samplers, progress=progress_bar("evaluate"), **more)
    show(report.summary if as_json else report.text, as_json)


@interruptible("finished rows are kept")
def reproduce(
    target: Annotated[
        Literal[Figure, Ablation, "all"],
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
    seeds: Annotated[int | None, opt.number("Number N of training seeds, 0 to N - 1; default: the budget's.")] = None,
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
        opt.output_option("Runs, tables and report; default: such as runs/reproduce/mini/tables.", "REPRODUCTION"),
    ] = None,
    results: Annotated[Path | None, opt.output_option("Finished rows, read and written; such as results/mini.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Another model: a bundle trained on photographs, a folder or a hub id.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Another teacher: a folder or a hub id.")] = None,
    photos: opt.SmallPhotos = None,
    data: Annotated[
        Path | None, typer.Option(help="Output of `data build` in place of rendered scenes; required for sd3.")
    ] = None,
    workers: Annotated[int, opt.number("Rows computed in parallel, which share the cores.")] = 1,
    weights: opt.MetricWeights = None,
    condition: opt.Condition = "inpaint",
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Train and evaluate the missing rows of a table or figure, and write it with intervals."""
    from refine_control.study import reproduce as study
    from refine_control.study.materials import Comparison, budget_folder, results_name
    from refine_control.study.plan import TARGETS, read_budget

    usual = "paper" if scale == "sd3" else "photos" if photos else "folder" if data else TARGETS[target].budget
    inside = budget_folder(budget or usual, condition)
    kept = results_name(scale, photos, data) / inside
    out, folder = out or "runs/reproduce" / kept, results / inside if results else "results" / kept
    numbers = read_budget(inside.parts[0], scale=scale)
    comparison = Comparison(numbers, out, scale, model, teacher, photos, data, weights, condition).check()
    rows, chosen = row or (), list(range(seeds)) if seeds else numbers.train_seeds
    if dry_run:
        return show(study.plan(target, comparison, chosen, rows, folder, against), as_json)
    asked = {"seeds": chosen, "rows": rows, "against": against, "workers": workers}
    report = study.reproduce(target, comparison, results=folder, bar=progress_bar, **asked)
    show(report.summary if as_json else f"{report.text}\n\nin {report.folder}", as_json)


@interruptible("nothing is written")
def cost(
    controlnet: Annotated[list[str] | None, opt.Named] = None,
    model: opt.Model = "mini",
    teacher: opt.Network = None,
    as_json: opt.Json = False,
) -> None:
    """Print parameters, operations and time of a denoising step with each ControlNet, the teacher first."""
    from refine_control.study.model_cost import compare

    show(compare(model, named_folders(controlnet or [], "--controlnet"), teacher), as_json)


@interruptible("nothing is written")
def plan(
    recipe: Annotated[list[str], typer.Argument(help="Packaged names or .yaml files, in the order of training.")],
    machine: Annotated[
        str, typer.Option(help="this, or a known device, with a count as in 8xH100; an unknown name lists them.")
    ] = "this",
    overrides: opt.Overrides = None,
    chain: Annotated[bool, typer.Option("--chain", help="Plan data, caches and evaluation too.")] = False,
    size: Annotated[int | None, opt.number("Side of the images in pixels; default: the model's own.", 16)] = None,
    samples: Annotated[
        int, opt.number("Samples of both data sets; trainings keep their recipe's steps without --epochs.", 2)
    ] = 260_000,
    epochs: Annotated[
        float | None, opt.number("Passes of each training over its samples; default: the recipe's steps.", 0.001)
    ] = None,
    pairs: Annotated[int, opt.number("Samples with the teacher's guided paths, for few steps.")] = 20_000,
    test: Annotated[int, opt.number("Test samples of the evaluation.")] = 1000,
    price: Annotated[float, opt.number("Price of one device for an hour.", 0, 1_000_000)] = 0.0,
    efficiency: Annotated[
        float | None,
        opt.number("Share of the product rate that a step reaches; default: 0.4, or measured.", 0.001, 1),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSON of `bench step` with that share.")
    ] = None,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Print time, memory, disk and money of a training, by arithmetic; exit code 2 where it does not fit."""
    from refine_control.bench.bill import Ask
    from refine_control.bench.bill import plan as run
    from refine_control.bench.machines import named_machine
    from refine_control.recipe_files import load_recipe

    recipes = [load_recipe(each, overrides or []) for each in recipe]
    ask = Ask(machine, size, samples, pairs, test, price, efficiency, measured, chain, epochs)
    if dry_run:
        if machine != "this":
            named_machine(machine)
        return show({"recipes": [each.name for each in recipes], **ask._asdict()}, as_json)
    bill = run(recipes, ask)
    show(bill if as_json else bill.text, as_json)
    if bill.problems:
        raise typer.Exit(2)


@interruptible("nothing is written")
def trim(
    controlnet: Annotated[str, typer.Argument(help="Folder or hub id of an SD3 or FLUX ControlNet.")],
    out: Annotated[Path | None, opt.output_option("Folder of the ControlNet without these layers.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model that it is for, a folder or hub id; default: FLUX.1 or SD3 as published.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """List the layers of a ControlNet that stock diffusers never reads, and cut them without loss where it can be."""
    from refine_control.models.trim import trim as run

    result = run(controlnet, model, out)
    show(result if as_json else result.text, as_json)


def _draw(file: Path | None, title: str, bars: Mapping[str, Spread]) -> None:
    from refine_control.bench.bars import draw_bars

    if file is not None:
        draw_bars(file, title, bars)


@bench_app.command("data")
@interruptible("nothing is written")
def bench_data(
    source: Annotated[Path | None, opt.folder("Folder of photos; default: rendered ones.")] = None,
    photos: Annotated[int, opt.number("Number of photos.", 2)] = 200,
    many: Annotated[
        int, opt.number("Number of photos of the memory measurement besides 1,000 and 8,000; 0: none.", 0)
    ] = 0,
    cached: Annotated[int, opt.number("Number of samples of a cache to read for one epoch; 0: none.", 0)] = 0,
    repeats: opt.Rounds = 3,
    as_json: opt.Json = False,
) -> None:
    """Time build, cache and batches against the unavoidable work alone."""
    from refine_control.bench.data import bench_data as run

    show(run(source, photos, many, repeats, cached=cached)._asdict(), as_json)


@bench_app.command("step")
@interruptible("nothing is written")
def bench_step(
    recipe: opt.Recipe = "mini/ours_stage1",
    overrides: opt.Overrides = None,
    repeats: Annotated[int, opt.number("Number of timed steps.")] = 5,
    plot: opt.Bars = None,
    as_json: opt.Json = False,
) -> None:
    """Time the training step of any recipe against a plain loop and diffusers' script, with equal losses."""
    from refine_control.bench.step import bench_step as run
    from refine_control.recipe_files import load_recipe

    result = run(load_recipe(recipe, overrides or []), repeats=repeats)
    _draw(plot, f"{result.recipe} on {result.device}, seconds a step", result.seconds)
    show(result if as_json else result.text, as_json)


@bench_app.command("gpu")
@interruptible("what is measured is kept")
def bench_gpu(
    recipe: opt.Recipe = "sd3/balanced_stage1",
    overrides: opt.Overrides = None,
    out: Annotated[Path, opt.output_option("Folder of the results, which the next call continues.")] = Path(
        "runs/bench_gpu"
    ),
    minutes: Annotated[float, opt.number("Time for all of it.", 0)] = 10,
    small: Annotated[
        bool, typer.Option("--small", help="Two samples at once, on a CPU where there is no GPU.")
    ] = False,
    plot: opt.Bars = None,
    as_json: opt.Json = False,
) -> None:
    """Measure all that needs a GPU with random weights: steps, peers, memory, attention, compilation, pictures."""
    from refine_control.bench.gpu import bench_gpu as run
    from refine_control.recipe_files import load_recipe

    chosen, bar = load_recipe(recipe, overrides or []), progress_bar("bench gpu")
    result = run(chosen, out, minutes, small=small, progress=bar)
    measured = {name: each.seconds for name, each in result.outcomes.items() if not each.problem}
    _draw(plot, f"{result.recipe} on {result.device}, seconds of a step or picture", measured)
    show(result if as_json else result.text, as_json)


@bench_app.command("sampling")
@interruptible("nothing is written")
def bench_sampling(
    model: opt.Model = "mini",
    controlnet: Annotated[Path | None, opt.folder("Folder of a student; default: an untrained one.")] = None,
    layers: Annotated[int, opt.number("Layers of the untrained student.")] = 12,
    precision: Annotated[opt.Precision, typer.Option(help="Precision of transformer and ControlNets.")] = "fp32",
    guidance: Annotated[float, opt.number("Guidance scale of the teacher.", 1, 100)] = 3,
    batch: Annotated[list[int] | None, opt.number("Batch size; may be repeated; default: 1 and 8.")] = None,
    repeats: opt.Rounds = 3,
    plot: opt.Bars = None,
    as_json: opt.Json = False,
) -> None:
    """Time whole pictures: teacher and student in the model's usual number of guided steps, the teacher in 4, and a
    student in 4 and 1 unguided ones."""
    from refine_control.bench.sampling import bench_sampling as run

    options: Any = {"layers": layers, "precision": precision, "guidance": guidance, "repeats": repeats}
    result = run(model, controlnet, batches=batch or (1, 8), **options)
    shown = {
        f"{name}, batch {count}": spread
        for count, each in result.batches.items()
        for name, spread in each.seconds.items()
    }
    _draw(plot, f"{model} on {result.device}, seconds a batch", shown)
    show(result if as_json else result.text, as_json)


@bench_app.command("features")
@interruptible("nothing is written")
def bench_features(
    pictures: Annotated[int, opt.number("Number of images of random noise.")] = 64,
    size: Annotated[int, opt.number("Side of an image in pixels.", 31)] = 256,
    repeats: opt.Rounds = 3,
    clip_pictures: Annotated[int, opt.number("Number of images for CLIP, seconds each on a CPU; 0: none.", 0)] = 0,
    set_size: Annotated[int, opt.number("Set size N: distances at N, 2 N and 4 N (2 or more); 0: none.", 0)] = 500,
    resamples: Annotated[int, opt.number("Number of resampled sets.", 2)] = 200,
    as_json: opt.Json = False,
) -> None:
    """Time the networks of FID, LPIPS and CMMD against the networks alone, and set distances as N grows."""
    from refine_control.bench.features import bench_features as run

    report = run(pictures, size, repeats, clip_pictures=clip_pictures, set_size=set_size, resamples=resamples)
    show(report._asdict(), as_json)


@bench_app.command("threads")
@interruptible("nothing is written")
def bench_threads(
    recipe: opt.Recipe = "mini/balanced_stage1",
    overrides: opt.Overrides = None,
    repeats: opt.Rounds = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time of each of the eight measurements.")] = 15,
    as_json: opt.Json = False,
) -> None:
    """Time a training step alone and beside a second training, by how torch's threads wait for each other."""
    from refine_control.bench.threads import bench_threads as run
    from refine_control.recipe_files import load_recipe

    result = run(load_recipe(recipe, overrides or []), repeats=repeats, seconds=seconds)
    show(result if as_json else result.text, as_json)


@bench_app.command("export")
@interruptible("nothing is written")
def bench_export(
    layers: Annotated[int, opt.number("Layers of the ControlNet.")] = 4,
    width: Annotated[int, opt.number("Width, a multiple of 64; 4 layers of 512 have 40 million parameters.", 64)] = 512,
    size: Annotated[int, opt.number("Side of the image in pixels.", 16)] = 512,
    repeats: opt.Rounds = 5,
    as_json: opt.Json = False,
) -> None:
    """Time a random SD3 ControlNet in ONNX Runtime and OpenVINO, fp32 and int8, against PyTorch on one thread."""
    from refine_control.bench.export import bench_export as run

    result = run(layers, width, size, repeats)
    show(result if as_json else result.text, as_json)
