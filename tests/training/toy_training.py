"""A real run of `fit` in seconds: one linear layer on cached random latents. Run as a script, or imported by the tests.

python toy_training.py RUN_DIR KEY=VALUE ..., or python toy_training.py several PLAN.json (several.py).
"""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState

from refine_control import flow
from refine_control.config import OptimizerConfig, TrainingConfig
from refine_control.errors import RefineControlError
from refine_control.storage import only_writer
from refine_control.training.batches import CacheBatches
from refine_control.training.loop import Objective, fit, leave_process_group
from refine_control.training.optimizer import Trainable
from refine_control.training.watch import watched

SAMPLES, CHANNELS = 20, 4
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, warmup_steps=3, schedule="cosine")


class ToyCache:
    """What `CacheBatches` reads of a cache."""

    def __init__(self):
        self.groups = {(2, 2): range(SAMPLES)}
        self.keys, self.folder = [f"toy-{number}" for number in range(SAMPLES)], "toy_cache"
        generator = np.random.default_rng(0)

        def normals(*shape):
            return generator.normal(size=shape).astype(np.float32)

        self.arrays = {
            "latents": normals(SAMPLES, CHANNELS, 2, 2),
            "cond_latents": normals(SAMPLES, CHANNELS, 2, 2),
            "masks": (normals(SAMPLES, 1, 2, 2) > 0).astype(np.uint8),
            "prompt_index": np.arange(SAMPLES, dtype=np.int32) + 1,
            "prompt_embeds": normals(SAMPLES + 1, 3, 2),
            "pooled_prompt_embeds": np.arange(SAMPLES + 1, dtype=np.float32)[:, None],
        }

    def has(self, name):
        return name in self.arrays

    def take(self, name, rows):
        return torch.from_numpy(np.ascontiguousarray(self.arrays[name][np.asarray(rows)]))


class Lost(CacheBatches):
    """In the third step process 1 gets a signal, or reads a pipe that nobody writes."""

    how = ""

    def batch(self, draw, *rest):
        if self.how and draw.step == 2 and os.environ.get("RANK") == "1":
            if self.how.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[self.how])
            else:
                os.mkfifo(self.how)
                Path(self.how).read_bytes()
        return super().batch(draw, *rest)


class ToyLosses(NamedTuple):
    """The loss and a vector to log."""

    loss: torch.Tensor
    parts: torch.Tensor


class ToyObjective(Objective):
    """Predicts the velocity by one linear layer; notes its inputs by slot, sleeps in mid-step, breaks on demand."""

    def __init__(self, dtype=torch.float32, notes=None, pause=0.0, broken_step=-1):
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(CHANNELS, CHANNELS).to(dtype)
        self.notes, self.pause, self.broken_step = notes, pause, broken_step

    def trainable(self):
        return Trainable.of(self.layer.named_parameters())

    def losses(self, batch, draw, statistics=None):
        sigmas = flow.logit_normal_sigmas(draw.normals("sigmas"))
        noise = draw.normals("noise", *batch.latents.shape[1:])
        noisy = flow.interpolate(batch.latents, noise, sigmas)
        if self.notes:
            with self.notes.open("a") as file:
                rows = zip(draw.slots, batch.latents, batch.pooled_prompt_embeds, sigmas, noise, strict=True)
                for slot, *values in rows:
                    seen = [draw.step, slot, *(v.double().sum().item() for v in values)]
                    file.write(json.dumps(seen) + "\n")
        time.sleep(self.pause)
        answer = self.layer(noisy.movedim(1, -1).to(self.layer.weight.dtype)).movedim(-1, 1).float()
        error = (answer - flow.velocity(batch.latents, noise)).square()
        loss = error.mean() * (float("nan") if draw.step == self.broken_step else 1)
        return ToyLosses(loss, error.detach().mean((0, 2, 3))[:2])


def train(
    run_dir,
    *,
    dtype="float32",
    pause=0.0,
    notes=None,
    broken_step=-1,
    broken_sample=None,
    unchecked=False,
    lost="",
    patience=25.0,
    **training,
):
    """`fit` with an EMA; fields of the recipe by name.

    "before 1" loses process 1 before it is watched, "watched 1" before it connects; else see `Lost`."""
    fields = {"stage": "toy", "steps": 12, "batch_size": 4, "ema_decay": 0.9, "save_every": 4, "log_every": 1}
    make = TrainingConfig.model_construct if unchecked else TrainingConfig
    config = make(**{**TrainingConfig().model_dump(), **fields, **training})
    objective = ToyObjective(getattr(torch, dtype), notes and Path(notes), pause, broken_step)
    cache = ToyCache()
    if broken_sample is not None:
        cache.arrays["latents"][broken_sample, 0, 1, 1] = np.nan
    batches = Lost(cache, config.batch_size, prompt_dropout=0.3)
    batches.how = "" if " " in lost else lost
    early = lost.rpartition(" ")[0] if lost.endswith(os.environ.get("RANK", "none")) else ""
    if early == "before":
        os.kill(os.getpid(), signal.SIGSTOP)
    with watched(patience):
        if early == "watched":
            os.kill(os.getpid(), signal.SIGSTOP)
        PartialState(cpu=True)
        return fit(objective, batches, OPTIMIZER, config, Path(run_dir), "fingerprint")


def main(run_dir, **options):
    """Trains by the options; the exit code."""
    rank = os.environ.get("RANK")
    if options.get("notes"):
        options["notes"] += f".{rank}" if rank else ""
    try:
        with nullcontext() if rank else only_writer(Path(run_dir)):
            train(run_dir, **options)
    except RefineControlError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        leave_process_group()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "several":
        import several

        several.main(main)
    else:
        options = {key: json.loads(value) for key, _, value in (word.partition("=") for word in sys.argv[2:])}
        sys.exit(main(sys.argv[1], **options))
