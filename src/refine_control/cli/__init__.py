"""The command line: `refine_control.cli:main` is the entry point of the installed command."""

from refine_control.cli.app import main

__all__ = ["main"]
