"""Painting with an exported pipeline: numpy and ONNX Runtime or OpenVINO, without torch."""

# H W pixels, B batch, h w latents, T text tokens

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models.card import sampler_by_card
from refine_control.models.fit import Geometry
from refine_control.models.words import cut_warnings, only_known, unknown_words_warning
from refine_control.progress import Progress
from refine_control.records import INPAINT
from refine_control.runtime.description import read_description
from refine_control.runtime.engines import Engine, open_graph
from refine_control.runtime.noise import slot_normals
from refine_control.runtime.tokens import TextTokenizer, join_embeddings

logger = logging.getLogger(__name__)
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_TRAIN_TIMESTEPS = 1000


def _shifted(sigmas: Any, shift: float) -> Any:
    """As `flow.shift_sigmas`."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sampling_sigmas(sampler: SamplerConfig, shift: float) -> np.ndarray:
    """The noise levels of a sampler, (steps + 1,) float32 from 1 to 0: even ones, then shifted, or those of stock's
    FlowMatchEulerDiscreteScheduler, which shifts its range and the levels in it (diffusers#13243)."""
    steps = sampler.num_inference_steps
    if sampler.sigmas == "even":
        return _shifted(np.linspace(1, 0, steps + 1, dtype=np.float32), shift)
    least = _shifted(1 / _TRAIN_TIMESTEPS, shift)
    return np.append(_shifted(np.linspace(1, least, steps), shift), 0).astype(np.float32)


class ExportedPipeline:
    """The folder of an exported pipeline, loaded. Its pictures are those of `pipeline.painting.paint` but for
    rounding and for what the precision of the export costs."""

    def __init__(self, folder: str | Path, threads: int | None = None):
        """`threads` compute; None: OMP_NUM_THREADS or the CPUs of this process.

        Raises InvalidInputError where `folder` is no exported pipeline, DamagedError for files that differ from its
        manifest or cannot be loaded, MissingError where its engine is not installed."""
        self.folder = Path(folder)
        self.description = about = read_description(self.folder)
        files = {part: self.folder / file for part, file in about.parts.items()}
        self._graphs: dict[str, Engine] = {
            part: open_graph(about.engine, file, about.precision, threads) for part, file in files.items()
        }
        self._tokenizers = {name: TextTokenizer(self.folder / file) for name, file in about.tokenizers.items()}
        self._encode = lru_cache(maxsize=32)(self._encode_prompt)

    @property
    def geometry(self) -> Geometry:
        """The sizes that it paints."""
        return self.description.geometry

    def choose_sampler(self, given: Mapping[str, Any]) -> SamplerConfig:
        """The sampler with the `given` fields (None: not given) and else the export's; warns as `sampler_by_card`."""
        return sampler_by_card(self.description.card, self.folder, given, self.description.sampling.model_dump())

    def paint(
        self,
        image: np.ndarray,
        mask: np.ndarray | None,
        prompt: str,
        sampler: SamplerConfig,
        progress: Progress | None = None,
        *,
        slot: int = 0,
    ) -> np.ndarray:
        """Paints a picture -> (H,W,3) uint8, uncomposited. Its noise is a function of (sampler.seed, slot).

        `image` (H,W,3) uint8 and `mask` (H,W) bool, True = paint; for a condition without a region the condition
        picture and None. Logs a warning of what of the prompt is not read. Raises InvalidInputError for a size, a mask
        or a sampler that the export does not take."""
        self._check(image, mask, sampler)
        cond = self._control_cond(image, mask)
        noise_shape = (self.description.latent_channels, *cond.shape[2:])
        latents = slot_normals(noise_shape, [slot], sampler.seed, "initial noise")
        prompts = [prompt, ""] if sampler.guidance_scale > 1 else [prompt]
        embeds, pooled = (np.concatenate(parts) for parts in zip(*map(self._encode, prompts), strict=True))
        constant = {
            "control_cond": cond.repeat(len(prompts), 0),
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "conditioning_scale": np.array(sampler.conditioning_scale, np.float32),
        }
        levels = sampling_sigmas(sampler, self.description.shift)
        for step, (sigma, following) in enumerate(pairwise(levels)):
            noisy = latents.repeat(len(prompts), 0)
            v, *v_empty = np.split(self._velocity({**constant, "noisy_latents": noisy}, sigma), len(prompts))
            if v_empty:
                v = v_empty[0] + np.float32(sampler.guidance_scale) * (v - v_empty[0])
            if sampler.stochastic:
                fresh = slot_normals(noise_shape, [slot], sampler.seed, "fresh noise", step)
                latents = (1 - following) * (latents - sigma * v) + following * fresh
            else:
                latents = latents + (following - sigma) * v
            if progress:
                progress(step + 1, len(levels) - 1, "paint")
        pixels = self._graphs["vae_decoder"]({"latents": latents})[0][0]
        return np.rint((pixels / 2 + 0.5).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)

    def _check(self, image: np.ndarray, mask: np.ndarray | None, sampler: SamplerConfig) -> None:
        """Raises InvalidInputError for what `paint` cannot take."""
        self.geometry.check(*image.shape[:2])
        region = self.description.condition == INPAINT
        if region != (mask is not None) or (mask is not None and mask.shape != image.shape[:2]):
            needs = "a mask of the picture's size" if region else "no mask"
            raise InvalidInputError(f"the condition {self.description.condition} of {self.folder} takes {needs}")
        for name, only in (("injection", "exact"), ("latents", "mean"), ("precision", "fp32")):
            if (value := getattr(sampler, name)) != only:
                raise InvalidInputError(
                    f"sampler.{name} is {value}; an exported pipeline has no such choice: set it to {only}"
                )

    def _control_cond(self, image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """What the ControlNet reads, (1,17,h,w), or (1,16,h,w) without a region; as `conditions.condition`."""
        pixels = image.astype(np.float32) / np.float32(127.5) - 1
        if mask is not None:
            pixels = np.where(mask[..., None], np.float32(-1), pixels)
        latents = self._graphs["vae_encoder"]({"pixel_values": pixels.transpose(2, 0, 1)[None].copy()})[0]
        if mask is None:
            return latents
        factor = self.description.downscale
        kept = (~mask[::factor, ::factor]).astype(np.float32)  # nearest neighbour
        return np.concatenate([latents, kept[None, None]], axis=1)

    def _velocity(self, arrays: dict[str, np.ndarray], sigma: np.float32) -> np.ndarray:
        """v(x_t, sigma) (B,16,h,w) of `noisy_latents` (B,16,h,w)."""
        arrays = {**arrays, "sigmas": np.full(len(arrays["noisy_latents"]), sigma, np.float32)}
        if denoiser := self._graphs.get("denoiser"):
            return denoiser(arrays)[0]
        residuals, layers = self._graphs["controlnet"](arrays), self.description.layer_of_site
        sites = [residuals[layer] for layer in layers or ()]
        return self._graphs["transformer"]({**arrays, **{f"residual_{i}": each for i, each in enumerate(sites)}})[0]

    def _encode_prompt(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """prompt_embeds (1,T,D) and pooled_prompt_embeds (1,P); warns of what is not read."""
        about = self.description
        readable = prompt if about.vocabulary is None else only_known(prompt, about.vocabulary)
        ignored = [unknown_words_warning([prompt], about.vocabulary)] if about.vocabulary is not None else []
        limits = [(name, tokenizer, tokenizer.length) for name, tokenizer in self._tokenizers.items()]
        for warning in (*cut_warnings(limits, [readable]), *filter(None, ignored)):
            logger.warning("%s", warning)
        first, second, *t5 = [
            self._graphs[name]({"input_ids": self._tokenizers[name].ids([readable])})
            for name in _ENCODERS
            if name in self._graphs
        ]
        width = about.text_width or first[0].shape[-1] + second[0].shape[-1]
        clips = [first[0], second[0]]
        embeds = join_embeddings(clips, t5[0][0] if t5 else None, about.max_sequence_length, width)
        return embeds, np.concatenate([first[1], second[1]], axis=-1)
