"""`refine-control evaluate`: teacher and students on the same pictures, masks, prompts and noise, with intervals."""

# N pictures, H W pixels

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refine_control.conditions.condition import take_condition
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.folders import A_CONTROLNET, refuse_other_kind
from refine_control.metrics.cost import ModelCost
from refine_control.models.backbone import Backbone
from refine_control.models.card import own_sampling
from refine_control.models.devices import device_name
from refine_control.models.loading import read_geometry, weights_mark
from refine_control.photos.shards import Shards
from refine_control.picture_grid import PictureGrid, repaint_grid
from refine_control.progress import Progress
from refine_control.records import Photo
from refine_control.runtime.description import is_exported
from refine_control.storage import MANIFEST, only_writer, sha256_file, write_json
from refine_control.study.compare import Result, compare, read_test, samplers_by_name
from refine_control.study.curves import Curve
from refine_control.study.diversity import compare_seeds
from refine_control.study.exported import add_exported, refuse_other_conditions
from refine_control.study.feature_metrics import metric_notes, scene_networks
from refine_control.study.model_cost import load_models, model_costs
from refine_control.study.plan import BASELINE, TEACHER
from refine_control.study.report import ReportData, command_line, publish
from refine_control.study.row_results import RowResult
from refine_control.study.row_tables import (
    HEADINGS,
    NOT_BOUNDED_WHY,
    BaselineWay,
    baseline_table,
    cost_table,
    difference_table,
    quality_table,
    sampling_table,
    share_cell,
)
from refine_control.study.signatures import signatures
from refine_control.study.summary import Summary, intervals_json, summarise
from refine_control.study.tables import Table, short, text_table

OURS = "ours"
_PICTURES = 12


def summarise_models(result: Result) -> Summary:
    """Means, differences of all pairs, and the share of the gap between fc and the teacher that `ours` closes."""
    names = list(result.scores)
    rows = {n: [RowResult(n, 0, "", result.scores[n], dict(result.sets.get(n, {})))] for n in names}
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return summarise(rows, HEADINGS, pairs, shares=[OURS])


def models_json(summary: Summary, result: Result) -> dict[str, object]:
    """A summary of models as metrics.json holds it."""
    out: dict[str, object] = {
        "samples": len(next(iter(result.images.values()))),
        "models": {n: intervals_json(model.mean) for n, model in summary.models.items()},
        "paired_differences": {" - ".join(pair): intervals_json(d) for pair, d in summary.differences.items()},
        "seconds_per_image": result.seconds,
    }
    return out | ({"gap_closed": intervals_json(summary.gap_closed[OURS])} if OURS in summary.gap_closed else {})


class Written(NamedTuple):
    """What an evaluation leaves: the report's path, the tables for a terminal, and all numbers."""

    report: Path
    text: str
    summary: dict[str, object]


def write_results(
    out: Path,
    title: str,
    photos: Sequence[Photo],
    result: Result,
    summary: Summary,
    costs: Mapping[str, ModelCost],
    facts: Mapping[str, str],
    *,
    missing: Iterable[str] = (),
    sentences: Sequence[str] = (),
    curves: Sequence[Curve] = (),
    tables: Sequence[Table] = (),
    grids: Mapping[str, PictureGrid] | None = None,
    made_by: Sequence[str] = (),
) -> Written:
    """metrics.json (with every picture's scores), grid.png, tables.md, tables.tex and report.html in `out`.

    `missing` are sentences on the metrics that were not computed."""
    per_image = {n: {m: [round(float(x), 6) for x in v] for m, v in s.items()} for n, s in result.scores.items()}
    described, keys = {n: c._asdict() for n, c in costs.items()}, [p.key for p in photos]
    numbers, absent = models_json(summary, result), list(missing)
    more = {"cost": described, "facts": facts, "keys": keys, "per_image": per_image}
    write_json(out / "metrics.json", {**numbers, **more})
    grids = {"grid.png": repaint_grid(photos[:_PICTURES], result.images), **(grids or {})}
    notes = [*metric_notes(summary.metrics, len(photos)), *absent]
    compared = [quality_table(summary, notes), *([difference_table(summary)] if len(result.scores) > 1 else [])]
    shown = [*compared, cost_table(costs, result.seconds), *tables]
    findings = [*sentences, *_gap_sentences(summary)]
    publish(out, ReportData(title, findings, facts, shown, grids, curves, made_by))
    report = out / "report.html"
    head = "; ".join(facts[fact] for fact in ("pictures", "sampler", "training") if fact in facts)
    lines = map(text_table, [*map(short, compared), *shown[len(compared) :]])
    text = "\n\n".join([head, *lines, "\n".join([*findings, *absent]), f"report: {report}"])
    return Written(report, text, {**numbers, "not_computed": absent, "report": str(report)})


