"""Recipes: the settings of a run in validated, frozen records. `recipe_files` reads them."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from refine_control.injection import Injection
from refine_control.records import INPAINT
from refine_control.strict_yaml import to_yaml


class Section(BaseModel):
    """A frozen record that takes no unknown key and coerces nothing but a whole number to a float."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Precision = Literal["fp32", "bf16"]
Engine = Literal["ddp", "fsdp2"]
Frozen = Literal["precision", "int8", "fp8"]
OptimizerKind = Literal["adamw", "adamw8bit"]
Offload = Literal["none", "mean", "moments"]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Period = Annotated[int, Field(ge=0)]


class StudentConfig(Section):
    """The small ControlNet and what it starts from."""

    num_layers: int = Field(
        default=12, ge=1, le=1024, description="control layers of the student; the paper has 12 for a teacher of 23"
    )
    num_single_layers: int = Field(
        default=0, ge=0, le=1024, description="FLUX: layers for single blocks, beside num_layers for double ones"
    )
    init: Literal["transformer", "teacher", "random"] = Field(
        default="transformer",
        description="first layers of the transformer (the paper), last layer of each teacher group, or random",
    )
    placement: Literal["equal", "relevance"] = Field(
        default="equal",
        description="sites that each layer feeds: groups of equal size (the paper), or groups in which the sites that "
        "matter most to this teacher share least, measured on the first cache of training",
    )
    seed: Seed = Field(default=0, description="seed of a random initialisation, of LoRA's, and of what placement draws")
    backbone: Literal["frozen", "lora", "whole"] = Field(
        default="frozen",
        description="transformer that the student steers: the model's, its LoRA adapters trained too, or all of it",
    )
    lora_rank: int = Field(default=16, ge=1, le=1024, description="rank of the adapters, whose scale is 1")


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


FEW_STEP_KINDS = frozenset({"codi", "end_points", "windows", "guidance", "phases"})


class FewStepConfig(Section):
    """The objectives for sampling in few steps (`consistency`); an objective reads the settings that it has."""

    data: Literal["labeled", "unlabeled"] = Field(
        default="unlabeled", description="data set whose samples the teacher completed; the ground truth is of D_sl"
    )
    teacher_guidance: float = Field(
        default=3.0, ge=1, le=100, description="guidance scale of the frozen network, which the student learns"
    )
    steps: int = Field(
        default=4, ge=1, le=64, description="knots of the path, windows or phases: the most steps it is made for"
    )
    points: Literal["path", "line"] = Field(
        default="path", description="end_points: knots of the teacher's path, or lines from completion to its noise"
    )
    rollout: Fraction = Field(
        default=0.0, description="end_points: share of the points below pure noise that the student's own steps reach"
    )
    first: Fraction = Field(default=0.0, description="share of the samples at pure noise, where one step begins")
    data_weight: Weight = Field(default=1.0, description="factor of the term that compares with data")
    consistency: Weight = Field(default=1.0, description="factor of the consistency term")
    weighting: Literal["one", "codi"] = Field(
        default="one", description="w(t) of the velocity consistency: 1, or CoDi's (1 - t)(1 - s)"
    )
    dt: float = Field(
        default=0.05, gt=0, lt=1, description="step of the consistency term on the unshifted noise levels from 1 to 0"
    )
    ode: Literal["own", "frozen", "none"] = Field(
        default="own",
        description="what makes the second point: the student's own step, the frozen network's guided one, or the "
        "sample's own noise at the lower level",
    )
    shared_level: bool = Field(default=False, description="one noise level for the whole batch, or one a sample")
    distance: Literal["latent", "encoded", "pixel", "perceptual"] = Field(
        default="latent", description="CoDi's data term: on latents, on encode(decode), on pixels, on VAE features"
    )
    huber: float = Field(default=0.0, ge=0, le=1e3, description="phases: constant of the pseudo-Huber loss; 0 is l2")


