"""`refine-control mini train`: the mini bundle from nothing but a seed, stage by stage, each resumable.

autoencoder -> base (transformer and both text encoders, text to image) -> teacher (23-layer inpainting
ControlNet on the frozen base) -> a complete diffusers pipeline folder with a card that says what it took.
Every stage runs in the one loop of this project; scenes are rendered as they are needed and never repeat
between stages. Nothing but rendered pictures is ever looked at.
"""

# B batch, H = W = 64 pixels, h = w = 8 latents

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from refine_control import flow
from refine_control.config import OptimizerConfig, SamplerConfig, TrainingConfig
from refine_control.data import scenes
from refine_control.data.vocabulary import COLOURS, SHAPES, local_prompt
from refine_control.evaluation.metrics import psnr
from refine_control.evaluation.obedience import WEIGHTS as CLASSIFIER_WEIGHTS
from refine_control.evaluation.obedience import load_classifier, obedience, read_regions
from refine_control.models.attention import use_plain_attention
from refine_control.models.backbone import encode_images, encode_prompts, masked_pixels, predict_velocity
from refine_control.models.controlnet import (
    control_cond,
    control_residuals,
    from_transformer,
    mask_at_latents,
    trainable_parameters,
)
from refine_control.models.loading import load_backbone, load_pipeline
from refine_control.models.mini import BUNDLE
from refine_control.pipeline import inpaint, make_pipeline
from refine_control.randomness import derive_seed, permutation
from refine_control.storage import publish_folder, write_json
from refine_control.training.loop import Draw, Progress, fit
from refine_control.training.stages import STAGES, Stage


class StageLosses(NamedTuple):
    """What a stage of the bundle logs."""

    loss: torch.Tensor
    inside: torch.Tensor
    """Mean square in the hole."""
    outside: torch.Tensor


class AutoencoderLosses(NamedTuple):
    """The terms of the autoencoder's loss."""

    loss: torch.Tensor
    squared: torch.Tensor
    absolute: torch.Tensor
    divergence: torch.Tensor


class SceneBatch(NamedTuple):
    """Encoded scenes: latents and masked_latents (B,16,h,w), mask (B,1,h,w) 1 = inpaint, prompts as text."""

    latents: torch.Tensor
    masked_latents: torch.Tensor
    mask: torch.Tensor
    local_prompts: list[str]
    global_prompts: list[str]


class PictureBatches:
    """Half scenes, half pictures with the statistics of photographs: (B,3,64,64) in [-1, 1]."""

    def batch(self, draw: Draw) -> torch.Tensor:
        """The pictures of a micro-batch; no picture is shown twice."""
        start = draw.step * 100_000 + draw.slots[0]
        return scenes.photo_mixture(derive_seed(draw.seed, draw.stage), start, len(draw.slots))


