"""Every objective for few steps against a few lines of its own, and what its options may and may not change."""

import copy
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from refine_control.cache.building import completion_sampler, write_cache
from refine_control.cache.reader import Cache
from refine_control.config import FEW_STEP_KINDS, ObjectiveConfig, OptimizerConfig, TrainingConfig
from refine_control.flow import even_sigmas
from refine_control.losses import mask_weight
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models.backbone import Backbone, decode_latents, encode_images, encoder_features
from refine_control.records import LABELED
from refine_control.training.assembly import compile_blocks
from refine_control.training.batches import CacheBatches
from refine_control.training.few_step import KINDS, FewStep, asks_teacher, fields_read, needs_target
from refine_control.training.loop import Draw, fit
from refine_control.training.objectives import Batch, Networks, Point

BATCH, SHIFT = 4, 3.0
DRAW = Draw(0, "few_step", 73, range(BATCH))
"""Two samples at pure noise, one level below every dt and one above, one roll-out, and each of four windows."""
SHAPE = (16, 8, 8)


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    """The tiny backbone under a scheduler that shifts."""
    pipeline = tiny_backbone.pipeline
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return Backbone(type(pipeline)(**{**pipeline.components, "scheduler": scheduler}), max_sequence_length=0)


@pytest.fixture(scope="module")
def cache(backbone, tmp_path_factory):
    """Ground truth, guided completions and the four levels of their paths."""
    folder = tmp_path_factory.mktemp("few") / "cache"
    options = {"completions": completion_sampler(4, 3.0, even=True), "path": 4}
    write_cache(list(scene_photos(0, 0, 6)), folder, backbone, LABELED, source={}, **options)
    return Cache(folder)


@pytest.fixture
def networks(backbone, tiny_student):
    return Networks(backbone, backbone.pipeline.controlnet, tiny_student(2))


def test_the_target_of_a_compiled_student_is_compiled(networks, monkeypatch):
    compiled = lambda block: setattr(block, "_compiled_call_impl", block._call_impl)  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    compile_blocks(networks.student)
    target = FewStep(networks, config_of("phases")).target
    assert all(block._compiled_call_impl is not None for block in target.transformer_blocks)


def config_of(kind, x0="teacher", alpha=None, **few):
    needed = {"end_points": {"first": 0.5}}.get(kind, {})
    values = {"kind": kind, "x0_source": x0, "few_step": {"data": "labeled", **needed, **few}}
    return ObjectiveConfig.model_validate(values | {"weights": {"output_alpha": alpha}})


def batches_of(config, cache, size=BATCH):
    x0 = "latents" if config.x0_source == "truth" else "completions"
    return CacheBatches(cache, size, prompt_dropout=0.0, x0=x0, adds=fields_read(config))


class Asked:
    """An objective and its batch; `points` are where each network was asked, and with which prompt embeddings."""

    def __init__(self, networks, cache, config, draw=DRAW):
        self.networks, self.config, self.points = networks, config, []
        self.objective = FewStep(networks, config)
        if self.objective.target is not None:  # a running mean that has moved away
            with torch.no_grad():
                for parameter in self.objective.target.parameters():
                    parameter.mul_(1.1)
        self.batch = batches_of(config, cache).batch(draw)
        answer = networks.answer

        def watched(controlnet, at, batch, *guidance):
            self.points.append((controlnet, at, batch.prompt_embeds))
            return answer(controlnet, at, batch, *guidance)

        networks.answer = watched
        self.losses = self.objective.losses(self.batch, draw)
        networks.answer = answer

    def of(self, network):
        return [at for controlnet, at, _ in self.points if controlnet is network]

    @property
    def student(self):
        (at,) = self.of(self.networks.student)
        return at

    @property
    def target(self):
        (at,) = self.of(self.objective.target)
        return at

    @torch.no_grad()
    def v(self, network, x, t):
        return self.networks.answer(network, Point(x, x, t, x), self.batch).velocity

    @torch.no_grad()
    def guided(self, x, t, scale=3.0):
        embeds, pooled = (e.expand(BATCH, *e.shape[1:]) for e in self.batch.empty)
        other = self.batch._replace(prompt_embeds=embeds, pooled_prompt_embeds=pooled)
        v, empty = (
            self.networks.answer(self.networks.teacher, Point(x, x, t, x), b).velocity for b in (self.batch, other)
        )
        return empty + scale * (v - empty)


