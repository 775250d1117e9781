"""The command line: thin verbs whose heavy imports are inside, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from refine_control.cli.data import cache, data_app
from refine_control.cli.evaluation import bench_app, cost, evaluate, reproduce
from refine_control.cli.options import (
    DryRun,
    Guidance,
    InFile,
    Injection,
    Json,
    Model,
    Scale,
    Seed,
    SmallPhotos,
    Steps,
    make_app,
    sampling,
)
from refine_control.cli.output import progress_bar, show
from refine_control.errors import InvalidInputError, MissingError
from refine_control.signals import interruptible
from refine_control.threads import set_up

app = make_app(help="Make big ControlNets small, and prove what was lost.")
mini_app = make_app(help="The miniature SD3 that ships with the package.")
app.add_typer(data_app, name="data")
app.add_typer(mini_app, name="mini")
app.add_typer(bench_app, name="bench")


@app.command()
@interruptible()
def demo(
    out: Annotated[Path, typer.Option(help="Where the report lands.")] = Path("runs/demo"),
    seed: Seed = 0,
    budget: Annotated[str, typer.Option(help="A row of recipes/mini/budgets.yaml: demo or long.")] = "demo",
    steps: Annotated[int | None, typer.Option(min=2, help="Training steps, to make it shorter or longer.")] = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Make the mini ControlNet half as big, measure what was lost, write a report: minutes on a CPU, offline."""
    if dry_run:
        return show({"verb": "demo", "out": out, "seed": seed, "budget": budget, "steps": steps}, as_json)
    from refine_control.study.demo import run_demo

    made = run_demo(out, seed=seed, budget=budget, steps=steps, bar=progress_bar)
    show(made.summary if as_json else made.text, as_json)


@app.command()
@interruptible()
def train(
    recipe: Annotated[str, typer.Argument(help="A packaged name such as mini/ours_stage1, or a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, as often as needed.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run lives; runs/<name> by default.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train by RECIPE; the same command again continues, or does nothing when it is done."""
    from refine_control.config import resolved_yaml
    from refine_control.recipe_files import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if dry_run:
        return show(resolved, as_json) if as_json else print(resolved_yaml(resolved), end="")
    from refine_control.training.run import train as run

    show(run(resolved, run_dir or Path("runs") / resolved.name, progress_bar("train")), as_json)


@app.command()
def inpaint(
    image: Annotated[Path, InFile],
    mask: Annotated[Path, InFile],
    prompt: Annotated[str, typer.Option(help="What shall stand under the mask.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    model: Model = "mini",
    controlnet: Annotated[str | None, typer.Option(help="Hub id or folder; the model's own by default.")] = None,
    size: Annotated[int | None, typer.Option(min=16, help="Side in pixels; the model's own by default.")] = None,
    composite: Annotated[bool, typer.Option("--composite", help="Put the kept pixels back.")] = False,
    steps: Steps = None,
    guidance: Guidance = None,
    scale: Scale = None,
    injection: Injection = "exact",
    seed: Seed = 0,
    dry_run: DryRun = False,
) -> None:
    """Repaint the white of the mask in one image."""
    sampler = sampling(model, steps, guidance, scale, seed=seed, injection=injection)
    options: dict[str, Any] = {"model": model, "controlnet": controlnet, "size": size, "composite": composite}
    if dry_run:
        plan = {"image": image, "mask": mask, "prompt": prompt, "out": out, **options, **sampler.model_dump()}
        return show(plan, as_json=False)
    from refine_control.pipeline.files import inpaint_file

    print(inpaint_file(image, mask, prompt, out, sampler=sampler, **options))


@mini_app.command("train")
@interruptible()
def mini_train(
    source: Annotated[Path | None, typer.Option("--from", exists=True, file_okay=False, help="Start here.")] = None,
    out: Annotated[Path, typer.Option(help="The bundle lands in OUT/bundle.")] = Path("runs/mini"),
    seed: Seed = 0,
    stage: Annotated[list[str] | None, typer.Option(help="NAME or NAME=STEPS; all stages by default.")] = None,
    world: Annotated[Literal["scenes", "photos"], typer.Option(help="What it is trained on.")] = "scenes",
    photos: SmallPhotos = None,
    check: Annotated[int, typer.Option(min=0, help="Pictures to measure the result on; 0: none.")] = 1000,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make the mini bundle again from nothing, or go on from a bundle, and say what it took and what it can do."""
    from refine_control.miniature.stages import named_stages

    stages = named_stages(stage or [])
    if (world == "photos") != (photos is not None):
        raise InvalidInputError("--world photos needs --photos FOLDER, and --photos needs --world photos")
    if dry_run:
        planned = {"verb": "mini train", "world": world, "from": source, "out": out, "seed": seed, "stages": stages}
        return show(planned, as_json)
    from refine_control.miniature.bundle import make_bundle
    from refine_control.miniature.worlds import PhotoWorld, SceneWorld

    bar = progress_bar("mini train")
    trained_on = PhotoWorld(photos, bar) if photos else SceneWorld()
    show(make_bundle(out, seed, start=source, stages=stages, count=check, world=trained_on, progress=bar), as_json)


@mini_app.command("check")
def mini_check(
    n: Annotated[int, typer.Option("--n", min=2, help="Scenes to repaint.")] = 200,
    bundle: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="The shipped one by default.")
    ] = None,
    photos: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="JPEGs to try the VAE on.")] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic of the teacher.")] = "fp32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Does the mini teacher obey its prompt, and is it at chance with an empty or a wrong one?"""
    from refine_control.miniature.check import check_bundle

    show(check_bundle(n, seed=seed, bundle=bundle, precision=precision, photos=photos), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has and lacks; exit code 69 if something needed is missing."""
    from refine_control.cli.doctor import diagnose

    checks = diagnose()
    show(checks if as_json else "\n".join(f"{c.state:8}{c.name:18}{c.detail}" for c in checks), as_json)
    if missing := [check.name for check in checks if check.state == "missing"]:
        raise MissingError(f"needed and missing or broken: {', '.join(missing)}; the lines above say how to mend it")


for verb in (cache, evaluate, interruptible()(reproduce), cost):
    app.command()(verb)


def main() -> int:
    """Runs the command line; an error that a person can mend is one message on stderr and its exit code."""
    # transformers advises at import to install torchvision, which would break it beside a CPU torch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # diffusers warns at every change of type and every cut prompt; what matters is said by our own verbs.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    set_up()
    try:
        app(prog_name="refine-control")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from refine_control.cli.doctor import mendable

        refusal = mendable(error)
        if refusal is None:
            raise
        print(f"refine-control: {refusal}", file=sys.stderr)
        return refusal.exit_code
    finally:
        if "refine_control.training.loop" in sys.modules:
            from refine_control.training.loop import leave_process_group

            leave_process_group()
    return 0
