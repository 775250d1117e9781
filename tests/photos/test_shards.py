"""Laws of the shards: any tar reader sees the same samples, no hole pixel is in `unlabeled`, every bit is watched."""

import io
import json
import os
import pickle
import shutil
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refine_control.errors import DamagedError, InvalidInputError
from refine_control.photos.inspect import contact_sheet, inspect, outline
from refine_control.photos.shards import HOLE_FILL, Shards, ShardWriter, read_shards, verify
from refine_control.picture_grid import OUTLINE
from refine_control.records import Photo

S = 16


def sample(number: int, inside: int = 0) -> Photo:
    """Noise with a hole; `inside` changes the pixels of the hole alone."""
    image = np.random.default_rng(number).integers(0, 256, (S, S, 3), np.uint8)
    mask = np.zeros((S, S), bool)
    mask[3:9, 2 : 5 + number % 6] = True
    image[mask] ^= np.uint8(inside)
    meta = {"source": "noise", "license": ["CC0", "CC BY"][number % 2], "photo": f"p{number // 2}", "number": number}
    return Photo(f"k{number}", image, mask, f"prompt {number} über", f"all of {number}", meta)


def write(folder: Path, count: int = 7, role="labeled", image_format="webp", per_shard=3, inside=0) -> dict:
    writer = ShardWriter(folder, role, per_shard, image_format)
    for number in range(count):
        writer.add(sample(number, inside))
    return writer.finish(seed=3)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edges(number: int, role: str = "labeled") -> Photo:
    """A sample of a condition without a region, as it is in memory."""
    photo = sample(number)
    image = np.full_like(photo.image, HOLE_FILL) if role == "unlabeled" else photo.image
    return replace(photo, image=image, mask=np.ones((S, S), bool), cond=photo.image[::-1, ::-1].copy())


def write_edges(folder: Path, count: int = 7, role="labeled", image_format="webp") -> dict:
    writer = ShardWriter(folder, role, 3, image_format, condition="canny")
    for number in range(count):
        writer.add(edges(number))
    return writer.finish()


def assert_same(photo: Photo, other: Photo) -> None:
    assert np.array_equal(photo.image, other.image)
    assert np.array_equal(photo.mask, other.mask)
    assert (photo.cond is None) == (other.cond is None)
    assert photo.cond is None or np.array_equal(photo.cond, other.cond)
    texts = (photo.key, photo.prompt, photo.global_prompt, photo.meta)
    assert texts == (other.key, other.prompt, other.global_prompt, other.meta)


@pytest.mark.parametrize("image_format", ["webp", "png"])
def test_there_and_back_is_the_same(tmp_path, image_format):
    manifest = write(tmp_path, image_format=image_format)
    back = list(read_shards(tmp_path))
    assert len(back) == manifest["samples"] == 7
    for number, photo in enumerate(back):
        assert_same(photo, sample(number))
    assert manifest["photos"] == 4
    assert manifest["image_size"] == [S, S]
    assert manifest["licenses"] == {"CC0": 4, "CC BY": 3}
    assert manifest["sources"] == {"noise": 7}
    assert manifest["seed"] == 3
    assert verify(tmp_path) == []


def test_jpeg_is_near(tmp_path):
    write(tmp_path, image_format="jpg")
    smooth = Photo("s", np.full((S, S, 3), 90, np.uint8), sample(0).mask, "p")
    writer = ShardWriter(tmp_path / "s", "test", image_format="jpg")
    writer.add(smooth)
    writer.finish()
    assert np.abs(Shards(tmp_path / "s")[0].image.astype(int) - 90).max() <= 1
    assert np.array_equal(Shards(tmp_path)[3].mask, sample(3).mask)


def test_random_access_equals_what_a_tar_reader_streams(tmp_path):
    write(tmp_path)
    streamed = []
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
            assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") for m in tar.getmembers())
        keys = list(dict.fromkeys(name.partition(".")[0] for name in members))
        assert len(members) == 3 * len(keys)
        for key in keys:
            words = json.loads(members[f"{key}.json"])
            image = np.asarray(Image.open(io.BytesIO(members[f"{key}.webp"])))
            mask = np.asarray(Image.open(io.BytesIO(members[f"{key}.mask.png"]))) == 255
            streamed.append(Photo(key, image, mask, words["prompt"], words["global_prompt"], words["meta"]))
    shards = pickle.loads(pickle.dumps(Shards(tmp_path)))  # noqa: S301 - as a worker of a data loader gets it
    assert [photo.key for photo in streamed] == [record["key"] for record in shards.records]
    for index in (6, 0, 3, -1, 2):
        assert_same(shards[index], streamed[index])
    for index in (7, -8):
        with pytest.raises(IndexError):
            shards[index]


