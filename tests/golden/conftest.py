"""Lets the tests and `record.py` beside it import each other: `import doors`, `import record`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
