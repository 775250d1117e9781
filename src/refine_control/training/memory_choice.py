"""Settings with which a training step fits a device: chosen for `training.memory: auto`, else advised."""

from __future__ import annotations

import logging
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from refine_control.cache.reader import Cache
from refine_control.config import Recipe
from refine_control.errors import InvalidInputError
from refine_control.models.devices import USABLE, device_name, memory_bytes
from refine_control.models.skeleton import read_configs
from refine_control.recipe_files import load_recipe
from refine_control.training.memory import MemoryPlan, at_most, micro_batches, plan_memory

logger = logging.getLogger(__name__)
Fits = Callable[[Recipe], bool]
Settings = Mapping[str, Any]
"""By dotted key, as `--set` takes them."""
_COUNT, _OFFLOAD, _RECOMPUTE, _BLOCKS = (
    f"training.{name}" for name in ("device_batch_size", "offload", "gradient_checkpointing", "checkpointed_blocks")
)
_FROZEN = "training.frozen"
_EIGHT_BITS: Settings = {_FROZEN: "int8", "optimizer.kind": "adamw8bit"}
"""In the order of what they change in the numbers."""
_CHOSEN = _COUNT, _OFFLOAD, _RECOMPUTE, _BLOCKS, *_EIGHT_BITS


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with other values at dotted keys. Raises ValueError where they do not go together."""
    values = recipe.model_dump()
    for key, value in settings.items():
        section, name = key.split(".")
        values[section][name] = value
    return Recipe.model_validate(values)


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _text(settings: Settings) -> list[str]:
    return [f"{key}={str(value).lower()}" for key, value in settings.items()]


def chosen_settings(recipe: Recipe) -> list[str]:
    """What `training.memory: auto` chose, as `--set` takes it."""
    return _text({key: _value(recipe, key) for key in _CHOSEN})


def _counts(recipe: Recipe, most: int, processes: int) -> list[int]:
    """Samples at once that an update can be made of, in rising order."""
    each, step = max(1, recipe.training.batch_size // processes), 2 if recipe.objective.kind == "mixed" else 1
    return [n for n in range(step, most + 1, step) if each % n == 0 and recipe.training.batch_size % n == 0]


def smallest_change(recipe: Recipe, fits: Fits, processes: int = 1) -> list[str]:
    """The settings, as `--set` takes them, with which a recipe that does not fit does; empty where none do.

    Fewer samples at once cost nothing; then offload, which costs the way to the host; then checkpointing, which costs a
    quarter of the work; then bf16; then frozen weights and moments in 8 bits; then these and offload."""
    recompute, bf16, offload = {_RECOMPUTE: True, _BLOCKS: 0}, {"training.precision": "bf16"}, {_OFFLOAD: "moments"}
    samples = micro_batches(recipe, processes)[0]
    counts, tried = _counts(recipe, samples, processes), list[Settings]()
    together = accumulate((recompute | bf16, *_eight_bits(recipe), offload), lambda a, b: {**a, **b})
    for more in ({}, offload, recompute, bf16, *together):
        changed = {key: value for key, value in more.items() if _value(recipe, key) != value}
        if changed in tried:
            continue
        tried.append(changed)

        def with_count(count: int, changed: Settings = changed) -> Recipe:
            return with_settings(recipe, {_COUNT: count, **changed})

        # more samples take more memory, so the first count that is too large ends the search
        most = bisect_left(counts, True, key=lambda count: not fits(with_count(count)))
        if most:
            settings = {_COUNT: counts[most - 1]} if counts[most - 1] != samples else {}
            return _text({**settings, **changed})
    return []


def _eight_bits(recipe: Recipe) -> list[Settings]:
    """Those that the recipe has not and can have."""
    possible = [key for key in _EIGHT_BITS if key != _FROZEN or recipe.student.backbone == "frozen"]
    return [{key: _EIGHT_BITS[key]} for key in possible if _value(recipe, key) in ("adamw", "precision")]


def choose(recipe: Recipe, fits: Fits, processes: int = 1) -> Recipe | None:
    """The recipe with the settings of `training.memory: auto`; None where nothing fits.

    What changes no number comes first: as many samples at once as fit without checkpointing; else what is idle in the
    host's memory, the mean and then the moments; else the fewest samples, and the fewest blocks that recompute. Where
    that does not do, the same with frozen weights in 8 bits, then with moments in 8 bits."""
    counts = _counts(recipe, max(1, recipe.training.batch_size // processes), processes)
    blocks = recipe.student.num_layers + read_configs(recipe.model)["transformer"]["num_layers"]
    places = ["none", *(["mean"] if recipe.training.ema_decay else []), "moments"]
    for more in accumulate(({}, *_eight_bits(recipe)), lambda a, b: {**a, **b}):

        def at(count: int, recomputed: int, place: str, more: Settings = more) -> Recipe:
            settings = {_COUNT: count, _OFFLOAD: place, _RECOMPUTE: recomputed > 0, _BLOCKS: recomputed % blocks}
            return with_settings(recipe, {**settings, **more})

        fewest, least = counts[0], places[-1]
        if not fits(at(fewest, blocks, least)):
            continue
        if fits(at(fewest, 0, least)):
            place = next(each for each in places if fits(at(fewest, 0, each)))
            most = bisect_left(counts, True, lo=1, key=lambda count, at=at: not fits(at(count, 0, place)))
            return at(counts[most - 1], 0, place)
        number = bisect_left(range(blocks), True, lo=1, key=lambda number, at=at: fits(at(fewest, number, least)))
        return at(fewest, number, next(each for each in places if fits(at(fewest, number, each))))
    return None


def too_large(recipe: Recipe, plan: MemoryPlan, memory: float, device: str, **on: Any) -> str:
    """Why a recipe does not run on a device and the smallest change with which it would; `on` as `plan_memory`."""
    change = smallest_change(recipe, lambda other: plan_memory(other, **on).peak <= memory, on.get("processes", 1))
    advice = " ".join(f"--set {setting}" for setting in change)
    return f"a step of {recipe.name} needs {plan.text}, and {device} has {memory / 1e9:.3g} GB; " + (
        f"it fits with {advice}"
        if change
        else "no batch, offload, checkpointing or 8 bits make it fit: use a larger device"
    )


def fitted(
    recipe: Recipe, memory: float, device: str, bound: bool = False, host: float = math.inf, **on: Any
) -> Recipe:
    """The recipe of `training.memory: auto` with settings for `USABLE` of a device's memory; `on` as `plan_memory`.

    `host`: bytes of its memory that each process may take. With `bound` steps that are far below the memory are not
    counted. Raises InvalidInputError where nothing fits."""
    room, processes = USABLE * memory, on.get("processes", 1)

    def fits(other: Recipe) -> bool:
        if bound and at_most(other, on.get("size"), processes) < room:
            return True
        plan = plan_memory(other, **on)
        return plan.peak <= room and plan.offloaded <= host

    if chosen := choose(recipe, fits, processes):
        return chosen
    fewest = 1 + (recipe.objective.kind == "mixed")
    most = with_settings(recipe, {_COUNT: fewest, _OFFLOAD: "moments", _RECOMPUTE: True, _BLOCKS: 0})
    for each in _eight_bits(recipe):
        most = with_settings(most, each)
    raise InvalidInputError(too_large(most, plan_memory(most, **on), room, f"{USABLE:.0%} of {device}", **on))


def fit_to_device(recipe: Recipe, run_dir: Path, device: torch.device, processes: int, log: bool = True) -> Recipe:
    """The recipe as it runs on `device`, by configs alone and what an earlier sitting in `run_dir` chose.

    The plan is logged on a GPU and for `training.memory: auto`. On the CPU a step that is far from the memory's size is
    not counted. Raises InvalidInputError where a step needs more than the whole memory."""
    paths = [path for role in recipe.objective.roles if (path := getattr(recipe.data, role))]
    sizes = [size for path in paths for size in Cache(Path(path)).groups]
    size, memory, cpu = max(sizes, key=math.prod, default=None), memory_bytes(device), device.type == "cpu"
    host = USABLE * memory_bytes(torch.device("cpu")) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on = {"size": size, "processes": processes, "cpu_kernels": cpu}
    if auto := recipe.training.memory == "auto":
        known = {"bound": cpu, "host": host, **on}
        recipe = _earlier_choice(recipe, run_dir) or fitted(recipe, memory, device_name(device), **known)
        if log:
            logger.warning("training.memory auto: %s", " ".join(chosen_settings(recipe)))
    if cpu and at_most(recipe, size, processes) < memory:
        return recipe
    plan = plan_memory(recipe, **on)
    if log and (auto or not cpu):
        logger.warning("memory: %s of %.3g GB", plan.text, memory / 1e9)
    if plan.peak > memory:
        raise InvalidInputError(too_large(recipe, plan, memory, device_name(device), **on))
    if plan.offloaded > host:
        raise InvalidInputError(
            f"training.offload {recipe.training.offload} keeps {plan.offloaded / 1e9:.3g} GB of each process in the "
            f"host's memory, which has room for {host / 1e9:.3g} GB; set it to none"
        )
    return recipe


def _earlier_choice(recipe: Recipe, run_dir: Path) -> Recipe | None:
    """The recipe with what `auto` chose for the run in `run_dir`; None where there is no such run."""
    try:
        earlier = load_recipe(run_dir / "recipe.yaml")
        same = with_settings(recipe, {key: _value(earlier, key) for key in _CHOSEN})
    except (InvalidInputError, ValueError):
        return None
    return same if earlier.training.memory == "auto" else None