@pytest.mark.parametrize("image_format", ["webp", "png"])
@pytest.mark.parametrize("role", ["labeled", "unlabeled", "test"])
def test_a_condition_picture_takes_the_place_of_the_mask(tmp_path, role, image_format):
    manifest = write_edges(tmp_path, role=role, image_format=image_format)
    shards = Shards(tmp_path)
    assert manifest["condition"] == shards.condition == "canny"
    assert manifest["hole_fill"] is None
    for number, photo in enumerate(shards):
        assert_same(photo, edges(number, role))
    picture = set() if role == "unlabeled" else {image_format}
    assert {frozenset(record["members"]) for record in shards.records} == {frozenset({"json", "cond.png"} | picture)}
    path = tmp_path / shards.records[4]["shard"]
    content = bytearray(path.read_bytes())
    content[shards.records[4]["members"]["cond.png"][0] + 60] ^= 1
    path.write_bytes(content)
    assert "k4" in verify(tmp_path)[0]
    with pytest.raises(DamagedError, match=r"k4\.cond\.png"):
        shards[4]


def test_inpainting_is_not_named_in_a_manifest(tmp_path):
    assert "condition" not in write(tmp_path)
    assert Shards(tmp_path).condition == "inpaint"


@pytest.mark.parametrize("image_format", ["webp", "png", "jpg"])
def test_unlabeled_shards_hold_no_pixel_of_the_hole(tmp_path, image_format):
    for inside, name in ((0, "a"), (255, "b")):
        write(tmp_path / name, role="unlabeled", image_format=image_format, inside=inside)
        write(tmp_path / f"{name} labeled", image_format=image_format, inside=inside)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")  # whatever was in the hole, the bytes are these
    assert tree(tmp_path / "a labeled") != tree(tmp_path / "b labeled")
    for number, photo in enumerate(read_shards(tmp_path / "a")):
        assert (photo.image[photo.mask] == HOLE_FILL).all()
        near = np.abs(photo.image[~photo.mask].astype(int) - sample(number).image[~photo.mask])
        assert near.max() == 0 or (image_format == "jpg" and near.mean() < 25)
        raw = Shards(tmp_path / "a")
        stored = np.asarray(Image.open(io.BytesIO(raw._read(raw.records[number])[image_format])))
        assert np.abs(stored[photo.mask].astype(int) - HOLE_FILL).mean() < (12 if image_format == "jpg" else 1e-9)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    os.umask(os.umask(0o077))
    write(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert sorted(tree(tmp_path / "a")) == ["index.jsonl", "manifest.json", *(f"shard-0000{n}.tar" for n in range(3))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write(folder)
    return folder


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_verify_finds_every_flipped_bit_and_every_cut(written, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("copy") / "c"
    shutil.copytree(written, folder)
    path = folder / data.draw(st.sampled_from(sorted(p.name for p in written.iterdir())))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:place]
    path.write_bytes(content)
    assert any(path.name in problem for problem in verify(folder))
    # and no reader hands out anything else than what was written
    try:
        photos = list(read_shards(folder))
    except DamagedError:
        return
    assert len(photos) == 7  # the bit lay between the members
    for number, photo in enumerate(photos):
        assert_same(photo, sample(number))


def test_the_last_byte_of_the_manifest_counts(tmp_path):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes()[:-1])  # still the same JSON
    assert len(verify(tmp_path)) == 1


def test_verify_names_the_damaged_sample_and_what_is_missing(tmp_path):
    write(tmp_path)
    assert verify(tmp_path / "nowhere")
    record = Shards(tmp_path).records[4]
    path = tmp_path / record["shard"]
    content = bytearray(path.read_bytes())
    content[record["members"]["webp"][0] + 30] ^= 1
    path.write_bytes(content)
    (problem,) = verify(tmp_path)
    assert "k4" in problem
    assert "k3" not in problem
    shards = Shards(tmp_path)
    assert_same(shards[3], sample(3))
    with pytest.raises(DamagedError, match="k4"):
        shards[4]
    shutil.copy(path, tmp_path / "shard-00009.tar")
    path.unlink()
    assert len(verify(tmp_path)) == 2
    with pytest.raises(DamagedError, match="missing"):
        Shards(tmp_path)


def test_what_the_writer_refuses(tmp_path):
    with pytest.raises(InvalidInputError, match="role"):
        ShardWriter(tmp_path, "train")
    with pytest.raises(InvalidInputError, match="format"):
        ShardWriter(tmp_path, "test", image_format="bmp")
    with pytest.raises(InvalidInputError, match="samples_per_shard"):
        ShardWriter(tmp_path, "test", 0)
    with pytest.raises(InvalidInputError, match="no condition 'edges'"):
        ShardWriter(tmp_path, "test", condition="edges")
    writer = ShardWriter(tmp_path, "test", condition="canny")
    given = edges(0)
    for cond in (None, given.cond.astype(float), given.cond[..., 0], given.cond[:-1]):
        with pytest.raises(InvalidInputError, match="k0: the condition canny wants"):
            writer.add(replace(given, cond=cond))
    writer = ShardWriter(tmp_path, "test")
    with pytest.raises(InvalidInputError, match="inpaint takes no condition picture"):
        writer.add(given)
    good = sample(0)
    writer.add(good)
    wide = np.zeros((S, 2 * S, 3), np.uint8)
    for bad in (
        good,
        Photo("a/b", good.image, good.mask, "p"),
        Photo("a.b", good.image, good.mask, "p"),
        Photo("c", good.image.astype(float), good.mask, "p"),
        Photo("c", good.image, good.mask.astype(np.uint8), "p"),
        Photo("c", wide, good.mask, "p"),
        Photo("c", wide, np.ones((S, 2 * S), bool), "p"),
    ):
        with pytest.raises(InvalidInputError):
            writer.add(bad)
    with pytest.raises(InvalidInputError, match="no finished shards"):
        Shards(tmp_path)  # nothing is readable before `finish`
    assert writer.finish()["samples"] == 1
    assert_same(Shards(tmp_path)[0], good)


def test_an_index_that_changes_after_it_was_opened_is_not_believed(tmp_path):
    write(tmp_path, count=40)
    shards = Shards(tmp_path)
    assert [record["key"] for record in shards.records] == [shards.records[n]["key"] for n in range(40)]
    index = tmp_path / "index.jsonl"
    index.write_bytes(index.read_bytes().replace(b'"k20"', b'"k21"'))
    assert shards.records[3]["key"] == "k3"
    for reading in (lambda: shards.records[20], lambda: list(shards.records), lambda: shards[20]):
        with pytest.raises(DamagedError, match=r"index\.jsonl"):
            reading()


def test_a_writer_that_was_killed_leaves_nothing_to_the_next(tmp_path):
    write(tmp_path / "whole")
    killed = ShardWriter(tmp_path / "new", "labeled", 3)
    for number in range(5):
        killed.add(sample(number))
    names = {path.name.partition(".tmp")[0].rpartition(".")[0] for path in (tmp_path / "new").glob(".*")}
    assert names == {".index.jsonl", ".shard-00001.tar"}
    write(tmp_path / "new")
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")


def test_adopted_shards_give_the_same_index_and_manifest(tmp_path):
    write(tmp_path / "whole")
    first = ShardWriter(tmp_path / "new", "labeled", 3)
    for number in range(3):
        first.add(sample(number))
    records = first.cut()
    second = ShardWriter(tmp_path / "new", "labeled", 3)
    second.adopt(json.loads(json.dumps(records)))
    with pytest.raises(InvalidInputError, match="taken"):
        second.add(sample(1))
    for number in range(3, 7):
        second.add(sample(number))
    second.finish(seed=3)
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")


def test_memory_does_not_grow_with_the_samples(tmp_path):
    """Of each sample 100 bytes at most, where its record has 700."""
    held = []
    for count in (200, 1200):
        tracemalloc.start()
        writer, members = ShardWriter(tmp_path / str(count), "test", 100), {"json": b"{}", "webp": b"x"}
        for number in range(count):
            writer.add(
                replace(sample(0), key=f"a-rather-long-key-{number}", meta={"photo": f"photo {number}"}), members
            )
        writer.finish()
        shards = Shards(tmp_path / str(count))
        assert len(shards) == count
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert held[1] - held[0] < 100 * 1000


def test_inspect_counts_and_measures(tmp_path):
    write(tmp_path / "shards")
    found = inspect(tmp_path / "shards")
    shares = [sample(number).mask.mean() for number in range(7)]
    assert found["mask_fraction"]["min"] == pytest.approx(min(shares), abs=1e-4)
    assert found["mask_fraction"]["p50"] == pytest.approx(np.median(shares), abs=1e-4)
    assert found["prompt_words"]["max"] == 3
    assert (found["samples"], found["photos"], found["with_global_prompt"]) == (7, 4, 7)
    json.dumps(found, allow_nan=False)
    contact_sheet(tmp_path / "shards", tmp_path / "deep" / "sheet.png", count=4)
    sheet = np.asarray(Image.open(tmp_path / "deep" / "sheet.png"))
    assert (sheet == OUTLINE).all(-1).any()
    with pytest.raises(InvalidInputError):
        contact_sheet(tmp_path / "shards", tmp_path / "sheet.png", count=0)


def test_the_outline_lies_on_the_mask_and_not_inside(tmp_path):
    mask = np.zeros((9, 9), bool)
    mask[2:7, 0:6] = True
    edge = outline(mask)
    assert not (edge & ~mask).any()
    assert not edge[3:6, 0:5].any()
    assert edge.sum() == 6 + 6 + 3
