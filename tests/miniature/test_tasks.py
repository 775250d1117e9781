"""Scenes of each condition: what is rendered is a function of (seed, index), and oracles know the truth from others."""

from dataclasses import replace

import numpy as np
import pytest

from refine_control.conditions.canny import edges
from refine_control.conditions.condition import condition_names
from refine_control.conditions.lowres import shrink
from refine_control.errors import InvalidInputError
from refine_control.miniature import scenes
from refine_control.miniature.scene_shards import build_scenes
from refine_control.miniature.tasks.canny import edge_f1
from refine_control.miniature.tasks.depth import FAR, NEAR
from refine_control.miniature.tasks.edit import discs
from refine_control.miniature.tasks.task import find_oracle, find_task, silhouettes, stored_objects
from refine_control.photos.shards import Shards
from refine_control.records import LABELED, UNLABELED

NAMES = condition_names()
COUNT = 24


@pytest.fixture(scope="module")
def photos():
    """The first scenes of each condition."""
    return {name: list(find_task(name).photos(3, 0, COUNT)) for name in NAMES}


def images_of(photos):
    return np.stack([photo.image for photo in photos])


BY_CHANCE = {"canny": 40}
"""The most that an answer of another scene gets; 30 of the other oracles."""


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_passes_the_truth_and_no_other_scene(photos, name):
    given, headline = photos[name], find_task(name).headline
    oracle = find_oracle(name, given)
    truth = oracle(given, images_of(given))
    assert {name: values.shape for name, values in truth.items()} == dict.fromkeys(truth, (COUNT,))
    np.testing.assert_array_equal(truth[headline], np.full(COUNT, 100.0))
    others = oracle(given, np.roll(images_of(given), 1, axis=0))
    assert others[headline].mean() < BY_CHANCE.get(name, 30)


@pytest.mark.parametrize("name", NAMES)
def test_a_scene_is_a_function_of_seed_and_index(photos, name):
    chunks = [photo for start in (0, 5, 6) for photo in find_task(name).photos(3, start, {0: 5, 5: 1, 6: 4}[start])]
    for one, expected in zip(chunks, photos[name][:10], strict=True):
        assert (one.key, one.prompt, one.global_prompt, one.meta) == (
            expected.key,
            expected.prompt,
            expected.global_prompt,
            expected.meta,
        )
        for part in ("image", "mask", "cond"):
            np.testing.assert_array_equal(getattr(one, part), getattr(expected, part))
    other = next(iter(find_task(name).photos(4, 0, 1)))
    assert not np.array_equal(other.image, photos[name][0].image)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_has_a_condition_picture_or_a_region(photos, name):
    assert name == "inpaint" or np.mean([photo.cond.std() for photo in photos[name]]) > 5
    for photo in photos[name]:
        if name == "inpaint":
            assert photo.cond is None
            assert 0 < photo.mask.sum() < photo.mask.size
        else:
            assert (photo.cond.shape, photo.cond.dtype) == (photo.image.shape, np.uint8)
            assert photo.mask.all()


def test_there_is_no_task_without_a_condition():
    with pytest.raises(InvalidInputError, match="there is no condition 'colour'"):
        find_task("colour")


def test_oracles_that_read_scenes_are_none_for_photographs(photos):
    bare = [replace(photo, meta={}) for photo in photos["canny"][:2]]
    assert find_oracle("canny", bare) is not None
    assert find_oracle("depth", bare) is None


# Each kind.


def test_edges_count_as_the_same_within_one_pixel():
    line, near, far = (np.zeros((16, 16), bool) for _ in range(3))
    line[4], near[5], far[8] = True, True, True
    assert edge_f1(line, line) == edge_f1(line, near) == 1
    assert edge_f1(line, far) == 0
    assert edge_f1(line, line | far) == pytest.approx(2 / 3)  # half of its edges are right, none is missing
    nothing = np.zeros_like(line)
    assert edge_f1(nothing, nothing) == 1
    assert edge_f1(line, nothing) == edge_f1(nothing, line) == 0


def test_edges_are_those_of_the_picture(photos):
    for photo in photos["canny"][:4]:
        np.testing.assert_array_equal(photo.cond[..., 0] > 127, edges(photo.image))
        assert set(np.unique(photo.cond)) == {0, 255}


def test_a_picture_of_low_resolution_keeps_the_means_of_areas(photos):
    image = photos["lowres"][0].image
    small = shrink(image)
    assert small.shape == (16, 16, 3)
    np.testing.assert_allclose(small[3, 5], image[12:16, 20:24].astype(float).mean((0, 1)), atol=0.51)


