"""The tables of a summary: quality, differences, shares of the gap, spread between seeds, cost and baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from refine_control.config import SamplerConfig
from refine_control.metrics.cost import ModelCost
from refine_control.metrics.image_pairs import CONVENTIONS
from refine_control.metrics.statistics import Interval
from refine_control.miniature.tasks.task import all_tasks
from refine_control.study.curves import Curve
from refine_control.study.feature_metrics import NETWORK_METRICS, metric_notes, not_computed
from refine_control.study.materials import Comparison
from refine_control.study.plan import TEACHER, Budget, Row, row_recipes
from refine_control.study.runs import make_sampler
from refine_control.study.signatures import advised_once, signatures, stage_signature
from refine_control.study.summary import GAP_METRICS, Intervals, ModelSummary, Summary
from refine_control.study.tables import Table

HEADINGS = {
    "psnr": "PSNR dB",
    "psnr_region": "PSNR region dB",
    "psnr_kept": "PSNR kept dB",
    "psnr_composited": "PSNR composited dB",
    "ssim": "SSIM",
    "ssim_region": "SSIM region",
    "ssim_composited": "SSIM composited",
    "sharpness": "high-pass energy, region",
    "colour": "colour obeyed %",
    "shape": "shape obeyed %",
    "both": "both obeyed %",
    "interference": "another object's %",
    **{metric: heading for task in all_tasks().values() for metric, heading in task.headings.items()},
    "clip_local": "CLIP local",
    "clip_global": "CLIP global",
    "clip_other": "CLIP other (less)",
    "lpips": "LPIPS (less)",
    "lpips_kept": "LPIPS kept (less)",
    "fid": "FID (less)",
    "kid": "KID x 1000 (less)",
    "cmmd": "CMMD (less)",
    "scene_perceptual": "scene perceptual (less)",
    "scene_frechet": "scene Fréchet (less)",
    "scene_mmd": "scene MMD (less)",
}
"""Every metric a table can show, in the order of `evaluate`'s columns; `(less)`: less is better."""
PAPER = {"psnr": "PSNR", "ssim": "SSIM", "fid": "FID", "lpips": "LPIPS", "cmmd": "CMMD"}
"""The metrics of the paper's tables, as it calls them."""
PAPER_NOTE = "The paper's numbers are of its own test photographs and stand beside ours, not against them."
NO_DIFFERENCE = "An interval with zero inside is no evidence of a difference."
NOT_BOUNDED = "not bounded"
NOT_BOUNDED_WHY = (
    "Not bounded: the teacher is not statistically distinguishable from {} (the 95 % interval of their difference "
    "contains 0), so any share fits the data."
)
COST_COLUMNS = ("layers", "ControlNet parameters", "GFLOP a step", "s a picture")


def digits(metric: str) -> int:
    """Decimal places that a metric is shown with."""
    percent = HEADINGS.get(metric, "").endswith("%")
    return 4 if metric.startswith(("ssim", "lpips", "scene_perceptual")) else 1 if percent else 2


def share_cell(share: Interval | None) -> str:
    """A share of the gap in per cent; `not bounded` without ends, empty without a gap."""
    if share is None:
        return ""
    return format(share.scaled(100), ".0f") if share.bounded else NOT_BOUNDED


Lines = Iterable[tuple[Sequence[str], Intervals]]
"""For each line of a table its first cells, and its intervals by metric."""


def _metric_table(
    caption: str, columns: Sequence[str], lines: Lines, metrics: Sequence[str], notes: Sequence[str]
) -> Table:
    """`columns`, then one for each metric: `19.25 [19.10, 19.41]` with the decimal places of the metric."""
    rows = [[*first, *(f"{values[m]:.{digits(m)}f}" for m in metrics)] for first, values in lines]
    return Table(caption, [*columns, *(HEADINGS[m] for m in metrics)], rows, notes)


def _with_paper(table: Table, papers: Sequence[Mapping[str, float]]) -> Table:
    """With further columns for the paper's numbers, if it has any of these lines."""
    published = [m for m in PAPER if any(m in paper for paper in papers)]
    rows = [
        [*row, *(f"{paper[m]:g}" if m in paper else "" for m in published)]
        for row, paper in zip(table.rows, papers, strict=True)
    ]
    return replace(table, columns=[*table.columns, *(f"paper's {PAPER[m]}" for m in published)], rows=rows)


# Tables of any models, by name.


def quality_table(summary: Summary, notes: Sequence[str] = ()) -> Table:
    """A row for each model, a column for each metric; `notes` follow the table's own."""
    about = f"Mean and 95 % bootstrap interval over {summary.samples} pictures. {CONVENTIONS}"
    lines = [([name], model.mean) for name, model in summary.models.items()]
    return _metric_table("Quality", ["model"], lines, summary.metrics, [about, *notes])


def difference_table(summary: Summary) -> Table:
    """A row for each pair of models."""
    lines = [([" - ".join(pair)], minus) for pair, minus in summary.differences.items()]
    note = f"On the same pictures and noise. {NO_DIFFERENCE}"
    return _metric_table("Paired differences", ["pair"], lines, summary.metrics, [note])


