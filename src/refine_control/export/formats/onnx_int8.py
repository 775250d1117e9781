"""As `onnx`, ControlNet and transformer in 8 bits: weights by output channel, activations as they come."""

from refine_control.export.onnx_files import quantize_onnx
from refine_control.export.pipeline_folder import every_step, onnx_format

FORMAT = onnx_format("onnx-int8", "ONNX Runtime, dynamic int8", 0.1, "int8", every_step(quantize_onnx))