def shifted(u):
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def wide(t):
    return t.reshape(-1, 1, 1, 1)


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a).detach(), torch.as_tensor(b).detach(), rtol=1e-4, atol=1e-6)


def second_point(asked, x, t, s, ode, noise):
    if ode == "none":
        return (1 - wide(s)) * asked.batch.latents + wide(s) * noise
    v = asked.v(asked.networks.student, x, t) if ode == "own" else asked.guided(x, t)
    return x + wide(s - t) * v


@pytest.mark.parametrize("ode", ["own", "frozen", "none"])
@pytest.mark.parametrize("x0", ["truth", "teacher"])
def test_codi_is_its_two_terms(networks, cache, x0, ode):
    asked = Asked(networks, cache, config_of("codi", x0, 0.9, ode=ode, dt=0.3, data_weight=0.5, consistency=2.0))
    x0, noise, u = asked.batch.latents, DRAW.normals("noise", *SHAPE), 1 - DRAW.uniforms("levels")
    t, s = shifted(u), shifted((u - 0.3).clamp_min(0))
    x = (1 - wide(t)) * x0 + wide(t) * noise
    v = asked.v(networks.student, x, t)
    x_s = second_point(asked, x, t, s, ode, noise)
    noise_s = x_s + (1 - wide(s)) * asked.v(asked.objective.target, x_s, s)
    weight = mask_weight(asked.batch.mask, 0.9)
    data = (weight * (x - wide(t) * v - x0)).square().mean()
    consistent = (weight * (x + (1 - wide(t)) * v - noise_s)).square().mean()
    close(asked.losses.data_loss, data)
    close(asked.losses.consistency_loss, consistent)
    close(asked.losses.loss, 0.5 * data + 2 * consistent)
    assert not asked.target.noisy_latents.requires_grad
    assert data > 0
    assert consistent > 0


def path_of(batch):
    return [batch.noise, *batch.path.unbind(1), batch.latents]


