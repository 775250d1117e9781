"""`refine-control data scenes`: rendered scenes as shards of the three roles, by the same door as photographs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from refine_control.conditions.condition import INPAINT
from refine_control.errors import InvalidInputError
from refine_control.miniature import scenes
from refine_control.miniature.tasks.task import Rendered, find_task
from refine_control.photos.shards import ShardWriter
from refine_control.progress import Progress
from refine_control.randomness import derive_seed
from refine_control.records import LABELED, TEST, UNLABELED, Photo
from refine_control.storage import MANIFEST, only_writer


def scene_photos(seed: int, start: int, count: int, kind: str = "any") -> Iterator[Photo]:
    """Rendered scenes of a kind as samples for inpainting."""
    for first in range(start, start + count, 256):
        truth = scenes.render(seed, first, min(256, start + count - first), kind)
        yield from Rendered(truth, truth.local_prompts).photos(first)


def build_scenes(
    out: Path,
    *,
    labeled: int,
    unlabeled: int,
    test: int,
    seed: int = 0,
    test_seed: int = 1,
    condition: str = INPAINT,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes `out/labeled`, `out/unlabeled` and `out/test` of a condition; counts by role.

    Finished roles of the same parameters stay.

    The seeds of the three roles are derived apart, so no scene is in two. Raises InvalidInputError when `out`
    holds other scenes."""
    counts = {LABELED: labeled, UNLABELED: unlabeled, TEST: test}
    with only_writer(out):
        for role, count in counts.items():
            described = {"scenes": count, "seed": derive_seed(test_seed if role == TEST else seed, "shards", role)}
            photos = find_task(condition).photos(described["seed"], 0, count)
            write_role(out / role, photos, count, described, progress, condition)
    return counts


def write_role(
    folder: Path,
    photos: Iterable[Photo],
    count: int,
    described: Mapping[str, int | str],
    progress: Progress | None = None,
    condition: str = INPAINT,
) -> None:
    """Writes `count` photos of a condition as shards of the role after which `folder` is named; finished ones stay.

    Raises InvalidInputError when the manifest of `folder` describes others."""
    if (folder / MANIFEST).is_file():
        previous = {"condition": INPAINT, **json.loads((folder / MANIFEST).read_text())}
        if any(previous.get(name) != value for name, value in {**described, "condition": condition}.items()):
            raise InvalidInputError(f"{folder} holds other photographs or scenes; choose another folder")
    elif count:
        writer = ShardWriter(folder, folder.name, image_format="webp", condition=condition)
        for done, photo in enumerate(photos, 1):
            writer.add(photo)
            if progress and done % 64 == 0:
                progress(done, count, folder.name)
        writer.finish(**described)
