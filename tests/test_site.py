"""The site is built of README and docs without a warning, its links lead to files, it loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""By the tag: the attribute whose address a browser loads by itself."""


class Links(HTMLParser):
    """Addresses that a page links, and those that a browser loads with it."""

    def __init__(self) -> None:
        super().__init__()
        self.linked: set[str] = set()
        self.loaded: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if address := given.get(LOADED.get(tag, "")):
            self.loaded.add(address)
        if tag == "a" and (address := given.get("href")):
            self.linked.add(address)


def links(path: Path) -> Links:
    parser = Links()
    parser.feed(path.read_text())
    return parser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built once as `make site` does, into another folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    return folder


def test_every_page_of_the_repository_is_in_the_site(site):
    names = {path.stem for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]} - {"README"} | {"index"}
    assert names <= {path.stem for path in site.glob("*.html")}


def test_every_link_of_the_site_leads_to_a_file(site):
    for page in site.glob("*.html"):
        parsed = links(page)
        for address in parsed.linked | parsed.loaded:
            file = unquote(address.partition("#")[0])
            if page.name != "404.html" and file and not re.match(r"https?:|mailto:", file):
                assert (page.parent / file).exists(), f"{page.name} links {address}"


def test_the_site_loads_nothing_from_another_host(site):
    for page in site.glob("*.html"):
        assert [address for address in links(page).loaded if re.match(r"(https?:)?//", address)] == [], page.name
        assert 'class="mermaid"' not in page.read_text()  # the theme would load a library for it
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(.?(https?:)?//|@import", sheet.read_text()), sheet.name


def test_the_reference_shows_signatures_fields_and_docstrings_of_each_module(site):
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE)
    page = (site / "api.html").read_text()
    assert len(named) > 8
    assert [name for name in named if f'id="{name}"' not in page] == []
    assert 'id="refine_control.losses.Losses.task_loss"' in page
    assert "Eq. 4: E ||v_teacher - v_student||^2" in page
    field = page.split('id="refine_control.config.StudentConfig.num_layers"')[1].split("</div>\n\n</div>")[0]
    assert "control layers of the student" in field
    assert "description" not in field


def test_lists_and_tables_of_a_code_host_are_those_of_the_site(site):
    items = (site / "CHANGELOG.html").read_text().split("<li>")
    moved = next(item for item in items if "arranged in folders by trade" in item)
    assert "<table>" in moved  # indented by two spaces in its list item


def test_continuous_integration_builds_what_make_builds():
    makefile = (ROOT / "Makefile").read_text()
    assert "mkdocs build --strict" in makefile.split("\nsite:")[1].split("\n\n")[0]
    assert (
        yaml.safe_load((ROOT / "mkdocs.yml").read_text().partition("\nmarkdown_extensions")[0])["theme"]["font"]
        is False
    )
