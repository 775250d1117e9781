"""The text tower of CMMD's CLIP, to measure whether a region shows what its prompt says."""

# n prompts of a batch, D width of the projection

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from refine_control.errors import MissingError
from refine_control.metrics.features.weights import CLIP, find_weights, load_strictly, read_weights

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

LARGE_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,  # as published: the embedding is taken at the highest token id
}
PARTS = ("text_model.", "text_projection.")
POSITIONS = "text_model.embeddings.position_ids"
TOKENIZER_FILES = ("vocab.json", "merges.txt")


class ClipText(NamedTuple):
    """The text tower and its tokenizer."""

    network: CLIPTextModelWithProjection
    tokenizer: Any


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
    load_strictly(network, {k: v for k, v in tensors.items() if k.startswith(PARTS) and k != POSITIONS}, "CLIP's text")
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
