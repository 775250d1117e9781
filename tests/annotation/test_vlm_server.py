"""Laws of the client of a vision-language server, against a real local one that fails, delays and shuffles."""

import base64
import json
import logging
import random
import re
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from refine_control.annotation.prompts import describe_many, local_request
from refine_control.annotation.refusals import CONTROL, Unanswered
from refine_control.annotation.vlm_server import ServerDescriber
from refine_control.errors import InvalidInputError, MissingError, RefineControlError, WorkerDiedError
from refine_control.records import Request

FAST = {"first_wait": 0.01, "timeout": 20.0}
KEY = "sk-a-secret-of-the-test"


def completion(words) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": words}}]}).encode()


def asked(body: dict) -> tuple[str, list[np.ndarray]]:
    """The words and the pictures of a question."""
    *pictures, words = body["messages"][0]["content"]
    urls = [part["image_url"]["url"].removeprefix("data:image/jpeg;base64,") for part in pictures]
    return words["text"], [np.asarray(Image.open(BytesIO(base64.b64decode(url)))) for url in urls]


class Server(ThreadingHTTPServer):
    """Answers by `reply(body, number of tries of this question)` -> (status, bytes), or None to hang up."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.lock, self.tries, self.headers = reply, threading.Lock(), Counter(), []
        self.times, self.paths, self.now, self.most = [], set(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"][-1]["text"]
        with self.server.lock:
            self.server.tries[text] += 1
            self.server.times.append(time.monotonic())
            self.server.headers.append(dict(self.headers))
            self.server.paths.add(self.path)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            tries = self.server.tries[text]
        replied = self.server.reply(body, tries)
        with self.server.lock:
            self.server.now -= 1
        if replied is None:
            self.close_connection = True
            return
        self.send_response(replied[0])
        for name, value in [*replied[2:], ("Content-Length", str(len(replied[1])))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(replied[1])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    @contextmanager
    def run(reply):
        server = Server(reply)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
            server.server_close()

    return run


def questions(count: int) -> list[Request]:
    """Each with a picture of its own grey."""
    return [Request((np.full((28, 32, 3), 5 * n, np.uint8),), f"question {n}") for n in range(count)]


def grey(body, tries) -> tuple[int, bytes]:
    """What the picture of `questions` shows; the control gets an answer too."""
    _, (picture,) = asked(body)
    return completion(f"grey {picture.mean() / 5:.0f}")


def test_answers_keep_the_order_when_the_server_does_not(serve):
    delays = random.Random(0)

    def reply(body, tries):
        time.sleep(delays.random() * 0.05)
        return grey(body, tries)

    with serve(reply) as server:
        engine = ServerDescriber(server.url, "tiny", concurrency=6, **FAST)
        assert engine.answer(questions(40)) == [f"grey {n}" for n in range(40)]
        assert 1 < server.most <= 6
        assert set(server.tries.values()) == {1}
        assert server.paths == {"/v1/chat/completions"}
        assert ServerDescriber(f"{server.url}/v1/", "tiny", **FAST).answer(questions(1)) == ["grey 0"]
        assert server.paths == {"/v1/chat/completions"}
        assert engine.answer([]) == []
    assert "tiny" in engine.name


def test_a_question_is_greedy_and_holds_its_pictures_as_they_are(serve):
    bodies = []
    rows = np.arange(64, dtype=np.uint8)[:, None, None] * np.array([3, 2, 1], np.uint8)
    smooth = np.broadcast_to(rows, (64, 48, 3)).copy()
    smooth[20:23] = (255, 0, 0)  # an outline

    def reply(body, tries):
        bodies.append(body)
        return completion(None)

    with serve(reply) as server:
        engine = ServerDescriber(server.url, "tiny", **FAST)
        assert engine.answer([Request((smooth, smooth[::-1]), "what?")]) == [""]
    text, pictures = asked(bodies[0])
    assert text == "what?"
    assert [picture.shape for picture in pictures] == [smooth.shape] * 2
    assert np.abs(pictures[0].astype(int) - smooth).max() < 30
    assert np.abs(pictures[1].astype(int) - smooth[::-1]).max() < 30
    assert bodies[0]["model"] == "tiny"
    assert bodies[0]["temperature"] == 0
    assert bodies[0]["response_format"]["json_schema"]["schema"]["required"] == ["prompt"]


@pytest.mark.parametrize("fault", [429, 500, 503, None], ids=str)
def test_a_busy_server_is_asked_again(serve, fault):
    def reply(body, tries):
        return grey(body, tries) if tries > 2 else None if fault is None else (fault, b"busy")

    with serve(reply) as server:
        assert ServerDescriber(server.url, "tiny", **FAST).answer(questions(5)) == [f"grey {n}" for n in range(5)]
        assert set(server.tries.values()) == {3}


def test_waits_grow_and_the_servers_own_wait_is_heeded(serve):
    with serve(lambda body, tries: grey(body, tries) if tries > 3 else (503, b"")) as server:
        ServerDescriber(server.url, "tiny", first_wait=0.05).answer(questions(1))
        gaps = np.diff(server.times)
        assert (gaps > [0.05, 0.1, 0.2]).all()
    busy = (429, b"", ("Retry-After", "1"))
    with serve(lambda body, tries: grey(body, tries) if tries > 1 else busy) as server:
        ServerDescriber(server.url, "tiny", **FAST).answer(questions(1))
        assert np.diff(server.times)[0] > 1


def error_of(answers) -> RefineControlError:
    """The error that ends the run, which the last answer carries."""
    assert isinstance(answers[-1], Unanswered)
    assert answers[-1].ends_run is not None
    return answers[-1].ends_run


def test_a_server_that_stays_busy_ends_the_run_after_the_last_try_and_a_control(serve):
    with serve(lambda body, tries: (503, b"no\n worker" + b"." * 999)) as server:
        engine = ServerDescriber(server.url, "tiny", retries=2, concurrency=1, **FAST)
        error = error_of(engine.answer(questions(3)))
        assert server.tries == {"question 0": 3, CONTROL.text: 1}  # the others are not asked any more
    assert isinstance(error, WorkerDiedError)
    assert re.search(r"error \(503: no worker\.+\); check", str(error))
    assert len(str(error)) < 400
    with serve(lambda body, tries: None) as server:
        error = error_of(ServerDescriber(server.url, "tiny", retries=1, **FAST).answer(questions(1)))
        assert isinstance(error, WorkerDiedError)
        assert "stopped answering" in str(error)
    done = threading.Event()
    with serve(lambda body, tries: done.wait(20) and None) as server:
        error = error_of(ServerDescriber(server.url, "tiny", retries=0, timeout=0.2).answer(questions(1)))
        assert "ReadTimeout" in str(error)
        done.set()


FILTERED = b'{"error": {"message": "content management policy", "code": "content_filter"}}'
NOT_CHAT = (b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": [1]}}]}', b"\xff", b"null")
REFUSALS = {
    "content filter": ((400, FILTERED), "400: content management policy"),
    "moderation": ((403, FILTERED), "403: content management policy"),
    "too large": ((413, b"too large"), "413: too large"),
    "unprocessable": ((422, b"no picture"), "422: no picture"),
    "broken by it": ((500, b"cannot decode"), "500: cannot decode"),
    "hangs up": (None, "no answer"),
    "refusal": ((200, b'{"choices": [{"message": {"content": null, "refusal": "I cannot"}}]}'), "I cannot"),
    "filtered": (
        (200, b'{"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}'),
        "content_filter",
    ),
    **{f"not chat {number}": ((200, body), "not a chat completion") for number, body in enumerate(NOT_CHAT)},
}


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("count", [1, 5])
def test_a_picture_that_the_server_refuses_costs_that_picture(serve, kind, count):
    refusal, why = REFUSALS[kind]
    refused = count // 2

    def reply(body, tries):
        return refusal if asked(body)[0] == f"question {refused}" else grey(body, tries)

    with serve(reply) as server:
        answers = ServerDescriber(server.url, "tiny", retries=1, **FAST).answer(questions(count))
    answer = answers.pop(refused)
    assert isinstance(answer, Unanswered)
    assert answer.ends_run is None
    assert why in answer.why
    assert answers == [f"grey {n}" for n in range(count) if n != refused]


@pytest.mark.parametrize("refusal", [(400, b"no pictures here"), (200, b"<html>"), (301, b"moved")], ids=str)
def test_a_server_that_refuses_the_control_too_ends_the_run(serve, refusal):
    with serve(lambda body, tries: refusal) as server:
        error = error_of(ServerDescriber(server.url, "tiny", concurrency=1, **FAST).answer(questions(3)))
        assert server.tries == {"question 0": 1, CONTROL.text: 1}
    assert isinstance(error, WorkerDiedError if refusal[0] == 200 else MissingError)
    assert refusal[1].decode() in str(error)


def test_a_server_that_begins_to_refuse_everything_is_noticed_at_the_second_refusal(serve):
    def reply(body, tries):
        return grey(body, tries) if asked(body)[0] in ("question 0", "question 1") else (403, b"account closed")

    with serve(reply) as server:
        answers = ServerDescriber(server.url, "tiny", concurrency=1, **FAST).answer(questions(5))
    assert answers[:2] == ["grey 0", "grey 1"]
    assert [answer.ends_run is None for answer in answers[2:]] == [True, False, False]
    assert isinstance(error_of(answers), MissingError)


@pytest.mark.parametrize(("status", "said"), [(404, "no model tiny"), (402, "no credit"), (401, "without a key")])
def test_what_no_request_would_get_past_ends_the_run_at_once(serve, status, said):
    with serve(lambda body, tries: (status, json.dumps({"error": said}).encode())) as server:
        error = error_of(ServerDescriber(server.url, "tiny", concurrency=1, **FAST).answer(questions(2)))
        assert server.tries == {"question 0": 1}
    assert isinstance(error, MissingError)
    assert said in str(error)


def test_where_no_server_is_the_way_to_one_is_told(serve):
    with serve(grey) as server:
        url = server.url
    engine = ServerDescriber(url.replace("//", "//me:word@"), "tiny", retries=1, **FAST)
    error = error_of(engine.answer(questions(2)))
    assert isinstance(error, MissingError)
    assert re.search(r"no server answers at http://127\.0\.0\.1.*vllm serve tiny", str(error))
    for wrong in ("127.0.0.1:8000", "ftp://host", "http://", "http://host:none", "http://[1", "", "http://a b"):
        with pytest.raises(InvalidInputError, match="http://host:8000"):
            ServerDescriber(wrong, "tiny")


def test_without_httpx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingError, match=r"pip install 'refine-control\[data\]'"):
        ServerDescriber("http://127.0.0.1:1", "tiny")


def test_the_key_goes_to_the_server_and_nowhere_else(serve, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)

    def reply(body, tries):
        return grey(body, tries) if tries == 1 else (400, f"your key {KEY} is fine, the rest not".encode())

    with serve(reply) as server:
        engine = ServerDescriber(server.url, "tiny", api_key_variable="MY_KEY", **FAST)
        engine.answer(questions(1))
        assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}"]
        (refused,) = engine.answer(questions(1))
        assert "your key *** is fine" in refused.why
        ServerDescriber(server.url, "tiny", **FAST).answer(questions(2)[1:])
        assert "Authorization" not in server.headers[-1]
    with serve(lambda body, tries: (401, KEY.encode())) as server:
        engine = ServerDescriber(server.url, "tiny", api_key_variable="MY_KEY", **FAST)
        error = error_of(engine.answer(questions(1)))
        assert "refuses the key in MY_KEY" in str(error)
    assert caplog.text
    assert KEY not in caplog.text + refused.why + str(error) + repr(vars(engine)) + engine.name
    monkeypatch.setenv("MY_KEY", "two\nlines")
    with pytest.raises(InvalidInputError, match="MY_KEY holds characters") as caught:
        ServerDescriber(server.url, "tiny", api_key_variable="MY_KEY")
    assert "lines" not in str(caught.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(MissingError, match="MY_KEY holds no key"):
        ServerDescriber(server.url, "tiny", api_key_variable="MY_KEY")


def test_regions_are_described_through_the_server(serve):
    def reply(body, tries):
        text, (whole, crop) = asked(body)
        if "not accepted" not in text:
            return completion("a brown dog" if whole.shape[0] == 60 else "?")
        return completion(json.dumps({"prompt": f"a crop of corn {crop.shape[1]}"}))

    image, mask = np.full((60, 90, 3), 90, np.uint8), np.zeros((60, 90), bool)
    mask[10:30, 20:40] = True
    with serve(reply) as server:
        (described,) = describe_many(ServerDescriber(server.url, "tiny", **FAST), [local_request(image, mask)])
    assert described == ("a crop of corn 224", (), 2, "tiny by a server, template 1")
