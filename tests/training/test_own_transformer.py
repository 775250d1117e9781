"""Students that train the transformer too: what training moves, resuming, the prior alone, the next run."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from refine_control.cache.building import write_cache
from refine_control.cache.reader import Cache
from refine_control.config import ObjectiveConfig, OptimizerConfig, Recipe, TrainingConfig
from refine_control.errors import InvalidInputError
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models.backbone import predict_velocity
from refine_control.models.loading import load_backbone, load_student
from refine_control.models.own_transformer import trainable_copy
from refine_control.records import LABELED
from refine_control.storage import read_manifest, write_json
from refine_control.training.batches import CacheBatches
from refine_control.training.few_step import FewStep
from refine_control.training.loop import Draw, _gradients, _micro_slots, fit
from refine_control.training.objectives import Networks
from refine_control.training.optimizer import MasterWeights
from refine_control.training.run import new_student, train

KINDS = ("lora", "whole")
CODI = {"kind": "codi", "x0_source": "truth"}


@pytest.fixture(scope="module")
def prior(tiny_backbone, tmp_path_factory):
    """A model without a ControlNet, and a cache of labelled samples."""
    root = tmp_path_factory.mktemp("prior")
    tiny_backbone.pipeline.save_pretrained(root / "tiny")
    write_json(root / "tiny" / "refine_control.json", {"max_sequence_length": 0})
    write_cache(list(scene_photos(0, 0, 6)), root / "cache", load_backbone(root / "tiny"), LABELED, source={})
    shutil.rmtree(root / "tiny" / "controlnet")
    index = json.loads((root / "tiny" / "model_index.json").read_text())
    (root / "tiny" / "model_index.json").write_text(json.dumps(index | {"controlnet": [None, None]}))
    return root


def recipe(prior, backbone, **changes):
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": str(prior / "tiny"),
            "teacher": "nobody/has-this",  # not read
            "student": {"num_layers": 2, "backbone": backbone, "lora_rank": 4},
            "objective": CODI,
            "optimizer": {"learning_rate": 1e-2},
            "training": {"steps": 3, "batch_size": 2, "save_every": 1, "log_every": 1, "ema_decay": 0.9},
            "data": {"labeled": str(prior / "cache")},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def trained(prior, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return {kind: train(recipe(prior, kind), runs / kind).student for kind in KINDS}


def files(folder):
    return {name: file["sha256"] for name, file in read_manifest(folder)["files"].items()}


def objective_of(backbone, student, kind, dtype=torch.float32):
    around = backbone.with_transformer(trainable_copy(backbone.transformer, kind, 4, 0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in around.transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    networks = Networks(backbone, backbone.pipeline.controlnet, student, student_backbone=around, dtype=dtype)
    return FewStep(networks, ObjectiveConfig.model_validate(CODI))


def frozen_answer(objective, batch):
    """The teacher's guided velocity, and every frozen weight that it reads."""
    networks, draw = objective.networks, Draw(0, "fixed", 0, batch.slots)
    velocity = networks.guided_velocity(networks.noised(batch, draw), batch, 1.0)
    weights = [*networks.backbone.transformer.parameters(), *networks.teacher.parameters()]
    return [velocity, *(weight.detach().clone() for weight in weights)]


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_exactly_what_it_names_and_no_frozen_answer(tiny_backbone, tiny_student, prior, tmp_path, kind):
    objective = objective_of(tiny_backbone, tiny_student(2), kind)
    batches = CacheBatches(Cache(prior / "cache"), 2)
    batch, networks = batches.batch(Draw(0, "stage", 0, range(2))), objective.networks
    before, named = frozen_answer(objective, batch), objective.trainable().parameters
    objective.losses(batch, Draw(0, "stage", 0, range(2))).loss.backward()
    own, student = networks.own_transformer, networks.student
    parts = {"transformer": own, "controlnet": student}
    moved = {f"{part}.{n}" for part, each in parts.items() for n, p in each.named_parameters() if p.grad is not None}
    assert moved == set(named)
    assert {name.partition(".")[0] for name, p in named.items() if p.grad.any()} == set(parts)
    start = {name: p.detach().clone() for name, p in named.items()}
    own.zero_grad()
    student.zero_grad()
    training = TrainingConfig(steps=2, batch_size=2, ema_decay=0.5)
    fitted = fit(objective, batches, OptimizerConfig(learning_rate=1e-2), training, tmp_path, "fingerprint")
    assert all(torch.equal(a, b) for a, b in zip(before, frozen_answer(objective, batch), strict=True))
    assert [n for n, p in named.items() if n.startswith("transformer.") and torch.equal(p, start[n])] == []
    target = dict(networks.steered[objective.target].named_parameters())
    mean = {n: value for n, value in fitted.weights.items() if n.startswith("transformer.")}
    assert all(torch.equal(target[n.removeprefix("transformer.")], value) for n, value in mean.items())
    assert not any(torch.equal(named[name], value) for name, value in mean.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_does_not_depend_on_the_split(tiny_backbone, tiny_student, prior, kind):
    objective = objective_of(tiny_backbone, tiny_student(2), kind)
    batches = CacheBatches(Cache(prior / "cache"), 4)

    def gradient(processes, device_batch_size):
        training = TrainingConfig(batch_size=4, device_batch_size=device_batch_size)
        master = MasterWeights(objective.trainable(), OptimizerConfig())
        for rank in range(processes):
            draws = [Draw(0, "stage", 3, slots) for slots in _micro_slots(training, rank, processes)]
            _gradients(objective, batches, master, draws, None)
        out = torch.cat([grad.flatten() for grad in master.grads]) / processes
        for parameter in objective.trainable().parameters.values():
            parameter.grad = None
        return out

    whole = gradient(1, 0)
    for split in ((1, 2), (2, 0)):
        assert torch.linalg.norm(gradient(*split) - whole) < 1e-4 * torch.linalg.norm(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_same_bytes(prior, trained, tmp_path, monkeypatch, kind):
    batch = CacheBatches.batch

    def killed(self, draw):
        if draw.step == 2:
            raise RuntimeError("killed")
        return batch(self, draw)

    monkeypatch.setattr(CacheBatches, "batch", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(recipe(prior, kind), tmp_path)
    monkeypatch.setattr(CacheBatches, "batch", batch)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert files(train(recipe(prior, kind), tmp_path).student) == files(trained[kind])


def test_the_prior_is_enough_and_the_folder_holds_what_was_trained(prior, trained):
    names = {kind: {name.partition("/")[0] for name in files(trained[kind])} for kind in KINDS}
    folders = {"transformer", "transformer_lora"}
    assert {kind: each & folders for kind, each in names.items()} == {
        "lora": {"transformer_lora"},
        "whole": {"transformer"},
    }
    backbone = load_backbone(prior / "tiny", controlled=False)
    lora = load_file(trained["lora"] / "transformer_lora" / "pytorch_lora_weights.safetensors")
    assert len(lora) == 2 * 190
    assert all(tensor.any() for tensor in lora.values())
    for kind in KINDS:
        loaded = load_student(backbone, trained[kind])[0].transformer
        pairs = zip(loaded.parameters(), backbone.transformer.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)


def test_a_run_in_bf16_keeps_its_masters_in_fp32(prior, tmp_path):
    bf16 = recipe(prior, "lora").training.model_dump() | {"precision": "bf16", "steps": 2}
    train(recipe(prior, "lora", training=bf16), tmp_path)
    state = load_file(next((tmp_path / "checkpoints").iterdir()) / "state.safetensors")
    adapters = [tensor for name, tensor in state.items() if name.startswith("weights/transformer.")]
    assert len(adapters) == 2 * 190
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in adapters)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite([json.loads(line)["loss"] for line in lines]).all()


def velocity(transformer, backbone):
    noisy = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    return predict_velocity(transformer, noisy, torch.tensor([0.7]), *backbone.encode_prompts(["a red circle"]))


@pytest.mark.parametrize(("held", "kind"), [("lora", "lora"), ("lora", "whole"), ("whole", "whole")])
def test_the_next_run_starts_from_the_transformer_that_was_trained(prior, trained, held, kind):
    backbone = load_backbone(prior / "tiny", controlled=False)
    start = new_student(recipe(prior, kind, init_from=str(trained[held].parent)), backbone)[0].transformer
    expected = velocity(load_student(backbone, trained[held])[0].transformer, backbone)
    torch.testing.assert_close(velocity(start, backbone), expected, rtol=1e-4, atol=1e-4)
    assert (velocity(backbone.transformer, backbone) - expected).abs().max() > 1e-2
    assert any(p.requires_grad for p in start.parameters())


def test_a_run_that_would_leave_out_a_trained_transformer_is_refused(prior, trained):
    backbone = load_backbone(prior / "tiny", controlled=False)
    for held, kind in (("lora", "frozen"), ("whole", "frozen"), ("whole", "lora")):
        with pytest.raises(InvalidInputError, match=rf"set student\.backbone to {held}"):
            new_student(recipe(prior, kind, init_from=str(trained[held])), backbone)
    other = {"num_layers": 2, "backbone": "lora", "lora_rank": 8}
    with pytest.raises(InvalidInputError, match="rank 4 on 190 layers"):
        new_student(recipe(prior, "lora", init_from=str(trained["lora"]), student=other), backbone)
    with pytest.raises(ValueError, match=r"student\.backbone lora is for few steps; kind supervised needs frozen"):
        recipe(prior, "lora", objective={"kind": "supervised"})
