"""Laws of the way to Label Studio and back: nothing is lost, nothing is invented, and twice is once."""

import base64
import io
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refine_control.annotation.brush import decode_brush, encode_brush
from refine_control.annotation.label_studio import export_tasks, import_annotations
from refine_control.annotation.review_rows import read_rows
from refine_control.errors import InvalidInputError
from refine_control.photos.decisions import ACCEPT, EDIT, REJECT, UNDO, append_decision, by_reviewer, decide
from refine_control.photos.load import load_mask
from refine_control.photos.regions import encode_rle

W, H = 50, 30


@pytest.fixture
def folder(tmp_path):
    """Four rows, the last of which has a photo that is none."""
    made = tmp_path / "made"
    made.mkdir()
    rows = []
    for number in range(4):
        generator = np.random.default_rng(number)
        mask = np.zeros((H, W), bool)
        mask[4 + number : 20, 5:30] = generator.random((16 - number, 25)) < 0.7
        Image.fromarray(generator.integers(0, 256, (H, W, 3), np.uint8)).save(made / f"a b{number}.png")
        rows.append({"id": f"r{number}", "image": f"a b{number}.png", "segmentation": encode_rle(mask)})
        rows[-1] |= {"local_prompt": f"thing {number}", "predicted_iou": 0.5}
    (made / "a b3.png").write_bytes(b"no image")
    (made / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def exported(folder) -> list[dict]:
    summary = export_tasks(folder, folder.parent / "out")
    tasks = json.loads((folder.parent / "out" / "tasks.json").read_text())
    assert (summary.tasks, summary.refused) == (len(tasks), {"unreadable": 1})
    return tasks


def annotated(task: dict, completed_by: object = 5, **changes) -> dict:
    """The task as Label Studio gives it back: the prediction, submitted as it is or with another text or choice."""
    result = json.loads(json.dumps(task["predictions"][0]["result"]))
    for part in result:
        if part["from_name"] == "prompt" and "text" in changes:
            part["value"]["text"] = [changes["text"]]
        if part["from_name"] == "verdict" and "choice" in changes:
            part["value"]["choices"] = [changes["choice"]]
        if part["from_name"] == "region" and "mask" in changes:
            part["value"]["rle"] = encode_brush(changes["mask"])
    time = changes.get("time", "2025-03-01T10:00:00.123456Z")
    annotation = {"completed_by": completed_by, "created_at": time, "was_cancelled": changes.get("cancelled", False)}
    return {"id": 1, "data": task["data"], "annotations": [{**annotation, "result": result}]}


def brought_in(folder, *tasks: dict):
    path = folder.parent / "export.json"
    path.write_text(json.dumps(tasks))
    return import_annotations(path, folder)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 12), st.integers(1, 12))
def test_a_brush_there_and_back_is_the_same_mask(data, height, width):
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    assert np.array_equal(decode_brush(encode_brush(mask), height, width), mask)


def test_the_brush_is_the_stream_that_label_studio_knows():
    # two pixels, the second painted: 8 bytes; words of 8 bits; sizes 3, 4, 8 and 16; runs of 4 zeros and of 4 times 255
    bits = f"{8:032b}" + "00111" + "0010" + "0011" + "0111" + "1111" + "1" + "00" + "011" + "0" * 8 + "1" + "00" + "011"
    bits += "1" * 8
    bits += "0" * (-len(bits) % 8)
    expected = [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]
    assert encode_brush(np.array([[False, True]])) == expected
    # the same told without runs, as its own page may do
    plain = bits[:53] + "0" + "00" + "111" + "0" * 32 + "1" * 32
    plain += "0" * (-len(plain) % 8)
    given_bytes = [int(plain[k : k + 8], 2) for k in range(0, len(plain), 8)]
    assert decode_brush(given_bytes, 1, 2).tolist() == [[False, True]]
    long = np.ones((300, 300), bool)  # longer than the longest run
    assert np.array_equal(decode_brush(encode_brush(long), 300, 300), long)


@pytest.mark.parametrize("brush", [[], [1, 2, 3], [300] * 40, "x", None, encode_brush(np.ones((2, 2), bool))])
def test_what_is_no_brush_of_that_size_is_refused(brush):
    with pytest.raises(InvalidInputError, match="3 x 2"):
        decode_brush(brush, 2, 3)


