"""`fit`: the training loop, shared by all objectives. It does optimisation, checkpoints and logs.

The objective owns every network, including the frozen teacher. All randomness comes from `Draw`, a pure function of
(seed, stage, step, slot), so the batch of a step is the same on 1, 2 or 4 processes. A run that is killed and started
again by the same command ends with the same bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch

from refine_control.config import Engine, OptimizerConfig, TrainingConfig, learning_rate_at
from refine_control.errors import DamagedError, InterruptedCleanlyError, InvalidInputError, NonFiniteError
from refine_control.progress import Progress
from refine_control.randomness import slot_normals, slot_uniforms
from refine_control.signals import held
from refine_control.storage import read_json_lines, write_atomic
from refine_control.training.checkpoint import (
    Part,
    load_checkpoint,
    remove_others,
    require_checkpoint_space,
    save_checkpoint,
)
from refine_control.training.optimizer import MasterWeights, Trainable
from refine_control.training.watch import doing


class Draw(NamedTuple):
    """The random numbers of one micro-batch: each purpose and slot has its own, whatever was drawn before."""

    seed: int
    stage: str
    step: int
    slots: Sequence[int]

    def normals(self, purpose: str, *shape: int) -> torch.Tensor:
        """(B, *shape) standard normals on the CPU."""
        return slot_normals(shape, self.slots, self.seed, self.stage, purpose, self.step)

    def uniforms(self, purpose: str) -> torch.Tensor:
        """(B,) in [0, 1) on the CPU."""
        return slot_uniforms(self.slots, self.seed, self.stage, purpose, self.step)


class Objective(Protocol):
    """What is minimised. `loss` is differentiated; every other scalar field is logged under its name.

    The loss of a batch is the mean of its micro-batches' losses, each weighted by its share of the samples. What a loss
    needs of the whole batch besides, `statistics` gives."""

    def trainable(self) -> Trainable:
        """The parameters to update, by name, and their masters."""
        ...

    def losses(self, batch: Any, draw: Draw, statistics: torch.Tensor | None = None) -> Any:
        """A NamedTuple of tensors with `loss` first: scalars, or vectors logged element by element.

        `statistics` are those of the whole batch; None means that `batch` is the whole batch."""
        ...

    def statistics(self, batch: Any, draw: Draw) -> torch.Tensor | None:
        """Means over the samples of a micro-batch, (K,), that `losses` needs of the whole batch; None: it needs none.

        Called only where a batch is split over micro-batches or processes."""
        return None

    def share(self, engine: Engine) -> Callable[[bool], None] | None:
        """Called once, before `trainable`, where several processes train. None: the loop averages the gradients in one
        message; else they are averaged in the backward passes, and the function says whether in those to come."""
        return None

    def updated(self, averaged: Mapping[str, torch.Tensor]) -> None:
        """Called before the first step and after every update with the running mean of the masters, by name.

        The mean is in the checkpoints, so what an objective makes of it alone is exact after a resume."""


class Batches(Protocol):
    """Samples by (step, slot): a pure function, so that resuming needs one integer."""

    def batch(self, draw: Draw) -> Any:
        """The samples of `draw.slots` at `draw.step`."""
        ...

    def not_finite(self, draw: Draw) -> list[str]:
        """Names of the samples of `draw.slots` whose values are not all finite."""
        del draw
        return []


class Fitted(NamedTuple):
    """What a run did in this sitting."""

    steps: int
    """Updates of the whole run."""
    seconds: float
    """Of this sitting."""
    weights: dict[str, torch.Tensor]
    """The final weights (averaged where the recipe has an EMA), fp32, by name."""


class _Log:
    """metrics.jsonl and TensorBoard; lines after a resumed step are dropped, so that a log reads as one run."""

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read_json_lines(self.path) if line.get("step", math.inf) <= step]
            write_atomic(self.path, "".join(f"{json.dumps(line)}\n" for line in kept))
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, picture: np.ndarray) -> None:
        self.board.add_image("validation", picture, step, dataformats="HWC")

    def close(self) -> None:
        self.file.close()
        self.board.close()


def _named_scalars(losses: Any) -> dict[str, torch.Tensor]:
    """`feature_losses` (S,) becomes feature_losses/00 ...; scalars keep their names."""
    out: dict[str, torch.Tensor] = {}
    for name, value in losses._asdict().items():
        if value.ndim == 0:
            out[name] = value.detach()
        else:
            out.update({f"{name}/{i:02d}": part for i, part in enumerate(value.detach())})
    return out


def _reduce(accelerator: Any, grads: list[torch.Tensor], asked: bool) -> bool:
    """Averages gradients over processes in one message; returns True on all of them if one was `asked` to stop.

    Of an objective whose backward passes average them `grads` is empty, and the word goes alone."""
    if accelerator.num_processes == 1:
        return asked
    if not grads:
        return bool(accelerator.reduce(torch.full((1,), float(asked), device=accelerator.device)) > 0)
    word = torch.full((1,), float(asked), device=grads[0].device)
    flat = accelerator.reduce(torch.cat([*(g.flatten() for g in grads), word]), reduction="mean")
    for grad, part in zip(grads, flat[:-1].split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
    return bool(flat[-1] > 0)


def _means(accelerator: Any, values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Logged values averaged over processes, as floats."""
    means = accelerator.reduce(torch.stack([v.float() for v in values.values()]), reduction="mean")
    return dict(zip(values, means.tolist(), strict=True))


