"""Computes everything that `test_golden.py` compares, and writes it again where a change is intended.

python tests/golden/record.py             writes recorded/ again: look at the diff before you commit it
python tests/golden/record.py --fixtures  also makes fixtures/ again: only for a format that old files need not follow

The fixtures are files as earlier code wrote them. Code that comes after must read them, so they normally stay.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import doors
import numpy as np
from PIL import Image
from structure import options, tree

HERE = Path(__file__).parent
RECORDED, FIXTURES = HERE / "recorded", HERE / "fixtures"
TOY = {"steps": 8, "save_every": 4}
TOY_TYPES = ("float32", "bfloat16")

TABLES = {
    "all": ("all",),
    "table2": ("table2", "--row", "ours", "--row", "inherit", "--seeds", "2"),
    "scarce": ("scarce", "--seeds", "1"),
    "long": ("table1", "--budget", "long", "--seeds", "1", "--row", "ours", "--row", "balanced", "--row", "fc_inherit"),
    "long_figure2": ("figure2", "--budget", "long", "--seeds", "1"),
}
"""By the name of the recorded file: arguments of `reproduce` for which all rows are finished."""
PHOTO_ROWS = ("teacher", "fc", "ours", "inherit", "fc_inherit", "balanced", "wo_cf")


# Recipes, rows and results.


def recipes() -> dict[str, Any]:
    """Fingerprints and settings of all packaged recipes, and one with every default."""
    return {"recipes": doors.recipes(), "defaults": doors.whole_recipe("mini/ours_stage1")}


def plan() -> dict[str, Any]:
    """Budgets and rows of both scales, and for each row its stages' fingerprints and its mark."""
    return {
        scale: {"budgets": doors.budgets(scale), "rows": doors.rows(scale), "marks": doors.row_marks(scale, budget)}
        for scale, budget in (("mini", "tables"), ("sd3", "paper"))
    } | {"targets": doors.targets()}


def runs() -> dict[str, str]:
    """What training runs on the mini model are known by: a finished run of today must be taken as it is tomorrow."""
    return {name: doors.run_fingerprint(name) for name in ("mini/ours_stage1", "mini/balanced_stage2")}


def results() -> dict[str, Any]:
    """The marks of all finished rows; for photographs also that with fixed text for bundle and photographs."""
    return {
        "mini": {name: doors.recorded_mark(name) for name in doors.result_files("mini")},
        "photos": {
            name: {"mark": doors.recorded_mark(name), "fixed": doors.fixed_mark(name)}
            for name in doors.result_files("photos")
        },
    }


# The command line.


def surface() -> dict[str, Any]:
    """Every verb with its options, and the exit codes."""
    verbs = {name: options(command) for name, command in doors.commands().items()}
    return {"verbs": verbs, "exit_codes": doors.exit_codes()}


# Files that verbs write.


def copy_fixtures(folder: Path) -> Path:
    """A writable copy of the files that earlier code wrote."""
    shutil.copytree(FIXTURES, folder / "fixtures")
    return folder / "fixtures"


def training(recipe: str, role: str, material: Path, run_dir: Path) -> str:
    """Two steps of a packaged recipe with a student of one layer on a cache of the fixtures; the verb's output."""
    settings = {
        "training.steps": 2,
        "training.batch_size": 2,
        "training.log_every": 1,
        "training.save_every": 1,
        "student.num_layers": 1,
        f"data.{role}": material / "cache" / role,
    }
    changed = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return doors.run("train", recipe, "--run-dir", run_dir, *changed)


