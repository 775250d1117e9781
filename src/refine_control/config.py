"""Recipes: what a run is made of, in validated and frozen records, read from YAML and `--set`.

A recipe file is YAML with the traps closed (`strict_yaml`). Nothing is coerced but a whole number to a float, and an
unknown key is an error that names the nearest valid one. A recipe may say `base: mini/ours_stage1` and then only what
is different.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from refine_control.errors import InvalidInputError
from refine_control.strict_yaml import parse_yaml, read_yaml, to_yaml

RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    """A frozen record that takes no unknown key and coerces nothing but a whole number to a float."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Weight = Annotated[float, Field(ge=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Period = Annotated[int, Field(ge=0)]


class StudentConfig(Section):
    """The small ControlNet and what it starts from."""

    num_layers: int = Field(
        default=12, ge=1, le=1024, description="control layers of the student; the paper has 12 for a teacher of 23"
    )
    init: Literal["transformer", "teacher", "random"] = Field(
        default="transformer",
        description="first layers of the transformer (the paper), last layer of each teacher group, or random",
    )
    seed: Seed = Field(default=0, description="seed of a random initialisation")


class LossWeights(Section):
    """The factors of Eq. 1 and Eq. 6, and the alpha of Eq. 2."""

    task: Weight = Field(default=4.0, description="l_task of Eq. 1; not read in stage 2")
    output: Weight = Field(default=1.0, description="l_distill of Eq. 1 and 6")
    feature: Weight = Field(default=1.0, description="l_af of Eq. 1 and 6; 0 is the row wo_cf")
    alpha: float = Field(
        default=0.975,
        ge=0.5,
        lt=1,
        description="weight of the hole in Eq. 2, the rest weighs 1 - alpha; 0.5 is a quarter of w = J in Eq. 3",
    )
    output_alpha: float | None = Field(
        default=None, ge=0.5, lt=1, description="the same weight inside Eq. 4; null is the paper's, every pixel alike"
    )


class ObjectiveConfig(Section):
    """What is minimised."""

    kind: Literal["supervised", "self_supervised", "from_scratch", "mixed", "one_to_one"] = Field(
        default="supervised",
        description="Eq. 1 (stage 1), Eq. 6 (stage 2), Eq. 3 alone without the teacher (Student_fc), Eq. 1 and 6 mixed "
        "in every batch (one_stage), or SSD-1B's loss with one-to-one layer terms (Student_ssd)",
    )
    weights: LossWeights = Field(default_factory=LossWeights, description="factors of the terms")
    x0_source: Literal["masked", "teacher"] = Field(
        default="masked",
        description="clean latents of stage 2: of the masked image, or the teacher's cached completion",
    )
    feature_normalisation: Literal["none", "layer"] = Field(
        default="none",
        description="none is the paper; layer divides each term of Eq. 5 by the mean square of its teacher totals",
    )

    @property
    def roles(self) -> tuple[Literal["labeled", "unlabeled"], ...]:
        """The data sets that it learns from, as `DataConfig` names them."""
        if self.kind == "mixed":
            return ("labeled", "unlabeled")
        return ("unlabeled",) if self.kind == "self_supervised" else ("labeled",)


class OptimizerConfig(Section):
    """AdamW and its learning rate, a pure function of the step."""

    learning_rate: float = Field(default=1e-5, gt=0, le=1, description="AdamW step size after the warm-up")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = Field(default=(0.9, 0.999), description="decay of the first and second moment for each step")
    eps: float = Field(default=1e-8, gt=0, le=1, description="added to the root of the second moment")
    weight_decay: float = Field(
        default=1e-2, ge=0, le=1, description="decoupled decay, times the learning rate, each step"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="2-norm to which the whole gradient is clipped")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="course of the rate after the warm-up"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up")
    final_fraction: Fraction = Field(
        default=0.0, description="rate at the last step of a cosine, as a fraction of learning_rate"
    )


class TrainingConfig(Section):
    """How long, how much at once, and what is written on the way."""

    stage: str = Field(default="stage1", pattern=r"^[\w-]+$", description="name of the stage; it seeds the randomness")
    steps: int = Field(default=1000, ge=1, description="optimiser updates")
    batch_size: int = Field(default=8, ge=1, description="samples of one update over all devices")
    device_batch_size: int = Field(
        default=0, ge=0, description="samples on one device at once, a divisor of batch_size; 0 is batch_size"
    )
    seed: Seed = Field(default=0, description="seed of order, masks, sigmas, noise and dropout")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="arithmetic of the forward passes; weights are fp32"
    )
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the weights' running mean for each step; 0 is none"
    )
    prompt_dropout: Fraction = Field(default=0.1, description="probability of an empty prompt, the teacher's too")
    conditioning_scale: float = Field(default=1.0, gt=0, le=2, description="factor on the control residuals")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, 1.25 times the work"
    )
    compile: bool = Field(default=False, description="torch.compile the networks")
    save_every: Period = Field(default=500, description="steps between checkpoints; 0 saves at the end alone")
    log_every: int = Field(default=10, ge=1, description="steps between lines of metrics")
    validate_every: Period = Field(default=0, description="steps between validations; 0 is never")
    num_validation_images: int = Field(default=16, ge=1, description="images of a validation")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 is all")

    @model_validator(mode="after")
    def _device_batch_divides(self) -> TrainingConfig:
        if self.device_batch_size and self.batch_size % self.device_batch_size:
            raise ValueError(f"device_batch_size {self.device_batch_size} does not divide batch_size {self.batch_size}")
        return self


