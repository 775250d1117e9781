"""What the two stages and the baseline may touch, and what they must never look at."""

import numpy as np
import pytest
import torch

from refine_control import flow
from refine_control.cache.building import write_cache
from refine_control.cache.reader import Cache
from refine_control.config import LossWeights, OptimizerConfig, SigmaConfig, TrainingConfig
from refine_control.errors import InvalidInputError
from refine_control.injection import groups
from refine_control.losses import group_targets, kept_targets, layer_losses, mask_weight, output_loss, task_loss
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models.controlnet import build_student
from refine_control.records import LABELED, UNLABELED, Photo
from refine_control.training import objectives
from refine_control.training.batches import CacheBatches, MixedBatches
from refine_control.training.loop import Draw, fit
from refine_control.training.objectives import KINDS, Batch, Distillation, Networks

WEIGHTS = LossWeights(task=4.0, output=1.0, feature=0.5)
DRAW = Draw(0, "stage", 3, range(2))


@pytest.fixture
def networks(tiny_backbone, tiny_student):
    return Networks(tiny_backbone, tiny_backbone.pipeline.controlnet, tiny_student(3))


@pytest.fixture(scope="module")
def caches(tiny_backbone, tmp_path_factory):
    """The same scenes labelled, unlabelled, and unlabelled with garbage in their holes."""
    root, photos = tmp_path_factory.mktemp("caches"), list(scene_photos(0, 0, 5))
    garbage = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    spoiled = [Photo(p.key, np.where(p.mask[..., None], garbage, p.image), p.mask, p.prompt) for p in photos]
    for name, role, source in (
        ("labeled", LABELED, photos),
        ("unlabeled", UNLABELED, photos),
        ("spoiled", UNLABELED, spoiled),
    ):
        write_cache(source, root / name, tiny_backbone, role, source={})
    return {name: Cache(root / name) for name in ("labeled", "unlabeled", "spoiled")}


def distillation(kind, networks, relative=False):
    return Distillation(networks, KINDS[kind], WEIGHTS, relative)


def objective_and_batches(kind, networks, caches):
    batches = {
        "self_supervised": lambda: CacheBatches(caches["unlabeled"], 2, x0="cond_latents"),
        "mixed": lambda: MixedBatches(
            CacheBatches(caches["labeled"], 1), CacheBatches(caches["unlabeled"], 1, x0="cond_latents")
        ),
    }
    return distillation(kind, networks), batches.get(kind, lambda: CacheBatches(caches["labeled"], 2))()


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_learns_and_nothing_else_moves(networks, caches, tmp_path, kind):
    frozen = {"teacher": networks.teacher, "transformer": networks.backbone.transformer, "vae": networks.backbone.vae}
    before = {n: {k: v.clone() for k, v in net.state_dict().items()} for n, net in frozen.items()}
    born = {k: v.clone() for k, v in networks.student.state_dict().items()}
    training = TrainingConfig(stage="s", steps=3, batch_size=2, save_every=0)
    fit(*objective_and_batches(kind, networks, caches), OptimizerConfig(learning_rate=1e-3), training, tmp_path, "f")
    for name, net in frozen.items():
        assert all(torch.equal(v, before[name][k]) for k, v in net.state_dict().items()), name
        assert all(p.grad is None and not p.requires_grad for p in net.parameters()), name
    after = networks.student.state_dict()
    moved = {name for name in born if not torch.equal(born[name], after[name])}
    assert moved >= {n for n in networks.trainable.parameters if n.endswith("to_q.weight") or "controlnet_blocks" in n}
    assert moved <= set(networks.trainable.parameters)


