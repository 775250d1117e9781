"""Plain words: names say what they hold, and phrases that readers stumbled over do not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "refine_control"
MODULES = sorted(SOURCE.rglob("*.py"))

VAGUE = {"told", "found", "made", "had", "own", "wanted"}
"""Participles and adjectives that do not say what a variable holds."""

ODD_PHRASES = (
    "not told from",
    "told from zero",
    "shall stand",
    "terms of one size",
    "brought to one size",
    "other signs than",
    "it says which words",
    "as surely as",
    "can lie on",
    "yields a question",
    "0, or the number of the first signal",
    "whoever measures",
    "is to be had",
    "cannot be had",
)
"""Of each there is a plain form, such as "not statistically distinguishable from zero"."""

TEXTS = [
    *(path for path in sorted(ROOT.glob("*.md"))),
    *sorted((ROOT / "docs").glob("*.md")),
    *(path for path in sorted(SOURCE.rglob("*")) if path.suffix in (".py", ".yaml", ".html", ".j2")),
]


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Everything that code gives a name to or calls by name, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler) and node.name:
            yield node.name, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def vague(code: str) -> set[tuple[str, int]]:
    """Vague names in code, whatever their case and leading underscores."""
    return {(name, line) for name, line in names(ast.parse(code)) if name.strip("_").lower() in VAGUE}


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(SOURCE)) for path in MODULES])
def test_names_say_what_they_hold(path):
    assert sorted(vague(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "told = 1",
        "def f(found): pass",
        "def f(*, had=1): pass",
        "def f(*made): pass",
        "x.wanted = 1",
        "f(own=1)",
        "class _Made: pass",
        "def found(): pass",
        "for told in x: pass",
        "with f() as had: pass",
        "[made for made in x]",
        "(found := 1)",
        "lambda told: 1",
        "import x as found",
        "try: pass\nexcept E as had: pass",
    ],
)
def test_a_vague_name_is_seen_wherever_it_stands(code):
    assert vague(code)


def test_words_in_text_and_longer_names_are_no_vague_names():
    assert vague('"""told, found"""\nfound_rows = untold = "made"  # had') == set()


def plain(text: str) -> str:
    """On one line, in lower case, without comment signs and the ends of quoted strings between its words."""
    return re.sub(r"\s+", " ", re.sub(r'"\s*\n\s*f?"|\n\s*#', " ", text)).lower()


@pytest.mark.parametrize("path", TEXTS, ids=[str(path.relative_to(ROOT)) for path in TEXTS])
def test_odd_phrases_stay_away(path):
    text = plain(path.read_text())
    assert [phrase for phrase in ODD_PHRASES if phrase in text] == []


def test_an_odd_phrase_is_seen_across_lines():
    assert "not told from" in plain("It is not\n# told from zero.")
    assert "not told from" in plain('error("it is not "\n    f"told from zero")')