class ObjectiveConfig(Section):
    """What is minimised."""

    kind: Literal[
        "supervised",
        "self_supervised",
        "from_scratch",
        "mixed",
        "one_to_one",
        "codi",
        "end_points",
        "windows",
        "guidance",
        "phases",
    ] = Field(
        default="supervised",
        description="Eq. 1 (stage 1), Eq. 6 (stage 2), Eq. 3 alone without the teacher (Student_fc), Eq. 1 and 6 mixed "
        "in every batch (one_stage), SSD-1B's loss with one-to-one layer terms (Student_ssd); or, for few steps: CoDi, "
        "end points or windows of the teacher's guided path, its guided velocity, consistency within phases (LCM, PCM)",
    )
    weights: LossWeights = Field(default_factory=LossWeights, description="factors of the terms")
    x0_source: Literal["masked", "teacher", "truth"] = Field(
        default="masked",
        description="clean latents of stage 2: of the masked image, or the teacher's cached completion; for few steps: "
        "that completion, or the ground truth of D_sl",
    )
    few_step: FewStepConfig = Field(
        default_factory=lambda: FewStepConfig(), description="settings of the objectives for few steps"
    )
    feature_normalisation: Literal["none", "layer"] = Field(
        default="none",
        description="none is the paper; layer divides each term of Eq. 5 by the mean square of its teacher totals",
    )

    @property
    def is_few_step(self) -> bool:
        """Whether the student is to be sampled in few steps without guidance."""
        return self.kind in FEW_STEP_KINDS

    @property
    def reads_paths(self) -> bool:
        """Whether it reads points of the teacher's path from the cache, beside the completion."""
        return self.kind == "windows" or (self.kind == "end_points" and self.few_step.points == "path")

    @model_validator(mode="after")
    def _x0_fits(self) -> ObjectiveConfig:
        if self.is_few_step and self.x0_source == "masked":
            raise ValueError(f"kind {self.kind} needs x0_source teacher or truth: the masked image is no clean picture")
        if self.kind in ("end_points", "windows") and self.x0_source == "truth":
            raise ValueError(f"kind {self.kind} follows the teacher's path and needs x0_source teacher")
        if self.x0_source == "truth" and not self.is_few_step:
            raise ValueError(f"x0_source truth is for objectives of few steps; kind {self.kind} knows its own")
        return self

    @model_validator(mode="after")
    def _learns(self) -> ObjectiveConfig:
        few, terms = self.few_step, {"windows": "data_weight", "guidance": "data_weight", "phases": "consistency"}
        names = [terms[self.kind]] if self.kind in terms else ["data_weight", "consistency"]
        if self.is_few_step and not any(getattr(few, name) for name in names):
            raise ValueError(f"kind {self.kind} has no loss where few_step.{' and '.join(names)} is 0; raise it")
        if self.kind == "end_points" and few.points == "path" and few.steps > 1 and not few.first:
            raise ValueError("kind end_points begins at pure noise in a share of few_step.first, which is 0; raise it")
        return self

    @property
    def roles(self) -> tuple[Literal["labeled", "unlabeled"], ...]:
        """The data sets that it learns from, as `DataConfig` names them."""
        if self.is_few_step:
            return ("labeled",) if self.x0_source == "truth" else (self.few_step.data,)
        if self.kind == "mixed":
            return ("labeled", "unlabeled")
        return ("unlabeled",) if self.kind == "self_supervised" else ("labeled",)