def test_eq_1_is_made_of_its_terms(networks, caches):
    objective, batches = objective_and_batches("supervised", networks, caches)
    batch = batches.batch(DRAW)
    losses = objective.losses(batch, DRAW)
    with torch.no_grad():
        at = networks.noised(batch, DRAW)
        teacher, student = networks.teacher_answer(at, batch), networks.student_answer(at, batch)
    task = task_loss(at.noise - batch.latents, student.velocity, mask_weight(batch.mask, WEIGHTS.alpha))
    output = output_loss(teacher.velocity, student.velocity)
    feature = layer_losses(group_targets(teacher.residuals, groups(3)), student.residuals).sum()
    assert min(task, output, feature) > 0
    torch.testing.assert_close(at.target, at.noise - batch.latents)
    torch.testing.assert_close(losses.loss, 4 * task + output + 0.5 * feature)
    torch.testing.assert_close(losses.task_loss, task)
    assert len(losses.feature_losses) == 3


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "from_scratch"])
def test_the_output_may_be_weighted_as_the_task_is(networks, caches, kind):
    objective, batches = objective_and_batches(kind, networks, caches)
    batch = batches.batch(DRAW)
    plain = objective.losses(batch, DRAW).output_loss
    objective.weights = WEIGHTS.model_copy(update={"output_alpha": 0.5})
    torch.testing.assert_close(objective.losses(batch, DRAW).output_loss, plain / 4)  # w = J / 2, inside the square
    objective.weights = WEIGHTS.model_copy(update={"output_alpha": 0.99})
    hole = objective.losses(batch, DRAW).output_loss
    objective.weights = WEIGHTS.model_copy(update={"output_alpha": 0.9})
    assert 0 < objective.losses(batch, DRAW).output_loss < hole < plain


def test_eq_6_has_no_task(networks, caches):
    objective, batches = objective_and_batches("self_supervised", networks, caches)
    losses = objective.losses(batches.batch(DRAW), DRAW)
    assert losses.task_loss == 0
    assert losses.output_loss > 0
    torch.testing.assert_close(losses.loss, losses.output_loss + 0.5 * losses.feature_loss)


def test_one_stage_is_eq_1_on_one_half_and_eq_6_on_the_other(networks, caches):
    objective, batches = objective_and_batches("mixed", networks, caches)
    draw = Draw(0, "stage", 3, range(4))
    batches.labeled.order.batch_size = batches.unlabeled.order.batch_size = 2
    batch = batches.batch(draw)
    both = objective.losses(batch, draw)
    assert (list(batch.slots), batch.num_labeled) == ([0, 2, 1, 3], 2)
    first, last = (
        Batch(*(tensor[half] for tensor in batch[:5]), slots=batch.slots[half], num_labeled=count)
        for half, count in ((slice(2), 2), (slice(2, 4), 0))
    )
    eq_1 = distillation("supervised", networks).losses(first, draw)
    eq_6 = distillation("self_supervised", networks).losses(last, draw)
    torch.testing.assert_close(both.loss, (eq_1.loss + eq_6.loss) / 2)
    assert both.task_loss > 0
    # each half walks through its own set, and every sample has its own turn
    rows = {tuple(batches.labeled.rows(draw._replace(slots=[0, 1], stage="stage labeled", step=n))) for n in range(2)}
    assert len({row for pair in rows for row in pair}) == 4


def test_ssd_compares_each_layer_with_the_one_that_was_kept(networks, caches):
    objective, batches = objective_and_batches("one_to_one", networks, caches)
    batch = batches.batch(DRAW)
    losses = objective.losses(batch, DRAW)
    with torch.no_grad():
        at = networks.noised(batch, DRAW)
        teacher, student = networks.teacher_answer(at, batch), networks.student_answer(at, batch)
    last = [teacher.residuals[site] for site in (7, 15, 22)]  # three groups of 23 sites end there
    terms = [(own - kept).square().mean() for own, kept in zip(student.residuals, last, strict=True)]
    torch.testing.assert_close(losses.feature_losses, torch.stack(terms))
    torch.testing.assert_close(losses.task_loss, task_loss(at.noise - batch.latents, student.velocity))
    assert layer_losses(kept_targets(teacher.residuals, groups(3)), last).sum() == 0
    assert layer_losses(group_targets(teacher.residuals, groups(3)), last).sum() > 0


