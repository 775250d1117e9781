"""`refine-control export`: writes a student for another program, if it computes there what it does in PyTorch."""

# N samples, h w latents

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from refine_control.errors import InvalidInputError, RefineControlError
from refine_control.export.format import ALL, Format, Velocity, Work, find_format, format_names
from refine_control.export.graphs import denoiser
from refine_control.export.source import Samples, Source, load_samples, load_source
from refine_control.metrics.cost import Spread, interleaved, ratio
from refine_control.progress import Progress
from refine_control.storage import TEMPORARY, publish_folder, sweep_beside

ROUNDS = 5
"""Timed calls of each side."""


class Exported(NamedTuple):
    """What was written, and how it compares with PyTorch in fp32 on the same samples."""

    format: str
    title: str
    folder: str
    samples: int
    max_error: float
    """Largest absolute difference of the velocity."""
    relative_error: float
    """|v - v_torch| / |v_torch|."""
    bytes: int
    """Of all files."""
    seconds: float
    """Median of one denoiser call for one sample on one thread."""
    torch_seconds: float
    speedup: Spread
    """PyTorch's seconds over the export's, by round."""

    @property
    def text(self) -> str:
        """As lines."""
        return "\n".join(
            [
                f"{self.folder}: {self.title}, {self.bytes / 1e6:.1f} MB",
                f"velocity of {self.samples} samples against PyTorch fp32: relative error {self.relative_error:.1e}, "
                f"largest {self.max_error:.1e}",
                f"denoiser call on one thread: {1000 * self.seconds:.1f} ms, PyTorch fp32 "
                f"{1000 * self.torch_seconds:.1f} ms: speed-up {self.speedup.median:.1f}",
            ]
        )


class Refused(NamedTuple):
    """A format that a student is not written in, and why."""

    format: str
    reason: str


class Table(NamedTuple):
    """All formats of one student."""

    student: str
    rows: list[Exported | Refused]

    @property
    def text(self) -> str:
        """As a table."""
        lines = [f"{'format':20}{'MB':>8}{'rel. error':>12}{'max error':>12}{'ms':>8}{'speed-up':>10}"]
        for row in self.rows:
            if isinstance(row, Refused):
                lines.append(f"{row.format:20}not exported: {row.reason}")
            else:
                numbers = f"{row.bytes / 1e6:8.1f}{row.relative_error:12.1e}{row.max_error:12.1e}"
                lines.append(f"{row.format:20}{numbers}{1000 * row.seconds:8.1f}{row.speedup.median:10.1f}")
        return "\n".join(lines)


def export_student(
    student: str,
    to: str,
    out: Path,
    *,
    model: str = "mini",
    cache: Path | None = None,
    separate: bool = False,
    ort: Path | None = None,
    progress: Progress | None = None,
) -> Exported | Table:
    """Writes a student in the format `to`, or in every format in folders of `out` (`format.ALL`); `separate` and `ort`
    as in `Work`.

    The files are published only if their velocity on samples of `cache` (mini: rendered scenes) equals PyTorch's
    within the format's bound. Raises what `load_source`, `load_samples` and `Format.check` raise,
    InvalidInputError for a larger error, ModuleNotFoundError without the packages of a format."""
    formats = [find_format(name) for name in (format_names() if to == ALL else [to])]
    source = load_source(student, model)
    if to != ALL:
        formats[0].check(source)
    samples = load_samples(source, model, cache)
    with _graph_folder(out) as graphs:
        work = Work(source, samples, graphs, separate, ort)
        if to != ALL:
            return export_format(work, formats[0], out, progress)
        rows: list[Exported | Refused] = []
        for number, form in enumerate(formats, 1):
            try:
                rows.append(export_format(work, form, out / form.name))
            except ModuleNotFoundError as error:
                rows.append(Refused(form.name, f"{error.name} is not installed"))
            except RefineControlError as error:
                rows.append(Refused(form.name, str(error)))
            if progress:
                progress(number, len(formats), form.name)
        return Table(source.name, rows)


def export_format(work: Work, form: Format, out: Path, progress: Progress | None = None) -> Exported:
    """Writes one format, checks it, and publishes `out`. Raises as `export_student`."""
    form.check(work.source)
    report = progress or (lambda done, total, note="": None)
    report(0, 3, "write")
    sweep_beside(out)
    described = {"kind": "export", "format": form.name, "student": work.source.name}
    with publish_folder(out, **described) as folder:
        form.write(work, folder)
        report(1, 3, "check")
        velocity = form.load(work, folder)
        errors = compare(torch_velocity(work.source)(work.samples.arrays), velocity(work.samples.arrays))
        if not errors.relative <= form.bound:  # also not a number
            raise InvalidInputError(
                f"the {form.name} export of {work.source.name} differs from PyTorch by {errors.relative:.1e} of the "
                f"velocity, more than the {form.bound:.0e} that the format may; nothing is written: use another format"
            )
        report(2, 3, "time")
        times = measure(torch_velocity(work.source), velocity, work.samples)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    report(3, 3, "")
    count = len(work.samples.prompts)
    return Exported(form.name, form.title, str(out), count, errors.largest, errors.relative, size, *times)


class Errors(NamedTuple):
    """Of a velocity."""

    largest: float
    relative: float


def compare(expected: np.ndarray, computed: np.ndarray) -> Errors:
    """Of `computed` (N,16,h,w) against `expected`."""
    difference = computed.astype(np.float64) - expected
    return Errors(float(np.abs(difference).max()), float(np.linalg.norm(difference) / np.linalg.norm(expected)))


def torch_velocity(source: Source) -> Velocity:
    """The student and its transformer in PyTorch, fp32."""
    network = denoiser(source.backbone, source.controlnet)

    def run(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return network(**{name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}).numpy()

    return run


def measure(usual: Velocity, exported: Velocity, samples: Samples) -> tuple[float, float, Spread]:
    """Seconds of a call of the export and of PyTorch for the first sample, in turns on one thread, and their ratio."""
    arrays = {name: value[:1] if value.ndim else value for name, value in samples.arrays.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = interleaved({"torch": partial(usual, arrays), "export": partial(exported, arrays)}, ROUNDS, warmup=2)
    finally:
        torch.set_num_threads(threads)
    return times["export"].median, times["torch"].median, ratio(times["torch"], times["export"]).spread


@contextmanager
def _graph_folder(out: Path) -> Iterator[Path]:
    """A folder beside the output for graphs that several formats start from; a killed run's is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    name = f".{out.name}-graphs"
    sweep_beside(out.with_name(name[1:]))
    folder = out.with_name(f"{name}.{os.getpid()}{TEMPORARY}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
