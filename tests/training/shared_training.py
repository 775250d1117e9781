"""A real run of `fit` on tiny networks by one or several processes. Run as a script, or imported by the tests.

python shared_training.py several PLAN.json (several.py).
"""

import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

from refine_control.cache.reader import Cache
from refine_control.config import LossWeights, OptimizerConfig, TrainingConfig
from refine_control.errors import RefineControlError
from refine_control.training.batches import CacheBatches
from refine_control.training.loop import fit, leave_process_group
from refine_control.training.objectives import KINDS, Distillation, Networks

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
TRAINING = {"steps": 4, "batch_size": 4, "log_every": 1, "save_every": 2, "ema_decay": 0.5}


class Stopped(Distillation):
    """Sends itself a signal in one step."""

    step = -1

    def losses(self, batch, draw, statistics=None):
        if draw.step == self.step:
            self.step = -1  # once, whatever the number of micro-batches
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(batch, draw, statistics)


def train(backbone, student, cache, run_dir, stop=-1, dtype=torch.float32, **options):
    """Trains a student of three layers; the whole student as it is saved, and what `fit` returns."""
    training = TrainingConfig(**{**TRAINING, **options})
    networks = Networks(backbone, backbone.pipeline.controlnet, student, dtype=dtype)
    objective = Stopped(networks, KINDS["supervised"], LossWeights(), True)
    objective.step = stop
    fitted = fit(objective, CacheBatches(Cache(cache), 4), OPTIMIZER, training, run_dir, "fingerprint")
    networks.load(fitted.weights, networks.whole)
    return {name: value.clone() for name, value in networks.whole.state_dict().items()}, fitted


def main():
    """Trains by the plan; process 0 writes the student."""
    import several
    from accelerate import Accelerator
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    assert Accelerator  # imported before processes are forked
    spec = importlib.util.spec_from_file_location("conftest", Path(__file__).parent.parent / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    with tempfile.TemporaryDirectory() as folder:
        backbone = conftest.build_tiny_backbone(Path(folder))
    student = conftest.build_tiny_student(backbone, 3)

    def work(run_dir, cache, **options):
        try:
            weights, _ = train(backbone, student, Path(cache), Path(run_dir), **options)
            if os.environ["RANK"] == "0":
                save_file(weights, Path(run_dir) / "student.safetensors")
        except RefineControlError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        finally:
            leave_process_group()
        return 0

    several.main(work)


if __name__ == "__main__":
    main()
