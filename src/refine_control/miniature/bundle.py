"""`refine-control mini train`: trains all stages and the classifier, measures the result, publishes the bundle."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from refine_control.config import OptimizerConfig, TrainingConfig
from refine_control.errors import InvalidInputError
from refine_control.miniature.obedience import WEIGHTS as CLASSIFIER_WEIGHTS
from refine_control.miniature.obedience import Classifier, load_classifier
from refine_control.miniature.objectives import (
    AutoencoderObjective,
    BaseObjective,
    CropBatches,
    JointObjective,
    OracleObjective,
    TeacherObjective,
)
from refine_control.miniature.stages import ORACLE, STAGES, Stage
from refine_control.miniature.worlds import SceneWorld, World
from refine_control.models.card import CARD
from refine_control.models.controlnet import from_transformer
from refine_control.models.cpu_kernels import use_cpu_kernels
from refine_control.models.loading import weights_mark
from refine_control.progress import Progress
from refine_control.storage import only_writer, publish_folder, write_json
from refine_control.training.loop import fit
from refine_control.training.run import is_main_process, training_device

OPTIMIZER = OptimizerConfig(
    betas=(0.9, 0.99), weight_decay=0.01, schedule="cosine", warmup_steps=100, final_fraction=0.02
)
"""Of every stage, but for its learning rate."""


def run_stage(
    name: str,
    objective: Any,
    batches: Any,
    stage: Stage,
    work: Path,
    seed: int,
    progress: Progress | None = None,
    before: Sequence[Any] = (),
) -> dict[str, torch.Tensor]:
    """Trains one stage in `work/<name>`, or reads its result if it is finished; returns its averaged weights.

    `before` lists what the stage depends on: its world, the starting bundle, the earlier stages. Writes `stage.json`
    (steps, samples, seconds), then `weights.safetensors`. Raises InvalidInputError if `work` holds a different stage of
    this name.
    """
    folder = work / name
    result, record = folder / "weights.safetensors", folder / "stage.json"
    mark = hashlib.sha256(json.dumps([*before, name, stage, seed]).encode()).hexdigest()
    if result.exists() and (not record.is_file() or json.loads(record.read_text()).get("fingerprint") != mark):
        raise InvalidInputError(
            f"{folder} was trained with other steps, seed, start or images; choose another --out, or delete {work}"
        )
    if not result.exists():
        optimizer = OPTIMIZER.model_copy(update={"learning_rate": stage.learning_rate})
        training = TrainingConfig(
            stage=name,
            steps=stage.steps,
            batch_size=stage.batch_size,
            seed=seed,
            precision="bf16",
            ema_decay=stage.ema_decay,
            save_every=250,
            log_every=25,
        )
        fitted = fit(objective, batches, optimizer, training, folder, mark, progress=progress)
        if is_main_process():
            facts = {
                **stage._asdict(),
                "samples": stage.steps * stage.batch_size,
                "seed": seed,
                "processes": int(os.environ.get("WORLD_SIZE", "1")),  # as torchrun sets it
                "seconds_last_sitting": round(fitted.seconds, 1),
                "fingerprint": mark,
            }
            write_json(record, facts)
            temporary = folder / "weights.tmp"
            save_file({k: v.contiguous() for k, v in fitted.weights.items()}, temporary)
            temporary.replace(result)
        return fitted.weights
    return load_file(result)


@torch.no_grad()
def normalise_latents(vae: Any, images: torch.Tensor) -> None:
    """Sets the VAE's shift and scaling factors so that latents of images (N,3,H,W) have mean 0 and deviation 1."""
    mean = torch.cat(
        [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean.float() for part in images.split(128)]
    )
    vae.register_to_config(scaling_factor=round(1 / mean.std().item(), 6), shift_factor=round(mean.mean().item(), 6))


def _load(pipeline: Any, names: Sequence[str], weights: Mapping[str, torch.Tensor]) -> None:
    """Reads the weights of a stage, `NAME.*`, into these networks, which are frozen in fp32."""
    for name in names:
        part = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
        network = getattr(pipeline, name).float().requires_grad_(False)
        network.load_state_dict(part, strict=False)


