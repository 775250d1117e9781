"""Laws of the page: it paints what a person painted over, nothing leaves the machine, nobody reads other files."""

import base64
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image

from refine_control.app.examples import write_examples
from refine_control.app.serve import _ADDRESSES, MAX_UPLOAD, admit_user, refuse_open
from refine_control.app.views import layer, read_strokes, read_upload, view
from refine_control.cli import app as cli
from refine_control.errors import InvalidInputError

# A server whose process ends with a fault when it looks up or connects to anything but this machine.
SERVER = """
import os, sys
def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        print("CONNECTS", arguments[1], file=sys.stderr, flush=True)
        os._exit(99)
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "127.0.0.1", "localhost"):
        print("LOOKS UP", arguments[0], file=sys.stderr, flush=True)
        os._exit(99)
sys.addaudithook(watch)
from refine_control.cli.app import main
sys.argv = ["refine-control", "serve", "--port", "0", "--json"]
sys.exit(main())
"""


class Server:
    """`serve` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        environment = {**os.environ, "TMPDIR": str(folder)}
        with self.log.open("wb") as log:
            command = [sys.executable, "-c", SERVER]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert self.process.stdout is not None
        said = [self.process.stdout.readline() for _ in range(3)]
        assert "url" in said[1], self.log.read_text()
        self.url = json.loads("".join(said))["url"]
        self.port = int(self.url.split(":")[2].strip("/"))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="module")
def config(server) -> dict:
    return httpx.get(f"{server.url}config", timeout=60).json()


def number_of(config: dict, name: str) -> int:
    return next(each["id"] for each in config["dependencies"] if each["api_name"].startswith(name))


def ask(
    server: Server, config: dict, name: str, data: list, visit: str = "visit", until: str = "process_completed"
) -> dict:
    """An event of the page, as its script sends it; the message of the answer after which we stop listening."""
    body = {"data": data, "fn_index": number_of(config, name), "session_hash": visit, "trigger_id": None}
    joined = httpx.post(f"{server.url}gradio_api/queue/join", json=body, timeout=60)
    if joined.status_code != 200:
        return {"refused": joined.status_code, "detail": joined.text}
    with httpx.stream("GET", f"{server.url}gradio_api/queue/data?session_hash={visit}", timeout=120) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if message.get("msg") == until and message["event_id"] == joined.json()["event_id"]:
                return message
    raise AssertionError("the answer stopped")


def upload(server: Server, content: bytes, name: str = "a.png") -> httpx.Response:
    return httpx.post(f"{server.url}gradio_api/upload", files={"files": (name, content)}, timeout=60)


def png(pixels: np.ndarray, file: Path) -> bytes:
    Image.fromarray(pixels).save(file, "PNG")
    return file.read_bytes()


# Pictures


@pytest.mark.parametrize("size", [(64, 64), (600, 300), (300, 600), (3000, 200)])
def test_strokes_on_a_view_come_back_as_the_mask_of_the_photograph(tmp_path, size):
    shown = view(Image.new("RGB", size)).size
    mask = np.zeros(size[::-1], bool)
    mask[size[1] // 4 : size[1] // 2, size[0] // 4 : size[0] // 2] = True
    proposed = layer(np.asarray(Image.fromarray(mask).resize(shown, Image.Resampling.NEAREST)))
    for strokes in (proposed, proposed[: shown[1], : shown[0]]):  # as proposed, and as the editor sends what it edited
        png(strokes, tmp_path / "strokes.png")
        assert (read_strokes([tmp_path / "strokes.png"], size) ^ mask).mean() < 0.02


@pytest.mark.parametrize(
    ("strokes", "said"),
    [
        (np.zeros((64, 64, 4), np.uint8), "nothing is painted over"),
        (np.full((64, 32, 4), 255, np.uint8), "do not fit"),
        (np.full((5000, 5000), 255, np.uint8), "do not fit"),
        (b"no picture", "cannot be read"),
    ],
)
def test_strokes_that_are_no_mask_are_refused(tmp_path, strokes, said):
    file = tmp_path / "strokes.png"
    file.write_bytes(strokes) if isinstance(strokes, bytes) else png(strokes, file)
    with pytest.raises(InvalidInputError, match=said):
        read_strokes([file], (64, 64))


def test_uploads_that_are_no_photographs_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (8000, 6000)).save(tmp_path / "huge.png")
    for name, said in (("text.png", "no photograph"), ("huge.png", "8000 x 6000"), ("gone.png", "no longer")):
        with pytest.raises(InvalidInputError, match=said):
            read_upload(tmp_path / name)


# Who may see the page


def test_a_host_that_others_reach_needs_a_name_and_a_password(monkeypatch, capsys):
    with pytest.raises(InvalidInputError, match="--user NAME"):
        refuse_open("0.0.0.0", None)
    refuse_open("0.0.0.0", "ada")
    monkeypatch.delenv("REFINE_CONTROL_PASSWORD", raising=False)
    monkeypatch.setattr(sys, "argv", ["refine-control", "serve", "--host", "0.0.0.0", "--user", "ada"])
    assert cli.main() == 2
    assert "set REFINE_CONTROL_PASSWORD" in capsys.readouterr().err


def test_a_request_needs_the_password_and_an_address_of_the_page():
    from starlette.requests import Request

    def status(user: str | None, path: str, header: str = "") -> int:
        headers = [(b"authorization", header.encode())]
        answer = admit_user(user, "pässword")(Request({"type": "http", "path": path, "headers": headers}))
        return 200 if answer is None else answer.status_code

    good = "Basic " + base64.b64encode("ada:pässword".encode()).decode()
    assert (status("ada", "/", good), status("ada", "/"), status("ada", "/", "Basic AAAA")) == (200, 401, 401)
    assert (status(None, "/"), status(None, "/gradio_api/info"), status(None, "/monitoring")) == (200, 404, 404)
    for path in (
        "/gradio_api/proxy=http://a.hf.space/",
        "/gradio_api/file=http://a.org/b.png",
        "/gradio_api/run/paint",
    ):
        assert not _ADDRESSES.fullmatch(path)


def test_a_taken_port_and_a_missing_extra_are_a_sentence(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(sys, "argv", ["refine-control", "serve", "--port", str(taken.getsockname()[1])])
        assert cli.main() == 2
    assert "name another port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["refine-control", "serve", "--port", "0"])
    assert cli.main() == 69
    assert "gradio is not installed; run pip install 'refine-control[app]'" in capsys.readouterr().err


def test_foreign_pages_and_addresses_are_refused(server):
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
        url = f"{server.url}gradio_api/queue/join"
        assert httpx.post(url, json={}, headers=headers, timeout=60).status_code == 403
    answer = httpx.get(server.url, timeout=60)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "fonts.g" not in answer.text + httpx.get(f"{server.url}theme.css", timeout=60).text


# Whose files


def test_no_request_reads_a_file_that_is_not_its_upload(server, config, tmp_path):
    png(np.zeros((64, 64, 3), np.uint8), tmp_path / "secret.png")
    source = Path(read_upload.__code__.co_filename)
    for path in ("/etc/passwd", str(tmp_path / "secret.png"), str(source), str(server.log), "../../etc/passwd"):
        answer = httpx.get(f"{server.url}gradio_api/file={path}", timeout=60)
        assert answer.status_code in (403, 404), path
    uploaded = upload(server, png(np.zeros((64, 64, 3), np.uint8), tmp_path / "a.png")).json()[0]
    assert httpx.get(f"{server.url}gradio_api/file={uploaded}", timeout=60).status_code == 200
    for above in (Path(uploaded).parent, Path(uploaded).parent.parent):  # names of uploads cannot be listed
        assert httpx.get(f"{server.url}gradio_api/file={above}", timeout=60).status_code in (403, 404)
    for path in (str(tmp_path / "secret.png"), "/etc/passwd", "http://198.51.100.1/a.png"):
        answer = ask(server, config, "upload", [{"path": path, "meta": {"_type": "gradio.FileData"}}])
        assert not answer["success"], path
        assert "root:" not in json.dumps(answer)


def test_the_name_of_an_upload_cannot_be_computed_from_its_content(server, tmp_path):
    """It is a hash of content and a seed, gradio's own in a file of its package: this server's seed is a secret."""
    content = png(np.ones((64, 64, 3), np.uint8), tmp_path / "a.png")
    package = importlib.util.find_spec("gradio")
    assert package is not None
    assert package.origin is not None
    seed = Path(package.origin).with_name("hash_seed.txt").read_bytes()
    assert hashlib.sha256(seed + content).hexdigest() not in upload(server, content).json()[0]


# What people type


def paint(
    server: Server,
    config: dict,
    prompt: str,
    mask: np.ndarray | None,
    tmp_path: Path,
    visit: str,
    steps: int = 1,
    **listening: str,
) -> dict:
    photograph = upload(server, png(np.full((64, 64, 3), 128, np.uint8), tmp_path / f"{visit}.png")).json()[0]
    file = {"path": photograph, "meta": {"_type": "gradio.FileData"}}
    assert ask(server, config, "upload", [file], visit)["success"]
    layers = []
    if mask is not None:
        strokes = upload(server, png(layer(mask), tmp_path / f"{visit}-strokes.png")).json()[0]
        layers = [{"path": strokes, "meta": {"_type": "gradio.FileData"}}]
    drawing = {"background": file, "layers": layers, "composite": None, "id": None}
    return ask(server, config, "paint", [drawing, None, prompt, ["edge"], 0, steps, None], visit, **listening)


HOLE = np.pad(np.ones((128, 128), bool), 192)


@pytest.mark.parametrize(
    ("prompt", "mask", "said"),
    [
        (" ", HOLE, "The prompt is empty"),
        ("a " * 5000, HOLE, "10,000 characters"),
        ("a red star", None, "Nothing is painted over"),
    ],
)
def test_bad_input_is_a_sentence_on_the_page(server, config, tmp_path, prompt, mask, said):
    answer = paint(server, config, prompt, mask, tmp_path, "bad")
    assert not answer["success"]
    assert said in answer["output"]["error"]
    assert "Traceback" not in json.dumps(answer)


def test_too_large_and_wrong_uploads_are_refused(server, config):
    answer = upload(server, bytes(MAX_UPLOAD + 10))
    assert answer.status_code == 413
    path = upload(server, b"no image").json()[0]
    refused = ask(server, config, "upload", [{"path": path, "meta": {"_type": "gradio.FileData"}}])
    assert "no photograph" in refused["output"]["error"]


# Many at once


def test_many_at_once_and_half_open_connections_are_answered_or_refused(server, config, tmp_path):
    half_open = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for connection in half_open:
        connection.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nabc")
    answers: list[dict] = []
    threads = [
        threading.Thread(
            target=lambda n=n: answers.append(paint(server, config, "a red star", HOLE, tmp_path, f"many{n}"))
        )
        for n in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for connection in half_open:
        connection.close()
    assert len(answers) == 10
    assert all(answer.get("success") or answer.get("refused") == 503 for answer in answers)
    assert any(answer.get("success") for answer in answers)
    assert httpx.get(server.url, timeout=60).status_code == 200


def test_a_visitor_who_leaves_ends_the_painting_and_may_come_back(tmp_path):
    from refine_control.app.page import Page, _LeftError
    from refine_control.config import SamplerConfig

    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    png(layer(HOLE), tmp_path / "strokes.png")
    visits, steps = [SimpleNamespace(session_hash=name) for name in ("leaver", "stayer")], []

    def repaint(photograph, mask, prompt, sampler, progress):
        for done in range(3):
            if len(steps) == 1:
                page.leave(visits[0])
            progress(done, 3)
            steps.append(done)
        return SimpleNamespace(save=lambda path: path, seconds=1.0, image=photograph.shown)

    inpainter = SimpleNamespace(sampler=lambda **given: SamplerConfig(), repaint=repaint)
    cost = SimpleNamespace(network_calls=1, gflops_picture=1.0)
    page = Page({"edge": SimpleNamespace(inpainter=inpainter, cost=lambda sampler: cost)}, [], tmp_path)
    handlers = list(logging.getLogger("refine_control").handlers)

    def painting(visit):
        asked = [tmp_path / "strokes.png"], str(tmp_path / "photo.png"), "a red star", ["edge"], 0, 0, []
        return list(page.paint(*asked, visit, lambda *_, **__: None))

    with pytest.raises(_LeftError):
        painting(visits[0])
    assert steps == [0]
    assert logging.getLogger("refine_control").handlers == handlers
    assert len(painting(visits[1])) == len(painting(visits[0])) == 1


def test_the_slot_of_a_visitor_who_leaves_is_free_again(server, config, tmp_path):
    before = len(server.log.read_text())  # other tests ask for what gradio refuses with a traceback
    with httpx.stream("GET", f"{server.url}gradio_api/heartbeat/leaver", timeout=60):  # closed, the page is
        begun = paint(server, config, "a red star", HOLE, tmp_path, "leaver", steps=50, until="progress")
        assert "refused" not in begun
    answer = paint(server, config, "a red star", HOLE, tmp_path, "stayer")
    assert answer["success"]
    assert "Traceback" not in server.log.read_text()[before:]


# The page itself, in a browser


def test_an_example_and_a_stroke_are_painted_and_nothing_leaves_the_machine(server, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "this test drives a browser: apt-get install chromium"
    expect.set_options(timeout=120_000)  # the editor draws by WebGL, which a machine without a GPU computes
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=120_000)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(120_000)
        requests, faults = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(error))
        page.goto(server.url)
        page.locator("#examples img").nth(3).wait_for()
        pictures = []
        page.on("response", lambda answer: pictures.append(answer.url) if "/file=" in answer.url else None)
        page.locator("#examples button").nth(1).click()
        prompt = page.get_by_role("textbox").first
        expect(prompt).to_have_value("a blue circle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        prompt.fill("a red star")
        undo = page.get_by_role("button", name="Undo")
        while len(pictures) < 2 or undo.is_disabled():  # photograph and strokes of the example, then one of our own
            box = page.locator("#photo canvas").first.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x + 6, y + 6, steps=3)
            page.mouse.up()
            page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        page.locator("#paint").click()
        expect(page.locator(".facts").first).to_contain_text("4 network calls")
        expect(page.locator("#painted img").first).to_be_visible()
        with page.expect_download() as downloading:
            page.get_by_text("Download the PNG").click()
        with Image.open(downloading.value.path()) as picture:
            painted = np.asarray(picture.convert("RGB"), float)
        browser.close()
    assert {url.split("/")[2] for url in requests if url.startswith("http")} == {server.url.split("/")[2]}
    assert faults == []
    example = write_examples(tmp_path)[1]
    mask = np.asarray(Image.fromarray(example.mask).resize((64, 64), Image.Resampling.NEAREST))
    change = np.abs(painted - np.asarray(Image.open(example.file), float)).mean(2)
    assert change[mask].mean() > 20  # the strokes that the example proposes lie where the example's hole is
    centre = change[29:36, 29:36]
    assert centre[~mask[29:36, 29:36]].max() > 0  # and the stroke of the mouse is painted


def test_a_signal_ends_it_with_a_sentence_and_nothing_is_left(server):
    """The last test of this server."""
    folder = server.log.parent
    assert list(folder.glob("refine-control-*"))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(120) == 75
    last = server.log.read_text().splitlines()[-1]
    assert "stopped by SIGINT; uploads and pictures of the page are deleted" in last
    assert list(folder.glob("refine-control-*")) == []
