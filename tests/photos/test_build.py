"""Laws of `data build`: counts add up, no photograph straddles roles, shares are hit, and killing changes no byte."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refine_control.errors import DamagedError, InUseError, InvalidInputError, WorkerDiedError
from refine_control.photos.build import build
from refine_control.photos.inspect import contact_sheet, inspect
from refine_control.photos.shards import read_shards, verify
from refine_control.photos.survey import split
from refine_control.records import ROLES
from refine_control.storage import only_writer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "photos"
W, H, S = 24, 20, 16
PHOTOS = 12
CHOSEN = {"size": S, "samples_per_shard": 4, "seed": 1}


@pytest.fixture
def source(tmp_path):
    """A manifest of 12 photos with two masks each, and five rows that cannot be used."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = []
    for number in range(PHOTOS):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (H, W, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
        for which in range(2):
            mask = np.zeros((H, W), np.uint8)
            mask[4 + 6 * which : 9 + 6 * which, 5:15] = 255
            Image.fromarray(mask).save(folder / f"{number}-{which}.mask.png")
            names = {"id": f"{number}-{which}", "image": f"{number}.png", "mask": f"{number}-{which}.mask.png"}
            rows.append({**names, "local_prompt": f"thing {number}", "source": "noise", "license": "CC0"})
    (folder / "broken.png").write_bytes((folder / "3.png").read_bytes()[:200])
    bad = [{"image": "broken.png"}, {"image": "gone.png"}, {"mask": "gone.png"}, {"local_prompt": ""}, {"image": 3}]
    rows[5:5] = [{**rows[0], "id": f"bad {n}", **each} for n, each in enumerate(bad)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def roles(out: Path) -> dict[str, set[str]]:
    """Photos by role."""
    return {role: {photo.meta["photo"] for photo in read_shards(out / role)} for role in ROLES}


def test_counts_add_up_and_every_reject_has_a_line(source, tmp_path):
    calls = []
    summary = build(source, tmp_path / "out", progress=lambda done, total: calls.append((done, total)), **CHOSEN)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert summary.entries == 2 * PHOTOS + 5 == sum(summary.samples.values()) + len(lines)
    assert [line["reason"] for line in lines] == ["truncated", "unreadable", "no_mask", "no_prompt", "bad_row"]
    assert all(line["key"] and line["detail"] for line in lines)
    assert lines[0]["path"] == "broken.png"
    assert str(tmp_path) not in json.dumps(lines)
    assert summary.rejects == {line["reason"]: 1 for line in lines}
    assert sum(summary.photos.values()) == PHOTOS
    assert calls == [(n + 1, summary.entries) for n in range(summary.entries)]
    assert "29 entries -> 24 samples" in str(summary)
    assert "truncated 1" in str(summary)
    assert verify(tmp_path / "out") == []
    found = inspect(tmp_path / "out")
    assert {role: found["roles"][role]["samples"] for role in ROLES} == summary.samples
    contact_sheet(tmp_path / "out", tmp_path / "sheet.png", count=9)
    assert Image.open(tmp_path / "sheet.png").size[0] > 300


def test_two_builds_have_the_same_bytes_and_a_second_one_does_nothing(source, tmp_path):
    first = build(source, tmp_path / "a", **CHOSEN)
    shutil.copytree(source, tmp_path / "moved")  # other place, other mtimes
    build(tmp_path / "moved", tmp_path / "b", **CHOSEN)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.name != ".lock"}
    again = build(source, tmp_path / "a", **CHOSEN)
    assert again.did_nothing
    assert not first.did_nothing
    assert "nothing to do" in str(again)
    assert (again.samples, again.rejects, again.photos) == (first.samples, first.rejects, first.photos)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.name != ".lock"}


def test_a_build_of_a_version_that_did_not_count_what_is_left_out_is_done(tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (H, W, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
        Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 6)[:H, :]).resize((W, H)).save(
            folder / f"{number}.mask.png"
        )
        (folder / f"{number}.txt").write_text(f"thing {number}")
    (folder / "stray.md").touch()
    first = build(folder, out, **CHOSEN)
    assert (first.entries, first.rejects) == (4, {"unused": 1})
    written = json.loads((out / "build.json").read_text())
    (out / "build.json").write_text(json.dumps({**written, "entries": 3}))
    before = tree(out)
    assert build(folder, out, **CHOSEN).did_nothing
    (folder / "another.md").touch()  # no shard depends on it
    assert build(folder, out, **CHOSEN).did_nothing
    assert tree(out) == before
    (folder / "0.txt").write_text("another thing")
    with pytest.raises(InvalidInputError, match="the content of the source"):
        build(folder, out, **CHOSEN)


