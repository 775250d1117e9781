"""Graph files as functions of arrays, by the libraries that run them: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from refine_control.errors import DamagedError, MissingError
from refine_control.threads import choose, cpu_quota, usable_cpus


class Engine(Protocol):
    """A loaded graph. Several threads may call it at once."""

    def __call__(self, arrays: Mapping[str, np.ndarray], /) -> list[np.ndarray]:
        """Arrays by the names of the graph's inputs -> its outputs in order. Other names are left out."""
        ...


def open_graph(engine: str, file: Path, precision: str = "fp32", threads: int | None = None) -> Engine:
    """Loads a graph for the CPU with an engine of `ENGINES`.

    `threads` compute together; None: OMP_NUM_THREADS or the CPUs of this process. Raises MissingError that names the
    extra where the library is not installed, DamagedError for a file that it cannot load."""
    library, extra, load = ENGINES[engine]
    count = threads or choose(os.environ, usable_cpus(), cpu_quota(), adaptive=False).count
    try:
        return load(file, precision, count)
    except ImportError:
        raise MissingError(f"{library} is not installed; run pip install 'refine-control[{extra}]'") from None
    except Exception as error:  # each library has types of its own
        reason = " ".join(str(error).split())[:200]
        raise DamagedError(f"{file} is no graph that this version of {library} loads: {reason}; export again") from None


def _open_onnx(file: Path, precision: str, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda arrays: cast("list[np.ndarray]", session.run(None, {name: arrays[name] for name in names}))


def _open_openvino(file: Path, precision: str, threads: int) -> Engine:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision == "fp32":  # else it computes in the type that this CPU does fastest
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    names = [each.any_name for each in compiled.inputs]

    def run(arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        results = compiled.create_infer_request().infer({name: arrays[name] for name in names})
        return [results[output] for output in compiled.outputs]

    return run


ENGINES: Mapping[str, tuple[str, str, Callable[[Path, str, int], Engine]]] = {
    "onnx": ("onnxruntime", "export", _open_onnx),
    "openvino": ("openvino", "openvino", _open_openvino),
}
"""By the name in `pipeline.json`: the library, the extra that brings it, and how it loads a graph."""