def _gap_sentences(summary: Summary) -> list[str]:
    """The share of the gap that `ours` closes in each metric, if there is a gap."""
    out = []
    for m, share in summary.gap_closed.get(OURS, {}).items():
        gap = f"of the gap between {BASELINE} and the teacher in {HEADINGS[m]}"
        if share.bounded:
            value, interval = share_cell(share).split(" ", 1)
            out.append(f"ours closes {value} % {interval} {gap}.")
        else:
            out.append(f"The share {gap} that ours closes is not bounded. {NOT_BOUNDED_WHY.format(BASELINE)}")
    return out


def sampler_facts(sampler: SamplerConfig | Mapping[str, SamplerConfig], count: int) -> dict[str, str]:
    """How the pictures were sampled, for the report and the terminal: all models alike, or each of the names."""
    if isinstance(sampler, SamplerConfig):
        return {"pictures": f"{count} pictures", "sampler": _in_words(sampler)}
    alike: dict[str, list[str]] = {}
    for name, each in sampler.items():
        alike.setdefault(_in_words(each), []).append(name)
    named = [words if len(alike) == 1 else f"{', '.join(names)}: {words}" for words, names in alike.items()]
    return {"pictures": f"{count} pictures", "sampler": "; ".join(named)}


def _in_words(sampler: SamplerConfig) -> str:
    levels = ", even noise levels" if sampler.sigmas == "even" else ""
    levels += ", fresh noise in each step" if sampler.stochastic else ""
    return (
        f"Euler, {sampler.num_inference_steps} steps{levels}, guidance {sampler.guidance_scale:g}, "
        f"conditioning scale {sampler.conditioning_scale:g}, injection {sampler.injection}, seed {sampler.seed}, "
        f"{sampler.precision}"
    )


_SAMPLING_OPTIONS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "conditioning-scale": "conditioning_scale",
    "sigmas": "sigmas",
}
"""By option, the field of SamplerConfig."""


def _sampling_options(samplers: Mapping[str, SamplerConfig], default: SamplerConfig) -> dict[str, object]:
    """The sampling options that give these samplers again: what all models share, and where the teacher does not
    have its `default`; what differs otherwise, each model's card says."""
    options: dict[str, object] = {}
    for option, field in _SAMPLING_OPTIONS.items():
        values = {getattr(sampler, field) for sampler in samplers.values()}
        value = getattr(samplers[TEACHER], field)
        if len(values) == 1 or value != getattr(default, field):
            options[option] = f"{value:g}" if isinstance(value, float) else value
    return options


def _hashed(name: str, path: Path) -> str:
    """An input of a result with the beginning of its sha256."""
    return f"{name}: {path}" + (f", sha256 {sha256_file(path)[:16]}" if path.is_file() else "")


def _command(
    model: str,
    teacher: str | None,
    students: Mapping[str, Path],
    baselines: Mapping[str, str],
    test: Path,
    out: Path,
    samplers: Mapping[str, SamplerConfig],
    weights: Path | None,
    noise_seeds: int = 0,
) -> str:
    """The command line of this evaluation."""
    options: dict[str, object] = {
        "model": model,
        "teacher": teacher,
        "student": [f"{name}={folder}" for name, folder in students.items()],
        "baseline": [f"{name}={source}" for name, source in baselines.items()],
        "test": test,
        "out": out,
        **_sampling_options(samplers, SamplerConfig(**own_sampling(model, teacher))),
    }
    options |= {name: getattr(samplers[TEACHER], name) for name in ("injection", "seed", "precision")}
    return command_line(["evaluate"], {**options, "weights": weights, "noise-seeds": noise_seeds or None})


def _inputs(test: Path, teacher: str | None, students: Mapping[str, Path]) -> list[str]:
    """The inputs of an evaluation with their hashes."""
    teachers = [f"teacher: {weights_mark(teacher)}"] if teacher else []
    return [
        _hashed("test", test / MANIFEST),
        *teachers,
        *(
            _hashed(name, min(folder.glob("*.safetensors"), default=folder / MANIFEST))
            for name, folder in students.items()
        ),
    ]


