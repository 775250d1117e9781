"""Small photographs: whose part each is, what the box becomes, and what is refused."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from refine_control.errors import DamagedError, InvalidInputError
from refine_control.miniature.small_photos import (
    PARTS,
    build_small_photos,
    category_words,
    part_of,
    read_small_photos,
)
from refine_control.photos.shards import Shards
from refine_control.records import LABELED, TEST, UNLABELED

NAMES = ("goldfish", "egyptian cat")


def write_shard(path, samples):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for key, told, picture in samples:
            data = io.BytesIO()
            picture.save(data, "JPEG", quality=95)
            for suffix, content in (("jpg", data.getvalue()), ("json", json.dumps(told).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def sample(number, box=(10, 20, 40, 50), size=(64, 64)):
    return (
        f"k{number}",
        {"category": NAMES[number % 2], "box": list(box)},
        Image.new("RGB", size, (number % 250, 99, 9)),
    )


@pytest.fixture
def folder(tmp_path):
    write_shard(tmp_path / "1.tar", [sample(n) for n in range(30)])
    write_shard(tmp_path / "0.tar.gz", [sample(n) for n in range(30, 60)])
    return tmp_path


def test_the_parts_are_disjoint_and_of_their_shares(folder):
    read = {part: set(read_small_photos(folder, part).keys) for part in PARTS}
    assert set.union(*read.values()) == {f"k{n}" for n in range(60)}
    assert sum(map(len, read.values())) == 60
    many = [part_of(f"key {n}") for n in range(4000)]
    for part, share in PARTS.items():
        assert abs(many.count(part) / 4000 - share) < 0.03
    assert sum(PARTS.values()) == pytest.approx(1)


def test_the_box_is_the_mask_and_the_category_the_prompt(folder):
    found = read_small_photos(folder, "teacher")
    expected = np.zeros((64, 64), bool)
    expected[20:50, 10:40] = True
    for key, image, mask, prompt in zip(*found, strict=True):
        number = int(key[1:])
        np.testing.assert_array_equal(mask, expected)
        assert abs(image.astype(int) - [number % 250, 99, 9]).max() < 8
        assert prompt == ("a goldfish", "an egyptian cat")[number % 2]
    assert category_words(folder) == ("a", "an", "cat", "egyptian", "goldfish")
    assert len(read_small_photos(folder, "teacher", limit=3).keys) == 3


def test_other_sizes_are_made_square_with_their_box(tmp_path):
    write_shard(tmp_path / "0.tar", [sample(n, box=(80, 20, 140, 80), size=(200, 100)) for n in range(40)])
    found = read_small_photos(tmp_path, "teacher", side=50)
    expected = np.zeros((50, 50), bool)  # halved, then 25 columns cut from either side
    expected[10:40, 15:45] = True
    np.testing.assert_array_equal(found.masks[0], expected)


@pytest.mark.parametrize("box", [(0, 0, 64, 64), (0, 0, 8, 8), (30, 30, 20, 20), (70, 70, 90, 90)])
def test_a_box_with_nothing_to_paint_or_to_keep_is_left_out(tmp_path, box):
    write_shard(tmp_path / "0.tar", [sample(n, box=box) for n in range(40)])
    with pytest.raises(InvalidInputError, match="no photograph of the part teacher"):
        read_small_photos(tmp_path, "teacher")


def test_roles_are_shards_like_any_other(folder, tmp_path):
    out = tmp_path / "out"
    counts = {"labeled": 4, "unlabeled": 3, "test": 2}
    build_small_photos(folder, out, **counts)
    keys = {role: [Shards(out / role)[i].key for i in range(n)] for role, n in counts.items()}
    assert [len(set(k)) for k in keys.values()] == [4, 3, 2]
    assert {part_of(k) for k in keys[LABELED] + keys[UNLABELED]} == {"student"}
    assert {part_of(k) for k in keys[TEST]} == {TEST}
    hidden = Shards(out / UNLABELED)[0]
    assert len(np.unique(hidden.image[hidden.mask])) == 1  # no pixel of the photograph
    assert len(np.unique(Shards(out / LABELED)[0].image[hidden.mask])) > 1
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")}
    build_small_photos(folder, out, **counts)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")} == before
    with pytest.raises(InvalidInputError, match="holds other photographs"):
        build_small_photos(folder, out, **{**counts, "labeled": 5})
    with pytest.raises(InvalidInputError, match="the budget asks for"):
        build_small_photos(folder, tmp_path / "more", labeled=400, unlabeled=1, test=1)


def test_what_is_no_folder_of_shards_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match=r"no \.tar"):
        read_small_photos(tmp_path, "teacher")
    write_shard(tmp_path / "0.tar.gz", [sample(n) for n in range(40)])
    whole = (tmp_path / "0.tar.gz").read_bytes()
    (tmp_path / "0.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedError, match="cannot be read to its end"):
        read_small_photos(tmp_path, "teacher")
