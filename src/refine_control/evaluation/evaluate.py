"""`refine-control evaluate`: teacher and students on the same pictures, masks, prompts and noise, with intervals."""

# N pictures, H W pixels

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control.config import SamplerConfig
from refine_control.data.buckets import grouped
from refine_control.data.records import Photo
from refine_control.errors import InvalidInputError
from refine_control.evaluation import metrics
from refine_control.evaluation.distances import SetScore, set_difference, set_interval
from refine_control.evaluation.feature_metrics import (
    FeatureNetworks,
    Seen,
    load_networks,
    metric_notes,
    pair_scores,
    see,
    set_scores,
)
from refine_control.evaluation.model_cost import ModelCost, model_costs
from refine_control.evaluation.obedience import load_classifier, obedience
from refine_control.evaluation.pictures import PictureGrid, picture_grid
from refine_control.evaluation.report import Curve, ReportData, Table, write_report
from refine_control.evaluation.signatures import signatures
from refine_control.evaluation.statistics import BOOTSTRAP_SEED, bootstrap_mean, gap_closed, paired_difference
from refine_control.evaluation.tables import HEADINGS, OBEYED, cost_table, difference_table, quality_table
from refine_control.models.backbone import Backbone
from refine_control.models.cpu_kernels import use_cpu_kernels
from refine_control.models.devices import best_device, device_name
from refine_control.models.loading import load_backbone, load_controlnet
from refine_control.models.mini import BUNDLE
from refine_control.pipeline import inpaint, warn_unknown_words
from refine_control.storage import only_writer, write_atomic, write_json

TEACHER = "teacher"
Progress = Callable[[int, int, str], None]
Scores = dict[str, np.ndarray]


class Result(NamedTuple):
    """What `compare` found."""

    scores: dict[str, Scores]
    """By model, then metric: (N,) values."""
    sets: dict[str, dict[str, SetScore]]
    """By model, then metric: what has no value for each picture."""
    images: dict[str, np.ndarray | list[np.ndarray]]
    """By model: (N,H,W,3) uint8, uncomposited; N of (H,W,3) where there are several sizes."""
    seconds: dict[str, float]
    """By model: per image, of the whole evaluation."""


def score(
    photos: Sequence[Photo], painted: np.ndarray, networks: FeatureNetworks, seen: tuple[Seen, Seen] | None = None
) -> Scores:
    """All metrics of pictures of one model: painted (N,H,W,3) uint8 against the photos; obedience with an oracle.

    `seen` is what the networks made of photos and painted pictures; without it they look here."""
    reference, masks = np.stack([p.image for p in photos]), np.stack([p.mask for p in photos])
    composited = metrics.composite(reference, painted, masks)
    out = {
        "psnr": metrics.psnr(reference, painted),
        "psnr_region": metrics.psnr(reference, painted, masks),
        "psnr_composited": metrics.psnr(reference, composited),
        "ssim": metrics.ssim(reference, painted),
        "ssim_composited": metrics.ssim(reference, composited),
    }
    if (~masks).any((1, 2)).all():
        out["psnr_kept"] = metrics.psnr(reference, painted, ~masks)
    inner = masks[:, metrics.SSIM_RADIUS : -metrics.SSIM_RADIUS, metrics.SSIM_RADIUS : -metrics.SSIM_RADIUS]
    if inner.any((1, 2)).all():
        out["ssim_region"] = metrics.ssim(reference, painted, masks)
    seen = seen or (see(networks, reference, masks), see(networks, painted, masks))
    out |= pair_scores(networks, photos, painted, seen)
    if networks.classifier is not None:
        colour, shape = (np.array([p.meta[name] for p in photos]) for name in ("colour", "shape"))
        obeyed = obedience(networks.classifier, painted, masks, colour, shape)
        out |= {name: 100.0 * getattr(obeyed, name) for name in OBEYED}
    return out


