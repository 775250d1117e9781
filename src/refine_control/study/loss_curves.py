"""The plots of training runs: each term of the loss, the feature term by layer, and one run beside its other seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from refine_control.study.curves import Curve, Series, read_metrics_jsonl

LOG = "metrics.jsonl"
TERMS = {
    "task_loss": "Task loss, Eq. 3",
    "output_loss": "Output loss, Eq. 4",
    "feature_loss": "Feature loss, Eq. 5",
}


def _logs(runs: Mapping[str, Path]) -> dict[str, dict[str, Series]]:
    return {name: read_metrics_jsonl(folder / LOG) for name, folder in runs.items() if (folder / LOG).is_file()}


def term_curves(runs: Mapping[str, Path]) -> list[Curve]:
    """A plot for each term with a line for each run (a folder by its name) that has it.

    Runs without a log are left out."""
    logs = _logs(runs)
    out = []
    for term, title in TERMS.items():
        lines = {name: log[term] for name, log in logs.items() if term in log and log[term][1].any()}
        out += [Curve(title, lines, log_y=True)] if lines else []
    return out


def layer_curves(name: str, run: Path) -> list[Curve]:
    """The feature term of each student layer of one run, where it has one."""
    log = _logs({name: run}).get(name, {})
    layers = {key.split("/")[1]: line for key, line in log.items() if key.startswith("feature_losses/")}
    return [Curve(f"Feature loss by student layer, {name}", layers, log_y=True)] if layers else []


def seed_curves(title: str, runs: Mapping[str, Path]) -> list[Curve]:
    """The whole loss of the same stage for each seed, where there are several: how stable training is."""
    logs = {name: log["loss"] for name, log in _logs(runs).items() if "loss" in log}
    return [Curve(title, logs, log_y=True)] if len(logs) > 1 else []
