"""`refine-control mini train --condition`: the 23-layer teacher of a condition on the frozen base of a bundle."""

from __future__ import annotations

import copy
import platform
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from refine_control.conditions.condition import find_condition
from refine_control.config import SamplerConfig, StudentCard
from refine_control.errors import InvalidInputError
from refine_control.metrics.image_pairs import psnr
from refine_control.miniature.bundle import run_stage
from refine_control.miniature.check import CHECK_SAMPLER
from refine_control.miniature.obedience import load_classifier
from refine_control.miniature.objectives import SceneBatches, TeacherObjective
from refine_control.miniature.stages import CONDITION, Stage
from refine_control.miniature.tasks.task import find_task
from refine_control.models.backbone import Backbone
from refine_control.models.card import BUNDLE
from refine_control.models.controlnet import ControlNet, for_condition
from refine_control.models.cpu_kernels import in_precision, use_cpu_kernels
from refine_control.models.loading import load_backbone, load_pipeline, save_controlnet, weights_mark
from refine_control.pipeline.painting import paint
from refine_control.progress import Progress
from refine_control.randomness import derive_seed
from refine_control.storage import only_writer
from refine_control.training.run import is_main_process, training_device


def measure_teacher(
    backbone: Backbone,
    controlnet: ControlNet,
    condition: str,
    count: int,
    seed: int = 0,
    sampler: SamplerConfig = CHECK_SAMPLER,
) -> dict[str, float]:
    """Oracle's scores and PSNR in dB of `count` scenes that were not used in training, with their own prompts."""
    task, classifier = find_task(condition), load_classifier(BUNDLE)
    scenes = task.render(derive_seed(seed, "check"), 0, count)
    photos, truth = list(scenes.photos(0)), scenes.truth.images.numpy()
    painted = paint(backbone, controlnet, scenes.shown, scenes.prompts, sampler)
    scores = task.score(photos, painted, classifier) | {"psnr": psnr(truth, painted)}
    return {name: round(float(np.mean(values)), 3) for name, values in scores.items()}


def train_condition_teacher(
    condition: str,
    out: Path,
    seed: int = 0,
    *,
    stage: Stage = CONDITION,
    start: Path | None = None,
    count: int = 1000,
    progress: Progress | None = None,
) -> Mapping[str, Any]:
    """Trains the teacher of a condition on the frozen base of the bundle `start` (None: the shipped one), publishes
    `out/controlnet` in fp16 with a card, and returns the card.

    It starts from the bundle's own teacher, which can already copy what it is shown. The skill is measured on `count`
    unseen scenes, beside a model that is shown nothing. The same call resumes. Raises what `fit` raises."""
    bundle, work = start or BUNDLE, out / "work"
    if find_condition(condition).region:
        raise InvalidInputError(f"the teacher of {condition} is a stage of the bundle; train it with --stage teacher")
    with only_writer(out) if is_main_process() else nullcontext():
        work.mkdir(parents=True, exist_ok=True)
        pipeline = load_pipeline(bundle).to(training_device())
        controlnet = for_condition(pipeline.controlnet, condition, pipeline.vae)
        pipeline.register_modules(controlnet=controlnet)
        pipeline.vae.requires_grad_(False)
        if pipeline.device.type == "cpu":
            use_cpu_kernels(pipeline.transformer, controlnet)
        batches = SceneBatches(pipeline.vae, find_task(condition))
        before = [condition, weights_mark(bundle)]
        weights = run_stage("teacher", TeacherObjective(pipeline), batches, stage, work, seed, progress, before)
        if not is_main_process():
            return {}
        controlnet = cast(Any, controlnet).to("cpu").float().requires_grad_(False)
        controlnet.load_state_dict(weights, strict=False)
        published = controlnet.half()
        backbone = load_backbone(bundle, cpu_kernels=True)
        trained = f"mini train --condition {condition}, seed {seed}, {stage.steps} steps of {stage.batch_size}"
        card = StudentCard(
            condition=condition,
            sampling=CHECK_SAMPLER,
            most_steps=1000,
            distilled_guidance=1.0,
            license="Apache-2.0",
            trained_by=f"{trained} ({platform.machine()}, torch {torch.__version__})",
            skill=_skill(backbone, published, condition, count) if count else None,
        )
        save_controlnet(
            published, out / "controlnet", backbone.num_blocks, card=card, backbone=backbone, kind="teacher"
        )
    return card.model_dump(mode="json", exclude_none=True)


def _skill(backbone: Backbone, controlnet: ControlNet, condition: str, count: int) -> dict[str, dict[str, float]]:
    """What is published, in bf16, with and without its condition."""
    measured = copy.deepcopy(controlnet).float()
    in_precision("bf16", backbone, measured)
    scale = {"conditioning_scale": 0.0}
    return {
        "20 guided steps": measure_teacher(backbone, measured, condition, count),
        "without the condition": measure_teacher(
            backbone, measured, condition, min(count, 200), sampler=CHECK_SAMPLER.model_copy(update=scale)
        ),
    }