def cost_table(costs: Mapping[str, ModelCost], seconds: Mapping[str, float]) -> Table:
    """A row for each model."""
    rows = []
    for name, c in costs.items():
        numbers = [str(c.num_layers), f"{c.num_params:,}", f"{c.gflops_controlnet:.3f}", f"{c.gflops_step:.3f}"]
        times = [f"{1000 * c.step_seconds:.1f}", f"{1000 * seconds[name]:.0f}" if name in seconds else ""]
        rows.append([name, *numbers, *times, f"{c.peak_memory / 2**20:.0f}" if c.peak_memory else ""])
    columns = ["model", "layers", "ControlNet parameters", "GFLOP ControlNet", "GFLOP a denoising step"]
    columns += ["ms a denoising step", "ms an image, sampled in batches", "peak memory MiB"]
    note = (
        "1 multiply-add = 2 FLOP, one picture, no guidance, in the arithmetic that pictures are sampled in. Steps are "
        "timed alternately in one run (medians), those of other baselines alone; peak memory is of a fresh process "
        "that samples with this model."
    )
    return Table("Cost", columns, rows, [note])


def sampling_table(samplers: Mapping[str, SamplerConfig]) -> Table:
    """A row for each model: how it was sampled."""
    lines = []
    for name, sampler in samplers.items():
        noise = "fresh in each step" if sampler.stochastic else "of the start"
        scales = [f"{sampler.guidance_scale:g}", f"{sampler.conditioning_scale:g}"]
        lines.append([name, str(sampler.num_inference_steps), *scales, sampler.sigmas, noise])
    columns = ["model", "steps", "guidance", "conditioning scale", "noise levels", "noise"]
    note = "Each model is sampled as its folder says, or as the options of the command; guidance 1 or less is none."
    return Table("Sampling", columns, lines, [note])


class BaselineWay(NamedTuple):
    """How a baseline was sampled, in words, the parameters of its denoiser, and the paper's numbers of it."""

    facts: Mapping[str, str]
    denoiser_params: int
    paper: Mapping[str, float] = {}


def baseline_table(ways: Mapping[str, BaselineWay]) -> Table:
    """A row for each baseline."""
    facts = ("model", "resolution", "sampler", "license")
    lines = [[name, *(way.facts[f] for f in facts), f"{way.denoiser_params:,}"] for name, way in ways.items()]
    notes = ["The same test samples, masks and prompts as the other rows; each model is sampled in its own way."]
    notes += [PAPER_NOTE] if any(m in way.paper for way in ways.values() for m in PAPER) else []
    table = Table("Baselines", ["baseline", *facts, "denoiser parameters"], lines, notes)
    return _with_paper(table, [way.paper for way in ways.values()])


# Tables of the rows of a study, by title.


def _row_quality(summary: Summary, rows: Mapping[str, Row], title: str, notes: Sequence[str]) -> Table:
    """A row for each row of the study with its cost, a column for each metric, and the paper's numbers beside ours."""
    lines = []
    for key, model in summary.models.items():
        facts = model.results[0].facts
        values = [(facts.num_layers, "d"), (facts.num_params, ",d"), (facts.gflops_step, ".3f")]
        values += [(facts.seconds_per_image, ".3f")]
        cost = ["" if value is None else format(value, spec) for value, spec in values]
        lines.append(([rows[key].title, str(len(model.seeds)), *cost], model.mean))
    table = _metric_table(title, ["row", "seeds", *COST_COLUMNS], lines, summary.metrics, notes)
    return _with_paper(table, [rows[key].paper or {} for key in summary.models])


def _row_differences(summary: Summary, rows: Mapping[str, Row], against: str) -> Table:
    """Each row minus the anchor row, paired by sample and seed."""
    pairs = {key: summary.minus(key, against) for key in summary.models}
    lines = [([rows[key].title], minus) for key, minus in pairs.items() if minus]
    note = f"Paired by scene and seed. {NO_DIFFERENCE}"
    return _metric_table(f"Row minus {rows[against].title}", ["row"], lines, summary.metrics, [note])


def gap_table(summary: Summary, rows: Mapping[str, Row]) -> Table:
    """A row for each trained row: the share of the gap between Student_fc and the teacher that it closes."""
    shown = [m for m in GAP_METRICS if m in summary.metrics]
    lines = [[rows[key].title, *(share_cell(s.get(m)) for m in shown)] for key, s in summary.gap_closed.items()]
    notes = [
        "0 is Student_fc, 100 the teacher; 95 % bootstrap interval of the ratio, paired by scene and seed. The paper's "
        "student closes 76.5 % in PSNR."
    ]
    cells = {text for line in lines for text in line}
    notes += [NOT_BOUNDED_WHY.format("Student_fc")] if NOT_BOUNDED in cells else []
    notes += ["No number: the teacher's mean is not above Student_fc's."] if "" in cells else []
    return Table("Share of the gap closed, %", ["row", *(HEADINGS[m] for m in shown)], lines, notes)