def _machine(backbone: Backbone) -> dict[str, str]:
    return {"machine": f"{platform.machine()}, torch {torch.__version__}, {device_name(backbone.device)}"}


def _ways_table(baselines: Mapping[str, Any]) -> Table:
    ways = {name: BaselineWay(row.facts, row.cost.denoiser_params, row.paper) for name, row in baselines.items()}
    return baseline_table(ways)


def _add_baselines(*given: Any) -> Mapping[str, Any]:
    from refine_control.study.compare_baselines import add_baselines

    return add_baselines(*given)


def _test_photos(test: Path, model: str) -> list[Photo]:
    """The photos of test shards. Raises InvalidInputError for sizes that the model cannot paint."""
    photos, sizes = read_test(test), read_geometry(model)
    for height, width in sorted({photo.mask.shape for photo in photos}):
        sizes.check(height, width)
    return photos


def evaluate(
    model: str,
    teacher: str | None,
    students: Mapping[str, Path],
    test: Path,
    out: Path,
    sampler: SamplerConfig | Mapping[str, SamplerConfig],
    *,
    baselines: Mapping[str, str] | None = None,
    weights: Path | None = None,
    noise_seeds: int = 0,
    progress: Progress | None = None,
) -> Written:
    """Teacher and students on test shards, measured and written to `out` as `write_results` does.

    `sampler` is one for all, or those of `teacher` and the students by name with one seed and precision.
    `baselines` are models of another kind by name, each sampled in its own way: what `load_baseline` takes.
    `weights` is a folder with the networks of FID, LPIPS and CMMD; metrics whose network is missing are left out with a
    note. Everything but the oracle of scenes runs on the GPU if there is one.
    With `noise_seeds` the first scenes are painted by so many, and a table and `seeds.png` show how they differ.
    A student may be an exported pipeline, which its own runtime paints with; costs are of the others.
    The students named `ours` and `fc` give the share of the gap that is closed."""
    if TEACHER in students:
        raise InvalidInputError("a student cannot be called teacher, the name of the teacher's row; rename it")
    exported = {name: folder for name, folder in students.items() if is_exported(folder)}
    in_torch = {name: folder for name, folder in students.items() if name not in exported}
    for folder in in_torch.values():
        refuse_other_kind(folder, A_CONTROLNET)
    photos, condition = _test_photos(test, model), Shards(test).condition
    refuse_other_conditions(exported, condition)
    with only_writer(out):
        backbone, controlnets, own_backbones = load_models(model, teacher, in_torch)
        for name, controlnet in controlnets.items():
            take_condition(controlnet, condition, name)
        backbone.warn_unread([p.prompt for p in photos])
        networks = scene_networks(condition, photos, weights)
        samplers = samplers_by_name(sampler, [*controlnets, *exported])
        shared = samplers[TEACHER]
        sources = {TEACHER: teacher, **in_torch}
        costs = model_costs(backbone, controlnets, model, sources, shared.precision, own_backbones=own_backbones)
        result = compare(backbone, controlnets, photos, samplers, networks, progress, own_backbones)
        add_exported(result, exported, photos, samplers, networks, progress)
        tables = [sampling_table(samplers)] if any(each != shared for each in samplers.values()) else []
        if baselines:
            others = _add_baselines(result, baselines, photos, shared, networks, progress)
            costs |= {name: row.cost.model for name, row in others.items()}
            tables.append(_ways_table(others))
        grids: dict[str, PictureGrid] = {}
        if noise_seeds:
            painters = {n: (own_backbones.get(n, backbone), c, samplers[n]) for n, c in controlnets.items()}
            table, grids["seeds.png"] = compare_seeds(painters, photos, noise_seeds, networks.classifier, progress)
            tables.append(table)
        summary = summarise_models(result)
        facts = {"model": model, "test": str(test), **sampler_facts(samplers, len(photos))} | _machine(backbone)
        named = (model, teacher, students, baselines or {})
        facts["command"] = _command(*named, test, out, samplers, weights, noise_seeds)
        more: dict[str, Any] = {"missing": networks.missing.values(), "tables": tables, "grids": grids}
        more |= {"made_by": _inputs(test, teacher, students)}
        more["sentences"] = [s for n in students for s in signatures(n, summary.differences[TEACHER, n])]
        return write_results(out, f"Evaluation on {test.name}", photos, result, summary, costs, facts, **more)