def test_tasks_hold_the_photo_the_region_and_the_words(folder):
    append_decision(folder / "decisions.jsonl", decide("r1", EDIT, "ann", "a mended thing"))
    append_decision(folder / "decisions.jsonl", decide("r2", REJECT, "ann"))
    rows = {row.id: row for row in read_rows(folder)}
    told = []
    for task in exported(folder):
        region, prompt, verdict = task["predictions"][0]["result"]
        kind, _, data = task["data"]["image"].partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (W, H)
        assert (region["original_width"], region["original_height"]) == (W, H)
        mask = decode_brush(region["value"]["rle"], H, W)
        assert np.array_equal(mask, load_mask(rows[task["data"]["id"]].entry))
        told.append((task["data"]["id"], prompt["value"]["text"][0], verdict["value"]["choices"][0]))
    assert told == [("r0", "thing 0", ACCEPT), ("r1", "a mended thing", ACCEPT), ("r2", "thing 2", REJECT)]


def test_the_configuration_names_what_the_tasks_use(folder):
    tasks = exported(folder)
    view = ET.parse(folder.parent / "out" / "labels.xml").getroot()
    controls = {tag.get("name"): tag for tag in view.iter() if tag.get("name")}
    used = {part["from_name"] for task in tasks for part in task["predictions"][0]["result"]}
    assert used == {"region", "prompt", "verdict"}
    assert all(controls[name].get("toName") == "image" for name in used)
    assert {tag.get("value") for tag in controls["verdict"]} == {ACCEPT, REJECT}
    assert {tag.get("value", "")[1:] for tag in view.iter() if tag.get("value", "").startswith("$")} <= set(
        tasks[0]["data"]
    )


def test_photos_in_tasks_are_small(folder):
    big = np.zeros((900, 1500), bool)
    big[200:700, 100:900] = True
    Image.fromarray(np.zeros((900, 1500, 3), np.uint8)).save(folder / "big.png")
    with (folder / "manifest.jsonl").open("a") as file:
        file.write(json.dumps({"id": "big", "image": "big.png", "segmentation": encode_rle(big)}) + "\n")
    task = exported(folder)[-1]
    data = task["data"]["image"].partition(",")[2]
    region = task["predictions"][0]["result"][0]
    size = (region["original_width"], region["original_height"])
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == size == (1024, 614)
    assert brought_in(folder, annotated(task)).repainted == []


def test_there_and_back_is_what_people_said(folder):
    first, second, third = exported(folder)
    told = [annotated(first), annotated(second, text=" a  blue thing"), annotated(third, choice=REJECT)]
    summary = brought_in(folder, *told)
    assert (summary.decisions, summary.strangers, summary.repainted) == (3, [], [])
    found = by_reviewer(folder / "decisions.jsonl")["label-studio-5"]
    assert {id: (each.action, each.prompt) for id, each in found.items()} == {
        "r0": (ACCEPT, None),
        "r1": (EDIT, "a blue thing"),
        "r2": (REJECT, None),
    }
    assert {each.time for each in found.values()} == {"2025-03-01T10:00:00.123456Z"}
    before = (folder / "decisions.jsonl").read_bytes()
    again = brought_in(folder, *told)
    assert (again.decisions, again.known, (folder / "decisions.jsonl").read_bytes()) == (0, 3, before)


def test_an_older_annotation_does_not_undo_a_newer_decision(folder):
    task = exported(folder)[0]
    brought_in(folder, annotated(task, time="2025-03-02T10:00:00Z"))
    assert brought_in(folder, annotated(task, choice=REJECT)).known == 1
    assert brought_in(folder, annotated(task, choice=REJECT, time="2025-03-03T10:00:00Z")).decisions == 1
    append_decision(folder / "decisions.jsonl", decide("r0", UNDO, "label-studio-5"))
    assert by_reviewer(folder / "decisions.jsonl")["label-studio-5"]["r0"].action == ACCEPT


