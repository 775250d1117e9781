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
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from refine_control.annotation.review_state import Review
from refine_control.errors import InvalidInputError, MissingError, RefineControlError
from refine_control.local_server import LOOPBACK, Guard, address, listen, run, stopped_by_signal
from refine_control.records import Rejected

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

SECRET_NAME = ".review-secret"
MAX_BODY = 1 << 16
"""Bytes of a request: many times what the longest prompt needs."""
_PAGE = Path(__file__).with_name("review.html")
_POLICY = (
    "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


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

    admit = _admit_secret(secret)
    app.add_middleware(Guard, hosts, MAX_BODY, admit, "the review", ((b"cache-control", b"no-store"),))
    return app


def _missing(error: ImportError) -> MissingError:
    return MissingError(f"the review needs {error.name}; install it by pip install 'refine-control[review]'")


def _admit_secret(secret: str | None) -> Callable[[Request], Response | None]:
    """Refuses a request without the secret, None: no request."""

    def admit(request: Request) -> Response | None:
        from fastapi.responses import JSONResponse

        if secret is None or hmac.compare_digest(request.query_params.get("secret", "").encode(), secret.encode()):
            return None
        return JSONResponse({"detail": "the secret is wrong; open the address that the review printed"}, 403)

    return admit


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
    review = Review(folder, reviewer)
    secret = _read_secret(folder)
    app = make_app(review, secret, LOOPBACK if host in LOOPBACK else None)
    with listen(host, port) as listening, stopped_by_signal():
        print(f"{address(host, listening)}?secret={quote(secret)}", flush=True)
        run(app, listening)
