import hashlib
import itertools
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from refine_control.config import OptimizerConfig, Recipe, fingerprint, learning_rate_at, resolved_yaml
from refine_control.errors import InvalidInputError
from refine_control.recipe_files import load_recipe, recipe_names


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path, *overrides: str) -> str:
    with pytest.raises(InvalidInputError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# YAML with its traps closed.


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.0e-04", 1e-4), (".5", 0.5), ("1", 1.0), ("2E-3", 2e-3)]
)
def test_a_number_is_read_as_a_number(write, text, value):
    rate = load_recipe(write(f"name: a\noptimizer: {{learning_rate: {text}}}")).optimizer.learning_rate
    assert rate == value
    assert isinstance(rate, float)


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "Yes", "True", "010", "null", "1e-4", "1:30", "0x10", "~"])
def test_a_word_that_other_readers_retype_survives_in_text_and_in_the_resolved_recipe(write, word):
    recipe = load_recipe(write(f"name: a\nmodel: '{word}'"))
    assert recipe.model == word
    assert load_recipe(write(resolved_yaml(recipe))) == recipe
    assert yaml.safe_load(resolved_yaml(recipe))["model"] == word


@pytest.mark.parametrize("word", ["yes", "no", "on", "off"])
def test_only_true_and_false_are_booleans(write, word):
    assert load_recipe(write(f"name: a\nmodel: {word}")).model == word
    message = refusal(write(f"name: a\ntraining: {{compile: {word}}}"))
    assert f"training.compile is '{word}' and must be true or false" in message


@pytest.mark.parametrize("text", ["010", "0x10", "1:30", "1_0", "'10'", "10.0", "true", "1e1"])
def test_a_whole_number_is_written_plainly_in_decimal(write, text):
    assert "must be a whole number, at least 1" in refusal(write(f"name: a\ntraining: {{steps: {text}}}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nname: b", "line 2: duplicate key name"),
        ("name: a\ntraining:\n  steps: 1\n  steps: 2", "line 4: duplicate key steps"),
        ("name: &x a\nmodel: *x", "line 1: anchors and aliases"),
        ("name: a\ntraining: {steps: !!int '010'}", "line 2: explicit tags"),
        ("name: !!python/object:os.system a", "line 1: explicit tags"),
        ("name: a\n1: b", "line 2: key 1 is not a word"),
        ("name: [a", "line 1"),
        ("- a", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("\x00", "not readable as YAML"),
        ("name: [\n" * 2000, "not readable as YAML"),
        ("name: a\ntraining: {steps: " + "9" * 5000 + "}", "not readable as YAML"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence_with_its_line(write, text, said):
    path = write(text)
    message = refusal(path)
    assert str(path) in message
    assert said in message


def test_a_missing_file_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.yaml")


# Keys, types, ranges.


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("traning", "training"),
        ("learning_rate", "optimizer.learning_rate"),
        ("training.learning_rate", "optimizer.learning_rate"),
        ("training.stepz", "training.steps"),
        ("objective.weights.alhpa", "objective.weights.alpha"),
        ("guidance", "sampler.guidance_scale"),
    ],
)
def test_an_unknown_key_names_file_key_and_nearest(write, key, nearest):
    section, _, last = key.rpartition(".")
    text = f"{last}: 1"
    for part in reversed(section.split(".") if section else []):
        text = f"{part}: {{{text}}}"
    path = write(f"name: a\n{text}")
    assert refusal(path) == f"{path}: unknown key {key}; the nearest valid one is {nearest}"
    assert f"unknown key {key}; the nearest valid one is {nearest}" in refusal(write("name: a"), f"{key}=1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "training.steps=0",
            "training.steps is 0 and must be a whole number, at least 1, at most 99999999 (opt",
        ),
        ("training.threads=9999999999999999999", "must be a whole number, at least 0, at most 4096 (CPU threads"),
        ("training.batch_size=1000000000", "must be a whole number, at least 1, at most 65536 (samples of one update"),
        ("objective.weights.alpha=1", "must be a number, at least 0.5, below 1"),
        ("objective.kind=foo", "must be one of supervised, self_supervised, from_scratch"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9] and must be a list of two numbers"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas is [0.9, 0.9, 0.9] and must be a list of two numbers"),
        ("optimizer.betas=[0.9, 1]", "--set optimizer.betas=[0.9, 1]: optimizer.betas.1 is 1 and must be"),
        ("optimizer.betas=3", "optimizer.betas is 3 and must be a list of two numbers"),
        ("paper={psnr: x}", "paper.psnr is 'x' and must be a mapping of words to numbers"),
        ("optimizer.learning_rate=.inf", "must be a number, above 0, at most 1"),
        ("optimizer.learning_rate=1e999", "must be a number, above 0, at most 1"),
        ("training=5", "must be a section with the keys"),
        ("training.device_batch_size=3", "device_batch_size 3 does not divide batch_size 8"),
        ("training.steps", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("name=../elsewhere", "name is '../elsewhere'"),
        ("model=", "not empty"),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(write, override, said):
    assert said in refusal(write("name: a"), override)


def test_a_missing_required_key_is_named(write):
    assert "name is missing; it is text" in refusal(write("model: mini"))


def test_overrides_are_typed_by_their_field(write):
    recipe = load_recipe(
        write("name: a\ntraining: {steps: 5}\ndata:"),
        ["optimizer.learning_rate=1e-4", "data.labeled=010", "sigmas.shift=3", "data.test=null", "paper.psnr=19.25"],
    )
    assert (recipe.optimizer.learning_rate, recipe.data.labeled, recipe.sigmas.shift) == (1e-4, "010", 3.0)
    assert (recipe.data.test, recipe.paper, recipe.training.steps) == (None, {"psnr": 19.25}, 5)


def test_a_recipe_is_frozen(write):
    recipe = load_recipe(write("name: a"))
    with pytest.raises(ValidationError):
        recipe.training.steps = 3


def test_every_field_is_described():
    def fields(section):
        for name, field in section.model_fields.items():
            yield name, field
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation)

    assert [name for name, field in fields(Recipe) if not field.description] == []


