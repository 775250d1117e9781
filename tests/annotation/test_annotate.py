"""Regions and prompts for photographs: the same rows from every engine, after any kill, and nothing lost."""

import http.server
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from refine_control.annotation import annotator as module
from refine_control.annotation.annotate import annotate
from refine_control.annotation.annotator import Annotation, Annotator
from refine_control.annotation.engines import local, ray_actors
from refine_control.annotation.parts import PHOTOS_PER_PART, Part
from refine_control.annotation.refusals import Unanswered
from refine_control.errors import InterruptedCleanlyError, InvalidInputError, MissingError
from refine_control.photos.build import build
from refine_control.photos.decisions import append_decision, decide
from refine_control.photos.regions import decode_rle
from refine_control.photos.sources import entries, photos_of
from refine_control.records import Request
from refine_control.signals import interruptible

OFFLINE = Annotation(masks="felzenszwalb")
PHOTOS = 18  # more than one part


def paint(path: Path, number: int) -> None:
    """A disc of one colour on another ground: something that a segmentation finds."""
    draw = np.random.default_rng(number)
    image = Image.new("RGB", (96, 80), tuple(draw.integers(0, 90, 3).tolist()))
    x, y = draw.integers(20, 40, 2).tolist()
    ImageDraw.Draw(image).ellipse((x, y - 10, x + 38, y + 26), fill=tuple(draw.integers(150, 255, 3).tolist()))
    image.save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(PHOTOS):
        paint(folder / f"{number:02d}.png", number)
    (folder / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (96, 80), "gray").save(folder / "empty.png")
    return folder


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "annotations"
    return out, annotate(photos, out, OFFLINE)


def published(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()[1:]]


def test_every_photo_becomes_rows_or_a_reject(made):
    out, summary = made
    rows = rows_of(out)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {r["image"] for r in rows} == {f"{n:02d}.png" for n in range(PHOTOS)}
    assert {r["path"]: r["reason"] for r in rejects} == {"broken.png": "unreadable", "empty.png": "no_region"}
    assert (summary.photos, summary.rows, sum(summary.rejects.values())) == (PHOTOS + 2, len(rows), 2)
    assert len({r["id"] for r in rows}) == len(rows)


def test_a_row_says_what_its_region_is(made):
    for row in rows_of(made[0]):
        mask = decode_rle(row["segmentation"])
        assert mask.shape == (row["height"], row["width"]) == (80, 96)
        assert row["area_fraction"] == pytest.approx(mask.mean(), abs=1e-5)
        assert 0.05 <= mask.mean() <= 0.4
        x, y, w, h = row["bbox"]
        assert mask.sum() == mask[y : y + h, x : x + w].sum()
        assert row["mask_source"].startswith("felzenszwalb")


def test_the_result_is_a_source_of_the_same_photos(made, photos):
    found = list(entries(made[0]))
    assert [e.problem for e in found] == [None] * len(found)
    assert {e.root for e in found} == {photos.resolve()}
    assert all(e.segmentation for e in found)


def test_the_same_again_does_nothing_and_another_is_refused(made, photos):
    out, first = made
    before = published(out)
    again = annotate(photos, out, OFFLINE)
    assert again.did_nothing
    assert (again.rows, again.rejects) == (first.rows, first.rejects)
    assert published(out) == before
    with pytest.raises(InvalidInputError, match="per_photo differ"):
        annotate(photos, out, Annotation(masks="felzenszwalb", per_photo=1))
    with pytest.raises(InvalidInputError, match="no annotations"):
        annotate(photos, photos, OFFLINE)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_every_engine_gives_the_same_bytes(made, photos, tmp_path, engine):
    how = local(2) if engine == "processes" else ray_actors(1)
    annotate(photos, tmp_path / "out", OFFLINE, engine=how)
    wanted, got = published(made[0]), published(tmp_path / "out")
    assert got == wanted


def test_a_kill_loses_no_finished_part(made, photos, tmp_path):
    code = textwrap.dedent(f"""
        from pathlib import Path
        from refine_control.annotation.annotate import annotate
        from refine_control.annotation.annotator import Annotation
        def told(done, total):
            print(done, flush=True)
        source, out = Path({str(photos)!r}), Path({str(tmp_path / "out")!r})
        annotate(source, out, Annotation(masks="felzenszwalb"), progress=told)
    """)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == str(PHOTOS_PER_PART)  # the first part is there
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    done = [p.stat().st_mtime_ns for p in (tmp_path / "out" / ".parts").glob("*.json")]
    assert len(done) == 1
    time.sleep(0.01)
    seen = []
    annotate(photos, tmp_path / "out", OFFLINE, progress=lambda now, total: seen.append(now))
    assert seen == [PHOTOS_PER_PART, PHOTOS + 2]
    assert published(tmp_path / "out") == published(made[0])


