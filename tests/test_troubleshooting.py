"""Each sentence that the page on troubleshooting explains is one that the source can say."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
SENTENCES = re.findall(r"^> (.*)$", PAGE, flags=re.MULTILINE)
GAP = "\0"
"""Stands for a value in a sentence."""


def sentence(node: ast.AST) -> str | None:
    """The text of a string with or without values in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(sentence(part) or GAP for part in node.values)
    return None


@cache
def said() -> set[str]:
    """Every string of the source."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "src").rglob("*.py")]
    texts = {text for tree in trees for node in ast.walk(tree) if (text := sentence(node))}
    return {re.sub(f"{GAP}+", GAP, text) for text in texts}


def is_said(shown: str) -> bool:
    """Is there a string with these words, and a value at each ellipsis?"""
    return shown.replace("…", GAP) in said()


@pytest.mark.parametrize("shown", SENTENCES)
def test_a_quoted_sentence_is_one_of_the_source(shown):
    assert is_said(shown)


def test_other_sentences_are_noticed():
    assert len(SENTENCES) >= 20
    assert is_said("the prompt is empty; describe …")
    assert not is_said("the prompt is empty; write …")
    assert not is_said("the prompt is …; describe …")
