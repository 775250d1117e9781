"""OpenVINO files (.xml, .bin) from ONNX graphs, and their matrices in 8 bits by NNCF."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refine_control.export.format import Format, Work
from refine_control.export.graphs import DENOISING, layers_of_sites
from refine_control.export.pipeline_folder import load_velocity, write_pipeline
from refine_control.runtime.engines import open_graph


def openvino_format(name: str, title: str, bound: float, precision: str) -> Format:
    """The record of a pipeline for OpenVINO in a precision of `write_openvino`; the rest as in `Format`."""
    return Format(
        name,
        title,
        bound,
        write=lambda work, folder: write_openvino(work, folder, precision),
        load=lambda work, folder: load_velocity(folder, "openvino", precision, ".xml"),
    )


def write_openvino(work: Work, folder: Path, precision: str) -> None:
    """Writes a pipeline for OpenVINO: `native` (in the type that the CPU does fastest) or `int8`.

    int8 is NNCF's quantisation after training, its ranges those of the samples; the text encoders and the VAE stay in
    floating point. Raises ModuleNotFoundError without openvino and nncf."""
    import openvino  # noqa: F401 - before the minute of tracing

    calibration = _calibration(work) if precision == "int8" else {}

    def convert(part: str, file: Path, written: Path) -> None:
        every_step = part in DENOISING
        convert_openvino(file, written, precision if every_step else "native", calibration.get(part, ()))

    write_pipeline(work, folder, "openvino", precision, ".xml", convert)


def convert_openvino(
    file: Path, written: Path, precision: str = "native", inputs: Sequence[Mapping[str, np.ndarray]] = ()
) -> None:
    """Writes an ONNX graph as NAME.xml and NAME.bin; for `int8` the ranges of activations are those of `inputs`."""
    import openvino

    model = openvino.convert_model(file)
    if precision == "int8":
        model = _quantized(model, inputs)
    openvino.save_model(model, written, compress_to_fp16=False)


def _calibration(work: Work) -> Mapping[str, Sequence[Mapping[str, np.ndarray]]]:
    """The inputs of each denoising graph for the samples, one at a time."""
    arrays = work.samples.arrays
    single = [
        {name: value[i : i + 1] if value.ndim else value for name, value in arrays.items()}
        for i in range(len(work.samples.prompts))
    ]
    if not work.separate:
        return {"denoiser": single}
    layers = layers_of_sites(work.source.controlnet, work.source.backbone)
    control = open_graph("onnx", work.graphs / "controlnet.onnx", threads=1)
    within = []
    for inputs in single:
        residuals = control(inputs)
        within.append({**inputs, **{f"residual_{site}": residuals[layer] for site, layer in enumerate(layers)}})
    return {"controlnet": single, "transformer": within}


def _quantized(model: Any, inputs: Sequence[Mapping[str, np.ndarray]]) -> Any:
    import nncf

    names = [each.any_name for each in model.inputs]
    dataset = nncf.Dataset(inputs, lambda arrays: {name: arrays[name] for name in names})
    with _quiet():
        return nncf.quantize(
            model,
            dataset,
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(inputs),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF without its tables, and its progress on stderr."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
