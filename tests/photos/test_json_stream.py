"""Laws of the stream: the values are those of the json module, the places are those of the file."""

import io
import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refine_control.photos import json_stream
from refine_control.photos.json_stream import JsonStream, read_value

TEXTS = st.text(st.characters(codec=None, exclude_categories=()), max_size=6)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3))
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=5)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(json_stream, "_STEP", 3)  # every value lies across the border of a window


def walk(data: bytes) -> dict:
    """What the stream reads, list by list; each element is read a second time from its place."""
    file = io.BytesIO(data)
    stream, found = JsonStream(file), {}
    assert stream.at_object()
    for name in stream.members():
        if stream.at_list():
            spans = list(stream.elements())
            assert [json.loads(data[span.start : span.end]) for span in spans] == [span.value for span in spans]
            found[name] = [span.value for span in spans]
        else:
            found[name] = stream.value().value
    return found


def written(value: dict, plain: bool, indent: int | None) -> bytes:
    return json.dumps(value, ensure_ascii=plain, indent=indent).encode("utf-8", "surrogatepass")


@settings(max_examples=100, deadline=None)
@given(OBJECTS, st.booleans(), st.sampled_from([None, 0, 3]))
@example({"": "\ud800"}, False, None)
@example({"é\x80": ["ü", "\U0001f600", 1e300, -1.5e-7, 12]}, False, 2)
def test_the_values_are_those_of_the_json_module(value, plain, indent):
    data = written(value, plain, indent)
    expected = json.loads(data)
    assert walk(data) == expected
    assert walk(b"\xef\xbb\xbf \n" + data + b"\r\n\t ") == expected
    stream = JsonStream(io.BytesIO(data))
    for _ in stream.members():
        stream.skip()


@settings(max_examples=100, deadline=None)
@given(OBJECTS, st.data())
def test_a_cut_or_prolonged_file_is_refused(value, data):
    whole = written(value, True, None)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for broken in (whole[:cut], whole + b"x", whole + whole):
        with pytest.raises((ValueError, AssertionError)):  # of the empty file it is known at once
            walk(broken)


@pytest.mark.parametrize(
    "broken",
    [
        b'{"a": 1,}',
        b'{"a": [1,]}',
        b'{"a": [1 2]}',
        b'{"a": [,]}',
        b'{"a" 1}',
        b"{1: 2}",
        b'{,"a": 1}',
        b'{"a": "\xff"}',
        b'{"a": "\n"}',
        b'{"a": 1e+}',
        b'{"a": tru}',
        b'{"a": [1.]}',
        b'{"a": [01]}',
    ],
)
def test_what_is_not_json_is_refused(broken):
    with pytest.raises(ValueError):
        walk(broken)


def test_what_the_json_module_takes_besides_is_taken():
    found = walk(b'{"a": [NaN, -Infinity, 1E5, "\\ud800"], "a ": 1, "b": {"c": 1, "c": 2}, "b": 3}')
    assert math.isnan(found["a"][0])
    assert found["a"][1:] == [-math.inf, 1e5, "\ud800"]
    assert found["b"] == 3


def test_no_more_than_a_value_is_held(monkeypatch):
    monkeypatch.setattr(json_stream, "_STEP", 1000)
    data = written({"a": [{"number": n, "text": "é" * 40} for n in range(2000)]}, False, None)
    stream = JsonStream(io.BytesIO(data))
    longest = 0
    for _ in stream.members():
        for span in stream.elements():
            longest = max(longest, len(stream._window), span.end - span.start)
    assert longest < 2500 < len(data) / 50


def test_a_broken_file_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(json_stream, "_LARGEST", 4000)
    file = io.BytesIO(b'{"a": "' + b"x" * 100_000)
    stream = JsonStream(file)
    next(stream.members())
    with pytest.raises(ValueError):
        stream.value()
    assert file.tell() < 20_000


def test_a_value_is_read_again_from_its_place(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": [{"b": "\xc3\xbc"}, 17]}')
    with (tmp_path / "a.json").open("rb") as file:
        stream = JsonStream(file)
        (first, second), *_ = [list(stream.elements()) for _ in stream.members()]
        assert read_value(file, first.start, first.end) == {"b": "ü"}
        assert read_value(file, second.start, second.end) == 17
        with pytest.raises(ValueError):
            read_value(file, first.start, first.end - 1)
