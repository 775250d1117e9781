"""As `onnx`, ControlNet and transformer in 8 bits: weights by output channel, activations as they come."""

from refine_control.export.format import Format
from refine_control.export.onnx_files import quantize_onnx
from refine_control.export.pipeline_folder import every_step, load_velocity, write_pipeline

FORMAT = Format(
    "onnx-int8",
    "ONNX Runtime, dynamic int8",
    0.1,
    write=lambda work, folder: write_pipeline(work, folder, "onnx", "int8", ".onnx", every_step(quantize_onnx)),
    load=lambda work, folder: load_velocity(folder, "onnx", "int8", ".onnx"),
)
