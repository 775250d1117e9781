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


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def jpeg(picture, **options):
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=95, **options)
    return data.getvalue()


def test_a_photograph_that_is_stored_lying_is_read_as_it_is_shown(tmp_path):
    pixels = np.full((96, 64, 3), 30, np.uint8)
    box = [20, 50, 45, 80]
    pixels[50:81, 20:46] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = jpeg(Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90), exif=exif)
    facts = json.dumps({"category": "square", "box": box}).encode()
    members = [(f"k{n}.{end}", data) for n in range(40) for end, data in (("jpg", lying), ("json", facts))]
    write_members(tmp_path / "0.tar", members)
    found = read_small_photos(tmp_path, "teacher")
    red = (found.images[..., 0] > 150) & (found.images[..., 1] < 90)
    assert (red & found.masks).sum() > 0.9 * red.sum() > 0


def test_what_cannot_be_read_is_left_out_and_named(tmp_path, caplog):
    good, facts = jpeg(Image.new("RGB", (64, 64), (9, 99, 9))), {"category": "goldfish", "box": ["10", 20.0, 40, 50]}
    names = [f"22.{n:02d}" for n in range(200)]
    mine = [name for name in names if part_of(name) == "teacher"]
    broken = {
        mine[0]: (good[: len(good) // 2], json.dumps(facts).encode()),
        mine[1]: (b"no picture", json.dumps(facts).encode()),
        mine[2]: (good, b"{"),
        mine[3]: (good, json.dumps({**facts, "box": [1, 2, "x", 4]}).encode()),
        mine[4]: (good, json.dumps({"box": [10, 20, 40, 50]}).encode()),
    }
    samples = {name: broken.get(name, (good, json.dumps(facts).encode())) for name in names}
    members = [
        (f"{name}.{end}", data) for name in names for end, data in zip(("jpg", "json"), samples[name], strict=True)
    ]
    write_members(tmp_path / "0.tar", [*members, ("orphan.json", b"{}")])
    write_members(tmp_path / "1.tar", [member for member in members if member[0].startswith(f"{mine[9]}.")])
    found = read_small_photos(tmp_path, "teacher")
    assert len(found.keys) == len(set(found.keys)) == len(mine) - len(broken) + 1
    assert all(key.replace("-", "").isalnum() for key in found.keys)
    assert found.masks[0][20:50, 10:40].all()
    (line,) = (record.getMessage() for record in caplog.records)
    assert "6 files" in line
    assert all(f"{name}.jpg" in line for name in mine[:4])
    caplog.clear()
    read_small_photos(tmp_path, "teacher")
    assert not caplog.records
    out = tmp_path / "out"
    assert build_small_photos(tmp_path, out, labeled=4, unlabeled=2, test=1)[LABELED] == 4
    assert len(Shards(out / LABELED)) == 4