# Names, fingerprints, the resolved recipe.


RECORD = [f"{size}/{row}" for size in ("mini", "sd3") for row in ("fc", "ours_stage1", "ours_stage2")]
"""The recipes of record; the others are ablations that lie over them."""


def test_the_packaged_recipes_are_these():
    ablations = (
        "balanced_stage1",
        "balanced_stage2",
        "fc_inherit",
        "fc_plain",
        "fc_random",
        "inherit_stage1",
        "inherit_stage2",
        "one_stage",
        "ours_completed_stage2",
        "ssd",
        "wo_cf_stage1",
        "wo_cf_stage2",
        "wo_mask",
    )
    few_steps = (
        "codi",
        "codi_lora",
        "codi_prior",
        "codi_whole",
        "edge",
        "end_points",
        "guidance",
        "lcm",
        "pcm",
        "windows",
    )
    named = [f"mini/{name}" for name in (*ablations, "wo_mask_matched", *few_steps)]
    same = [f"sd3/{name}" for name in (*ablations, "wo_mask_matched", *few_steps) if name != "ours_completed_stage2"]
    others = [
        f"{scale}/{name}" for scale in ("flux", "sd35m") for name in ("balanced_stage1", "balanced_stage2", "edge")
    ]
    assert recipe_names() == sorted([*RECORD, *named, "mini/feature_warmup", "sd3/few_step", *same, *others])


@pytest.mark.parametrize("name", RECORD)
def test_a_recipe_of_record_has_the_papers_values(name):
    recipe = load_recipe(name)
    weights = recipe.objective.weights
    assert recipe.name == name
    assert recipe.student.num_layers == 12
    assert (weights.task, weights.output, weights.feature, weights.alpha) == (4, 1, 1, 0.975)
    assert recipe.paper is not None
    assert recipe.paper["psnr"] == (17.7784 if name.endswith("fc") else 19.2546)
    assert set(recipe.paper) == {"psnr", "ssim", "fid", "lpips", "cmmd"}


def test_a_recipe_of_every_scale_is_based_on_recipes_of_the_scale_that_is_asked_for():
    mini, sd3 = load_recipe("mini/wo_mask"), load_recipe("sd3/wo_mask")
    assert (mini.name, mini.model, mini.student.init) == ("mini/wo_mask", "mini", "teacher")
    assert (sd3.name, sd3.student.init) == ("sd3/wo_mask", "transformer")
    assert sd3.model == load_recipe("sd3/ours_stage1").model
    assert mini.objective == sd3.objective
    with pytest.raises(InvalidInputError, match="no recipe is named wo_mask; nearest: "):
        load_recipe("wo_mask")


