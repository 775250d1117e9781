"""Output of the command line: results and progress; and NAME=FOLDER options."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from refine_control.errors import InvalidInputError


def plain(value: Any) -> Any:
    """`value` in JSON types: records become mappings, paths and arrays plain values, infinity the text inf."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if fields := getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", None):
        return {key: plain(getattr(value, key)) for key in fields}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def show(value: Any, as_json: bool = True) -> None:
    """Prints a result: JSON, or a line for each entry."""
    result = plain(value)
    if isinstance(result, str):
        print(json.dumps(result) if as_json else result)
    elif as_json or not isinstance(result, dict):
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        for key, item in result.items():
            print(f"{key}: {item if isinstance(item, (str, int, float)) else json.dumps(item)}")


def note(text: str) -> None:
    """Prints a line beside the result, on stderr."""
    print(text, file=sys.stderr, flush=True)


def named_sources(pairs: list[str], option: str, taken: Iterable[str] = ()) -> dict[str, str]:
    """NAME=WHAT options where WHAT is a folder, a hub id or a known name; a bare one is named by its last part.

    Raises InvalidInputError for the name of the teacher, a name of `taken`, or one that is given twice."""
    named: dict[str, str] = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        name, source = (name, source) if equals else (Path(pair).name, pair)
        if name == "teacher":
            raise InvalidInputError(f"{option} {pair}: tables use the name teacher for the teacher; write NAME=FOLDER")
        if name in named or name in taken:
            raise InvalidInputError(f"{option} {pair}: the name {name} is given twice; write NAME=FOLDER")
        named[name] = source
    return named


def named_folders(pairs: list[str], option: str) -> dict[str, Path]:
    """NAME=FOLDER options of ControlNets, NAME=edge for a packaged one; a bare FOLDER is named by its last part.

    Raises InvalidInputError where there is none, MissingError where a packaged one is not there."""
    from refine_control.models.card import packaged

    named = {name: packaged(source) or Path(source) for name, source in named_sources(pairs, option).items()}
    for pair, path in zip(pairs, named.values(), strict=True):
        if not path.is_dir():
            raise InvalidInputError(f"{option} {pair}: there is no folder {path}")
    return named


def paired(pairs: list[str], option: str, example: str) -> list[tuple[str, str]]:
    """Options of two parts with an equals sign between them. Raises InvalidInputError where a part is missing."""
    parts = [pair.partition("=") for pair in pairs]
    for pair, (first, _, second) in zip(pairs, parts, strict=True):
        if not (first and second):
            raise InvalidInputError(f"{option} {pair}: write {example}")
    return [(first, second) for first, _, second in parts]


_LINE_EVERY = 60.0
"""Seconds between the lines of a log."""


def progress_bar(label: str) -> Callable[..., None]:
    """A callback (done, total, note) that shows rate and time left: a bar on a terminal after two seconds, one line a
    minute elsewhere (a log, a batch job)."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        return _progress_lines(label)
    bar = tqdm(desc=label, delay=2, leave=False)

    def advance(done: int, total: int, note: str = "") -> None:
        if done < bar.n:  # the next stage begins
            bar.reset()
        bar.total = total
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    return advance


def _progress_lines(label: str) -> Callable[..., None]:
    from tqdm import tqdm

    first, began, before, printed = 0, time.monotonic(), 0, time.monotonic()

    def advance(done: int, total: int, note: str = "") -> None:
        nonlocal first, began, before, printed
        now = time.monotonic()
        if done < before:  # the next stage begins
            first, began = 0, now
        elif before == 0 and done > 1:  # continued: earlier work took no time in this run
            first, began = done, now
        before = done
        if now - printed >= _LINE_EVERY and done > first:
            printed, each = now, (now - began) / (done - first)
            left = tqdm.format_interval((total - done) * each)
            line = f"{label}: {done}/{total}, {each:.3g} s each, {left} left. {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    return advance