@pytest.mark.parametrize("steps", [2, 4])
def test_end_points_regress_from_the_knots_of_the_path(networks, cache, steps):
    asked = Asked(networks, cache, config_of("end_points", steps=steps, first=0.4, consistency=0.0))
    drawn, path = 1 - DRAW.uniforms("levels"), path_of(asked.batch)
    total = 0
    for row in range(BATCH):
        knot = 0 if DRAW.uniforms("first")[row] < 0.4 else 1 + int((1 - drawn[row]) * (steps - 1))
        t = shifted(torch.tensor([1 - knot / steps]))
        x = path[knot * 4 // steps][row : row + 1]
        close(asked.student.noisy_latents[row], x[0])
        close(asked.student.sigmas[row], t[0])
        one = asked.batch.take(torch.tensor([row]))
        v = networks.answer(networks.student, Point(x, x, t, x), one).velocity
        total += (v - (x - asked.batch.latents[row]) / t).square().mean() / BATCH
    close(asked.losses.loss, total)
    assert asked.losses.consistency_loss == 0
    assert len(asked.points) == 1


@pytest.mark.parametrize("weighting", ["one", "codi"])
def test_end_points_may_lie_on_straight_lines_and_be_consistent(networks, cache, weighting):
    config = config_of("end_points", points="line", first=0.0, consistency=0.5, dt=0.2, weighting=weighting)
    asked = Asked(networks, cache, config)
    u, noise, x0 = 1 - DRAW.uniforms("levels"), asked.batch.noise, asked.batch.latents
    t, s = shifted(u), shifted((u - 0.2).clamp_min(0))
    x = (1 - wide(t)) * x0 + wide(t) * noise
    v = asked.v(networks.student, x, t)
    target_v = asked.v(asked.objective.target, x + wide(s - t) * v, s)
    weight = wide((1 - t) * (1 - s)) if weighting == "codi" else 1.0
    close(asked.losses.data_loss, (v - (noise - x0)).square().mean())
    close(asked.losses.consistency_loss, (weight * (v - target_v).square()).mean())
    close(asked.losses.loss, asked.losses.data_loss + 0.5 * asked.losses.consistency_loss)


def test_rolled_out_points_are_those_that_samplers_of_the_target_network_come_by(networks, cache):
    still = Asked(networks, cache, config_of("end_points", consistency=0.0))
    moved = Asked(networks, cache, config_of("end_points", consistency=0.0, rollout=0.6))
    chosen = (DRAW.uniforms("rollout") < 0.6) & (still.student.sigmas < 1)
    assert 0 < chosen.sum() < BATCH
    noise, x0, at = moved.batch.noise, moved.batch.latents, moved.student
    close(at.noisy_latents[~chosen], still.student.noisy_latents[~chosen])
    assert torch.equal(at.sigmas[~chosen], still.student.sigmas[~chosen])
    visits = [(2, 1), (4, 1), (4, 2), (4, 3)]
    for row in chosen.nonzero()[:, 0].tolist():
        count, number = visits[int(DRAW.uniforms("visits")[row] * len(visits))]
        x = noise.clone()
        sigmas = even_sigmas(count, 3.0)
        for t, s in pairwise(sigmas[: number + 1]):
            x = x + (s - t) * moved.v(moved.objective.target, x, t.expand(BATCH))
        close(at.sigmas[row], sigmas[number])
        close(at.noisy_latents[row], x[row])
    x, t = at.noisy_latents, at.sigmas
    close(moved.losses.loss, (moved.v(networks.student, x, t) - (x - x0) / wide(t)).square().mean())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_windows_are_chords_of_the_path(networks, cache, steps):
    asked = Asked(networks, cache, config_of("windows", steps=steps, first=0.4))
    at, path = asked.student, [asked.batch.noise, asked.batch.latents] if steps == 1 else path_of(asked.batch)
    apart, total = (len(path) - 1) // steps, 0
    for row in range(BATCH):
        number = int(DRAW.uniforms("windows")[row] * steps)
        part = 1.0 if DRAW.uniforms("first")[row] < 0.4 else 1 - DRAW.uniforms("levels")[row]
        a, b = 1 - number / steps, 1 - (number + 1) / steps
        t_a, t_b, t = (shifted(torch.tensor([float(u)])) for u in (a, b, b + part * (a - b)))
        x_a, x_b = (path[n * apart][row : row + 1] for n in (number, number + 1))
        x = x_b + (t - t_b) / (t_a - t_b) * (x_a - x_b)
        close(at.noisy_latents[row], x[0])
        close(at.sigmas[row], t[0])
        v = networks.answer(networks.student, Point(x, x, t, x), asked.batch.take(torch.tensor([row]))).velocity
        total += (v - (x_a - x_b) / (t_a - t_b)).square().mean() / BATCH
    close(asked.losses.loss, total)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_is_the_frozen_network_s_at_the_noise_levels_of_stage_1(networks, cache, scale):
    asked = Asked(networks, cache, config_of("guidance", "truth", teacher_guidance=scale))
    at = networks.noised(asked.batch, DRAW)
    assert torch.equal(asked.student.noisy_latents, at.noisy_latents)
    x, t = at.noisy_latents, at.sigmas
    expected = asked.v(networks.teacher, x, t) if scale == 1 else asked.guided(x, t)
    close(asked.losses.loss, (asked.v(networks.student, x, t) - expected).square().mean())
    assert len(asked.points) == (2 if scale == 1 else 3)


@pytest.mark.parametrize("ode", ["own", "frozen", "none"])
@pytest.mark.parametrize(("steps", "huber"), [(1, 0.03), (4, 0.0)])
def test_phases_meet_at_the_end_of_the_phase(networks, cache, steps, huber, ode):
    asked = Asked(networks, cache, config_of("phases", steps=steps, huber=huber, ode=ode, dt=0.1, data_weight=0.0))
    noise, u = DRAW.normals("noise", *SHAPE), 1 - DRAW.uniforms("levels")
    ends = torch.tensor([max(k / steps for k in range(steps) if k / steps < level) for level in u.tolist()])
    t, s, e = shifted(u), shifted(torch.maximum(u - 0.1, ends)), shifted(ends)
    x = (1 - wide(t)) * asked.batch.latents + wide(t) * noise
    x_s = second_point(asked, x, t, s, ode, noise)
    reached = x_s + wide(e - s) * asked.v(asked.objective.target, x_s, s)
    error = x + wide(e - t) * asked.v(networks.student, x, t) - reached
    assert not asked.target.noisy_latents.requires_grad
    close(asked.losses.loss, (error.square() if huber == 0 else (error.square() + huber**2).sqrt() - huber).mean())


# What a perfect student loses.


def straight(at, batch):
    """The velocity of the line between a sample and its noise."""
    return at.noise - batch.latents


@pytest.mark.parametrize(
    "config",
    [
        config_of("codi", "truth"),
        config_of("codi", ode="none"),
        config_of("end_points", points="line"),
        config_of("windows", steps=1),
        config_of("phases", steps=1),
        config_of("phases", steps=4, ode="none", huber=0.1),
    ],
    ids=lambda config: f"{config.kind} {config.few_step.ode}",
)
def test_who_knows_the_straight_line_has_nothing_to_learn(networks, cache, monkeypatch, config):
    monkeypatch.setattr(FewStep, "student_velocity", lambda self, at, batch: straight(at, batch))
    monkeypatch.setattr(FewStep, "target_velocity", lambda self, at, batch: straight(at, batch))
    losses = FewStep(networks, config).losses(batches_of(config, cache).batch(DRAW), DRAW)
    assert max(each.item() for each in losses) < 1e-9


def test_a_copy_of_the_teacher_has_no_guidance_to_learn_where_there_is_none(backbone, cache):
    teacher = backbone.pipeline.controlnet
    config = config_of("guidance", teacher_guidance=1.0)
    networks = Networks(backbone, teacher, copy.deepcopy(teacher).requires_grad_(True))
    assert FewStep(networks, config).losses(batches_of(config, cache).batch(DRAW), DRAW).loss == 0


# What learns, what does not, and whom guidance reaches.

RECIPES = {
    "codi": config_of("codi", "truth", ode="frozen"),
    "codi own": config_of("codi", "truth"),
    "end_points": config_of("end_points", consistency=0.25, rollout=0.5),
    "windows": config_of("windows"),
    "guidance": config_of("guidance"),
    "phases": config_of("phases", ode="frozen", huber=0.03),
}


def test_each_kind_has_its_rule():
    assert set(KINDS) == FEW_STEP_KINDS == {config.kind for config in RECIPES.values()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_student_learns_the_target_is_its_mean_and_nothing_else_moves(networks, cache, tmp_path, name):
    frozen = {"teacher": networks.teacher, "transformer": networks.backbone.transformer, "vae": networks.backbone.vae}
    before = {n: {k: v.clone() for k, v in net.state_dict().items()} for n, net in frozen.items()}
    born = {k: v.clone() for k, v in networks.student.state_dict().items()}
    config = RECIPES[name]
    objective = FewStep(networks, config)
    training = TrainingConfig(stage="s", steps=2, batch_size=2, save_every=0, ema_decay=0.9)
    fitted = fit(objective, batches_of(config, cache, 2), OptimizerConfig(learning_rate=1e-3), training, tmp_path, "f")
    for part, net in frozen.items():
        assert all(torch.equal(v, before[part][k]) for k, v in net.state_dict().items()), part
        assert all(p.grad is None and not p.requires_grad for p in net.parameters()), part
    after = networks.student.state_dict()
    moved = {each for each in born if not torch.equal(born[each], after[each])}
    assert moved >= {n for n in networks.trainable.parameters if n.endswith("to_q.weight") or "controlnet_blocks" in n}
    assert moved <= set(networks.trainable.parameters)
    if not needs_target(config):
        assert objective.target is None
        return
    assert not any(p.requires_grad or p.grad is not None for p in objective.target.parameters())
    for each, parameter in objective.target.state_dict().items():
        assert torch.equal(parameter, fitted.weights.get(each, born[each])), each
    assert any(not torch.equal(fitted.weights[each], after[each]) for each in fitted.weights)


def test_the_target_of_a_network_in_bf16_is_the_mean_that_its_masters_have(backbone, tiny_student):
    networks = Networks(copy.deepcopy(backbone), None, tiny_student(2), dtype=torch.bfloat16)
    objective = FewStep(networks, config_of("codi", "truth"))
    mean = {name: master + 0.1 for name, master in networks.trainable.masters.items()}
    objective.updated(mean)
    target = dict(objective.target.named_parameters())
    assert {p.dtype for p in target.values()} == {torch.bfloat16}
    assert all(torch.equal(target[name], value.bfloat16()) for name, value in mean.items())


@pytest.mark.parametrize("name", RECIPES)
def test_guidance_enters_by_the_frozen_network_alone(networks, cache, name):
    asked = Asked(networks, cache, RECIPES[name])
    empty = networks.backbone.encode_prompts([""])[0]
    seen = {}
    for controlnet, _, embeds in asked.points:
        number = [networks.student, networks.teacher, asked.objective.target].index(controlnet)
        seen.setdefault(number, []).append(any(torch.allclose(e, empty[0], atol=1e-5) for e in embeds))
    assert not any(seen[0] + seen.get(2, []))
    assert seen.get(1, []) == ([False, True] if asks_teacher(RECIPES[name]) else [])
    assert (2 in seen) == needs_target(RECIPES[name])


@pytest.mark.parametrize(
    ("config", "teacher", "target", "fields"),
    [
        (config_of("codi", "truth"), False, True, set()),
        (config_of("codi", consistency=0.0, ode="frozen"), False, False, set()),
        (config_of("codi", ode="frozen"), True, True, {"empty"}),
        (config_of("end_points", consistency=0.0), False, False, {"noise", "path"}),
        (config_of("end_points", consistency=0.0, rollout=0.5, ode="frozen"), False, True, {"noise", "path"}),
        (config_of("end_points", points="line", consistency=0.1, ode="frozen"), True, True, {"noise", "empty"}),
        (config_of("windows"), False, False, {"noise", "path"}),
        (config_of("windows", steps=1), False, False, {"noise"}),
        (config_of("guidance", teacher_guidance=1.0), True, False, set()),
        (config_of("phases", ode="frozen"), True, True, {"empty"}),
        (ObjectiveConfig(), False, False, set()),
    ],
)
def test_only_what_is_read_is_loaded(cache, config, teacher, target, fields):
    assert (asks_teacher(config), needs_target(config), fields_read(config)) == (teacher, target, fields)
    batch = batches_of(config, cache).batch(DRAW)
    assert {name for name in ("noise", "path", "empty") if getattr(batch, name) is not None} == fields


# Options: each changes what it names, and nothing else.


def test_a_share_begins_at_pure_noise_and_the_others_stay_where_they_were(networks, cache):
    plain, some = (Asked(networks, cache, config_of("codi", "truth", first=first)).student for first in (0.0, 0.5))
    chosen = DRAW.uniforms("first") < 0.5
    assert 0 < chosen.sum() < BATCH
    assert (some.sigmas[chosen] == 1).all()
    assert torch.equal(some.sigmas[~chosen], plain.sigmas[~chosen])
    assert torch.equal(some.noisy_latents[chosen], plain.noise[chosen])


@pytest.mark.parametrize("kind", ["codi", "windows"])
def test_one_level_for_the_batch_is_that_of_every_part_of_it(networks, cache, kind):
    asked = Asked(networks, cache, config_of(kind, shared_level=True))
    assert len(asked.student.sigmas.unique()) == 1
    config, part = asked.config, DRAW._replace(slots=range(2, 4))
    again = Asked(networks, cache, config, part).student
    assert torch.equal(again.sigmas, asked.student.sigmas[2:])
    close(again.noisy_latents, asked.student.noisy_latents[2:])
    other = Asked(networks, cache, config_of(kind)).student
    assert len(other.sigmas.unique()) == BATCH
    assert torch.equal(other.noise, asked.student.noise)


def test_dt_and_ode_move_the_second_point_alone(networks, cache):
    near, far, none = (
        Asked(networks, cache, config_of("codi", "truth", **few)) for few in ({}, {"dt": 0.5}, {"ode": "none"})
    )
    for other in (far, none):
        assert torch.equal(other.student.noisy_latents, near.student.noisy_latents)
        assert torch.equal(other.losses.data_loss, near.losses.data_loss)
        assert not torch.equal(other.losses.consistency_loss, near.losses.consistency_loss)
    assert (far.target.sigmas < near.target.sigmas).all()
    assert torch.equal(none.target.sigmas, near.target.sigmas)
    assert not torch.equal(none.target.noisy_latents, near.target.noisy_latents)


def test_the_four_distances_of_codi(networks, cache):
    vae, found, terms = networks.backbone.vae, {}, {}
    for name in ("latent", "encoded", "pixel", "perceptual"):
        asked = Asked(networks, cache, config_of("codi", "truth", alpha=0.9, distance=name))
        found[name], terms[name] = asked.losses.data_loss.item(), asked.losses.consistency_loss.item()
        grad = torch.autograd.grad(asked.losses.data_loss, next(iter(networks.trainable.parameters.values())))[0]
        assert grad.abs().sum() > 0
    assert len(set(terms.values())) == 1
    x, t, x0 = asked.student.noisy_latents, asked.student.sigmas, asked.batch.latents
    with torch.no_grad():
        predicted = x - wide(t) * asked.v(networks.student, x, t)
        painted, original = (decode_latents(vae, each) for each in (predicted, x0))
        weight = mask_weight(asked.batch.mask, 0.9)
        features = zip(encoder_features(vae, painted), encoder_features(vae, original), strict=True)
        layers = [
            (torch.nn.functional.normalize(a, dim=1) - torch.nn.functional.normalize(b, dim=1)).square().sum(1).mean()
            for a, b in features
        ]
        expected = {
            "latent": (weight * (predicted - x0)).square().mean(),
            "encoded": (weight * (encode_images(vae, painted) - x0)).square().mean(),
            "pixel": (painted - original).square().mean(),
            "perceptual": sum(layers) / len(layers),
        }
    assert len(layers) == 4
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("name", ["codi own", "end_points", "windows", "guidance", "phases"])
def test_the_mask_weight_stands_inside_every_square(networks, cache, name):
    values = RECIPES[name].model_dump()
    values["few_step"]["huber"] = 0.0
    plain, even = (
        Asked(networks, cache, ObjectiveConfig.model_validate({**values, "weights": {"output_alpha": alpha}})).losses
        for alpha in (None, 0.5)
    )
    close(even.loss, plain.loss / 4)  # w = 1/2 everywhere


def test_rows_of_a_batch_keep_what_belongs_to_them(cache):
    config = config_of("end_points", consistency=0.1, ode="frozen")
    whole = batches_of(config, cache).batch(DRAW._replace(slots=range(4)))._replace(slots=[7, 5, 3, 1], num_labeled=2)
    part = whole.take(torch.tensor([3, 1]))
    assert (part.slots, part.num_labeled) == ([1, 5], 1)
    for name in Batch._fields:
        value, kept = getattr(whole, name), getattr(part, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(kept, value[[3, 1]]), name
    assert part.empty is whole.empty
    assert whole._replace(path=None).take(torch.tensor([0])).path is None


def test_the_target_takes_the_mean_of_its_own_parameters_and_leaves_others(networks):
    objective = FewStep(networks, config_of("codi", "truth"))
    parameters = {name: p.detach() + 1 for name, p in networks.trainable.parameters.items()}
    objective.updated({"another": torch.zeros(1), **parameters})
    target = dict(objective.target.named_parameters())
    assert all(torch.equal(target[name], value) for name, value in parameters.items())
