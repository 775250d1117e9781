"""`refine-control mini train`: all stages, the oracle, the measured card, and the published bundle."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from refine_control.evaluation.obedience import Classifier
from refine_control.storage import MANIFEST, only_writer, write_json
from refine_control.training.loop import Progress
from refine_control.training.mini import check_bundle, run_stage, save_bundle, train_bundle
from refine_control.training.oracle import CropBatches, OracleObjective
from refine_control.training.stages import STAGES, Stage

ORACLE = Stage(800, 64, 2e-3, 0.99)
CARD = "refine_control.json"


def _trained_stages(work: Path) -> dict[str, Any]:
    """What each stage's `stage.json` says: steps, samples, seconds."""
    found = sorted(work.glob("*/stage.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def publish(
    pipeline: Any, classifier: Classifier, out: Path, work: Path, history: list[Any], count: int
) -> dict[str, Any]:
    """Writes `out/bundle`, measures it on `count` scenes, and writes the card again with the measurement.

    `history` are the sittings of the bundle that training started from."""
    card: dict[str, Any] = {
        "name": "mini",
        "max_sequence_length": 0,
        "closed_vocabulary": True,
        "trained_on": "rendered scenes and rendered textures; no photograph was seen",
        "license": "Apache-2.0",
        "sittings": [*history, _trained_stages(work)],
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    save_bundle(pipeline, classifier, out / "bundle", card)
    if count:
        card["skill"] = check_bundle(count, bundle=out / "bundle")
        save_bundle(pipeline, classifier, out / "bundle", card)
    return card


def make_bundle(
    out: Path,
    seed: int = 0,
    *,
    start: Path | None = None,
    stages: dict[str, Stage] | None = None,
    count: int = 1000,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains what `stages` names (all by default), publishes `out/bundle` and returns its card.

    `start` is a bundle to go on from; give another `seed` then, so that it sees new scenes. The same call
    continues what was interrupted. Raises what `fit` raises."""
    work = out / "work"
    with only_writer(out):
        pipeline = train_bundle(out, seed, start=start, stages=STAGES if stages is None else stages, progress=progress)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = Classifier()
        classifier.load_state_dict(
            run_stage("oracle", OracleObjective(classifier), CropBatches(), ORACLE, work, seed, progress)
        )
        classifier.eval()
        history = json.loads((start / CARD).read_text())["sittings"] if start else []
        card = publish(pipeline, classifier, out, work, history, count)
    write_json(out / "card.json", card)
    return card


def is_bundle(folder: Path) -> bool:
    """Was `folder` published whole?"""
    return (folder / MANIFEST).is_file() and (folder / CARD).is_file()
