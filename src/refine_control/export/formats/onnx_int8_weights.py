"""As `onnx`, the weights of ControlNet and transformer stored in 8 bits by output channel; arithmetic in fp32."""

from refine_control.export.onnx_files import compress_onnx
from refine_control.export.pipeline_folder import every_step, onnx_format

FORMAT = onnx_format(
    "onnx-int8-weights", "ONNX Runtime, weights in int8", 0.05, "int8-weights", every_step(compress_onnx)
)