def in_precision(precision: str, backbone: Backbone, *controlnets: Any) -> None:
    """Casts transformer and ControlNets in place, all where the backbone is; bf16 on a CPU gets its own kernels."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if dtype == torch.bfloat16 and backbone.device.type == "cpu":
        use_cpu_kernels(backbone.transformer, *controlnets)
    for network in (backbone.transformer, *controlnets):
        network.to(backbone.device, dtype)


def compare(
    backbone: Backbone,
    controlnets: Mapping[str, Any],
    photos: Sequence[Photo],
    sampler: SamplerConfig,
    networks: FeatureNetworks | None = None,
    progress: Progress | None = None,
) -> Result:
    """Repaints the photos with every ControlNet by name and scores them; the noise of a picture is the same for all.

    With `networks` also the metrics that need one; distances of sets only from two pictures on.
    Transformer and ControlNets are cast to `sampler.precision` and put on the backbone's device in place: measure costs
    before."""
    import time

    in_precision(sampler.precision, backbone, *controlnets.values())
    numbers = list(grouped(p.mask.shape for p in photos).values())  # pictures of one size are painted together
    groups = [_Group(photos, each) for each in numbers]
    networks = networks or FeatureNetworks()
    references = [see(networks, group.images, group.masks) for group in groups]
    result = Result({}, {}, {}, {})
    for number, (name, controlnet) in enumerate(controlnets.items()):
        began, done, painted = time.perf_counter(), 0, []
        for group in groups:

            def tell(now: int, total: int, word: str, before: int = number * len(photos) + done) -> None:
                if progress:
                    progress(before + now, len(controlnets) * len(photos), name)  # noqa: B023

            prompts = [p.prompt for p in group.photos]
            painted.append(
                inpaint(backbone, controlnet, group.images, group.masks, prompts, sampler, first=done, progress=tell)
            )
            done += len(group.photos)
        result.seconds[name] = (time.perf_counter() - began) / len(photos)
        seen = [see(networks, each, group.masks) for each, group in zip(painted, groups, strict=True)]
        scores = [
            score(group.photos, each, networks, (before, after))
            for group, each, before, after in zip(groups, painted, references, seen, strict=True)
        ]
        result.images[name] = painted[0] if len(groups) == 1 else _in_order(painted, numbers)
        result.scores[name] = _joined(scores, numbers)
        result.sets[name] = set_scores(_joined(references, numbers), _joined(seen, numbers))
    return result


class _Group:
    """Pictures of one size."""

    def __init__(self, photos: Sequence[Photo], numbers: Sequence[int]):
        self.photos = [photos[number] for number in numbers]
        self.images, self.masks = np.stack([p.image for p in self.photos]), np.stack([p.mask for p in self.photos])


def _in_order(groups: Sequence[Any], numbers: Sequence[Sequence[int]]) -> list[Any]:
    """The items of all groups, each at its number."""
    found = {n: item for own, items in zip(numbers, groups, strict=True) for n, item in zip(own, items, strict=True)}
    return [found[number] for number in sorted(found)]


def _joined(groups: Sequence[Mapping[str, np.ndarray]], numbers: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """By name, the rows of all groups in the order of the pictures; names that every group has."""
    if len(groups) == 1:
        return dict(groups[0])
    names = [name for name in groups[0] if all(name in group for group in groups)]
    return {name: np.stack(_in_order([group[name] for group in groups], numbers)) for name in names}


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
) -> Path:
    """metrics.json (with every picture's scores), grid.png and report.html in `out`; returns the report's path."""
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
    shown = [quality_table(summary, told), cost_table(costs, result.seconds)]
    if len(result.scores) > 1:
        shown.insert(1, difference_table(summary))
    data = ReportData(title, list(sentences), facts, [*shown, *tables], [grid], list(curves))
    write_report(out / "report.html", data)
    return out / "report.html"


def sampler_facts(sampler: SamplerConfig, count: int) -> dict[str, str]:
    """How the pictures were sampled, for the report and the terminal."""
    return {
        "pictures": str(count),
        "sampler": f"Euler, {sampler.num_inference_steps} steps, guidance {sampler.guidance_scale:g}, "
        f"conditioning scale {sampler.conditioning_scale:g}, injection {sampler.injection}, seed {sampler.seed}, "
        f"{sampler.precision}",
    }


def read_test(folder: Path) -> list[Photo]:
    """The photos of a folder of shards. Raises InvalidInputError when it is none or has no pixels in its holes."""
    from refine_control.data.records import UNLABELED
    from refine_control.data.shards import Shards, open_manifest

    manifest = open_manifest(folder)
    if manifest["role"] == UNLABELED:
        raise InvalidInputError(f"{folder} has the role unlabeled: there is nothing to compare with; give test shards")
    shards = Shards(folder)
    if len(shards) < 2:
        raise InvalidInputError(f"{folder} holds {len(shards)} sample; intervals need at least 2")
    return [shards[i] for i in range(len(shards))]


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
) -> dict[str, Any]:
    """Teacher and students on test shards; writes `out` and returns the summary with the report's path.

    `baselines` are models of another kind by name, each sampled in its own way: what `load_baseline` takes.
    `weights` is a folder with the networks of FID, LPIPS and CMMD; what is not there is said and left out.
    All runs on the GPU where there is one, the scene's oracle apart.
    The students named `ours` and `fc` give the share of the gap that is closed."""
    photos = read_test(test)
    warn_unknown_words(model, [p.prompt for p in photos])
    with only_writer(out):
        backbone = load_backbone(model, load_controlnet(teacher) if teacher else None, device=best_device())
        controlnets = {TEACHER: backbone.pipeline.controlnet, **{n: load_controlnet(f) for n, f in students.items()}}
        for controlnet in controlnets.values():
            controlnet.to(backbone.device)
        known = all("colour" in p.meta and "shape" in p.meta for p in photos)
        networks = load_networks(weights, load_classifier(BUNDLE) if known else None)
        sources = {TEACHER: teacher, **{n: str(f) for n, f in students.items()}}
        costs = model_costs(backbone, controlnets, model, sources)
        result = compare(backbone, controlnets, photos, sampler, networks, progress)
        tables = []
        if baselines:
            from refine_control.evaluation.baseline_rows import add_baselines, baseline_table

            others = add_baselines(result, baselines, photos, sampler, networks, progress)
            costs |= {name: row.cost.model for name, row in others.items()}
            tables = [baseline_table(others)]
        summary = summarise(result, "ours", "fc")
        facts = {"model": model, "test": str(test), **sampler_facts(sampler, len(photos))}
        facts["device"] = device_name(backbone.device)
        title = f"Evaluation on {test.name}"
        told = [s for n in students for s in signatures(n, summary["paired_differences"][f"{TEACHER} - {n}"])]
        report = write_results(
            out, title, photos, result, summary, costs, facts, networks=networks, sentences=told, tables=tables
        )
    return {**summary, "not_computed": list(networks.missing.values()), "report": str(report)}
