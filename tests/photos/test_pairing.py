"""Laws of names: every file is a photo, a part of one, or left over with a reason; folders and tars agree."""

import io
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refine_control.photos.build import build
from refine_control.photos.inspect import write_page
from refine_control.photos.load import load
from refine_control.photos.pairing import pair
from refine_control.photos.sources import entries
from refine_control.records import RejectReason as R

W, H = 24, 20


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def region() -> bytes:
    mask, buffer = np.zeros((H, W), np.uint8), io.BytesIO()
    mask[5:12, 8:16] = 255
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def content(name: str) -> bytes:
    low = name.lower()
    if low.endswith(".txt"):
        return b"a thing"
    if low.endswith(".json"):
        return b'{"local_prompt": "a thing"}'
    return region() if ".mask." in low else picture(len(name) + sum(map(ord, name)))


def folder_of(path: Path, names) -> Path:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content(name))
    return path


def tar_of(path: Path, names) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content(name))
            tar.addfile(info, io.BytesIO(content(name)))
    return path


def listed(source: Path, **options):
    left_out = []
    return list(entries(source, left_out=left_out.append, **options)), left_out


STEMS = ["a", "b", "a.b", "22.05", "A", ".a", "é", unicodedata.normalize("NFD", "é"), "a mask", "_"]
ENDS = [".jpg", ".png", ".JPG", ".mask.png", ".MASK.PNG", ".mask.jpg", ".txt", ".TXT", ".json", ".xmp", "", ".jpg.bak"]
ENDS += [".cond.png", ".Cond.JPG"]
FOLDERS = ["", "sub/", "sub/deep.er/", "__MACOSX/", ".git/", "sub/.hidden/"]
names = st.lists(
    st.builds("".join, st.tuples(st.sampled_from(FOLDERS), st.sampled_from(STEMS), st.sampled_from(ENDS))),
    unique=True,
    max_size=14,
)


@given(names)
def test_every_file_is_a_photo_a_part_of_one_or_left_over(files):
    leftovers = []
    photos = list(pair(files, leftovers.append))
    images = [photo.image for photo in photos]
    parts = {part for photo in photos for part in (photo.mask, photo.condition, photo.text, photo.description) if part}
    assert sorted([*images, *parts, *(each.file for each in leftovers)]) == sorted(files)
    assert all(each.why for each in leftovers)
    assert not any(end in image.lower() for image in images for end in (".mask.", ".cond."))
    owners = {}
    for photo in photos:
        for part in filter(None, (photo.mask, photo.condition, photo.text, photo.description)):
            owners.setdefault(part, []).append(photo)
    assert all(len(photos) == 1 or all(p.ambiguity for p in photos) for photos in owners.values())


@settings(max_examples=30, deadline=None)
@given(names)
def test_folders_and_tars_agree(tmp_path_factory, files):
    place = tmp_path_factory.mktemp("agree")
    from_folder = listed(folder_of(place / "folder", files))
    from_tar = listed(tar_of(place / "tars" / "x.tar", files))

    def what(entry, prefix=""):
        mask = entry.mask and entry.mask.removeprefix(prefix)
        return entry.image.removeprefix(prefix), mask, entry.problem and entry.problem[0]

    assert sorted(map(what, from_folder[0]), key=repr) == sorted((what(e, "x.tar/") for e in from_tar[0]), key=repr)
    in_hidden = [file for file in files if any(f"{part}/" in file for part in ("__MACOSX", ".git", ".hidden"))]
    plain = {entry.image.removeprefix("x.tar/") for entry in from_tar[1]} - set(in_hidden)
    assert {entry.image for entry in from_folder[1] if (place / "folder" / entry.image).is_file()} == plain
    assert in_hidden == [] or any(not (place / "folder" / entry.image).is_file() for entry in from_folder[1])


