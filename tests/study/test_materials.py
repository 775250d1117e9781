"""What rows learn from: each reads its own caches, and data of one's own stand where scenes stood, at either scale."""

from dataclasses import replace
from pathlib import Path

import pytest

from refine_control.cache.reader import Cache
from refine_control.errors import InvalidInputError
from refine_control.miniature.scene_shards import build_scenes
from refine_control.models.card import BUNDLE
from refine_control.photos.shards import Shards
from refine_control.records import LABELED, TEST, UNLABELED
from refine_control.study.materials import Comparison, data_variant, prepare_data, row_caches
from refine_control.study.plan import read_budget, read_rows
from refine_control.study.reproduce import plan, reproduce
from refine_control.study.runs import row_mark

ROWS = read_rows()
TINY = {"labeled": 4, "unlabeled": 4, "test": 3, "alike": 2, "steps": 2, "batch_size": 2, "num_inference_steps": 1}
BUDGET = read_budget("demo").model_copy(update={**TINY, "train_seeds": [0]})


def quiet(label):
    return None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    build_scenes(out, labeled=6, unlabeled=8, test=4, seed=3, test_seed=4)
    return out


def test_every_row_has_caches_of_what_it_learns_from_and_no_more(tmp_path):
    here = Comparison(BUDGET, tmp_path)
    prepare_data(here, [ROWS[key] for key in ("fc", "sl", "labeled_30", "prompts_shuffled")], quiet)
    folders = {p.name for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")}
    assert folders == {
        "labeled",
        "labeled_30%",
        "unlabeled_completed",
        "unlabeled_shuffled_completed",
    }
    caches = {name: Cache(tmp_path / "cache" / name) for name in folders}
    assert (len(caches["labeled"]), len(caches["labeled_30%"])) == (4, 2)
    given, shuffled = caches["unlabeled_completed"], caches["unlabeled_shuffled_completed"]
    assert given.has("completions")
    assert given.keys == shuffled.keys
    assert given.arrays["prompt_index"].tolist() != shuffled.arrays["prompt_index"].tolist() or (
        given.prompts != shuffled.prompts
    )


def test_the_mark_knows_the_data_of_a_row_and_of_a_folder(data):
    here = Comparison(BUDGET.model_copy(update={"steps": 100}), Path("a"))
    marks = {row_mark(ROWS[key], here, 0) for key in ROWS}
    assert len(marks) == len(ROWS)
    mine = replace(here, data=data)
    assert row_mark(ROWS["fc"], mine, 0) != row_mark(ROWS["fc"], here, 0)
    assert row_mark(ROWS["fc"], mine, 0) == row_mark(ROWS["fc"], replace(mine, out=Path("b")), 0)


@pytest.mark.parametrize("which", ["model", "teacher"])
def test_the_mark_knows_weights_that_nobody_listed(which, tmp_path):
    def mark(folder):
        return row_mark(ROWS["fc"], replace(Comparison(BUDGET, tmp_path), **{which: str(folder)}), 0)

    folder = tmp_path / "weights"
    (folder / "transformer").mkdir(parents=True)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(bytes(5 << 20))
    one = mark(folder)
    (folder / "README.md").write_text("words")
    assert mark(folder) == one
    moved = folder.rename(tmp_path / "elsewhere")
    assert mark(moved) == one
    with (moved / "transformer" / weights.name).open("r+b") as file:
        file.seek(-10, 2)
        file.write(b"other")
    assert mark(moved) != one
    assert mark("author/name") != mark("author/another")


def test_a_folder_gives_as_many_samples_as_the_budget_says(data, tmp_path):
    here = Comparison(BUDGET, tmp_path, data=data)
    assert len(here.test_photos()) == 3
    assert data_variant(here, ROWS["inherit"], UNLABELED).share == 0.5
    assert row_caches(here, ROWS["inherit"])["mini/inherit_stage2"][UNLABELED].name == "unlabeled_50%_completed"
    everything = replace(here, budget=BUDGET.model_copy(update=dict.fromkeys((LABELED, UNLABELED, TEST))))
    assert data_variant(everything, ROWS["inherit"], UNLABELED).share == 1
    assert len(everything.test_photos()) == 4
    more = replace(here, budget=BUDGET.model_copy(update={"labeled": 7}))
    with pytest.raises(InvalidInputError, match="holds 6 samples; the budget asks for 7"):
        prepare_data(more, [ROWS["fc"]], quiet)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"scale": "sd3"}, "needs --data"),
        ({"photos": Path("p")}, "needs --model"),
        ({"photos": Path("p"), "data": Path("d"), "model": "m"}, "give one"),
        ({"data": Path("nowhere")}, "nowhere has no shards in labeled"),
        ({"scale": "sd3", "data": Path("nowhere")}, "has no shards in labeled"),
        ({"model": "m"}, "reads no rendered scenes"),
        ({"condition": "edit"}, "no teacher for edit is packaged; .*--teacher"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(parts, told):
    with pytest.raises(InvalidInputError, match=told):
        Comparison(BUDGET, Path("a"), **parts).check()


def test_a_teacher_of_another_condition_than_the_samples_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="of lowres is for lowres, and the samples are of the condition canny"):
        Comparison(BUDGET, tmp_path, teacher="lowres", condition="canny").backbone()


@pytest.mark.parametrize("parts", [{}, {"photos": Path("p"), "model": "m"}])
def test_parts_that_belong_together_are_taken(parts, data):
    Comparison(BUDGET, Path("a"), **parts).check()
    Comparison(BUDGET, Path("a"), "sd3", data=data).check()


def test_a_budget_without_numbers_wants_a_folder(tmp_path):
    budget = read_budget("short", scale="sd3")
    with pytest.raises(InvalidInputError, match="--data"):
        prepare_data(Comparison(budget, tmp_path), [ROWS["fc"]], quiet)


@pytest.mark.slow
def test_the_same_command_runs_sd3s_recipes_on_data_of_ones_own(data, tmp_path):
    numbers = {"steps": 2, "batch_size": 4, "num_inference_steps": 1, "test": 3}
    budget = read_budget("short", scale="sd3").model_copy(update=numbers)
    here = Comparison(budget, tmp_path / "runs", "sd3", str(BUNDLE), str(BUNDLE / "controlnet"), data=data)
    here.check()
    asked = {"rows": ["inherit"], "results": tmp_path / "results", "bar": quiet}
    made = reproduce("table1", here, **asked)
    assert set(made.summary["rows"]) == {"teacher", "fc", "ours", "inherit"}
    assert made.summary["against"] == "ours"
    assert "SD3" in made.text
    assert set(plan("table1", here, [0], ["inherit"], tmp_path / "results")["rows"].values()) == {"finished"}
    drawn = reproduce("figure3", here, **asked)
    assert (tmp_path / "runs" / "figure3.png").is_file()
    assert "figure3.png" in drawn.text
    assert len(Shards(data / TEST)) == 4
    with pytest.raises(InvalidInputError, match="reads rendered scenes alone"):
        reproduce("figure2", here, **asked)


def test_the_condition_of_a_folder_is_that_of_its_samples(tmp_path):
    build_scenes(tmp_path, labeled=2, unlabeled=2, test=2, condition="lowres")
    assert Comparison(BUDGET, tmp_path / "out", data=tmp_path).tested == "lowres"
    assert Comparison(BUDGET, tmp_path / "out", condition="canny").tested == "canny"