def test_the_student_is_noised_where_the_scheduler_would(networks, caches):
    batch = CacheBatches(caches["labeled"], 2).batch(DRAW)
    batch = batch._replace(latents=torch.zeros_like(batch.latents))
    at = networks.noised(batch, DRAW)
    torch.testing.assert_close(at.noisy_latents, at.sigmas[:, None, None, None] * at.noise)
    shifted = Networks(networks.backbone, None, networks.student, sigmas=SigmaConfig(shift=3.0, logit_mean=0.5))
    expected = flow.logit_normal_sigmas(DRAW.normals("sigmas"), 0.5, 1.0, 3.0)
    assert torch.equal(shifted.noised(batch, DRAW).sigmas, expected)
    assert networks.shift_at((8, 8)) == networks.backbone.pipeline.scheduler.config.shift
    turned = networks.noised(batch._replace(slots=[1, 0]), DRAW)  # the noise is that of the batch's own slots
    assert torch.equal(turned.noise, at.noise.flip(0))


def test_the_teacher_makes_no_graph_and_the_student_does(networks, caches):
    batch = CacheBatches(caches["labeled"], 2).batch(DRAW)
    at = networks.noised(batch, DRAW)
    networks.teacher.requires_grad_(True)  # not even a teacher that somebody woke
    teacher, student = networks.teacher_answer(at, batch), networks.student_answer(at, batch)
    networks.teacher.requires_grad_(False)
    assert not any(t.requires_grad for t in (teacher.velocity, *teacher.residuals))
    assert all(t.requires_grad for t in (student.velocity, *student.residuals))
    assert (len(teacher.residuals), len(student.residuals)) == (23, 3)


def test_the_gradient_passes_through_the_frozen_backbone_to_every_residual(networks, caches):
    batch = CacheBatches(caches["labeled"], 2).batch(DRAW)
    student = networks.student_answer(networks.noised(batch, DRAW), batch)
    for residual in student.residuals:
        residual.retain_grad()
    student.velocity.square().mean().backward()
    assert all(bool(r.grad.any()) for r in student.residuals)
    assert all(p.grad is None for p in networks.backbone.transformer.parameters())


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(tiny_backbone, caches):
    teacher = tiny_backbone.pipeline.controlnet
    copy = build_student(tiny_backbone.transformer, teacher, 23, "teacher", 0)
    objective = distillation("self_supervised", Networks(tiny_backbone, teacher, copy))
    losses = objective.losses(CacheBatches(caches["unlabeled"], 2, x0="cond_latents").batch(DRAW), DRAW)
    assert losses.output_loss.item() < 1e-12
    assert losses.feature_loss.item() < 1e-12


def test_stage_2_reads_no_ground_truth(networks, caches):
    objective = distillation("self_supervised", networks)
    assert "latents" not in caches["unlabeled"].arrays
    blind = Cache(caches["labeled"].folder)
    blind.arrays["latents"] = np.full_like(blind.arrays["latents"], np.nan)
    sources = {**caches, "blind": blind}
    for step in range(2):
        draw = DRAW._replace(step=step)
        found = {
            n: objective.losses(CacheBatches(c, 2, x0="cond_latents").batch(draw), draw) for n, c in sources.items()
        }
        wanted = found.pop("labeled")
        assert wanted.loss > 0
        for name, losses in found.items():
            assert all(torch.equal(a, b) for a, b in zip(losses, wanted, strict=True)), name


def test_stage_2_starts_from_what_x0_is_named(networks, caches, monkeypatch):
    seen, noised = [], networks.noised
    monkeypatch.setattr(networks, "noised", lambda batch, draw: seen.append(batch.latents) or noised(batch, draw))
    cache, objective = Cache(caches["unlabeled"].folder), distillation("self_supervised", networks)
    cache.arrays["completions"] = cache.arrays["cond_latents"] + 1
    for x0 in ("cond_latents", "completions"):
        objective.losses(CacheBatches(cache, 2, x0=x0).batch(DRAW), DRAW)
    rows = CacheBatches(cache, 2, x0="cond_latents").rows(DRAW)
    assert torch.equal(seen[0], cache.take("cond_latents", rows))
    assert torch.equal(seen[1], cache.take("completions", rows))


