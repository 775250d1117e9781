"""Laws of `data build --condition`: given pictures go with their photos, missing ones are made of the final pixels."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refine_control.conditions import canny, lowres
from refine_control.conditions.condition import find_condition
from refine_control.errors import InvalidInputError, MissingError
from refine_control.photos.build import build
from refine_control.photos.inspect import contact_sheet, inspect, write_page
from refine_control.photos.load import load
from refine_control.photos.shards import Shards, read_shards, verify
from refine_control.photos.sources import entries
from refine_control.records import ROLES, Entry, Photo, Rejected
from refine_control.records import RejectReason as R

W, H, S = 48, 32, 16
PHOTOS = 10
CHOSEN = {"size": S, "samples_per_shard": 2, "seed": 1}


def scenery(seed: int, width: int = W, height: int = H) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def drawing(seed: int) -> np.ndarray:
    """A condition picture, other pixels than those of any photo."""
    return scenery(seed + 1000)


def save(path: Path, pixels: np.ndarray, **options) -> None:
    Image.fromarray(pixels).save(path, **options)


def listed(folder: Path, rows: list[dict]) -> Path:
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def source(tmp_path):
    """A manifest of 10 photos with masks, condition pictures and prompts, and three rows without a good picture."""
    folder = tmp_path / "source"
    (folder / "conditions").mkdir(parents=True)
    rows = []
    for number in range(PHOTOS):
        save(folder / f"{number}.png", scenery(number))
        save(folder / "conditions" / f"{number}.png", drawing(number))
        mask = np.zeros((H, W), np.uint8)
        mask[:, :4] = 255  # a crop that holds it is not central
        save(folder / f"{number}.mask.png", mask)
        row = {"image": f"{number}.png", "mask": f"{number}.mask.png", "condition": f"conditions/{number}.png"}
        rows.append({**row, "local_prompt": f"a hole {number}", "global_prompt": f"a photo {number}"})
    save(folder / "conditions" / "small.png", drawing(0)[:-1])
    (folder / "conditions" / "broken.png").write_bytes((folder / "conditions" / "1.png").read_bytes()[:100])
    for name in ("small", "broken", "gone"):
        rows.append({**rows[0], "mask": None, "condition": f"conditions/{name}.png"})
    return listed(folder, rows)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def samples(out: Path) -> dict[str, Photo]:
    """All samples by the name of their photo; every role has some."""
    held = {role: list(read_shards(out / role)) for role in ROLES}
    assert all(held.values())
    return {photo.meta["photo"]: photo for photos in held.values() for photo in photos}


def central(pixels: np.ndarray) -> Image.Image:
    left = (W - H) // 2
    return Image.fromarray(pixels[:, left : left + H])


def test_given_pictures_are_cropped_and_resized_with_their_photos(source, tmp_path):
    summary = build(source, tmp_path / "out", condition="depth", **CHOSEN)
    assert summary.rejects == {reason.value: 1 for reason in BAD.values()}
    assert sum(summary.samples.values()) == PHOTOS == summary.entries - 3
    assert verify(tmp_path / "out") == []
    for number, photo in enumerate(samples(tmp_path / "out")[f"{n}.png"] for n in range(PHOTOS)):
        given = central(drawing(number)).resize((S, S), Image.Resampling.BILINEAR)
        assert np.array_equal(photo.cond, np.asarray(given))
        assert photo.mask.all()
        assert photo.prompt == f"a photo {number}"
        assert photo.meta["crop"] == [8, 0, 32]
    for role in ROLES:
        shards = Shards(tmp_path / "out" / role)
        assert shards.condition == "depth"
        for record in shards.records:
            assert ("webp" in record["members"]) == (role != "unlabeled")
    for photo in read_shards(tmp_path / "out" / "labeled"):
        number = int(photo.meta["photo"].removesuffix(".png"))
        assert np.array_equal(photo.image, central(scenery(number)).resize((S, S), Image.Resampling.LANCZOS))


BAD = {"small": R.CONDITION_SIZE_MISMATCH, "broken": R.CONDITION_UNREADABLE, "gone": R.NO_CONDITION}


def test_missing_pictures_are_made_of_the_final_pixels_or_refused(source, tmp_path):
    rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()][:PHOTOS]
    listed(source, [{**row, "condition": None if number % 2 else row["condition"]} for number, row in enumerate(rows)])
    for name, prepare in (("canny", canny.prepare), ("lowres", lowres.prepare)):
        out = tmp_path / name
        assert build(source, out, condition=name, unlabeled_fraction=0.2, **CHOSEN).rejects == {}
        for photo in samples(out).values():
            number = int(photo.meta["photo"].removesuffix(".png"))
            image = np.asarray(central(scenery(number)).resize((S, S), Image.Resampling.LANCZOS))
            assert np.array_equal(photo.cond, prepare(image)) == bool(number % 2)
    summary = build(source, tmp_path / "pose", condition="pose", **CHOSEN)
    assert (summary.rejects, sum(summary.samples.values())) == ({"no_condition": 5}, 5)
    assert summary.photos == {"test": 1, "unlabeled": 2, "labeled": 2}  # the split counts only what can be a sample
    lines = (tmp_path / "pose" / "rejects.jsonl").read_text().splitlines()
    assert "no condition picture is named, and pose must be given" in json.loads(lines[0])["detail"]


def test_killed_and_by_several_workers_the_bytes_are_the_same(source, tmp_path):
    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    build(source, tmp_path / "whole", condition="canny", **CHOSEN)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out", condition="canny", progress=stop, **CHOSEN)
    assert list((tmp_path / "out" / ".parts").iterdir())
    build(source, tmp_path / "out", condition="canny", workers=2, **CHOSEN)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert build(source, tmp_path / "out", condition="canny", **CHOSEN).did_nothing


def test_another_condition_in_the_folder_is_refused(source, tmp_path):
    build(source, tmp_path / "out", **CHOSEN)
    before = tree(tmp_path / "out")
    assert "condition" not in json.loads(before["build.json"])
    with pytest.raises(InvalidInputError) as caught:
        build(source, tmp_path / "out", condition="canny", **CHOSEN)
    assert "was built differently: condition (inpaint there, canny now); delete" in str(caught.value)
    assert tree(tmp_path / "out") == before
    build(source, tmp_path / "canny", condition="canny", **CHOSEN)
    save(source / "conditions" / "3.png", drawing(4))
    with pytest.raises(InvalidInputError, match="the content of the source"):
        build(source, tmp_path / "canny", condition="canny", **CHOSEN)
    assert build(source, tmp_path / "out", **CHOSEN).did_nothing  # inpainting reads no condition picture


def test_what_a_condition_cannot_be_is_said_before_anything_is_read(source, tmp_path):
    for wrong, message in (
        ({"condition": "sketch"}, "no condition 'sketch'; choose one of inpaint, blur, canny"),
        ({"condition": "canny", "preparer": "a/b"}, "the condition canny is not prepared by a model"),
        ({"preparer": "a/b"}, "the condition inpaint is not prepared by a model"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            build(source, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_a_missing_library_ends_the_build_and_is_no_reject(source, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
    build(source, tmp_path / "whole", condition="canny", **CHOSEN)
    shutil.copytree(source, tmp_path / "bare")
    listed(tmp_path / "bare", [{**row, "condition": None} for row in rows[:PHOTOS]])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "skimage", None)
        build(source, tmp_path / "given", condition="canny", limit=PHOTOS, **CHOSEN)  # nothing needs it
        with pytest.raises(MissingError, match="needs scikit-image; install"):
            build(tmp_path / "bare", tmp_path / "out", condition="canny", **CHOSEN)
    assert build(tmp_path / "bare", tmp_path / "out", condition="canny", **CHOSEN).rejects == {}


def put(folder: Path, photo: np.ndarray, cond: np.ndarray, **options) -> Entry:
    """A folder of one photo, its condition picture and its prompt; its entry."""
    folder.mkdir(exist_ok=True)
    save(folder / "a.jpg", photo, quality=95, **options)
    save(folder / "a.cond.png", cond)
    (folder / "a.txt").write_text("make it blue")
    (entry,) = entries(folder, condition="edit")
    return entry


def test_a_folder_names_them_beside_the_photos(tmp_path):
    entry = put(tmp_path / "in", scenery(0), drawing(0))
    assert (entry.condition, entry.prompt) == ("a.cond.png", "make it blue")
    photo = load(entry, S, condition="edit")
    # as sharp as the photo itself, so that what is not edited is the same
    assert np.array_equal(photo.cond, central(drawing(0)).resize((S, S), Image.Resampling.LANCZOS))
    (plain,) = entries(tmp_path / "in")
    assert (plain.condition, plain.key) == (None, entry.key)


def test_a_picture_of_the_stored_pixels_turns_with_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.rot90(scenery(0))  # orientation 6 shows it turned by 90 degrees to the right
    shown = load(put(tmp_path / "a", stored, drawing(0), exif=exif), H, condition="edit")
    assert np.array_equal(shown.cond, central(drawing(0)))
    turned = load(put(tmp_path / "b", stored, np.rot90(drawing(0)), exif=exif), H, condition="edit")
    assert np.array_equal(turned.cond, shown.cond)


def test_buckets_keep_the_shape_of_photo_and_condition(source, tmp_path):
    build(source, tmp_path / "out", condition="depth", buckets=True, **{**CHOSEN, "size": 64}, enlarge=True)
    for photo in samples(tmp_path / "out").values():
        assert photo.cond.shape == photo.image.shape == (*photo.mask.shape, 3)
        assert photo.image.shape[0] < photo.image.shape[1]


def test_regions_of_one_photo_are_one_sample_and_unused_masks_are_mentioned(source, tmp_path, caplog):
    rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()][:3]
    others = [{**rows[0], "mask": "1.mask.png"}, {**rows[1], "condition": "1.png"}, {"image": "2.png"}]
    listed(source, [*rows, *others])
    found = [entry.problem and entry.problem[0] for entry in entries(source, condition="canny")]
    assert found == [None, None, None, R.DUPLICATE, R.BAD_ROW, None]
    assert caplog.text.count("masks, which the condition canny does not use") == 1
    reasons = build(source, tmp_path / "out", condition="canny", **CHOSEN).rejects
    assert reasons == {"duplicate": 1, "bad_row": 1, "no_prompt": 1}
    plain, whole = ([entry.key for entry in entries(source, condition=name)][:3] for name in ("inpaint", "canny"))
    assert plain == whole


@pytest.mark.parametrize("value", [["conditions/0.png"], 3, {"path": "conditions/0.png"}])
def test_a_condition_that_is_no_path_is_refused_and_none_is_made_in_its_place(source, value):
    listed(source, [{"image": "0.png", "mask": "0.mask.png", "local_prompt": "a hole", "condition": value}])
    (entry,) = entries(source, condition="canny")
    assert entry.problem is not None
    assert entry.problem[0] is R.BAD_ROW
    assert "condition" in entry.problem[1]
    (plain,) = entries(source)  # inpainting reads none
    assert plain.problem is None


def test_a_photo_wider_than_two_squares_is_cropped_centrally(tmp_path):
    photo = np.hstack([scenery(0), scenery(1)])
    entry = put(tmp_path / "in", photo, photo[:, ::-1])
    assert load(entry, S, condition="edit").meta["crop"] == [32, 0, 32]


def test_problems_of_the_picture_are_named(tmp_path):
    entry = put(tmp_path / "in", scenery(0), drawing(0))
    for change, reason in (
        ({"condition": "b.png"}, R.NO_CONDITION),
        ({"condition": None}, R.NO_CONDITION),
        ({"condition": "a.txt"}, R.CONDITION_UNREADABLE),
        ({"condition": "../x.png"}, R.NO_CONDITION),
        ({"prompt": None}, R.NO_PROMPT),
    ):
        with pytest.raises(Rejected) as caught:
            load(dataclasses.replace(entry, **change), S, condition="edit")
        assert caught.value.reason is reason


def test_inspect_shows_the_picture_beside_the_photo(source, tmp_path):
    build(source, tmp_path / "out", condition="canny", **CHOSEN)
    found = inspect(tmp_path / "out")["roles"]["labeled"]
    assert (found["condition"], found["mask_fraction"]) == ("canny", {})
    write_page(tmp_path / "out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    figures = [each.partition("</figure>")[0] for each in page.split("<figure ")[1:]]
    assert len(figures) == PHOTOS
    for figure in figures:
        assert figure.count("<img") == (1 if 'data-role="unlabeled"' in figure else 2)
        assert figure.count('alt="condition picture"') == 1
    assert "Masked share of a sample" not in page
    assert "masked" not in page.split("<h2>Samples</h2>")[1].split("<h2>")[0]
    contact_sheet(tmp_path / "out" / "labeled", tmp_path / "labeled.png", count=1)
    contact_sheet(tmp_path / "out" / "unlabeled", tmp_path / "unlabeled.png", count=1)
    wide, narrow = (Image.open(tmp_path / f"{role}.png").width for role in ("labeled", "unlabeled"))
    assert wide >= narrow
    assert find_condition("canny").title


def call(monkeypatch, *arguments: object) -> int:
    from refine_control.cli.app import main

    monkeypatch.setattr("sys.argv", ["refine-control", *map(str, arguments)])
    try:
        return main()
    except SystemExit as left:
        return int(left.code or 0)


def test_the_verb_builds_and_says_in_a_sentence_what_is_wrong(source, tmp_path, monkeypatch, capsys, caplog):
    verb = ("data", "build", source, tmp_path / "out", "--size", S)
    assert call(monkeypatch, *verb, "--condition", "canny") == 0
    assert "rejected 3: condition_size_mismatch 1, condition_unreadable 1, no_condition 1" in capsys.readouterr().out
    assert caplog.text.count("masks, which the condition canny does not use") == 1
    for extra, code, said in (
        (("--condition", "pose"), 2, "built differently: condition (canny there, pose now); delete it or"),
        (
            ("--condition", "sketch", "--dry-run"),
            2,
            "there is no condition 'sketch'; choose one of inpaint, blur, canny",
        ),
        (("--condition", "canny", "--masks", "felzenszwalb"), 2, "the condition canny has none; leave both out"),
        (("--condition", "depth", "--preparer", "nobody/nothing"), 69, "nobody/nothing is no local folder, and the"),
        (("--condition", "lowres", "--preparer", "a/b"), 2, "the condition lowres is not prepared by a model"),
    ):
        assert call(monkeypatch, *verb, *extra) == code, extra
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    assert call(monkeypatch, *verb, "--condition", "edit", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["condition"] == "edit"
