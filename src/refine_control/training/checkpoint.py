"""Checkpoints that are whole or absent: safetensors and JSON, manifest last, the old kept until the new verifies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from refine_control.errors import DamagedError, InvalidInputError
from refine_control.storage import publish_folder, read_manifest, remove_folder, require_space, storage_errors, sweep

_NAME = re.compile(r"^step_(\d{8})$")


class Checkpoint(NamedTuple):
    """What a run needs to go on: the tensors of the optimiser after `step` updates."""

    step: int
    tensors: Mapping[str, torch.Tensor]


class Part(NamedTuple):
    """One of several processes that write a checkpoint together, each its rows of every tensor."""

    number: int
    count: int
    share: Callable[[str | None], str]
    """Gives all processes what process 0 gives, when all have called it."""


class _Parts(Mapping[str, torch.Tensor]):
    """The tensors in the files of a checkpoint, each read when it is asked for: the rows of all parts."""

    def __init__(self, files: Sequence[Path]):
        from safetensors import safe_open

        self.files = [safe_open(file, "pt") for file in files]
        self.names = list(self.files[0].keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        parts = [file.get_tensor(name) for file in self.files]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _name(part: int, count: int) -> str:
    return "state.safetensors" if count == 1 else f"state-{part + 1:05d}-of-{count:05d}.safetensors"


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


def save_checkpoint(
    run_dir: Path, step: int, tensors: Mapping[str, torch.Tensor], fingerprint: str, part: Part | None = None
) -> Path:
    """Publishes `checkpoints/step_XXXXXXXX`, verifies it, then deletes older checkpoints and temporary folders.

    With `part` all processes call it, each with its rows of the tensors. Raises StorageError."""
    from safetensors.torch import save_file

    final = run_dir / "checkpoints" / f"step_{step:08d}"
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if part is not None and part.number:
        folder = Path(part.share(None))
        with storage_errors(final):
            save_file(contiguous, folder / _name(part.number, part.count))
        part.share(None)
        return final
    parts = {"parts": part.count} if part is not None and part.count > 1 else {}
    with publish_folder(final, step=step, fingerprint=fingerprint, **parts) as folder:
        if part is not None:
            part.share(str(folder))
        save_file(contiguous, folder / _name(0, part.count if part else 1))
        if part is not None:
            part.share("written")
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
    run_dir: Path, tensors: Mapping[str, torch.Tensor], weights: int, resumed: bool, several: bool, parts: int = 1
) -> None:
    """Raises StorageError where checkpoints of `tensors`, and then a result of `weights` numbers in fp32, do not fit.

    A new checkpoint is written beside the old one. `several`: more than one will be saved; `resumed`: one is there;
    `parts`: so many processes write as much each."""
    checkpoint = parts * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    result = 4 * weights
    needed = checkpoint if resumed else max(2 * checkpoint if several else 0, checkpoint + result)
    require_space(run_dir, needed, "saving checkpoints and the result")


def load_checkpoint(run_dir: Path, fingerprint: str) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None. A damaged one is passed over for an older whole one.

    Raises InvalidInputError when it belongs to another recipe, DamagedError when all are damaged."""
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
        count = manifest.get("parts", 1)
        return Checkpoint(manifest["step"], _Parts([folder / _name(part, count) for part in range(count)]))
    if damage:
        raise damage
    return None
