"""A server of one page for people: who may ask it, where it listens, and how a signal ends it.

Only this machine is served, unless the caller allows others. Other web pages are refused: the Host header must be one
of ours, and what is no GET must come from the page itself and be small.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refine_control.errors import InvalidInputError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s\[\]:/@]+))(?::[0-9]{1,5})?")
"""A Host header: an IPv6 address in brackets or a name, and perhaps a port."""
_HEADERS = (
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
GRACE = 3
"""Seconds that open requests have to end after a signal."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Guard:
    """ASGI: lets through only what a page of this server asks for, and adds the headers that keep it so."""

    app: Any
    hosts: tuple[str, ...] | None
    """Names under which a browser may know this machine; None: any."""
    max_body: int
    """Bytes of a request."""
    admit: Callable[[Request], Response | None]
    """Answers a request that passed the checks above where it is refused for other reasons, such as a wrong secret."""
    page: str
    """What the server is called in refusals."""
    headers: Sequence[tuple[bytes, bytes]] = ()
    """Added to each answer."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse

        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:
                raise HTTPException(413, f"a request has at most {self.max_body:,} bytes")
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS, *self.headers]
            await send(message)

        answer: Any = self.app
        if scope["type"] == "http":
            request = Request(scope)
            if why := self._refusal(request):
                answer = JSONResponse({"detail": why}, 403)
            else:
                answer = self.admit(request) or self.app
        with contextlib.suppress(ClientDisconnect):  # who leaves gets no answer, and the log no traceback
            await answer(scope, receive_limited, send_with_headers)

    def _refusal(self, request: Request) -> str | None:
        """Why a request is refused."""
        host = request.headers.get("host", "")
        if self.hosts is not None and host_name(host) not in self.hosts:
            return f"this machine is not known as {host!r}; open the address that {self.page} printed"
        if request.method not in ("GET", "HEAD"):
            origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
            if origin not in (None, f"http://{host}", f"https://{host}") or site not in ("same-origin", "none"):
                return "another page may not send anything here"
        return None


def host_name(header: str) -> str:
    """`localhost:8765` -> localhost, `[::1]:8765` -> ::1; empty for anything but a name or address and a port."""
    parts = _HOST.fullmatch(header)
    return (parts[1] or parts[2]).lower() if parts else ""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Connections made before the server starts are accepted then.

    Raises InvalidInputError where that is not possible."""
    is_v6 = ":" in host
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64, dualstack_ipv6=is_v6)
    except (OSError, OverflowError) as error:
        raise InvalidInputError(
            f"cannot listen on {host}:{port} ({error}); name another port, 0 takes a free one"
        ) from error


def address(host: str, listening: socket.socket) -> str:
    """The URL of a listening socket."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"


def run(app: Any, listening: socket.socket) -> None:
    """Serves an ASGI application until a signal, which is raised again after open requests have ended."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE)
    uvicorn.Server(config).run(sockets=[listening])


@contextlib.contextmanager
def stopped_by_signal() -> Iterator[None]:
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
