"""The bench counts a whole picture and pairs what it times. No time is asserted."""

import pytest

from refine_control.bench import sampling
from refine_control.bench.sampling import bench_sampling
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.metrics.cost import count_flops
from refine_control.pipeline.painting import paint
from refine_control.pipeline.picture_cost import picture_cost

GUIDED, ONE = "teacher 20 steps guided", "student 1 step"


@pytest.fixture(scope="module")
def report(tiny_backbone):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "load_backbone", lambda model, device: tiny_backbone)
        patch.setattr(sampling, "ways", lambda steps: {GUIDED: ("teacher", 2, True), ONE: ("student", 1, False)})
        return bench_sampling(layers=2, batches=(2,), repeats=1)


@pytest.mark.parametrize(("steps", "guidance"), [(1, 3.0), (2, 1.0)])
def test_the_counted_operations_are_those_of_painting(tiny_backbone, steps, guidance):
    shown, prompts = sampling.make_shown(1, tiny_backbone.geometry.side)
    sampler = SamplerConfig(num_inference_steps=steps, guidance_scale=guidance)
    controlnet = tiny_backbone.pipeline.controlnet
    counted = count_flops(lambda: paint(tiny_backbone, controlnet, shown, prompts, sampler))
    cost = picture_cost(tiny_backbone, controlnet, sampler)
    assert cost.gflops_picture * 1e9 == pytest.approx(counted, rel=1e-12)
    assert cost.network_calls == steps * (2 if guidance > 1 else 1)


def test_every_way_is_timed_packed_and_as_modules_in_each_batch(report):
    assert {name: cost.network_calls for name, cost in report.cost.items()} == {GUIDED: 4, ONE: 1}
    assert report.layers == {"teacher": 23, "student": 2}
    (batch, each), *_ = report.batches.items()
    assert set(each.seconds) == {GUIDED, ONE, f"modules, {GUIDED}", f"modules, {ONE}"}
    assert each.seconds_a_picture[ONE] * batch == each.seconds[ONE].median
    assert set(each.parts) == {"text", "encode", "decode", "teacher's call", "student's call"}
    name = f"{GUIDED} / {ONE}"
    assert each.speedup[name].median == pytest.approx(each.seconds[GUIDED].median / each.seconds[ONE].median)
    assert f"modules, {name}" in each.speedup
    assert report.operations[name] > 1
    assert f"{name}: " in report.text


def test_measuring_leaves_the_modules_as_they_are(report, tiny_backbone):
    assert not hasattr(tiny_backbone.transformer, "packed")
    assert not hasattr(tiny_backbone.pipeline.controlnet, "packed")


def test_a_teacher_without_guidance_is_refused():
    with pytest.raises(InvalidInputError, match="guidance is 1, which is none"):
        bench_sampling(guidance=1)


def test_teacher_and_student_paint_in_the_usual_steps_and_in_few():
    named = sampling.ways(28)
    assert named["student 28 steps guided"] == ("student", 28, True)
    assert list(named) == [
        *("teacher 28 steps guided", "student 28 steps guided"),
        *("teacher 4 steps guided", "student 4 steps", ONE),
    ]
    pairs = sampling._pairs(named)
    assert ("teacher 4 steps guided", "student 28 steps guided") not in pairs
    assert len(pairs) == 5
