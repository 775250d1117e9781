"""Lends the tests beside it what makes the golden vectors, `import golden_make`: their fixed pictures and weights."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("golden_make", Path(__file__).with_name("golden") / "make.py")
sys.modules["golden_make"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["golden_make"])
