"""A vision-language model behind a URL: any server that speaks OpenAI's chat completions, such as `vllm serve`.

vLLM pins its own torch and transformers, so it runs in a process of its own and is reached by HTTP. Requests are
independent and are sent concurrently. Greedy decoding is requested, yet answers of a server may change between runs.

| what the server does | what follows |
| --- | --- |
| 408, 429, 5xx, a timeout, a lost connection | the request is repeated after growing waits |
| 401, 402, 404, no connection | the run ends: no request would succeed |
| anything else, and the above after the last repetition | the picture is refused if the server still answers others |

"Still answers others": it has answered since the last refusal, or it answers the control of `annotation.refusals`.
"""

# h w pixels of a picture, n requests

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from PIL import Image

from refine_control.annotation.prompts import ANSWER_SCHEMA
from refine_control.annotation.refusals import CONTROL, Unanswered
from refine_control.errors import InvalidInputError, MissingError, RefineControlError, WorkerDiedError
from refine_control.records import Request

if TYPE_CHECKING:
    import httpx

JPEG_QUALITY = 95
MAX_TOKENS = 128
LONGEST_WAIT = 30.0
"""Seconds; waits double from `first_wait` up to this, and a server's own `Retry-After` is respected up to it."""
BUSY = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""
_ADDRESS = "the server's address must look like http://host:8000"


class _Failure(Exception):
    """A request that failed for good: `error` ends the run unless the picture is at fault; then `why` is recorded."""

    def __init__(self, why: str, error: RefineControlError, server_may_be_gone: bool = False) -> None:
        super().__init__(why)
        self.why, self.error, self.server_may_be_gone = why, error, server_may_be_gone