class SigmaConfig(Section):
    """The noise levels of training: logit-normal, then shifted."""

    logit_mean: float = Field(default=0.0, ge=-10, le=10, description="mean of logit(sigma) before the shift")
    logit_std: float = Field(
        default=1.0, gt=0, le=10, description="standard deviation of logit(sigma) before the shift"
    )
    shift: float | None = Field(default=None, gt=0, le=100, description="sigma shift; null is the scheduler's own")


class SamplerConfig(Section):
    """Inference, equal for all rows of a table."""

    num_inference_steps: int = Field(default=28, ge=1, le=1000, description="Euler steps")
    guidance_scale: float = Field(default=7.0, ge=0, le=100, description="classifier-free guidance; 1 or less is none")
    conditioning_scale: float = Field(default=0.95, ge=0, le=2, description="factor on the control residuals")
    seed: Seed = Field(default=0, description="seed of the initial noise")
    injection: Literal["exact", "diffusers"] = Field(
        default="exact", description="which residual feeds which block: as trained, or by the rule of stock diffusers"
    )
    latents: Literal["mean", "sample"] = Field(
        default="mean", description="masked latents: mean of the VAE posterior or a draw"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="arithmetic of transformer and ControlNet; the VAE and the steps are fp32"
    )


class DataConfig(Section):
    """Caches of the training roles, which `refine-control cache` makes, and shards of the test."""

    labeled: str | None = Field(default=None, description="cache of (image, mask, local prompt), D_sl")
    unlabeled: str | None = Field(default=None, description="cache of (masked image, mask, local prompt), D_ssl")
    test: str | None = Field(default=None, description="shards of held-out samples, for training.validate_every")
    prompts: Literal["cached", "encode"] = Field(
        default="cached",
        description="prompt embeddings from the caches, or encoded in training (caches by `cache --prompts none`)",
    )


class Recipe(Section):
    """One run of training and how its result is sampled: a row of a table."""

    name: str = Field(pattern=r"^[\w-]+([./][\w-]+)*$", description="name of the row; runs land in runs/<name>")
    model: str = Field(default="mini", min_length=1, description="mini, a hub id, or a folder in diffusers layout")
    teacher: str | None = Field(
        default=None, min_length=1, description="hub id or folder of the teacher; null is the model's own ControlNet"
    )
    init_from: str | None = Field(
        default=None, min_length=1, description="run or student folder to start from in place of student.init"
    )
    student: StudentConfig = Field(default_factory=StudentConfig, description="the small ControlNet")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="what is minimised")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its rate")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="length, batch, periods")
    sigmas: SigmaConfig = Field(default_factory=SigmaConfig, description="noise levels of training")
    sampler: SamplerConfig = Field(default_factory=SamplerConfig, description="inference")
    data: DataConfig = Field(default_factory=DataConfig, description="cache folders")
    paper: dict[str, float] | None = Field(default=None, description="the paper's numbers of this row, by metric")


def learning_rate_at(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """The learning rate of the update `step` (0-based) in a run of `total_steps`.

    Linear warm-up reaches the full rate at its last step; a cosine reaches `final_fraction` at the run's last step."""
    if step < optimizer.warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    progress = min(1.0, (step - optimizer.warmup_steps) / max(1, total_steps - 1 - optimizer.warmup_steps))
    falling = 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.learning_rate * (optimizer.final_fraction + (1 - optimizer.final_fraction) * falling)


def recipe_names() -> list[str]:
    """The packaged recipes, as `mini/ours_stage1`."""
    paths = (path for path in RECIPES.rglob("*.yaml") if path.name not in ("budgets.yaml", "rows.yaml"))
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in paths)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file or of a packaged name, with `section.key=value` overrides applied.

    Raises InvalidInputError, one sentence: the file, the key, the value and what is allowed."""
    path = _recipe_path(path_or_name)
    values = _with_base(path)
    overridden = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InvalidInputError(f"--set {override}: write it as section.key=value")
        overridden[key] = override
        _set(values, key, text, f"--set {override}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InvalidInputError(_sentence(error, str(path), overridden)) from None


def _with_base(path: Path, deeper: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file laid over those of the recipe that its `base` names; `paper` is never inherited."""
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or path in deeper:
        raise InvalidInputError(f"{path}: base is {base!r}; it names another recipe, such as mini/ours_stage1")
    below = _with_base(_recipe_path(base), (*deeper, path))
    below.pop("paper", None)
    return _laid_over(below, values)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _laid_over(below[key], value) if both else value
    return merged


