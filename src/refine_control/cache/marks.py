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
    config = backbone.vae.config
    settings = f"{CACHE_VERSION} {backbone.max_sequence_length}{config['scaling_factor']} {config['shift_factor']}"
    return _mark(settings, backbone.vae, *backbone.text_encoders)


def teacher_mark(backbone: Backbone) -> str:
    """Hash of the weights that completions depend on as well: transformer and, where there is one, ControlNet."""
    controlnet = backbone.pipeline.controlnet
    return _mark("", backbone.transformer, *([] if controlnet is None else [controlnet]))


def _mark(settings: str, *modules: Any) -> str:
    mark = hashlib.sha256(settings.encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            mark.update(name.encode())
            mark.update(tensor.detach().to(torch.float32).cpu().contiguous().numpy().tobytes())
    return mark.hexdigest()