def make_photos(folder: Path) -> Path:
    """A manifest of four noise photographs with masks, and a row whose mask is missing."""
    folder.mkdir()
    mask = np.zeros((40, 40), np.uint8)
    mask[8:24, 10:26] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    rows = []
    for number in range(4):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
        row = {"id": str(number), "image": f"{number}.png", "mask": "mask.png", "local_prompt": f"thing {number}"}
        rows.append({**row, "category": "thing", "global_prompt": "noise", "source": "noise", "license": "CC0"})
    rows.append({**rows[0], "id": "bad", "mask": "gone.png"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_verbs(out: Path) -> Path:
    """Runs the verbs that write files once, on as little as they take; returns the folder of what they wrote."""
    material, written = copy_fixtures(out), out / "written"
    doors.run("data", "scenes", written / "scenes", "--labeled", 2, "--unlabeled", 2, "--test", 2)
    photos = make_photos(out / "photos")
    doors.run("data", "annotate", photos, written / "annotate")
    doors.run("data", "build", photos, written / "build", "--size", 16, "--test-fraction", 0.25)
    doors.run("data", "reword", photos, written / "reword", "--as", "template")
    doors.run("cache", written / "scenes" / "labeled", written / "cache" / "labeled")
    training("mini/balanced_stage1", "labeled", material, written / "stage1")
    training("mini/ours_completed_stage2", "unlabeled", material, written / "stage2")
    test = material / "scenes" / "test"
    named = f"ours={written / 'stage1' / 'student'}"
    doors.run("evaluate", "--student", named, "--test", test, "--out", written / "evaluate", "--steps", 1)
    return written


def formats(written: Path) -> dict[str, Any]:
    """The structure of every file that the verbs wrote."""
    return tree(written)


def scenes(written: Path) -> dict[str, Any]:
    """What the first scenes are: their records, and mean values of mask and picture."""
    out = {}
    for role in ("labeled", "unlabeled", "test"):
        with tarfile.open(written / "scenes" / role / "shard-00000.tar") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file
                name = f"{role}/{member.name}"
                if member.name.endswith(".json"):
                    out[name] = json.load(file)
                else:
                    out[name] = np.asarray(Image.open(file).convert("RGB"), np.float64).mean((0, 1)).round(3).tolist()
    return out


def trained(written: Path) -> dict[str, Any]:
    """For both runs on caches of the fixtures: the fingerprint, and what was logged at each step."""
    out = {}
    for run in ("stage1", "stage2"):
        manifest = json.loads((written / run / "student" / "manifest.json").read_text())
        lines = [json.loads(line) for line in (written / run / "metrics.jsonl").read_text().splitlines()]
        logged = [{key: value for key, value in line.items() if "second" not in key} for line in lines]
        out[run] = {"fingerprint": manifest["fingerprint"], "logged": logged}
    return out


# A checkpoint of earlier code.


def continue_toy(kind: str, run_dir: Path) -> list[dict[str, Any]]:
    """Continues the toy run of the fixtures after its fourth step; what it logged."""
    shutil.copytree(FIXTURES / "toy" / kind, run_dir)
    doors.toy().train(run_dir, dtype=kind, **TOY)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def toy(folder: Path) -> dict[str, Any]:
    """What continuing the toy runs logs, and the structure of the last checkpoint."""
    out = {}
    for kind in TOY_TYPES:
        logged = continue_toy(kind, folder / kind)
        out[kind] = {"logged": logged, "checkpoints": tree(folder / kind / "checkpoints")}
    return out


PLAIN: dict[str, Callable[[], Any]] = {
    "recipes": recipes,
    "plan": plan,
    "runs": runs,
    "results": results,
    "surface": surface,
}
"""Recorded files that need no folder."""
OF_VERBS: dict[str, Callable[[Path], Any]] = {"formats": formats, "scenes": scenes, "trained": trained}
"""Recorded files that come from what `run_verbs` wrote."""


def write_json(name: str, value: Any) -> None:
    """Writes `recorded/NAME.json`."""
    (RECORDED / f"{name}.json").write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(name: str) -> Any:
    """Reads `recorded/NAME.json`."""
    return json.loads((RECORDED / f"{name}.json").read_text())


def make_fixtures() -> None:
    """Makes `fixtures/` again: tiny shards, caches of two kinds, checkpoints of toy runs that broke off."""
    shutil.rmtree(FIXTURES, ignore_errors=True)
    shards, caches = FIXTURES / "scenes", FIXTURES / "cache"
    doors.run("data", "scenes", shards, "--labeled", 2, "--unlabeled", 2, "--test", 2)
    doors.run("cache", shards / "labeled", caches / "labeled", "--dtype", "fp16")
    stored = ("--complete", 1, "--dtype", "bf16", "--prompts", "int8", "--posterior", "mean_std")
    doors.run("cache", shards / "unlabeled", caches / "unlabeled", *stored)
    for kind in TOY_TYPES:
        with contextlib.suppress(doors.NonFinite):
            doors.toy().train(FIXTURES / "toy" / kind, dtype=kind, broken_step=5, **TOY)
    for path in [*FIXTURES.rglob(".lock"), *FIXTURES.glob("toy/*/metrics.jsonl")]:
        path.unlink()
    for path in [*FIXTURES.rglob(".*.writer"), *FIXTURES.glob("toy/*/tensorboard")]:
        shutil.rmtree(path)


def main() -> None:
    """Writes the recorded files."""
    if "--fixtures" in sys.argv:
        make_fixtures()
    (RECORDED / "tables").mkdir(parents=True, exist_ok=True)
    for name, compute in PLAIN.items():
        write_json(name, compute())
    with tempfile.TemporaryDirectory() as folder:
        written = run_verbs(Path(folder))
        for name, read in OF_VERBS.items():
            write_json(name, read(written))
        write_json("toy", toy(Path(folder) / "toy"))
        for name, arguments in TABLES.items():
            text = doors.reproduced(Path(folder) / "tables" / name, *arguments)
            (RECORDED / "tables" / f"{name}.md").write_text(text)
        text = doors.photo_tables(Path(folder) / "tables" / "photos", PHOTO_ROWS, "ours")
        (RECORDED / "tables" / "photos.md").write_text(text)


if __name__ == "__main__":
    import os

    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    doors.one_thread()
    main()