def _micro_slots(training: TrainingConfig, rank: int, processes: int) -> list[range]:
    """This process's slots of the global batch, in device batches."""
    if training.batch_size % processes:
        raise InvalidInputError(
            f"training.batch_size {training.batch_size} is not a multiple of the {processes} processes; change one"
        )
    count = training.batch_size // processes
    device, end = min(training.device_batch_size or count, count), (rank + 1) * count
    return [range(first, min(first + device, end)) for first in range(rank * count, end, device)]


def _shares(draws: Sequence[Draw]) -> list[float]:
    """Which part of this process's samples each micro-batch has."""
    return [len(draw.slots) / sum(len(each.slots) for each in draws) for draw in draws]


def _statistics(accelerator: Any, objective: Objective, batches: Batches, draws: Sequence[Draw]) -> torch.Tensor | None:
    """The objective's statistics of the whole batch, over all processes; None where the batch is not split."""
    if len(draws) == 1 and accelerator.num_processes == 1:
        return None
    total = None
    for draw, share in zip(draws, _shares(draws), strict=True):
        doing(f"reading the samples of step {draw.step + 1}")
        part = objective.statistics(batches.batch(draw), draw)
        if part is None:
            return None
        total = part * share if total is None else total + part * share
    return accelerator.reduce(total, reduction="mean")


