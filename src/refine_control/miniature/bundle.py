"""`refine-control mini train`: trains all stages and the classifier, measures the result, publishes the bundle."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from refine_control.config import OptimizerConfig, TrainingConfig
from refine_control.errors import InvalidInputError
from refine_control.miniature.obedience import WEIGHTS as CLASSIFIER_WEIGHTS
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.objectives import AutoencoderObjective, BaseObjective, JointObjective, TeacherObjective
from refine_control.miniature.oracle_training import CropBatches, OracleObjective
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
    from safetensors.torch import load_file, save_file

    folder = work / name
    result, record = folder / "weights.safetensors", folder / "stage.json"
    mark = hashlib.sha256(json.dumps([*before, name, stage, seed]).encode()).hexdigest()
    if result.exists() and (not record.is_file() or json.loads(record.read_text()).get("fingerprint") != mark):
        raise InvalidInputError(
            f"{folder} was trained with other steps, seed, start or images; choose another --out, or delete {work}"
        )
    if not result.exists():
        optimizer = OptimizerConfig(
            learning_rate=stage.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            schedule="cosine",
            warmup_steps=100,
            final_fraction=0.02,
        )
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
            seconds = round(fitted.seconds, 1)
            processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets it
            seen = {"samples": stage.steps * stage.batch_size, "seed": seed, "processes": processes}
            seen |= {"seconds_last_sitting": seconds, "fingerprint": mark}
            write_json(record, {**stage._asdict(), **seen})
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


def _has_control(pipeline: Any) -> bool:
    """Whether the ControlNet has been trained, so that its zero-linears are no longer zero."""
    return any(bool(block.weight.any()) for block in pipeline.controlnet.controlnet_blocks)


def train_bundle(
    out: Path,
    seed: int = 0,
    *,
    start: Path | None = None,
    stages: dict[str, Stage] | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Any:
    """Trains the stages named in `stages` (all by default) and returns the pipeline in fp32.

    Training starts from the weights of the bundle `start` (`mini train --from`); stages that are not trained keep
    them. Checkpoints are in `out/work`; the same call resumes."""
    stages = STAGES if stages is None else stages
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    world = world or SceneWorld()
    pipeline = world.pipeline(start, work, seed, stages).to(training_device())
    before: list[Any] = [world.mark, weights_mark(start) if start else None]

    def run(name: str, objective: Any, batches: Any) -> dict[str, torch.Tensor]:
        weights = run_stage(name, objective, batches, stages[name], work, seed, progress, before)
        before.append([name, stages[name]])
        return weights

    if "autoencoder" in stages:
        objective: Any = AutoencoderObjective(pipeline.vae, torch.bfloat16)
        weights = run("autoencoder", objective, world.pictures())
        pipeline.vae.to(torch.float32).load_state_dict(weights)
        normalise_latents(pipeline.vae, world.some(seed, 1024))
    pipeline.vae.requires_grad_(False).to(torch.float32)
    batches = world.batches(pipeline.vae)
    if pipeline.device.type == "cpu":
        use_cpu_kernels(pipeline.transformer, pipeline.controlnet)
    if "base" in stages:
        objective = BaseObjective(pipeline, torch.bfloat16)
        weights = run("base", objective, batches)
        for name, part in objective.parts.items():
            part.float().load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}, strict=False
            )
            part.requires_grad_(False)
        if not _has_control(pipeline):
            controlnet = from_transformer(pipeline.transformer, 23).to(pipeline.device)  # type: ignore[arg-type]
            pipeline.register_modules(controlnet=controlnet)
            if pipeline.device.type == "cpu":
                use_cpu_kernels(controlnet)
    if "teacher" in stages:
        objective = TeacherObjective(pipeline, torch.bfloat16)
        weights = run("teacher", objective, batches)
        pipeline.controlnet.float().load_state_dict(weights, strict=False)
    if "joint" in stages:
        objective = JointObjective(pipeline, torch.bfloat16)
        weights = run("joint", objective, batches)
        for name in ("transformer", "controlnet"):
            part = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
            getattr(pipeline, name).float().load_state_dict(part, strict=False)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.controlnet):
        part.float().requires_grad_(False).eval()
    return pipeline.to("cpu")


def save_bundle(pipeline: Any, classifier: Any, folder: Path, card: dict[str, Any]) -> None:
    """Publishes a complete diffusers pipeline folder in fp16, with the classifier and the card."""
    import copy

    from safetensors.torch import save_file

    parts = ("vae", "transformer", "text_encoder", "text_encoder_2", "controlnet")
    halves = {name: copy.deepcopy(getattr(pipeline, name)).half() for name in parts}
    with publish_folder(folder, kind="bundle") as temporary:
        pipeline.__class__(**{**pipeline.components, **halves}).save_pretrained(temporary)
        if classifier is not None:
            tensors = {k: v.half().contiguous() for k, v in classifier.state_dict().items()}
            save_file(tensors, temporary / CLASSIFIER_WEIGHTS)
        write_json(temporary / CARD, card)


def _trained_stages(work: Path) -> dict[str, Any]:
    """The content of each stage's `stage.json`: steps, samples, seconds."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(work.glob("*/stage.json"))}


def publish(
    pipeline: Any, classifier: Classifier | None, out: Path, work: Path, history: list[Any], count: int, world: World
) -> dict[str, Any]:
    """Publishes `out/bundle`, measures it on `count` images of its world, and publishes it again with the full card.

    `history` are the training sittings of the starting bundle."""
    card: dict[str, Any] = {
        **world.card,
        "max_sequence_length": 0,
        "sittings": [*history, _trained_stages(work)],
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    save_bundle(pipeline, classifier, out / "bundle", card)
    if count:
        card["skill"] = world.skill(out / "bundle", count)
        save_bundle(pipeline, classifier, out / "bundle", card)
    return card


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
    stages: dict[str, Stage] | None = None,
    count: int = 1000,
    world: World | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains the stages in `stages` (all by default), publishes `out/bundle` and returns its card.

    `start` is a bundle to continue from, including its classifier; use another `seed` then, so that the scenes are new.
    The same call resumes an interrupted training. Raises what `fit` raises."""
    work, world = out / "work", world or SceneWorld()
    with only_writer(out) if is_main_process() else nullcontext():
        pipeline = train_bundle(out, seed, start=start, stages=stages, world=world, progress=progress)
        classifier = world.oracle(start)
        if classifier is None and world.has_oracle:
            classifier = _train_oracle(work, seed, progress)
        if not is_main_process():
            return {}
        history = json.loads((start / CARD).read_text())["sittings"] if start else []
        card = publish(pipeline, classifier, out, work, history, count, world)
    write_json(out / "card.json", card)
    return card
