"""Model and data of a comparison: rendered scenes, small photographs, or a folder of `data build`.

Shards of the three roles become caches under `out/cache`. A row that is trained on less or other data than the
budget's (`Row.data`), or on the teacher's completions, has its own caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refine_control.cache.building import build_cache, completion_sampler
from refine_control.conditions.condition import find_condition, take_condition
from refine_control.errors import InvalidInputError
from refine_control.folders import ALL_ROLES, refuse_other_kind
from refine_control.miniature.scene_shards import build_scenes
from refine_control.miniature.small_photos import build_small_photos, small_photos_mark
from refine_control.models.backbone import Backbone
from refine_control.models.card import BUNDLE, packaged
from refine_control.models.devices import best_device
from refine_control.models.loading import load_backbone, load_controlnet, weights_mark
from refine_control.photos.shards import Shards, open_manifest
from refine_control.progress import Progress
from refine_control.recipe_files import load_recipe
from refine_control.records import INPAINT, LABELED, ROLES, TEST, UNLABELED, Photo
from refine_control.storage import MANIFEST, sha256_file
from refine_control.study.compare import read_test
from refine_control.study.plan import Budget, Row, Scale, row_recipes
from refine_control.study.variants import Variant, build_variant

Bar = Callable[[str], Progress | None]
"""`bar(label)` -> progress callback."""
SHARDS = "scenes"
PATH_LEVELS = 8
"""Of the paths that rows learn few steps from."""
PATH_STEPS = {"mini": 8, "sd3": 24}
"""Of the teacher along them."""


@dataclass(frozen=True)
class Comparison:
    """What all rows share, and the folder of their runs."""

    budget: Budget
    out: Path
    scale: Scale = "mini"
    """Of recipes, rows and budgets."""
    model: str | None = None
    """Another model than the recipes': a bundle that `mini train` made, a folder or a hub id."""
    teacher: str | None = None
    """Another teacher than the recipes'."""
    photos: Path | None = None
    """Folder of small photographs in place of rendered scenes (`miniature.small_photos`)."""
    data: Path | None = None
    """Folder of `data build` in place of rendered scenes: shards of all three roles."""
    weights: Path | None = None
    """Folder with the networks of FID, LPIPS and CMMD."""
    condition: str = INPAINT
    """Of the rendered scenes and the teacher."""

    def check(self) -> Comparison:
        """Itself. Raises InvalidInputError for parts that do not belong together."""
        if self.photos and self.data:
            raise InvalidInputError("--photos and --data are two kinds of data; give one")
        if self.photos and not self.model:
            raise InvalidInputError("--photos needs --model, a bundle of `mini train --world photos`")
        if self.data:
            refuse_other_kind(self.data, ALL_ROLES)
            if lacking := [role for role in ROLES if not (self.data / role / MANIFEST).is_file()]:
                why = f"has no shards in {lacking[0]}; give a folder of `data build` with samples of all roles"
                raise InvalidInputError(f"{self.data} {why}")
        if self.rendered and self.scale == "sd3":
            raise InvalidInputError("the scale sd3 needs --data, a folder of `data build` with all three roles")
        find_condition(self.condition)
        if self.condition != INPAINT and not self.rendered:
            raise InvalidInputError("--condition chooses rendered scenes; with --data the samples name their own")
        if self.condition != INPAINT and not self.teacher and packaged(self.condition) is None:
            verb = f"refine-control mini train --condition {self.condition}"
            raise InvalidInputError(
                f"no teacher for {self.condition} is packaged; make one with `{verb}`, give --teacher"
            )
        if self.rendered and self.model:
            raise InvalidInputError("--model reads no rendered scenes; give its data with --photos or --data")
        return self

    @property
    def rendered(self) -> bool:
        """True for rendered scenes, which the oracle can read."""
        return self.photos is None and self.data is None

    @property
    def tested(self) -> str:
        """The condition of the test samples: with `data` that of its shards."""
        return Shards(self.data / TEST).condition if self.data else self.condition

    @property
    def world(self) -> str:
        """Its name in reports: `the mini model, rendered scenes`."""
        data = "rendered scenes" if self.rendered else "small photographs" if self.photos else str(self.data)
        data += "" if self.condition == INPAINT else f" as {self.condition}"
        return f"{'SD3' if self.scale == 'sd3' else 'the mini model'}, {data}"

    @property
    def shards(self) -> Path:
        """The folder with the shards of the three roles."""
        return self.data or self.out / SHARDS

    @property
    def names(self) -> tuple[str, str | None]:
        """Model and teacher as recipes name them."""
        recipe = load_recipe(f"{self.scale}/ours_stage1")
        usual = recipe.teacher if self.condition == INPAINT else self.condition  # a packaged one has its name
        return self.model or recipe.model, self.teacher or (None if self.model else usual)

    def backbone(self, cpu_kernels: bool = False, painting: bool = True) -> Backbone:
        """The model with its teacher on the best device; without `painting` its VAE and encoders alone.

        Raises InvalidInputError for a teacher of another condition than the samples."""
        model, teacher = self.names
        controlnet = load_controlnet(teacher) if teacher else None
        if controlnet is not None and teacher:
            take_condition(controlnet, self.tested, teacher)
        return load_backbone(model, controlnet, cpu_kernels, best_device(), painting, controlnet_name=teacher)

    def mark(self) -> list[str]:
        """Hashes and names of the model and data that results depend on, beside the budget."""
        model, teacher = self.names
        marks = [weights_mark(str(BUNDLE) if model == "mini" else model), *([weights_mark(teacher)] if teacher else [])]
        photos = [small_photos_mark(self.photos)] if self.photos else []
        photos += [self.condition] if self.condition != INPAINT else []
        return [" ".join(marks), *photos, *(sha256_file(self.data / r / MANIFEST) for r in ROLES if self.data)]

    def test_photos(self) -> list[Photo]:
        """The test samples, as many as the budget says."""
        return read_test(self.shards / TEST)[: self.budget.test]


