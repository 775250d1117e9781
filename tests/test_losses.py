"""Equations 1 to 6, computed again by hand in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refine_control.config import LossWeights
from refine_control.injection import groups, layer_of_site
from refine_control.losses import (
    combine,
    group_targets,
    layer_losses,
    mask_weight,
    mean_squares,
    output_loss,
    task_loss,
    teacher_totals,
)

ALPHA = 0.975


def feature_losses(teacher, student, sizes=None):
    return layer_losses(group_targets(teacher, groups(len(student))), student, sizes)


def tensors(count, *shape, seed=0, dtype=torch.float32):
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def wide(tensor):
    return tensor.double().numpy()


def test_eq_2_weighs_the_hole_with_alpha_and_the_rest_with_what_is_left():
    mask = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(mask_weight(mask, ALPHA), torch.tensor([[0.975, 0.025]]))
    assert torch.equal(mask_weight(mask, 0.5), torch.full((1, 2), 0.5))


def test_eq_3_weighs_an_error_in_the_hole_1521_times():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1
    weight, target = mask_weight(mask, ALPHA), torch.zeros(1, 16, 4, 4, dtype=torch.float64)
    inside, outside = target.clone(), target.clone()
    inside[0, 3, 0, 1], outside[0, 3, 3, 1] = 1.0, 1.0
    ratio = task_loss(target, inside, weight) / task_loss(target, outside, weight)
    assert ratio.item() == pytest.approx(1521, rel=1e-4)


def test_eq_3_is_the_weighted_mean_square():
    (target, student), mask = tensors(2, 2, 16, 8, 8), torch.rand(2, 1, 8, 8).round()
    w = ALPHA * wide(mask) + (1 - ALPHA) * (1 - wide(mask))
    expected = np.mean((w * (wide(target) - wide(student))) ** 2)
    assert task_loss(target, student, mask_weight(mask, ALPHA)).item() == pytest.approx(expected, rel=1e-5)


def test_without_a_mask_weight_eq_3_is_the_plain_mean_square():
    target, student = tensors(2, 2, 16, 8, 8)
    ones = torch.ones(2, 1, 8, 8)
    assert torch.equal(task_loss(target, student), task_loss(target, student, ones))
    assert task_loss(target, student).item() == pytest.approx(np.mean((wide(target) - wide(student)) ** 2), rel=1e-5)


def test_eq_4_is_zero_exactly_when_the_answers_are_equal():
    teacher, student = tensors(2, 2, 16, 8, 8)
    assert output_loss(teacher, teacher).item() == 0
    other = teacher.clone()
    other[1, 15, 7, 7] += 0.5
    assert output_loss(teacher, other).item() == pytest.approx(0.25 / teacher.numel())
    assert output_loss(teacher, student).item() == pytest.approx(
        np.mean((wide(teacher) - wide(student)) ** 2), rel=1e-5
    )


@given(st.integers(1, 23), st.integers(0, 1000))
def test_eq_5_is_zero_exactly_when_the_injected_totals_agree(count, seed):
    teacher = tensors(23, 1, 2, 3, seed=seed, dtype=torch.float64)
    feeds = layer_of_site(count)
    student = [torch.stack([teacher[s] for s in range(23) if feeds[s] == j]).mean(0) for j in range(count)]
    agreeing = feature_losses(teacher, student)
    assert agreeing.shape == (count,)
    assert agreeing.max().item() < 1e-10  # the totals are summed in fp32
    wrong = seed % count
    student[wrong] = student[wrong] + 1
    parts = feature_losses(teacher, student)
    assert parts[wrong].item() == pytest.approx(len(groups(count)[wrong]) ** 2, rel=1e-4)
    assert torch.equal(parts.nonzero()[:, 0][parts[parts.nonzero()[:, 0]] > 1e-9], torch.tensor([wrong]))


def test_eq_5_is_the_paper_s_formula_for_twelve_layers():
    f_t, f_s = tensors(23, 2, 64, 8), tensors(12, 2, 64, 8, seed=1)
    expected = 0.0
    for j in range(1, 12):  # the paper counts layers from 1: || 2 f_S^j - (f_T^{2j-1} + f_T^{2j}) ||^2
        expected += np.mean((2 * wide(f_s[j - 1]) - (wide(f_t[2 * j - 2]) + wide(f_t[2 * j - 1]))) ** 2)
    expected += np.mean((wide(f_s[11]) - wide(f_t[22])) ** 2)  # f_T^24 does not exist
    assert feature_losses(f_t, f_s).sum().item() == pytest.approx(expected, rel=1e-5)


def test_a_student_of_as_many_layers_is_compared_one_to_one():
    teacher, student = tensors(23, 2, 4, 8), tensors(23, 2, 4, 8, seed=1)
    plain = torch.stack([(a - b).square().mean() for a, b in zip(teacher, student, strict=True)])
    torch.testing.assert_close(feature_losses(teacher, student), plain)
    assert feature_losses(teacher, list(teacher)).sum().item() == 0


def test_a_small_teacher_feeds_the_sites_as_it_injects():
    teacher = tensors(2, 1, 2, 3)
    totals = teacher_totals(teacher, groups(1, 5))
    torch.testing.assert_close(totals[0], 3 * teacher[0] + 2 * teacher[1])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_relative_form_does_not_know_the_scale(scale):
    teacher, student = tensors(23, 2, 4, 8), tensors(5, 2, 4, 8, seed=1)
    sizes = mean_squares(group_targets(teacher, groups(5)).values)
    scaled = feature_losses([scale * t for t in teacher], [scale * s for s in student], sizes=scale**2 * sizes)
    torch.testing.assert_close(scaled, feature_losses(teacher, student, sizes=sizes), rtol=1e-4, atol=1e-6)
    nothing = feature_losses(teacher, [torch.zeros_like(s) for s in student], sizes=sizes)
    torch.testing.assert_close(nothing, torch.ones(5))


def test_totals_of_half_precision_features_are_summed_in_full():
    teacher, student = tensors(23, 2, 64, 8, dtype=torch.bfloat16), tensors(1, 2, 64, 8, seed=1, dtype=torch.bfloat16)
    total = sum(wide(t) for t in teacher)
    expected = np.mean((23 * wide(student[0]) - total) ** 2)
    assert feature_losses(teacher, student).item() == pytest.approx(expected, rel=1e-6)
    assert teacher_totals(teacher, groups(1))[0].dtype == torch.float32


def test_eq_1_and_eq_6_are_exact_sums():
    task, output, features = torch.tensor(0.3), torch.tensor(0.5), torch.tensor([0.25, 2.0])
    stage_1 = combine(LossWeights(), task, output, features)
    assert stage_1.loss.item() == pytest.approx(4 * 0.3 + 0.5 + 2.25)
    assert (stage_1.task_loss, stage_1.output_loss) == (task, output)
    assert stage_1.feature_loss.item() == 2.25
    assert torch.equal(stage_1.feature_losses, features)
    stage_2 = combine(LossWeights(output=2.0, feature=0.5), output=output, features=features)
    assert stage_2.loss.item() == pytest.approx(2 * 0.5 + 0.5 * 2.25)
    assert stage_2.task_loss.item() == 0


def test_a_weight_of_zero_leaves_the_term_out_but_logs_it():
    broken = torch.tensor([float("nan")])
    losses = combine(LossWeights(feature=0.0), task=torch.tensor(1.0), features=broken)
    assert losses.loss.item() == 4
    assert losses.feature_loss.isnan()


def test_a_loss_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        combine(LossWeights())


def test_eq_4_may_weigh_the_hole_as_eq_3_does():
    teacher, student = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    mask = torch.zeros(2, 1, 6, 6)
    mask[:, :, 2:4] = 1
    weight = mask_weight(mask, 0.9)
    expected = (0.9**2 * mask + 0.1**2 * (1 - mask)) * (teacher - student).square()
    torch.testing.assert_close(output_loss(teacher, student, weight), expected.mean())
    torch.testing.assert_close(output_loss(teacher, student), (teacher - student).square().mean())
