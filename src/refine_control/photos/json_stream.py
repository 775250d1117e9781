"""A JSON file of any length read value by value: memory is that of the largest value, not of the file.

The values are those of the json module, whose own scanner reads them from a window that moves along the file. A byte
is a character to it (latin-1), so a place in the window is a place in the file; values with letters beyond ASCII are
read again from their bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

_STEP = 1 << 20
_LARGEST = 1 << 26
"""Bytes of a single value: more is no annotation, but a file that is broken somewhere."""
_NO_SPACE = re.compile(r"[^ \t\n\r]")
_TAIL = 3
"""So many characters must follow a number before it is sure to have ended: the window may break off in `1e+5`."""
_BOM = "\xef\xbb\xbf"
_scan = json.JSONDecoder().raw_decode


class Span(NamedTuple):
    """A value and the bytes of the file it was read from."""

    value: Any
    start: int
    end: int


class JsonStream:
    """A file of one JSON object, walked through once from where the file stands.

    For each name of `members()` either `elements()` or `value()` must be called, and used up. Everything raises
    ValueError where the file is not JSON in UTF-8, RecursionError where it is nested too deeply, and OSError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._base = file, file.tell()
        self._window, self._at = "", 0
        self._more()
        self._at = len(_BOM) * self._window.startswith(_BOM)

    def members(self) -> Iterator[str]:
        """The names of the object, whose values come next."""
        yield from (self._name() for _ in self._inside("{", "}"))
        if self._peek():
            raise ValueError("something follows the object")

    def elements(self) -> Iterator[Span]:
        """The elements of the list that comes next."""
        return (self.value() for _ in self._inside("[", "]"))

    def at_object(self) -> bool:
        """Whether an object comes next."""
        return self._peek() == "{"

    def at_list(self) -> bool:
        """Whether a list comes next."""
        return self._peek() == "["

    def skip(self) -> None:
        """Passes over the next value; of a list one element at a time."""
        if self.at_list():
            for _ in self.elements():
                pass
        else:
            self.value()

    def value(self) -> Span:
        """The next value, whole."""
        self._peek()
        while True:
            try:
                value, end = _scan(self._window, self._at)
            except json.JSONDecodeError:
                if len(self._window) - self._at > _LARGEST or not self._more():
                    raise
            else:
                if len(self._window) - end >= _TAIL or not self._more():
                    break
        text = self._window[self._at : end]
        if not text.isascii():
            value = _parse(text.encode("latin-1"))
        start, self._at = self._base + self._at, end
        return Span(value, start, self._base + end)

    def _inside(self, opening: str, closing: str) -> Iterator[None]:
        """Once for each thing between the brackets, standing before it."""
        self._take(opening)
        if self._peek() != closing:
            yield
            while self._peek() == ",":
                self._at += 1
                yield
        self._take(closing)

    def _name(self) -> str:
        if self._peek() != '"':
            raise ValueError("a name is missing")
        name = self.value().value
        self._take(":")
        return name

    def _take(self, expected: str) -> None:
        if self._peek() != expected:
            raise ValueError(f"{expected} is missing at byte {self._base + self._at}")
        self._at += 1

    def _peek(self) -> str:
        """The next character that is no space, where the walk then stands; empty at the end of the file."""
        while True:
            match = _NO_SPACE.search(self._window, self._at)
            self._at = match.start() if match else len(self._window)
            if match or not self._more():
                return match[0] if match else ""

    def _more(self) -> bool:
        """Moves the window on; it grows to twice its size where nothing of it has been used up. False at the end."""
        data = self._file.read(max(_STEP, len(self._window) - self._at))
        if data:
            self._base += self._at
            self._window, self._at = self._window[self._at :] + data.decode("latin-1"), 0
        return bool(data)


def read_value(file: BinaryIO, start: int, end: int) -> Any:
    """The value between two bytes of a file, wherever the file stands. Raises ValueError where there is none now."""
    return _parse(os.pread(file.fileno(), end - start, start))


def _parse(data: bytes) -> Any:
    return json.loads(data.decode("utf-8", "surrogatepass"))  # as json.loads decodes bytes, but never UTF-16
