"""As `openvino`, ControlNet and transformer in 8 bits by NNCF, calibrated on real samples."""

from refine_control.export.format import Format
from refine_control.export.openvino_files import write_openvino
from refine_control.export.pipeline_folder import load_velocity

FORMAT = Format(
    "openvino-int8",
    "OpenVINO, int8 by NNCF",
    0.1,
    write=lambda work, folder: write_openvino(work, folder, "int8"),
    load=lambda work, folder: load_velocity(folder, "openvino", "int8", ".xml"),
)
