"""Shards with fewer samples, other words or blurred pictures are those of their source in everything else."""

import json

import numpy as np
import pytest

from refine_control.errors import InvalidInputError
from refine_control.miniature.scene_shards import build_scenes
from refine_control.photos.shards import Shards, ShardWriter, fill_hole
from refine_control.records import LABELED, UNLABELED, Photo
from refine_control.storage import MANIFEST, only_writer
from refine_control.study.variants import Variant, build_variant


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    build_scenes(out, labeled=12, unlabeled=12, test=2)
    return out


def made(source, out, role=UNLABELED, **changed):
    assert build_variant(source / role, out, Variant(**changed))
    return list(Shards(source / role)), list(Shards(out))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, ""),
        ({"share": 0.1}, "10%"),
        ({"share": 0.025, "prompts": "global"}, "2.5%_global"),
        ({"blurred": True}, "blurred"),
    ],
)
def test_a_variant_is_named_by_what_it_changes(changed, name):
    assert Variant(**changed).name == name


@pytest.mark.parametrize(("share", "count"), [(0.5, 6), (0.26, 4), (3 * 0.1 / 1.2, 3), (0.001, 1), (1.0, 12)])
def test_a_share_is_the_first_samples(source, tmp_path, share, count):
    before, after = made(source, tmp_path / "out", LABELED, share=share)
    assert len(after) == count
    for old, new in zip(before, after, strict=False):
        assert (new.key, new.prompt, new.meta) == (old.key, old.prompt, old.meta)
        assert np.array_equal(new.image, old.image)
        assert np.array_equal(new.mask, old.mask)


def test_other_words_leave_the_pictures_alone(source, tmp_path):
    for kind in ("template", "shuffled", "global"):
        before, after = made(source, tmp_path / kind, prompts=kind)
        assert all(np.array_equal(a.image, b.image) for a, b in zip(before, after, strict=True))
        if kind == "template":
            assert all(a.prompt.split()[-1] == b.prompt.split()[-1] for a, b in zip(before, after, strict=True))
            assert {len(b.prompt.split()) for b in after} == {2}
        elif kind == "global":
            assert [b.prompt for b in after] == [a.global_prompt for a in before]
        else:
            assert sorted(a.prompt for a in before) == sorted(b.prompt for b in after)
            assert [a.prompt for a in before] != [b.prompt for b in after]


def test_blurred_pictures_lose_detail_and_no_light(source, tmp_path):
    before, after = made(source, tmp_path / "out", LABELED, blurred=True)
    for old, new in zip(before, after, strict=True):
        assert abs(old.image.mean() - new.image.mean()) < 2
        assert (
            np.abs(np.diff(new.image.astype(float), axis=1)).mean()
            < np.abs(np.diff(old.image.astype(float), axis=1)).mean()
        )


def test_nothing_is_put_into_the_holes_of_the_unlabelled(source, tmp_path):
    for photo in made(source, tmp_path / "out", blurred=True)[1]:
        assert np.array_equal(photo.image, fill_hole(photo.image, photo.mask))


def test_a_finished_variant_stays_and_another_is_refused(source, tmp_path):
    made(source, tmp_path / "out", share=0.5)
    before = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert not build_variant(source / UNLABELED, tmp_path / "out", Variant(0.5))
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == before
    with pytest.raises(InvalidInputError, match="holds other samples"):
        build_variant(source / UNLABELED, tmp_path / "out", Variant(0.25))


def test_global_prompts_that_nobody_said_are_asked_for(tmp_path):
    image, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), bool)
    mask[8:16, 8:16] = True
    with only_writer(tmp_path / "in"):
        writer = ShardWriter(tmp_path / "in", LABELED)
        writer.add(Photo("plain", image, mask, "a dog"))
        writer.finish()
    with pytest.raises(InvalidInputError, match="have no global prompt"):
        build_variant(tmp_path / "in", tmp_path / "out", Variant(prompts="global"))
