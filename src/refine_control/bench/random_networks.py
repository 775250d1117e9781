"""Networks of a recipe's shapes with random weights, for measurements where the weights are gated or not at hand."""

# T tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from refine_control.config import Recipe
from refine_control.models.backbone import Backbone
from refine_control.training.assembly import shape_of_run
from refine_control.training.objectives import Networks

_SEED, _SCALE = 0, 0.02
_ZERO_AT_BIRTH = ("controlnet_blocks.", "pos_embed_input.")
"""Layers of a ControlNet that start at zero."""


class _Ids(dict[str, object]):
    """What a tokenizer returns: an entry, and an attribute of the same name."""

    @property
    def input_ids(self) -> object:
        return self["input_ids"]


class RandomTokens:
    """Stands in for a tokenizer: the same random token numbers for every prompt."""

    is_fast = False

    def __init__(self, vocabulary: int, length: int):
        self.model_max_length = length
        generator = torch.Generator().manual_seed(_SEED)
        self.tokens = torch.randint(vocabulary, (length,), generator=generator)

    def __call__(self, prompts: str | Sequence[str], **_: Any) -> _Ids:
        """`input_ids`, (B,T), or T numbers for one prompt."""
        ids: Any = self.tokens.tolist() if isinstance(prompts, str) else self.tokens.expand(len(prompts), -1)
        return _Ids(input_ids=ids)


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_networks(recipe: Recipe, device: torch.device, text: bool = False) -> Networks:
    """What `prepare` gives, with equal weights in every process; rounded to bf16, so that both types have them.

    Without `text` the text encoders stay on the meta device."""
    torch.manual_seed(_SEED)
    with _default_type(torch.bfloat16):
        networks = shape_of_run(recipe, device.type == "cpu", device)
    networks.backbone.vae.float()
    masters, generator = networks.trainable.masters, torch.Generator().manual_seed(_SEED)
    trained = networks.trainable.parameters
    with torch.no_grad():
        for network in (networks.teacher, networks.student):
            for name, parameter in network.named_parameters() if network is not None else ():
                if name.startswith(_ZERO_AT_BIRTH):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(_SCALE).bfloat16())
                    if network is networks.student and name in trained and masters[name] is not trained[name]:
                        masters[name].copy_(parameter)
    if text:
        _add_text_encoders(networks.backbone, device)
    return networks


@torch.no_grad()
def _add_text_encoders(backbone: Backbone, device: torch.device) -> None:
    """Gives a backbone's text encoders random weights in bf16 (on a CPU in fp32), and stand-ins for its tokenizers."""
    pipeline, dtype = backbone.pipeline, torch.float32 if device.type == "cpu" else torch.bfloat16
    lengths = pipeline.text_encoder.config.max_position_embeddings, backbone.max_sequence_length
    for suffix, length in (("", lengths[0]), ("_2", lengths[0]), ("_3", lengths[1])):
        encoder: nn.Module | None = getattr(pipeline, f"text_encoder{suffix}")
        if encoder is None:
            continue
        encoder.to(dtype).to_empty(device=device)
        for parameter in encoder.parameters():
            parameter.normal_(0, _SCALE)
        for buffer in encoder.buffers():  # the numbers of positions
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
        vocabulary: Any = encoder.config
        setattr(pipeline, f"tokenizer{suffix}", RandomTokens(vocabulary.vocab_size, length))
    pipeline.tokenizer_max_length = lengths[0]
