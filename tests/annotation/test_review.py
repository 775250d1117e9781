"""Laws of the review: what the page is told, who may speak to it, and that decisions are on the disk before shown."""

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from refine_control.annotation import review_state
from refine_control.annotation.review import SECRET_NAME, make_app, serve
from refine_control.annotation.review_rows import LONGEST, load_view, read_rows
from refine_control.errors import InvalidInputError, MissingError
from refine_control.local_server import stopped_by_signal
from refine_control.photos.decisions import ACCEPT, EDIT, REJECT, append_decision, by_reviewer, decide, read_decisions
from refine_control.photos.regions import encode_rle

W, H = 60, 40
HERE = "http://127.0.0.1"
MASK = np.zeros((H, W), bool)
MASK[10:30, 20:40] = True


@pytest.fixture
def folder(tmp_path):
    """Six rows: photos apart from the manifest, masks as files and as run lengths, one photo that is none."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (H, W, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
        rows.append(
            {"id": f"r{number}", "image": f"{number}.png", "local_prompt": f"thing {number}", "source": "noise"}
        )
        rows[-1] |= {"segmentation": encode_rle(MASK), "predicted_iou": 1 - number / 10, "segment_id": number}
    Image.fromarray(MASK).save(photos / "mask.png")
    rows[1] |= {"mask": "mask.png", "segmentation": None}
    rows[2] |= {"prompt_problems": ["no noun", "too long"], "predicted_iou": None}
    (photos / "5.png").write_bytes(b"no image")
    made = tmp_path / "made"
    made.mkdir()
    write_rows(made, rows, {"root": str(photos)})
    return made


def write_rows(folder: Path, rows: list[dict], header: dict | None = None) -> None:
    lines = [header, *rows] if header else rows
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def client_of(folder: Path, reviewer: str | None = None, **options) -> TestClient:
    return TestClient(make_app(review_state.Review(folder, reviewer), **options), base_url=HERE)


def post(client: TestClient, id: str, action: str, reviewer: str = "ann", prompt: str | None = None):
    return client.post("/api/decide", json={"id": id, "action": action, "reviewer": reviewer, "prompt": prompt})


# Rows and pictures


def test_rows_are_as_before_anybody_decided(folder):
    before = read_rows(folder)
    append_decision(folder / "decisions.jsonl", decide("r0", REJECT, "ann"))
    append_decision(folder / "decisions.jsonl", decide("r1", EDIT, "ann", "mended"))
    assert read_rows(folder) == before
    assert [row.entry.prompt for row in before] == [f"thing {number}" for number in range(6)]
    assert [row.problems for row in before] == [(), (), ("no noun", "too long"), (), (), ()]
    assert [row.scores.get("predicted_iou") for row in before] == [1, 0.9, None, 0.7, 0.6, 0.5]
    assert all("segment_id" not in row.scores for row in before)


def test_rows_without_a_photo_or_said_twice_are_left_out_and_one_id_for_two_is_refused(folder):
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    write_rows(folder, [*rows[1:], {"id": "bare"}, rows[1]], rows[0])
    assert [row.id for row in read_rows(folder)] == [f"r{number}" for number in range(6)]
    write_rows(folder, [*rows[1:], {**rows[2], "id": "r0"}], rows[0])
    with pytest.raises(InvalidInputError, match=r"two rows .* have the id 'r0'"):
        read_rows(folder)
    write_rows(folder, [{"id": "bare"}])
    with pytest.raises(InvalidInputError, match="no row to review"):
        read_rows(folder)
    with pytest.raises(InvalidInputError, match=r"no manifest\.jsonl"):
        read_rows(folder.parent)


def test_pictures_are_small_enough_and_never_enlarged(tmp_path):
    mask = np.zeros((1500, 2000), bool)
    mask[500:700, 1000:1400] = True
    Image.fromarray(np.full((1500, 2000, 3), 90, np.uint8)).save(tmp_path / "a.jpg")
    write_rows(tmp_path, [{"id": "a", "image": "a.jpg", "segmentation": encode_rle(mask), "local_prompt": "x"}])
    entry = read_rows(tmp_path)[0].entry
    whole, close = load_view(entry), load_view(entry, close=True)
    assert whole.size == (LONGEST, 768)
    assert close.size == (600, 400)  # the region and a quarter of its longer side around it, pixel by pixel
    for view in (whole, close):
        assert view.mask is not None
        shown = np.asarray(Image.open(io.BytesIO(view.mask)))
        assert Image.open(io.BytesIO(view.jpeg)).size == view.size == shown.shape[::-1]
        share = mask.sum() / (mask.size if view is whole else 600 * 400)
        assert abs((shown > 127).mean() - share) < 0.002


# What the page is told


def test_the_list_holds_small_fields_only(folder):
    listed = client_of(folder).get("/api/rows").json()
    assert listed["ids"] == [f"r{number}" for number in range(6)]
    assert listed["problems"] == [0, 0, 2, 0, 0, 0]
    assert listed["scores"] == {"predicted_iou": [1, 0.9, None, 0.7, 0.6, 0.5]}
    assert set(listed) == {"title", "reviewer", "ids", "problems", "scores"}


def test_pictures_are_served_and_what_cannot_be_shown_says_why(folder):
    client = client_of(folder)
    for id in ("r0", "r1"):
        picture, mask = (client.get(f"/api/{what}", params={"id": id}) for what in ("picture", "mask"))
        assert picture.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(picture.content)).size == (W, H)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask.content))) > 127, MASK)
    broken = client.get("/api/picture", params={"id": "r5"})
    assert (broken.status_code, "unreadable" in broken.json()["detail"]) == (422, True)
    assert client.get("/api/picture", params={"id": "r9"}).status_code == 422


def test_few_pictures_are_kept_and_one_photo_is_decoded_at_a_time(folder, monkeypatch):
    review = review_state.Review(folder)
    running, most, calls = [0], [0], [0]
    real = review_state.load_view

    def counted(entry, close):
        running[0] += 1
        most[0], calls[0] = max(most[0], running[0]), calls[0] + 1
        made = real(entry, close)
        running[0] -= 1
        return made

    monkeypatch.setattr(review_state, "load_view", counted)
    monkeypatch.setattr(review_state, "_VIEWS_KEPT", 3)
    threads = [threading.Thread(target=review.view, args=(f"r{n % 5}", n % 2 == 0)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], len(review._views)) == (1, 3)
    done = calls[0]
    review.view("r4", True)
    review.view("r4", True)
    assert calls[0] <= done + 1


def test_decisions_are_on_the_disk_when_the_answer_comes(folder):
    client = client_of(folder)
    for id, action, prompt in (("r0", ACCEPT, None), ("r1", EDIT, " a  new\nthing "), ("r2", REJECT, None)):
        answer = post(client, id, action, prompt=prompt).json()
        decision = read_decisions(folder / "decisions.jsonl")[id]
        assert answer["mine"] == vars(decision)
        assert (decision.action, decision.reviewer) == (action, "ann")
    assert read_decisions(folder / "decisions.jsonl")["r1"].prompt == "a new thing"
    assert client.get("/api/state", params={"reviewer": "ann"}).json()["mine"] == {
        "r0": ACCEPT,
        "r1": EDIT,
        "r2": REJECT,
    }
    same = post(client, "r3", EDIT, prompt="thing 3").json()
    assert same["mine"]["action"] == ACCEPT  # an edit that changes nothing
    for wrong in (("r9", ACCEPT, None), ("r3", "undo", None), ("r3", EDIT, "  "), ("r3", EDIT, "x" * 3000)):
        assert post(client, *wrong[:2], prompt=wrong[2]).status_code == 422
    assert post(client, "r3", ACCEPT, reviewer=" ").status_code == 422
    assert client.post("/api/decide", json={"id": 3}).status_code == 422
    assert len(read_decisions(folder / "decisions.jsonl")) == 4


def test_undo_takes_back_ones_own_latest_decision_also_after_a_restart(folder):
    client = client_of(folder)
    post(client, "r0", ACCEPT)
    post(client, "r1", REJECT)
    post(client, "r1", ACCEPT)
    post(client, "r2", ACCEPT, "bob")
    client = client_of(folder)
    states = []
    for _ in range(4):
        answer = client.post("/api/undo", json={"reviewer": "ann"}).json()
        states.append(answer and (answer["id"], answer["mine"] and answer["mine"]["action"]))
    assert states == [("r1", REJECT), ("r1", None), ("r0", None), None]
    assert by_reviewer(folder / "decisions.jsonl").keys() == {"bob"}


def test_what_others_decided_is_told_after_ones_own_decision_or_on_demand(folder):
    client = client_of(folder)
    post(client, "r0", EDIT, "bob", "a better thing")
    asked = {"id": "r0", "reviewer": "ann"}
    before = client.get("/api/row", params=asked).json()
    assert (before["others"], before["num_others"], before["prompt"], before["differ"]) == (None, 1, "thing 0", False)
    assert client.get("/api/row", params={**asked, "others": True}).json()["others"][0]["reviewer"] == "bob"
    after = post(client, "r0", ACCEPT).json()
    assert (after["others"][0]["prompt"], after["differ"]) == ("a better thing", True)
    state = client.get("/api/state", params={"reviewer": "ann"}).json()
    assert (state["differ"], state["mine"], state["others"]) == (["r0"], {"r0": ACCEPT}, ["bob"])


def test_another_processs_decisions_are_seen(folder):
    client = client_of(folder)
    append_decision(folder / "decisions.jsonl", decide("r3", REJECT, "bob"))
    append_decision(folder / "decisions.jsonl", decide("gone", REJECT, "bob"))
    assert client.get("/api/state", params={"reviewer": "bob"}).json()["mine"] == {"r3": REJECT}


def test_a_name_given_to_the_server_goes_before_the_pages(folder):
    client = client_of(folder, reviewer="dora")
    assert post(client, "r0", ACCEPT, "ann").json()["mine"]["reviewer"] == "dora"
    assert client.get("/api/rows").json()["reviewer"] == "dora"


# Who may speak to it


def test_foreign_hosts_and_foreign_pages_are_refused(folder):
    client, body = client_of(folder), {"id": "r0", "action": ACCEPT, "reviewer": "ann"}
    foreign = ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]:80")
    odd = ("[::1].evil", "[::1].evil:80", "[::1", "[localhost]", "localhost:", "localhost:80.evil", "localhost:80:80")
    odd += ("a@localhost", "localhost:123456", "localhost/", "::1", "[::1]]", " localhost")
    for host in foreign + odd:
        assert client.get("/api/rows", headers={"host": host}).status_code == 403, host
    for host in ("localhost:8765", "127.0.0.1:1", "[::1]:8765", "LOCALHOST"):
        assert client.get("/api/rows", headers={"host": host}).status_code == 200, host
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert client.post("/api/decide", json=body, headers=headers).status_code == 403, headers
    form = {"content-type": "text/plain"}  # what a foreign form can send without asking
    assert client.post("/api/decide", content=json.dumps(body), headers=form).status_code == 422
    assert not (folder / "decisions.jsonl").exists()
    own = {"origin": HERE, "sec-fetch-site": "same-origin"}
    assert client.post("/api/decide", json=body, headers=own).status_code == 200


def test_a_body_that_no_decision_has_is_refused_before_it_is_read(folder):
    """Through the application itself, whose body comes in pieces without a length, as a stream does."""
    pieces, sent = 0, []

    async def receive():
        nonlocal pieces
        pieces += 1
        assert pieces < 100, "the whole body is read"
        return {"type": "http.request", "body": b" " * 50_000, "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/decide", "query_string": b"", "headers": headers}
    app = make_app(review_state.Review(folder))
    asyncio.run(app({**scope, "http_version": "1.1", "root_path": "", "scheme": "http"}, receive, send))
    assert sent[0]["status"] == 413
    assert pieces <= 4
    client, body = client_of(folder), {"id": "r0", "action": ACCEPT, "reviewer": "ann", "more": "x" * 300_000}
    assert client.post("/api/decide", json=body).status_code == 413
    assert not (folder / "decisions.jsonl").exists()
    assert client.post("/api/decide", json={**body, "more": "x" * 3000}).status_code == 200


def test_without_the_secret_nothing_is_told(folder):
    client = client_of(folder, secret="s p&ä")
    for path in ("/", "/api/rows", "/api/picture?id=r0", "/nowhere"):
        assert client.get(path).status_code == 403
        assert client.get(path, params={"secret": "other"}).status_code == 403
    assert client.get("/api/rows", params={"secret": "s p&ä"}).status_code == 200


def test_the_page_needs_nothing_from_elsewhere(folder):
    answer = client_of(folder).get("/")
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in answer.text
    policy = answer.headers["content-security-policy"]
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert f'<script nonce="{nonce}">' in answer.text
    assert "default-src 'none'" in policy
    assert answer.headers["x-frame-options"] == "DENY"


def test_hosts_that_others_reach_and_taken_ports_are_refused(folder, monkeypatch):
    import socket

    with pytest.raises(InvalidInputError, match="can be reached by others"):
        serve(folder, "0.0.0.0", 0)
    assert not (folder / SECRET_NAME).exists()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InvalidInputError, match="another port"):
            serve(folder, port=taken.getsockname()[1])
    assert (folder / SECRET_NAME).stat().st_mode & 0o077 == 0
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingError, match=r"refine-control\[review\]"):
        make_app(review_state.Review(folder))


# The page itself, in a browser, by keyboard

SERVER = """
import sys
from pathlib import Path
from refine_control.annotation.review import serve
serve(Path(sys.argv[1]), port=int(sys.argv[2]))
"""


class Server:
    """`serve` in a process of its own, so that it can be killed."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        command = [sys.executable, "-c", SERVER, str(folder), str(port)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell starts what runs behind it
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), "the server did not start"

    @property
    def port(self) -> int:
        return int(self.address.split(":")[2].split("/")[0])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def started() -> Iterator[list[Server]]:
    """Servers of a test: what is left of them is killed."""
    servers: list[Server] = []
    yield servers
    for server in servers:
        server.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_without_fault(folder, started, number):
    started.append(Server(folder))
    started[0].process.send_signal(number)
    assert started[0].process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_before_it_listens_and_where_a_shell_had_it_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        went_on = False
        with stopped_by_signal():
            signal.raise_signal(number)
            went_on = True
        assert not went_on
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.fixture
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "this test drives a browser: apt-get install chromium"
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=120_000)
        yield running
        running.close()


