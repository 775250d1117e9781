"""Values in other people's lists: 1, 1.0 and "1" are one number, null and NaN mean absent, the rest is refused by name.

A list that went through a spreadsheet or through pandas has ids and sizes such as `1.0`, and NaN for what is missing.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeVar

from refine_control.records import Rejected, RejectReason, Row

Result = TypeVar("Result")
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]{0,40}))(?:\.0+)?", re.ASCII)
"""`007` is no number but a name: another photo may be called `7`."""
_NUMBER = re.compile(r"\s*-?[0-9]{1,12}(\.[0-9]*)?\s*", re.ASCII)
_SHOWN = 40
_ID_FIELDS = ("id", "source_image_id")


def whole(value: object) -> int | None:
    """The whole number that a value is, also as a float or as text; None where it is none (a boolean is none)."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    match = _WHOLE.fullmatch(value.strip()) if isinstance(value, str) else None
    return int(match[1]) if match else None


def number(value: object) -> int | float | None:
    """The finite number that a value is, also as text; None where it is none (a boolean is none)."""
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
        return value
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else None


def identifier(value: object) -> int | str | None:
    """What two spellings of one id have in common: a whole number, or a text that is none. None for other values."""
    as_number = whole(value)
    return value.strip() or None if as_number is None and isinstance(value, str) else as_number


def given(row: Row, name: str) -> Any:
    """The value of a field; None where it is absent, null or NaN."""
    value = row.get(name)
    return None if isinstance(value, float) and math.isnan(value) else value


def take_id(row: Row, name: str) -> int | str | None:
    """An id as it is written, a float as a whole number; None where it is absent. Rejected where it can be no id."""
    value = given(row, name)
    if value is None or isinstance(value, str) or type(value) is int:
        return value
    return _or_refuse(whole(value), name, value, "neither a whole number nor text")


def take_whole(row: Row, name: str) -> int | None:
    """A whole number; None where it is absent. Rejected where it is none."""
    value = given(row, name)
    return None if value is None else _or_refuse(whole(value), name, value, "not a whole number")


def take_flag(row: Row, name: str) -> bool:
    """A yes or no, as a boolean or a number; False where it is absent. Rejected where it is neither."""
    value = given(row, name)
    return value if isinstance(value, bool) else (take_whole(row, name) or 0) != 0


def take_text(row: Row, name: str, reason: RejectReason = RejectReason.BAD_ROW) -> str:
    """A text; empty where it is absent. Rejected with the reason where it is something else."""
    value = given(row, name)
    return _or_refuse(value or "" if value is None or isinstance(value, str) else None, name, value, "not text", reason)


def take_segmentation(row: Row) -> Row | list[Any] | None:
    """Run lengths or polygons, unchecked; None where they are absent. Rejected where they can be neither."""
    value = given(row, "segmentation")
    if value is None or isinstance(value, dict | list):
        return value
    fault = "neither COCO's run lengths nor polygons"
    return _or_refuse(None, "segmentation", value, fault, RejectReason.MASK_UNREADABLE)


def whole_ids(row: Row) -> Row:
    """The ids of a row that are whole numbers written as floats, as whole numbers; for `Entry.meta`."""
    return {name: int(row[name]) for name in _ID_FIELDS if isinstance(row.get(name), float) and row[name].is_integer()}


def parse_object(text: str, what: str) -> Row:
    """A JSON object. Rejected where `what` is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Rejected(RejectReason.BAD_ROW, f"{what}not a JSON object")
    return value


def shown(value: object) -> str:
    """A value as a reason shows it, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _or_refuse(
    value: Result | None, name: str, written: object, fault: str, reason: RejectReason = RejectReason.BAD_ROW
) -> Result:
    if value is None:
        raise Rejected(reason, f"`{name}` is {shown(written)}, {fault}")
    return value