def train_bundle(
    work: Path,
    seed: int,
    *,
    start: Path | None,
    stages: Mapping[str, Stage],
    world: World,
    progress: Progress | None,
) -> Any:
    """Trains `stages` in the folder `work` and returns the pipeline in fp32.

    Training starts from the weights of the bundle `start` (`mini train --from`); stages that are not trained keep
    them. The same call resumes."""
    work.mkdir(parents=True, exist_ok=True)
    pipeline = world.pipeline(start, work, seed, stages).to(training_device())
    before: list[Any] = [world.mark, weights_mark(start) if start else None]

    def run(name: str, objective: Any, batches: Any) -> dict[str, torch.Tensor]:
        weights = run_stage(name, objective, batches, stages[name], work, seed, progress, before)
        before.append([name, stages[name]])
        return weights

    if "autoencoder" in stages:
        weights = run("autoencoder", AutoencoderObjective(pipeline.vae), world.pictures)
        pipeline.vae.to(torch.float32).load_state_dict(weights)
        normalise_latents(pipeline.vae, world.some(seed, 1024))
    pipeline.vae.requires_grad_(False).to(torch.float32)
    batches = world.batches(pipeline.vae)
    if pipeline.device.type == "cpu":
        use_cpu_kernels(pipeline.transformer, pipeline.controlnet)
    if "base" in stages:
        objective = BaseObjective(pipeline)
        _load(pipeline, list(objective.parts), run("base", objective, batches))
        if not any(block.weight.any() for block in pipeline.controlnet.controlnet_blocks):  # not trained yet
            controlnet = from_transformer(pipeline.transformer, 23).to(pipeline.device)  # type: ignore[arg-type]
            pipeline.register_modules(controlnet=controlnet)
            if pipeline.device.type == "cpu":
                use_cpu_kernels(controlnet)
    if "teacher" in stages:
        weights = run("teacher", TeacherObjective(pipeline), batches)
        pipeline.controlnet.float().load_state_dict(weights, strict=False)
    if "joint" in stages:
        weights = run("joint", JointObjective(pipeline), batches)
        _load(pipeline, ("transformer", "controlnet"), weights)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.controlnet):
        part.float().requires_grad_(False).eval()
    return pipeline.to("cpu")


def save_bundle(pipeline: Any, classifier: Any, folder: Path, card: Mapping[str, Any]) -> None:
    """Publishes a complete diffusers pipeline folder in fp16, with the classifier and the card."""
    parts = ("vae", "transformer", "text_encoder", "text_encoder_2", "controlnet")
    halves = {name: copy.deepcopy(getattr(pipeline, name)).half() for name in parts}
    with publish_folder(folder, kind="bundle") as temporary:
        pipeline.__class__(**{**pipeline.components, **halves}).save_pretrained(temporary)
        if classifier is not None:
            tensors = {k: v.half().contiguous() for k, v in classifier.state_dict().items()}
            save_file(tensors, temporary / CLASSIFIER_WEIGHTS)
        write_json(temporary / CARD, card)


def _train_oracle(work: Path, seed: int, progress: Progress | None) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier()
    weights = run_stage("oracle", OracleObjective(classifier), CropBatches(), ORACLE, work, seed, progress)
    classifier.load_state_dict(weights)
    return classifier.eval()


def make_bundle(
    out: Path,
    seed: int = 0,
    *,
    start: Path | None = None,
    stages: Mapping[str, Stage] | None = None,
    count: int = 1000,
    world: World | None = None,
    progress: Progress | None = None,
) -> Mapping[str, Any]:
    """Trains the stages in `stages` (all by default), publishes `out/bundle` and returns its card.

    The bundle is published, measured on `count` images of its world, and published again with what was measured.
    `start` is a bundle to continue from, including its classifier; use another `seed` then, so that the scenes are new.
    The same call resumes an interrupted training. Raises what `fit` raises."""
    work, world, stages = out / "work", world or SceneWorld(), STAGES if stages is None else stages
    with only_writer(out) if is_main_process() else nullcontext():
        pipeline = train_bundle(work, seed, start=start, stages=stages, world=world, progress=progress)
        classifier = None
        if world.has_oracle:  # that of `start`, so that the numbers of all sittings can be compared
            classifier = load_classifier(start) if start else _train_oracle(work, seed, progress)
        if not is_main_process():
            return {}
        history = json.loads((start / CARD).read_text())["sittings"] if start else []
        sitting = {path.parent.name: json.loads(path.read_text()) for path in sorted(work.glob("*/stage.json"))}
        card = {
            **world.card,
            "max_sequence_length": 0,  # no T5: no zero tokens are appended, in training and inference alike
            "sittings": [*history, sitting],
            "machine": f"{platform.machine()}, torch {torch.__version__}",
        }
        save_bundle(pipeline, classifier, out / "bundle", card)
        if count:
            card |= {"skill": world.skill(out / "bundle", count)}
            save_bundle(pipeline, classifier, out / "bundle", card)
    write_json(out / "card.json", card)
    return card