def _spread_table(several: Mapping[str, ModelSummary], rows: Mapping[str, Row]) -> Table:
    """How far apart the seeds of a row are: the stability of its training."""
    lines = []
    for key, model in several.items():
        spread = [f"{value:.{digits(m)}f}" for m, value in model.spread.items()]
        lines.append([rows[key].title, str(len(model.seeds)), *spread])
    columns = ["row", "seeds", *(HEADINGS[m] for m in next(iter(several.values())).spread)]
    note = "Standard deviation of the seeds' means: training alone, the test samples being the same."
    return Table("Spread between training seeds", columns, lines, [note])


def _not_computed(summary: Summary, comparison: Comparison) -> list[str]:
    """For each metric of a published network that the table lacks: which file it needs, or which rows."""
    why = (
        "{} not computed: some rows were measured without its network; name its folder with --weights, and they are "
        "measured again"
    )
    absent, lacking = not_computed(comparison.weights), [m for m in NETWORK_METRICS if m not in summary.metrics]
    return [absent.get(m) or why.format(HEADINGS[m].removesuffix(" (less)")) for m in lacking]


def numerics_note(summary: Summary) -> list[str]:
    """A sentence if trained rows of the summary were made with different versions of the arithmetic."""
    groups: dict[str, list[str]] = {}
    for key, model in summary.models.items():
        if model.trained:
            versions = sorted({str(r.numerics or "unknown") for r in model.results})
            groups.setdefault(" and ".join(versions), []).append(key)
    if len(groups) < 2 and not any(" and " in name for name in groups):
        return []
    named = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in sorted(groups.items()))
    return [
        f"Rows by numerics version: {named}. Version 1 starts fp32 master weights from rounded weights, version 2 from "
        "exact ones; one row trained with both differs by 0.01 dB."
    ]


def row_tables(
    summary: Summary,
    rows: Mapping[str, Row],
    against: str,
    comparison: Comparison,
    title: str,
    notes: Sequence[str] = (),
) -> list[Table]:
    """Quality, differences to the row `against`, baselines, shares of the gap and spread, with how they were measured.

    `notes` are further sentences under the first."""
    budget, sampler = comparison.budget, make_sampler(comparison.budget)
    labeled, unlabeled, test = (count or "all" for count in (budget.labeled, budget.unlabeled, budget.test))
    note = (
        f"{test} test samples; {budget.steps} steps of {budget.batch_size} samples for every student; "
        f"|D_sl| {labeled}, |D_ssl| {unlabeled}; Euler, {sampler.num_inference_steps} steps, "
        f"guidance {sampler.guidance_scale:g}, {sampler.precision}. Mean and 95 % two-level bootstrap interval "
        f"(seeds, then scenes). {CONVENTIONS} Seconds a picture are of the whole evaluation, whatever else the machine "
        f"did. {PAPER_NOTE}"
    )
    about = [note, *metric_notes(summary.metrics, summary.samples), *notes]
    about += [*_not_computed(summary, comparison), *numerics_note(summary)]
    out = [_row_quality(summary, rows, f"{title}, {comparison.world}", about), _row_differences(summary, rows, against)]
    facts = {rows[key].title: model.results[0].facts for key, model in summary.models.items()}
    ways = {name: BaselineWay(f.baseline, f.denoiser_params or 0) for name, f in facts.items() if f.baseline}
    several = {key: model for key, model in summary.models.items() if model.spread}
    out += [baseline_table(ways)] if ways else []
    out += [gap_table(summary, rows)] if summary.gap_closed else []
    return out + ([_spread_table(several, rows)] if several else [])


def cost_curves(summary: Summary, rows: Mapping[str, Row]) -> list[Curve]:
    """Quality against cost: the students of the study of layers, and the teacher."""
    cost = {key: model.results[0].facts.gflops_step or 0.0 for key, model in summary.models.items()}
    students = sorted((key for key, row in rows.items() if "layers" in row.studies), key=cost.__getitem__)
    out = []
    for metric in GAP_METRICS if len(students) > 2 else ():
        if metric in summary.metrics:
            lines = {
                name: ([cost[key] for key in keys], [summary.models[key].mean[metric].mean for key in keys])
                for name, keys in (("students", students), ("teacher", [TEACHER]))
            }
            out.append(Curve(f"{HEADINGS[metric]} against cost", lines, x_label="GFLOP of a denoising step"))
    return out


def findings(summary: Summary, rows: Mapping[str, Row], against: str, budget: Budget) -> list[str]:
    """The failure signatures of every trained row, and of the second stage of the scale's anchor row."""
    recipes = {key: list(row_recipes(rows[key], budget, 0).values()) for key in summary.models}
    out = []
    for key in summary.models:
        if (minus := summary.minus(TEACHER, key)) and recipes[key] and rows[key].sampling is None:
            out += signatures(rows[key].title, minus, recipes[key])
    staged = summary.minus("sl", against) if rows[against].reference else None
    return advised_once(out) + (stage_signature(staged, recipes[against]) if staged else [])
