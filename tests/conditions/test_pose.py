"""Poses by transformers' VitPose with random weights, drawn as OpenPose draws them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

from refine_control.conditions import pose
from refine_control.errors import InvalidInputError, MissingError

H, W = 96, 80


def model(folder, points=17, experts=1) -> VitPoseForPoseEstimation:
    """The smallest network of the class, saved to a folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1, "part_features": 4}
    backbone = VitPoseBackboneConfig(**sizes, image_size=(64, 48), num_experts=experts, out_indices=[1])
    network = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=points)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3)
    network.save_pretrained(folder)
    return network


def standing() -> np.ndarray:
    """(17,2): a person in the middle of H x W, symmetric about x = 40."""
    half = [(0, 10), (3, 8), (6, 10), (10, 24), (16, 40), (16, 54), (6, 54), (6, 72), (6, 90)]
    both = [(40 + side * x, y) for x, y in half[1:] for side in (1, -1)]
    return np.array([(40, 10), *both], float)


def test_points_and_limbs_have_the_colours_of_openpose():
    picture = pose.draw_pose(standing(), np.ones(17), H, W)
    assert (picture.shape, picture.dtype) == ((H, W, 3), np.uint8)
    nose, neck, right_shoulder, left_ankle = (10, 40), (24, 40), (24, 30), (90, 46)
    expected = {nose: (255, 0, 0), neck: (255, 85, 0), right_shoulder: (255, 170, 0), left_ankle: (85, 0, 255)}
    for place, colour in expected.items():
        assert tuple(picture[place]) == colour, place
    assert tuple(picture[24, 36]) == (153, 0, 0)  # the limb from neck to right shoulder is the first
    assert tuple(picture[24, 44]) == (153, 51, 0)
    assert tuple(picture[0, 0]) == (0, 0, 0)


def test_a_point_with_a_low_score_and_its_limbs_are_not_drawn():
    scores = np.ones(17)
    scores[16] = 0.29  # the right ankle
    whole, rest = (pose.draw_pose(standing(), each, H, W) for each in (np.ones(17), scores))
    assert whole[80:94, 28:40].any()
    assert not rest[80:94, 28:40].any()
    assert np.array_equal(whole[:, 41:], rest[:, 41:])
    scores[5] = 0  # a shoulder: no neck either
    assert not pose.draw_pose(standing(), scores, H, W)[24, 40].any()
    assert not pose.draw_pose(standing(), np.zeros(17), H, W).any()


@pytest.mark.parametrize("experts", [1, 2])
def test_a_peak_of_the_heat_map_is_drawn_where_it_is_in_the_photograph(tmp_path, monkeypatch, experts):
    network = model(tmp_path, experts=experts)
    rows, columns = np.arange(17) % 12 + 2, np.arange(17) % 8 + 2  # of 16 x 12 cells
    y, x = np.mgrid[:16, :12]
    heat = 0.9 * np.exp(-((y - rows[:, None, None]) ** 2 + (x - columns[:, None, None]) ** 2) / 4)
    monkeypatch.setattr(network.head, "forward", lambda *_, **__: torch.from_numpy(heat).float()[None])
    monkeypatch.setattr(pose, "load_preparer", lambda *_: network)
    drawn = []
    monkeypatch.setattr(pose, "draw_pose", lambda *given: drawn.append(given) or np.zeros((H, W, 3), np.uint8))
    pose.pose_network(str(tmp_path))(np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8))
    ((points, scores, height, width),) = drawn
    assert (points.shape, height, width) == ((17, 2), H, W)
    assert np.allclose(scores, 0.9)
    # The person's box is 1.25 times the picture, widened to 3 : 4; the outer cells are centred on its edges
    sides = 1.25 * max(W, H * 48 / 64), 1.25 * max(H, W * 64 / 48)
    assert np.allclose(points[:, 0], W / 2 + sides[0] * (columns / 11 - 0.5), atol=0.5)
    assert np.allclose(points[:, 1], H / 2 + sides[1] * (rows / 15 - 0.5), atol=0.5)


def test_data_build_draws_the_poses_that_are_not_given(tmp_path):
    from refine_control.photos.build import build
    from refine_control.photos.shards import Shards

    model(tmp_path / "model")
    (tmp_path / "in").mkdir()
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("a person")
    options = {"condition": "pose", "test_fraction": 0, "unlabeled_fraction": 0, "size": 32}
    build(tmp_path / "in", tmp_path / "out", preparer=str(tmp_path / "model"), **options)
    (only,) = Shards(tmp_path / "out" / "labeled")
    assert np.array_equal(only.cond, pose.pose_network(str(tmp_path / "model"))(only.image))


def test_a_model_that_is_not_there_or_of_another_kind_is_said_in_a_sentence(tmp_path):
    with pytest.raises(MissingError, match="hf download nobody/nothing"):
        pose.pose_network("nobody/nothing")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "mlp_ratio": 1}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "other")
    with pytest.raises(InvalidInputError, match="a model of type 'dinov2', not a VitPose"):
        pose.pose_network(str(tmp_path / "other"))
    model(tmp_path / "hands", points=21)
    with pytest.raises(InvalidInputError, match="finds 21 key points, not the 17 of COCO"):
        pose.pose_network(str(tmp_path / "hands"))