@settings(max_examples=12, deadline=None)
@given(names, st.sampled_from(["folder", "tar", "list"]))
def test_the_counts_add_up(tmp_path_factory, files, kind):
    place = tmp_path_factory.mktemp("counts")
    good = ["good.png", "good.mask.png", "good.txt", "good.json"]
    files = [*good, *(file for file in files if not file.startswith("good"))]
    if kind == "tar":
        source = tar_of(place / "tars" / "x.tar", files)
    else:
        source = folder_of(place / "in", files)
    if kind == "list":
        rows = [{"image": file, "mask": "good.mask.png", "local_prompt": "x", "id": n} for n, file in enumerate(files)]
        (source / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, left_out = listed(source)
    summary = build(source, place / "out", size=16)
    lines = [json.loads(line) for line in (place / "out" / "rejects.jsonl").read_text().splitlines()]
    assert summary.entries == len(kept) + len(left_out) == sum(summary.samples.values()) + len(lines)
    assert all(line["reason"] and line["detail"] for line in lines)
    assert summary.rejects.get("unused", 0) == len(left_out)
    if kind == "list":
        assert len(kept) == len(files)


def test_names_with_dots_capitals_and_two_spellings_are_one_name(tmp_path):
    decomposed = unicodedata.normalize("NFD", "café")
    files = ["22.05.jpg", "22.05.mask.png", "22.05.txt", "v1.2.3.JPG", "v1.2.3.MASK.PNG", "v1.2.3.Txt"]
    files += ["café.jpg", f"{decomposed}.mask.png", f"{decomposed}.txt", "zz.png", "zz.mask.webp", "zz.json"]
    for source in (folder_of(tmp_path / "folder", files), tar_of(tmp_path / "tars" / "x.tar", files).parent):
        found, left_out = listed(source)
        masked = sorted(Path(entry.image).name for entry in found if entry.mask)
        assert masked == ["22.05.jpg", "café.jpg", "v1.2.3.JPG", "zz.png"]
        assert len(found) == 4
        assert left_out == []
        assert all(entry.problem is None for entry in found)
    assert {load(entry, 16).prompt for entry in entries(tmp_path / "folder")} == {"a thing"}


def test_a_mask_or_a_text_that_may_be_of_two_photos_is_of_none(tmp_path):
    files = ["a.jpg", "a.png", "a.mask.png", "b.jpg", "b.JPG", "b.txt", "c.jpg", "c.webp", "d.png", "d.mask.png"]
    for source in (folder_of(tmp_path / "folder", files), tar_of(tmp_path / "tars" / "x.tar", files).parent):
        found, left_out = listed(source)
        reasons = {Path(entry.image).name: entry.problem and entry.problem[0] for entry in found}
        assert reasons == {
            **dict.fromkeys(("a.jpg", "a.png", "b.jpg", "b.JPG"), R.AMBIGUOUS),
            **dict.fromkeys(("c.jpg", "c.webp", "d.png")),
        }
        for entry in found[:2]:
            assert all(name in entry.problem[1] for name in ("a.jpg", "a.png", "a.mask.png"))
        assert left_out == []
        assert len({entry.meta.get("id", entry.key) for entry in found}) == len(found)


def test_what_is_left_over_is_listed_with_its_reason(tmp_path):
    files = ["a.jpg", "a.mask.png", "a.mask.jpg", "a.txt", "orphan.mask.png", "orphan.json", "notes.docx", "._a.jpg"]
    files += ["deep/lost.txt", "deep/x.zip", ".git/a.jpg", "deep/old.tar"]
    source = folder_of(tmp_path / "in", files)
    summary = build(source, tmp_path / "out", size=16)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    told = {line["path"]: line["detail"] for line in lines}
    assert sorted(told) == sorted([*(set(files) - {"a.jpg", "a.mask.png", "a.txt", ".git/a.jpg"}), ".git"])
    for path, words in {
        "a.mask.jpg": "second mask of a.jpg",
        "orphan.mask.png": "mask without a photo orphan",
        "orphan.json": "description without a photo",
        "notes.docx": "no photo, mask, text",
        "._a.jpg": "hidden",
        ".git": "hidden folder",
        "deep/lost.txt": "text without a photo lost",
    }.items():
        assert words in told[path]
    assert (summary.entries, summary.rejects) == (len(lines) + 1, {"unused": len(lines)})
    write_page(tmp_path / "out", tmp_path / "page.html")
    assert "orphan.mask.png" in (tmp_path / "page.html").read_text()
    again = build(source, tmp_path / "out", size=16)
    assert again.did_nothing
    assert (again.entries, again.rejects) == (summary.entries, summary.rejects)


def test_readers_that_take_no_list_of_what_is_left_out_warn_once(tmp_path, caplog):
    source = folder_of(tmp_path / "in", ["a.jpg", "b.txt", "c.doc"])
    for _ in range(2):
        assert len(list(entries(source))) == 1
    (line,) = (record.getMessage() for record in caplog.records)
    assert "2 files" in line
    assert "b.txt" in line


def test_files_that_are_left_out_move_no_shard_and_use_up_no_limit(tmp_path):
    files = [f"{n}{end}" for n in range(6) for end in (".png", ".mask.png", ".txt")]
    build(folder_of(tmp_path / "plain", files), tmp_path / "a", size=16, samples_per_shard=2)
    build(folder_of(tmp_path / "more", [*files, "0.xmp", ".x", "5.doc"]), tmp_path / "b", size=16, samples_per_shard=2)
    shards = [
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*/*")} for out in (tmp_path / "a", tmp_path / "b")
    ]
    assert shards[0] == shards[1]
    assert sum(build(tmp_path / "more", tmp_path / "c", size=16, limit=3).samples.values()) == 3


def test_what_a_tar_holds_twice_or_as_a_link_is_told(tmp_path):
    path = tar_of(tmp_path / "in" / "x.tar", ["a.png", "b.png", "a.mask.png"])
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("./a.png")
        info.size = len(picture(9))
        tar.addfile(info, io.BytesIO(picture(9)))
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "b.png"
        tar.addfile(link)
    for name in ("notes.md", "sub/y.png", "x.parquet", "x_stats.json"):
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_bytes(b"")
    found, left_out = listed(path.parent)
    assert [entry.image for entry in found] == ["x.tar/a.png", "x.tar/b.png"]
    assert [entry.image for entry in left_out] == ["x.tar/a.png", "x.tar/c.png", "notes.md", "sub"]
    assert [
        next(words for words in ("later member", "links", "folder beside tars", "beside tars") if words in e.problem[1])
        for e in left_out
    ] == ["later member", "links", "beside tars", "folder beside tars"]


def test_absolute_names_in_a_tar_are_read_as_tar_extracts_them(tmp_path):
    files = ["/data/a.png", "/data/a.mask.png", "/data/a.json"]
    (entry,) = entries(tar_of(tmp_path / "x.tar", files))
    assert load(entry, 16).prompt == "a thing"


def test_a_list_may_spell_a_name_otherwise_than_the_disk(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Größe")
    folder_of(tmp_path, ["sub/Größe.png", "sub/Größe.mask.png"])
    tar_of(tmp_path / "x.tar", [f"{decomposed}.png"])
    mask = {"mask": f"sub/{decomposed}.mask.png", "local_prompt": "x"}
    rows = [{"image": f"sub/{decomposed}.png", **mask}, {"image": "sub\\Größe.png", **mask, "id": 2}]
    rows.append({"image": "x.tar/Größe.png", **mask})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [load(entry, 16).image.shape for entry in entries(tmp_path)] == [(16, 16, 3)] * 3


def test_a_name_that_is_no_utf8_is_a_photo_like_any_other(tmp_path, caplog):
    name = b"gr\xf6n".decode("utf-8", "surrogateescape")
    files = [f"{stem}{end}" for stem in (name, "a") for end in (".png", ".mask.png", ".json")] + [f"{name}.xyz"]
    try:
        folder_of(tmp_path / "in", files)
    except OSError:
        pytest.skip("this file system takes no such names")
    for source in (tmp_path / "in", tar_of(tmp_path / "tars" / "x.tar", files)):
        summary = build(source, tmp_path / f"out-{source.name}", size=16)
        assert (summary.entries, summary.rejects.get("unused")) == (3, 1)
        write_page(tmp_path / f"out-{source.name}", tmp_path / "page.html")
        assert "gr\\udcf6n" in (tmp_path / "page.html").read_text()
    assert not caplog.records


def test_rows_that_are_no_photo_are_refused_in_any_list(tmp_path):
    folder_of(tmp_path, ["a.png", "a.mask.png"])
    rows = [
        {"image": "a.mask.png", "mask": "a.mask.png", "local_prompt": "x"},
        {"image": "a.png", "mask": "./a.png", "local_prompt": "x"},
    ]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [entry.problem and entry.problem[0] for entry in entries(tmp_path)] == [R.BAD_ROW] * 2
