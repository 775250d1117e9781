"""Every verb that writes refuses what cannot be its output, and every long verb ends with 75 at a signal."""

import os
import signal
import sys

import pytest

from refine_control.cli import app as cli
from refine_control.signals import STOPPING
from refine_control.storage import publish_folder

INPAINT = ("inpaint", "--image", "{0}/photo.png", "--mask", "{0}/photo.png", "--prompt", "a cup", "--out")
GENERATE = ("generate", "--control", "{0}=photo.png", "--prompt", "a cup", "--out")
EVALUATE = ("evaluate", "--student", "{0}/inputs", "--test", "{0}/inputs", "--out")
FOLDER_VERBS = {
    "demo": ("demo", "--out"),
    "train": ("train", "mini/fc", "--run-dir"),
    "mini train": ("mini", "train", "--out"),
    "evaluate": EVALUATE,
    "reproduce": ("reproduce", "table1", "--out"),
    "reproduce results": ("reproduce", "table1", "--results"),
    "cache": ("cache", "{0}/inputs"),
    "export": ("export", "{0}/inputs", "--to", "onnx", "--out"),
    "trim": ("trim", "{0}/inputs", "--out"),
    "data annotate": ("data", "annotate", "{0}/inputs"),
    "data build": ("data", "build", "{0}/inputs"),
    "data scenes": ("data", "scenes"),
    "data reword": ("data", "reword", "{0}/inputs", "--as", "template"),
    "data download": ("data", "download", "{0}/photo.png"),
    "data review": ("data", "review", "{0}/inputs", "--to-label-studio"),
}
FILE_VERBS = {
    "inpaint": INPAINT,
    "generate": GENERATE,
    "inspect sheet": ("data", "inspect", "{0}/inputs", "--sheet"),
    "inspect html": ("data", "inspect", "{0}/inputs", "--html"),
}
BAD = ("{0}/photo.png/out", "{0}/photo.png/inner/out", "{0}/" + "n" * 300, "{0}/" + "é" * 130 + "/out")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "photo.png").touch()
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["refine-control", *(word.format(tmp_path) for word in words)])
        try:
            code = cli.main()
        except SystemExit as left:
            code = left.code
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("verb", [*FOLDER_VERBS, *FILE_VERBS])
def test_an_output_that_cannot_be_is_refused_before_anything_is_loaded(call, tmp_path, verb):
    words, bad = (FOLDER_VERBS[verb], "{0}/photo.png") if verb in FOLDER_VERBS else (FILE_VERBS[verb], "{0}/inputs")
    for out in (bad, *BAD):
        code, said = call(*words, out)
        assert (code, said[:16]) == (2, "refine-control: ")
        assert "choose" in said or "name a file" in said
    assert sorted(os.listdir(tmp_path)) == ["inputs", "photo.png"]


@pytest.mark.parametrize("verb", FOLDER_VERBS)
def test_another_kind_of_folder_is_no_output(call, tmp_path, verb):
    kind = "shards" if verb == "cache" else "cache"
    with publish_folder(tmp_path / "other", kind=kind):
        pass
    code, said = call(*FOLDER_VERBS[verb], "{0}/other")
    assert code == 2
    assert "choose a new folder for the output" in said
    assert os.listdir(tmp_path / "other") == ["manifest.json"]


def test_a_run_named_by_its_recipe_is_checked_too(call, tmp_path):
    (tmp_path / "runs").touch()
    code, said = call("train", "mini/fc")
    assert code == 2
    assert "runs is no folder" in said


@pytest.mark.parametrize("name", ["a\\0b", "n" * 300])
def test_a_name_in_a_recipe_that_no_file_may_have_is_refused(call, tmp_path, name):
    (tmp_path / "mine.yaml").write_text(f'base: mini/fc\nname: "{name}"\n')
    code, said = call("train", "mine.yaml")
    assert code == 2
    assert said.startswith("refine-control: ")


LONG = {
    "cache": ("refine_control.cache.building.cache_folder", ("cache", "{0}/inputs", "out")),
    "data annotate": ("refine_control.annotation.annotate.annotate", ("data", "annotate", "{0}/inputs", "out")),
    "data build": ("refine_control.photos.build.build", ("data", "build", "{0}/inputs", "out")),
    "data scenes": ("refine_control.miniature.scene_shards.build_scenes", ("data", "scenes", "out")),
    "data verify": ("refine_control.photos.shards.verify", ("data", "verify", "{0}/inputs")),
    "inpaint": ("refine_control.pipeline.pictures.read_photograph", (*INPAINT, "out.png")),
    "generate": ("refine_control.pipeline.files.generate_file", (*GENERATE, "out.png")),
    "evaluate": ("refine_control.study.evaluate.evaluate", (*EVALUATE, "out")),
    "train": ("refine_control.training.run.train", ("train", "mini/fc")),
    "demo": ("refine_control.study.demo.run_demo", ("demo",)),
    "cost": ("refine_control.study.model_cost.compare", ("cost",)),
}


@pytest.mark.parametrize("verb", LONG)
@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_a_long_verb_with_75_and_a_sentence(call, monkeypatch, verb, number):
    inner, words = LONG[verb]

    def signalled(*arguments, **options):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal must end it here")

    monkeypatch.setattr(inner, signalled)
    before = signal.signal(number, signal.default_int_handler)  # whoever started the tests may ignore SIGINT
    try:
        code, said = call(*words)
    finally:
        signal.signal(number, before)
    assert code == 75
    assert f"stopped by {signal.Signals(number).name}" in said
    assert "run the same command" in said
