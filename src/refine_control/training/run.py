"""`refine-control train`: a recipe becomes a student folder that stock diffusers loads."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refine_control.cache.building import refuse_sizes
from refine_control.cache.marks import model_mark, teacher_mark
from refine_control.cache.reader import Cache
from refine_control.conditions.condition import INPAINT, check_condition, find_condition, own_condition, take_condition
from refine_control.config import (
    DataConfig,
    ObjectiveConfig,
    Precision,
    Recipe,
    StudentCard,
    fingerprint,
    resolved_yaml,
)
from refine_control.errors import InvalidInputError, MissingError
from refine_control.folders import A_CACHE, A_CONTROLNET, refuse_other_kind
from refine_control.models.backbone import Backbone
from refine_control.models.card import packaged
from refine_control.models.controlnet import (
    ControlNet,
    build_student,
    equal_layer_of_site,
    own_layer_of_site,
    student_counts,
)
from refine_control.models.devices import best_device
from refine_control.models.families import condition_encoding, layer_counts
from refine_control.models.loading import load_backbone, load_controlnet, load_student, save_controlnet, weights_mark
from refine_control.models.own_transformer import own_folder
from refine_control.models.prompt_memory import PromptMemory
from refine_control.progress import Progress
from refine_control.recipe_files import load_recipe
from refine_control.records import LABELED, UNLABELED
from refine_control.storage import MANIFEST, only_writer, read_manifest, sha256_file, write_atomic
from refine_control.threads import torch_threads
from refine_control.training.assembly import asks_teacher, assemble, make_objective, reads_teacher, trainable_backbone
from refine_control.training.batches import CacheBatches, MixedBatches
from refine_control.training.checkpoint import refuse_other_run
from refine_control.training.few_step import fields_read
from refine_control.training.loop import fit
from refine_control.training.memory_choice import fit_to_device
from refine_control.training.objectives import Networks
from refine_control.training.placement import relevant_placement
from refine_control.training.validation import Validation
from refine_control.training.watch import doing

STUDENT = "student"
logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """Where a run left its student."""

    student: Path
    steps: int
    seconds: float
    """Of this sitting; 0 when the run had been finished before."""


def fast_precision(device: torch.device) -> Precision:
    """bf16 where the processor has units for it (measured in docs/engineering.md), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def training_device() -> torch.device:
    """The best device as accelerate shares it out: each process has a GPU of its own.

    Raises InvalidInputError where there are too few."""
    from accelerate import PartialState

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if best_device().type == "cuda" and processes > (count := torch.cuda.device_count()):
        raise InvalidInputError(f"{processes} processes on a machine that shows {count} GPUs; start one for each")
    return torch.device(PartialState(cpu=best_device().type == "cpu").device or "cpu")


def is_main_process() -> bool:
    """The one process of a run that writes files (accelerate starts several)."""
    from accelerate import PartialState

    return PartialState(cpu=best_device().type == "cpu").is_main_process


def student_folder(path: str | Path) -> Path:
    """A student folder, or the one inside a run's folder; of a packaged name that one."""
    if folder := packaged(path):
        return folder
    inside = Path(path) / STUDENT
    return inside if (inside / "config.json").is_file() else Path(path)


def new_student(recipe: Recipe, backbone: Backbone, device: torch.device | str = "cpu") -> tuple[Backbone, ControlNet]:
    """The student as the recipe starts it, fp32 on the CPU, and the backbone that it steers: `backbone` itself where
    its transformer stays frozen, else around a trainable copy. A placement by relevance is measured on `device`."""
    config = recipe.student
    if recipe.init_from is None:
        start = config.num_layers, config.init, config.seed, _placement(recipe, backbone, device)
        named = _condition(recipe, backbone)
        parts, more = (backbone.transformer, backbone.pipeline.controlnet), {"condition": named}
        student = build_student(*parts, *start, **more, num_single_layers=config.num_single_layers)
        return trainable_backbone(recipe, backbone, backbone, None), student
    folder = student_folder(recipe.init_from)
    start, student = load_student(backbone, folder, f"init_from {recipe.init_from}")
    counts = layer_counts(student.config)
    if counts != (stated := (config.num_layers, config.num_single_layers)[: len(counts)]):
        layers, asked = (" + ".join(map(str, each)) for each in (counts, stated))
        raise InvalidInputError(
            f"init_from {recipe.init_from} has {layers} layers and student.num_layers is {asked}; make them agree"
        )
    equal = own_layer_of_site(student) in (None, equal_layer_of_site(counts, backbone.transformer))
    if (placement := "equal" if equal else "relevance") != config.placement:
        raise InvalidInputError(
            f"init_from {recipe.init_from} has the placement {placement} and student.placement is {config.placement}; "
            "make them agree"
        )
    return trainable_backbone(recipe, backbone, start, own_folder(folder)), student


