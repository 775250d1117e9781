"""A condition in the world of scenes: how it is rendered, and what its oracle measures.

Each kind is a module of this folder with a `TASK`, named as the condition; `find_task` loads it.
"""

# N scenes, H = W = 64 pixels

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from refine_control.conditions.condition import INPAINT, Condition, Shown, condition_names, find_condition
from refine_control.miniature import scenes
from refine_control.miniature.obedience import Classifier, load_classifier
from refine_control.miniature.scenes import Objects, Scenes
from refine_control.miniature.vocabulary import BACKGROUNDS, COLOURS
from refine_control.models.card import BUNDLE
from refine_control.records import Photo

Scores = dict[str, np.ndarray]


class Rendered(NamedTuple):
    """N scenes as samples of a condition."""

    truth: Scenes
    """The pictures to paint."""
    prompts: list[str]
    conds: np.ndarray | None = None
    """(N,64,64,3) uint8 condition pictures; None where the condition has a region."""

    @property
    def more_prompts(self) -> list[str]:
        """Prompts that a teacher learns as well: in inpainting those of the whole scene."""
        return self.truth.global_prompts if self.conds is None else self.prompts

    @property
    def shown(self) -> Shown:
        """What a ControlNet is shown of them."""
        if self.conds is None:
            return Shown(self.truth.images.numpy(), self.truth.masks.numpy())
        return Shown(self.conds)

    def photos(self, first: int) -> Iterator[Photo]:
        """They as samples, numbered from `first`; `meta` holds what their oracles read."""
        scene, alike = self.truth, self.truth.alike
        names = Objects._fields[1:7]
        for i, prompt in enumerate(self.prompts):
            present, target = scene.objects.present[i], int(scene.target[i])
            objects = zip(*(part[i].tolist() for part in scene.objects[:3]), strict=True)  # present, colour, shape
            others = [[c, s] for n, (here, c, s) in enumerate(objects) if here and n != target]
            meta: dict[str, Any] = {"colour": int(scene.colour[i]), "shape": int(scene.shape[i])}
            meta |= {"others": others, "alike": bool(alike[i])}
            mask, cond = scene.masks[i].numpy(), None
            if self.conds is not None:
                mask, cond = np.ones_like(mask), self.conds[i]
                kept = {name: getattr(scene.objects, name)[i, present].tolist() for name in names}
                meta |= {"target": target, "objects": kept}
            key, image = f"scene-{first + i:08d}", scene.images[i].numpy()
            yield Photo(key, image, mask, prompt, scene.global_prompts[i], meta, cond)


@dataclass(frozen=True)
class Task:
    """What the world of scenes makes of a condition."""

    render: Callable[[int, int, int], Rendered]
    """(seed, start, count) -> scenes `start .. start + count - 1` of the seed."""
    score: Callable[[Sequence[Photo], np.ndarray, Classifier], Scores]
    """Photos and what was painted for them, (N,64,64,3) uint8 -> by metric (N,)."""
    headings: Mapping[str, str]
    """Of tables, by score; the first is the one that its oracle is named by, higher is better. A heading that ends in
    (less) is of a score that is better when it is lower."""
    reads_scenes: bool = True
    """Whether the oracle reads what `Rendered.photos` notes in `meta`; else it judges any photograph."""

    @property
    def headline(self) -> str:
        """The score that its oracle is named by."""
        return next(iter(self.headings))

    def photos(self, seed: int, start: int, count: int) -> Iterator[Photo]:
        """Scenes as samples."""
        for first in range(start, start + count, 256):
            yield from self.render(seed, first, min(256, start + count - first)).photos(first)


@cache
def find_task(condition: str = INPAINT) -> Task:
    """The task of a condition by name. Raises InvalidInputError for a name of no condition."""
    find_condition(condition)
    return import_module(f"{__package__}.{condition}").TASK


def all_tasks() -> dict[str, Task]:
    """The tasks of all conditions, inpainting first."""
    return {name: find_task(name) for name in condition_names()}


Oracle = Callable[[Sequence[Photo], np.ndarray], Scores]
"""`Task.score` with its classifier."""


def find_oracle(condition: str, photos: Sequence[Photo]) -> Oracle | None:
    """The oracle of a condition; None where it reads scenes and the photos are none."""
    task, known = find_task(condition), all({"colour", "shape"} <= photo.meta.keys() for photo in photos)
    if task.reads_scenes and not known:
        return None
    classifier = load_classifier(BUNDLE)
    return lambda photos, painted: task.score(photos, painted, classifier)


def prepared(condition: Condition, kind: str = "any") -> Callable[[int, int, int], Rendered]:
    """Rendering of a condition that is prepared from the picture; the prompt names everything in it."""

    def render(seed: int, start: int, count: int) -> Rendered:
        assert condition.prepare is not None
        truth = scenes.render(seed, start, count, kind)
        conds = [condition.prepare(image) for image in truth.images.numpy()]
        return Rendered(truth, truth.global_prompts, np.stack(conds))

    return render


def stored_objects(photos: Sequence[Photo]) -> Objects:
    """The objects of photos that `Rendered.photos` wrote, without their light."""
    rows = [photo.meta["objects"] for photo in photos]
    counts = np.array([len(row["x"]) for row in rows])
    whole = ("colour", "shape")
    filled = {f: np.zeros((len(rows), scenes.MAX_OBJECTS), int if f in whole else float) for f in Objects._fields[1:]}
    for i, row in enumerate(rows):
        for name, values in row.items():
            filled[name][i, : counts[i]] = values
    return Objects(np.arange(scenes.MAX_OBJECTS) < counts[:, None], **filled)


def silhouettes(objects: Objects, numbers: np.ndarray) -> np.ndarray:
    """(N,64,64) in [0, 1]: how object `numbers[i]` of scene i covers it; 0 where there is no such object."""
    rows = np.flatnonzero(objects.present[np.arange(len(numbers)), numbers])
    out = np.zeros((len(numbers), scenes.SIZE, scenes.SIZE), np.float32)
    if len(rows):
        covered = scenes.cover(rows, numbers[rows], objects)
        out[covered.rows] = covered.alpha[:, 0].numpy()
    return out


def nearest_tones(images: np.ndarray) -> np.ndarray:
    """(N,64,64,3) uint8 -> (N,64,64) which of COLOURS and then BACKGROUNDS each pixel is nearest to."""
    tones = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)
    return ((images[..., None, :].astype(np.float32) - tones) ** 2).sum(-1).argmin(-1)
