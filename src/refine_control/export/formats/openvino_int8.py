"""As `openvino`, ControlNet and transformer in 8 bits by NNCF, calibrated on real samples."""

from refine_control.export.openvino_files import openvino_format

FORMAT = openvino_format("openvino-int8", "OpenVINO, int8 by NNCF", 0.1, "int8")