def test_stage_1_cannot_run_without_ground_truth(caches):
    with pytest.raises(InvalidInputError, match="no latents"):
        CacheBatches(caches["unlabeled"], 2).batch(DRAW)


def test_the_baseline_never_asks_the_teacher(networks, caches, monkeypatch):
    objective, batches = objective_and_batches("from_scratch", networks, caches)
    batch = batches.batch(DRAW)
    wanted = objective.losses(batch, DRAW)
    monkeypatch.setattr(networks, "teacher", None)
    assert torch.equal(objective.losses(batch, DRAW).loss, wanted.loss)
    torch.testing.assert_close(wanted.loss, 4 * wanted.task_loss)
    with pytest.raises(ValueError, match="without a teacher"):
        distillation("supervised", networks).losses(batch, DRAW)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_dropped_prompt_is_empty_for_teacher_and_student(networks, caches, monkeypatch, share):
    seen = []

    def watched(controlnet, noisy, sigmas, prompt_embeds, *rest):
        seen.append((controlnet, prompt_embeds))
        return residuals(controlnet, noisy, sigmas, prompt_embeds, *rest)

    residuals = objectives.control_residuals
    monkeypatch.setattr(objectives, "control_residuals", watched)
    batch = CacheBatches(caches["unlabeled"], 2, share, x0="cond_latents").batch(DRAW)
    distillation("self_supervised", networks).losses(batch, DRAW)
    assert [controlnet for controlnet, _ in seen] == [networks.teacher, networks.student]
    assert torch.equal(seen[0][1], seen[1][1])
    empty, pooled = networks.backbone.encode_prompts(["", ""])
    assert torch.allclose(seen[0][1], empty, atol=1e-5) == (share == 1)
    assert torch.allclose(batch.pooled_prompt_embeds, pooled, atol=1e-5) == (share == 1)


def test_a_tenth_of_the_prompts_is_dropped(caches):
    batches, empty = CacheBatches(caches["labeled"], 500, 0.1), caches["labeled"].take("pooled_prompt_embeds", [0])
    pooled = batches.batch(Draw(0, "s", 0, range(500))).pooled_prompt_embeds
    assert 20 < int((pooled == empty).all(1).sum()) < 80


def test_relative_features_are_an_option(networks, caches):
    batch = CacheBatches(caches["unlabeled"], 2, x0="cond_latents").batch(DRAW)
    plain, relative = (distillation("self_supervised", networks, r).losses(batch, DRAW) for r in (False, True))
    assert torch.equal(plain.output_loss, relative.output_loss)
    assert not torch.allclose(plain.feature_losses, relative.feature_losses)


def test_a_mixed_batch_names_what_is_not_finite_in_either_half(caches):
    halves = {name: Cache(caches[name].folder) for name in ("labeled", "unlabeled")}
    mixed = MixedBatches(CacheBatches(halves["labeled"], 1), CacheBatches(halves["unlabeled"], 1, x0="cond_latents"))
    draws = [DRAW._replace(step=step) for step in range(5)]
    assert [mixed.not_finite(draw) for draw in draws] == [[]] * 5
    for cache, name, row in ((halves["labeled"], "latents", 1), (halves["unlabeled"], "cond_latents", 3)):
        cache.arrays[name] = np.array(cache.arrays[name])
        cache.arrays[name][row, 0, 0, 0] = np.inf
    names = sorted(name for draw in draws for name in mixed.not_finite(draw))
    assert names == sorted(
        f"sample {halves[n].keys[row]} of {halves[n].folder}" for n, row in (("labeled", 1), ("unlabeled", 3))
    )
