"""`refine-control export`: a student for other programs and small devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from refine_control.cli import options as opt
from refine_control.cli.output import progress_bar, show
from refine_control.signals import interruptible


@interruptible("nothing is written")
def export(
    student: Annotated[
        str, typer.Argument(help="edge, a folder or a hub id; mini or another model for its own ControlNet.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="diffusers, single-file, onnx, onnx-int8, onnx-int8-weights, openvino, openvino-int8, "
            "torchao, web; all: each in a folder of OUT, with a table."
        ),
    ],
    out: Annotated[Path, opt.output_option("Folder to write.", "EXPORT")],
    model: opt.Model = "mini",
    cache: Annotated[
        Path | None, opt.folder("Cache of samples that the export is checked on; default for mini: rendered scenes.")
    ] = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="ControlNet and transformer as two graphs (onnx, openvino).")
    ] = False,
    ort: Annotated[
        Path | None,
        typer.Option(help="npm package onnxruntime-web for web, a .tgz file or a folder; default: fetched by npm."),
    ] = None,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Write a student for another program, after comparing it there with PyTorch on real samples."""
    from refine_control.export.format import ALL, find_format, format_names

    titles = {name: find_format(name).title for name in (format_names() if to == ALL else [to])}
    if dry_run:
        planned = {"verb": "export", "student": student, "model": model, "formats": titles, "out": out}
        return show({**planned, "cache": cache, "separate": separate, "ort": ort}, as_json)
    from refine_control.export.exporting import export_student

    result = export_student(
        student, to, out, model=model, cache=cache, separate=separate, ort=ort, progress=progress_bar("export")
    )
    show(result if as_json else result.text, as_json)
