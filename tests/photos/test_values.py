"""Laws of values: how a number is written does not matter, and what is no number is refused by its name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refine_control.errors import InvalidInputError
from refine_control.photos.load import load, load_mask
from refine_control.photos.sources import entries
from refine_control.photos.values import identifier, number, take_flag, whole
from refine_control.records import Rejected
from refine_control.records import RejectReason as R

W, H = 40, 32
BOX = [12, 8, 28, 8, 28, 20, 12, 20]


def photo(folder: Path, name: str = "a.png", seed: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)).save(folder / name)


def coco(folder: Path, annotations, images=None, categories=None) -> list:
    photo(folder)
    listed = {
        "images": [{"id": 1, "file_name": "a.png", "width": W, "height": H}] if images is None else images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "dog"}] if categories is None else categories,
    }
    (folder / "list.json").write_text(json.dumps(listed))
    left_out = []
    return [*entries(folder / "list.json", left_out=left_out.append), *left_out]


GOOD = {"id": 5, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [BOX]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((3, 3), (3.0, 3), ("3", 3), ("3.0", 3), (" -2 ", -2), ("0", 0), (1e20, 10**20), (3.5, None), ("3.5", None)),
        *((True, None), ("007", None), ("x", None), ("", None), (None, None), ([3], None), (float("nan"), None)),
        *((float("inf"), None), ("1e3", None), ("1_0", None), ("٣", None)),
    ],
)
def test_whole_numbers(value, expected):
    assert whole(value) == expected
    assert type(whole(value)) is type(expected)


def test_identifiers_and_numbers_and_flags():
    assert identifier("7") == identifier(7.0) == identifier("7.0") == 7
    assert (identifier("007"), identifier("a b "), identifier(True), identifier(7.5)) == ("007", "a b", None, None)
    assert (number("2.5"), number(2), number(" -3 "), number("x"), number(float("nan"))) == (2.5, 2, -3.0, None, None)
    flags = [True, 1, 1.0, "1", False, 0, 0.0, "0", None, float("nan")]
    assert [take_flag({"f": each}, "f") for each in flags] == [True] * 4 + [False] * 6
    with pytest.raises(Rejected, match="`f` is 'no'"):
        take_flag({"f": "no"}, "f")


@pytest.mark.parametrize("one", [1, 1.0, "1", "1.0"])
@pytest.mark.parametrize("field", ["id", "image_id", "category_id", "images.id", "categories.id", "width"])
def test_every_field_of_a_coco_list_may_be_a_float_or_text(tmp_path, field, one):
    annotation = {**GOOD, "iscrowd": "0.0", field: one} if "." not in field else GOOD
    image = {"id": one if field == "images.id" else 1, "file_name": "a.png", "height": H}
    image["width"] = type(one)(W) if field == "width" and one != "1.0" else W
    (entry,) = coco(tmp_path, [annotation], [image], [{"id": one if field == "categories.id" else 1, "name": "dog"}])
    sample = load(entry, 16)
    assert sample.prompt == "a dog"
    assert entry.photo == "list/1" or field == "images.id"
    assert np.argwhere(load_mask(entry))[[0, -1]].tolist() == [[8, 12], [19, 27]]
    assert isinstance(sample.meta["id"], int | str)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": 1.5}, "`id` is 1.5"),
        ({"id": [5]}, "`id` is [5]"),
        ({"id": True}, "`id` is True"),
        ({"image_id": 1.5}, "`image_id` 1.5, neither"),
        ({"image_id": 9}, "`image_id` 9, which is of no photo"),
        ({"category_id": {}}, "`category_id` is {}"),
        ({"iscrowd": "maybe"}, "`iscrowd` is 'maybe'"),
        ({"segmentation": "[[1, 2]]"}, "`segmentation` is '[[1, 2]]'"),
    ],
)
def test_what_is_no_such_value_is_refused_by_its_name(tmp_path, change, words):
    entry = coco(tmp_path, [{**GOOD, **change}])[0]
    assert entry.problem is not None
    assert words in entry.problem[1]


@pytest.mark.parametrize("change", [{"width": "wide"}, {"height": 31.5}, {"width": True}, {"id": [1]}])
def test_a_photos_values_are_refused_by_their_names(tmp_path, change):
    found = coco(tmp_path, [GOOD], [{"id": 1, "file_name": "a.png", "width": W, "height": H, **change}])
    assert all(entry.problem and f"`{next(iter(change))}`" in entry.problem[1] for entry in found[-1:])


def test_a_size_that_is_not_the_photos_is_a_mismatch_however_it_is_written(tmp_path):
    for width, height in ((80, 64), (80.0, 64.0), ("80", "64"), (80, None), (10**6, 10**6)):
        (entry,) = coco(tmp_path, [GOOD], [{"id": 1, "file_name": "a.png", "width": width, "height": height}])
        with pytest.raises(Rejected) as caught:
            load(entry, 16)
        assert caught.value.reason is R.MASK_SIZE_MISMATCH
    for unknown in (0, -1, None, float("nan")):
        (entry,) = coco(tmp_path, [GOOD], [{"id": 1, "file_name": "a.png", "width": unknown, "height": unknown}])
        assert load(entry, 16).mask.any()


def test_crowds_are_left_out_with_a_line_and_their_photo_stays(tmp_path):
    found = coco(tmp_path, [{**GOOD, "id": n, "iscrowd": flag} for n, flag in enumerate((1, "1", True, 1.0))])
    assert [entry.problem and entry.problem[0] for entry in found] == [None] + [R.CROWD] * 4
    assert found[0].segmentation is None
    assert all("crowd" in entry.problem[1] for entry in found[1:])


def test_regions_with_one_id_are_told_apart_by_the_region(tmp_path):
    other = [[2, 2, 9, 2, 9, 9, 2, 9]]
    rows = [{**GOOD, "id": 0}, {**GOOD, "id": 0.0, "segmentation": other}, {**GOOD, "id": "0"}]
    first, second, again = coco(tmp_path, rows)
    assert (first.problem, second.problem) == (None, None)
    assert first.key != second.key
    assert second.meta.get("id") is None
    assert np.argwhere(load_mask(second))[0].tolist() == [2, 2]
    assert again.problem[0] is R.DUPLICATE
    assert "id and region" in again.problem[1]


def test_photos_with_one_id_do_not_share_their_annotations(tmp_path):
    photo(tmp_path, "b.png", 1)
    images = [{"id": 0, "file_name": name} for name in ("a.png", "b.png", "b.png")]
    found = coco(tmp_path, [{**GOOD, "image_id": "0"}, {**GOOD, "id": 6, "image_id": 0}], images)
    assert [entry.problem and entry.problem[0] for entry in found] == [R.AMBIGUOUS] * 5
    assert all("a.png" in entry.problem[1] and "b.png" in entry.problem[1] for entry in found)
    again = coco(tmp_path, [{**GOOD, "image_id": 0}], [images[1], images[2]])
    assert [entry.problem and entry.problem[0] for entry in again] == [None, R.DUPLICATE]


def test_a_list_of_which_most_photos_are_missing_is_read(tmp_path):
    (tmp_path / "images").mkdir()
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(40)]
    rows = [{**GOOD, "id": n, "image_id": n} for n in range(40)]
    with pytest.raises(InvalidInputError, match=r"0\.png.*name their folder"):
        coco(tmp_path, rows, images)
    photo(tmp_path / "images", "39.png")
    found = coco(tmp_path, rows, images)
    assert len(found) == 40
    assert load(found[39], 16).prompt == "a dog"
    for entry in found[:39]:
        with pytest.raises(Rejected, match="unreadable: no such file"):
            load(entry, 16)


def manifest(folder: Path, *rows) -> list:
    photo(folder)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "manifest.jsonl").write_text(text)
    return list(entries(folder))


def test_rows_of_a_manifest_follow_the_same_rules(tmp_path):
    good = {"image": "a.png", "segmentation": [BOX], "local_prompt": "x"}
    nothing = dict.fromkeys(("id", "mask", "global_prompt", "width", "source_image_id"), float("nan"))
    found = manifest(
        tmp_path,
        {**good, "id": 1.0, "source_image_id": 7.0},
        {**good, "id": "2", "source_image_id": 7},
        {**good, **nothing},
    )
    assert [load(entry, 16).meta.get("id") for entry in found] == [1, "2", None]
    assert found[0].photo == found[1].photo
    (entry,) = manifest(tmp_path, {**good, "captions": "a sky", "prompt_problems": None})
    assert (entry.problem, entry.global_prompt) == (None, "a sky")
    (entry,) = manifest(tmp_path, {**good, "prompt_problems": "too long"})
    assert entry.problem == (R.NEEDS_REVIEW, "the prompt is doubtful (too long): see `data review`")
    for change, words in (
        ({"captions": 5}, "`captions` is 5"),
        ({"prompt_problems": 5}, "`prompt_problems` is 5"),
        ({"id": 1.5}, "`id` is 1.5"),
        ({"mask": 5}, "`mask` is 5, not text"),
        ({"image": 5}, "`image` is 5, not text"),
        ({"global_prompt": 5}, "`global_prompt` is 5"),
        ({"local_prompt": 3}, "`local_prompt` is 3"),
        ({"source_image_id": []}, "`source_image_id` is []"),
        ({"segmentation": "x"}, "`segmentation` is 'x'"),
    ):
        (entry,) = manifest(tmp_path, {**good, **change})
        assert words in entry.problem[1], change
    (entry,) = manifest(tmp_path, {"file_name": "a.png", "text": "x"})
    assert "no `image`" in entry.problem[1]
    assert "file_name, text" in entry.problem[1]
    (tmp_path / "manifest.jsonl").write_bytes('{"image": "ä.png"}'.encode("latin-1"))
    assert "UTF-8" in next(entries(tmp_path)).problem[1]
    (tmp_path / "manifest.jsonl").write_bytes(json.dumps(good).encode("utf-16"))
    with pytest.raises(InvalidInputError, match="UTF-16"):
        list(entries(tmp_path))


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([12, 8, 27, 19], ""),
        (["12", 8.0, "27.0", 19], ""),
        ([1, 2, 3], "`box`"),
        ([1, 2, 3, None], "`box`"),
        ("x", "`box`"),
    ],
)
def test_the_box_of_a_description(tmp_path, box, words):
    photo(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"category": "dog", "box": box, "id": 9}))
    (entry,) = entries(tmp_path)
    if words:
        assert words in entry.problem[1]
        return
    assert np.argwhere(load_mask(entry))[[0, -1]].tolist() == [[8, 12], [19, 27]]
    assert load(entry, 16).prompt == "a dog"