class Echo:
    """A stand-in for a vision-language model: says how large the picture is, and once something doubtful."""

    name = "echo"

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def answer(self, requests):
        self.requests += requests
        return [
            json.dumps(
                {"prompt": "a highlighted mask" if number == 0 else f"a disc of {r.pictures[0].shape[1]} pixels"}
            )
            for number, r in enumerate(requests)
        ]


def test_doubtful_prompts_wait_for_a_person(photos, tmp_path, monkeypatch):
    engine = Echo()
    monkeypatch.setattr(module, "_describer", lambda chosen: engine)
    chosen = Annotation(masks="felzenszwalb", prompts="qwen", global_prompts=True, per_photo=1, limit=4)
    summary = annotate(photos, tmp_path / "out", chosen)
    rows = rows_of(tmp_path / "out")
    assert [bool(r["prompt_problems"]) for r in rows] == [True, False, False, False]
    assert summary.problems == {"talks_about_mask": 1}
    assert all(r["local_prompt_source"].startswith("echo") and r["global_prompt"] for r in rows)
    problems = [e.problem[0].value if e.problem else None for e in entries(tmp_path / "out")]
    assert problems == ["needs_review", None, None, None]
    decided = {"id": rows[0]["id"], "action": "edit", "prompt": "a bright disc", "reviewer": "eve"}
    line = json.dumps({**decided, "time": "2026-01-01T00:00:00+00:00"})
    (tmp_path / "out" / "decisions.jsonl").write_text(line + "\n")
    settled = next(entries(tmp_path / "out"))
    assert (settled.problem, settled.prompt) == (None, "a bright disc")
    built = build(tmp_path / "out", tmp_path / "shards", size=32, test_fraction=0.25, unlabeled_fraction=0.5)
    assert sum(built.samples.values()) == 4


def test_all_regions_of_a_photo_get_its_global_prompt_and_none_a_prompt_that_was_of_another_region(
    photos, tmp_path, monkeypatch
):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(photos / "00.png", source)
    (source / "00.txt").write_text("what the given region showed")
    engine = Echo()
    monkeypatch.setattr(module, "_describer", lambda chosen: engine if chosen.prompts == "qwen" else None)
    annotate(source, tmp_path / "given", Annotation(masks="felzenszwalb", min_area=0.01, max_area=0.9))
    rows = rows_of(tmp_path / "given")
    assert len(rows) == 2
    assert not any("local_prompt" in row for row in rows)
    chosen = Annotation(masks="felzenszwalb", prompts="qwen", global_prompts=True, min_area=0.01, max_area=0.9)
    annotate(source, tmp_path / "told", chosen)
    assert len({row["global_prompt"] for row in rows_of(tmp_path / "told")}) == 1
    assert sum(request.whole for request in engine.requests) == 1