def fingerprint(recipe: Recipe) -> str:
    """Hex sha256 of what the recipe sets apart from the defaults: equal recipes, however written, have equal ones.

    A default is left out so that a new setting, whose default is what was done before, leaves old results valid;
    whoever changes a default raises `rows.FORMAT`."""
    told = recipe.model_dump(mode="json", exclude_defaults=True)
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json"))


def _recipe_path(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.suffix in (".yaml", ".yml"):
        return path
    names = recipe_names()
    if str(path_or_name) in names:
        return RECIPES / f"{path_or_name}.yaml"
    nearest = difflib.get_close_matches(str(path_or_name), names, n=3, cutoff=0.3) or names
    raise InvalidInputError(
        f"no recipe is named {path_or_name}; nearest: {', '.join(nearest)}; or give a path that ends in .yaml"
    )


# Which keys there are, and what they admit.


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _fields(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field; sections themselves included."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if inner := _section_of(field):
            yield from _fields(inner, f"{prefix}{name}.")


def _refuse_unknown(key: str, source: str) -> NoReturn:
    keys = [name for name, _ in _fields()]
    last = key.rpartition(".")[2]
    elsewhere = [name for name in keys if name.rpartition(".")[2] == last]
    alike = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in keys], n=1)
    nearest = (
        elsewhere
        or difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
        or [name for name in keys if name.rpartition(".")[2] in alike]
        or difflib.get_close_matches(key, keys, n=1, cutoff=0)
    )
    raise InvalidInputError(f"{source}: unknown key {key}; the nearest valid one is {nearest[0]}")


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _set(values: dict[str, Any], key: str, text: str, source: str) -> None:
    """Puts the value of `--set` into the nested `values`; a field of text takes its text as it stands."""
    known = dict(_fields())
    field = known.get(key)
    section, _, last = key.rpartition(".")
    if field is None and section != "paper":
        _refuse_unknown(key, source)
    value: Any = text
    takes_text = field is not None and str in _members(field.annotation)
    if not takes_text or (text == "null" and field is not None and type(None) in _members(field.annotation)):
        value = parse_yaml(text, source)
    target = values
    for part in section.split(".") if section else ():
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise InvalidInputError(f"{source}: {section} is not a section in the recipe file")
    target[last] = value


_BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def _allowed(field: FieldInfo) -> str:
    """What a field admits, in words: `a whole number, at least 1`."""
    if section := _section_of(field):
        return f"a section with the keys {', '.join(section.model_fields)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    kinds = []
    for member in _members(field.annotation):
        if get_origin(member) is Literal:
            kinds.append("one of " + ", ".join(map(str, get_args(member))))
        elif get_origin(member) is tuple:
            kinds.append("a list of two numbers from 0 to below 1")
        else:
            kinds.append(words.get(member, "a mapping of words to numbers"))
    bounds = [
        f"{word} {getattr(item, name)}" for item in field.metadata for name, word in _BOUNDS if hasattr(item, name)
    ]
    if any(hasattr(item, "pattern") for item in field.metadata):
        bounds.append("made of letters, digits, _ and - with single . or / between")
    if any(getattr(item, "min_length", None) for item in field.metadata):
        bounds.append("not empty")
    return ", ".join([" or ".join(kinds), *bounds])


def _sentence(error: ValidationError, source: str, overridden: dict[str, str]) -> str:
    """The first error as one sentence: where, which key, its value, what is allowed."""
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    known = dict(_fields())
    key = field_key = ".".join(str(part) for part in first["loc"])
    while "." in field_key and field_key not in known:  # an item of a list or mapping: its field tells what is allowed
        field_key = field_key.rpartition(".")[0]
    for said in (key, field_key):
        source = f"--set {overridden[said]}" if said in overridden else source
    if first["type"] == "extra_forbidden":
        _refuse_unknown(key, source)
    if first["type"] == "value_error":
        return f"{source}: {key}: {first['msg'].removeprefix('Value error, ')}"
    field = known[field_key]
    if first["type"] == "missing" and key == field_key:
        return f"{source}: {key} is missing; it is {_allowed(field)} ({field.description})"
    if first["type"] == "missing":
        key = field_key
    return f"{source}: {key} is {first['input']!r} and must be {_allowed(field)} ({field.description})"
