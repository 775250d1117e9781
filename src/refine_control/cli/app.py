"""The command line: thin verbs that import heavy libraries when they run, so that `--help` is fast."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from refine_control.cli import options as opt
from refine_control.cli.data import cache, data_app
from refine_control.cli.evaluation import bench_app, cost, evaluate, plan, reproduce, trim
from refine_control.cli.export import export
from refine_control.cli.inpaint import inpaint
from refine_control.cli.output import note, paired, progress_bar, show
from refine_control.cli.push import push
from refine_control.cli.serve import serve
from refine_control.errors import InvalidInputError, MissingError
from refine_control.signals import interruptible
from refine_control.threads import set_up

_MAIN = "import sys; from refine_control.cli.app import main; sys.exit(main())"
"""What each of several processes runs, with the arguments after it."""

app = opt.make_app(help="Distil large ControlNets into small ones and measure the loss of quality.")
mini_app = opt.make_app(help="The miniature SD3 that ships with the package.")
app.add_typer(data_app, name="data")
app.add_typer(mini_app, name="mini")
app.add_typer(bench_app, name="bench")


@app.command()
@interruptible()
def demo(
    out: Annotated[Path, opt.output_option("Folder of the report.", "EVALUATION")] = Path("runs/demo"),
    seed: opt.Seed = 0,
    budget: Annotated[str, typer.Option(help="A row of recipes/mini/budgets.yaml: demo or long.")] = "demo",
    steps: Annotated[int | None, opt.number("Number of training steps; default: the budget's.", 2)] = None,
    as_json: opt.Json = False,
    dry_run: opt.DryRun = False,
) -> None:
    """Distil the mini ControlNet into half its size, evaluate it and write a report: minutes on a CPU, offline."""
    if dry_run:
        return show({"verb": "demo", "out": out, "seed": seed, "budget": budget, "steps": steps}, as_json)
    from refine_control.study.demo import run_demo

    report = run_demo(out, seed=seed, budget=budget, steps=steps, bar=progress_bar, say=note)
    show(report.summary if as_json else report.text, as_json)


@app.command()
@interruptible()
def train(
    recipe: Annotated[str, typer.Argument(help="A packaged name such as mini/ours_stage1, or a .yaml file.")],
    overrides: opt.Overrides = None,
    run_dir: Annotated[Path | None, opt.output_option("Folder of the run; default: runs/<name>.", "RUN")] = None,
    nproc: Annotated[int, opt.number("Processes on this machine, each with a GPU of its own where there are.", 1)] = 1,
    nodes: Annotated[int, opt.number("Machines that train together, each with --nproc processes.", 1)] = 1,
    node_rank: Annotated[int, opt.number("Which of them this is.", 0)] = 0,
    master: Annotated[str | None, typer.Option(help="HOST:PORT of machine 0, a free port, for all machines.")] = None,
    patience: Annotated[
        float, opt.number("Seconds without progress of one process after which all end, to be continued.", 1)
    ] = 25,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Train a student by RECIPE. The same command continues an interrupted run and leaves a finished one as it is."""
    from refine_control.config import resolved_yaml
    from refine_control.recipe_files import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if dry_run:
        return show(resolved, as_json) if as_json else print(resolved_yaml(resolved), end="")
    if nproc > 1 or nodes > 1 or node_rank or master:
        from refine_control.training.launch import Nodes, launch, refuse_nested

        refuse_nested()
        folder = run_dir or Path("runs") / resolved.name
        settings = [argument for each in overrides or [] for argument in ("--set", each)]
        again = ["train", recipe, *settings, "--run-dir", str(folder), "--patience", str(patience)]
        again += ["--json"] if as_json else []
        raise typer.Exit(launch(nproc, ["-c", _MAIN, *again], Nodes(nodes, node_rank, master)))
    from refine_control.training.watch import watched

    folder = run_dir or Path("runs") / resolved.name
    opt.output_folder("RUN")(folder)
    with watched(patience):
        from refine_control.training.run import train as run  # the longest part of a start

        result = run(resolved, folder, progress_bar("train"))
    show(result, as_json)


app.command()(inpaint)


