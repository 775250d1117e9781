"""YAML with its traps closed, in and out.

`1e-4` is a number. Only `true` and `false` are booleans: `yes`, `no`, `on`, `off` stay words. `010` stays a word too,
for it is 8 to some readers and 10 to others. Duplicate keys, aliases and explicit tags are refused with their line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from refine_control.errors import InvalidInputError


class _Loader(yaml.SafeLoader):
    """SafeLoader with plain words typed as in YAML 1.2's core schema, decimal numbers only."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 -- yaml's own name

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem="explicit tags are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every word which either YAML 1.1 or `_Loader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# A `$` would let a final line break through, so \Z.
_NULL = re.compile(r"^(?:~|null|)\Z")
_BOOL = re.compile(r"^(?:true|false)\Z")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", ""])
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, ["t", "f"])
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is not a word", problem_mark=key_node.start_mark)
        if key in mapping:
            raise yaml.MarkedYAMLError(problem=f"duplicate key {key}", problem_mark=key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse_yaml(text: str | bytes, source: str) -> Any:
    """The value of one YAML document. Raises InvalidInputError with `source`, the line and what is wrong."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 -- a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise InvalidInputError(f"{source}:{line} {error.problem or 'not YAML'}; correct it and try again") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{source}: not readable as YAML ({str(error).splitlines()[0]})") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises InvalidInputError when it cannot be read or is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"cannot read recipe {path}: {error.strerror}") from None
    values = parse_yaml(data, str(path))
    if not isinstance(values, dict):
        raise InvalidInputError(f"{path}: a recipe is a mapping of keys to values, for example `name: ours`")
    return values


def to_yaml(value: dict[str, Any]) -> str:
    """Text that `parse_yaml` reads back to an equal value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
