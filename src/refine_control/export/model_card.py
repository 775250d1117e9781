"""A model card written from the run: what a student is, what it comes from, what was measured, and how to use it.

Nothing in a card is invented: of a base model that is not in `KNOWN` no licence is stated, and numbers that have no
intervals are called so. No path of the machine that wrote it stands in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refine_control.config import Recipe, SamplerConfig, StudentCard
from refine_control.errors import InvalidInputError
from refine_control.metrics.statistics import Interval
from refine_control.models.card import CONTROLNETS, diffusers_code
from refine_control.pipeline.picture_cost import PictureCost, network_calls
from refine_control.records import INPAINT
from refine_control.storage import MANIFEST, read_manifest, sha256_file


class Known(NamedTuple):
    """A model that others can name: its licence, and the number of its transformer's blocks (None: a ControlNet)."""

    license: str
    front_matter: Mapping[str, str]
    """The licence in the words of the hub's metadata."""
    num_blocks: int | None = None


_COMMUNITY = "Stability AI Community License"
_STABILITY = {
    "license": "other",
    "license_name": "stabilityai-ai-community",
    "license_link": "https://stability.ai/license",
}
KNOWN = {
    **dict.fromkeys(["mini", *CONTROLNETS], Known("Apache-2.0", {"license": "apache-2.0"}, 24)),
    "stabilityai/stable-diffusion-3-medium": Known(_COMMUNITY, _STABILITY, 24),
    "stabilityai/stable-diffusion-3-medium-diffusers": Known(_COMMUNITY, _STABILITY, 24),
    "stabilityai/stable-diffusion-3.5-medium": Known(_COMMUNITY, _STABILITY, 24),
    "stabilityai/stable-diffusion-3.5-large": Known(_COMMUNITY, _STABILITY, 38),
    "alimama-creative/SD3-Controlnet-Inpainting": Known(_COMMUNITY, _STABILITY),
}
"""The packaged models, and hub ids with the licences of their pages. A student derives from its base model."""
NOT_STATED = "not stated"
_PLACES = ("model", "teacher", "init_from")
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
_ABSOLUTE = re.compile(r"(?<![\w.:/<~-])/(?:[\w.@+-]+/)+[\w.@+-]+|\b[A-Za-z]:\\+\w+\\")
_MARK = re.compile(r"([^<>:\s]+): [^<>]*, sha256 ([0-9a-f]{16})")
"""An input of an evaluation in its report."""


def public_name(name: str | None) -> str | None:
    """A model of a recipe by a name that others can use: a packaged one or a hub id; None for others.

    A name with one slash may be a local folder: it is a hub id where `KNOWN` or the hub's cache has it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if not name or name in KNOWN:
        return name
    if snapshot := _SNAPSHOT.search(name):
        return "/".join(snapshot.groups())
    cached = name.count("/") == 1 and (Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()
    return name if cached and not Path(name).exists() else None


def public_recipe(recipe: Recipe) -> Recipe:
    """A recipe without the places of one machine: MODEL, TEACHER and INIT_FROM stand for local folders, and the data
    are to be named again."""
    places = {key: public_name(given) or key.upper() for key in _PLACES if (given := getattr(recipe, key))}
    data = recipe.data.model_copy(update={"labeled": None, "unlabeled": None, "test": None})
    return recipe.model_copy(update={**places, "data": data})


def refuse_private(name: str, text: str) -> None:
    """Raises InvalidInputError where a text that is to be published holds an absolute path of a file system."""
    if private := _ABSOLUTE.search(text):
        raise InvalidInputError(
            f"{name} would hold the path {private[0]}, which is private; remove it from the files of the student or of "
            "the evaluation"
        )


@dataclass(frozen=True)
class Evaluated:
    """What `refine-control evaluate` measured of one student, which is called `name` there."""

    name: str
    test: str
    """The test set in words."""
    test_mark: str | None
    """First characters of the sha256 of the test set's manifest."""
    models: Mapping[str, Mapping[str, Interval]]
    """By model, the teacher among them: mean and 95 % interval by metric."""
    differences: Mapping[str, Interval]
    """Of the teacher minus this student on the same pictures, by metric."""
    samples: int
    sampler: str
    machine: str
    cost: Mapping[str, Mapping[str, float]]
    """By model, fields of ModelCost."""
    grid: Path | None
    """The picture grid."""