class SceneBatches:
    """Rendered scenes, encoded by the frozen autoencoder in bursts and shown `repeats` times with new noise.

    A slot's scenes depend on (seed, stage, slot, step) alone, so any number of processes sees the same."""

    def __init__(self, vae: Any, steps_in_pool: int = 32, repeats: int = 2):
        self.vae, self.steps_in_pool, self.repeats = vae, steps_in_pool, repeats
        self.pool: tuple[Any, SceneBatch] | None = None

    @torch.no_grad()
    def _encode(self, draw: Draw, number: int) -> SceneBatch:
        each = self.steps_in_pool // self.repeats
        rows = [scenes.render(derive_seed(draw.seed, draw.stage, slot), number * each, each) for slot in draw.slots]
        images = torch.cat([r.images for r in rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        masks = torch.cat([r.masks for r in rows])[:, None].float()
        parts = zip(images.split(64), masks.split(64), strict=True)
        encoded = [(encode_images(self.vae, i), encode_images(self.vae, masked_pixels(i, m))) for i, m in parts]
        latents = torch.cat([e[0] for e in encoded])
        return SceneBatch(
            latents,
            torch.cat([e[1] for e in encoded]),
            mask_at_latents(masks, latents),
            [p for r in rows for p in r.local_prompts],
            [p for r in rows for p in r.global_prompts],
        )

    def batch(self, draw: Draw) -> SceneBatch:
        """One scene for each slot."""
        number, within = divmod(draw.step, self.steps_in_pool)
        key = (draw.seed, draw.stage, number, tuple(draw.slots))
        if self.pool is None or self.pool[0] != key:
            self.pool = (key, self._encode(draw, number))
        each = self.steps_in_pool // self.repeats
        turn = permutation(derive_seed(draw.seed, draw.stage, "turn", number, within // each), each)[within % each]
        rows = np.arange(len(draw.slots)) * each + int(turn)
        pool = self.pool[1]
        index = torch.from_numpy(rows)
        return SceneBatch(
            pool.latents[index],
            pool.masked_latents[index],
            pool.mask[index],
            [pool.local_prompts[r] for r in rows],
            [pool.global_prompts[r] for r in rows],
        )


def draw_prompts(batch: SceneBatch, draw: Draw, local: float = 0.6, empty: float = 0.1) -> list[str]:
    """A prompt for each slot: empty, the target's own, or the whole scene's."""
    picks = draw.uniforms("prompt").tolist()
    return [
        "" if u < empty else (l if u < empty + local else g)
        for u, l, g in zip(picks, batch.local_prompts, batch.global_prompts, strict=True)
    ]


class AutoencoderObjective:
    """Mean square and a little absolute error of the reconstruction, with a slight pull to the unit normal."""

    def __init__(self, vae: Any, dtype: torch.dtype):
        self.vae = vae.to(dtype)

    def trainable(self) -> dict[str, nn.Parameter]:
        """All of the autoencoder."""
        return dict(self.vae.named_parameters())

    def losses(self, batch: torch.Tensor, draw: Draw) -> AutoencoderLosses:
        """The reparametrised reconstruction; batch (B,3,H,W) in [-1, 1]."""
        posterior = self.vae.encode(batch.to(self.vae.dtype)).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * draw.normals("posterior", *mean.shape[1:])
        error = self.vae.decode(latents.to(self.vae.dtype)).sample.float() - batch
        squared, absolute = error.square().mean(), error.abs().mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return AutoencoderLosses(squared + 0.05 * absolute + 3e-5 * divergence, squared, absolute, divergence)


def weighted_losses(error: torch.Tensor, mask: torch.Tensor, inside_weight: float) -> StageLosses:
    """Mean square error with the hole weighted `inside_weight` to 1: error (B,16,h,w), mask (B,1,h,w)."""
    square = error.float().square().mean(1, keepdim=True)
    loss = (square * (1 + (inside_weight - 1) * mask)).mean()
    return StageLosses(
        loss, (square * mask).sum() / mask.sum().clamp_min(1), (square * (1 - mask)).sum() / (1 - mask).sum()
    )


class BaseObjective:
    """Text to image: the transformer and both text encoders learn the velocity together."""

    def __init__(self, pipeline: Any, dtype: torch.dtype):
        self.pipeline = pipeline
        self.parts = {n: getattr(pipeline, n) for n in ("transformer", "text_encoder", "text_encoder_2")}
        for part in self.parts.values():
            part.to(dtype).requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """`transformer.*`, `text_encoder.*`, `text_encoder_2.*`."""
        return {f"{n}.{k}": v for n, part in self.parts.items() for k, v in part.named_parameters()}

    def losses(self, batch: SceneBatch, draw: Draw) -> StageLosses:
        """E ||v - v_hat||^2 with 60 % local, 30 % global and 10 % empty prompts."""
        sigmas = flow.logit_normal_sigmas(draw.normals("sigmas"))
        noise = draw.normals("noise", *batch.latents.shape[1:])
        embeds, pooled = encode_prompts(self.pipeline, draw_prompts(batch, draw), 0)
        noisy = flow.interpolate(batch.latents, noise, sigmas)
        predicted = predict_velocity(self.parts["transformer"], noisy, sigmas, embeds, pooled)
        return weighted_losses(predicted.float() - flow.velocity(batch.latents, noise), batch.mask, 1.0)


class TeacherObjective:
    """The 23-layer inpainting ControlNet on the frozen base; the hole weighs `inside_weight` times the rest."""

    def __init__(self, pipeline: Any, dtype: torch.dtype, inside_weight: float = 4.0):
        self.pipeline, self.inside_weight = pipeline, inside_weight
        for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
            part.to(dtype).requires_grad_(False)
        self.controlnet = pipeline.controlnet.to(dtype)
        self.parameters = trainable_parameters(self.controlnet)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The ControlNet without the last block's text stream."""
        return self.parameters

    def losses(self, batch: SceneBatch, draw: Draw) -> StageLosses:
        """E ||v - v_hat||^2, prompts as in the base; the same prompt goes to both networks."""
        sigmas = flow.logit_normal_sigmas(draw.normals("sigmas"))
        noise = draw.normals("noise", *batch.latents.shape[1:])
        with torch.no_grad():
            embeds, pooled = encode_prompts(self.pipeline, draw_prompts(batch, draw), 0)
        noisy = flow.interpolate(batch.latents, noise, sigmas)
        cond = control_cond(batch.masked_latents, batch.mask)
        residuals = control_residuals(self.controlnet, noisy, sigmas, embeds, cond, pooled.shape[-1])
        predicted = predict_velocity(self.pipeline.transformer, noisy, sigmas, embeds, pooled, residuals)
        return weighted_losses(predicted.float() - flow.velocity(batch.latents, noise), batch.mask, self.inside_weight)


def run_stage(
    name: str, objective: Any, batches: Any, stage: Stage, work: Path, seed: int, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Trains one stage in `work/<name>` (or reads its result where it is done) and returns its averaged weights.

    Writes `weights.safetensors` and `stage.json` (steps, samples seen, seconds) when done."""
    from safetensors.torch import load_file, save_file

    folder = work / name
    result = folder / "weights.safetensors"
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
        mark = hashlib.sha256(f"{stage}{seed}".encode()).hexdigest()
        fitted = fit(objective, batches, optimizer, training, folder, mark, progress=progress)
        if int(os.environ.get("RANK", "0")) == 0:
            temporary = folder / "weights.tmp"
            save_file({k: v.contiguous() for k, v in fitted.weights.items()}, temporary)
            temporary.replace(result)
            seen = {"samples": stage.steps * stage.batch_size, "seed": seed, "seconds_last_sitting": fitted.seconds}
            write_json(folder / "stage.json", {**stage._asdict(), **seen})
        return fitted.weights
    return load_file(result)


def new_pipeline(folder: Path, seed: int) -> Any:
    """A stock inpainting pipeline of new networks; the tokenizer's files go to `folder`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3ControlNetInpaintingPipeline

    from refine_control.models import mini

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = mini.write_tokenizer(folder / "tokenizer")
        transformer = mini.build_transformer()
        return StableDiffusion3ControlNetInpaintingPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=mini.build_vae(),
            text_encoder=mini.build_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=mini.build_text_encoder(len(tokenizer)),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
            controlnet=from_transformer(transformer, 23),
        )


@torch.no_grad()
def normalise_latents(vae: Any, seed: int, count: int = 1024) -> None:
    """Sets the VAE's shift and scaling factors so that latents of scenes have mean 0 and deviation 1."""
    images = scenes.render(derive_seed(seed, "normalise"), 0, count).images.permute(0, 3, 1, 2).float() / 127.5 - 1
    mean = torch.cat([vae.encode(part.to(vae.dtype)).latent_dist.mean.float() for part in images.split(128)])
    vae.register_to_config(scaling_factor=round(1 / mean.std().item(), 6), shift_factor=round(mean.mean().item(), 6))


def train_bundle(
    out: Path,
    seed: int = 0,
    *,
    start: Path | None = None,
    stages: dict[str, Stage] | None = None,
    progress: Progress | None = None,
) -> Any:
    """Trains the stages named in `stages` (all by default) and returns the pipeline in fp32.

    `start` is a bundle whose weights are the starting point (`mini train --from`); stages that are not
    trained keep its weights. Work and checkpoints live in `out/work`; the same call continues."""
    stages = STAGES if stages is None else stages
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(start) if start else new_pipeline(work, seed)
    if "autoencoder" in stages:
        objective: Any = AutoencoderObjective(pipeline.vae, torch.bfloat16)
        weights = run_stage("autoencoder", objective, PictureBatches(), stages["autoencoder"], work, seed, progress)
        pipeline.vae.to(torch.float32).load_state_dict(weights)
        normalise_latents(pipeline.vae, seed)
    pipeline.vae.requires_grad_(False).to(torch.float32)
    use_plain_attention(pipeline.transformer, pipeline.controlnet)
    if "base" in stages:
        objective = BaseObjective(pipeline, torch.bfloat16)
        weights = run_stage("base", objective, SceneBatches(pipeline.vae), stages["base"], work, seed, progress)
        for name, part in objective.parts.items():
            part.float().load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}, strict=False
            )
            part.requires_grad_(False)
        pipeline.register_modules(controlnet=from_transformer(pipeline.transformer, 23))
        use_plain_attention(pipeline.controlnet)
    if "teacher" in stages:
        objective = TeacherObjective(pipeline, torch.bfloat16)
        weights = run_stage("teacher", objective, SceneBatches(pipeline.vae), stages["teacher"], work, seed, progress)
        pipeline.controlnet.float().load_state_dict(weights, strict=False)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.controlnet):
        part.float().requires_grad_(False).eval()
    return pipeline


def save_bundle(pipeline: Any, classifier: Any, folder: Path, card: dict[str, Any]) -> None:
    """Publishes a complete diffusers pipeline folder in fp16, with the oracle and the card beside it."""
    import copy

    from safetensors.torch import save_file

    parts = ("vae", "transformer", "text_encoder", "text_encoder_2", "controlnet")
    halves = {name: copy.deepcopy(getattr(pipeline, name)).half() for name in parts}
    with publish_folder(folder, kind="bundle") as temporary:
        pipeline.__class__(**{**pipeline.components, **halves}).save_pretrained(temporary)
        tensors = {k: v.half().contiguous() for k, v in classifier.state_dict().items()}
        save_file(tensors, temporary / CLASSIFIER_WEIGHTS)
        write_json(temporary / "refine_control.json", card)


class Skill(NamedTuple):
    """Obedience in per cent of N scenes, and PSNR in dB."""

    colour: float
    shape: float
    both: float
    psnr_region: float
    psnr: float


def measure_skill(backbone: Any, classifier: Any, count: int, seed: int, sampler: SamplerConfig, prompts: str) -> Skill:
    """The teacher on unseen scenes with `local`, `empty` or `wrong` prompts (wrong: of another colour and shape).

    Obedience is always to the object that was there, so with an empty or a wrong prompt it must be at chance."""
    rendered = scenes.render(derive_seed(seed, "check"), 0, count)
    texts = {"local": rendered.local_prompts, "global": rendered.global_prompts, "empty": [""] * count}
    if prompts == "wrong":
        away = permutation(derive_seed(seed, "wrong"), count)
        colours, shapes = len(COLOURS), len(SHAPES)
        texts["wrong"] = [
            local_prompt(int(c + 1 + r % (colours - 1)) % colours, int(s + 1 + r % (shapes - 1)) % shapes)
            for c, s, r in zip(rendered.colour, rendered.shape, away, strict=True)
        ]
    pipeline = make_pipeline(backbone, backbone.pipeline.controlnet)
    images, masks = rendered.images.numpy(), rendered.masks.numpy()
    painted = inpaint(pipeline, backbone, images, masks, texts[prompts], sampler)
    obeyed = obedience(classifier, painted, masks, rendered.colour, rendered.shape)
    return Skill(
        *(100 * float(x.mean()) for x in (obeyed.colour, obeyed.shape, obeyed.both)),
        float(psnr(images, painted, masks).mean()),
        float(psnr(images, painted).mean()),
    )


CHECK_SAMPLER = SamplerConfig(num_inference_steps=20, guidance_scale=3.0, conditioning_scale=1.0)


def check_bundle(
    count: int = 200, seed: int = 0, bundle: Path | None = None, prompts: tuple[str, ...] = ("local", "empty", "wrong")
) -> dict[str, Any]:
    """`mini check`: the shipped weights measured again on `count` unseen scenes: VAE, oracle, teacher."""
    backbone = load_backbone(bundle or "mini", plain_attention=True)
    classifier = load_classifier(bundle or BUNDLE)
    rendered = scenes.render(derive_seed(seed, "check"), 0, count)
    pixels = rendered.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = backbone.decode_latents(backbone.encode_images(pixels))
    kept = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    seen = read_regions(classifier, rendered.images.numpy(), rendered.masks.numpy())
    noise = np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    guess = read_regions(classifier, noise, rendered.masks.numpy())
    out: dict[str, Any] = {
        "scenes": count,
        "autoencoder_psnr": float(psnr(rendered.images.numpy(), kept).mean()),
        "oracle_clean": {
            n: 100 * float((getattr(seen, n) == getattr(rendered, n)).mean()) for n in ("colour", "shape")
        },
        "oracle_noise": {
            n: 100 * float((getattr(guess, n) == getattr(rendered, n)).mean()) for n in ("colour", "shape")
        },
        "sampler": CHECK_SAMPLER.model_dump(mode="json"),
    }
    for kind in prompts:
        out[f"teacher_{kind}"] = measure_skill(backbone, classifier, count, seed, CHECK_SAMPLER, kind)._asdict()
    return out
