"""The tables of several rows and seeds: means, differences to ours and the share of the gap, with their intervals."""

# S seeds, N test scenes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refine_control.metrics.distances import set_difference, set_interval
from refine_control.metrics.image_pairs import CONVENTIONS
from refine_control.metrics.statistics import BOOTSTRAP_SEED, gap_closed, paired_difference, two_level
from refine_control.study.comparison import Budget, Row, row_recipes
from refine_control.study.curves import Curve
from refine_control.study.feature_metrics import NETWORK_METRICS, SET_METRICS, metric_notes, not_computed
from refine_control.study.materials import Comparison
from refine_control.study.report import Table
from refine_control.study.row_results import RowResult
from refine_control.study.rows import sampler_of
from refine_control.study.signatures import advised_once, signatures, stage_signature
from refine_control.study.tables import HEADINGS, PAPER, PAPER_NOTE, BaselineWay, baseline_table, cell, digits

COST_COLUMNS = ("layers", "ControlNet parameters", "GFLOP a step", "s a picture")
TEACHER, BASELINE = "teacher", "fc"
_GAP = ("psnr_region", "both")
_OBEYED = ("colour", "shape", "both", "clip_local", "clip_global", "clip_other")
_SHOWN = ("psnr_region", "psnr", "psnr_kept", "ssim", "lpips", "lpips_kept", *_OBEYED, "scene_perceptual")


def _stacked(results: Sequence[RowResult], metric: str) -> np.ndarray:
    """(S, N) of one row; (N,) of a row without seeds."""
    values = np.stack([r.scores[metric] for r in results])
    return values[0] if len(values) == 1 else values


def _common_seeds(
    left: Sequence[RowResult], right: Sequence[RowResult]
) -> tuple[Sequence[RowResult], Sequence[RowResult]]:
    """The results of both for the training seeds that both have; one that was never trained stands beside them all."""
    if not (left[0].facts.get("steps") and right[0].facts.get("steps")):
        return left, right
    seeds = {r.seed for r in left} & {r.seed for r in right}
    return [r for r in left if r.seed in seeds], [r for r in right if r.seed in seeds]


def summarise(found: Mapping[str, Sequence[RowResult]], against: str) -> dict[str, Any]:
    """Means, differences to the row `against`, and the share of the gap between fc and the teacher that ours closes."""
    made = [r for results in found.values() for r in results]
    metrics = [m for m in _SHOWN if all(m in r.scores for r in made)]
    of_sets = [m for m in SET_METRICS if all(m in r.sets for r in made)]
    values = {key: {m: _stacked(results, m) for m in metrics} for key, results in found.items()}
    sets = {key: {m: [r.sets[m] for r in results] for m in of_sets} for key, results in found.items()}
    out: dict[str, Any] = {"metrics": [*metrics, *of_sets], "against": against, "rows": {}, "gap_closed": {}}
    for key, results in found.items():
        row: dict[str, Any] = {
            "seeds": [r.seed for r in results],
            "samples": max((len(v) for v in results[0].scores.values()), default=0),
            "facts": [r.facts for r in results],
            "mean": {m: two_level(np.atleast_2d(values[key][m]), BOOTSTRAP_SEED).as_json() for m in metrics}
            | {m: set_interval(sets[key][m], BOOTSTRAP_SEED).as_json() for m in of_sets},
        }
        if len(results) > 1:
            row["spread"] = {m: float(values[key][m].mean(1).std(ddof=1)) for m in metrics}
        if key != against and against in found:
            own, ours = _common_seeds(results, found[against])
            row["minus"] = {
                m: paired_difference(_stacked(own, m), _stacked(ours, m), BOOTSTRAP_SEED).as_json() for m in metrics
            } | {
                m: set_difference([r.sets[m] for r in own], [r.sets[m] for r in ours], BOOTSTRAP_SEED).as_json()
                for m in of_sets
            }
        if TEACHER in found and results[0].facts.get("steps"):
            row["teacher_minus"] = {
                m: paired_difference(values[TEACHER][m], values[key][m], BOOTSTRAP_SEED).as_json() for m in metrics
            }
        out["rows"][key] = row
    if {TEACHER, BASELINE} <= set(found):
        for key in found:
            if key != BASELINE and found[key][0].facts.get("steps"):
                out["gap_closed"][key] = _gap_closed(found, key, metrics)
    return out


