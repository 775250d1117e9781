"""The verb `serve`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from refine_control.cli import options as opt
from refine_control.cli.output import named_folders, show
from refine_control.errors import InvalidInputError
from refine_control.signals import interruptible

PASSWORD = "REFINE_CONTROL_PASSWORD"


@interruptible("uploads and pictures of the page are deleted")
def serve(
    model: opt.Model = "mini",
    teacher: Annotated[str | None, typer.Option(help="Hub id or folder; default: the model's own.")] = None,
    student: Annotated[list[str] | None, opt.Named] = None,
    host: Annotated[str, typer.Option(help="Address; only loopback without --user.")] = "127.0.0.1",
    port: Annotated[int, opt.number("Port; 0: any free one.", 0, 65535)] = 7860,
    user: Annotated[
        str | None, typer.Option(help=f"Name that the page asks for, with the password in {PASSWORD} or as typed.")
    ] = None,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
) -> None:
    """Serve a page to inpaint photographs: brush, prompt, students beside the teacher; nothing leaves this machine."""
    from refine_control.app.serve import refuse_open
    from refine_control.app.serve import serve as run

    students = named_folders(student or (["edge"] if model == "mini" else []), "--student")
    refuse_open(host, user)
    if dry_run:
        plan = {"verb": "serve", "model": model, "teacher": teacher, "students": students, "host": host, "port": port}
        return show({**plan, "user": user}, as_json)
    password = "" if user is None else _read_password(user)

    def announce(url: str) -> None:
        show({"url": url} if as_json else url, as_json)
        sys.stdout.flush()

    run(model, teacher, students, host, port, user=user, password=password, announce=announce)


def _read_password(user: str) -> str:
    """Raises InvalidInputError where there is none."""
    password = os.environ.get(PASSWORD, "")
    if not password and sys.stdin.isatty():
        password = typer.prompt(f"Password of {user}", hide_input=True, confirmation_prompt=True, err=True)
    if ":" in user or not password:
        raise InvalidInputError(f"--user needs a name without a colon, and a password; set {PASSWORD}")
    return password
