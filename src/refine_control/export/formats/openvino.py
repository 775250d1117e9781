"""The whole pipeline for OpenVINO, which computes in the type that the CPU does fastest (bf16 where it has it)."""

from refine_control.export.openvino_files import openvino_format

FORMAT = openvino_format("openvino", "OpenVINO, the CPU's own type", 0.05, "native")