def _gradients(
    objective: Objective,
    batches: Batches,
    master: MasterWeights,
    draws: Sequence[Draw],
    statistics: torch.Tensor | None,
    average: Callable[[bool], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Adds the gradients of one update's micro-batches to the masters; the logged values, averaged over samples.

    `average`, if any, is what `Objective.share` returned."""
    logged: dict[str, torch.Tensor] = {}
    for draw, share in zip(draws, _shares(draws), strict=True):
        if average is not None:
            average(draw is draws[-1])
        doing(f"reading the samples of step {draw.step + 1}")
        batch = batches.batch(draw)
        doing(f"computing the gradients of step {draw.step + 1}")
        losses = objective.losses(batch, draw, statistics)
        (losses.loss * share).backward()
        master.accumulate()
        for name, value in _named_scalars(losses).items():
            logged[name] = logged.get(name, 0) + value * share
    return logged


def _refuse_nonfinite(batches: Batches, draws: Iterable[Draw], where: str) -> NoReturn:
    """Raises DamagedError where an input of these micro-batches, on any process, is not finite; else NonFiniteError."""
    from accelerate.utils import gather_object

    names = list(dict.fromkeys(gather_object([name for draw in draws for name in batches.not_finite(draw)])))
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise DamagedError(
            f"inputs of the training are not finite {where}: {', '.join(names[:5])}{more}; "
            "correct or remove these samples, make their cache again and train in another folder"
        )
    raise NonFiniteError(
        f"the loss or its gradient is not finite {where}, and all inputs are; "
        "lower optimizer.learning_rate and run again in another folder"
    )


def leave_process_group() -> None:
    """Every process of a run must call this last: torch aborts processes that end while they are connected."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _resume(accelerator: Any, master: MasterWeights, training: TrainingConfig, run_dir: Path, fingerprint: str) -> int:
    """Loads the newest checkpoint of `run_dir`, removes all others and returns its step, 0 where there is none.

    Raises StorageError where the checkpoints to come do not fit on the disk."""
    run_dir.mkdir(parents=True, exist_ok=True)
    resumed = load_checkpoint(run_dir, fingerprint)
    if resumed:
        master.load(resumed.tensors, resumed.step)
    start = resumed.step if resumed else 0
    accelerator.wait_for_everyone()  # all have read the checkpoint
    if accelerator.is_main_process:
        remove_others(run_dir, start)
        if start < training.steps:
            several = 0 < training.save_every < training.steps
            weights = sum(parameter.numel() for parameter in master.named.values())
            sizes = run_dir, master.tensors(), weights, resumed is not None, several
            require_checkpoint_space(*sizes, parts=master.rows.count if master.rows else 1)
    return start


def _part(accelerator: Any, master: MasterWeights) -> Part | None:
    """This process's part of a checkpoint, where each process has rows of its own."""
    if master.rows is None:
        return None
    from accelerate.utils import broadcast_object_list

    def share(value: str | None) -> str:
        values = broadcast_object_list([value])
        accelerator.wait_for_everyone()
        return str(values[0])

    return Part(master.rows.number, master.rows.count, share)


def fit(
    objective: Objective,
    batches: Batches,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    run_dir: Path,
    fingerprint: str,
    *,
    validate: Callable[[int, dict[str, torch.Tensor]], np.ndarray] | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Minimises `objective` for `training.steps` updates, resuming the run in `run_dir` where it has one.

    `validate(step, weights)` is called every `validate_every` steps on the main process; its picture (H,W,3) uint8 is
    logged.

    Raises InterruptedCleanlyError after a SIGTERM or SIGINT, once all is saved, NonFiniteError, DamagedError for inputs
    that are not finite, InvalidInputError for a run of another recipe, StorageError."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    average = objective.share(training.engine) if accelerator.num_processes > 1 else None
    slots = _micro_slots(training, accelerator.process_index, accelerator.num_processes)
    master = MasterWeights(objective.trainable(), optimizer, training.ema_decay, training.offload)
    start = checked = _resume(accelerator, master, training, run_dir, fingerprint)
    objective.updated(master.ema_state())
    log = _Log(run_dir, start) if accelerator.is_main_process else None
    began = time.monotonic()

    def draws_at(step: int) -> list[Draw]:
        return [Draw(training.seed, training.stage, step, each) for each in slots]

    def save(step: int) -> None:
        doing(f"saving the checkpoint of step {step}")
        part = _part(accelerator, master)
        if part or accelerator.is_main_process:
            save_checkpoint(run_dir, step, master.tensors(), fingerprint, part)
        accelerator.wait_for_everyone()

    with held(f"everything is saved in {run_dir}") as stopped:
        for step in range(start, training.steps):
            draws = draws_at(step)
            statistics = _statistics(accelerator, objective, batches, draws)
            logged = _gradients(objective, batches, master, draws, statistics, average)
            stop = _reduce(accelerator, [] if average else master.grads, bool(stopped()))
            rate = learning_rate_at(step, optimizer, training.steps)
            norm = master.step(rate, step, optimizer.max_grad_norm)
            objective.updated(master.ema_state())
            done, last = step + 1, step + 1 == training.steps
            saves = not last and (stop or bool(training.save_every and done % training.save_every == 0))
            logs = last or done % training.log_every == 0
            # a norm that is not finite spoils every later one, so looking before each save keeps checkpoints clean
            values = _means(accelerator, logged) if saves or logs else {"loss": 0.0}
            if saves or logs:
                if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
                    since = (draw for each in range(checked, done) for draw in draws_at(each))
                    _refuse_nonfinite(batches, since, f"at step {done} of {run_dir}")
                checked = done
            if logs:
                seconds = (time.monotonic() - began) / (done - start)
                if log:
                    log.write(done, {**values, "grad_norm": float(norm), "learning_rate": rate, "seconds": seconds})
                if progress:
                    progress(done, training.steps, f"loss {values['loss']:.4f}")
            if saves:
                save(done)
            if validate and training.validate_every and done % training.validate_every == 0 and not stop:
                doing(f"validating after step {done}")
                weights = dict(master.ema_state())  # of all processes where each has a part
                if log:
                    log.picture(done, validate(done, weights))
            if stop and not last:
                raise InterruptedCleanlyError(
                    f"stopped by a signal after step {done} of {training.steps}; everything is saved in "
                    f"{run_dir}, run the same command to continue"
                )
        if start < training.steps:
            save(training.steps)
    if log:
        log.close()
    master.settle()
    weights = {name: tensor.float().clone() for name, tensor in master.ema_state().items()}
    return Fitted(training.steps, time.monotonic() - began, weights)