def _gap_closed(found: Mapping[str, Sequence[RowResult]], key: str, metrics: Sequence[str]) -> dict[str, Any]:
    """By metric of _GAP: the share of the way from Student_fc to the teacher that a row goes."""
    out = {}
    for m in _GAP:
        baseline, own = _common_seeds(found[BASELINE], found[key])
        if m in metrics and own:
            parts = [_stacked(results, m) for results in (found[TEACHER], baseline, own)]
            if np.mean(parts[0]) > np.mean(parts[1]):  # else there is no gap to close
                out[m] = gap_closed(*parts, seed=BOOTSTRAP_SEED).as_json()
    return out


def quality(summary: Mapping[str, Any], rows: Mapping[str, Row], title: str, notes: Sequence[str]) -> Table:
    """A row for each model, a column for each metric, and the paper's numbers beside ours."""
    metrics = summary["metrics"]
    papers = {key: rows[key].paper or {} for key in summary["rows"]}
    told = [m for m in PAPER if any(m in paper for paper in papers.values())]
    lines = []
    for key, row in summary["rows"].items():
        beside = [f"{papers[key][m]:g}" if m in papers[key] else "" for m in told]
        cells = [cell(row["mean"][m], digits(m)) for m in metrics]
        lines.append([rows[key].title, str(len(row["seeds"])), *_cost_cells(row["facts"][0]), *cells, *beside])
    columns = ["row", "seeds", *COST_COLUMNS, *(HEADINGS[m] for m in metrics)]
    return Table(title, [*columns, *(f"paper's {PAPER[m]}" for m in told)], lines, notes)


def _cost_cells(facts: Mapping[str, Any]) -> list[str]:
    told = [(facts.get("num_layers"), "d"), (facts.get("num_params"), ",d"), (facts.get("gflops_step"), ".3f")]
    told += [(facts.get("seconds_per_image"), ".3f")]
    return ["" if value is None else format(value, spec) for value, spec in told]


def differences(summary: Mapping[str, Any], rows: Mapping[str, Row]) -> Table:
    """Each row minus the one that all are held against, paired by scene and seed."""
    metrics = summary["metrics"]
    lines = [
        [rows[key].title, *(cell(row["minus"][m], digits(m)) for m in metrics)]
        for key, row in summary["rows"].items()
        if "minus" in row
    ]
    note = "Paired by scene and seed. An interval with zero inside is no evidence of a difference."
    title = f"Row minus {rows[summary['against']].title}"
    return Table(title, ["row", *(HEADINGS[m] for m in metrics)], lines, [note])


def cost_curves(summary: Mapping[str, Any], rows: Mapping[str, Row]) -> list[Curve]:
    """Quality against cost: ours and the same with other counts of layers, and the teacher."""
    chosen = [key for key, row in rows.items() if "layers" in row.studies]
    if len(chosen) < 3:
        return []
    by_cost = sorted(chosen, key=lambda key: summary["rows"][key]["facts"][0]["gflops_step"])
    out = []
    for metric in ("psnr_region", "both"):
        if metric not in summary["metrics"]:
            continue
        lines = {}
        for name, keys in (("students", by_cost), ("teacher", [TEACHER])):
            found = [summary["rows"][key] for key in keys]
            lines[name] = ([r["facts"][0]["gflops_step"] for r in found], [r["mean"][metric]["mean"] for r in found])
        out.append(Curve(f"{HEADINGS[metric]} against cost", lines, x_label="GFLOP of a denoising step"))
    return out


def gap_table(summary: Mapping[str, Any], rows: Mapping[str, Row]) -> Table:
    """Each trained row: how much of the way from Student_fc to the teacher it goes."""
    shown = [m for m in _GAP if m in summary["metrics"]]
    lines = [
        [rows[key].title, *(_share_cell(shares.get(m)) for m in shown)] for key, shares in summary["gap_closed"].items()
    ]
    notes = [
        "0 is Student_fc, 100 the teacher; 95 % bootstrap interval of the ratio, paired by scene and seed. The paper's "
        "student closes 76.5 % in PSNR. No number: the teacher is not told from Student_fc."
    ]
    return Table("Share of the gap closed, %", ["row", *(HEADINGS[m] for m in shown)], lines, notes)


