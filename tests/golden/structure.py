"""The structure of files: names, keys and types, without values that depend on the machine."""

from __future__ import annotations

import inspect
import io
import json
import re
import tarfile
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np


def options(command: Any) -> list[dict[str, Any]]:
    """What a caller can rely on of a verb: names, types, ranges, choices and defaults of arguments and options.

    Types are those of the function behind the verb, because the records of Typer change between its versions."""
    function = inspect.unwrap(command.callback)
    hints = get_type_hints(function, include_extras=True)
    out = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        default = parameter.default
        described: dict[str, Any] = {
            "names": [*parameter.opts, *parameter.secondary_opts],
            "kind": parameter.param_type_name,
            "required": bool(parameter.required),
            "multiple": bool(getattr(parameter, "multiple", False)),
            "default": str(default) if isinstance(default, Path) else default,
        }
        out.append(described | _type(hints[parameter.name]))
    return sorted(out, key=lambda each: each["kind"] == "option")


def _type(hint: Any) -> dict[str, Any]:
    """Type, choices and limits of an annotation such as `Annotated[int | None, typer.Option(min=1)]`."""
    kind, *extra = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    members = [member for member in get_args(kind) if member is not type(None)]
    if get_origin(kind) in (Union, types.UnionType) and len(members) == 1:
        kind = members[0]
    out: dict[str, Any] = {}
    if get_origin(kind) is Literal:
        out = {"type": "choice", "choices": list(get_args(kind))}
    else:
        out = {"type": getattr(get_origin(kind) or kind, "__name__", str(kind))}
    for record in extra:
        if getattr(record, "exists", False):
            out |= {name: getattr(record, name) for name in ("exists", "file_okay", "dir_okay")}
        out |= {name: getattr(record, name) for name in ("min", "max") if getattr(record, name, None) is not None}
    return out


def keys(value: Any) -> Any:
    """JSON with the names of types in place of values; a list has the structure of all its items together."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return [_together([keys(item) for item in value])] if value else []
    return {bool: "bool", int: "number", float: "number", str: "text", type(None): "null"}[type(value)]


def _together(items: list[Any]) -> Any:
    """One structure for several: dicts have the keys of all, and different types stand side by side."""
    if all(isinstance(item, dict) for item in items):
        names = sorted({name for item in items for name in item})
        return {name: _together([item[name] for item in items if name in item]) for name in names}
    distinct = sorted({json.dumps(item, sort_keys=True) for item in items})
    return json.loads(distinct[0]) if len(distinct) == 1 else [json.loads(item) for item in distinct]


def _jsonl(text: str) -> Any:
    return _together([keys(json.loads(line)) for line in text.splitlines()] or ["empty"])


def _tar(content: bytes) -> Any:
    """Suffixes of the members of every sample, and the keys of their JSON."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    records = [keys(json.loads(text)) for name, text in members.items() if name.endswith(".json")]
    return {"suffixes": sorted({name.partition(".")[2] for name in members}), "json": _together(records)}


def _safetensors(content: bytes) -> Any:
    """Type and shape of every tensor, from the header."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return {
        name: f"{tensor['dtype']} {tensor['shape']}"
        for name, tensor in sorted(header.items())
        if name != "__metadata__"
    }


def _array(content: bytes) -> str:
    array = np.load(io.BytesIO(content))
    return f"{array.dtype} {list(array.shape)}"


def _file(path: Path) -> Any:
    content = path.read_bytes()
    match path.suffix:
        case ".json":
            return keys(json.loads(content))
        case ".jsonl":
            return _jsonl(content.decode())
        case ".tar":
            return _tar(content)
        case ".safetensors":
            return _safetensors(content)
        case ".npy":
            return _array(content)
    return "file"


def tree(folder: Path) -> dict[str, Any]:
    """The structure of every file below a folder by its path; locks and the rest of TensorBoard's names left out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    names = {path: re.sub(r"tfevents\..*", "tfevents", path.relative_to(folder).as_posix()) for path in paths}
    return {name: _file(path) for path, name in names.items()}
