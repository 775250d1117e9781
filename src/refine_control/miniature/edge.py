"""`refine-control mini edge`: publishes a student for few steps of the mini model in fp16, with what it can do."""

from __future__ import annotations

import copy
from pathlib import Path

from refine_control.config import SamplerConfig, StudentCard
from refine_control.errors import InvalidInputError
from refine_control.miniature.check import CHECK_SAMPLER, measure_skill
from refine_control.miniature.obedience import load_classifier
from refine_control.models.card import BUNDLE, read_card
from refine_control.models.controlnet import ControlNet
from refine_control.models.cpu_kernels import in_precision
from refine_control.models.loading import load_backbone, load_controlnet, save_controlnet
from refine_control.progress import Progress
from refine_control.storage import read_manifest
from refine_control.training.run import student_folder

STEPS = (1, 2, 4)


def few_sampler(card: StudentCard, steps: int) -> SamplerConfig:
    """The sampler of a card with another number of steps."""
    return SamplerConfig(**{**card.fields, "num_inference_steps": steps})


def publish_edge(
    student: str | Path, out: Path, count: int = 1000, seed: int = 0, progress: Progress | None = None
) -> StudentCard:
    """Writes `out`, the student of a run in fp16 with its card, measured on `count` unseen scenes; returns the card.

    Beside the student stand the teacher's 20 and 4 guided steps on the same scenes and noise. Raises InvalidInputError
    for a student of other objectives than those for few steps."""
    folder = student_folder(student)
    card = read_card(folder)
    if card is None:
        raise InvalidInputError(f"{folder} is no student for few steps; train one by mini/edge")
    recipe = read_manifest(folder, required=("recipe",))["recipe"]
    backbone, controlnet = load_backbone("mini", cpu_kernels=True), load_controlnet(folder)
    classifier = load_classifier(BUNDLE)
    published = controlnet.half()
    halved = copy.deepcopy(published).float()  # what is measured is what is published
    in_precision("bf16", backbone, backbone.pipeline.controlnet, halved)
    four = CHECK_SAMPLER.model_copy(update={"num_inference_steps": 4, "sigmas": "even"})
    ways: dict[str, tuple[SamplerConfig, ControlNet | None]] = {
        "teacher, 20 guided steps": (CHECK_SAMPLER, None),
        "teacher, 4 guided steps": (four, None),
    }
    for n in STEPS:
        ways[f"{n} step{'s' * (n > 1)}"] = (few_sampler(card, n), halved)
    skill: dict[str, dict[str, float]] = {}
    for number, (name, (sampler, network)) in enumerate(ways.items(), 1):
        skill[name] = measure_skill(backbone, classifier, count, seed, "local", sampler, network)
        if progress:
            progress(number, len(ways), name)
    trained = f"{recipe['name']}, seed {recipe['training']['seed']}, {recipe['training']['steps']} steps"
    card = card.model_copy(update={"license": "Apache-2.0", "trained_by": trained, "skill": skill})
    save_controlnet(published, out, backbone.num_blocks, card=card, backbone=backbone, kind="student")
    return card
