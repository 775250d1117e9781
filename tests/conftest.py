"""One thread for each worker, no network, and no skip that `allowed_skips.txt` does not name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

_LIST = Path(__file__).with_name("allowed_skips.txt")
_ALLOWED = {line.partition("#")[0].strip() for line in _LIST.read_text().splitlines()} - {""}


def _refuse_skip(report: Any) -> None:
    """Turns a skip that is not in the list into a failure; an expected failure is no skip."""
    if report.skipped and not hasattr(report, "wasxfail") and report.nodeid.partition("[")[0] not in _ALLOWED:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped ({reason}) and {_LIST.name} does not name it"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _refuse_skip(report)
    return report
