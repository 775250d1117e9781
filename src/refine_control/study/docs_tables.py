"""The tables of the documentation, computed from the finished rows under results/ or by arithmetic, without training.

A table stands between two lines, `<!-- table: NAME -->` and `<!-- end -->`. `make docs` runs

    python -m refine_control.study.docs_tables README.md docs/*.md

and rewrites what is between them; without files it prints the names. Intervals are those of `reproduce`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from refine_control.conditions.condition import INPAINT, condition_names
from refine_control.errors import InvalidInputError
from refine_control.metrics.statistics import Interval
from refine_control.miniature.tasks.task import find_task
from refine_control.storage import write_atomic
from refine_control.study.alike import alike_table, summarise_alike
from refine_control.study.full_size import full_size_table
from refine_control.study.plan import (
    ALIKE,
    BASELINE,
    FIGURE2,
    TARGETS,
    TEACHER,
    Row,
    anchor_row,
    measured_rows,
    read_budget,
    read_rows,
    select_rows,
)
from refine_control.study.row_results import RowFacts, RowResult, read_row
from refine_control.study.row_tables import HEADINGS, NOT_BOUNDED, NOT_BOUNDED_WHY, numerics_note, share_cell
from refine_control.study.small_devices import small_devices_table
from refine_control.study.step_tables import STEP_METRICS, step_table
from refine_control.study.summary import GAP_METRICS, HEADLINES, common_seeds, ratio_of_means, summarise
from refine_control.study.tables import Table, markdown_rows

RESULTS = Path("results")
HALVED = {
    BASELINE: f"`{BASELINE}` %",
    "balanced": "12 layers %",
    "balanced_long": "longer %",
    "edge@4": "4 steps %",
    "edge_long@4": "longer %",
    "edge@1": "1 step %",
}
"""Rows of the table of all conditions, and their headings."""
NOT_EVERYWHERE = {"balanced_long", "edge_long@4"}
"""Those of them that some conditions do without."""
HEADLINE = (TEACHER, "balanced", "inherit", "fc_inherit", "ours", BASELINE)
END = "<!-- end -->"
_BLOCK = re.compile(rf"(<!-- table: (\S+) -->\n)(.*?)({END}|<!-- table: |\Z)", re.DOTALL)


class Column(NamedTuple):
    """A metric as documents show it."""

    metric: str
    heading: str
    factor: float = 1
    places: int = 2

    def cell(self, interval: Interval) -> str:
        """The interval in the column's unit."""
        return format(interval.scaled(self.factor), f".{self.places}f")


MEANS = (
    Column("psnr_region", "region PSNR dB"),
    Column("psnr", "whole PSNR dB"),
    Column("ssim", "SSIM", places=3),
    Column("both", "obeyed %", places=1),
)
DIFFERENCES = (
    Column("psnr_region", "region PSNR dB"),
    Column("psnr", "whole PSNR dB"),
    Column("ssim", "SSIM x 1000", 1000, 1),
    Column("both", "obeyed, points", places=1),
    Column("scene_perceptual", "scene perceptual x 1000 (less)", 1000, 1),
    Column("scene_frechet", "scene Fréchet (less)", places=1),
)
COST = ("layers", "ControlNet parameters", "GFLOP a step")
SHARES = {"psnr_region": "gap closed, region %", "both": "gap closed, obeyed %"} | {
    m: f"gap closed, {HEADINGS[m]}" for m in HEADLINES
}


class Study(NamedTuple):
    """The rows of a table that have results, in the order of rows.yaml."""

    rows: Mapping[str, Row]
    results: Mapping[str, Sequence[RowResult]]

    def name(self, key: str) -> str:
        """Title and key of a row."""
        return self.rows[key].title if key == TEACHER else f"{self.rows[key].title} (`{key}`)"


@cache
def _finished(folder: Path, key: str) -> list[RowResult]:
    """The results of a row in a folder, by seed."""
    files = [path for path in folder.glob(f"{key}-*.json") if path.stem.removeprefix(f"{key}-").isdigit()]
    return sorted((result for path in files if (result := read_row(path))), key=lambda result: result.seed)


def read_study(folder: Path, rows: Mapping[str, Row]) -> Study:
    """The rows of which a folder has a result."""
    results = {key: each for key in rows if (each := _finished(folder, key))}
    return Study({key: rows[key] for key in results}, results)


def _cost(facts: RowFacts) -> list[str]:
    return [str(facts.num_layers), f"{facts.num_params:,}", f"{facts.gflops_step:.3f}"]


