"""ONNX graphs of the whole pipeline in fp32, for ONNX Runtime; exact for any number of layers."""

from refine_control.export.pipeline_folder import copy_graph, onnx_format

FORMAT = onnx_format("onnx", "ONNX Runtime, fp32", 1e-4, "fp32", copy_graph)