def test_the_split_is_by_photo_whatever_the_rows_call_it(source, tmp_path):
    rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
    for number in range(PHOTOS):  # the same pixels once more: by another name, by another id, by another spelling
        shutil.copy(source / f"{number}.png", source / f"copy of {number}.png")
        mask = f"{number}-0.mask.png"
        new = {"mask": mask, "local_prompt": "x", "truth": number}
        rows.append({**new, "id": f"c{number}", "image": f"copy of {number}.png"})
        rows.append({**new, "id": f"d{number}", "image": f"./{number}.png", "source": "q", "source_image_id": number})
        rows.append({**new, "id": f"e{number}", "image": f"{number}.png", "source": "r", "source_image_id": -number})
    (source / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(3):
        out = tmp_path / f"out {seed}"
        summary = build(source, out, **{**CHOSEN, "seed": seed})
        held = {role: list(read_shards(out / role)) for role in ROLES}
        truths = {role: {p.meta.get("truth", p.prompt.removeprefix("thing ")) for p in held[role]} for role in ROLES}
        truths = {role: set(map(str, numbers)) for role, numbers in truths.items()}
        assert sum(map(len, truths.values())) == len(set().union(*truths.values())) == PHOTOS
        assert sum(summary.photos.values()) == PHOTOS
        assert sum(summary.samples.values()) == 5 * PHOTOS


def test_one_mask_for_several_photographs_of_a_list_is_told(source, tmp_path, caplog):
    build(source, tmp_path / "plain", **CHOSEN)
    assert "mask" not in caplog.text
    rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
    shutil.copy(source / "1.png", source / "copy.png")
    rows.append({"image": "copy.png", "mask": "./1-0.mask.png", "local_prompt": "a copy, as one photograph"})
    (source / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(source, tmp_path / "copy", **CHOSEN)
    assert "mask" not in caplog.text
    rows.append({"image": "2.png", "mask": "1-0.mask.png", "local_prompt": "x"})
    (source / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(source, tmp_path / "shared", **CHOSEN)
    assert "first for 1.png and 2.png" in caplog.text


def test_shares_are_hit_to_the_nearest_photo():
    for count in (0, 1, 2, 7, 29, 100, 371):
        for test_fraction, unlabeled_fraction in ((0.2, 0.5), (0.0, 0.0), (1.0, 0.5), (0.1, 1.0), (0.37, 0.11)):
            found = split((f"photo {n}" for n in range(count)), 3, test_fraction, unlabeled_fraction)
            assert len(found) == count
            held = Counter(found.values())
            assert abs(held["test"] - test_fraction * count) <= 0.5
            assert abs(held["unlabeled"] - unlabeled_fraction * (count - held["test"])) <= 0.5


def test_roles_are_a_function_of_the_seed_and_the_set():
    names = [f"photo {n}" for n in range(1000)]
    found = split(names, 0, 0.2, 0.5)
    assert found == split(reversed(names + names), 0, 0.2, 0.5)
    other = split(names, 1, 0.2, 0.5)
    agreeing = sum(found[name] == other[name] for name in names) / 1000
    assert abs(agreeing - (0.2**2 + 2 * 0.4**2)) < 0.06  # as chance has it
    larger = split(names, 0, 0.4, 0.5)
    assert all(larger[name] == "test" for name in names if found[name] == "test")
    grown = split([*names, *(f"new {n}" for n in range(1000))], 0, 0.2, 0.5)
    moved = [name for name in names if grown[name] != found[name]]
    assert len(moved) < 2 * 1000**0.5  # only those near the two borders
    order = {"test": 0, "unlabeled": 1, "labeled": 2}
    assert all(abs(order[grown[name]] - order[found[name]]) == 1 for name in moved)


def scenery(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A soft landscape of blobs: what a photograph is to a perceptual hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def put(folder: Path, name: str, image: Image.Image, **options) -> None:
    """A photo with a mask in its middle and a prompt."""
    image.save(folder / name, **options)
    mask = Image.new("L", image.size)
    mask.paste(255, (image.width // 3, image.height // 3, image.width // 2, image.height // 2))
    stem = Path(name).stem
    mask.save(folder / f"{stem}.mask.png")
    (folder / f"{stem}.txt").write_text("a thing")


def test_near_duplicates_are_one_photograph_and_flat_ones_are_not(tmp_path):
    folder = tmp_path / "near"
    folder.mkdir()
    for number in range(10):
        whole = scenery(number)
        put(folder, f"{number} a.png", whole)
        put(folder, f"{number} b.jpg", whole.resize((100, 75), Image.Resampling.LANCZOS), quality=60)
        put(folder, f"{number} c.jpg", whole.convert("L"), quality=80)
        put(folder, f"flat {number}.png", Image.new("RGB", (64 + number, 64), (20 * number, 90, 90)))
    for seed in range(3):
        out = tmp_path / f"out {seed}"
        summary = build(folder, out, **{**CHOSEN, "seed": seed})
        assert summary.photos == {"labeled": 8, "unlabeled": 8, "test": 4}  # of 10 photographs and 10 flat ones
        held = roles(out)
        assert {name for names in held.values() for name in names if not name.startswith("flat")} == {
            f"{number} a.png" for number in range(10)
        }
        counted = Counter(photo.meta["photo"] for role in ROLES for photo in read_shards(out / role))
        assert set(counted.values()) == {1, 3}


def test_every_count_of_workers_gives_the_same_bytes_and_a_dead_one_is_told(source, tmp_path):
    build(source, tmp_path / "one", **CHOSEN)
    build(source, tmp_path / "two", workers=2, **CHOSEN)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")

    def murder(done, total):
        if done == 9:
            for child in multiprocessing.active_children():
                child.kill()
                child.join()

    with pytest.raises(WorkerDiedError, match="same command again"):
        build(source, tmp_path / "killed", workers=2, progress=murder, **CHOSEN)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert list((tmp_path / "killed").glob(".parts/*.json"))
    build(source, tmp_path / "killed", **CHOSEN)
    assert tree(tmp_path / "killed") == tree(tmp_path / "one")
    with pytest.raises(InvalidInputError, match="workers"):
        build(source, tmp_path / "none", workers=0, **CHOSEN)
    assert not (tmp_path / "none").exists()


ORPHANS = """
    import multiprocessing, os, signal, sys
    from pathlib import Path
    from refine_control.photos.build import build

    def killed(done, total):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    build(Path(sys.argv[1]), Path(sys.argv[2]), size=16, workers=2, progress=killed)
"""


def test_workers_leave_with_a_parent_that_is_killed(source, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(ORPHANS), str(source), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    # the pipe of the output is closed only when the last worker that inherited it is gone
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert len(run.stdout.split()) == 2


def test_what_people_decided_reaches_the_shards(source, tmp_path):
    from refine_control.photos.decisions import ACCEPT, EDIT, REJECT, append_decision, decide

    for number in range(PHOTOS):
        append_decision(source / "decisions.jsonl", decide(f"{number}-0", REJECT, "ann"))
        append_decision(source / "decisions.jsonl", decide(f"{number}-1", EDIT, "ann", f"mended {number}"))
    append_decision(source / "decisions.jsonl", decide("3-0", ACCEPT, "ann"))
    summary = build(source, tmp_path / "out", **CHOSEN)
    assert summary.rejects["review_rejected"] == PHOTOS - 1
    assert sum(summary.photos.values()) == PHOTOS
    prompts = {photo.meta["id"]: photo.prompt for role in ROLES for photo in read_shards(tmp_path / "out" / role)}
    assert prompts == {"3-0": "thing 3", **{f"{number}-1": f"mended {number}" for number in range(PHOTOS)}}
    append_decision(source / "decisions.jsonl", decide("4-1", REJECT, "ann"))
    with pytest.raises(InvalidInputError, match="content of the source"):
        build(source, tmp_path / "out", **CHOSEN)


KILLED = """
    import itertools, os, signal, sys
    from pathlib import Path
    from refine_control.photos.build import build
    source, outs = Path(sys.argv[1]), Path(sys.argv[2])

    def child(kind, stop):  # kills itself at the stop-th entry, or in front of the stop-th publication of anything
        calls, replace = itertools.count(1), Path.replace
        die = lambda *_: next(calls) == stop and os.kill(os.getpid(), signal.SIGKILL)
        if kind == "rename":
            Path.replace = lambda self, to: (die(), replace(self, to))[1]
        build(source, outs / f"{kind} {stop}", size=16, samples_per_shard=4, seed=1,
              progress=die if kind == "entry" else None)

    for kind, stops in (("entry", (1, 14, 29)), ("rename", itertools.chain((1, 2), itertools.count(3, 2)))):
        for stop in stops:
            pid = os.fork()
            if not pid:
                child(kind, stop)
                os._exit(0)
            if os.WIFEXITED(os.waitpid(pid, 0)[1]):
                break
"""


def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(source, tmp_path):
    build(source, tmp_path / "whole", **CHOSEN)
    expected = tree(tmp_path / "whole")
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(source), str(tmp_path / "outs")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    subprocess.run(script, env=environment, capture_output=True, check=True, timeout=100)
    outs = sorted((tmp_path / "outs").iterdir())
    unfinished = [out for out in outs if not (out / "manifest.json").exists()]
    assert len(unfinished) == len(outs) - 1 > 10  # all but the one that had fewer renames than its stop
    reused = 0
    for out in unfinished:
        shards = {path: path.stat().st_ino for path in out.rglob("*.tar")}
        parts = len(list(out.glob(".parts/*.json")))
        assert not build(source, out, **CHOSEN).did_nothing
        assert tree(out) == expected, out.name
        kept = sum(path.stat().st_ino == number for path, number in shards.items())
        assert kept >= min(parts, len(shards)), out.name  # what was finished is not made again
        reused += kept
    assert reused > 20


def test_a_shard_damaged_before_the_build_went_on_is_made_again(source, tmp_path):
    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    build(source, tmp_path / "whole", **CHOSEN)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out", progress=stop, **CHOSEN)
    first, second, *_ = sorted((tmp_path / "out").rglob("*.tar"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    build(source, tmp_path / "out", **CHOSEN)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_another_build_into_the_folder_is_refused_and_changes_nothing(source, tmp_path):
    out = tmp_path / "out"
    build(source, out, **CHOSEN)
    before = tree(out)
    with pytest.raises(InvalidInputError, match=r"seed \(1 there, 2 now\)"):
        build(source, out, **{**CHOSEN, "seed": 2})
    with pytest.raises(InvalidInputError, match="image_format"):
        build(source, out, **CHOSEN, image_format="png")
    mask = np.asarray(Image.open(source / "2-0.mask.png")).copy()
    mask[0, 0] = 255
    Image.fromarray(mask).save(source / "2-0.mask.png")
    with pytest.raises(InvalidInputError, match="content of the source"):
        build(source, out, **CHOSEN)
    assert tree(out) == before


def test_what_is_refused_leaves_nothing_behind(source, tmp_path):
    with pytest.raises(InvalidInputError, match="does not exist"):
        build(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="no photo"):
        build(tmp_path / "empty", tmp_path / "out")
    for wrong in ({"size": 63}, {"size": 0}, {"test_fraction": 1.1}, {"unlabeled_fraction": -0.1}, {"limit": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            build(source, tmp_path / "out", **wrong)
    with pytest.raises(InvalidInputError, match="image_format"):
        build(source, tmp_path / "out", image_format="bmp")
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(InvalidInputError, match=r"letter\.txt"):
        build(source, tmp_path / "other", **CHOSEN)
    assert tree(tmp_path / "other") == {"letter.txt": b"dear"}
    with only_writer(tmp_path / "busy"), pytest.raises(InUseError):
        build(source, tmp_path / "busy", **CHOSEN)


def test_all_rejected_says_how_many_and_why(source, tmp_path):
    for _ in range(2):
        with pytest.raises(InvalidInputError, match=r"all 29 entries.*bad_row 1.*too_small 26"):
            build(source, tmp_path / "out", **{**CHOSEN, "size": 64})
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 29


def test_the_limit_takes_the_first_entries(source, tmp_path):
    build(source, tmp_path / "all", **CHOSEN)
    summary = build(source, tmp_path / "some", **CHOSEN, limit=9)
    assert summary.entries == 9
    assert sum(summary.samples.values()) == 5
    assert summary.photos == {"test": 1, "unlabeled": 1, "labeled": 1}  # 3 photographs: 0.6, and 1 of the other two
    every = set().union(*roles(tmp_path / "all").values())
    assert set().union(*roles(tmp_path / "some").values()) < every


def test_a_build_that_lost_a_shard_is_not_called_done(source, tmp_path):
    build(source, tmp_path / "out", **CHOSEN)
    victim = sorted((tmp_path / "out").rglob("*.tar"))[0]
    victim.write_bytes(victim.read_bytes()[:-512])
    assert any(victim.name in problem for problem in verify(tmp_path / "out"))
    with pytest.raises(DamagedError, match=victim.name):
        build(source, tmp_path / "out", **CHOSEN)


def test_shared_photos(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("shared/photos is not there")
    summary = build(SHARED, tmp_path / "out", size=64, limit=60)
    assert (summary.entries, summary.rejects) == (60, {})
    assert verify(tmp_path / "out") == []
    for role in ROLES:
        for photo in read_shards(tmp_path / "out" / role):
            assert photo.image.shape == (64, 64, 3)
            assert 0.02 < photo.mask.mean() < 0.65
            assert photo.prompt
            assert photo.meta["license"]
