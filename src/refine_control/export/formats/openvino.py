"""The whole pipeline for OpenVINO, which computes in the type that the CPU does fastest (bf16 where it has it)."""

from refine_control.export.format import Format
from refine_control.export.openvino_files import write_openvino
from refine_control.export.pipeline_folder import load_velocity

FORMAT = Format(
    "openvino",
    "OpenVINO, the CPU's own type",
    0.05,
    write=lambda work, folder: write_openvino(work, folder, "native"),
    load=lambda work, folder: load_velocity(folder, "openvino", "native", ".xml"),
)
