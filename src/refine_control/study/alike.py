"""Figure 2 as a measurement: scenes with objects that are alike, repainted by local and by global prompts.

The paper shows two ponies: told of the whole picture, a model fills the hole with the other one. Here another object
has the target's shape in another colour, or its colour in another shape, and the oracle says what the hole became:
what was asked for (obedience), or one of the other objects of the picture (interference).
"""

# N scenes, half of each kind

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refine_control.metrics.statistics import BOOTSTRAP_SEED, paired_difference, two_level
from refine_control.miniature.obedience import Reading, load_classifier, read_regions
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models.card import BUNDLE
from refine_control.picture_grid import PictureGrid
from refine_control.pipeline.painting import inpaint
from refine_control.randomness import derive_seed
from refine_control.records import Photo
from refine_control.study.comparison import Budget, Row
from refine_control.study.materials import Bar, Comparison
from refine_control.study.report import Table
from refine_control.study.row_results import RowResult, read_pictures, save_pictures
from refine_control.study.rows import facts_of, row_mark, row_model, sampler_of, train_row
from refine_control.study.tables import cell

KINDS = ("same_shape", "same_colour")
PROMPTS = ("local", "global")
MEASURES = {"both": "obeyed %", "interference": "another object's %"}
MARK = "alike"
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
    wanted = [(p.meta["colour"], p.meta["shape"]) for p in photos]
    others = [{tuple(o) for o in p.meta["others"]} for p in photos]
    return {
        "both": np.array([100.0 * (r == w) for r, w in zip(read, wanted, strict=True)]),
        "interference": np.array([100.0 * (r in o) for r, o in zip(read, others, strict=True)]),
    }


def run_alike(key: str, row: Row, comparison: Comparison, seed: int, bar: Bar) -> RowResult:
    """`rows.run_row` for Figure 2: metrics are `local both`, `global interference` and so on.

    Those of its pictures that Figure 2 shows go to `out/KEY-SEED/alike_local` and `alike_global`."""
    budget = comparison.budget
    trained = train_row(key, row, comparison, seed, bar)
    backbone, controlnet = row_model(trained, comparison)
    photos, classifier = alike_photos(budget), load_classifier(BUNDLE)
    images, masks = np.stack([p.image for p in photos]), np.stack([p.mask for p in photos])
    scores: dict[str, np.ndarray] = {}
    mark, shown = row_mark(row, comparison, seed, MARK), _shown(len(photos))
    for kind in PROMPTS:
        prompts = [p.prompt if kind == "local" else p.global_prompt for p in photos]
        tell = bar(f"{kind} prompts {key}")
        painted = inpaint(backbone, controlnet, images, masks, prompts, sampler_of(budget, row), progress=tell)
        found = alike_scores(read_regions(classifier, painted, masks), photos)
        scores |= {f"{kind} {name}": values for name, values in found.items()}
        save_pictures(_folder(comparison, key, seed, kind), painted[shown], mark)
    facts = facts_of(row, budget, trained, backbone, controlnet)
    return RowResult(key, seed, mark, scores, {}, facts)


def _shown(count: int) -> list[int]:
    """Which of the scenes Figure 2 shows: the first of both kinds in turn."""
    half = count // 2
    return [number for i in range(min(_SHOWN, half)) for number in (i, half + i)]


def _folder(comparison: Comparison, key: str, seed: int, kind: str) -> Path:
    return comparison.out / f"{key}-{seed}" / f"alike_{kind}"


def summarise_alike(found: Mapping[str, Sequence[RowResult]]) -> dict[str, Any]:
    """For each row means with two-level intervals, and global minus local."""
    out: dict[str, Any] = {"rows": {}}
    for key, results in found.items():
        values = {m: np.stack([r.scores[m] for r in results]) for m in results[0].scores}
        means = {m: two_level(v, BOOTSTRAP_SEED).as_json() for m, v in values.items()}
        minus = {
            name: paired_difference(values[f"global {name}"], values[f"local {name}"], BOOTSTRAP_SEED).as_json()
            for name in MEASURES
        }
        out["rows"][key] = {"seeds": [r.seed for r in results], "mean": means, "global_minus_local": minus}
    return out


def alike_table(summary: Mapping[str, Any], rows: Mapping[str, Row], budget: Budget) -> Table:
    """A row for each model: both measures by both kinds of prompt, and what the global one changes."""
    lines = []
    for key, row in summary["rows"].items():
        cells = [cell(row["mean"][f"{kind} {name}"], 1) for kind in PROMPTS for name in MEASURES]
        minus = [cell(row["global_minus_local"][name], 1) for name in MEASURES]
        lines.append([rows[key].title, str(len(row["seeds"])), *cells, *minus])
    columns = ["row", "seeds", *(f"{kind}: {text}" for kind in PROMPTS for text in MEASURES.values())]
    columns += [f"global - local: {text}" for text in MEASURES.values()]
    notes = [
        f"{2 * (budget.alike or 0)} scenes, half with another object of the target's shape, half with one of its "
        "colour. "
        "Obeyed: the oracle reads the target's colour and shape in the hole. Another object's: it reads those of "
        "another object of the picture. Mean and 95 % two-level bootstrap interval; differences paired by scene."
    ]
    return Table("Figure 2, mini model", columns, lines, notes)


def alike_grid(rows: Mapping[str, Row], comparison: Comparison, seed: int) -> PictureGrid | None:
    """Both kinds of scenes in turn, by local and by global prompts, of the rows that were painted in `out`."""
    painted = {}
    for key, row in rows.items():
        mark = row_mark(row, comparison, seed, MARK)
        sets = [read_pictures(_folder(comparison, key, seed, kind), mark) for kind in PROMPTS]
        painted |= {f"{key}, {kind}": images for kind, images in zip(PROMPTS, sets, strict=True) if images is not None}
    if not painted:
        return None
    photos = alike_photos(comparison.budget)
    shown = [photos[number] for number in _shown(len(photos))]
    lines = [
        [p.image, np.where(p.mask[..., None], 0, p.image).astype(np.uint8), *(v[i] for v in painted.values())]
        for i, p in enumerate(shown)
    ]
    captions = [f"local: {p.prompt}; global: {p.global_prompt}" for p in shown]
    columns, masks = ["original", "masked", *painted], [p.mask for p in shown]
    return PictureGrid(columns, lines, captions, masks, title="Figure 2, mini model")
