import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from typer.main import get_command

from refine_control import threads
from refine_control.cli import app as cli
from refine_control.cli import doctor
from refine_control.cli import evaluation as cli_evaluation
from refine_control.cli import output as cli_output
from refine_control.errors import (
    DamagedError,
    InterruptedCleanlyError,
    InUseError,
    InvalidInputError,
    MissingError,
    NonFiniteError,
    StorageError,
    WorkerDiedError,
)

SEED, JSON, DRY = "--seed", "--json", "--dry-run"
SAMPLING = ["--conditioning-scale", "--guidance", "--injection", SEED, "--sigmas", "--steps"]

ANNOTATING = [
    *("--describer", "--engine", "--gpus", "--images", "--masks", "--prompts", "--segmenter", "--server", "--workers"),
]

# The command line is a contract: a change here is a change for everyone who calls it.
VERBS = {
    "bench data": ["--cached", JSON, "--many", "--photos", "--repeats", "--source"],
    "bench export": [JSON, "--layers", "--repeats", "--size", "--width"],
    "bench features": ["--clip-pictures", JSON, "--pictures", "--repeats", "--resamples", "--set-size", "--size"],
    "bench gpu": [JSON, "--minutes", "--out", "--plot", "--set", "--small", "recipe"],
    "bench sampling": [
        "--batch",
        "--controlnet",
        "--guidance",
        JSON,
        "--layers",
        "--model",
        "--plot",
        "--precision",
        "--repeats",
    ],
    "bench step": [JSON, "--plot", "--repeats", "--set", "recipe"],
    "bench threads": [JSON, "--repeats", "--seconds", "--set", "recipe"],
    "cache": [
        *(
            "--complete",
            DRY,
            "--dtype",
            "--guidance",
            JSON,
            "--model",
            "--path",
            "--posterior",
            "--precision",
            "--prompts",
        ),
        *("--teacher", "out", "shards"),
    ],
    "cost": ["--controlnet", JSON, "--model", "--teacher"],
    "data annotate": [
        *(
            *ANNOTATING,
            "--api-key-variable",
            "--dilate",
            DRY,
            "--global-prompts",
            JSON,
            "--limit",
            "--max-area",
            "--min-area",
        ),
        *("--per-photo", "--retry-failed", SEED, "--shape", "out", "source"),
    ],
    "data build": [
        *(*ANNOTATING, "--buckets", "--condition", DRY, "--format", JSON, "--limit", "--preparer", SEED, "--size"),
        *("--test-fraction", "--unlabeled-fraction", "out", "source"),
    ],
    "data download": [DRY, JSON, "out", "urls"],
    "data inspect": ["--html", JSON, "--sheet", "folder"],
    "data review": [
        *(
            "--allow-remote",
            DRY,
            "folder",
            "--from-label-studio",
            "--host",
            "--port",
            "--reviewer",
            "--to-label-studio",
        ),
    ],
    "data reword": ["--as", DRY, "--images", JSON, SEED, "out", "source"],
    "data scenes": ["--condition", DRY, JSON, "--labeled", SEED, "--test", "--unlabeled", "out"],
    "data verify": [JSON, "folder"],
    "demo": ["--budget", DRY, JSON, "--out", SEED, "--steps"],
    "doctor": [JSON],
    "evaluate": [
        *(*SAMPLING, "--baseline", DRY, JSON, "--model", "--noise-seeds", "--out", "--precision", "--student"),
        *("--teacher", "--test", "--weights"),
    ],
    "export": ["--cache", DRY, JSON, "--model", "--ort", "--out", "--separate", "--to", "student"],
    "generate": [
        *(
            *SAMPLING,
            "--condition",
            "--control",
            DRY,
            "--model",
            "--out",
            "--prepared",
            "--preparer",
            "--prompt",
            "--size",
        ),
    ],
    "inpaint": [
        *(*SAMPLING, "--box", "--composite", "--context", "--controlnet", DRY, "--feather", "--image", "--mask"),
        *("--model", "--out", "--point", "--prompt", "--runtime", "--seeds", "--segmenter", "--size", "--whole"),
        *("--condition", "--control", "--prepared", "--preparer"),
    ],
    "mini check": ["--bundle", JSON, "--n", "--photos", "--precision", SEED],
    "mini edge": ["--check", DRY, JSON, SEED, "out", "student"],
    "mini train": ["--check", "--condition", DRY, "--from", JSON, "--out", "--photos", SEED, "--stage", "--world"],
    "push": [
        *("--data", DRY, "--evaluation", JSON, "--out", "--private", "--revision", "--token-env", "repo_id", "student"),
    ],
    "plan": [
        *("--chain", DRY, "--efficiency", JSON, "--machine", "--measured", "--pairs", "--price", "--samples", "--set"),
        *("--epochs", "--size", "--test", "recipe"),
    ],
    "reproduce": [
        *(
            "--against",
            "--budget",
            "--condition",
            "--data",
            DRY,
            JSON,
            "--model",
            "--out",
            "--photos",
            "--results",
            "--row",
            "--scale",
            "--seeds",
            "--teacher",
            "--weights",
        ),
        *("--workers", "target"),
    ],
    "serve": [DRY, "--host", JSON, "--model", "--port", "--student", "--teacher", "--user"],
    "train": [
        *(DRY, JSON, "--master", "--node-rank", "--nodes", "--nproc", "--patience", "--run-dir", "--set", "recipe"),
    ],
    "trim": [JSON, "--model", "--out", "controlnet"],
}


