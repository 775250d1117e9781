"""Exported students beside the others: the same pictures, masks, prompts and noise, painted by their own runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from refine_control.conditions.condition import show
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.progress import Progress
from refine_control.records import Photo
from refine_control.runtime.description import read_description
from refine_control.runtime.exported import ExportedPipeline
from refine_control.study.compare import Group, Result, TestSamples
from refine_control.study.feature_metrics import FeatureNetworks


def refuse_other_conditions(students: Mapping[str, Path], condition: str) -> None:
    """Raises InvalidInputError where an export takes another condition than the test shards have."""
    for name, folder in students.items():
        about = read_description(folder)
        if about.condition != condition:
            raise InvalidInputError(
                f"{name} takes the condition {about.condition} and the test shards are of {condition}; give others"
            )


def add_exported(
    result: Result,
    students: Mapping[str, Path],
    photos: Sequence[Photo],
    samplers: Mapping[str, SamplerConfig],
    networks: FeatureNetworks | None = None,
    progress: Progress | None = None,
) -> None:
    """Paints the photos with every exported student and adds its pictures, scores and seconds to `result`.

    Pictures are painted one by one, each with the noise that the other models have for it. One export is in memory at
    a time. Raises what `ExportedPipeline` raises."""
    samples = TestSamples(photos, networks)
    for number, (name, folder) in enumerate(students.items()):
        pipeline, sampler = ExportedPipeline(folder), samplers[name]

        def paint(
            group: Group,
            report: Progress,
            pipeline: ExportedPipeline = pipeline,
            sampler: SamplerConfig = sampler,
        ) -> np.ndarray:
            shown, painted = show(group.photos), []
            for row, (picture, prompt) in enumerate(zip(shown.pictures, group.prompts, strict=True)):
                mask = None if shown.masks is None else shown.masks[row]
                painted.append(pipeline.paint(picture, mask, prompt, sampler, slot=group.first + row))
                report(row + 1, len(group.prompts))
            return np.stack(painted)

        samples.add(result, name, paint, progress, (number, len(students)))
