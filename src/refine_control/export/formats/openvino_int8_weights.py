"""As `openvino`, the weights of ControlNet and transformer in 8 bits."""

from refine_control.export.format import Format
from refine_control.export.openvino_files import write_openvino
from refine_control.export.pipeline_folder import load_velocity

FORMAT = Format(
    "openvino-int8-weights",
    "OpenVINO, weights in int8 by NNCF",
    0.05,
    write=lambda work, folder: write_openvino(work, folder, "int8-weights"),
    load=lambda work, folder: load_velocity(folder, "openvino", "int8-weights", ".xml"),
)