def _condition(recipe: Recipe, backbone: Backbone) -> str:
    """The condition of the caches; where none is named, of the teacher.

    Raises InvalidInputError where the teacher takes another one."""
    teacher = backbone.pipeline.controlnet
    known = None if teacher is None else own_condition(teacher.config)
    paths = [path for role in recipe.objective.roles if (path := getattr(recipe.data, role))]
    named = [Cache(Path(path)).condition for path in paths] or [known or INPAINT]
    if teacher is not None:
        take_condition(teacher, named[0], "the teacher")
    return named[0]


def _placement(recipe: Recipe, backbone: Backbone, device: torch.device | str) -> list[int] | None:
    """The layer of each site by relevance, measured on samples of the first role's cache; None for equal groups."""
    if recipe.student.placement == "equal":
        return None
    student_counts(recipe.student.num_layers, recipe.student.num_single_layers, backbone.transformer)
    cache = _cache(recipe, recipe.objective.roles[0], backbone, model_mark(backbone))
    return relevant_placement(recipe, backbone, cache, device)


def _cache(recipe: Recipe, role: str, backbone: Backbone, model: str, *controlnets: ControlNet) -> Cache:
    """The cache that the recipe names for a role, of this model and of sizes that its networks have positions for."""
    path = getattr(recipe.data, role)
    if path is None:
        raise InvalidInputError(f"the recipe has no data.{role}; give one with --set data.{role}=CACHE_FOLDER")
    cache = Cache(Path(path), model).require(role)
    for controlnet in controlnets:
        check_condition(controlnet.config, cache.condition, "the recipe")
        if condition_encoding(controlnet.config) != cache.encoding:
            shift, (black, white) = "with" if cache.encoding.shift else "without", cache.encoding.levels
            raise InvalidInputError(
                f"{path} has latents of its condition {shift} the VAE's shift, from {black:g} for black to {white:g} "
                "for white, and the teacher takes others; make it again with `refine-control cache --teacher`"
            )
    if recipe.data.prompts == "cached" and cache.manifest["prompts"] == "none":
        raise InvalidInputError(f"{path} holds no prompt embeddings; encode them with --set data.prompts=encode")
    refuse_sizes(cache.groups, backbone, *controlnets)
    return cache


def make_batches(recipe: Recipe, networks: Networks, mark: str, device: torch.device) -> CacheBatches | MixedBatches:
    """The batches of the roles that the objective learns from.

    Raises MissingError for a cache without the completions that the recipe reads, and what `Cache` raises."""
    objective, training = recipe.objective, recipe.training
    encode = PromptMemory(networks.backbone.encode_prompts) if recipe.data.prompts == "encode" else None
    x0 = {LABELED: "latents", UNLABELED: "cond_latents" if objective.x0_source == "masked" else "completions"}
    if objective.is_few_step and objective.x0_source == "teacher":
        x0[LABELED] = "completions"

    def batches(role: str) -> CacheBatches:
        cache = _cache(recipe, role, networks.backbone, mark, networks.student)
        if not cache.has(x0[role]):
            raise MissingError(f"{cache.folder} has no teacher completions; make them with {_completing(objective)}")
        if objective.is_few_step and x0[role] == "completions":
            refuse_other_paths(cache, objective, networks)
        if x0[role] == "cond_latents" and not find_condition(cache.condition).region:
            raise InvalidInputError(
                f"objective.x0_source masked noises the masked image, and {cache.condition} has none; set it to teacher"
            )
        count, adds = training.batch_size // len(objective.roles), fields_read(objective)
        return CacheBatches(cache, count, training.prompt_dropout, device, encode, x0=x0[role], adds=adds)

    if len(objective.roles) == 1:
        return batches(objective.roles[0])
    if training.batch_size % 2 or training.device_batch_size % 2:
        raise InvalidInputError("objective.kind mixed halves every batch; make the batch sizes even")
    return MixedBatches(batches(LABELED), batches(UNLABELED))