def data_url(picture: np.ndarray) -> str:
    """(h, w, 3) uint8 -> a JPEG as a data URL, without chroma subsampling so that the outline keeps its colour."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def chat(model: str, request: Request) -> Mapping[str, Any]:
    """The body of one request: the pictures, then the text, with greedy decoding and a JSON answer."""
    pictures = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in request.pictures]
    return {
        "model": model,
        "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": request.text}]}],
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": MAX_TOKENS,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "prompt", "strict": True, "schema": ANSWER_SCHEMA},
        },
    }


class ServerDescriber:
    """Asks the server at `url` (with or without a `/v1` at its end) for answers of `model`.

    At most `concurrency` requests are open at a time. Each may take `timeout` seconds and is repeated up to `retries`
    times. `api_key_variable` names the environment variable with the key, if the server needs one; the key itself
    appears in no message and no log. Raises MissingError without httpx or the key."""

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
        self._answers_others = False
        _key(api_key_variable)

    def answer(self, requests: Sequence[Request]) -> list[str | Unanswered]:
        """The model's text for each request, in their order.

        A request that the server refuses gives an Unanswered; so do all open ones once no request would succeed, with
        the error that ends the run: MissingError without a server, model or valid key, else WorkerDiedError."""
        return asyncio.run(self._answer_all(requests)) if requests else []

    async def _answer_all(self, requests: Sequence[Request]) -> list[str | Unanswered]:
        import httpx

        key = _key(self.api_key_variable)
        answers: list[str | Unanswered | None] = [None] * len(requests)
        free, checking, ends_run = asyncio.Semaphore(self.concurrency), asyncio.Lock(), None

        async def fill(index: int) -> None:
            async with free:
                answers[index] = await self._ask(client, requests[index], checking)

        limits = httpx.Limits(max_connections=self.concurrency + 1)  # one for the control
        timeout = httpx.Timeout(self.timeout, connect=min(10.0, self.timeout))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(limits=limits, timeout=timeout, headers=headers) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for index in range(len(requests)):
                        group.create_task(fill(index))
            except* RefineControlError as failed:  # the group has cancelled all others
                ends_run = next(each for each in failed.exceptions if isinstance(each, RefineControlError))
        return [Unanswered(str(ends_run), ends_run) if answer is None else answer for answer in answers]

    async def _ask(self, client: httpx.AsyncClient, request: Request, checking: asyncio.Lock) -> str | Unanswered:
        """One answer. Raises the error that ends the run where no request would succeed."""
        try:
            words = await self._send(client, request, self.retries)
        except _Failure as failure:
            async with checking:
                if failure.server_may_be_gone or not self._answers_others:
                    try:
                        await self._send(client, CONTROL, retries=0)
                    except _Failure:
                        raise failure.error from None
                self._answers_others = False
            return Unanswered(failure.why)
        self._answers_others = True
        return words

    async def _send(self, client: httpx.AsyncClient, request: Request, retries: int) -> str:
        """The answer to one request, repeated up to `retries` times."""
        import httpx

        body, wait = chat(self.model, request), self.first_wait
        for left in range(retries, -1, -1):
            asked_for = 0.0
            try:
                response = await client.post(self.endpoint, json=body)
            except httpx.RequestError as error:
                if left == 0:
                    raise self._lost(error) from None
            else:
                if response.status_code not in BUSY or left == 0:
                    return self._words(response)
                asked_for = _seconds(response.headers.get("Retry-After", ""))
            await asyncio.sleep(min(LONGEST_WAIT, max(wait, asked_for)))
            wait *= 2
        raise AssertionError("the last try returns or raises")

    def _lost(self, error: httpx.RequestError) -> Exception:
        """The error for a server that does not accept a connection, or does not answer."""
        import httpx

        why = f"{type(error).__name__}: {error}".rstrip(": ")
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return MissingError(
                f"no server answers at {self.shown} ({why}); start one, for example with `vllm serve {self.model}`, "
                "or name another address"
            )
        died = WorkerDiedError(
            f"the server at {self.shown} stopped answering ({why}); see its log, and run the same command again"
        )
        return _Failure(f"the server gave no answer ({why})", died, server_may_be_gone=True)

    def _words(self, response: httpx.Response) -> str:
        """The text of a chat completion; empty where the model returned none."""
        status = response.status_code
        if status != 200:
            raise self._refusal(status, self._shown(response))
        try:
            choice = response.json()["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            content, refusal = message["content"], message.get("refusal")
        except (ValueError, LookupError, TypeError, AttributeError):
            content, reason, refusal = 0, None, None
        if not isinstance(content, str | None):
            words = self._shown(response)
            error = WorkerDiedError(
                f"the server at {self.shown} answers with something else than a chat completion ({words}); name a "
                "server with OpenAI's /v1/chat/completions"
            )
            raise _Failure(f"the answer is not a chat completion ({words})", error)
        if not content and (refusal or reason == "content_filter"):
            raise self._refusal(status, str(refusal or reason)[:200])
        return content or ""

    def _refusal(self, status: int, words: str) -> Exception:
        """The error for a status other than 200, or for a refusal inside of an answer."""
        if status in (401, 403):
            key = f"the key in {self.api_key_variable}" if self.api_key_variable else "requests without a key"
            error = MissingError(
                f"the server at {self.shown} refuses {key} ({status}); put a valid key into an environment variable "
                "and name the variable"
            )
        else:
            kind = WorkerDiedError if status in BUSY else MissingError
            error = kind(
                f"the server at {self.shown} answers with an error ({status}: {words}); check that it serves "
                f"{self.model} with pictures, and see its log"
            )
        of_all = status in (401, 402, 404)
        return error if of_all else _Failure(f"the server refuses it ({status}: {words})", error, status in BUSY)

    def _shown(self, response: httpx.Response) -> str:
        """The beginning of the server's message on one line, without the key that it may repeat."""
        try:
            words = response.json()["error"]["message"]
        except (ValueError, LookupError, TypeError):
            words = None
        words = " ".join((words if isinstance(words, str) else response.text).split())
        key = _key(self.api_key_variable)
        return (words.replace(key, "***") if key else words)[:200] or "no words"


def _endpoint(url: str) -> tuple[str, str]:
    """The address of chat completions, and the server's address for messages: without a password."""
    try:
        parts = urlsplit(url.strip())
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and len(url.split()) == 1
    except ValueError:  # a bracket or port that is not valid
        named = False
    if not named:
        raise InvalidInputError(_ADDRESS)
    folder = parts.path.rstrip("/").removesuffix("/v1")
    endpoint = urlunsplit((parts.scheme, parts.netloc, f"{folder}/v1/chat/completions", "", ""))
    return endpoint, urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], folder, "", ""))


def _key(variable: str | None) -> str:
    """The key in the environment; empty where no variable is named."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise MissingError(f"the environment variable {variable} holds no key; set it, or name another variable")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidInputError(f"the environment variable {variable} holds characters that no key has; set it again")
    return key


def _seconds(text: str) -> float:
    """A `Retry-After` in seconds; 0 for a date or anything else."""
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0.0
