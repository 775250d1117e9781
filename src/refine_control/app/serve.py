"""`refine-control serve`: the page on this machine, to which nothing comes from elsewhere and from which nothing goes.

gradio makes the page; `local_server.Guard` lets through only the addresses that the page itself asks for. Models,
uploads and what is painted stay in this process and a temporary folder, which is deleted at the end.
"""

from __future__ import annotations

import base64
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_control.errors import InvalidInputError
from refine_control.local_server import LOOPBACK, Guard, address, listen, run

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from refine_control.app.offers import Offer

MAX_UPLOAD = 20 << 20
"""Bytes of a photograph's file."""
_SLACK = 1 << 16
"""Bytes of a request around its file."""
_ADDRESSES = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|(static|assets|svelte)/.+|gradio_api/(startup-events|app_id|"
    r"theme\.css|upload|upload_progress|queue/(join|data)|cancel|reset|heartbeat/\w+|"
    r"file=(?!\w+:)/.+))/?"
)
"""What the page asks for; gradio's programming interface and its proxies are not among them."""
_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
    b"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


def refuse_open(host: str, user: str | None) -> None:
    """Raises InvalidInputError for a host that others can reach where the page asks for no password."""
    if host not in LOOPBACK and user is None:
        raise InvalidInputError(
            f"{host} can be reached by others, who could see the page and use the models; name who may by --user "
            "NAME, or use 127.0.0.1 and ssh -L"
        )


def admit_user(user: str | None, password: str) -> Callable[[Request], Response | None]:
    """Refuses addresses that the page does not ask for, and requests without the name and password (None: no name)."""
    expected = b"Basic " + base64.b64encode(f"{user}:{password}".encode())

    def admit(request: Request) -> Response | None:
        from starlette.responses import PlainTextResponse

        if user is not None and not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected):
            asking = {"www-authenticate": 'Basic realm="refine-control", charset="UTF-8"'}
            return PlainTextResponse("name and password are needed", 401, asking)
        if not _ADDRESSES.fullmatch(request.scope["path"]):
            return PlainTextResponse("there is nothing here", 404)
        return None

    return admit


def make_app(offers: Mapping[str, Offer], folder: Path, user: str | None, password: str, hosts: Any) -> Any:
    """The ASGI application of the page; `folder` is for uploads and pictures, `hosts` as of `Guard`."""
    import gradio as gr
    from fastapi import FastAPI
    from gradio import processing_utils

    from refine_control.app.examples import write_examples
    from refine_control.app.page import build, theme

    async def refuse_download(*_: Any, **__: Any) -> str:
        raise gr.Error("files from elsewhere are not read", print_exception=False)

    # gradio would fetch a file that a request names by an address, and name files by a hash that anyone can compute
    processing_utils.async_ssrf_protected_download = refuse_download
    processing_utils.hash_seed = secrets.token_bytes(32)
    has_examples = any(offer.backbone.vocabulary is not None for offer in offers.values())
    blocks = build(offers, write_examples(folder) if has_examples else [], folder)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        max_file_size=MAX_UPLOAD,
        blocked_paths=["/proc", "/sys", "/dev", "/etc"],
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme(),
        css_paths=Path(__file__).with_name("page.css"),
    )
    # gradio checks paths in requests only of a page that `launch` has started, which this one is not: without this line
    # a request could name any file of this machine as its upload
    blocks.has_launched = True
    headers = ((b"content-security-policy", _POLICY),)
    return Guard(app, hosts, MAX_UPLOAD + _SLACK, admit_user(user, password), "refine-control", headers)


def serve(
    model: str,
    teacher: str | None,
    students: Mapping[str, Path],
    host: str,
    port: int,
    *,
    user: str | None = None,
    password: str = "",
    announce: Callable[[str], None] = print,
) -> None:
    """Serves the page until a signal, which is raised again; `announce` is called with its URL, `port` 0 is a free one.

    Raises InvalidInputError for a host that others can reach without a `user`, and for a taken port; what
    `load_offers` raises; ModuleNotFoundError without the extra `app`."""
    refuse_open(host, user)
    with listen(host, port) as listening, tempfile.TemporaryDirectory(prefix="refine-control-") as folder:
        # read by gradio and its client when they are imported
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_DISABLE_TELEMETRY": "1"}
        import gradio  # noqa: F401 - before models are loaded in vain

        from refine_control.app.offers import load_offers

        offers = load_offers(model, teacher, students)
        app = make_app(offers, Path(folder), user, password, LOOPBACK if host in LOOPBACK else None)
        announce(address(host, listening))
        run(app, listening)