def means_table(
    study: Study, metrics: Sequence[Column] = MEANS, cost: bool = False, relative: str | None = None
) -> Table:
    """A row for each row of a study: seeds, with `cost` layers, parameters and operations, means, shares of the gap;
    the metric `relative` also in per cent of the teacher's."""
    summary = summarise(study.results, [column.metric for column in metrics], ())
    shown = [column for column in metrics if column.metric in summary.metrics]
    gaps = [m for m in GAP_METRICS if m in summary.metrics]
    lines = []
    for key, model in summary.models.items():
        before = [*(_cost(model.results[0].facts) if cost else ()), str(len(model.seeds)) if model.trained else ""]
        means = [column.cell(model.mean[column.metric]) for column in shown]
        if relative:
            ratio = ratio_of_means(model.results, study.results[TEACHER], relative)
            means.append("" if ratio is None or key == TEACHER else format(ratio.scaled(100), ".1f"))
        end = {TEACHER: "100", BASELINE: "0"}.get(key)
        shares = [end or share_cell(summary.gap_closed.get(key, {}).get(m)) for m in gaps]
        lines.append([study.name(key), *before, *means, *shares])
    notes = numerics_note(summary)
    notes += [NOT_BOUNDED_WHY.format(BASELINE)] if any(NOT_BOUNDED in line for line in lines) else []
    columns = ["row", *(COST if cost else ()), "seeds", *(column.heading for column in shown)]
    columns += [f"{HEADINGS[relative].rpartition(' ')[0]}, % of the teacher's"] if relative else []  # without its unit
    return Table("", [*columns, *(SHARES[m] for m in gaps)], lines, notes)


def differences_table(study: Study, anchor: str) -> Table:
    """A row for each trained row: its differences to the anchor row, bold if the interval excludes zero."""
    pairs = [(key, anchor) for key, each in study.results.items() if key != anchor and each[0].steps]
    summary = summarise(study.results, [column.metric for column in DIFFERENCES], pairs, shares=())
    shown = [column for column in DIFFERENCES if column.metric in summary.metrics]
    lines = []
    for (key, _), minus in summary.differences.items():
        bold = ["**" if minus[column.metric].excludes_zero else "" for column in shown]
        cells = [f"{b}{column.cell(minus[column.metric])}{b}" for b, column in zip(bold, shown, strict=True)]
        seeds = len(common_seeds(study.results[key], study.results[anchor])[0])
        lines.append([study.name(key), str(seeds), *cells])
    return Table("", [f"minus `{anchor}`", "seeds", *(column.heading for column in shown)], lines)


def cost_table(study: Study) -> Table:
    """Layers, parameters and operations of each count of layers, and their share of the teacher's, in per cent."""
    first = {key: each[0].facts for key, each in study.results.items()}
    by_layers, teacher = {f.num_layers or 0: f for f in first.values() if f.gflops_step}, first[TEACHER]
    lines = []
    for layers in sorted(by_layers, reverse=True):
        facts = by_layers[layers]
        params = 100 * (facts.num_params or 0) / (teacher.num_params or 1)
        gflops = 100 * (facts.gflops_step or 0) / (teacher.gflops_step or 1)
        count, number, step = _cost(facts)
        lines.append([count, number, f"{params:.0f}", step, f"{gflops:.0f}"])
    return Table("", [*COST[:2], "% of the teacher's", COST[2], "% of the teacher's"], lines)


def figure2_table(study: Study, budget: str) -> Table:
    """Figure 2's measurement at a budget."""
    rows = {key: row.model_copy(update={"title": study.name(key)}) for key, row in study.rows.items()}
    return alike_table(summarise_alike(study.results), rows, read_budget(budget))


def steps_table(study: Study, budget: str, metric: str) -> Table:
    """A metric of `step_tables.STEP_METRICS` by number of steps, at a budget."""
    summary = summarise(study.results, ("both", "sharpness"), ())
    table = step_table(summary, study.rows, read_budget(budget), STEP_METRICS[metric])
    if table is None:
        raise InvalidInputError(f"no finished row of the budget {budget} has {metric}")
    return table


def halved_table(results: Path) -> Table:
    """A row for each condition: the teacher's score, and what students have of it, in per cent."""
    lines = []
    for condition in condition_names():
        folder, metric = results / _conditions(condition), find_task(condition).headline
        studied = {key: each for key in (TEACHER, *HALVED) if (each := _finished(folder, key))}
        if {TEACHER, *HALVED} - studied.keys() <= NOT_EVERYWHERE:
            teacher = summarise(studied, [metric], ()).models[TEACHER].mean[metric]
            kept = {key: ratio_of_means(each, studied[TEACHER], metric) for key, each in studied.items()}
            ratios = [kept.get(key) for key in HALVED]
            shares = [format(ratio.scaled(100), ".1f") if ratio else "" for ratio in ratios]
            lines.append([condition, HEADINGS[metric], str(len(studied["balanced"])), f"{teacher:.1f}", *shares])
    return Table("", ["condition", "score", "seeds", "teacher", *HALVED.values()], lines)