def read_evaluation(folder: Path, weights: Path) -> Evaluated:
    """The part of an evaluation folder that is about the student with these weights, by the sha256 in its report.

    Raises InvalidInputError for a folder of another kind and for an evaluation of other weights."""
    try:
        numbers = json.loads((folder / "metrics.json").read_bytes())
        facts, models = numbers["facts"], {name: _intervals(each) for name, each in numbers["models"].items()}
        marks = dict(_MARK.findall((folder / "report.html").read_text()))
        samples, cost = int(numbers["samples"]), dict(numbers["cost"])
        test, sampler, machine = Path(facts["test"]).name, facts["sampler"], facts["machine"]
        differences = numbers["paired_differences"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidInputError(
            f"{folder} is no evaluation that can be read; give a folder that `refine-control evaluate` wrote"
        ) from None
    mark = sha256_file(weights)[:16]
    name = next((name for name in models if marks.get(name) == mark), None)
    if name is None:
        measured = ", ".join(sorted(models.keys() - {"teacher"}))
        raise InvalidInputError(
            f"{folder} is no evaluation of {weights}: it measured other weights as {measured}; run `refine-control "
            "evaluate` with this student"
        )
    return Evaluated(
        name,
        f"{test}, {samples} held-out samples",
        marks.get("test"),
        models,
        _intervals(differences.get(f"teacher - {name}", {})),
        samples,
        sampler,
        machine,
        cost,
        folder / "grid.png" if (folder / "grid.png").is_file() else None,
    )


def _intervals(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Interval]:
    """Those that are bounded."""
    ends = {metric: (value["mean"], value["low"], value["high"]) for metric, value in values.items()}
    return {metric: Interval(*each) for metric, each in ends.items() if None not in each}


def describe_data(recipe: Recipe, built: Path | None) -> list[str]:
    """Sentences on the caches that a recipe names; with the output of `data build` or `data scenes` that they were made
    of, their sources, licences and seed.

    Raises InvalidInputError where a cache was made of other shards than those."""
    lines = []
    for role in recipe.objective.roles:
        folder = getattr(recipe.data, role)
        if folder is None or not (Path(folder) / MANIFEST).is_file():
            lines.append(f"{role} data: the cache is not at hand, the number of samples is {NOT_STATED}")
            continue
        cache = read_manifest(Path(folder), verify=False, required=("count",))
        line = f"{role} data: {cache['count']:,} samples in the cache that the run's manifest names"
        if built is not None:
            shards = built / role / MANIFEST
            if not shards.is_file() or sha256_file(shards) != cache.get("source", {}).get("shards"):
                raise InvalidInputError(
                    f"{folder} was not made of {shards.parent}; give --data the folder that `refine-control data` "
                    "wrote for this cache, or leave it away"
                )
            line += f"; {_shards_in_words(read_manifest(shards.parent, verify=False))}"
        lines.append(line)
    return lines


def _shards_in_words(shards: Mapping[str, Any]) -> str:
    sources, licences = (
        ", ".join(f"{name} {count:,}" for name, count in shards.get(key, {}).items()) or NOT_STATED
        for key in ("sources", "licenses")
    )
    seed = shards.get("seed", NOT_STATED)
    return f"{shards.get('photos', 0):,} pictures, sources: {sources}, licences: {licences}, seed {seed}"


@dataclass(frozen=True)
class Run:
    """Everything that a card is written from."""

    repo_id: str
    config: Mapping[str, Any]
    """Of the ControlNet."""
    num_params: int
    sampler: SamplerConfig
    """How it is sampled where nobody says."""
    recipe: Recipe | None
    """As trained, with the places of this machine; None where the manifest has none."""
    steps: int | None
    card: StudentCard | None
    """Of a student for few steps."""
    model: str | None
    """Its base model by a name that others can use."""
    headings: Mapping[str, str]
    """By metric, its name in tables; their order is that of the tables."""
    evaluated: Evaluated | None = None
    cost: PictureCost | None = None
    data: Sequence[str] = ()
    """Sentences on the training data."""
    own_transformer: str | None = None
    """The folder of a transformer that was trained with it."""
    scheduler: str | None = None
    """The class of its own scheduler/."""
    without_t5: bool = False
    max_sequence_length: int = 256
    warning: str = ""
    """What stock diffusers does wrong with it."""

    @property
    def condition(self) -> str:
        """The kind of condition."""
        return self.config.get("condition") or INPAINT

    @property
    def on_hub(self) -> bool:
        """Whether its base model is a hub id."""
        return "/" in (self.model or "")

    def shown(self, values: Mapping[str, Any]) -> list[str]:
        """The metrics that have values, in the order of tables."""
        return [metric for metric in self.headings if metric in values]


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
    lengths: dict[str, Any] = {"without_t5": run.without_t5, "max_sequence_length": run.max_sequence_length}
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