def test_given_regions_stay_as_they_are(photos, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(2):
        paint(source / f"{number}.png", number)
        mask = np.zeros((80, 96), np.uint8)
        mask[20:50, 30:60] = 255
        Image.fromarray(mask).save(source / f"{number}.mask.png")
        (source / f"{number}.txt").write_text(f"disc {number}")
    work = Annotator(Annotation())
    part = Part(0, list(photos_of(entries(source))), [0, 1], 2)
    rows = [row for photo in work(part).photos if photo for row in photo.rows]
    assert [(r["mask"], r["local_prompt"], r["bbox"]) for r in rows] == [
        ("0.mask.png", "disc 0", [30, 20, 30, 30]),
        ("1.mask.png", "disc 1", [30, 20, 30, 30]),
    ]


# A fault of one photo is not a fault of the run


class Picky:
    """A describer that refuses questions, by their number, or ends the run at one of them."""

    name = "picky"

    def __init__(self, refused=(), ends_at=None) -> None:
        self.refused, self.ends_at, self.asked = set(refused), ends_at, 0

    def answer(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        self.asked += 1
        if self.ends_at is not None and self.asked > self.ends_at:
            return Unanswered("gone", MissingError("no server answers"))
        if self.asked - 1 in self.refused:
            return Unanswered("the server refuses it (400: content policy)")
        return json.dumps({"prompt": f"a disc of grey {request.pictures[0].mean():.3f}"})


def described(source: Path, out: Path, monkeypatch, engine, **options):
    """An annotation of given regions by `engine`."""
    monkeypatch.setattr(module, "_describer", lambda chosen: engine)
    return annotate(source, out, Annotation(prompts="qwen"), **options)


def rejects_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def test_a_refused_photo_is_named_and_the_others_are_kept(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    summary = described(source, out, monkeypatch, Picky({3}))
    (reject,) = rejects_of(out)
    assert (reject["path"], reject["reason"]) == ("03.png", "model_failed")
    assert "content policy" in reject["detail"]
    assert len(rows_of(out)) == PHOTOS - 1
    assert all(row["local_prompt"].startswith("a disc of grey") for row in rows_of(out))
    assert (summary.photos, summary.rejects) == (PHOTOS, {"model_failed": 1})
    assert "--retry-failed" in str(summary)
    engine = Picky()
    assert described(source, out, monkeypatch, engine).did_nothing
    assert engine.asked == 0


def test_a_retry_asks_for_the_refused_photos_alone_and_gives_what_a_good_run_gives(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    described(source, out, monkeypatch, Picky({3, 17}))
    decided = rows_of(out)[4]["id"]
    decide_on(out, decided)
    assert described(source, out, monkeypatch, Picky({1}), retry_failed=True).rejects == {"model_failed": 1}
    engine = Picky()
    summary = described(source, out, monkeypatch, engine, retry_failed=True)
    assert (engine.asked, summary.changed, summary.void_decisions, summary.rejects) == (1, 0, 0, {})
    described(source, tmp_path / "fresh", monkeypatch, Picky())
    assert published(tmp_path / "fresh") == {n: b for n, b in published(out).items() if n != "decisions.jsonl"}
    assert described(source, out, monkeypatch, Picky(), retry_failed=True).did_nothing


def test_a_retry_leaves_the_other_rows_of_its_photo_as_they_are(photos, tmp_path, monkeypatch):
    out, chosen = tmp_path / "out", Annotation(masks="felzenszwalb", prompts="qwen", min_area=0.01, max_area=0.9)
    monkeypatch.setattr(module, "_describer", lambda chosen: Picky({1}))
    source = tmp_path / "one"
    source.mkdir()
    shutil.copy(photos / "00.png", source)
    annotate(source, out, chosen)
    (kept,) = rows_of(out)
    monkeypatch.setattr(module, "_describer", lambda chosen: Echo())  # which says other words
    annotate(source, out, chosen, retry_failed=True)
    assert rows_of(out)[0] == kept
    assert [row["local_prompt_source"].split(",")[0] for row in rows_of(out)] == ["picky", "echo"]


def test_what_was_answered_before_the_server_was_gone_is_not_asked_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(MissingError, match="no server"):
        described(source, out, monkeypatch, Picky({3}, ends_at=7))
    assert not (out / "manifest.jsonl").exists()
    engine = Picky()
    described(source, out, monkeypatch, engine)
    assert engine.asked == PHOTOS - 7
    assert [reject["path"] for reject in rejects_of(out)] == ["03.png"]


def test_a_photo_with_broken_pixels_costs_itself(source, tmp_path, monkeypatch):
    path = source / "05.jpg"
    Image.open(source / "05.png").save(path)
    (source / "05.png").unlink()
    path.write_bytes(path.read_bytes()[:-300])  # the header, all that a given mask needs, can be read
    described(source, tmp_path / "out", monkeypatch, Picky())
    assert [(reject["path"], reject["reason"]) for reject in rejects_of(tmp_path / "out")] == [("05.jpg", "truncated")]
    assert len(rows_of(tmp_path / "out")) == PHOTOS - 1


def test_what_people_refused_stays_refused_and_a_doubtful_prompt_is_written_anew(source, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    again(source, first)
    rows = (first / "manifest.jsonl").read_text().splitlines()
    rows[3] = json.dumps({**json.loads(rows[3]), "prompt_problems": ["repeats"]})
    (first / "manifest.jsonl").write_text("".join(f"{row}\n" for row in rows))
    append_decision(first / "decisions.jsonl", decide(rows_of(first)[0]["id"], "reject", "eve"))
    described(first, second, monkeypatch, Picky())
    assert [(reject["path"], reject["reason"]) for reject in rejects_of(second)] == [("00.png", "review_rejected")]
    assert len(rows_of(second)) == PHOTOS - 1
    monkeypatch.setattr(module, "_describer", lambda chosen: None)
    annotate(first, tmp_path / "third", Annotation())  # the doubtful prompt would stay
    assert [reject["reason"] for reject in rejects_of(tmp_path / "third")] == ["review_rejected", "needs_review"]


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize("error", [OutOfMemoryError("CUDA out of memory"), RuntimeError("shape mismatch")], ids=str)
def test_a_photo_on_which_the_segmenter_fails_costs_itself(photos, tmp_path, monkeypatch, error):
    real = module._proposer(OFFLINE)

    def fails(image):
        if broken(image):
            raise error
        return real(image)

    monkeypatch.setattr(module, "_proposer", lambda chosen: fails)
    broken = lambda image: image.shape == (80, 96, 3) and image[0, 0, 0] == first  # noqa: E731
    first = np.asarray(Image.open(photos / "01.png"))[0, 0, 0]
    annotate(photos, tmp_path / "out", Annotation(masks="felzenszwalb", limit=4))
    (reject,) = rejects_of(tmp_path / "out")
    assert (reject["path"], reject["reason"]) == ("01.png", "model_failed")
    assert {row["image"] for row in rows_of(tmp_path / "out")} == {"00.png", "02.png", "03.png"}
    broken = lambda image: True  # noqa: E731
    kind = InvalidInputError if isinstance(error, OutOfMemoryError) else RuntimeError
    with pytest.raises(kind, match=r"not even with one small picture|shape mismatch"):
        annotate(photos, tmp_path / "none", Annotation(masks="felzenszwalb", limit=4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_server_is_silent_ends_the_run_and_keeps_what_is_finished(
    source, tmp_path, monkeypatch, number
):
    released, asked = threading.Event(), []
    answer = json.dumps({"choices": [{"message": {"content": json.dumps({"prompt": "a bright disc"})}}]}).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(1)
            if len(asked) == PHOTOS_PER_PART + 1 and not released.is_set():
                os.kill(os.getpid(), number)
                released.wait(60)
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    before = signal.signal(number, signal.default_int_handler)  # whoever started the tests may ignore it
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def serve(port):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads = False  # closing it waits for the requests that it has taken
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(server):
        released.set()
        server.shutdown()
        server.server_close()

    server = serve(0)
    chosen = Annotation(prompts="server", server=f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(InterruptedCleanlyError, match=signal.Signals(number).name), interruptible():
            annotate(source, tmp_path / "out", chosen)
        assert not released.is_set()
        assert len(list((tmp_path / "out" / ".parts").glob("*.json"))) == 1
        close(server)  # with it go the requests that were still on their way
        asked.clear()
        server = serve(server.server_port)
        annotate(source, tmp_path / "out", chosen)
        assert len(asked) == PHOTOS - PHOTOS_PER_PART
    finally:
        close(server)
        signal.signal(number, before)


def test_a_signal_ends_the_parts_that_workers_are_doing(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def stop():
        fifo.read_text()  # returns when a worker is in the middle of its part
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(InterruptedCleanlyError), interruptible():
        list(local(2)(iter([f"echo > {fifo}; exec sleep 100"]), partial(partial, subprocess.run, shell=True)))
    assert time.monotonic() - began < 90
    assert multiprocessing.active_children() == []


def test_a_source_without_photos_is_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InvalidInputError, match="no photo was found"):
        annotate(tmp_path / "nothing", tmp_path / "out", OFFLINE)


# A photo that changes under its name


@pytest.fixture
def source(tmp_path):
    """Photos with given regions, more than one part: cheap to annotate."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(PHOTOS):
        name = folder / f"{number:02d}.png"
        paint(name, number)
        mask = np.zeros((80, 96), np.uint8)
        mask[20:50, 30 : 60 + number] = 255
        Image.fromarray(mask).save(name.with_suffix(".mask.png"))
        name.with_suffix(".txt").write_text(f"disc {number}")
    return folder


class Watched:
    """The local engine, which notes the photos it is given; may break off as a kill would, before a part."""

    def __init__(self, parts: int = 99) -> None:
        self.parts, self.photos = parts, []

    def __call__(self, parts, make_worker):
        for count, (part, result) in enumerate(local()(parts, make_worker)):
            if count == self.parts:
                raise KeyboardInterrupt
            self.photos += [group[0].image for group in part.photos]
            yield part, result


def again(source: Path, out: Path, parts: int = 99):
    engine = Watched(parts)
    return annotate(source, out, Annotation(), engine=engine), engine.photos


def decide_on(out: Path, *ids: str) -> None:
    for id in ids:
        append_decision(out / "decisions.jsonl", decide(id, "edit", "eve", "what eve saw"))


@pytest.mark.parametrize("suffix", [".png", ".mask.png"])
def test_a_changed_photo_is_annotated_anew_and_keeps_no_decision(source, tmp_path, suffix):
    out = tmp_path / "out"
    again(source, out)
    before = {row["image"]: row for row in rows_of(out)}
    decide_on(out, before["03.png"]["id"], before["05.png"]["id"])
    shutil.copy(source / f"07{suffix}", source / f"03{suffix}")  # another content under the same name
    summary, done = again(source, out)
    assert done == ["03.png"]
    assert (summary.changed, summary.void_decisions, summary.did_nothing) == (1, 1, False)
    assert "1 photos had changed, 1 decisions on them no longer count" in str(summary)
    after = {row["image"]: row for row in rows_of(out)}
    assert {image for image in before if before[image] != after[image]} == {"03.png"}
    prompts = {entry.image: entry.prompt for entry in entries(out)}
    assert (prompts["03.png"], prompts["05.png"]) == ("disc 3", "what eve saw")
    annotate(source, tmp_path / "fresh", Annotation())
    assert published(tmp_path / "fresh") == {n: b for n, b in published(out).items() if n != "decisions.jsonl"}
    assert again(source, out)[0].did_nothing


def test_a_photo_that_comes_back_finds_its_decision_again(source, tmp_path):
    out, first = tmp_path / "out", (source / "03.png").read_bytes()
    again(source, out)
    decide_on(out, *(row["id"] for row in rows_of(out) if row["image"] == "03.png"))
    for content, prompt in (((source / "07.png").read_bytes(), "disc 3"), (first, "what eve saw")):
        (source / "03.png").write_bytes(content)
        again(source, out)
        assert [entry.prompt for entry in entries(out) if entry.image == "03.png"] == [prompt]


def test_new_times_of_the_same_bytes_cost_one_reading(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    again(source, out)
    rows = (out / "manifest.jsonl").read_bytes()
    os.utime(source / "03.png", (1, 1))
    summary, done = again(source, out)
    assert (summary.did_nothing, summary.changed, done) == (True, 0, [])
    monkeypatch.setattr("refine_control.annotation.parts.contents", None)  # nothing is read any more
    assert again(source, out)[0].did_nothing
    assert (out / "manifest.jsonl").read_bytes() == rows


def test_a_photo_that_changes_between_a_kill_and_the_next_run(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        again(source, out, parts=1)
    shutil.copy(source / "07.png", source / "03.png")
    done = again(source, out)[1]
    assert done == ["03.png", *(f"{number:02d}.png" for number in range(PHOTOS_PER_PART, PHOTOS))]
    annotate(source, tmp_path / "fresh", Annotation())
    assert published(out) == published(tmp_path / "fresh")


def test_a_kill_while_changed_photos_are_annotated(source, tmp_path):
    out = tmp_path / "out"
    again(source, out)
    before = published(out)
    for name in ("03.png", f"{PHOTOS_PER_PART:02d}.png"):  # one of each part
        shutil.copy(source / "07.png", source / name)
    with pytest.raises(KeyboardInterrupt):
        again(source, out, parts=1)
    assert {name: (out / name).read_bytes() for name in before} == before  # what was published still is
    assert again(source, out)[1] == [f"{PHOTOS_PER_PART:02d}.png"]
    annotate(source, tmp_path / "fresh", Annotation())
    assert published(out) == published(tmp_path / "fresh")


def test_an_annotation_whose_marks_are_lost_is_refused(source, tmp_path):
    out = tmp_path / "out"
    again(source, out)
    marks = (out / "photos.jsonl").read_text().splitlines(keepends=True)
    for left in (marks[:-1], ["{}\n"] * PHOTOS, None):
        (out / "photos.jsonl").unlink()
        if left is not None:
            (out / "photos.jsonl").write_text("".join(left))
        with pytest.raises(InvalidInputError, match=r"photos\.jsonl.*annotate again"):
            again(source, out)
