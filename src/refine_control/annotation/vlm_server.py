"""A vision-language model behind a URL: any server that speaks OpenAI's chat completions, such as `vllm serve`.

vLLM pins its own torch and transformers, so it runs elsewhere and is spoken to by HTTP. Requests are independent and
go out side by side; greedy decoding is asked for, yet a server batches as it likes and may answer otherwise tomorrow.
"""

# h w pixels of a picture, n requests

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from PIL import Image

from refine_control.annotation.prompts import ANSWER_SCHEMA
from refine_control.errors import InvalidInputError, MissingError, WorkerDiedError
from refine_control.records import Request

if TYPE_CHECKING:
    import httpx

JPEG_QUALITY = 95
MAX_TOKENS = 128
LONGEST_WAIT = 30.0
"""Seconds; waits double from `first_wait` up to this, and a server's own `Retry-After` is heeded up to it."""
BUSY = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""
_ADDRESS = "the server's address must look like http://host:8000"
RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "prompt", "strict": True, "schema": ANSWER_SCHEMA},
}


def data_url(picture: np.ndarray) -> str:
    """(h, w, 3) uint8 -> the picture as a JPEG inside of a URL; colours at full resolution, for the outline's sake."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def chat(model: str, request: Request) -> dict[str, Any]:
    """The body of one question: the pictures, then the words, answered greedily as JSON."""
    pictures = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in request.pictures]
    return {
        "model": model,
        "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": request.text}]}],
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": MAX_TOKENS,
        "response_format": RESPONSE_FORMAT,
    }


class ServerDescriber:
    """Asks the server at `url` (with or without a `/v1` at its end) for answers of `model`.

    `concurrency` requests are under way at a time. Each may take `timeout` seconds, and is sent again up to `retries`
    times, after growing waits, when the server is busy or the connection is lost. `api_key_variable` names the
    environment variable with the key, if the server wants one; the key itself is in no message and no log."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 3,
        api_key_variable: str | None = None,
        first_wait: float = 0.5,
    ) -> None:
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise InvalidInputError("concurrency must be at least 1, timeout above 0 seconds, and retries at least 0")
        try:
            import httpx  # here, so that its absence is known before any photo is read
        except ImportError:
            raise MissingError(
                "a model behind a URL needs httpx, which is not installed: pip install 'refine-control[data]'"
            ) from None
        self.endpoint, self.shown = _endpoint(url)
        try:
            httpx.URL(self.endpoint)
        except httpx.InvalidURL:
            raise InvalidInputError(_ADDRESS) from None
        self.model, self.name = model, f"{model} by a server"
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.api_key_variable, self.first_wait = api_key_variable, first_wait
        _key(api_key_variable)

    def answer(self, requests: Sequence[Request]) -> list[str]:
        """The model's words, one answer for each request, in their order.

        Raises MissingError when no server is there or it wants another key; WorkerDiedError when it answers with an
        error, or no more. The first failure ends the whole call; what is under way then is not tried again."""
        import httpx

        key, given_up = _key(self.api_key_variable), threading.Event()
        if not requests:
            return []
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        timeout = httpx.Timeout(self.timeout, connect=min(10.0, self.timeout))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with (
            httpx.Client(limits=limits, timeout=timeout, headers=headers) as client,
            ThreadPoolExecutor(min(self.concurrency, len(requests))) as pool,
        ):
            try:
                return list(pool.map(lambda request: self._ask(client, request, given_up), requests))
            finally:
                given_up.set()  # where one failed, those that wait for another try give up at once

    def _ask(self, client: httpx.Client, request: Request, given_up: threading.Event) -> str:
        """One answer; nothing once another request has failed, because that one's error is what counts."""
        if given_up.is_set():
            return ""
        try:
            return self._words(self._send(client, chat(self.model, request), given_up))
        except BaseException:
            given_up.set()
            raise

    def _send(self, client: httpx.Client, body: dict[str, Any], given_up: threading.Event) -> httpx.Response:
        """A response that is not to be asked for again, after as many tries as are allowed."""
        import httpx

        wait = self.first_wait
        for left in range(self.retries, -1, -1):
            asked_for = 0.0
            try:
                response = client.post(self.endpoint, json=body)
            except httpx.RequestError as error:
                if left == 0 or given_up.is_set():
                    self._lost(error)
            else:
                if response.status_code not in BUSY or left == 0 or given_up.is_set():
                    return response
                asked_for = _seconds(response.headers.get("Retry-After", ""))
            given_up.wait(min(LONGEST_WAIT, max(wait, asked_for)))
            wait *= 2
        raise AssertionError("the last try returns or raises")

    def _lost(self, error: httpx.RequestError) -> NoReturn:
        """Nobody there, or there and gone."""
        import httpx

        why = f"{type(error).__name__}: {error}".rstrip(": ")
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise MissingError(
                f"no server answers at {self.shown} ({why}); start one, for example with `vllm serve {self.model}`, "
                "or name another address"
            ) from None
        raise WorkerDiedError(
            f"the server at {self.shown} stopped answering ({why}); see its log, give it more time or fewer requests "
            "at once, and run the same command again"
        ) from None

    def _words(self, response: httpx.Response) -> str:
        """What the model says in a chat completion; nothing where it says nothing."""
        if response.status_code in (401, 403):
            told = f"the key in {self.api_key_variable}" if self.api_key_variable else "requests without a key"
            raise MissingError(
                f"the server at {self.shown} refuses {told} ({response.status_code}); put a valid key into an "
                "environment variable and name the variable"
            )
        if response.status_code != 200:
            raise WorkerDiedError(
                f"the server at {self.shown} answers with an error ({response.status_code}: "
                f"{self._told(response)}); check that it serves {self.model} with pictures, and see its log"
            )
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = 0
        if not isinstance(content, str | None):
            raise WorkerDiedError(
                f"the server at {self.shown} answers with something else than a chat completion "
                f"({self._told(response)}); name a server with OpenAI's /v1/chat/completions"
            )
        return content or ""

    def _told(self, response: httpx.Response) -> str:
        """The beginning of what the server says, on one line, without the key it may repeat."""
        words, key = " ".join(response.text.split()), _key(self.api_key_variable)
        return (words.replace(key, "***") if key else words)[:200] or "no words"


def _endpoint(url: str) -> tuple[str, str]:
    """The address of chat completions, and the server's address for messages: without a password."""
    try:
        parts = urlsplit(url.strip())
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and len(url.split()) == 1
    except ValueError:  # a bracket or a port that is none
        named = False
    if not named:
        raise InvalidInputError(_ADDRESS)
    folder = parts.path.rstrip("/").removesuffix("/v1")
    endpoint = urlunsplit((parts.scheme, parts.netloc, f"{folder}/v1/chat/completions", "", ""))
    return endpoint, urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], folder, "", ""))


def _key(variable: str | None) -> str:
    """The key in the environment; empty where none is wanted."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise MissingError(f"the environment variable {variable} holds no key; set it, or name another variable")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidInputError(f"the environment variable {variable} holds signs that no key has; set it again")
    return key


def _seconds(text: str) -> float:
    """A `Retry-After` in seconds; 0 for a date or anything else."""
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0.0
