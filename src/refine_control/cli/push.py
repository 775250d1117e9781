"""The verb `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from refine_control.cli import options as opt
from refine_control.cli.output import show
from refine_control.signals import interruptible


@interruptible("what the hub has not taken is not there; the same command pushes again")
def push(
    student: Annotated[str, typer.Argument(help="Folder of a student or of its run, or edge.")],
    repo_id: Annotated[str, typer.Argument(help="USER/NAME of the repository on the hub.")],
    evaluation: Annotated[Path | None, opt.folder("Output of `evaluate`: metrics and pictures for the card.")] = None,
    data: Annotated[
        Path | None, opt.folder("Output of `data build` or `data scenes` that it learnt from: sources for the card.")
    ] = None,
    out: Annotated[
        Path | None, opt.output_option("Write the repository into this folder and push nothing.", "STUDENT")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; default: main.")] = None,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token; default: that of `hf auth login`.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files and the card; push nothing.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Push a student to the hub with a model card written from its run."""
    from refine_control.export import push as export
    from refine_control.study.row_tables import HEADINGS

    sources: dict[str, Any] = {"evaluation": evaluation, "data": data}
    if dry_run or out:
        plan = export.plan(student, repo_id, HEADINGS, **sources) if dry_run else None
        plan = plan or export.gather(student, repo_id, out or Path(), HEADINGS, **sources)
        return show(plan if as_json else plan.text, as_json)
    url = export.push(student, repo_id, HEADINGS, private=private, revision=revision, token_env=token_env, **sources)
    show({"pushed": url}, as_json)
