"""Recipe files: YAML and `--set` into the records of `config`, and every mistake in one sentence.

A recipe file is YAML with the traps closed (`strict_yaml`). Nothing is coerced but a whole number to a float, and an
unknown key is an error that names the nearest valid one. A recipe may say `base: mini/ours_stage1` and then only what
is different. The packaged recipes of one scale are in its folder, `recipes/mini/`; those in `recipes/` itself are of
every scale, and their `base` is a name within it.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from refine_control.config import Recipe, Section
from refine_control.errors import InvalidInputError
from refine_control.strict_yaml import parse_yaml, read_yaml

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The packaged recipes, as `mini/ours_stage1`."""
    paths = [path for path in RECIPES.glob("*/*.yaml") if path.name not in ("budgets.yaml", "rows.yaml")]
    scales = {path.parent.name for path in RECIPES.glob("*/budgets.yaml")}  # those that are studied have all of them
    shared = [f"{scale}/{path.stem}" for scale in scales for path in RECIPES.glob("*.yaml")]
    return sorted([path.relative_to(RECIPES).with_suffix("").as_posix() for path in paths] + shared)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file or of a packaged name, with `section.key=value` overrides applied.

    Raises InvalidInputError, one sentence: the file, the key, the value and what is allowed."""
    path = _recipe_path(path_or_name)
    values = _with_base(str(path_or_name))
    overridden = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InvalidInputError(f"--set {override}: write it as section.key=value")
        overridden[key] = override
        _set(values, key, text, f"--set {override}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InvalidInputError(_sentence(error, str(path), overridden)) from None


def _with_base(path_or_name: str, deeper: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a recipe laid over those of the recipe that its `base` names; `paper` is never inherited."""
    path = _recipe_path(path_or_name)
    values = read_yaml(path)
    base = values.pop("base", None)
    if path.parent == RECIPES:  # of every scale: it has the name that it is asked for, and its base is of that scale
        scale = path_or_name.partition("/")[0]
        values["name"] = path_or_name
        base = f"{scale}/{base[scale] if isinstance(base, dict) else base}"
    if base is None:
        return values
    if not isinstance(base, str) or path_or_name in deeper:
        raise InvalidInputError(f"{path}: base is {base!r}; it names another recipe, such as mini/ours_stage1")
    below = _with_base(base, (*deeper, path_or_name))
    below.pop("paper", None)
    return _laid_over(below, values)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _laid_over(below[key], value) if both else value
    return merged


def _recipe_path(path_or_name: str | Path) -> Path:
    """The file of a recipe: a path, or a packaged name, which is a file of its scale or one of all scales."""
    path = Path(path_or_name)
    if path.suffix in (".yaml", ".yml"):
        return path
    names = recipe_names()
    if str(path_or_name) in names:
        of_scale = RECIPES / f"{path_or_name}.yaml"
        return of_scale if of_scale.is_file() else RECIPES / of_scale.name
    nearest = difflib.get_close_matches(str(path_or_name), names, n=3, cutoff=0.3) or names
    raise InvalidInputError(
        f"no recipe is named {path_or_name}; nearest: {', '.join(nearest)}; or give a path that ends in .yaml"
    )


# Which keys there are, and what they admit.


def _nested_section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _fields(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field; sections themselves included."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if inner := _nested_section(field):
            yield from _fields(inner, f"{prefix}{name}.")


def _refuse_unknown(key: str, source: str) -> NoReturn:
    keys = [name for name, _ in _fields()]
    last = key.rpartition(".")[2]
    elsewhere = [name for name in keys if name.rpartition(".")[2] == last]
    alike = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in keys], n=1)
    nearest = (
        elsewhere
        or difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
        or [name for name in keys if name.rpartition(".")[2] in alike]
        or difflib.get_close_matches(key, keys, n=1, cutoff=0)
    )
    raise InvalidInputError(f"{source}: unknown key {key}; the nearest valid one is {nearest[0]}")


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _set(values: dict[str, Any], key: str, text: str, source: str) -> None:
    """Puts the value of `--set` into the nested `values`; a field of text takes its text as it stands."""
    known = dict(_fields())
    field = known.get(key)
    section, _, last = key.rpartition(".")
    if field is None and section != "paper":
        _refuse_unknown(key, source)
    value: Any = text
    takes_text = field is not None and str in _members(field.annotation)
    if not takes_text or (text == "null" and field is not None and type(None) in _members(field.annotation)):
        value = parse_yaml(text, source)
    target = values
    for part in section.split(".") if section else ():
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise InvalidInputError(f"{source}: {section} is not a section in the recipe file")
    target[last] = value


_BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def _allowed(field: FieldInfo) -> str:
    """What a field admits, in words: `a whole number, at least 1`."""
    if section := _nested_section(field):
        return f"a section with the keys {', '.join(section.model_fields)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    kinds = []
    for member in _members(field.annotation):
        if get_origin(member) is Literal:
            kinds.append("one of " + ", ".join(map(str, get_args(member))))
        elif get_origin(member) is tuple:
            kinds.append("a list of two numbers from 0 to below 1")
        else:
            kinds.append(words.get(member, "a mapping of words to numbers"))
    bounds = [
        f"{word} {getattr(item, name)}" for item in field.metadata for name, word in _BOUNDS if hasattr(item, name)
    ]
    if any(hasattr(item, "pattern") for item in field.metadata):
        bounds.append("made of letters, digits, _ and - with single . or / between")
    if any(getattr(item, "min_length", None) for item in field.metadata):
        bounds.append("not empty")
    return ", ".join([" or ".join(kinds), *bounds])


def _sentence(error: ValidationError, source: str, overridden: dict[str, str]) -> str:
    """The first error as one sentence: where, which key, its value, what is allowed."""
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    known = dict(_fields())
    key = field_key = ".".join(str(part) for part in first["loc"])
    while "." in field_key and field_key not in known:  # an item of a list or mapping: its field tells what is allowed
        field_key = field_key.rpartition(".")[0]
    for said in (key, field_key):
        source = f"--set {overridden[said]}" if said in overridden else source
    if first["type"] == "extra_forbidden":
        _refuse_unknown(key, source)
    if first["type"] == "value_error":
        return f"{source}: {key}: {first['msg'].removeprefix('Value error, ')}"
    field = known[field_key]
    if first["type"] == "missing" and key == field_key:
        return f"{source}: {key} is missing; it is {_allowed(field)} ({field.description})"
    if first["type"] == "missing":
        key = field_key
    return f"{source}: {key} is {first['input']!r} and must be {_allowed(field)} ({field.description})"