def test_a_review_by_keyboard_survives_a_kill_of_the_server(folder, browser, started):
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    server = Server(folder)
    started.append(server)
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    faults = []
    page.on("pageerror", lambda error: faults.append(error))
    page.goto(server.address)
    page.fill("#name", "Ada")
    page.keyboard.press("Enter")
    stage, prompt, count = page.locator("#stage"), page.locator("#prompt"), page.locator("#count")

    def shows(id: str, words: str, decided: int) -> None:
        expect(stage).to_have_attribute("data-shown", id)
        expect(prompt).to_have_value(words)
        expect(count).to_have_text(f"{decided} of 6 decided")

    def kept() -> dict[str, tuple[str, str | None]]:
        found = by_reviewer(folder / "decisions.jsonl").get("Ada", {})
        return {id: (each.action, each.prompt) for id, each in found.items()}

    shows("r0", "thing 0", 0)
    page.keyboard.press("a")
    shows("r1", "thing 1", 1)
    page.keyboard.press("e")
    page.keyboard.type("a blue thing")
    page.keyboard.press("Enter")
    shows("r2", "thing 2", 2)
    assert kept() == {"r0": (ACCEPT, None), "r1": (EDIT, "a blue thing")}
    page.keyboard.press("r")
    shows("r3", "thing 3", 3)
    page.keyboard.press("Control+z")
    shows("r2", "thing 2", 2)
    page.keyboard.press("r")
    shows("r3", "thing 3", 3)
    server.kill()
    page.keyboard.press("Enter")
    expect(page.locator("#toast")).to_contain_text("not saved")
    shows("r3", "thing 3", 3)  # nothing that is not on the disk is shown as done
    decided = {"r0": (ACCEPT, None), "r1": (EDIT, "a blue thing"), "r2": (REJECT, None)}
    assert kept() == decided

    server = Server(folder, server.port)  # the same address: the open page goes on
    started.append(server)
    page.keyboard.press("Enter")
    shows("r4", "thing 4", 4)
    assert kept() == {**decided, "r3": (ACCEPT, None)}
    page.reload()  # the name is known, and the undecided come first
    shows("r4", "thing 4", 4)
    page.keyboard.press("k")
    expect(page.locator("#toast")).to_contain_text("first")
    page.keyboard.press("j")
    expect(page.locator("#notice")).to_contain_text("cannot be shown")
    page.keyboard.press("r")
    shows("r4", "thing 4", 5)
    page.keyboard.press("a")
    expect(page.locator("#notice")).to_contain_text("All 6 regions are decided")
    page.keyboard.press("u")
    shows("r4", "thing 4", 5)
    page.click("[data-filter=edit]")
    shows("r1", "a blue thing", 5)
    expect(page.locator("#under")).to_have_text("Before: thing 1")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    assert faults == []
