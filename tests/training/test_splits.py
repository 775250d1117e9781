"""One update is the same however its batch is split, over micro-batches or over processes, for every objective."""

import pytest
import torch

from refine_control.cache.building import completion_sampler, write_cache
from refine_control.cache.reader import Cache
from refine_control.config import LossWeights, ObjectiveConfig, OptimizerConfig, TrainingConfig
from refine_control.miniature.scene_shards import scene_photos
from refine_control.records import LABELED, UNLABELED
from refine_control.training.batches import CacheBatches, MixedBatches
from refine_control.training.few_step import FewStep, fields_read
from refine_control.training.loop import Draw, _gradients, _micro_slots, _statistics
from refine_control.training.objectives import KINDS, Distillation, Networks
from refine_control.training.optimizer import MasterWeights

BATCH = 4
WEIGHTS = LossWeights(output=4.0, output_alpha=0.9)


@pytest.fixture(scope="module")
def caches(tiny_backbone, tmp_path_factory):
    root, photos = tmp_path_factory.mktemp("caches"), list(scene_photos(0, 0, 6))
    paths = {"completions": completion_sampler(2, 3.0, even=True), "path": 2}
    for role, options in ((LABELED, {}), (UNLABELED, paths)):
        write_cache(photos, root / role, tiny_backbone, role, source={}, **options)
    return Cache(root / LABELED), Cache(root / UNLABELED)


class OneOf:
    """The accelerator of one of `num_processes`."""

    def __init__(self, num_processes):
        self.num_processes = num_processes

    def reduce(self, tensor, reduction):
        assert reduction == "mean"
        return tensor


def update(objective, batches, processes, device_batch_size):
    """Logged values and gradients of one update, each process in turn."""
    training = TrainingConfig(batch_size=BATCH, device_batch_size=device_batch_size)
    draws = [
        [Draw(0, "stage", 3, slots) for slots in _micro_slots(training, rank, processes)] for rank in range(processes)
    ]
    accelerator = OneOf(processes)
    statistics = [_statistics(accelerator, objective, batches, each) for each in draws]
    whole = None if statistics[0] is None else torch.stack(statistics).mean(0)
    master = MasterWeights(objective.trainable(), OptimizerConfig())
    logged = [_gradients(objective, batches, master, each, whole) for each in draws]
    gradient = torch.cat([grad.flatten() for grad in master.grads]) / processes
    objective.networks.student.zero_grad()
    return {name: torch.stack([one[name] for one in logged]).mean(0) for name in logged[0]}, gradient


@pytest.mark.parametrize("relative", [False, True], ids=["plain", "relative"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_do_not_depend_on_the_split(tiny_backbone, tiny_student, caches, kind, relative):
    networks = Networks(tiny_backbone, tiny_backbone.pipeline.controlnet, tiny_student(3))
    objective = Distillation(networks, KINDS[kind], WEIGHTS, relative)
    labeled, unlabeled = caches
    if kind == "mixed":
        batches = MixedBatches(
            CacheBatches(labeled, BATCH // 2), CacheBatches(unlabeled, BATCH // 2, x0="cond_latents")
        )
    else:
        batches = (
            CacheBatches(unlabeled, BATCH, x0="cond_latents")
            if kind == "self_supervised"
            else CacheBatches(labeled, BATCH)
        )
    compare_splits(objective, batches, ((1, 2), (2, 0), *(() if kind == "mixed" else ((1, 1), (4, 1)))))


FEW_STEPS = {
    "codi": {"shared_level": False, "dt": 0.2},
    "codi shared": {"shared_level": True, "ode": "frozen", "distance": "pixel"},
    "end_points": {"steps": 2, "first": 0.4, "rollout": 0.5, "consistency": 0.5, "weighting": "codi"},
    "windows": {"steps": 2, "first": 0.3},
    "windows shared": {"steps": 2, "shared_level": True},
    "guidance": {},
    "phases": {"ode": "frozen", "huber": 0.1, "shared_level": True},
}


@pytest.mark.parametrize("name", FEW_STEPS)
def test_few_steps_do_not_depend_on_the_split(tiny_backbone, tiny_student, caches, name):
    values = {"kind": name.partition(" ")[0], "x0_source": "teacher", "few_step": FEW_STEPS[name]}
    config = ObjectiveConfig.model_validate({**values, "weights": {"output_alpha": 0.9}})
    networks = Networks(tiny_backbone, tiny_backbone.pipeline.controlnet, tiny_student(3))
    batches = CacheBatches(caches[1], BATCH, 0.3, x0="completions", adds=fields_read(config))
    compare_splits(FewStep(networks, config), batches, ((1, 2), (2, 0), (4, 1)))


def compare_splits(objective, batches, splits):
    """Values and gradients of each (processes, device batch size) are those of the whole batch."""
    values, gradient = update(objective, batches, 1, 0)
    for processes, device_batch_size in splits:
        split, other = update(objective, batches, processes, device_batch_size)
        assert split.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(split[name], value, rtol=1e-4, atol=1e-6)
        assert torch.linalg.norm(other - gradient) < 1e-4 * torch.linalg.norm(gradient)
