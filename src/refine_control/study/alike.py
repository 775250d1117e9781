"""Figure 2 as a measurement: scenes with objects that are alike, repainted with local and with global prompts.

The paper shows two ponies: given the prompt of the whole picture, a model fills the hole with the other pony. Here
another object has the target's shape in another colour, or its colour in another shape. The oracle reads the hole: the
prompted object (obedience), or another object of the picture (interference).
"""

# N scenes, half of each kind

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refine_control.conditions.condition import Shown
from refine_control.metrics.statistics import BOOTSTRAP_SEED, paired_difference
from refine_control.miniature.obedience import Reading, load_classifier, read_regions
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models.card import BUNDLE
from refine_control.picture_grid import PictureGrid, repaint_grid
from refine_control.pipeline.painting import paint
from refine_control.randomness import derive_seed
from refine_control.records import Photo
from refine_control.study.materials import Bar, Comparison
from refine_control.study.plan import ALIKE, Budget, Row
from refine_control.study.row_results import NUMERICS, RowResult, read_pictures, save_pictures
from refine_control.study.runs import make_sampler, row_facts, row_mark, row_model, train_row
from refine_control.study.summary import Intervals, ModelSummary, intervals_json
from refine_control.study.tables import Table

KINDS = ("same_shape", "same_colour")
PROMPTS = ("local", "global")
MEASURES = {"both": "obeyed %", "interference": "another object's %"}
TITLE = "Figure 2, mini model"
_SHOWN = 5
"""Scenes of each kind in the picture."""


def alike_photos(budget: Budget) -> list[Photo]:
    """The scenes of Figure 2 at a budget: `budget.alike` of each kind, none of them in another role."""
    return [
        photo
        for kind in KINDS
        for photo in scene_photos(derive_seed(budget.test_seed or 0, "figure 2", kind), 0, budget.alike or 0, kind)
    ]


def alike_scores(seen: Reading, photos: Sequence[Photo]) -> dict[str, np.ndarray]:
    """`both` and `interference` in percent, (N,): the region reads as the target, or as another object beside it."""
    read = list(zip(seen.colour.tolist(), seen.shape.tolist(), strict=True))
    expected = [(p.meta["colour"], p.meta["shape"]) for p in photos]
    others = [{tuple(o) for o in p.meta["others"]} for p in photos]
    return {
        "both": np.array([100.0 * (r == e) for r, e in zip(read, expected, strict=True)]),
        "interference": np.array([100.0 * (r in o) for r, o in zip(read, others, strict=True)]),
    }


def run_alike(key: str, row: Row, comparison: Comparison, seed: int, bar: Bar) -> RowResult:
    """`runs.run_row` for Figure 2: metrics are `local both`, `global interference` and so on.

    Those of its pictures that Figure 2 shows go to `out/KEY-SEED/alike_local` and `alike_global`."""
    budget = comparison.budget
    trained = train_row(key, row, comparison, seed, bar)
    backbone, controlnet = row_model(trained, comparison)
    photos, classifier = alike_photos(budget), load_classifier(BUNDLE)
    images, masks = np.stack([p.image for p in photos]), np.stack([p.mask for p in photos])
    scores: dict[str, np.ndarray] = {}
    mark, shown = row_mark(row, comparison, seed, ALIKE), _shown(len(photos))
    for kind in PROMPTS:
        prompts = [p.prompt if kind == "local" else p.global_prompt for p in photos]
        progress = bar(f"{kind} prompts {key}")
        painted = paint(
            backbone, controlnet, Shown(images, masks), prompts, make_sampler(budget, row), progress=progress
        )
        read = alike_scores(read_regions(classifier, painted, masks), photos)
        scores |= {f"{kind} {name}": values for name, values in read.items()}
        save_pictures(_folder(comparison, key, seed, kind), painted[shown], mark)
    facts = row_facts(trained, backbone, controlnet)
    return RowResult(key, seed, mark, scores, {}, facts, budget.steps if row.stages else 0, NUMERICS)


def _shown(count: int) -> list[int]:
    """Numbers of the scenes that Figure 2 shows: the first of both kinds in turn."""
    half = count // 2
    return [number for i in range(min(_SHOWN, half)) for number in (i, half + i)]


def _folder(comparison: Comparison, key: str, seed: int, kind: str) -> Path:
    return comparison.out / f"{key}-{seed}" / f"alike_{kind}"


class AlikeSummary(NamedTuple):
    """One row of Figure 2 over its seeds."""

    seeds: list[int]
    mean: Intervals
    """By `local both`, `global interference` and so on."""
    global_minus_local: Intervals
    """By measure."""

    def as_json(self) -> dict[str, object]:
        """As tables.json holds it."""
        intervals = {"mean": self.mean, "global_minus_local": self.global_minus_local}
        return {"seeds": self.seeds, **{name: intervals_json(each) for name, each in intervals.items()}}


def summarise_alike(results: Mapping[str, Sequence[RowResult]]) -> dict[str, AlikeSummary]:
    """For each row the means with two-level intervals, and global minus local."""
    out = {}
    for key, each in results.items():
        model = ModelSummary(each, list(each[0].scores), [])
        minus = {
            name: paired_difference(model.stacked(f"global {name}"), model.stacked(f"local {name}"), BOOTSTRAP_SEED)
            for name in MEASURES
        }
        out[key] = AlikeSummary(model.seeds, model.mean, minus)
    return out


def alike_table(summary: Mapping[str, AlikeSummary], rows: Mapping[str, Row], budget: Budget) -> Table:
    """A row for each model: both measures with both kinds of prompt, and global minus local."""
    lines = []
    for key, row in summary.items():
        cells = [f"{row.mean[f'{kind} {name}']:.1f}" for kind in PROMPTS for name in MEASURES]
        minus = [f"{row.global_minus_local[name]:.1f}" for name in MEASURES]
        lines.append([rows[key].title, str(len(row.seeds)), *cells, *minus])
    columns = ["row", "seeds", *(f"{kind}: {text}" for kind in PROMPTS for text in MEASURES.values())]
    columns += [f"global - local: {text}" for text in MEASURES.values()]
    note = (
        f"{2 * (budget.alike or 0)} scenes, half with another object of the target's shape, half with one of its "
        "colour. Obeyed: the oracle reads the target's colour and shape in the hole. Another object's: it reads those "
        "of another object of the picture. Mean and 95 % two-level bootstrap interval; differences paired by scene."
    )
    return Table(TITLE, columns, lines, [note])


def alike_grid(rows: Mapping[str, Row], comparison: Comparison, seed: int) -> dict[str, PictureGrid]:
    """Both kinds of scenes in turn, with local and with global prompts, of the rows that were painted in `out`.

    By the name of its file; empty if there are none."""
    painted = {}
    for key, row in rows.items():
        mark = row_mark(row, comparison, seed, ALIKE)
        for kind in PROMPTS:
            if (images := read_pictures(_folder(comparison, key, seed, kind), mark)) is not None:
                painted[f"{key}, {kind}"] = images
    if not painted:
        return {}
    photos = alike_photos(comparison.budget)
    shown = [photos[number] for number in _shown(len(photos))]
    captions = [f"local: {p.prompt}; global: {p.global_prompt}" for p in shown]
    return {"figure2.png": repaint_grid(shown, painted, TITLE, captions)}
