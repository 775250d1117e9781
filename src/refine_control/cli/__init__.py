"""The command line. Installed commands call `main` of this package or of `cli.app`."""

from refine_control.cli.app import main

__all__ = ["main"]
