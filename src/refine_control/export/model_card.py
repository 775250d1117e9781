"""The text of a model card: what a student is, what it comes from, what was measured, and how to use it.

Numbers that have no intervals are called so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refine_control.export.card_facts import KNOWN, NOT_STATED, Run, public_name
from refine_control.models.card import diffusers_code
from refine_control.models.families import condition_encoding
from refine_control.pipeline.picture_cost import network_calls
from refine_control.records import INPAINT


def model_card(run: Run) -> str:
    """README.md of a student's repository: front matter with a model-index, and text."""
    from huggingface_hub import ModelCardData

    known = KNOWN.get(run.model or "")
    teacher = public_name(run.recipe.teacher) if run.recipe else None
    tags = ["controlnet", "image-to-image", "refine-control", "distillation", run.condition]
    license: Mapping[str, Any] = known.front_matter if known else {}
    front = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        base_model=[name for name in (run.model, teacher) if name and "/" in name] or None,
        tags=[*tags, *(["stable-diffusion-3"] if run.on_hub else []), *(["few-step"] if run.card else [])],
        model_name=run.repo_id.split("/")[-1],
        eval_results=_results(run) or None,
        **license,
    )
    parts = [_introduction(run), _base(run), _training(run), _metrics(run), _cost(run), _use(run)]
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _results(run: Run) -> list[Any]:
    """The model-index: each metric of this student with its interval, or what its card says it was measured at."""
    from huggingface_hub import EvalResult

    common: dict[str, Any] = {"task_type": "image-to-image", "task_name": run.condition}
    if measured := run.evaluated:
        values = measured.models[measured.name]
        common |= {"dataset_type": "shards", "dataset_name": measured.test, "dataset_revision": measured.test_mark}
        results = []
        for metric in run.shown(values):
            mean, low, high = (round(value, 4) for value in values[metric])
            args = {"interval_95": [low, high], "samples": measured.samples}
            named = {"metric_type": metric, "metric_name": run.headings[metric], "metric_value": mean}
            results.append(EvalResult(**common, **named, metric_args=args))
        return results
    common |= {"dataset_type": "scenes", "dataset_name": "unseen rendered scenes"}
    skill = (run.card and run.card.skill) or {}
    return [
        EvalResult(
            **common,
            metric_type=metric,
            metric_name=f"{run.headings[metric]}, {way}",
            metric_value=round(values[metric], 4),
            metric_config=way,
        )
        for way, values in skill.items()
        if not way.startswith("teacher")
        for metric in run.shown(values)
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _introduction(run: Run) -> str:
    what = "inpainting" if run.condition == INPAINT else f"the condition {run.condition}"
    layers, steps = run.config["num_layers"], run.sampler.num_inference_steps
    text = f"A ControlNet of {layers} layers and {run.num_params:,} parameters for {what}, trained by refine-control."
    if run.evaluated and (teacher := run.evaluated.cost.get("teacher")):
        text += f" Its teacher has {teacher['num_layers']} layers and {teacher['num_params']:,} parameters."
    lines = [
        f"sampling: {steps} step{'s' * (steps > 1)}, guidance scale {run.sampler.guidance_scale:g}, conditioning scale "
        f"{run.sampler.conditioning_scale:g}"
    ]
    if run.card:
        guidance = run.card.distilled_guidance
        lines.append(f"trained for at most {run.card.most_steps} steps")
        lines.append(f"guidance scale {guidance:g} is distilled in" if guidance > 1 else "no guidance is distilled in")
    if run.own_transformer:
        lines.append(f"trained with the transformer in `{run.own_transformer}/`, without which it does not work")
    parts = [f"# {run.repo_id.split('/')[-1]}", text, "\n".join(f"- {line}" for line in lines)]
    if run.evaluated and run.evaluated.grid:
        parts.append("![Pictures of the test set, side by side](grid.png)")
    return "\n\n".join(parts)


def _base(run: Run) -> str:
    named = [("base model", run.model)]
    if run.recipe and run.recipe.teacher:
        named.append(("teacher", public_name(run.recipe.teacher)))
    rows = []
    for what, name in named:
        shown = f"`{name}`" if name else NOT_STATED
        rows.append([what, shown, KNOWN[name].license if name in KNOWN else NOT_STATED])
    known = KNOWN.get(run.model or "")
    weights = f"{known.license}, as the base model from which they derive" if known else NOT_STATED
    table = _table(["", "model", "licence"], rows)
    return f"## Base models and licences\n\n{table}\n\nLicence of these weights: {weights}."


def _training(run: Run) -> str:
    if run.recipe is None:
        trained = f"Trained by {run.card.trained_by}. " if run.card and run.card.trained_by else ""
        return f"## Training\n\n{trained}The training data are {NOT_STATED} in the folder of the model."
    recipe, training = run.recipe, run.recipe.training
    lines = [
        f"recipe `{recipe.name}` ([recipe.yaml](recipe.yaml)), objective {recipe.objective.kind}",
        f"{run.steps or training.steps:,} steps of {training.batch_size} samples, {training.precision}, seed "
        f"{training.seed}, seed of the student {recipe.student.seed}",
        *run.data,
    ]
    if recipe.init_from:
        lines.append(f"started from {public_name(recipe.init_from) or 'the student of an earlier run'}")
    return "## Training\n\n" + "\n".join(f"- {line}" for line in lines)


def _metrics(run: Run) -> str:
    head = "## Results\n\n"
    if measured := run.evaluated:
        values = measured.models[measured.name]
        columns = [values, measured.models.get("teacher", {}), measured.differences]
        rows = [
            [run.headings[m], *(f"{column[m]:.4g}" if m in column else "" for column in columns)]
            for m in run.shown(values)
        ]
        mark = f" (sha256 of its manifest: {measured.test_mark})" if measured.test_mark else ""
        note = (
            f"Mean and 95 % bootstrap interval; test set: {measured.test}{mark}. Sampled by: {measured.sampler}. "
            "An interval of a difference with 0 inside is no evidence of a difference."
        )
        return f"{head}{_table(['metric', 'this model', 'teacher', 'teacher - this model'], rows)}\n\n{note}"
    skill = (run.card and run.card.skill) or {}
    if not skill:
        return f"{head}No evaluation came with this model."
    metrics = run.shown(next(iter(skill.values())))
    rows = [[way, *(f"{values[m]:.4g}" if m in values else "" for m in metrics)] for way, values in skill.items()]
    note = "Means over unseen rendered scenes, the same for each line; no intervals were recorded."
    return f"{head}{_table(['sampling', *(run.headings[m] for m in metrics)], rows)}\n\n{note}"


def _cost(run: Run) -> str:
    steps, guided = run.sampler.num_inference_steps, run.sampler.guidance_scale > 1
    how = f"{steps} step{'s' * (steps > 1)} {'with' if guided else 'without'} guidance"
    rows = [[f"passes of ControlNet and transformer a picture, {how}", str(network_calls(run.sampler))]]
    if run.cost:
        rows.append(["GFLOP a picture: text encoders, VAE and all passes", f"{run.cost.gflops_picture:.4g}"])
    if run.evaluated and (cost := run.evaluated.cost.get(run.evaluated.name)):
        rows.append(["GFLOP a pass of ControlNet and transformer", f"{cost['gflops_step']:.4g}"])
        rows.append(["GFLOP a pass of the ControlNet alone", f"{cost['gflops_controlnet']:.4g}"])
        rows.append([f"ms a pass ({run.evaluated.machine})", f"{1000 * cost['step_seconds']:.4g}"])
    return f"## Cost\n\n{_table(['what', 'value'], rows)}\n\nOne multiply-add is 2 FLOP."


def _use(run: Run) -> str:
    repo, model = run.repo_id, run.model or "MODEL"
    inpaints = run.condition == INPAINT
    verb = f"inpaint --controlnet {repo} --image photo.jpg --mask mask.png"
    verb = verb if inpaints else f"generate --control {repo}=photo.jpg"
    shell = [f'$ refine-control {verb} --model {model} --prompt "a red circle" --out painted.png']
    parts = ["## Use", _code("With refine-control:", "console", shell)]
    if inpaints:
        code = [
            "from refine_control import Inpainter",
            "",
            f'inpainter = Inpainter.load("{model}", controlnet="{repo}")',
        ]
        code += ['result = inpainter.inpaint("photo.jpg", "mask.png", "a red circle", seed=0)']
        parts.append(_code("In Python:", "python", [*code, 'result.image.save("painted.png")']))
    parts.append(_in_diffusers(run))
    fetch = f"$ hf download {repo} --local-dir student"
    if inpaints:
        shell = [fetch, "$ refine-control export student --to onnx --out exported"]
        parts.append(_code("As ONNX, which paints without PyTorch:", "console", shell))
    if run.on_hub and not run.own_transformer:
        shell = [fetch, "$ refine-control export student --to single-file --out comfyui"]
        where = "For ComfyUI: one file for its folder `models/controlnet`, which the node Load ControlNet Model lists."
        parts.append(_code(where, "console", shell))
    return "\n\n".join(parts)


def _code(what: str, language: str, lines: Sequence[str]) -> str:
    return "\n".join([what, "", f"```{language}", *lines, "```"])


def _in_diffusers(run: Run) -> str:
    levels = condition_encoding(run.config).levels
    lengths: dict[str, Any] = {
        "levels": levels,
        "without_t5": run.without_t5,
        "max_sequence_length": run.max_sequence_length,
    }
    model = f'"{run.model}"' if run.on_hub else "MODEL"
    code = [diffusers_code(run.sampler, run.condition, f'"{run.repo_id}"', model, scheduler=run.scheduler, **lengths)]
    notes = ["In diffusers:"]
    if run.model == "mini":
        code = ["from refine_control.models.card import BUNDLE as MODEL  # the packaged miniature", *code]
    elif not run.on_hub:
        notes.append("MODEL is the model that it was trained for.")
    if run.own_transformer == "transformer_lora":
        notes.append(f'Load the adapters: `pipeline.load_lora_weights("{run.repo_id}", subfolder="transformer_lora")`.')
    elif run.own_transformer:
        notes.append("Give the pipeline as `transformer` the SD3Transformer2DModel of the folder `transformer`.")
    if run.warning:
        notes.append(f"Warning: {run.warning}.")
    return _code("\n\n".join(notes), "python", code)