def _completing(objective: ObjectiveConfig) -> str:
    """The command that makes the completions that an objective learns from."""
    few = objective.few_step
    if not objective.is_few_step:
        return "`refine-control cache --complete 8`"
    path = few.steps if objective.reads_paths else 1
    steps = path * math.ceil(8 / path)  # at least 8, and a multiple of the path's
    return f"`refine-control cache --complete {steps} --guidance {few.teacher_guidance:g} --path {path}`"


def refuse_other_paths(cache: Cache, objective: ObjectiveConfig, networks: Networks) -> None:
    """Raises InvalidInputError where the completions of a cache are not those that an objective for few steps learns
    from: of the same teacher, at its guidance, unscaled, with enough knots at the noise levels of the networks."""
    sampler, config, backbone = cache.manifest["completions"], objective.few_step, networks.backbone
    scale, knots = sampler["guidance_scale"], cache.manifest.get("path", 0)
    again = f"make the cache again with {_completing(objective)}"
    if cache.manifest.get("teacher") != networks.teacher_mark:
        raise InvalidInputError(f"the completions of {cache.folder} are of another teacher; {again} and this teacher")
    size = next(iter(cache.groups))
    if objective.reads_paths and (shift := networks.shift_at(size)) != (usual := backbone.shift_at(size)):
        why = f"noise levels shifted by {usual:g} and sigmas.shift is {shift:g}; set it to null"
        raise InvalidInputError(f"the paths of {cache.folder} have {why}")
    if scale != config.teacher_guidance:
        why = f"guidance scale {scale:g} and objective.few_step.teacher_guidance is {config.teacher_guidance:g}"
        raise InvalidInputError(f"the completions of {cache.folder} have {why}; {again}, or change the recipe")
    if sampler["conditioning_scale"] != 1.0:
        why = f"conditioning scale {sampler['conditioning_scale']:g} and training has 1"
        raise InvalidInputError(f"the completions of {cache.folder} have {why}; {again}")
    if objective.reads_paths and config.steps > 1 and (not knots or knots % config.steps):
        why = f"paths of {knots} levels and objective.few_step.steps is {config.steps}, which must divide them"
        raise InvalidInputError(f"{cache.folder} has {why}; {again}")


def student_card(recipe: Recipe) -> StudentCard | None:
    """The card of a student for few steps: it is sampled as its recipe says; None for other objectives.

    Guidance is distilled in where the frozen teacher is asked, in training or for the cache."""
    config, sampler = recipe.objective, recipe.sampler
    if not config.is_few_step:
        return None
    distilled = config.x0_source == "teacher" or asks_teacher(config)
    return StudentCard(
        sampling=sampler,
        most_steps=max(sampler.num_inference_steps, config.few_step.steps),
        distilled_guidance=config.few_step.teacher_guidance if distilled else 1.0,
    )


def prepare(recipe: Recipe, device: torch.device, *, cpu_kernels: bool = True) -> Networks:
    """The networks of a recipe on `device`, in its precision, with the operators that are fast there.

    Without `cpu_kernels` a CPU runs diffusers' own modules."""
    with_teacher = reads_teacher(recipe)
    teacher = load_controlnet(recipe.teacher) if recipe.teacher and with_teacher else None
    backbone = load_backbone(recipe.model, teacher, controlled=with_teacher, controlnet_name=recipe.teacher)
    started = new_student(recipe, backbone, device)
    exact = teacher_mark(backbone) if recipe.objective.is_few_step else ""  # before the cast, as `cache` has it
    kernels = cpu_kernels and device.type == "cpu"
    return assemble(recipe, backbone, *started, device, cpu_kernels=kernels, teacher_mark=exact)