def results_name(scale: Scale, photos: Path | None = None, data: Path | None = None) -> Path:
    """The folder of a comparison's results: mini, photos, sd3, or that with the name of the data."""
    return Path(f"{scale}-{data.resolve().name}" if data else "photos" if photos else scale)


def budget_folder(budget: str, condition: str = INPAINT) -> Path:
    """The folder of a budget's results in that: the budget's name, and that of another condition than inpainting."""
    return Path(budget, *([condition] if condition != INPAINT else []))


class RowCache(NamedTuple):
    """A cache that a stage of a row reads."""

    role: str
    variant: Variant
    guidance: float | None = None
    """Of the teacher's completions; None: it holds none."""
    path: int = 0
    """Levels of the completions' paths, as `cache.stored.Stored` has them."""

    @property
    def name(self) -> str:
        """Its folder: `labeled_10%`, `unlabeled_completed`, `unlabeled_paths_3`."""
        completed = "" if self.guidance is None else f"paths_{self.guidance:g}" if self.path else "completed"
        return "_".join(word for word in (self.role, self.variant.name, completed) if word)


def row_caches(comparison: Comparison, row: Row) -> dict[str, dict[str, RowCache]]:
    """The caches of each stage of a row, by recipe name and role.

    A row with an objective for few steps has one set of completions, which its stage 2 reads, too."""
    recipes = row_recipes(row, comparison.budget, 0)
    scales = [r.objective.few_step.teacher_guidance for r in recipes.values() if r.objective.is_few_step]
    guidance, path = (scales[-1], PATH_LEVELS) if scales else (1.0, 0)
    out: dict[str, dict[str, RowCache]] = {}
    for name, recipe in recipes.items():
        objective = recipe.objective
        completed = [role for role in objective.roles if role == UNLABELED or objective.is_few_step]
        completed = completed if objective.x0_source == "teacher" else []
        out[name] = {
            role: RowCache(role, data_variant(comparison, row, role, objective.is_few_step), *read)
            for role in objective.roles
            for read in [(guidance, path) if role in completed else (None, 0)]
        }
    return out


def data_variant(comparison: Comparison, row: Row, role: str, few_step: bool = False) -> Variant:
    """How a row changes the data of a training role, with the share of samples that the budget allows."""
    data = row.data
    variant = Variant(data.labeled) if role == LABELED else Variant(data.unlabeled, data.prompts, data.blurred)
    variant = variant._replace(share=variant.share * data.pairs) if few_step else variant
    most = {LABELED: comparison.budget.labeled, UNLABELED: comparison.budget.unlabeled}[role]
    if comparison.data and most:
        samples = open_manifest(comparison.data / role)["samples"]
        variant = variant._replace(share=min(1.0, variant.share * most / samples))
    return variant


def cache_path(comparison: Comparison, cache: RowCache) -> Path:
    """Where a row's cache lies."""
    return comparison.out / "cache" / cache.name


def _build_shards(comparison: Comparison, bar: Bar) -> None:
    budget, out = comparison.budget, comparison.shards
    counts = {LABELED: budget.labeled, UNLABELED: budget.unlabeled, TEST: budget.test}
    if comparison.data:
        for role, count in counts.items():
            samples = open_manifest(out / role)["samples"]
            if samples < (count or 2):
                raise InvalidInputError(f"{out / role} holds {samples} samples; the budget asks for {count or 2}")
        return
    if not budget.renders():
        raise InvalidInputError("this budget needs --data, a folder of `data build`")
    known = {role: count for role, count in counts.items() if count}
    if comparison.photos:
        build_small_photos(comparison.photos, out, **known, progress=bar("photographs"))
    else:
        build_scenes(
            out,
            **known,
            seed=budget.data_seed or 0,
            test_seed=budget.test_seed or 0,
            condition=comparison.condition,
            progress=bar("scenes"),
        )


def prepare_data(comparison: Comparison, rows: Iterable[Row], bar: Bar) -> None:
    """Makes the budget's shards and the caches that these rows read, if they do not exist yet.

    Raises InvalidInputError if the data hold fewer samples than the budget or a row asks for."""
    _build_shards(comparison, bar)
    caches = list(
        dict.fromkeys(
            cache for row in rows for stage in row_caches(comparison, row).values() for cache in stage.values()
        )
    )
    if not caches:
        return
    painting = any(cache.guidance is not None for cache in caches)
    backbone = comparison.backbone(cpu_kernels=True, painting=painting)
    for cache in caches:
        source = comparison.shards / cache.role
        if cache.variant != Variant():
            changed = comparison.out / "variants" / cache._replace(guidance=None).name
            build_variant(source, changed, cache.variant, bar(f"samples {changed.name}"))
            source = changed
        stored: dict[str, Any] = {"completions": None, "path": cache.path}
        if cache.guidance is not None:
            steps: Mapping[str, Any] = {"steps": PATH_STEPS[comparison.scale]} if cache.path else {}
            stored["completions"] = completion_sampler(guidance=cache.guidance, even=cache.path > 0, **steps)
        if comparison.scale == "sd3":  # 2.3 MB a sample at 1024 px in place of 9
            stored |= {"dtype": torch.bfloat16, "prompts": "int8"}
        elif cache.path:
            stored["dtype"] = torch.float16
        build_cache(source, cache_path(comparison, cache), backbone, **stored, progress=bar(f"cache {cache.name}"))
