"""Hooks of mkdocs and an extension of griffe: pages of the root enter the site, recipe fields show their descriptions.

Sources stay readable on a code host: links are those of the repository, and lists are indented by two spaces."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ROOT_PAGES = {"README.md": "index.md"} | {
    name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "LICENSE")
}
"""By the file at the root: its name in the site."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of the root."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository -> links of the site; lists indented by two spaces -> by the four of Python-Markdown."""
    up = "" if page.file.src_uri in ROOT_PAGES.values() else r"\.\./"
    for name, target in ROOT_PAGES.items():
        markdown = re.sub(rf"\]\({up}{re.escape(name)}(?=[)#])", f"]({target}", markdown)
    if not up:
        markdown = markdown.replace("](docs/", "](")
    parts = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"^( +)(?=\S)", r"\1\1", part, flags=re.MULTILINE) for part in parts[::2]]
    return "".join(parts)


class FieldDescriptions(griffe.Extension):
    """The description of a pydantic field is its docstring, and default and range stay its value."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        call = getattr(node, "value", None)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Field":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            if description := given.pop("description", None):
                attr.docstring = griffe.Docstring(ast.literal_eval(description), parent=attr)
                call.keywords = [keyword for keyword in call.keywords if keyword.arg in given]
                attr.value = ast.unparse(call)
