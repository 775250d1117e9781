"""`data review`: a page on this machine where people accept, edit or reject regions and their prompts.

The page is one file, `review.html`. It calls the addresses under /api, which answer with JSON:

| address | answer |
| --- | --- |
| GET /api/rows | what does not change: ids, number of problems and scores of all rows, column by column |
| GET /api/state?reviewer | that reviewer's decisions, and where reviewers disagree |
| GET /api/row?id&reviewer&others | one row: prompt, problems, facts and, once decided (or with others=1), the others' |
| GET /api/picture, /api/mask?id&view | JPEG and grey PNG of one size, the `whole` photo or the `close` view |
| POST /api/decide {id, action, prompt, reviewer} | the row's new state, after the line is on the disk |
| POST /api/undo {reviewer} | the same of the row that this reviewer decided last |

Only this machine is served, unless the caller allows others. Other web pages are refused: the Host header must be one
of ours, a POST must come from the page itself and be small, and the address holds a secret that is kept between runs.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from refine_control.annotation.review_state import Review
from refine_control.errors import InvalidInputError, MissingError, RefineControlError
from refine_control.records import Rejected

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECRET_NAME = ".review-secret"
MAX_BODY = 1 << 16
"""Bytes of a request: many times what the longest prompt needs."""
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s\[\]:/@]+))(?::[0-9]{1,5})?")
"""A Host header: an IPv6 address in brackets or a name, and perhaps a port."""
_PAGE = Path(__file__).with_name("review.html")
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
_POLICY = (
    "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def make_app(review: Review, secret: str | None = None, hosts: tuple[str, ...] | None = LOOPBACK) -> FastAPI:
    """The application: addresses -> what `review` answers.

    With `secret` every address needs `?secret=`. `hosts` are the names under which a browser may know this machine,
    None: any. Raises MissingError without the extra `review`."""
    try:
        from fastapi import Body, FastAPI
        from fastapi.responses import HTMLResponse, JSONResponse, Response
    except ImportError as error:
        raise _missing(error) from error
    app = FastAPI(title="review", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RefineControlError)
    @app.exception_handler(Rejected)
    def refuse(request: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422 if isinstance(error, InvalidInputError | Rejected) else 507)

    @app.get("/", response_class=HTMLResponse)
    def page() -> Any:
        nonce = secrets.token_urlsafe(12)
        html = _PAGE.read_text("utf-8").replace("<script>", f'<script nonce="{nonce}">')
        return HTMLResponse(html, headers={"content-security-policy": _POLICY.format(nonce=nonce)})

    for path, answer in (("/api/rows", review.columns), ("/api/state", review.state), ("/api/row", review.row)):
        app.add_api_route(path, answer, response_model=None)

    @app.get("/api/picture")
    def picture(id: str, view: str = "whole") -> Any:
        return Response(review.view(id, view == "close").jpeg, media_type="image/jpeg")

    @app.get("/api/mask")
    def mask(id: str, view: str = "whole") -> Any:
        shown = review.view(id, view == "close")
        if shown.mask is None:
            return JSONResponse({"detail": shown.problem}, 422)
        return Response(shown.mask, media_type="image/png")

    @app.post("/api/decide")
    def decided(id: str = Body(), action: str = Body(), reviewer: str = Body(), prompt: str | None = Body(None)) -> Any:
        return review.decide(id, action, reviewer, prompt)

    @app.post("/api/undo")
    def undo(reviewer: str = Body("", embed=True)) -> Any:
        return review.undo(reviewer)

    app.add_middleware(_Guard, secret=secret, hosts=hosts)
    return app


def _missing(error: ImportError) -> MissingError:
    return MissingError(f"the review needs {error.name}; install it by pip install 'refine-control[review]'")


class _Guard:
    """ASGI: lets through only what a page of this server asks for, and adds the headers that keep it so."""

    def __init__(self, app: Any, secret: str | None, hosts: tuple[str, ...] | None) -> None:
        self.app, self.secret, self.hosts = app, secret, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        from fastapi import HTTPException, Request
        from fastapi.responses import JSONResponse

        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise HTTPException(413, f"a decision has at most {MAX_BODY:,} bytes")
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        why = self._refusal(Request(scope)) if scope["type"] == "http" else None
        answer = self.app if why is None else JSONResponse({"detail": why}, 403)
        await answer(scope, receive_limited, send_with_headers)

    def _refusal(self, request: Request) -> str | None:
        """Why a request is refused."""
        host = request.headers.get("host", "")
        if self.hosts is not None and _host_name(host) not in self.hosts:
            return f"this machine is not known as {host!r}; open the address that the review printed"
        if request.method not in ("GET", "HEAD"):
            origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
            if origin not in (None, f"http://{host}", f"https://{host}") or site not in ("same-origin", "none"):
                return "another page may not decide here"
        secret = request.query_params.get("secret", "")
        if self.secret is not None and not hmac.compare_digest(secret.encode(), self.secret.encode()):
            return "the secret is wrong; open the address that the review printed"
        return None


def _host_name(header: str) -> str:
    """`localhost:8765` -> localhost, `[::1]:8765` -> ::1; empty for anything but a name or address and a port."""
    parts = _HOST.fullmatch(header)
    return (parts[1] or parts[2]).lower() if parts else ""


def _read_secret(folder: Path) -> str:
    """The folder's secret, made once: a page that is open goes on after the server was started again."""
    path = folder / SECRET_NAME
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(18))
    secret = path.read_text("utf-8").strip()
    if not secret:  # a kill came between the two lines above
        path.unlink()
        return _read_secret(folder)
    return secret


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Connections made before the server starts are accepted then."""
    is_v6 = ":" in host
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64, dualstack_ipv6=is_v6)
    except (OSError, OverflowError) as error:
        raise InvalidInputError(
            f"cannot listen on {host}:{port} ({error}); name another port, 0 takes a free one"
        ) from error


def serve(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 8765,
    *,
    reviewer: str | None = None,
    allow_remote: bool = False,
) -> None:
    """Serves the review of `folder` until a signal and prints the address; `port` 0 takes a free one.

    Raises InvalidInputError for a host that others can reach unless `allow_remote`, and for a taken port; MissingError
    without the extra `review`; StorageError where the folder cannot be written."""
    if host not in LOOPBACK and not allow_remote:
        raise InvalidInputError(
            f"{host} can be reached by others, who could see the photos and decide; use 127.0.0.1 and ssh -L, "
            "or pass --allow-remote"
        )
    try:
        import uvicorn
    except ImportError as error:
        raise _missing(error) from error
    review = Review(folder, reviewer)
    secret = _read_secret(folder)
    app = make_app(review, secret, LOOPBACK if host in LOOPBACK else None)
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    with listening, _stopped_by_signal():
        print(f"http://{shown}:{listening.getsockname()[1]}/?secret={quote(secret)}", flush=True)
        uvicorn.Server(config).run(sockets=[listening])


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[None]:
    """SIGTERM and Ctrl+C are how a server is meant to end; uvicorn raises them again after it has answered all.

    Both end it from here on, before uvicorn listens to them too, and where a shell started it with SIGINT ignored."""
    main = threading.current_thread() is threading.main_thread()
    ending = (signal.SIGTERM, signal.SIGINT) if main else ()
    before = {number: signal.signal(number, signal.default_int_handler) for number in ending}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
