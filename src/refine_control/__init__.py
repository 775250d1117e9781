"""Refine-Control: make big ControlNets small, and prove what was lost (arXiv 2509.22139)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refine_control.pipeline.inpainter import Inpainter

__version__ = "0.1.0"
__all__ = ["Inpainter", "__version__"]

# torch, torchao and diffusers report at import what of torchao was not built; nothing here needs it.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """`Inpainter`, imported when it is first used: the command line imports this package at every start."""
    if name == "Inpainter":
        from refine_control.pipeline.inpainter import Inpainter

        return Inpainter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