@pytest.mark.parametrize("size", ["mini", "sd3"])
def test_fc_trains_as_long_as_both_stages(size):
    steps = {row: load_recipe(f"{size}/{row}").training.steps for row in ("fc", "ours_stage1", "ours_stage2")}
    assert steps["fc"] == steps["ours_stage1"] + steps["ours_stage2"]


def test_an_unknown_name_lists_the_nearest():
    message = refusal("mini/our_stage1")
    assert "mini/ours_stage1" in message
    assert "../secrets" in refusal("../secrets")


def test_the_fingerprint_is_of_values_not_of_writing(write):
    one = load_recipe(write("name: a\noptimizer: {weight_decay: 0, learning_rate: 0.0001}"))
    two = load_recipe(write("optimizer:\n  learning_rate: 1e-4\n  weight_decay: 0.0\nname: a"))
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(one) != fingerprint(load_recipe(write("name: a")))
    assert fingerprint(load_recipe(write("name: a"))) == fingerprint(load_recipe(write("name: a\nmodel: mini")))
    # a setting that is added later, at its default, changes no fingerprint
    assert fingerprint(load_recipe(write("name: a\nmodel: mini"))) == hashlib.sha256(b'{"name":"a"}').hexdigest()
    assert len(fingerprint(one)) == 64


@settings(max_examples=60, deadline=None)
@given(
    model=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12),
    rate=st.floats(1e-12, 1),
    steps=st.integers(1, 10**7),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)
def test_the_resolved_recipe_reads_back_equal(tmp_path_factory, model, rate, steps, betas):
    recipe = Recipe.model_validate(
        {
            "name": "a",
            "model": model,
            "optimizer": {"learning_rate": rate, "betas": betas},
            "training": {"steps": steps},
        }
    )
    path = tmp_path_factory.mktemp("resolved") / "recipe.yaml"
    path.write_text(resolved_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert fingerprint(load_recipe(path)) == fingerprint(recipe)


# The learning rate.


@given(
    warmup=st.integers(0, 50),
    total=st.integers(1, 200),
    schedule=st.sampled_from(["constant", "cosine"]),
    final=st.floats(0, 1),
)
def test_the_rate_rises_to_its_peak_and_then_never_rises(warmup, total, schedule, final):
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=warmup, schedule=schedule, final_fraction=final)
    rates = [learning_rate_at(step, optimizer, total) for step in range(total)]
    assert all(0 <= rate <= 0.1 + 1e-12 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    after = rates[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    if total > warmup:
        assert math.isclose(rates[max(0, warmup - 1)], 0.1)
    if schedule == "constant":
        assert set(after) <= {0.1}
    elif total > warmup + 1:
        assert math.isclose(rates[-1], 0.1 * final, abs_tol=1e-12)


def test_the_warm_up_is_linear_and_the_first_update_moves():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate_at(step, optimizer, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


FEW = "name: a\nobjective: {{kind: {}, x0_source: {}, few_step: {{{}}}}}"


@pytest.mark.parametrize(
    ("kind", "x0", "few", "said"),
    [
        (
            "end_points",
            "masked",
            "first: 0.5",
            "needs x0_source teacher or truth: the masked image is no clean picture",
        ),
        ("windows", "truth", "", "kind windows follows the teacher's path and needs x0_source teacher"),
        ("supervised", "truth", "", "x0_source truth is for objectives of few steps"),
        ("codi", "truth", "data_weight: 0, consistency: 0", "no loss where few_step.data_weight and consistency is 0"),
        ("windows", "teacher", "data_weight: 0", "no loss where few_step.data_weight is 0"),
        ("phases", "teacher", "consistency: 0", "no loss where few_step.consistency is 0"),
        ("end_points", "teacher", "first: 0", "begins at pure noise in a share of few_step.first, which is 0"),
    ],
)
def test_few_steps_that_cannot_be_learnt_are_refused(write, kind, x0, few, said):
    assert said in refusal(write(FEW.format(kind, x0, few)))


def test_few_steps_that_can_be_learnt_are_not(write):
    for kind, x0, few in (
        ("codi", "truth", "data_weight: 0"),
        ("codi", "teacher", "consistency: 0"),
        ("guidance", "truth", "consistency: 0"),
        ("end_points", "teacher", "first: 0, points: line"),
        ("end_points", "teacher", "first: 0, steps: 1"),
        ("phases", "teacher", "data_weight: 0"),
    ):
        assert load_recipe(write(FEW.format(kind, x0, few))).objective.is_few_step
