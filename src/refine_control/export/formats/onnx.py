"""ONNX graphs of the whole pipeline in fp32, for ONNX Runtime; exact for any number of layers."""

from refine_control.export.format import Format
from refine_control.export.pipeline_folder import copy_graph, load_velocity, write_pipeline

FORMAT = Format(
    "onnx",
    "ONNX Runtime, fp32",
    1e-4,
    write=lambda work, folder: write_pipeline(work, folder, "onnx", "fp32", ".onnx", copy_graph),
    load=lambda work, folder: load_velocity(folder, "onnx", "fp32", ".onnx"),
)