def spread_table(summary: Mapping[str, Any], rows: Mapping[str, Row]) -> Table:
    """How far apart the seeds of a row are: the stability of its training."""
    lines = [
        [rows[key].title, str(len(row["seeds"])), *(f"{row['spread'][m]:.{digits(m)}f}" for m in row["spread"])]
        for key, row in summary["rows"].items()
        if "spread" in row
    ]
    metrics = next(row["spread"] for row in summary["rows"].values() if "spread" in row)
    note = "Standard deviation of the seeds' means: training alone, the test samples being the same."
    return Table("Spread between training seeds", ["row", "seeds", *(HEADINGS[m] for m in metrics)], lines, [note])


def _share_cell(share: Mapping[str, float] | None) -> str:
    if share is None or share["low"] is None:
        return ""
    return cell({name: 100 * share[name] for name in ("mean", "low", "high")}, 0)


def findings(summary: Mapping[str, Any], rows: Mapping[str, Row], budget: Budget) -> list[str]:
    """The failure signatures of every trained row, and of the second stage of ours."""
    found = summary["rows"]
    recipes = {key: list(row_recipes(rows[key], budget, 0).values()) for key in found}
    out = []
    if TEACHER in found:
        for key, row in found.items():
            if "teacher_minus" in row and recipes[key]:
                out += signatures(rows[key].title, row["teacher_minus"], recipes[key])
    against = summary["against"]
    staged = "sl" in found and rows[against].reference
    return advised_once(out) + (stage_signature(found["sl"]["minus"], recipes[against]) if staged else [])


def _baselines(summary: Mapping[str, Any], rows: Mapping[str, Row]) -> list[Table]:
    found = {rows[key].title: row["facts"][0] for key, row in summary["rows"].items()}
    ways = {
        title: BaselineWay(facts["baseline"], facts["denoiser_params"])
        for title, facts in found.items()
        if "baseline" in facts
    }
    return [baseline_table(ways)] if ways else []


def _not_computed(summary: Mapping[str, Any], comparison: Comparison) -> list[str]:
    """For each metric of a published network that the table lacks: which file it needs, or which rows."""
    lacking = [m for m in NETWORK_METRICS if m not in summary["metrics"]]
    absent = not_computed(comparison.weights)
    return [
        absent.get(m)
        or f"{HEADINGS[m].removesuffix(' (less)')} not computed: some rows were measured without its network; name its "
        "folder with --weights, and they are measured again"
        for m in lacking
    ]


def tables_of(
    summary: dict[str, Any], rows: Mapping[str, Row], comparison: Comparison, names: str, notes: Sequence[str] = ()
) -> list[Table]:
    """Quality, differences, shares of the gap and the spread between seeds, with how they were measured.

    `notes` are further sentences under the first."""
    budget, sampler = comparison.budget, sampler_of(comparison.budget)
    labeled, unlabeled, test = (count or "all" for count in (budget.labeled, budget.unlabeled, budget.test))
    note = (
        f"{test} test samples; {budget.steps} steps of {budget.batch_size} samples for every student; "
        f"|D_sl| {labeled}, |D_ssl| {unlabeled}; Euler, {sampler.num_inference_steps} steps, "
        f"guidance {sampler.guidance_scale:g}, {sampler.precision}. Mean and 95 % two-level bootstrap interval "
        f"(seeds, then scenes). {CONVENTIONS} Seconds a picture are of the whole evaluation, whatever else the machine "
        f"did. {PAPER_NOTE}"
    )
    told = metric_notes(summary["metrics"], next(iter(summary["rows"].values()))["samples"])
    told += [*notes, *_not_computed(summary, comparison)]
    out = [quality(summary, rows, f"{names}, {comparison.world}", [note, *told]), differences(summary, rows)]
    out += _baselines(summary, rows)
    out += [gap_table(summary, rows)] if summary["gap_closed"] else []
    return out + ([spread_table(summary, rows)] if any("spread" in row for row in summary["rows"].values()) else [])