def walk(command, path=()):
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from walk(inner, (*path, name))
    else:
        yield " ".join(path), sorted(option for parameter in command.params for option in parameter.opts)


def call(monkeypatch, *arguments: str) -> int:
    """`main` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["refine-control", *arguments])
    try:
        return cli.main()
    except SystemExit as left:
        return int(left.code or 0)


def best_of_three(*command: str) -> float:
    """CPU seconds of a process, which other processes of the machine hardly change."""

    def seconds() -> float:
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime

    return min(seconds() for _ in range(3))


def test_the_verbs_and_their_options_are_these():
    assert dict(walk(get_command(cli.app))) == {verb: sorted(options) for verb, options in VERBS.items()}


@pytest.mark.parametrize("verb", ["", "data", "mini", "bench", *VERBS])
def test_every_verb_has_help(monkeypatch, capsys, verb):
    assert call(monkeypatch, *verb.split(), "--help") == 0
    assert f"Usage: refine-control {verb}".strip() in capsys.readouterr().out


def test_help_answers_in_under_a_second():
    assert best_of_three("-c", "import sys; from refine_control.cli.app import main; main()", "--help") < 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("refine-control in", {"inpaint"}),
        ("refine-control data ins", {"inspect"}),
        ("refine-control train --dr", {"--dry-run"}),
    ],
)
def test_a_shell_completes_verbs_and_options_without_heavy_libraries(words, expected):
    asked = {
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "_REFINE_CONTROL_COMPLETE": "complete_bash",
    }
    code = "import sys; from refine_control.cli.app import main\n"
    code += "try: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert set(run.stdout.split()) == expected
    assert not {"torch", "diffusers", "matplotlib"} & set(run.stderr.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_is_shown(shell):
    code = "import sys; from refine_control.cli.app import main; sys.exit(main())"
    asked = {"_REFINE_CONTROL_COMPLETE": f"source_{shell}"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert "refine-control" in run.stdout
    assert f"complete_{shell}" in run.stdout


def test_the_package_imports_in_under_300_milliseconds():
    assert best_of_three("-c", "import refine_control") < 0.3


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, refine_control.cli.app, refine_control.cli.doctor; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "numpy", "diffusers", "transformers", "pydantic", "matplotlib"} & set(modules) == set()


def test_an_unknown_recipe_key_suggests_the_nearest_and_leaves_with_2(monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\noptimiser: {learning_rate: 1e-4}\n")
    assert call(monkeypatch, "train", str(recipe), "--dry-run") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"refine-control: {recipe}: unknown key optimiser; the nearest valid one is optimizer\n"


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "train", "mini/fc", "--set", "training.steps=7", "--dry-run") == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert call(monkeypatch, "train", "again.yaml", "--dry-run") == 0
    assert capsys.readouterr().out == (tmp_path / "again.yaml").read_text()
    assert "steps: 7\n" in (tmp_path / "again.yaml").read_text()
    assert os.listdir(tmp_path) == ["again.yaml"]


@pytest.mark.parametrize("verb", ["demo", "mini train"])
def test_a_dry_run_of_a_verb_writes_nothing(monkeypatch, capsys, tmp_path, verb):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *verb.split(), "--dry-run") == 0
    assert f"verb: {verb}" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data scenes out --condition cany", "there is no condition 'cany'"),
        ("mini train --condition cany", "there is no condition 'cany'"),
        ("mini train --condition canny --world photos --photos .", "leave --world and --photos out"),
        ("plan mini/fc --price inf", "--price"),
        ("plan mini/fc --machine 00xH100", "--machine 00xH100 is not known"),
        ("plan mini/fc --machine 9999999xH100", "--machine 9999999xH100 is not known"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse_or_ignore(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words.split(), "--dry-run") == 2
    assert message in capsys.readouterr().err


def test_students_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "s").mkdir()
    base = ("evaluate", "--test", str(tmp_path), "--out", str(tmp_path / "o"), "--dry-run", "--student")
    assert call(monkeypatch, *base, f"ours={tmp_path}/s", "--student", f"{tmp_path}/s") == 0
    assert f"ours={tmp_path}/s" not in capsys.readouterr().err
    assert call(monkeypatch, *base, f"{tmp_path}/s", "--student", f"s={tmp_path}") == 2
    assert "the name s is given twice" in capsys.readouterr().err
    assert call(monkeypatch, *base, "ours=nowhere") == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    assert call(monkeypatch, *base, f"{tmp_path}/s", "--injection", "own") == 2
    assert "'diffusers'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nothing"], ["demo", "--sede", "1"], ["demo", "--seed", "-1"], ["train"]])
def test_a_bad_call_leaves_with_2(monkeypatch, arguments):
    assert call(monkeypatch, *arguments) == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InvalidInputError("no"), 2, "refine-control: no\n"),
        (DamagedError("no"), 65, "refine-control: no\n"),
        (MissingError("no"), 69, "refine-control: no\n"),
        (NonFiniteError("no"), 70, "refine-control: no\n"),
        (WorkerDiedError("no"), 71, "refine-control: no\n"),
        (InUseError("no"), 73, "refine-control: no\n"),
        (StorageError("no"), 74, "refine-control: no\n"),
        (InterruptedCleanlyError("no"), 75, "refine-control: no\n"),
        (MemoryError(), 74, "out of memory"),
        (OSError(28, "No space left on device", "x"), 74, "cannot write x: No space left on device"),
        (ModuleNotFoundError("no", name="skimage.measure"), 69, "pip install 'refine-control[data]'"),
    ],
)
def test_an_error_is_a_sentence_and_its_code(monkeypatch, capsys, error, code, said):
    def fail():
        raise error

    monkeypatch.setattr(doctor, "diagnose", fail)
    assert call(monkeypatch, "doctor") == code
    assert said in capsys.readouterr().err


def test_an_interrupt_leaves_with_130(monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", stop)
    assert call(monkeypatch, "doctor") == 130


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ModuleNotFoundError("a bug", name="refine_control.nothing")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(doctor, "diagnose", fail)
    with pytest.raises(type(error), match="a bug"):
        call(monkeypatch, "doctor")


def test_results_print_as_lines_or_as_json(capsys):
    result = {"n": 1, "nested": doctor.Check("a", "ok", "b")}
    cli_output.show(result, as_json=False)
    assert capsys.readouterr().out == 'n: 1\nnested: {"name": "a", "state": "ok", "detail": "b"}\n'
    cli_output.show(result)
    assert '"state": "ok"' in capsys.readouterr().out
    cli_output.show({"psnr": float("inf"), "loss": np.array([0.5, float("nan")]), "path": Path("a")})
    assert json.loads(capsys.readouterr().out) == {"psnr": "inf", "loss": [0.5, "nan"], "path": "a"}


def test_verify_leaves_with_65_and_names_the_damage(monkeypatch, capsys, tmp_path):
    from refine_control.photos import shards

    monkeypatch.setattr(shards, "verify", lambda folder: [])
    assert call(monkeypatch, "data", "verify", str(tmp_path)) == 0
    assert capsys.readouterr().out == f"{tmp_path} is whole\n"
    monkeypatch.setattr(shards, "verify", lambda folder: ["a.tar is missing", "b.tar is missing"])
    assert call(monkeypatch, "data", "verify", str(tmp_path)) == 65
    captured = capsys.readouterr()
    assert captured.out == "a.tar is missing\nb.tar is missing\n"
    assert captured.err.startswith(f"refine-control: 2 faults in {tmp_path}")


def test_a_size_makes_inpaint_write_a_square(monkeypatch, capsys, tmp_path):
    from refine_control.pipeline import files as pipeline

    for name in ("image.png", "mask.png"):
        (tmp_path / name).touch()
    called = {}

    def inpaint_file(*arguments, **options):
        called.update(options, arguments=arguments)
        return arguments[3]

    monkeypatch.setattr(pipeline, "inpaint_file", inpaint_file)
    files = ["--image", f"{tmp_path}/image.png", "--mask", f"{tmp_path}/mask.png", "--out", f"{tmp_path}/out.png"]
    files += ["--size", "64"]
    assert call(monkeypatch, "inpaint", *files, "--prompt", "a cup", "--steps", "4", "--seed", "3", "--composite") == 0
    assert capsys.readouterr().out == f"{tmp_path}/out.png\n"
    assert (called["sampler"].num_inference_steps, called["sampler"].seed, called["composite"]) == (4, 3, True)
    assert called["arguments"][2] == "a cup"
    assert (called["model"], called["controlnet"], called["size"]) == ("mini", None, 64)
    assert (called["sampler"].guidance_scale, called["sampler"].conditioning_scale) == (1, 1)  # the edge student's
    told = ["--model", "author/sd3", "--prompt", "a cup", "--guidance", "5"]
    assert call(monkeypatch, "inpaint", *files, *told) == 0
    sampler = called["sampler"]
    assert (sampler.num_inference_steps, sampler.guidance_scale, sampler.conditioning_scale) == (28, 5, 0.95)


@pytest.mark.parametrize(
    ("call_of", "said"),
    [
        (["data", "build", "--masks", "sam2"], "'given'"),
        (["data", "build", "--format", "gif"], "'webp'"),
        (["cache", "--dtype", "int8"], "'bf16'"),
    ],
)
def test_an_unknown_choice_is_refused_with_those_there_are(monkeypatch, capsys, tmp_path, call_of, said):
    assert call(monkeypatch, *call_of, str(tmp_path), str(tmp_path / "out")) == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_progress_counts_on_and_starts_again_for_the_next_stage(monkeypatch):
    made = []

    class Bar:
        n, total = 0, None

        def __init__(self, **options):
            made.append(self)

        def reset(self):
            self.n = 0

        def update(self, more):
            self.n += more

        def set_postfix_str(self, note, refresh):
            self.note = note

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    advance = cli_output.progress_bar("work")
    advance(3, 10)
    advance(10, 10, "loss 1")
    assert (made[0].n, made[0].total, made[0].note) == (10, 10, "loss 1")
    advance(1, 5)
    assert (made[0].n, made[0].total) == (1, 5)


def test_reproduce_offers_every_target():
    from refine_control.study.plan import TARGETS

    literal = get_type_hints(cli_evaluation.reproduce)["target"]
    assert list(get_args(literal)) == list(TARGETS)


def test_a_log_gets_a_line_a_minute(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(cli_output.time, "monotonic", lambda: now[0])
    advance = cli_output.progress_bar("train")
    for done in range(401, 501):  # continued at 400, two seconds a step
        advance(done, 1000, "loss 1")
        now[0] += 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "train: 431/1000, 2 s each, 18:58 left. loss 1"
    advance(1, 10)  # the next stage
    now[0] += 100
    advance(5, 10)
    assert capsys.readouterr().err == "train: 5/10, 20 s each, 01:40 left.\n"


# The doctor.


def test_the_doctor_finds_nothing_missing_here(monkeypatch, capsys):
    assert call(monkeypatch, "doctor") == 0
    said = capsys.readouterr().out
    assert "missing " not in said
    for name in ("python", "packages", "torchvision", "gpu", "extra data", "hub"):
        assert f" {name}" in said


def test_the_doctor_says_how_many_threads_and_how_they_wait(monkeypatch):
    chosen = threads.choose({"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "7"}, 4, 4, adaptive=True)
    monkeypatch.setattr(doctor, "set_up", lambda: chosen)
    monkeypatch.setattr(doctor, "_importing", lambda *names: "not asked here")
    assert ("threads", "ok", "3, from OMP_NUM_THREADS; they wait as GOMP_SPINCOUNT=7 says") in doctor.diagnose()


def test_the_command_line_sets_the_threads_up(monkeypatch):
    monkeypatch.setattr(cli, "set_up", lambda: pytest.fail("as expected"))
    with pytest.raises(pytest.fail.Exception, match="as expected"):
        call(monkeypatch, "doctor")


def test_the_doctor_names_a_broken_torchvision(monkeypatch, capsys, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    assert call(monkeypatch, "doctor") == 69
    captured = capsys.readouterr()
    assert "operator torchvision::nms does not exist" in captured.out
    assert "pip uninstall torchvision" in captured.out
    assert captured.err.startswith("refine-control: required and missing or broken: torchvision")


def test_the_doctor_names_a_missing_package(monkeypatch):
    monkeypatch.setattr(doctor, "CORE", ("torch", "no-such-package"))
    assert doctor._packages().state == "missing"
    assert "no-such-package" in doctor._packages().detail


def test_the_doctor_tells_of_offline_settings(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE=1" in doctor._offline().detail


def test_the_cost_of_completions_is_on_stderr_once_and_bad_paths_are_refused(
    monkeypatch, capsys, tmp_path, tiny_backbone
):
    from refine_control.miniature.scene_shards import scene_photos
    from refine_control.photos.shards import ShardWriter

    tiny_backbone.pipeline.save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "refine_control.json").write_text('{"max_sequence_length": 0}')
    writer = ShardWriter(tmp_path / "shards", "unlabeled")
    for photo in scene_photos(0, 0, 2):
        writer.add(photo)
    writer.finish()
    verb = ["cache", str(tmp_path / "shards"), str(tmp_path / "out"), "--model", str(tmp_path / "tiny"), "--json"]
    assert call(monkeypatch, *verb, "--complete", "3", "--path", "2") == 2
    assert "refine-control: --path 2 does not divide --complete 3; make it a divisor\n" in capsys.readouterr().err
    assert call(monkeypatch, *verb, "--complete", "2", "--path", "2", "--guidance", "3") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["made"] is True
    assert said.err.count("completions: 2 samples, 8 calls of the ControlNet and the transformer, 1.6e-05 GB\n") == 1
    assert said.err.count("completions:") == 1
