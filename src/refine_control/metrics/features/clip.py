"""OpenAI's CLIP ViT-L/14 at 336 pixels: pictures, for CMMD, and prompts, projected and of length 1."""

# n pictures or prompts of a batch, H W pixels, S side of the network's input, D width of its projection

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from refine_control.errors import MissingError
from refine_control.metrics.features.batches import features_of, to_pixels
from refine_control.metrics.features.weights import CLIP, find_weights, load_strictly, read_weights
from refine_control.metrics.image_pairs import Images

if TYPE_CHECKING:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
LARGE_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,  # as published: the embedding is taken at the highest token id
}
TEXT = ("text_model.", "text_projection.")
"""Names of the text tower's tensors; the file holds both towers."""
UNUSED = ("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""In the file and in neither tower: positions are 0, 1, 2, ..., which today's classes compute."""
TOKENIZER_FILES = ("vocab.json", "merges.txt")


class ClipText(NamedTuple):
    """The text tower and its tokenizer."""

    network: CLIPTextModelWithProjection
    tokenizer: Any


def load_clip(weights: Path | None = None, device: str | torch.device = "cpu") -> CLIPVisionModelWithProjection:
    """The published network, fp32. `weights` is its file or a folder that holds it; without, it is looked for.

    Raises MissingError when it is nowhere, DamagedError for a file with another sha256."""
    from transformers import CLIPVisionConfig

    network = assemble(CLIPVisionConfig(**LARGE_336), read_weights(CLIP, weights))
    torch.nn.Module.to(network, device)  # transformers' own `to` is annotated as taking no device
    return network


def untrained(settings: Mapping[str, Any] = LARGE_336) -> CLIPVisionModelWithProjection:
    """A frozen network of that size with random weights, for benchmarks."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**settings)).eval().requires_grad_(False)


def assemble(config: CLIPVisionConfig, tensors: Mapping[str, torch.Tensor]) -> CLIPVisionModelWithProjection:
    """The picture tower of a CLIP. Raises InvalidInputError unless `tensors` hold it whole, and no more of it."""
    from transformers import CLIPVisionModelWithProjection

    network = CLIPVisionModelWithProjection(config)
    load_strictly(network, {k: v for k, v in tensors.items() if not k.startswith(TEXT) and k not in UNUSED}, "CLIP")
    return network


def clip_features(network: CLIPVisionModelWithProjection, images: Images, batch_size: int = 16) -> NDArray[np.float32]:
    """(N, H, W, 3) uint8 -> (N, 768) of length 1, for `distances.cmmd`.

    As published: the largest central square, resized by PIL's bicubic filter (which does antialias).
    Raises InvalidInputError for images of another form and for batch_size < 1."""
    side = network.config.image_size
    assert isinstance(side, int), "transformers allows a height and a width; CLIP's pictures are square"

    def compute(part: Images) -> torch.Tensor:
        pixels = to_pixels(np.stack([central_square(image, side) for image in part]), network) / 255.0
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (MEAN, STD))
        return torch.nn.functional.normalize(network(pixel_values=(pixels - mean) / std).image_embeds)

    return features_of(compute, images, batch_size)


def central_square(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(H, W, 3) -> (side, side, 3)."""
    height, width, _ = image.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = Image.fromarray(image[top : top + short, left : left + short])
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


def load_clip_text(weights: Path | None = None, device: str | torch.device = "cpu") -> ClipText:
    """The published tower, fp32; its tokenizer is expected in the folder of the weights.

    Raises MissingError when either is nowhere, DamagedError for weights with another sha256."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    folder = find_weights(CLIP, weights).parent
    lacking = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if lacking:
        raise MissingError(
            f"CLIP score not computed: needs {lacking[0]} beside the weights in {folder}; get it with "
            f"`hf download {CLIP.repository} {' '.join(TOKENIZER_FILES)}`"
        )
    network = assemble_text(CLIPTextConfig(**LARGE_TEXT), read_weights(CLIP, weights))
    torch.nn.Module.to(network, device)
    return ClipText(network, CLIPTokenizer(*(str(folder / name) for name in TOKENIZER_FILES)))


def assemble_text(config: CLIPTextConfig, tensors: Mapping[str, torch.Tensor]) -> CLIPTextModelWithProjection:
    """The text tower of a CLIP. Raises InvalidInputError unless `tensors` hold it whole, and no more of it."""
    from transformers import CLIPTextModelWithProjection

    network = CLIPTextModelWithProjection(config)
    load_strictly(network, {k: v for k, v in tensors.items() if k.startswith(TEXT) and k not in UNUSED}, "CLIP's text")
    return network


@torch.no_grad()
def text_features(clip: ClipText, prompts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
    """(N, D) of length 1; a prompt of more than 77 tokens is cut, as CLIP does."""
    device = next(clip.network.parameters()).device
    parts = []
    for first in range(0, len(prompts), batch_size):
        tokens = clip.tokenizer(
            list(prompts[first : first + batch_size]), padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(device)
        embeds = clip.network(**tokens).text_embeds
        parts.append(torch.nn.functional.normalize(embeds.float()).cpu().numpy())
    return np.concatenate(parts)
