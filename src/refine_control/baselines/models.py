"""Table 2's other inpainting models, run by their stock classes: DreamShaper 8, SD2 and FLUX.1 inpainting.

Here is what they are and how they are loaded; `baselines.painting` runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)

from refine_control.config import Precision, SamplerConfig
from refine_control.errors import InvalidInputError, MissingError
from refine_control.models.components import load_network, read_json
from refine_control.models.devices import best_device
from refine_control.models.flux import FluxInpaintingControlNet
from refine_control.models.hub import folder_of

Kind = Literal["stable_diffusion", "flux"]


class Card(NamedTuple):
    """What is known of a baseline before it is loaded."""

    title: str
    hub_id: str
    kind: Kind
    num_inference_steps: int
    """As its authors recommend or, where they are silent, as its pipeline defaults; so the two scales below."""
    guidance_scale: float
    conditioning_scale: float
    """Factor on control residuals; a U-Net that takes the masked picture itself has none."""
    license: str
    paper: Mapping[str, float]
    """Its row of Table 2."""
    controlnet: str | None = None
    """Hub id of the ControlNet, where it is another repository."""


KNOWN: Mapping[str, Card] = MappingProxyType(
    {
        "dreamshaper8": Card(
            "DreamShaper 8 inpainting",
            "Lykon/dreamshaper-8-inpainting",
            "stable_diffusion",
            25,
            7.5,
            1.0,
            "CreativeML OpenRAIL-M",
            {"psnr": 18.3507, "ssim": 0.682, "fid": 55.10, "lpips": 0.1764, "cmmd": 0.0898},
        ),
        "sd2": Card(
            "SD2 inpainting",
            "sd2-community/stable-diffusion-2-inpainting",
            "stable_diffusion",
            50,
            7.5,
            1.0,
            "CreativeML OpenRAIL++-M; a mirror of stabilityai/stable-diffusion-2-inpainting, withdrawn in 2025",
            {"psnr": 19.0982, "ssim": 0.6889, "fid": 44.63, "lpips": 0.1514, "cmmd": 0.0442},
        ),
        "flux": Card(
            "FLUX.1-dev with alimama-creative's inpainting ControlNet, beta",
            "black-forest-labs/FLUX.1-dev",
            "flux",
            28,
            3.5,
            0.95,
            "FLUX.1 [dev] Non-Commercial License, transformer and ControlNet; the transformer's repository is gated",
            {"psnr": 20.5, "ssim": 0.7734, "fid": 39.62, "lpips": 0.1272, "cmmd": 0.0604},
            "alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta",
        ),
    }
)
FLUX_SIZE = 1024
"""Side in pixels that FLUX's ControlNet was trained for."""
_KINDS: Mapping[str, Kind] = {
    "StableDiffusionInpaintPipeline": "stable_diffusion",
    "FluxPipeline": "flux",
    "FluxControlNetPipeline": "flux",
}
_PARTS = ("scheduler", "vae", "unet", "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_WEIGHTS = ("model.safetensors", "model-0*.safetensors", "diffusion_pytorch_model.safetensors")
_WEIGHTS += ("diffusion_pytorch_model-0*.safetensors",)
_FILES = ["model_index.json", *(f"{p}/{f}" for p in _PARTS for f in ("*.json", "*.txt", "*.model", *_WEIGHTS))]
"""What is fetched of a repository: neither the safety checker nor fp16 copies nor single files of 5 to 24 GB."""


@dataclass(frozen=True)
class Baseline:
    """A loaded baseline, everything in it frozen."""

    name: str
    card: Card
    pipeline: Any = field(repr=False)
    size: int
    """Side in pixels at which it works; of a picture that is no square, the shorter side."""

    @property
    def denoiser(self) -> Any:
        """The U-Net or the transformer."""
        return self.pipeline.unet if self.card.kind == "stable_diffusion" else self.pipeline.transformer

    @property
    def controlnet(self) -> Any:
        """FLUX's; None beside a U-Net."""
        return self.pipeline.controlnet if self.card.kind == "flux" else None

    @property
    def multiple(self) -> int:
        """Pixels that width and height are a multiple of: the VAE's factor, twice that where latents are packed."""
        return self.pipeline.vae_scale_factor * (2 if self.card.kind == "flux" else 1)


class MeanInpaintPipeline(StableDiffusionInpaintPipeline):
    """Stock but for one method: the masked picture's latents are the VAE posterior's mean, not a draw, and fp32."""

    def _encode_vae_image(self, image: torch.Tensor, generator: Any) -> torch.Tensor:
        with torch.autocast(image.device.type, enabled=False):
            return self.vae.config["scaling_factor"] * self.vae.encode(image.to(self.vae.dtype)).latent_dist.mean


def load_baseline(
    name: str | Path,
    *,
    size: int | None = None,
    precision: Precision = "fp32",
    device: str | torch.device | None = None,
) -> Baseline:
    """A baseline by a short name of KNOWN, a folder in diffusers layout, or a hub id, loaded strictly.

    model_index.json says what it is. A FLUX folder holds its ControlNet in `controlnet/`. `size` is the side at which
    the baseline works, by default the one it was trained for; `precision` is the type of FLUX's transformer, ControlNet
    and text encoders; `device` is by default the GPU where there is one.
    Raises MissingError for weights that are not there, InvalidInputError for a folder of something else."""
    card, folder = KNOWN.get(str(name)), _folder(name)
    kind = _read_kind(folder)
    if kind == "stable_diffusion":
        pipeline = _load_stable_diffusion(folder)
        trained_size = pipeline.unet.config["sample_size"] * pipeline.vae_scale_factor
    else:
        pipeline, trained_size = _load_flux(folder, card.controlnet if card else None, precision), FLUX_SIZE
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(torch.device(device or best_device()))
    if card is None:  # the usual steps and scales of its kind
        like = KNOWN["sd2" if kind == "stable_diffusion" else "flux"]
        card = like._replace(
            title=folder.name, hub_id=str(folder), license="as the folder says", paper={}, controlnet=None
        )
    baseline = Baseline(str(name), card, pipeline, size or trained_size)
    if baseline.size < baseline.multiple or baseline.size % baseline.multiple:
        raise InvalidInputError(
            f"the size {baseline.size} does not suit {name}; give a multiple of {baseline.multiple} pixels"
        )
    return baseline


def cannot_be_had(name: str | Path) -> str | None:
    """Why the files of a baseline are neither here nor to be fetched, in a sentence; None once they are here."""
    card = KNOWN.get(str(name))
    try:
        _folder(name)
        if card and card.controlnet:
            _controlnet_folder(card.controlnet)
    except (InvalidInputError, MissingError) as error:
        return str(error)
    return None


def _folder(name: str | Path) -> Path:
    card = KNOWN.get(str(name))
    expected = f"one of {', '.join(KNOWN)}, a folder in diffusers layout with model_index.json, or a hub id"
    return folder_of(card.hub_id if card else name, _FILES, expected)


def _read_kind(folder: Path) -> Kind:
    index = read_json(folder / "model_index.json", "name a pipeline folder in diffusers layout")
    class_name = str(index.get("_class_name"))
    if class_name not in _KINDS:
        raise InvalidInputError(
            f"{folder} holds a {class_name}, which is no inpainting baseline; name a folder of {' or '.join(_KINDS)}"
        )
    return _KINDS[class_name]


def _load_pipeline(pipeline: Any, folder: Path, **parts: Any) -> Any:
    """The pipeline of loaded parts; tokenizers and scheduler come from the folder."""
    try:
        return pipeline.from_pretrained(folder, local_files_only=True, **parts)
    except Exception as error:  # diffusers and transformers share no error; all mean a folder at fault
        why = " ".join(str(error).split())[:200]
        raise InvalidInputError(f"{folder} cannot be loaded as a pipeline ({why}); copy it again") from error


def _load_stable_diffusion(folder: Path) -> MeanInpaintPipeline:
    from transformers import CLIPTextModel

    unet = load_network(UNet2DConditionModel, folder / "unet")
    if unet.config["in_channels"] != 9:
        raise InvalidInputError(
            f"the U-Net of {folder} takes {unet.config['in_channels']} channels, an inpainting one 9 (latents, mask, "
            "masked latents); name a checkpoint that was trained to inpaint"
        )
    vae = load_network(AutoencoderKL, folder / "vae")
    text_encoder = load_network(CLIPTextModel, folder / "text_encoder")
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return _load_pipeline(MeanInpaintPipeline, folder, unet=unet, vae=vae, text_encoder=text_encoder, **unused)


def _load_flux(folder: Path, controlnet: str | None, precision: Precision) -> FluxControlNetPipeline:
    from transformers import CLIPTextModel, T5EncoderModel

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    root = folder / "controlnet" if controlnet is None else _controlnet_folder(controlnet)
    if not root.is_dir():
        raise MissingError(
            f"{folder} holds no ControlNet; put {KNOWN['flux'].controlnet} into its folder `controlnet`, or name one"
        )
    return _load_pipeline(
        FluxControlNetPipeline,
        folder,
        controlnet=load_network(FluxInpaintingControlNet, root, dtype),
        transformer=load_network(FluxTransformer2DModel, folder / "transformer", dtype),
        text_encoder=load_network(CLIPTextModel, folder / "text_encoder", dtype),
        text_encoder_2=load_network(T5EncoderModel, folder / "text_encoder_2", dtype),
        vae=load_network(AutoencoderKL, folder / "vae"),
    )


def _controlnet_folder(name: str) -> Path:
    return folder_of(name, ["config.json", *_WEIGHTS], "a ControlNet folder in diffusers layout or a hub id")


def recommended(baseline: Baseline, sampler: SamplerConfig) -> SamplerConfig:
    """The sampler with the steps and scales that suit the baseline; seed and precision stay."""
    names = ("num_inference_steps", "guidance_scale", "conditioning_scale")
    return sampler.model_copy(update={name: getattr(baseline.card, name) for name in names})
