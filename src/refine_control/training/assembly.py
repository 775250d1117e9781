"""The networks and the objective of a recipe, put together: from loaded parts, or by configs without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from refine_control.config import ObjectiveConfig, Recipe
from refine_control.errors import InvalidInputError
from refine_control.models.backbone import Backbone
from refine_control.models.controlnet import ControlNet, build_student, layer_modules
from refine_control.models.cpu_kernels import use_cpu_kernels
from refine_control.models.own_transformer import LORA, set_lora, trainable_copy
from refine_control.models.quantised import quantise, refuse_fp8
from refine_control.models.skeleton import skeleton
from refine_control.training.few_step import FewStep
from refine_control.training.few_step import asks_teacher as few_step_asks_teacher
from refine_control.training.loop import Objective
from refine_control.training.objectives import KINDS, Distillation, Networks

META = torch.device("meta")


def trainable_backbone(recipe: Recipe, backbone: Backbone, start: Backbone, saved: Path | None) -> Backbone:
    """`backbone`, or the one around the transformer to be trained: that of `start`, which is `saved` in a folder.

    Raises InvalidInputError where the recipe does not train what was trained before."""
    kind, held = recipe.student.backbone, saved and ("lora" if saved.name == LORA else "whole")
    if held and kind not in (held, "whole"):
        raise InvalidInputError(
            f"init_from {recipe.init_from} was trained with student.backbone {held} and the recipe has {kind}; set "
            f"student.backbone to {held}"
        )
    if kind == "frozen":
        return backbone
    if backbone.is_flux:
        raise InvalidInputError(f"student.backbone is {kind}, and FLUX's transformer is not trained; set it to frozen")
    transformer = start.transformer if kind == "whole" else backbone.transformer
    trainable = trainable_copy(transformer, kind, recipe.student.lora_rank, recipe.student.seed)
    if saved and kind == "lora":
        set_lora(trainable, saved)
    return backbone.with_transformer(trainable)


def make_objective(config: ObjectiveConfig, networks: Networks) -> Objective:
    """The objective that a recipe names."""
    if config.is_few_step:
        return FewStep(networks, config)
    return Distillation(networks, KINDS[config.kind], config.weights, config.feature_normalisation == "layer")


def asks_teacher(config: ObjectiveConfig) -> bool:
    """Whether the teacher runs in training."""
    return few_step_asks_teacher(config) if config.is_few_step else config.kind != "from_scratch"


def reads_teacher(recipe: Recipe) -> bool:
    """Whether a run depends on a teacher. One for few steps that learns the ground truth from the prior does not."""
    alone = recipe.objective.is_few_step and recipe.objective.x0_source == "truth" and not recipe.init_from
    starts = recipe.student.init == "teacher" or recipe.student.placement == "relevance"
    return not alone or starts or asks_teacher(recipe.objective)


def assemble(
    recipe: Recipe,
    backbone: Backbone,
    student_backbone: Backbone,
    student: ControlNet,
    device: torch.device,
    *,
    cpu_kernels: bool,
    teacher_mark: str = "",
) -> Networks:
    """The parts of a run on `device`, in its precision, as the recipe trains them.

    Raises InvalidInputError for frozen weights in a type that the device does not compute in."""
    if recipe.training.frozen == "fp8":
        refuse_fp8(device)
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    teacher = backbone.pipeline.controlnet if asks_teacher(recipe.objective) else None
    transformers: list[Any] = list(dict.fromkeys([backbone.transformer, student_backbone.transformer]))
    controlnets: list[Any] = (
        [student] if backbone.pipeline.controlnet is None else [backbone.pipeline.controlnet, student]
    )
    if cpu_kernels and not recipe.training.compile:  # inductor takes no oneDNN product whose weights change
        use_cpu_kernels(*transformers, *controlnets)
    for part in (backbone.transformer, *([teacher] if teacher is not None else [])):
        part.to(dtype)  # type: ignore[arg-type]
        if recipe.training.frozen != "precision":  # before they go to a device that may not hold them whole
            quantise(part, recipe.training.frozen)
    for part in (*transformers, student, *([teacher] if teacher is not None else []), *beside(recipe, backbone)):
        part.to(device)  # type: ignore[arg-type]
    if recipe.training.gradient_checkpointing:
        recompute(recipe.training.checkpointed_blocks, student, *transformers)
    if recipe.training.compile:
        compile_blocks(*transformers, *controlnets)
    options = {"sigmas": recipe.sigmas, "conditioning_scale": recipe.training.conditioning_scale}
    options |= {"guidance_scale": recipe.sampler.guidance_scale}
    options |= {"student_backbone": student_backbone, "teacher_mark": teacher_mark}
    return Networks(backbone, teacher, student, dtype=dtype, **options)


def compile_blocks(*networks: Any) -> None:
    """Compiles the blocks of the networks, each kind of block once.

    All blocks share one `forward`, of which torch compiles a variant for each kind: with and without a graph, frozen or
    trained, first, last or between. These are more than the 8 after which it runs the rest without compilation."""
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, 64)
    for network in networks:
        for block in layer_modules(network):
            block.compile()


def recompute(count: int, *networks: Any) -> None:
    """Checkpoints the first `count` blocks of the networks in the order that they are given; of 0 all."""
    blocks = [block for network in networks for block in network.transformer_blocks]
    chosen = {id(block) for block in (blocks[:count] if count else blocks)}

    def run(block: Any, *inputs: Any) -> Any:
        return checkpoint(block.__call__, *inputs, use_reentrant=False) if id(block) in chosen else block(*inputs)

    for network in networks:
        network.enable_gradient_checkpointing(run)


def beside(recipe: Recipe, backbone: Backbone) -> list[Any]:
    """Networks that a run needs on its device beside transformer and ControlNets: VAE and text encoders, in fp32."""
    shows = recipe.training.validate_every or recipe.objective.few_step.distance != "latent"
    # as `cache` runs them, whatever the precision
    encoders = backbone.text_encoders if recipe.data.prompts == "encode" else []
    return [*([backbone.vae] if shows else []), *encoders]


def shape_of_run(recipe: Recipe, cpu_kernels: bool, device: torch.device = META) -> Networks:
    """The networks of a recipe on the meta device, by configs alone: what `prepare` gives, without weights.

    On another `device` with random weights, for measurements."""
    backbone = skeleton(recipe.model, recipe.teacher, controlled=reads_teacher(recipe), device=device)
    config, teacher = recipe.student, backbone.pipeline.controlnet
    with torch.device(device):
        # groups by relevance are measured on samples and have the sizes of equal ones
        start = config.num_layers, config.init, config.seed
        student = build_student(backbone.transformer, teacher, *start, num_single_layers=config.num_single_layers)
        started = trainable_backbone(recipe, backbone, backbone, None)
    compiled = recipe.training.compile and device != META
    training = recipe.training.model_copy(update={"compile": compiled})
    return assemble(
        recipe.model_copy(update={"training": training}), backbone, started, student, device, cpu_kernels=cpu_kernels
    )
