"""The whole pipeline as a static page, which runs the fp32 ONNX graphs in the visitor's browser."""

from refine_control.export.format import Format
from refine_control.export.pipeline_folder import load_velocity
from refine_control.export.web import check_source, write_site

FORMAT = Format(
    "web",
    "a page that paints in the visitor's browser",
    1e-4,
    write=write_site,
    load=lambda work, folder: load_velocity(folder, "onnx", "fp32", ".onnx"),
    refuse=check_source,
)
