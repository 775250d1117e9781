"""ONNX files of networks: written by torch's exporter, and their matrices in 8 bits by ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from refine_control.export.graphs import Graph

_LARGEST_FILE = 1 << 30
"""Bytes of weights beyond which they lie in a file beside the graph: a protobuf takes two gigabytes."""
_NOISY = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir", "root")


def _dynamic(value: Any) -> Any:
    """The sizes that vary: batch; height and width; tokens."""
    if isinstance(value, list):
        return [_dynamic(each) for each in value]
    by_rank: dict[int, tuple[int, ...]] = {0: (), 1: (0,), 2: (0,), 3: (0, 1), 4: (0, 2, 3)}
    axes = by_rank[value.ndim]
    if value.ndim == 2 and not value.is_floating_point():  # (B,T) tokens
        axes = (0, 1)
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC) or None


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter without its advice about other packages."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


@torch.no_grad()
def write_onnx(graph: Graph, path: Path) -> None:
    """Writes a graph with variable batch, size and tokens; large weights in a file NAME.onnx.data beside it.

    Raises ModuleNotFoundError without onnx and onnxscript."""
    import onnx  # noqa: F401 - before the minute of tracing
    import onnxscript  # noqa: F401

    shapes = {name: _dynamic(value) for name, value in graph.example.items()}
    with _quiet():
        traced = torch.export.export(graph.network, (), dict(graph.example), dynamic_shapes=shapes, strict=False)
        program: Any = torch.onnx.export(
            traced, dynamo=True, input_names=graph.inputs, output_names=graph.outputs, verbose=False
        )
        _strip(program.model)
        size = sum(p.numel() * p.element_size() for p in graph.network.parameters())
        program.save(path, external_data=size > _LARGEST_FILE)


def _strip(model: Any) -> None:
    """Takes out what no runtime reads: stack traces of the tracing, with paths of this machine, and the shapes of
    results in between, which contradict those that ONNX Runtime's quantiser infers."""
    kept = {id(value) for value in model.graph.outputs}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in kept:
                value.type = value.shape = None


def quantize_onnx(source: Path, path: Path) -> None:
    """Writes the graph `source` with the weights of its matrix products in 8 bits by output channel, and activations
    that are quantised as they come (ONNX Runtime's dynamic quantisation)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    with _quiet():
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=_is_large(model),
        )


def _is_large(model: Any) -> bool:
    return sum(len(each.raw_data) for each in model.graph.initializer) > _LARGEST_FILE


def compress_onnx(source: Path, path: Path) -> None:
    """Writes the graph `source` with the weights of its matrix products in 8 bits by output channel, w = scale q with
    q in [-127, 127]; arithmetic stays in fp32. The file takes about a quarter."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    weights = {each.name: each for each in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    added = []
    for name in dict.fromkeys(node.input[1] for node in products if node.input[1] in weights):
        users = [node for node in model.graph.node if name in node.input]
        value = numpy_helper.to_array(weights[name])
        if value.ndim != 2 or any(node not in products for node in users):
            continue
        axis = int(any(node.op_type == "MatMul" or not _transposed(node) for node in users))
        scale = np.maximum(np.abs(value).max(1 - axis), 1e-12).astype(np.float32) / 127
        codes = np.rint(value / np.expand_dims(scale, 1 - axis)).astype(np.int8)
        model.graph.initializer.remove(weights[name])
        model.graph.initializer.append(numpy_helper.from_array(codes, f"{name}_codes"))
        model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        added.append(
            helper.make_node("DequantizeLinear", [f"{name}_codes", f"{name}_scale"], [name], f"{name}_wide", axis=axis)
        )
    for node in reversed(added):
        model.graph.node.insert(0, node)
    onnx.save(model, path, save_as_external_data=_is_large(model), location=f"{path.name}.data")


def _transposed(node: Any) -> bool:
    return any(each.name == "transB" and each.i for each in node.attribute)
