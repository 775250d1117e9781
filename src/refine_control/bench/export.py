"""`refine-control bench export`: a call of an SD3 ControlNet by other runtimes against PyTorch fp32, on one thread.

The network has SD3's layers and random weights, which do not matter for speed; the default has 40 million parameters.
All runtimes are timed in turn in one process. Errors are of random residuals and only show that the same is computed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from refine_control.errors import InvalidInputError
from refine_control.export.graphs import CONTROLNET_INPUTS, ControlNetGraph, Graph
from refine_control.export.onnx_files import quantize_onnx, write_onnx
from refine_control.export.openvino_files import convert_openvino
from refine_control.metrics.cost import Spread, count_parameters, interleaved, ratio
from refine_control.models.controlnet import ControlNet
from refine_control.runtime.engines import open_graph

_TOKENS, _HEAD, _TEXT, _POOLED = 77 + 256, 64, 4096, 2048
_CALIBRATION = 4


class Runtime(NamedTuple):
    """One of the runtimes."""

    seconds: Spread
    speedup: Spread
    """PyTorch's seconds over its own, by round."""
    relative_error: float


class ExportBench(NamedTuple):
    """Seconds of one ControlNet call."""

    parameters: int
    size: int
    runtimes: dict[str, Runtime]

    @property
    def text(self) -> str:
        """As a table."""
        lines = [f"{self.parameters / 1e6:.1f} M parameters, {self.size} px, one thread"]
        lines.append(f"{'runtime':24}{'ms':>9}{'speed-up':>10}{'rel. error':>12}")
        for name, each in self.runtimes.items():
            numbers = f"{1000 * each.seconds.median:9.1f}{each.speedup.median:10.2f}{each.relative_error:12.1e}"
            lines.append(f"{name:24}{numbers}")
        return "\n".join(lines)


def _network(layers: int, width: int) -> ControlNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controlnet = ControlNet(
            num_layers=layers,
            attention_head_dim=_HEAD,
            num_attention_heads=width // _HEAD,
            caption_projection_dim=width,
            joint_attention_dim=_TEXT,
            pooled_projection_dim=_POOLED,
            extra_conditioning_channels=1,
            pos_embed_max_size=192,
        )
        for part in (controlnet.controlnet_blocks, controlnet.pos_embed_input):  # zero at birth
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
    return controlnet.requires_grad_(False).eval()


def _inputs(size: int, seed: int, batch: int) -> dict[str, torch.Tensor]:
    generator, side = torch.Generator().manual_seed(seed), size // 8
    shapes = {
        "noisy_latents": (16, side, side),
        "control_cond": (17, side, side),
        "prompt_embeds": (_TOKENS, _TEXT),
        "pooled_prompt_embeds": (_POOLED,),
    }
    drawn = {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
    return {**drawn, "sigmas": torch.full((batch,), 0.6), "conditioning_scale": torch.tensor(0.95)}


def bench_export(layers: int = 4, width: int = 512, size: int = 512, repeats: int = 5) -> ExportBench:
    """Times PyTorch, ONNX Runtime and OpenVINO on a ControlNet of `layers` blocks of `width`.

    Raises InvalidInputError for a width of no whole heads, ModuleNotFoundError without the extras."""
    if width % _HEAD or size % 16:
        raise InvalidInputError(f"{width} and {size} must be multiples of {_HEAD} and 16; change width or size")
    controlnet = _network(layers, width)
    network = ControlNetGraph(controlnet).eval()
    arrays = {name: value.numpy() for name, value in _inputs(size, 1, 1).items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            calls = {
                "PyTorch fp32": partial(_by_torch, network, arrays),
                **_calls(network, layers, Path(folder), arrays, size),
            }
            expected = calls["PyTorch fp32"]()
            errors = {name: _relative(expected, call()) for name, call in calls.items()}
            times = interleaved(calls, repeats)
    finally:
        torch.set_num_threads(threads)
    usual = times["PyTorch fp32"]
    rows = {name: Runtime(t.spread, ratio(usual, t).spread, errors[name]) for name, t in times.items()}
    return ExportBench(count_parameters(controlnet), size, rows)


def _calls(
    network: Any, layers: int, folder: Path, arrays: Mapping[str, np.ndarray], size: int
) -> dict[str, Callable[[], Any]]:
    names = tuple(f"residual_{layer}" for layer in range(layers))
    write_onnx(Graph(network, _inputs(size, 0, 2), CONTROLNET_INPUTS, names), plain := folder / "plain.onnx")
    quantize_onnx(plain, folder / "int8.onnx")
    seen = [{name: value.numpy() for name, value in _inputs(size, 2 + i, 1).items()} for i in range(_CALIBRATION)]
    for precision in ("native", "int8"):
        convert_openvino(plain, folder / f"{precision}.xml", precision, seen)
    opened = {
        "ONNX Runtime fp32": open_graph("onnx", plain, threads=1),
        "ONNX Runtime int8": open_graph("onnx", folder / "int8.onnx", threads=1),
        "OpenVINO": open_graph("openvino", folder / "native.xml", "native", threads=1),
        "OpenVINO int8": open_graph("openvino", folder / "int8.xml", "int8", threads=1),
    }
    return {name: partial(engine, arrays) for name, engine in opened.items()}


@torch.inference_mode()
def _by_torch(network: Any, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [each.numpy() for each in network(**{name: torch.from_numpy(np.asarray(v)) for name, v in arrays.items()})]


def _relative(expected: list[np.ndarray], computed: list[np.ndarray]) -> float:
    errors = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(expected, computed, strict=True)]
    return float(max(errors))
