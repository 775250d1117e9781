"""Hashes of what a cache depends on in a model."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from refine_control.models.backbone import Backbone

CACHE_VERSION = 2
"""Raised when the same model and samples no longer give the same cache."""


def model_mark(backbone: Backbone) -> str:
    """Hash of the weights and settings that a cache depends on: VAE, text encoders and number of T5 tokens."""
    mark = hashlib.sha256(f"{CACHE_VERSION} {backbone.max_sequence_length}".encode())
    config = backbone.vae.config
    mark.update(f"{config['scaling_factor']} {config['shift_factor']}".encode())
    for part in (backbone.vae, *backbone.text_encoders):
        _update(mark, part)
    return mark.hexdigest()


def teacher_mark(backbone: Backbone) -> str:
    """Hash of the weights that completions depend on as well: transformer and ControlNet."""
    mark = hashlib.sha256()
    for part in (backbone.transformer, backbone.pipeline.controlnet):
        _update(mark, part)
    return mark.hexdigest()


def _update(mark: Any, part: Any) -> None:
    for name, tensor in sorted(part.state_dict().items()):
        mark.update(name.encode())
        mark.update(tensor.detach().to(torch.float32).cpu().contiguous().numpy().tobytes())
