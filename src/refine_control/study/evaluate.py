"""`refine-control evaluate`: teacher and students on the same pictures, masks, prompts and noise, with intervals."""

# N pictures, H W pixels

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from refine_control import __version__
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.metrics.cost import ModelCost
from refine_control.metrics.distances import set_difference, set_interval
from refine_control.metrics.statistics import BOOTSTRAP_SEED, bootstrap_mean, gap_closed, paired_difference
from refine_control.miniature.obedience import load_classifier
from refine_control.models.card import BUNDLE
from refine_control.models.devices import best_device, device_name
from refine_control.models.fit import check_controlnet
from refine_control.models.loading import load_backbone, load_controlnet, read_geometry, weights_mark
from refine_control.picture_grid import PictureGrid, picture_grid
from refine_control.progress import Progress
from refine_control.records import Photo
from refine_control.storage import MANIFEST, only_writer, sha256_file, write_atomic, write_json
from refine_control.study.compare import Result, compare, read_test
from refine_control.study.feature_metrics import FeatureNetworks, load_networks, metric_notes
from refine_control.study.model_cost import model_costs
from refine_control.study.report import Curve, ReportData, Table, write_report
from refine_control.study.signatures import signatures
from refine_control.study.tables import (
    HEADINGS,
    BaselineWay,
    baseline_table,
    cost_table,
    difference_table,
    quality_table,
    short,
    text_table,
    write_tables,
)

TEACHER = "teacher"


def summarise(result: Result, ours: str | None = None, baseline: str | None = None) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals, paired differences between all pairs of models, and the share of the gap
    from `baseline` to the teacher that `ours` closes, where there is a gap."""
    names = list(result.scores)
    known = [m for m in HEADINGS if all(m in s for s in result.scores.values())]
    of_sets = [m for m in HEADINGS if result.sets and all(m in s for s in result.sets.values())]
    models: dict[str, Any] = {}
    for n in names:
        models[n] = {m: bootstrap_mean(result.scores[n][m], BOOTSTRAP_SEED) for m in known}
        models[n] |= {m: set_interval([result.sets[n][m]], BOOTSTRAP_SEED) for m in of_sets}
    differences: dict[str, Any] = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            pair = {m: paired_difference(result.scores[a][m], result.scores[b][m], BOOTSTRAP_SEED) for m in known}
            pair |= {m: set_difference([result.sets[a][m]], [result.sets[b][m]], BOOTSTRAP_SEED) for m in of_sets}
            differences[f"{a} - {b}"] = {m: interval.as_json() for m, interval in pair.items()}
    out: dict[str, Any] = {
        "samples": len(next(iter(result.images.values()))),
        "models": {n: {m: interval.as_json() for m, interval in found.items()} for n, found in models.items()},
        "paired_differences": differences,
        "seconds_per_image": result.seconds,
    }
    if ours in names and baseline in names and TEACHER in names:
        out["gap_closed"] = {}
        for m in ("psnr_region", "both"):
            if m in known and result.scores[TEACHER][m].mean() > result.scores[baseline][m].mean():
                share = gap_closed(*(result.scores[n][m] for n in (TEACHER, baseline, ours)), seed=BOOTSTRAP_SEED)
                if np.isfinite(share.low):  # else the gap is not told from zero, and a share of it means nothing
                    out["gap_closed"][m] = share.as_json()
    return out


class Written(NamedTuple):
    """What an evaluation leaves: the report's path, the tables for a terminal, and all numbers."""

    report: Path
    text: str
    summary: dict[str, Any]


def pictures(
    photos: Sequence[Photo], images: Mapping[str, Sequence[np.ndarray] | np.ndarray], count: int = 12
) -> PictureGrid:
    """Original (mask outlined), masked, and every model's raw output, for the first `count` pictures."""
    rows = []
    for i, photo in enumerate(photos[:count]):
        hole = np.where(photo.mask[..., None], 0, photo.image).astype(np.uint8)
        rows.append([photo.image, hole, *(painted[i] for painted in images.values())])
    return PictureGrid(
        ["original", "masked", *images], rows, [p.prompt for p in photos[:count]], [p.mask for p in photos[:count]]
    )


def write_results(
    out: Path,
    title: str,
    photos: Sequence[Photo],
    result: Result,
    summary: dict[str, Any],
    costs: Mapping[str, ModelCost],
    facts: Mapping[str, str],
    *,
    networks: FeatureNetworks | None = None,
    sentences: Sequence[str] = (),
    curves: Sequence[Curve] = (),
    tables: Sequence[Table] = (),
    made_by: Sequence[str] = (),
) -> Written:
    """metrics.json (with every picture's scores), grid.png, tables.md, tables.tex and report.html in `out`."""
    per_image = {n: {m: [round(float(x), 6) for x in v] for m, v in s.items()} for n, s in result.scores.items()}
    described = {n: c._asdict() for n, c in costs.items()}
    keys = [p.key for p in photos]
    write_json(
        out / "metrics.json", {**summary, "cost": described, "facts": facts, "keys": keys, "per_image": per_image}
    )
    grid = pictures(photos, result.images)
    write_atomic(out / "grid.png", picture_grid(grid))
    known = next(iter(summary["models"].values()))
    told = [*metric_notes(known, len(photos)), *(networks.missing.values() if networks else ())]
    compared = [quality_table(summary, told), *([difference_table(summary)] if len(result.scores) > 1 else [])]
    shown = [*compared, cost_table(costs, result.seconds), *tables]
    write_tables(out, shown)
    signed, found = [f"refine-control {__version__}", *made_by], [*sentences, *_gap_sentences(summary)]
    report = out / "report.html"
    write_report(report, ReportData(title, found, facts, shown, [grid], list(curves), signed))
    head = "; ".join(facts[fact] for fact in ("pictures", "sampler", "training") if fact in facts)
    lines = map(text_table, [*map(short, compared), *shown[len(compared) :]])
    missing = list(networks.missing.values()) if networks else []
    text = "\n\n".join([head, *lines, "\n".join([*found, *missing]), f"report: {report}"])
    return Written(report, text, {**summary, "not_computed": missing, "report": str(report)})


