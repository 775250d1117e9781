"""The verbs are declared once for all tests: Typer reads their signatures again at every call otherwise."""

from functools import cache

import pytest
from typer.main import get_command


@pytest.fixture(autouse=True, scope="session")
def one_command_tree():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.main.get_command", cache(get_command))
        yield