def run_mark(recipe: Recipe, backbone: Backbone) -> str:
    """Hash of what a run's weights depend on: the recipe, and the contents of the files that it names.

    A run whose files were moved keeps its mark; a run whose teacher, model, data or start changed has another one."""
    bare = recipe.model_copy(
        update={"model": "", "teacher": None, "init_from": None, "data": DataConfig(prompts=recipe.data.prompts)}
    )
    parts = [fingerprint(bare), model_mark(backbone), teacher_mark(backbone)]
    parts += [weights_mark(student_folder(recipe.init_from))] if recipe.init_from else []
    for role in recipe.objective.roles:
        manifest = Path(getattr(recipe.data, role) or "") / MANIFEST
        parts += [sha256_file(manifest)] if manifest.is_file() else []  # `Cache` says what is wrong with others
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of a recipe by its dotted key."""
    out = {}
    for key, value in values.items():
        out |= _settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


_BY_CONTENT = ("model", "teacher", "init_from", "data.labeled", "data.unlabeled", "data.test")
"""Settings that a run is known by the contents of."""


def _what_changed(run_dir: Path, recipe: Recipe) -> str:
    """What makes a run another one than that of its folder: each setting with its old and new value."""
    try:
        previous = load_recipe(run_dir / "recipe.yaml")
    except InvalidInputError:
        return "its recipe cannot be read; choose another folder"
    before, now = (_settings(each.model_dump(mode="json", exclude={"paper"})) for each in (previous, recipe))
    changed = {key for key in {**before, **now} if before.get(key) != now.get(key)}
    keys = sorted(changed.difference(_BY_CONTENT)) or sorted(changed)
    if not keys:
        return (
            "all settings are the same, but the contents of model, teacher, init_from or data have changed; "
            "choose another folder"
        )
    settings = ", ".join(f"{key} is {_shown(before.get(key))} there and {_shown(now.get(key))} here" for key in keys)
    return f"{settings}; choose another folder, or set them back"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _done(run_dir: Path, mark: str, elsewhere: Iterable[Path], recipe: Recipe) -> Trained | None:
    """The finished student of the same run, verified; None where there is none.

    Raises InvalidInputError where the folder has another run's student or checkpoint."""
    for folder in (run_dir / STUDENT, *(other / STUDENT for other in elsewhere)):
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder, verify=False, required=("fingerprint", "steps"))
            if manifest["fingerprint"] == mark:
                return Trained(folder, read_manifest(folder)["steps"], 0.0)
    if (run_dir / STUDENT / MANIFEST).is_file():
        changed = _what_changed(run_dir, recipe)
        raise InvalidInputError(f"{run_dir} holds the student of another recipe, teacher or data: {changed}")
    refuse_other_run(run_dir, mark, lambda: _what_changed(run_dir, recipe))
    return None


def train(
    recipe: Recipe,
    run_dir: Path,
    progress: Progress | None = None,
    elsewhere: Iterable[Path] = (),
) -> Trained:
    """Trains a recipe in `run_dir`, from its last checkpoint if it has one; finished runs are left as they are.

    If one of the run folders `elsewhere` has the finished student of the same run, that student is returned.
    Writes recipe.yaml, metrics.jsonl, tensorboard/, checkpoints/ and student/ (diffusers layout, fp32; the running
    mean where the recipe has one; with a card for few steps). Where several processes train, `watched` is to be around
    it. Raises what `fit`, `Cache` and the loaders raise."""
    if recipe.training.validate_every and not recipe.data.test:
        raise InvalidInputError(
            "training.validate_every is set and data.test is not; give test shards with --set data.test=FOLDER"
        )
    for role in recipe.objective.roles:  # before models are loaded
        refuse_other_kind(getattr(recipe.data, role) or "", A_CACHE)
    if recipe.init_from:
        refuse_other_kind(student_folder(recipe.init_from), A_CONTROLNET)
    doing("connecting to the other processes")
    main = is_main_process()
    writer = only_writer(run_dir) if main else nullcontext()
    with torch_threads(recipe.training.threads), writer:
        device = training_device()
        doing("loading the networks")
        recipe = fit_to_device(recipe, run_dir, device, int(os.environ.get("WORLD_SIZE", "1")), main)
        networks = prepare(recipe, device)
        backbone = networks.backbone
        mark = run_mark(recipe, backbone)
        if done := _done(run_dir, mark, elsewhere, recipe):
            return done
        objective = make_objective(recipe.objective, networks)
        batches = make_batches(recipe, networks, model_mark(backbone), device)
        if main:
            write_atomic(run_dir / "recipe.yaml", resolved_yaml(recipe))
        validate = Validation(recipe, networks, run_dir) if recipe.training.validate_every else None
        configs = recipe.optimizer, recipe.training
        fitted = fit(objective, batches, *configs, run_dir, mark, validate=validate, progress=progress)
        doing("writing the student")
        student, transformer = networks.whole, networks.steered.get(networks.whole)
        for part in (student, transformer):
            if part is not None:
                part.to("cpu", torch.float32)  # type: ignore[arg-type]
        networks.load(fitted.weights, student)
        if main:
            save_controlnet(
                student,
                run_dir / STUDENT,
                backbone.num_blocks,
                own_transformer=transformer,
                card=student_card(recipe),
                backbone=backbone,
                kind="student",
                fingerprint=mark,
                recipe=recipe.model_dump(mode="json"),
                steps=fitted.steps,
            )
    return Trained(run_dir / STUDENT, fitted.steps, fitted.seconds)