class OptimizerConfig(Section):
    """AdamW and its learning rate, a pure function of the step."""

    kind: OptimizerKind = Field(
        default="adamw", description="moments in fp32, or in 8 bits with a scale for each block (needs torchao)"
    )
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
    steps: int = Field(default=1000, ge=1, le=99_999_999, description="optimiser updates")
    batch_size: int = Field(default=8, ge=1, le=65536, description="samples of one update over all devices")
    device_batch_size: int = Field(
        default=0, ge=0, description="samples on one device at once, a divisor of batch_size; 0 is batch_size"
    )
    seed: Seed = Field(default=0, description="seed of order, masks, sigmas, noise and dropout")
    precision: Precision = Field(default="fp32", description="arithmetic of the forward passes; weights are fp32")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the weights' running mean for each step; 0 is none"
    )
    prompt_dropout: Fraction = Field(default=0.1, description="probability of an empty prompt, the teacher's too")
    conditioning_scale: float = Field(default=1.0, gt=0, le=2, description="factor on the control residuals")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, 1.25 times the work"
    )
    checkpointed_blocks: int = Field(
        default=0, ge=0, description="blocks that recompute, the student's first, then the transformer's; 0 is all"
    )
    frozen: Frozen = Field(
        default="precision",
        description="weights of frozen transformer and teacher: in the type of precision; or in 8 bits, a scale for "
        "each row: int8, whose products are in that type, or fp8, whose forward products are in fp8",
    )
    memory: Literal["recipe", "auto"] = Field(
        default="recipe",
        description="auto chooses device_batch_size, offload, checkpointing, optimizer.kind and frozen for the device",
    )
    offload: Offload = Field(
        default="none",
        description="what is in the host's memory between the updates on a GPU: nothing, the running mean, or the mean "
        "and the optimizer's moments",
    )
    compile: bool = Field(default=False, description="torch.compile the networks")
    engine: Engine = Field(
        default="ddp",
        description="of several processes: each has the whole student and gradients are averaged (ddp), or each has a "
        "part of every parameter, moment and mean (fsdp2); one process reads it not",
    )
    save_every: Period = Field(default=500, description="steps between checkpoints; 0 saves at the end alone")
    log_every: int = Field(default=10, ge=1, description="steps between lines of metrics")
    validate_every: Period = Field(default=0, description="steps between validations; 0 is never")
    num_validation_images: int = Field(default=16, ge=1, description="images of a validation")
    threads: int = Field(default=0, ge=0, le=4096, description="CPU threads; 0 is all")

    @model_validator(mode="after")
    def _device_batch_divides(self) -> TrainingConfig:
        if self.device_batch_size and self.batch_size % self.device_batch_size:
            raise ValueError(f"device_batch_size {self.device_batch_size} does not divide batch_size {self.batch_size}")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingConfig:
        if self.checkpointed_blocks and not self.gradient_checkpointing:
            raise ValueError("checkpointed_blocks needs gradient_checkpointing true")
        if self.frozen == "fp8" and self.precision != "bf16":
            raise ValueError("frozen fp8 needs precision bf16")
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
    sigmas: Literal["scheduler", "even"] = Field(
        default="scheduler", description="noise levels: as the model's scheduler spaces them, or evenly, then shifted"
    )
    stochastic: bool = Field(
        default=False, description="fresh noise in every step (LCM) in place of the deterministic path"
    )
    injection: Injection = Field(
        default="exact", description="which residual feeds which block: as trained, or by the rule of stock diffusers"
    )
    latents: Literal["mean", "sample"] = Field(
        default="mean", description="masked latents: mean of the VAE posterior or a draw"
    )
    precision: Precision = Field(
        default="fp32", description="arithmetic of transformer and ControlNet; the VAE and the steps are fp32"
    )


CHOSEN_BY_MODEL = frozenset({"num_inference_steps", "guidance_scale", "conditioning_scale", "sigmas", "stochastic"})
"""Settings of a sampler that belong to the model; the others are the user's."""


class StudentCard(Section):
    """What the folder of a student for few steps, or of a teacher of the mini model, says of it."""

    condition: str = Field(default=INPAINT, description="what it is shown beside the prompt")
    sampling: SamplerConfig = Field(description="how it is to be sampled; seed, precision and the like are not kept")
    most_steps: int = Field(ge=1, le=1000, description="the most sampling steps that it was trained for")
    distilled_guidance: float = Field(ge=1, le=100, description="guidance scale that it has learnt; 1 is none")
    license: str | None = Field(default=None, description="of the weights, as an SPDX identifier")
    trained_by: str | None = Field(default=None, description="the command that trained it")
    skill: dict[str, dict[str, float]] | None = Field(
        default=None, description="what was measured, by way of sampling: per cent of prompts obeyed, PSNR in dB"
    )

    @property
    def fields(self) -> dict[str, Any]:
        """The settings of a sampler that the card gives."""
        return self.sampling.model_dump(include=set(CHOSEN_BY_MODEL))


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

    @model_validator(mode="after")
    def _backbone_fits(self) -> Recipe:
        if self.student.backbone != "frozen" and not self.objective.is_few_step:
            kind = self.objective.kind
            raise ValueError(f"student.backbone {self.student.backbone} is for few steps; kind {kind} needs frozen")
        if self.student.backbone != "frozen" and self.training.frozen != "precision":
            raise ValueError(f"training.frozen {self.training.frozen} needs student.backbone frozen")
        return self


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


def fingerprint(recipe: Recipe) -> str:
    """Hex sha256 of the settings that differ from the defaults: equal recipes have equal fingerprints.

    Defaults are left out, so a new setting whose default is the earlier behaviour keeps old results valid. A change of
    a default requires a new `rows.FORMAT`."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json"))
