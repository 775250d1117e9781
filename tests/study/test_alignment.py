"""What no student avoids follows from the teacher's residuals alone."""

import numpy as np
import pytest
import torch

from refine_control.miniature.scene_shards import scene_photos
from refine_control.study import alignment as module
from refine_control.study.alignment import teacher_alignment

PHOTOS = list(scene_photos(0, 0, 5))
FORM = (64, 32)  # tokens and width of the tiny transformer


def measured(tiny_backbone, monkeypatch, residuals, layers):
    """With these residuals of every picture in place of the network's."""
    monkeypatch.setattr(module, "_residuals", lambda b, c, points: [r[: len(points.noisy)] for r in residuals])
    return teacher_alignment(tiny_backbone, tiny_backbone.pipeline.controlnet, PHOTOS, layers, batch_size=2)


@pytest.fixture
def sites(tiny_backbone):
    return tiny_backbone.num_blocks - 1


def test_as_many_layers_as_sites_lose_nothing_and_fewer_lose_more(tiny_backbone, sites):
    found = teacher_alignment(tiny_backbone, tiny_backbone.pipeline.controlnet, PHOTOS, range(1, sites + 1))
    assert found.errors[sites] == 0
    assert found.outputs[sites] == pytest.approx(0, abs=1e-9)
    assert found.outputs[1] > 0
    assert 0 < found.errors[1] <= 1
    assert found.power.shape == (sites,)
    assert found.cosine.shape == (sites - 1,)
    assert (np.abs(found.cosine) <= 1 + 1e-6).all()


def test_equal_residuals_are_lost_by_no_student(tiny_backbone, sites, monkeypatch):
    same = [torch.full((2, *FORM), 2.0)] * sites
    found = measured(tiny_backbone, monkeypatch, same, [1, 2])
    np.testing.assert_allclose(found.power, 4)
    np.testing.assert_allclose(found.cosine, 1, atol=1e-6)
    assert found.errors == {1: 0, 2: 0}
    assert found.outputs == pytest.approx({1: 0, 2: 0}, abs=1e-9)  # their means inject what they are


def test_one_layer_for_opposite_residuals_loses_all_and_the_batch_size_does_not_count(
    tiny_backbone, sites, monkeypatch
):
    up = torch.ones(2, *FORM)
    signs = [up if s % 2 else -up for s in range(sites)]
    found = measured(tiny_backbone, monkeypatch, signs, [1])
    mean = 0 if sites % 2 == 0 else 1 / sites  # of an odd number of signs one is left over
    assert found.errors[1] == pytest.approx(1 - mean**2)
    np.testing.assert_allclose(found.cosine, -1, atol=1e-6)
    monkeypatch.undo()
    controlnet = tiny_backbone.pipeline.controlnet
    whole, parts = (teacher_alignment(tiny_backbone, controlnet, PHOTOS, [1], batch_size=b) for b in (5, 2))
    np.testing.assert_allclose(whole.power, parts.power, rtol=1e-5)
