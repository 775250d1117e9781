"""Laws of sources: a photo is the same photo whichever way it comes, and what cannot be used is told, not lost."""

import gzip
import io
import json
import random
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refine_control.errors import InvalidInputError, MissingError, WorkerDiedError
from refine_control.photos.decisions import EDIT, REJECT, UNDO, append_decision, decide
from refine_control.photos.download import command_for, download, read_layout
from refine_control.photos.files import read_bytes
from refine_control.photos.load import load, load_mask, load_whole
from refine_control.photos.regions import encode_rle
from refine_control.photos.sources import entries, photos_of
from refine_control.records import Entry, Rejected, with_article
from refine_control.records import RejectReason as R

W, H, S = 40, 32, 16
BOX = [12.0, 8.0, 28.0, 8.0, 28.0, 20.0, 12.0, 20.0]


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8))


def saved(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def region() -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[8:20, 12:28] = True
    return mask


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def manifest(folder: Path, *rows: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def refused(entry: Entry, size: int = S) -> R:
    with pytest.raises(Rejected) as caught:
        load(entry, size)
    assert caught.value.detail
    return caught.value.reason


def coco(folder: Path, **changed) -> Path:
    """Three photos: two dogs of which one as run lengths, a crowd; an apple; nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(saved(picture(number)))
    runs = encode_rle(region())
    counts = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], region().T.ravel(), [2]])))).tolist()
    annotations = [
        {"id": 10, "image_id": 0, "category_id": 1, "segmentation": [BOX], "iscrowd": 0},
        {"id": 13, "image_id": 1, "category_id": 2, "segmentation": {**runs, "counts": counts}, "iscrowd": 0},
        {"id": 11, "image_id": 0, "category_id": 1, "segmentation": runs, "iscrowd": 0},
        {"id": 12, "image_id": 0, "category_id": 1, "segmentation": runs, "iscrowd": 1},
    ]
    listed = {
        "info": {"description": "Small COCO"},
        "images": [{"id": n, "file_name": f"{n}.png", "width": W, "height": H, "license": 4} for n in range(3)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "apple"}],
        "licenses": [{"id": 4, "name": "Attribution", "url": "http://by"}],
        **changed,
    }
    (folder / "instances.json").write_text(json.dumps(listed))
    return folder / "instances.json"


def test_one_photo_is_the_same_sample_whichever_way_it_comes(tmp_path):
    photo, mask = saved(picture()), saved(Image.fromarray(region()))
    plain = tmp_path / "plain"
    plain.mkdir()
    for name, data in (("a.png", photo), ("a.mask.png", mask), ("a.txt", b"a dog")):
        (plain / name).write_bytes(data)
    facts = {"category": "dog", "box": [12, 8, 27, 19]}
    tar_of(tmp_path / "tars" / "00000.tar", {"a.png": photo, "a.json": json.dumps(facts).encode()})
    masked = tar_of(
        tmp_path / "masked" / "x.tar", {"a.png": photo, "a.mask.png": mask, "a.json": b'{"category":"dog"}'}
    )
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "00000.tar.gz").write_bytes(gzip.compress((tmp_path / "tars" / "00000.tar").read_bytes()))
    words = {"image": "plain/a.png", "local_prompt": "a dog"}
    through = {"image": "tars/00000.tar/a.png", "local_prompt": "a dog"}
    one_photo = {"images": [{"id": 0, "file_name": "0.png"}]}
    sources = [
        plain,
        tmp_path / "tars",
        masked,
        packed,
        manifest(tmp_path / "m1", {"root": str(tmp_path)}, {**words, "mask": "plain/a.mask.png"}),
        manifest(tmp_path / "m2", {"root": ".."}, {**words, "segmentation": encode_rle(region())}) / "manifest.jsonl",
        manifest(tmp_path / "m3", {"root": str(tmp_path)}, {**through, "segmentation": [BOX]}),
        manifest(tmp_path / "m4", {"root": str(tmp_path)}, {**through, "mask": "masked/x.tar/a.mask.png"}),
        coco(tmp_path / "coco", **one_photo),
    ]
    expected = load(next(entries(plain)), S)
    for source in sources:
        first = next(entry for entry in entries(source) if entry.problem is None)
        sample = load(first, S)
        assert np.array_equal(sample.image, expected.image), source
        assert np.array_equal(sample.mask, expected.mask), source
        assert sample.prompt == "a dog"
        assert np.array_equal(load_whole(first), np.asarray(picture()))
        assert np.array_equal(load_mask(first), region())


def test_coco_has_an_entry_for_each_annotation_and_each_photo_without(tmp_path):
    found = list(entries(coco(tmp_path)))
    assert [(entry.image, entry.meta.get("id"), entry.prompt) for entry in found] == [
        ("0.png", 10, "a dog"),
        ("0.png", 11, "a dog"),
        ("1.png", 13, "an apple"),
        ("2.png", None, None),
    ]
    assert [len(group) for group in photos_of(found)] == [2, 1, 1]
    for entry in found[:3]:
        sample = load(entry, S)
        assert np.array_equal(load_mask(entry), region())
        assert sample.meta["license"] == "Attribution"
        assert sample.meta["local_prompt_source"] == "category"
    assert found[0].photo == found[1].photo == "Small COCO/0" != found[2].photo
    assert refused(found[3]) is R.NO_MASK
    assert load_whole(found[3]).shape == (H, W, 3)
    assert len({entry.key for entry in found}) == 4


def test_coco_looks_for_its_photos_and_says_where(tmp_path):
    path = coco(tmp_path / "a")
    beside = tmp_path / "b"
    (beside / "images").mkdir(parents=True)
    (beside / "instances.json").write_bytes(path.read_bytes())
    with pytest.raises(InvalidInputError, match=r"0\.png.*images.*name their folder"):
        entries(beside / "instances.json")
    for folder in (tmp_path / "a", tmp_path / "a"):
        assert load(next(entries(beside / "instances.json", images=folder)), S).prompt == "a dog"
    for number in range(3):
        (tmp_path / "a" / f"{number}.png").rename(beside / "images" / f"{number}.png")
    assert load(next(entries(beside / "instances.json")), S).prompt == "a dog"
    for wrong in (b"{", b"[1]", b'{"annotations": []}'):
        (tmp_path / "wrong.json").write_bytes(wrong)
        with pytest.raises(InvalidInputError, match="COCO"):
            entries(tmp_path / "wrong.json")
    with pytest.raises(InvalidInputError, match="COCO"):
        entries(tmp_path / "a" / "images", images=tmp_path)


def test_coco_rows_of_the_wrong_kind_are_told(tmp_path):
    good = {"id": 1, "image_id": 0, "category_id": 1, "segmentation": [BOX]}
    rows = [good, 7, {"id": 2, "image_id": 99}, {**good, "id": 3, "segmentation": {"size": [1], "counts": 3}}]
    rows += [{**good, "id": 4, "segmentation": []}, {**good, "id": 5, "category_id": [1]}, {**good, "id": [6]}, good]
    photos = [{"id": 0, "file_name": "0.png", "license": {}}, 5, {"id": 8}]
    found = list(entries(coco(tmp_path, annotations=rows, images=photos, licenses=None)))
    problems = [entry.problem[0] if entry.problem else None for entry in found]
    bad = R.BAD_ROW
    assert problems == [bad, bad, None, None, None, bad, bad, R.DUPLICATE, bad, bad]
    assert [refused(entry) for entry in found[3:5]] == [R.MASK_UNREADABLE, R.NO_MASK]
    details = [entry.problem[1] for entry in found if entry.problem]
    for detail, words in zip(details, ("not an object", "image_id.*99", "category_id.*[1]", "`id`.*[6]"), strict=False):
        assert re.search(words, detail)
    assert load(found[2], S).meta["id"] == 1


@pytest.mark.parametrize("alike", [False, True], ids=["", "one number for all ids"])
def test_coco_lists_may_have_any_order(tmp_path, monkeypatch, alike):
    """Against a plain search through the rows."""
    if alike:
        monkeypatch.setattr("refine_control.photos.coco._number", lambda name: int(isinstance(name, int | str)))
    for seed in range(30):
        draw = random.Random(seed)
        ids = draw.sample([7, "8", "ü", 10**30, "007", 0], draw.randint(0, 6))
        photos = [{"id": name, "file_name": f"{n}.png"} for n, name in enumerate(ids)] + [{"file_name": "no id.png"}]
        draw.shuffle(photos)
        owners = draw.choices(
            [*ids, *ids] if alike and ids else ["7", 7.0, 8, "ü", 10**30, "0.0", None, [7], 7.5], k=12
        )
        rows = [{"id": n, "image_id": owner, "iscrowd": n % 5 == 0} for n, owner in enumerate(owners)]
        members = [("images", photos), ("annotations", rows if ids else []), ("other", [[{}]]), ("x", {})]
        draw.shuffle(members)
        path = tmp_path / f"{seed}.json"
        path.write_text(json.dumps(dict(members), ensure_ascii=False))
        (tmp_path / photos[0]["file_name"]).touch()
        same = {"7": 7, 8: "8", "0.0": 0}
        named = {n: None if row["image_id"] in (None, [7]) else row["image_id"] for n, row in enumerate(rows)}
        named = {n: same.get(name, name) for n, name in named.items()} if ids else {}
        of = {n: next((p for p in photos if "id" in p and p["id"] == name), None) for n, name in named.items()}
        expected = [f"annotation-{n}" for n, photo in of.items() if photo is None]
        for photo in photos:
            own = [n for n, owner in of.items() if owner is photo and not rows[n]["iscrowd"]]
            expected += [(photo["file_name"], n) for n in own or [None]]
        crowds = []
        found = entries(path, tmp_path, crowds.append)
        assert [(entry.image, entry.meta.get("id")) if entry.image else entry.key for entry in found] == expected
        assert len(crowds) == sum(rows[n]["iscrowd"] and photo is not None for n, photo in of.items())


def test_a_coco_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = coco(tmp_path)
    coming = entries(path)
    next(coming)
    path.write_text(path.read_text().replace("{", "["))
    with pytest.raises(InvalidInputError, match="changed while it was read"):
        list(coming)


def test_tars_of_img2dataset(tmp_path):
    def sample(number: int) -> dict[str, bytes]:
        facts = {"url": f"http://{number}", "sha256": "ab", "license": "CC0", "status": "success", "exif": "secret"}
        facts |= {"key": f"{number:09d}", "error_message": None, "width": W, "height": H}
        return {
            f"{number:09d}.jpg": saved(picture(number), format="JPEG"),
            f"{number:09d}.txt": f"a caption of {number}".encode(),
            f"{number:09d}.json": json.dumps(facts).encode(),
        }

    tar_of(tmp_path / "00001.tar", sample(2) | {"notes.txt": b"x"})
    tar_of(tmp_path / "00000.tar", sample(0) | sample(1))
    for name in ("00000.parquet", "00000_stats.json", ".hidden.tar"):
        (tmp_path / name).write_bytes(b"not read")
    left_out = []
    found = list(entries(tmp_path, left_out=left_out.append))
    assert [entry.image for entry in left_out] == ["00001.tar/notes.txt", ".hidden.tar"]
    assert [entry.image for entry in found] == [
        "00000.tar/000000000.jpg",
        "00000.tar/000000001.jpg",
        "00001.tar/000000002.jpg",
    ]
    assert [entry.global_prompt for entry in found] == [f"a caption of {number}" for number in range(3)]
    assert found[2].meta == {
        "url": "http://2",
        "sha256": "ab",
        "license": "CC0",
        "width": W,
        "height": H,
        "id": "00001.tar/000000002",
    }
    assert refused(found[0]) is R.NO_MASK
    assert read_bytes(tmp_path, found[2].image) == sample(2)["000000002.jpg"]
    assert [entry.key for entry in entries(tmp_path / "00001.tar")] == [found[2].key]


def test_nothing_leaves_through_a_tar(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(saved(picture()))
    folder = tmp_path / "in"
    with tarfile.open(tar_of(folder / "a.tar", {"b.png": saved(picture(1))}), "a") as tar:
        for name, link in (("c.png", "../secret.png"), ("d.png", str(secret))):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("../../secret.png"))
    left_out = []
    found = entries(folder, left_out=left_out.append)
    assert [entry.image for entry in found] == ["a.tar/b.png", "a.tar/../../secret.png"]
    assert [entry.image for entry in left_out] == ["a.tar/c.png", "a.tar/d.png"]
    assert read_bytes(folder, "a.tar/../../secret.png") == b""  # the tar's own
    tar_of(tmp_path / "out.tar", {"b.png": saved(picture(1))})
    (folder / "link.tar").symlink_to(tmp_path / "out.tar")
    assert [entry.problem and entry.problem[0] for entry in entries(folder)] == [None, None, R.OUTSIDE_TREE]
    for name in ("../out.tar/b.png", "link.tar/b.png", str(tmp_path / "out.tar/b.png")):
        with pytest.raises(Rejected) as caught:
            read_bytes(folder, name)
        assert caught.value.reason is R.OUTSIDE_TREE
    for name in (
        "a.tar/none.png",
        "none.tar/b.png",
        "a.tar/b.png/c",
        "a.tar/../secret.png",
        "a.tar/\0",
        "\ud800.tar/x",
    ):
        with pytest.raises(Rejected) as caught:
            read_bytes(folder, name)
        assert caught.value.reason is R.UNREADABLE


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "tar.gz"])
def test_a_cut_or_broken_tar_gives_what_is_whole_and_says_so(tmp_path, packed):
    members = {f"{number}.png": saved(picture(number)) for number in range(4)}
    whole = tar_of(tmp_path / "whole.tar", members).read_bytes()
    starts = [whole.index(f"{number}.png".encode()) for number in range(4)]
    folder = tmp_path / "in"
    folder.mkdir()
    broken = bytearray(whole)
    broken[starts[2] : starts[2] + 512] = b"x" * 512
    for data, alive in ((whole, 4), (whole[: starts[3]], 3), (whole[: starts[3] + 700], 3), (bytes(broken), 2)):
        # a file of another size each time: the listing is kept for a file that stays as it is
        name = "a.tar.gz" if packed else "a.tar"
        (folder / name).write_bytes(gzip.compress(data) if packed else data)
        found = list(entries(folder))
        for number in range(alive):
            assert np.array_equal(load_whole(found[number]), picture(number))
        for entry in found[alive:]:
            with pytest.raises(Rejected) as caught:
                load_whole(entry)
            assert caught.value.reason is R.TRUNCATED
        problems = [entry.problem[0] for entry in found if entry.problem]
        assert problems == ([] if alive == 4 else [R.TRUNCATED])
    if packed:
        (folder / name).write_bytes(gzip.compress(whole)[:-2000])
        assert [entry.problem[0] for entry in entries(folder) if entry.problem] == [R.TRUNCATED]


def test_a_tar_that_changes_is_read_anew(tmp_path):
    tar_of(tmp_path / "a.tar", {"a.png": saved(picture(0))})
    assert len(list(entries(tmp_path))) == 1
    tar_of(tmp_path / "a.tar", {"b.png": saved(picture(1)), "c.png": saved(picture(2))})
    assert [entry.image for entry in entries(tmp_path)] == ["a.tar/b.png", "a.tar/c.png"]


def test_facts_in_a_tar_that_are_none_are_told(tmp_path):
    photo = saved(picture())
    members = {"a.png": photo, "a.json": b"{", "b.png": photo, "b.txt": b"\xff", "c.png": photo, "c.json": b"[1]"}
    members |= {"d.png": photo, "d.json": b'{"box": [1, 2, 3]}', "e.png": photo, "e.json": b'{"category": 5}'}
    members |= {"f.png": photo, "f.json": b'{"box": null, "category": NaN}', "g.json": b"{}"}
    left_out = []
    found = list(entries(tar_of(tmp_path / "a.tar", members), left_out=left_out.append))
    problems = [entry.problem[0] if entry.problem else None for entry in found]
    assert problems == [R.BAD_ROW] * 4 + [R.NO_PROMPT, None]
    assert (found[5].segmentation, found[5].prompt) == (None, None)
    assert [entry.image for entry in left_out] == ["a.tar/g.json"]


def test_a_manifests_header_and_its_mistakes(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(saved(picture()))
    row = {"image": "a.png", "segmentation": [BOX], "local_prompt": "x", "mask": None}
    folder = manifest(tmp_path / "m", {"root": "../photos", "made_by": {}}, row, {"root": "../photos"}, row)
    first, header_again, twice = entries(folder)
    assert load(first, S).prompt == "x"
    assert "segmentation" not in first.meta
    assert (refused(header_again), refused(twice)) == (R.BAD_ROW, R.DUPLICATE)
    outside = manifest(tmp_path / "m", {"root": "../photos"}, {**row, "image": "../photos2/a.png"})
    (tmp_path / "photos2").mkdir()
    (tmp_path / "photos2" / "a.png").write_bytes(saved(picture()))
    assert refused(next(entries(outside))) is R.OUTSIDE_TREE
    with pytest.raises(InvalidInputError, match=r"first line.*no folder"):
        list(entries(manifest(tmp_path / "m", {"root": str(tmp_path / "gone")}, row)))


def test_segmentations_follow_the_laws_of_masks(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(picture()))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned: H and W change places
    (tmp_path / "turned.png").write_bytes(saved(picture(), exif=exif))
    wide = {"width": W, "height": H}
    shown = encode_rle(np.rot90(region(), -1))
    for row, expected in (
        ({"image": "turned.png", "segmentation": shown}, None),
        ({"image": "turned.png", "segmentation": encode_rle(region())}, None),  # of the stored pixels
        ({"image": "turned.png", "segmentation": [BOX], **wide}, None),
        ({"image": "a.png", "segmentation": [BOX], "width": W + 1, "height": H}, R.MASK_SIZE_MISMATCH),
        ({"image": "a.png", "segmentation": encode_rle(region()[1:])}, R.MASK_SIZE_MISMATCH),
        ({"image": "a.png", "segmentation": encode_rle(region() & False)}, R.MASK_EMPTY),
        ({"image": "a.png", "segmentation": encode_rle(region() | True)}, R.MASK_FULL),
        ({"image": "a.png", "segmentation": []}, R.MASK_EMPTY),
        ({"image": "a.png", "segmentation": [[1, 2, "x"]]}, R.MASK_UNREADABLE),
        ({"image": "a.png", "segmentation": {"size": [H, W], "counts": "zz"}}, R.MASK_UNREADABLE),
        ({"image": "a.png", "segmentation": "zz"}, R.MASK_UNREADABLE),
        ({"image": "a.png", "segmentation": [BOX], "width": float(W + 1), "height": f"{H}"}, R.MASK_SIZE_MISMATCH),
        ({"image": "a.png", "segmentation": [BOX], "width": 10**9, "height": 10**9}, R.MASK_SIZE_MISMATCH),
        ({"image": "a.png", "segmentation": [BOX], "width": W + 0.5, "height": H}, R.BAD_ROW),
    ):
        (entry,) = entries(manifest(tmp_path, {"local_prompt": "x", **row}))
        if expected is None:
            assert np.array_equal(load_mask(entry), np.rot90(region(), -1)), row
            assert load(entry, S).mask.any()
        else:
            assert refused(entry) is expected, row


def test_decisions_beside_a_manifest_hold(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(picture()))
    rows = [{"id": n, "image": "a.png", "segmentation": [BOX], "local_prompt": f"thing {n}"} for n in range(6)]
    rows[1]["prompt_problems"] = rows[4]["prompt_problems"] = ["too long"]
    rows[5]["prompt_problems"] = []
    folder = manifest(tmp_path, *rows)
    for number, action, text in ((0, REJECT, None), (1, EDIT, "a  better\nword"), (2, REJECT, None), (2, UNDO, None)):
        append_decision(tmp_path / "decisions.jsonl", decide(str(number), action, "ann", text))
    found = list(entries(folder))
    assert refused(found[0]) is R.REVIEW_REJECTED
    assert [load(entry, S).prompt for entry in found[1:4]] == ["a better word", "thing 2", "thing 3"]
    assert refused(found[4]) is R.NEEDS_REVIEW
    assert load(found[5], S).prompt == "thing 5"
    assert [entry.key for entry in found] == [entry.key for entry in entries(folder / "manifest.jsonl")]


def test_a_folder_is_told_in_the_order_of_its_names_however_it_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("refine_control.photos.named_files._NAMES_SORTED", 3)
    names = ["a-b.jpg", "a.jpg", "a.b.jpg", "a.b.txt", "a", "a.mask.png", "a.b.mask.png", "A.PNG", "a b.webp", "ö.jpg"]
    names += ["ö.txt", ".h.jpg", ".h.txt", "sub/q.webp", "sub/deep/q.webp", "sub.d/q.jpg", ".hidden/q.jpg", "b.txt"]
    names += [f"{number}.jpg" for number in range(12)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("some words")
    (tmp_path / "another").symlink_to("sub")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    found = [(entry.image, entry.mask, entry.prompt) for entry in entries(tmp_path)]
    top = sorted([*(name for name in names if "/" not in name), "loop.jpg"])
    images = [name for name in top if not name.startswith(".") and name.lower().endswith((".jpg", ".webp", ".png"))]
    images = [name for name in images if not name.endswith(".mask.png")]
    with_mask, with_words = {"a.jpg", "a.b.jpg"}, {"a.b.jpg", "ö.jpg"}
    expected: list[tuple[str, str | None, str | None]] = [("another", None, None)]
    for name in [*images, "sub/q.webp", "sub/deep/q.webp", "sub.d/q.jpg"]:
        mask = f"{Path(name).stem}.mask.png" if name in with_mask else None
        expected.append((name, mask, "some words" if name in with_words else None))
    assert found == expected


def test_what_is_no_source_is_refused_at_once(tmp_path):
    (tmp_path / "letter.doc").write_text("dear")
    for wrong in (tmp_path / "letter.doc", tmp_path / "nowhere"):
        with pytest.raises(InvalidInputError, match="photos"):
            entries(wrong)
    tar_of(tmp_path / "a.tar", {})
    (tmp_path / "b.jpg").write_bytes(saved(picture()))
    with pytest.raises(InvalidInputError, match="each a folder"):
        entries(tmp_path)


def test_names_of_categories_become_prompts():
    names = ["dog", "apple", "wine glass", "scissors", "skis", "bus", "american_alligator", "Umbrella", ""]
    assert [with_article(name) for name in names] == [
        "a dog",
        "an apple",
        "a wine glass",
        "scissors",
        "skis",
        "a bus",
        "an american alligator",
        "an Umbrella",
        "",
    ]


# Lists of addresses: a stand-in for the tool writes what the tool would write

TOOL = """#!{python}
import io, json, os, sys, tarfile
options = dict(each.removeprefix("--").split("=", 1) for each in sys.argv[1:])
out = options["output_folder"]
print("words of the tool")
if os.environ.get("TOOL_FAILS"):
    sys.exit(3)
addresses = open(options["url_list"]).read().splitlines()[options["input_format"] != "txt":]
came = [] if os.environ.get("NO_NETWORK") else addresses
with tarfile.open(out + "/00000.tar", "w") as tar:
    for number, line in enumerate(came):
        for name, data in (("jpg", open({photo!r}, "rb").read()), ("txt", b"a hill"), ("json", b'{{"url": "u"}}')):
            info = tarfile.TarInfo(f"{{number:09d}}.{{name}}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
open(out + "/00000_stats.json", "w").write(json.dumps({{"count": len(addresses), "successes": len(came)}}))
open(out + "/seen", "a").write("run ")
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    (tmp_path / "photo.jpg").write_bytes(saved(picture(), format="JPEG"))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "img2dataset"
    program.write_text(TOOL.format(python=sys.executable, photo=str(tmp_path / "photo.jpg")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    urls = tmp_path / "photos.tsv000"
    urls.write_text("photo_id\tphoto_url\tphoto_image_url\tphoto_description\nx\thttp://p\thttp://i\t\ny\tq\tj\t\n")
    return urls


def test_a_download_is_a_source_without_regions(tool, tmp_path, capfd):
    out = tmp_path / "out"
    command = command_for(tool, out)
    assert not out.exists()
    assert {"--url_col=photo_image_url", "--caption_col=photo_description", "--input_format=tsv"} <= set(command)
    assert '--save_additional_columns=["photo_id"]' in command
    assert {"--output_format=webdataset", f"--output_folder={out}", "--resize_only_if_bigger=True"} <= set(command)
    made = download(tool, out)
    assert (made.shards, made.addresses, made.photos) == (1, 2, 2)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "words of the tool\n")
    found = list(entries(out))
    assert [(entry.image, entry.prompt, entry.global_prompt) for entry in found] == [
        ("00000.tar/000000000.jpg", None, "a hill"),
        ("00000.tar/000000001.jpg", None, "a hill"),
    ]
    assert refused(found[0]) is R.NO_MASK
    assert load_whole(found[1]).shape == (H, W, 3)
    download(tool, out)  # goes on with its own
    assert (out / "seen").read_text() == "run run "
    tool.write_text(tool.read_text() + "z\tr\ts\t\n")
    with pytest.raises(InvalidInputError, match="another list"):
        download(tool, out)
    with pytest.raises(InvalidInputError, match="no download"):
        download(tool, tool.parent)


def test_a_download_that_fails_says_what_to_do(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("TOOL_FAILS", "1")
    with pytest.raises(WorkerDiedError, match=r"code 3.*same command again"):
        download(tool, tmp_path / "out")
    monkeypatch.delenv("TOOL_FAILS")
    monkeypatch.setenv("NO_NETWORK", "1")
    with pytest.raises(MissingError, match=r"of the 2 addresses.*network"):
        download(tool, tmp_path / "out")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(MissingError, match="pip install img2dataset"):
        download(tool, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def parquet(*columns: str) -> bytes:
    """As much of a parquet file as says its columns: `path_in_schema` of each, the footer's length and the mark."""
    footer = b"".join(b"\x35\0\x19\x18" + bytes([len(name)]) + name.encode() + b"\x15\2" for name in columns)
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def test_which_lists_of_addresses_are_known(tmp_path):
    (tmp_path / "a.txt").write_text("http://x\n")
    assert read_layout(tmp_path / "a.txt") == ("txt", None, None, [])
    (tmp_path / "a.csv").write_text('"url","caption",other\n')
    assert read_layout(tmp_path / "a.csv") == ("csv", "url", "caption", [])
    for name in ("part.parquet", "folder/part-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(parquet("URL", "TEXT", "license"))
    for urls in (tmp_path / "part.parquet", tmp_path / "folder"):
        assert read_layout(urls) == ("parquet", "URL", "TEXT", [])
    (tmp_path / "lower.parquet").write_bytes(parquet("id", "url", "caption"))
    assert read_layout(tmp_path / "lower.parquet") == ("parquet", "url", "caption", [])
    (tmp_path / "other.parquet").write_bytes(parquet("link", "text"))
    with pytest.raises(InvalidInputError, match=r"no column of addresses.*found link, text"):
        read_layout(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes(parquet("URL", "TEXT")[:-1])
    with pytest.raises(InvalidInputError, match="cut"):
        read_layout(tmp_path / "cut.parquet")
    (tmp_path / "b.tsv").write_text("name\tplace\n")
    (tmp_path / "c.doc").write_text("")
    for name, words in (("b.tsv", "found name, place"), ("c.doc", "no list"), ("gone.txt", "does not exist")):
        with pytest.raises(InvalidInputError, match=words):
            read_layout(tmp_path / name)
