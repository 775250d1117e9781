"""The mini world: known exactly, the same in any batch, and without a hint of the target outside its mask."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, kruskal

from refine_control.miniature import scenes
from refine_control.miniature.scene_shards import scene_photos
from refine_control.miniature.vocabulary import BACKGROUNDS, COLOURS, SHAPES, local_prompt
from refine_control.randomness import uniforms

COUNT = 300
KINDS = ("any", "same_shape", "same_colour")
OBJECT_DRAWS = 2 + 3 * 10


@pytest.fixture(scope="module")
def rendered():
    return scenes.render(5, 0, COUNT)


def draw(kind, count=20_000, seed=3):
    return scenes._draw_objects(uniforms(seed, np.arange(count), OBJECT_DRAWS), kind)


def of_target(objects, target, name):
    return getattr(objects, name)[np.arange(len(target)), target]


def test_a_scene_does_not_know_its_batch(rendered):
    part = scenes.render(5, 100, 7)
    for name in ("images", "masks"):
        assert torch.equal(getattr(rendered, name)[100:107], getattr(part, name))
    assert rendered.global_prompts[100:107] == part.global_prompts
    assert rendered.local_prompts[100:107] == part.local_prompts
    np.testing.assert_array_equal(rendered.colour[100:107], part.colour)
    assert not torch.equal(scenes.render(6, 100, 7).images, part.images)


def test_no_scenes_are_no_scenes():
    empty = scenes.render(5, 0, 0)
    assert empty.images.shape == (0, 64, 64, 3)
    assert empty.masks.shape == (0, 64, 64)
    assert empty.global_prompts == []
    for wrong in ({"count": -1}, {"count": 1, "kind": "other"}):
        with pytest.raises(ValueError, match="kind is one of"):
            scenes.render(5, 0, **wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_name_what_is_there(kind):
    found = scenes.render(7, 0, COUNT, kind)
    for i in range(COUNT):
        names = [
            local_prompt(int(c), int(s))
            for c, s, p in zip(found.objects.colour[i], found.objects.shape[i], found.objects.present[i], strict=True)
            if p
        ]
        assert found.local_prompts[i] == names[found.target[i]] == local_prompt(found.colour[i], found.shape[i])
        before, _, background = found.global_prompts[i].rpartition(" on a ")
        assert background.removesuffix(" background") in BACKGROUNDS
        assert before.replace(" and ", ", ").split(", ") == names


def test_the_target_is_painted_in_its_colour_and_the_ground_in_its_tone(rendered):
    objects, target = rendered.objects, rendered.target
    x, y = (of_target(objects, target, n).astype(int) for n in ("x", "y"))
    solid = np.isin(rendered.shape, [SHAPES.index(n) for n in ("circle", "square", "cross", "star", "triangle")])
    seen = rendered.images.numpy()[np.arange(COUNT), y, x].astype(float)
    palette = np.array(list(COLOURS.values()), float)
    nearest = np.linalg.norm(seen[:, None] / 0.96 - palette, axis=-1).argmin(1)
    assert solid.sum() > COUNT / 2
    assert (nearest == rendered.colour)[solid].mean() > 0.98
    ring = rendered.shape == SHAPES.index("ring")
    assert (nearest == rendered.colour)[ring].mean() < 0.5


@pytest.mark.parametrize("kind", ["same_shape", "same_colour"])
def test_alike_objects_are_alike(kind):
    objects, target = draw(kind)
    other = objects.present & (np.arange(3) != target[:, None])
    alike, different = ("shape", "colour") if kind == "same_shape" else ("colour", "shape")
    same = getattr(objects, alike) == of_target(objects, target, alike)[:, None]
    differs = getattr(objects, different) != of_target(objects, target, different)[:, None]
    assert (other & same & differs).any(1).all()
    assert bool(scenes.render(1, 0, 50, kind).alike.all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_has_no_twin_and_is_there(kind):
    objects, target = draw(kind)
    twins = objects.present & (np.arange(3) != target[:, None])
    for name in ("colour", "shape"):
        twins = twins & (getattr(objects, name) == of_target(objects, target, name)[:, None])
    assert not twins.any()
    assert of_target(objects, target, "present").all()
    assert set(target.tolist()) == {0, 1, 2}


def test_a_mask_covers_the_disc_of_the_target(rendered):
    centres = np.arange(64) + 0.5
    x, y, radius = (of_target(rendered.objects, rendered.target, n)[:, None, None] for n in ("x", "y", "radius"))
    disc = (centres - x) ** 2 + (centres[:, None] - y) ** 2 <= radius**2
    masks = rendered.masks.numpy()
    assert not (disc & ~masks).any()
    assert 0.05 < masks.mean() < 0.35
    assert masks.any((1, 2)).all()
    assert not masks.all((1, 2)).any()


def altered(monkeypatch, change):
    """The same scenes with other uniforms for colours and shapes: `change(u)` of (N, 3 objects, 10 draws)."""

    def other(seed, indices, count):
        draws = uniforms(seed, indices, count)
        change(draws[:, 2:OBJECT_DRAWS].reshape(len(draws), 3, 10), draws)
        return draws

    monkeypatch.setattr(scenes, "uniforms", other)
    return scenes.render(5, 0, COUNT)


def test_the_mask_knows_neither_colour_nor_shape(rendered, monkeypatch):
    def change(u, draws):
        view = draws[:, 2:OBJECT_DRAWS].reshape(len(draws), 3, 10)
        view[..., :2] = (view[..., :2] + 0.43) % 1
        draws[:, 2:OBJECT_DRAWS] = view.reshape(len(draws), -1)

    other = altered(monkeypatch, change)
    assert (other.shape != rendered.shape).mean() > 0.9
    assert (other.colour != rendered.colour).mean() > 0.9
    np.testing.assert_array_equal(other.target, rendered.target)
    assert torch.equal(other.masks, rendered.masks)


def test_outside_the_mask_nothing_tells_of_the_target(rendered, monkeypatch):
    def change(u, draws):
        rows = np.arange(len(draws))
        for k in range(2):
            column = 2 + 10 * rendered.target + k
            draws[rows, column] = (draws[rows, column] + 0.43) % 1

    other = altered(monkeypatch, change)
    away = np.arange(3) != rendered.target[:, None]
    same = (~away | (other.objects.colour == rendered.objects.colour)).all(1)  # but for twins, which were recoloured
    assert same.mean() > 0.8
    differs = (other.images != rendered.images).any(-1).numpy()[same]
    masks = rendered.masks.numpy()[same]
    assert not (differs & ~masks).any()
    assert (differs & masks).any((1, 2)).mean() > 0.99


def test_areas_of_masks_do_not_depend_on_the_shape():
    found = scenes.render(9, 0, 2000)
    areas = found.masks.sum((1, 2)).numpy()
    assert kruskal(*(areas[found.shape == s] for s in range(len(SHAPES)))).pvalue > 1e-3
    assert kruskal(*(areas[found.colour == c] for c in range(len(COLOURS)))).pvalue > 1e-3


def table(a, b, rows, columns):
    counts = np.zeros((rows, columns))
    np.add.at(counts, (a, b), 1)
    return counts


def test_the_other_objects_tell_nothing_of_the_target_but_that_it_is_no_twin():
    objects, target = draw("any")
    own = {name: of_target(objects, target, name) for name in ("colour", "shape")}
    for distance in (1, 2):
        other = (target + distance) % 3
        there = of_target(objects, other, "present")
        colour, shape = (of_target(objects, other, name) for name in ("colour", "shape"))
        shapes = table(own["shape"][there], shape[there], len(SHAPES), len(SHAPES))
        assert chi2_contingency(shapes).pvalue > 1e-3
        free = there & (shape != own["shape"])
        colours = table(own["colour"][free], colour[free], len(COLOURS), len(COLOURS))
        assert chi2_contingency(colours).pvalue > 1e-3
        crossed = table(own["shape"][free], colour[free], len(SHAPES), len(COLOURS))
        assert chi2_contingency(crossed).pvalue > 1e-3
    corner = (of_target(objects, target, "x") > 32) * 2 + (of_target(objects, target, "y") > 32)
    assert chi2_contingency(table(own["colour"], corner, len(COLOURS), 4)).pvalue > 1e-3


def test_every_colour_and_shape_is_equally_frequent():
    objects, target = draw("any")
    for name, kinds in (("colour", len(COLOURS)), ("shape", len(SHAPES))):
        counts = np.bincount(of_target(objects, target, name), minlength=kinds)
        assert np.abs(counts - 20_000 / kinds).max() < 5 * np.sqrt(20_000 / kinds)


def test_a_picture_of_the_mixture_does_not_know_its_batch():
    whole = scenes.photo_mixture(3, 10, 6)
    assert whole.shape == (6, 3, 64, 64)
    assert whole.abs().max() <= 1
    for first, count in ((10, 1), (11, 1), (12, 2), (13, 3)):
        assert torch.equal(whole[first - 10 : first - 10 + count], scenes.photo_mixture(3, first, count))
    scene = scenes.render(3, 12, 1).images.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(whole[2:3], scene)


def test_scenes_travel_as_photos(rendered):
    photos = list(scene_photos(5, 3, 2))
    assert [p.key for p in photos] == ["scene-00000003", "scene-00000004"]
    np.testing.assert_array_equal(photos[1].image, rendered.images[4].numpy())
    np.testing.assert_array_equal(photos[1].mask, rendered.masks[4].numpy())
    assert (photos[1].prompt, photos[1].global_prompt) == (rendered.local_prompts[4], rendered.global_prompts[4])
    objects = rendered.objects
    others = [
        [objects.colour[4, n], objects.shape[4, n]]
        for n in np.flatnonzero(objects.present[4])
        if n != rendered.target[4]
    ]
    assert photos[1].meta == {
        "colour": rendered.colour[4],
        "shape": rendered.shape[4],
        "others": others,
        "alike": bool(rendered.alike[4]),
    }