def test_what_does_not_decide_is_counted(folder):
    first, second, third = exported(folder)
    painted = np.zeros((H, W), bool)
    painted[2:9, 2:9] = True
    stranger = annotated({**third, "data": {"id": "r9"}})
    person = {"id": 3, "email": "bo@example.org"}
    cancelled, unsaid = annotated(first, cancelled=True), annotated(second, choice="perhaps")
    summary = brought_in(folder, cancelled, unsaid, stranger, annotated(third, person, mask=painted))
    assert (summary.decisions, summary.undecided) == (1, 2)
    assert (summary.strangers, summary.repainted) == (["r9"], ["r2"])
    assert set(by_reviewer(folder / "decisions.jsonl")) == {"bo@example.org"}
    assert "left as it was" in str(summary)


def numbered(folder) -> None:
    """The rows of `folder` with whole numbers as ids."""
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "id": number} for number, line in enumerate(lines)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("spelled", [2, 2.0, "2", "2.0", " 2 "], ids=repr)
def test_ids_that_went_through_a_spreadsheet_are_read(folder, spelled):
    numbered(folder)
    task = annotated(exported(folder)[2], completed_by=5.0)
    task["data"]["id"] = spelled
    for part in task["annotations"][0]["result"]:
        if part["type"] == "brushlabels":
            part |= {"original_width": float(W), "original_height": str(H)}
    summary = brought_in(folder, task)
    assert (summary.decisions, summary.strangers, summary.repainted) == (1, [], [])
    assert by_reviewer(folder / "decisions.jsonl")["label-studio-5"].keys() == {"2"}


def spoiled(task: dict, **changes) -> dict:
    """The annotated task with other values in its annotation, or in the first part of its result."""
    annotation = task["annotations"][0]
    for name, value in changes.items():
        (annotation if name in ("updated_at", "completed_by") else annotation["result"][0])[name] = value
    return task


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"updated_at": "yesterday"}, "r0.*yesterday.*is not a time"),
        ({"updated_at": "2025-03-01 10:00:00"}, "r0.*is not a time"),
        ({"value": None}, "r0.*without its size or its bytes"),
        ({"value": {"rle": "x"}}, "r0.*without its size or its bytes"),
        ({"original_width": 1.5}, "r0.*without its size or its bytes"),
        ({"original_width": 10**6, "original_height": 10**6}, "r0.*is not one of 1000000 x 1000000"),
        ({"original_width": -3}, "r0.*is not one of -3"),
    ],
    ids=str,
)
def test_values_that_no_export_has_are_refused_by_name(folder, changes, said):
    with pytest.raises(InvalidInputError, match=said):
        brought_in(folder, spoiled(annotated(exported(folder)[0]), **changes))
    assert not (folder / "decisions.jsonl").exists()


def test_a_prompt_that_is_too_long_and_tasks_without_an_id_are_refused(folder):
    first, second, _ = exported(folder)
    with pytest.raises(InvalidInputError, match=r"r1.*more than 2000 characters"):
        brought_in(folder, annotated(first), annotated(second, text="very " * 1000))
    assert not (folder / "decisions.jsonl").exists()
    for task in (annotated(first), annotated(second)):
        del task["data"]["id"]
        with pytest.raises(InvalidInputError, match=r"none of its 1 tasks has an `id`.*--to-label-studio"):
            brought_in(folder, task)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_an_export_in_another_encoding_of_unicode_is_read(folder, encoding):
    path = folder.parent / "export.json"
    path.write_text(json.dumps([annotated(exported(folder)[0], text="un café")], ensure_ascii=False), encoding)
    assert import_annotations(path, folder).decisions == 1
    path.write_text(json.dumps([annotated(exported(folder)[0], text="un café")], ensure_ascii=False), "latin-1")
    with pytest.raises(InvalidInputError, match="cannot be read as JSON"):
        import_annotations(path, folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '[{"id": 1}]',
        '[{"data": {}, "annotations": 3}]',
        '[{"data": {}, "annotations": [{"result": [1]}]}]',
    ],
)
def test_what_is_no_export_is_refused(folder, content):
    (folder.parent / "export.json").write_text(content)
    with pytest.raises(InvalidInputError, match="export as JSON"):
        import_annotations(folder.parent / "export.json", folder)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        import_annotations(folder.parent / "none.json", folder)