def _conditions(condition: str) -> str:
    """The folder of a condition's rows under results/."""
    return "mini/conditions" if condition == INPAINT else f"mini/conditions/{condition}"


class DocTable(NamedTuple):
    """A table of the documentation: a folder of results, its rows and a layout."""

    folder: str
    rows: Mapping[str, Row]
    layout: Callable[[Study], Table]


@cache
def doc_tables() -> dict[str, DocTable]:
    """Every table by its name."""
    layers, alike, rows = select_rows(TARGETS["layers"]), measured_rows(ALIKE, TARGETS[FIGURE2]), read_rows()
    headline = partial(means_table, metrics=[c for c in MEANS if c.metric in GAP_METRICS], cost=True)
    out = {
        "headline": DocTable("mini/tables", {key: rows[key] for key in HEADLINE}, headline),
        "cost": DocTable("mini/tables", layers, cost_table),
        FIGURE2: DocTable("mini/tables/alike", alike, partial(figure2_table, budget="tables")),
        f"{FIGURE2}_long": DocTable("mini/long/alike", alike, partial(figure2_table, budget="long")),
    }
    usual = ("table1", "table3", "layers", "split", "init", "losses", "data", "prompts", "scarce", "parts")
    places = [(target, "", "mini/tables") for target in usual]
    places += [("table1", "_long", "mini/long"), ("table1", "_photos", "photos/photos")]
    for budget in ("steps", "steps_long"):
        chosen = select_rows(TARGETS["steps"])
        for metric in STEP_METRICS:
            layout = partial(steps_table, budget=budget, metric=metric)
            out[f"{budget}_{metric}"] = DocTable(f"mini/{budget}", chosen, layout)
    for condition in condition_names():
        task = find_task(condition)
        shown = [Column(metric, HEADINGS[metric]) for metric in task.headings]
        shown += [Column("psnr", "PSNR dB"), Column("ssim", "SSIM", places=3)]
        layout = partial(means_table, metrics=shown, relative=task.headline)
        out[f"conditions_{condition}"] = DocTable(_conditions(condition), select_rows(TARGETS["conditions"]), layout)
    for target in ("codi", "pairs", "orders", "placement"):
        layout = partial(steps_table, budget="steps", metric="obeyed")
        out[f"{target}_obeyed"] = DocTable("mini/steps", select_rows(TARGETS[target]), layout)
    for target, suffix, folder in [*places, ("table3", "_photos", "photos/photos")]:
        chosen, anchor = select_rows(TARGETS[target]), anchor_row(TARGETS[target])
        means, minus = partial(means_table, cost=target == "layers"), partial(differences_table, anchor=anchor)
        out[target + suffix] = DocTable(folder, chosen, means)
        out[f"{target}{suffix}_differences"] = DocTable(folder, chosen, minus)
    return out


OTHERS: Mapping[str, Callable[[Path], Table]] = {
    "full_size": lambda _: full_size_table(),
    "halved": halved_table,
    "small_devices": lambda _: small_devices_table(),
}
"""Tables of several folders or of none, by name."""


def doc_table(name: str, results: Path = RESULTS) -> str:
    """The markdown of a table. Raises InvalidInputError for an unknown name and where no row is finished."""
    tables = doc_tables()
    if name not in {**tables, **OTHERS}:
        names = ", ".join((*tables, *OTHERS))
        raise InvalidInputError(f"there is no table {name} for documents; the names are {names}")
    if name in OTHERS:
        table = OTHERS[name](results)
    else:
        folder, rows, layout = tables[name]
        study = read_study(results / folder, rows)
        if not study.results:
            raise InvalidInputError(f"{results / folder} has no finished rows of {name}; name the folder results")
        table = layout(study)
    return "\n\n".join([markdown_rows(table), *table.notes])


def rewrite(text: str, results: Path = RESULTS) -> str:
    """A document with every marked table computed again.

    Raises InvalidInputError for an unknown name and for a table without its end."""

    def replaced(block: re.Match[str]) -> str:
        begin, name, _, end = block.groups()
        if end != END:
            raise InvalidInputError(f"the table {name} of the document has no line {END}")
        return f"{begin}\n{doc_table(name, results)}\n\n{end}"

    return _BLOCK.sub(replaced, text)


def main(paths: Sequence[str]) -> None:
    """Rewrites the documents; without any it prints the names of the tables."""
    if not paths:
        print("\n".join((*doc_tables(), *OTHERS)))
    for path in map(Path, paths):
        try:
            text = rewrite(path.read_text())
        except InvalidInputError as error:
            sys.exit(f"{path}: {error}")
        if text != path.read_text():
            write_atomic(path, text)
            print(f"{path} rewritten")


if __name__ == "__main__":
    main(sys.argv[1:])