def test_the_target_is_nearest_and_covers_what_its_oracle_asks_for(photos):
    given = photos["depth"]
    objects, target = stored_objects(given), np.array([photo.meta["target"] for photo in given])
    inside = silhouettes(objects, target) > 0.99
    for photo, region in zip(given, inside, strict=True):
        assert (photo.cond[region] >= NEAR - 2).all()
        assert photo.cond.min() == FAR
    other = (target + 1) % objects.present.sum(1)
    of_target, of_other = (silhouettes(objects, each) > 0.5 for each in (target, other))
    assert (of_target & of_other).any((1, 2)).all()
    colours, rows = len(scenes.COLOURS), np.arange(COUNT)
    palette = np.array([*scenes.COLOURS.values(), *scenes.BACKGROUNDS.values()], np.uint8)

    def painted_over(region, colours):
        out = images_of(given)
        for i, part in enumerate(region):
            out[i][part] = palette[colours[i]]
        return find_oracle("depth", given)(given, out)

    back, front = objects.colour[rows, other], objects.colour[rows, target]
    behind = painted_over(of_target & of_other, back)  # the other object is in front
    assert behind["depth_order"].mean() == behind["front_colour"].mean() == 0
    assert painted_over(of_target | of_other, front)["depth_order"].mean() == 0  # one object, none is in front
    absent = painted_over(of_other & ~of_target, np.full(COUNT, colours))  # a tone of backgrounds: nothing is behind
    assert absent["depth_order"].mean() == 0
    wrong = (front + 1) % colours
    scores, distinct = painted_over(of_target, wrong), wrong != back
    assert (scores["depth_order"][distinct] == 100).all()  # in front, though not of the colour of the prompt
    assert scores["front_colour"].mean() == 0


def test_key_points_are_on_the_objects_and_a_moved_picture_misses_them(photos):
    given = photos["pose"]
    objects = stored_objects(given)
    for i, photo in enumerate(given):
        for n in np.flatnonzero(objects.present[i]):
            x, y = int(objects.x[i, n]), int(objects.y[i, n])
            assert (photo.cond[y, x] == 255).all()
    moved = find_oracle("pose", given)(given, np.roll(images_of(given), 6, axis=2))
    assert moved["keypoints"].mean() < 60
    assert moved["keypoint_distance"].mean() > 2


def test_an_edit_changes_the_colour_of_one_object_and_nothing_else(photos):
    given = photos["edit"]
    truth, source, region = images_of(given), np.stack([photo.cond for photo in given]), discs(given)
    np.testing.assert_array_equal(truth[~region], source[~region])
    assert (truth != source).any((1, 2, 3)).all()
    oracle = find_oracle("edit", given)
    unedited = oracle(given, source)
    assert unedited["edited"].mean() == 0
    assert (unedited["psnr_unedited"] == 100).all()  # identical pixels
    spoiled = np.where(region[..., None], truth, 255 - truth)
    broken = oracle(given, spoiled)
    assert (broken["psnr_unedited"] < 20).all()
    assert (broken["edited"] == oracle(given, truth)["edited"]).all()  # the object alone is what it reads
    assert broken["edited"].mean() > 90
    assert broken["edited_kept"].mean() == unedited["edited_kept"].mean() == 0
    for photo in given:
        assert photo.prompt != photo.global_prompt
        assert list(photo.meta["others"]).count([photo.meta["colour"], photo.meta["shape"]]) == 0


# Shards.


@pytest.mark.parametrize("name", ["canny", "edit"])
def test_shards_of_a_condition_are_its_scenes_and_their_oracle_reads_them(tmp_path, name):
    build_scenes(tmp_path, labeled=3, unlabeled=2, test=2, condition=name)
    labeled, unlabeled, test = (Shards(tmp_path / role) for role in (LABELED, UNLABELED, "test"))
    assert labeled.condition == unlabeled.condition == name
    members = {extension for record in unlabeled.records for extension in record["members"]}
    assert members == {"json", "cond.png"}  # no target picture at all
    expected = list(find_task(name).photos(labeled.manifest["seed"], 0, 3))
    for photo, scene in zip(labeled, expected, strict=True):
        np.testing.assert_array_equal(photo.cond, scene.cond)
        assert (photo.prompt, photo.meta) == (scene.prompt, scene.meta)
    stored = list(test)
    truth = images_of(list(find_task(name).photos(test.manifest["seed"], 0, 2)))
    assert (find_oracle(name, stored)(stored, truth)[find_task(name).headline] == 100).all()
    with pytest.raises(InvalidInputError, match="holds other photographs or scenes"):
        build_scenes(tmp_path, labeled=3, unlabeled=2, test=2, condition="depth")
    build_scenes(tmp_path, labeled=3, unlabeled=2, test=2, condition=name)  # finished, and left as it is
