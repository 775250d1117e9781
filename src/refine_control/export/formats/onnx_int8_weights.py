"""As `onnx`, the weights of ControlNet and transformer stored in 8 bits by output channel; arithmetic in fp32."""

from refine_control.export.format import Format
from refine_control.export.onnx_files import compress_onnx
from refine_control.export.pipeline_folder import every_step, load_velocity, write_pipeline

FORMAT = Format(
    "onnx-int8-weights",
    "ONNX Runtime, weights in int8",
    0.05,
    write=lambda work, folder: write_pipeline(work, folder, "onnx", "int8-weights", ".onnx", every_step(compress_onnx)),
    load=lambda work, folder: load_velocity(folder, "onnx", "int8-weights", ".onnx"),
)
