"""Checkpoints that are whole or absent: safetensors and JSON, manifest last, the old kept until the new verifies."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from refine_control.errors import DamagedError, InvalidInputError
from refine_control.storage import publish_folder, read_manifest, remove_folder, require_space, storage_errors, sweep

_NAME = re.compile(r"^step_(\d{8})$")


class Checkpoint(NamedTuple):
    """What a run needs to go on: the tensors of the optimiser after `step` updates."""

    step: int
    tensors: dict[str, torch.Tensor]


def _folders(run_dir: Path) -> list[Path]:
    root = run_dir / "checkpoints"
    folders = [p for p in root.iterdir() if _NAME.match(p.name)] if root.is_dir() else []
    return sorted(folders, reverse=True)


def refuse_other_run(run_dir: Path, fingerprint: str, why: Callable[[], str]) -> None:
    """Raises InvalidInputError, with `why()`, where the newest checkpoint of `run_dir` is of another fingerprint."""
    for folder in _folders(run_dir)[:1]:
        try:
            other = read_manifest(folder, verify=False, required=["fingerprint"])["fingerprint"]
        except (FileNotFoundError, DamagedError):  # `load_checkpoint` says what can be done
            return
        if other != fingerprint:
            raise InvalidInputError(f"{run_dir} holds an unfinished run of another recipe: {why()}")


def save_checkpoint(run_dir: Path, step: int, tensors: dict[str, torch.Tensor], fingerprint: str) -> Path:
    """Publishes `checkpoints/step_XXXXXXXX`, verifies it, then deletes older checkpoints and temporary folders.

    Raises StorageError."""
    from safetensors.torch import save_file

    final = run_dir / "checkpoints" / f"step_{step:08d}"
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with publish_folder(final, step=step, fingerprint=fingerprint) as folder:
        save_file(contiguous, folder / "state.safetensors")
    read_manifest(final)
    remove_others(run_dir, step)
    return final


def remove_others(run_dir: Path, step: int) -> None:
    """Deletes all checkpoints but that of `step`, and what killed writers left. Raises StorageError."""
    for folder in _folders(run_dir):
        if folder.name != f"step_{step:08d}":
            with storage_errors(folder):
                remove_folder(folder)
    if (run_dir / "checkpoints").is_dir():
        sweep(run_dir / "checkpoints")


def require_checkpoint_space(
    run_dir: Path, tensors: dict[str, torch.Tensor], weights: int, resumed: bool, several: bool
) -> None:
    """Raises StorageError where checkpoints of `tensors`, and then a result of `weights` numbers in fp32, do not fit.

    A new checkpoint is written beside the old one. `several`: more than one will be saved; `resumed`: one is there."""
    checkpoint = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    result = 4 * weights
    needed = checkpoint if resumed else max(2 * checkpoint if several else 0, checkpoint + result)
    require_space(run_dir, needed, "saving checkpoints and the result")


def load_checkpoint(run_dir: Path, fingerprint: str) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None. A damaged one is passed over for an older whole one.

    Raises InvalidInputError when it belongs to another recipe, DamagedError when all are damaged."""
    from safetensors.torch import load_file

    damage: DamagedError | None = None
    for folder in _folders(run_dir):
        try:
            manifest = read_manifest(folder, required=("fingerprint", "step"))
        except FileNotFoundError:
            damage = DamagedError(f"{folder} has no manifest; delete it and run again")
            continue
        except DamagedError as error:
            damage = error
            continue
        if manifest["fingerprint"] != fingerprint:
            raise InvalidInputError(
                f"{run_dir} holds a run of another recipe (its checkpoint's fingerprint is "
                f"{manifest['fingerprint'][:12]}, this one's {fingerprint[:12]}); choose another folder"
            )
        return Checkpoint(manifest["step"], load_file(folder / "state.safetensors"))
    if damage:
        raise damage
    return None