@app.command()
@interruptible("nothing is written")
def generate(
    control: Annotated[
        list[str],
        typer.Option(
            help="CONTROLNET=PICTURE: a folder, a hub id, canny or lowres, and a photograph; may be repeated, and the "
            "ControlNets then paint together."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Prompt for the whole image.")],
    out: Annotated[Path, opt.output_file("PNG to write.")],
    conditions: opt.Kinds = None,
    prepared: opt.Prepared = False,
    preparer: opt.Preparer = None,
    model: opt.Model = "mini",
    size: Annotated[int | None, opt.number("Side of the image in pixels; default: the model's own.", 16)] = None,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    scale: opt.Scales = None,
    sigmas: opt.Sigmas = None,
    injection: opt.Injection = "exact",
    seed: opt.Seed = 0,
    dry_run: opt.DryRun = False,
) -> None:
    """Paint an image by ControlNets without a mask: edges, low resolution, depth, poses, edits.

    A condition picture is made of the photograph where the ControlNet's condition says how, as for canny, lowres and
    blur; depth maps and poses are given. The first ControlNet's card says how many steps and how much guidance."""
    from refine_control.pipeline.pictures import A_PICTURE_EACH, check_ending, check_files, check_prompt
    from refine_control.pipeline.together import check_conditions

    controls = paired(control, "--control", opt.CONTROL)
    others = {"sigmas": sigmas, "seed": seed, "injection": injection}
    sampler = opt.sampling(model, controls[0][0], steps, guidance, None, **others)
    pairs = [(name, Path(picture)) for name, picture in controls]
    check_files([picture for _, picture in pairs], A_PICTURE_EACH)
    check_prompt(prompt, "the picture")
    check_ending(out)
    options = {"model": model, "scales": scale or [], "size": size, "prepared": prepared, "preparer": preparer}
    options["conditions"] = conditions or []
    check_conditions(options["conditions"], len(pairs))
    if dry_run:
        shown = sampler.model_dump(exclude={"conditioning_scale"})
        return show({"controls": pairs, "prompt": prompt, "out": out, **options, **shown}, as_json=False)
    from refine_control.pipeline.files import generate_file

    print(generate_file(pairs, prompt, out, sampler=sampler, **options))


@mini_app.command("train")
@interruptible()
def mini_train(
    source: Annotated[Path | None, opt.folder("Bundle to start from.", "--from")] = None,
    out: Annotated[Path, opt.output_option("Output; the bundle is OUT/bundle.", "TRAINED_MODEL")] = Path("runs/mini"),
    seed: opt.Seed = 0,
    stage: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME=STEPS; may be repeated; default: all stages.")
    ] = None,
    world: Annotated[Literal["scenes", "photos"], typer.Option(help="Training images.")] = "scenes",
    photos: opt.SmallPhotos = None,
    condition: opt.Condition = "inpaint",
    check: Annotated[int, opt.number("Number of images to evaluate the result on; 0: none.", 0)] = 1000,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Train the mini bundle from scratch or from another bundle, and report cost and quality.

    With --condition train the teacher of that condition alone, OUT/controlnet, on a bundle that stays as it is."""
    from refine_control.miniature.stages import condition_stage, named_stages

    if (world == "photos") != (photos is not None):
        raise InvalidInputError("--world photos needs --photos FOLDER, and --photos needs --world photos")
    if condition != "inpaint":
        if photos is not None:
            raise InvalidInputError("the teacher of a condition is trained on scenes; leave --world and --photos out")
        chosen = condition_stage(stage or [])
        if dry_run:
            planned = {"verb": "mini train", "condition": condition, "from": source, "out": out, "seed": seed}
            return show({**planned, "stages": {"condition": chosen}}, as_json)
        from refine_control.miniature.condition_teacher import train_condition_teacher

        given = {"stage": chosen, "start": source, "count": check, "progress": progress_bar("mini train")}
        return show(train_condition_teacher(condition, out, seed, **given), as_json)
    stages = named_stages(stage or [])
    if dry_run:
        planned = {"verb": "mini train", "world": world, "from": source, "out": out, "seed": seed, "stages": stages}
        return show(planned, as_json)
    from refine_control.miniature.bundle import make_bundle
    from refine_control.miniature.worlds import PhotoWorld, SceneWorld

    bar = progress_bar("mini train")
    trained_on = PhotoWorld(photos, bar) if photos else SceneWorld()
    show(make_bundle(out, seed, start=source, stages=stages, count=check, world=trained_on, progress=bar), as_json)


@mini_app.command("check")
@interruptible("nothing is written")
def mini_check(
    n: Annotated[int, typer.Option("--n", min=2, help="Number of scenes to inpaint.")] = 200,
    bundle: Annotated[Path | None, opt.folder("Bundle to check; default: the shipped one.")] = None,
    photos: Annotated[Path | None, opt.folder("Folder of JPEGs to test the VAE on.")] = None,
    precision: Annotated[opt.Precision, typer.Option(help="Precision of the teacher.")] = "fp32",
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
) -> None:
    """Measure whether the mini teacher follows its prompt, and is at chance level with an empty or a wrong one."""
    from refine_control.miniature.check import check_bundle

    show(check_bundle(n, seed=seed, bundle=bundle, precision=precision, photos=photos), as_json)


@mini_app.command("edge")
@interruptible()
def mini_edge(
    student: opt.InFolder,
    out: Annotated[Path, opt.output("STUDENT")],
    check: Annotated[int, opt.number("Number of scenes to evaluate it on.", 2)] = 1000,
    seed: opt.Seed = 0,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Publish a student for few steps in fp16, with its measured quality beside the teacher's."""
    if dry_run:
        return show({"verb": "mini edge", "student": student, "out": out, "check": check, "seed": seed}, as_json)
    from refine_control.miniature.edge import publish_edge

    show(publish_edge(student, out, check, seed, progress_bar("mini edge")), as_json)


@app.command()
def doctor(as_json: opt.Json = False) -> None:
    """List what this machine has and lacks; exit code 69 if something required is missing."""
    from refine_control.cli.doctor import diagnose

    checks = diagnose()
    show(checks if as_json else "\n".join(f"{c.state:8}{c.name:18}{c.detail}" for c in checks), as_json)
    if missing := [check.name for check in checks if check.state == "missing"]:
        raise MissingError(
            f"required and missing or broken: {', '.join(missing)}; the lines above say how to repair it"
        )


for verb in (cache, evaluate, reproduce, cost, plan, trim, export, push, serve):
    app.command()(verb)


def main() -> int:
    """Runs the command line. An error that a user can correct is a message on stderr and an exit code."""
    # transformers advises at import to install torchvision, which would break it beside a CPU build of torch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # diffusers warns at every change of type and every cut prompt; the verbs warn about what matters.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    set_up()
    try:
        app(prog_name="refine-control")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from refine_control.cli.doctor import user_error

        refusal = user_error(error)
        if refusal is None:
            raise
        print(f"refine-control: {refusal}", file=sys.stderr)
        return refusal.exit_code
    finally:
        if "refine_control.training.loop" in sys.modules:
            from refine_control.training.loop import leave_process_group

            leave_process_group()
    return 0