def _gap_sentences(summary: Mapping[str, Any]) -> list[str]:
    """What share of the gap `ours` closes, where there is one."""
    return [
        f"ours closes {100 * v['mean']:.0f} % [{100 * v['low']:.0f}, {100 * v['high']:.0f}] of the gap between fc and "
        f"the teacher in {HEADINGS[m]}."
        for m, v in summary.get("gap_closed", {}).items()
    ]


def sampler_facts(sampler: SamplerConfig, count: int) -> dict[str, str]:
    """How the pictures were sampled, for the report and the terminal."""
    return {
        "pictures": f"{count} pictures",
        "sampler": f"Euler, {sampler.num_inference_steps} steps, guidance {sampler.guidance_scale:g}, "
        f"conditioning scale {sampler.conditioning_scale:g}, injection {sampler.injection}, seed {sampler.seed}, "
        f"{sampler.precision}",
    }


def _weights(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.safetensors"))), folder)


def _hashed(name: str, path: Path) -> str:
    """What a result was made from, with the beginning of its sha256."""
    return f"{name}: {path}" + (f", sha256 {sha256_file(path)[:16]}" if path.is_file() else "")


def _command(
    model: str,
    teacher: str | None,
    students: Mapping[str, Path],
    baselines: Mapping[str, str],
    test: Path,
    out: Path,
    sampler: SamplerConfig,
    weights: Path | None,
) -> str:
    """The command line that gives the same again."""
    parts: list[tuple[str, Any]] = [("model", model), ("teacher", teacher)]
    parts += [("student", f"{name}={folder}") for name, folder in students.items()]
    parts += [("baseline", f"{name}={source}") for name, source in baselines.items()]
    parts += [("test", test), ("out", out), ("steps", sampler.num_inference_steps)]
    parts += [("guidance", f"{sampler.guidance_scale:g}"), ("conditioning-scale", f"{sampler.conditioning_scale:g}")]
    parts += [("injection", sampler.injection), ("seed", sampler.seed), ("precision", sampler.precision)]
    parts += [("weights", weights)]
    return " ".join(["refine-control evaluate", *(f"--{name} {value}" for name, value in parts if value is not None)])


def evaluate(
    model: str,
    teacher: str | None,
    students: Mapping[str, Path],
    test: Path,
    out: Path,
    sampler: SamplerConfig,
    *,
    baselines: Mapping[str, str] | None = None,
    weights: Path | None = None,
    progress: Progress | None = None,
) -> Written:
    """Teacher and students on test shards, measured and written to `out` as `write_results` does.

    `baselines` are models of another kind by name, each sampled in its own way: what `load_baseline` takes.
    `weights` is a folder with the networks of FID, LPIPS and CMMD; what is not there is said and left out.
    All runs on the GPU where there is one, the scene's oracle apart.
    The students named `ours` and `fc` give the share of the gap that is closed."""
    if TEACHER in students:
        raise InvalidInputError(
            "a student cannot be called teacher, the name of the teacher's row; give it another name"
        )
    photos, sizes = read_test(test), read_geometry(model)
    for height, width in sorted({photo.mask.shape for photo in photos}):
        sizes.check(height, width)
    with only_writer(out):
        backbone = load_backbone(model, load_controlnet(teacher) if teacher else None, device=best_device())
        controlnets = {TEACHER: backbone.pipeline.controlnet, **{n: load_controlnet(f) for n, f in students.items()}}
        for name, controlnet in controlnets.items():
            check_controlnet(controlnet.config, backbone.transformer.config, students.get(name, TEACHER))
            controlnet.to(backbone.device)
        backbone.warn_unread([p.prompt for p in photos])
        known = all("colour" in p.meta and "shape" in p.meta for p in photos)
        networks = load_networks(weights, load_classifier(BUNDLE) if known else None)
        sources = {TEACHER: teacher, **{n: str(f) for n, f in students.items()}}
        costs = model_costs(backbone, controlnets, model, sources, sampler.precision)
        result = compare(backbone, controlnets, photos, sampler, networks, progress)
        tables = []
        if baselines:
            from refine_control.study.baseline_rows import add_baselines

            others = add_baselines(result, baselines, photos, sampler, networks, progress)
            costs |= {name: row.cost.model for name, row in others.items()}
            ways = {n: BaselineWay(r.facts, r.cost.denoiser_params, r.paper) for n, r in others.items()}
            tables = [baseline_table(ways)]
        summary = summarise(result, "ours", "fc")
        facts = {"model": model, "test": str(test), **sampler_facts(sampler, len(photos))}
        facts |= {"machine": f"{platform.machine()}, torch {torch.__version__}, {device_name(backbone.device)}"}
        facts["command"] = _command(model, teacher, students, baselines or {}, test, out, sampler, weights)
        title = f"Evaluation on {test.name}"
        told = [s for n in students for s in signatures(n, summary["paired_differences"][f"{TEACHER} - {n}"])]
        shown: dict[str, Any] = {"networks": networks, "sentences": told, "tables": tables}
        shown["made_by"] = [
            _hashed("test", test / MANIFEST),
            *([f"teacher: {weights_mark(teacher)}"] if teacher else []),
            *(_hashed(n, _weights(f)) for n, f in students.items()),
        ]
        return write_results(out, title, photos, result, summary, costs, facts, **shown)
