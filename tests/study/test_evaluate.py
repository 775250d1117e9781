"""Two names for one network differ by nothing, and what is written is what was measured."""

import json
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from refine_control.cli.app import app
from refine_control.cli.options import sampling
from refine_control.config import SamplerConfig, StudentCard
from refine_control.errors import InvalidInputError
from refine_control.metrics import image_pairs as metrics
from refine_control.metrics.cost import ModelCost
from refine_control.metrics.features import Inception
from refine_control.metrics.statistics import Interval
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.scene_shards import build_scenes, scene_photos
from refine_control.miniature.tasks.task import find_task
from refine_control.models.card import EDGE, own_sampling
from refine_control.models.loading import save_controlnet
from refine_control.photos.shards import ShardWriter
from refine_control.records import LABELED, TEST, UNLABELED
from refine_control.study import evaluate as evaluating
from refine_control.study import model_cost
from refine_control.study.compare import compare, read_test, score
from refine_control.study.evaluate import models_json, summarise_models, write_results
from refine_control.study.feature_metrics import SET_METRICS, FeatureNetworks
from refine_control.study.row_results import RowResult
from refine_control.study.summary import ROW_METRICS, ratio_of_means, summarise

PHOTOS = list(scene_photos(0, 0, 5))
SAMPLER = SamplerConfig(num_inference_steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def networks(tiny_backbone, tiny_student):
    teacher = tiny_backbone.pipeline.controlnet
    return {"teacher": teacher, "ours": tiny_student(3), "fc": tiny_student(2), "same": teacher}


@pytest.fixture(scope="module")
def eyes():
    """An oracle that never learnt, and an Inception of random weights: what they say is no matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier()
        oracle = partial(find_task().score, classifier=classifier)
        return FeatureNetworks(classifier, inception=Inception().eval().requires_grad_(False), oracle=oracle)


@pytest.fixture(scope="module")
def result(tiny_backbone, networks, eyes):
    return compare(tiny_backbone, networks, PHOTOS, SAMPLER, eyes)


def test_a_network_against_itself_differs_by_nothing(result):
    summary = summarise_models(result)
    pair = summary.differences["teacher", "same"]
    assert set(pair) >= {"psnr", "psnr_region", "ssim", "both", "scene_perceptual", "scene_frechet", "fid", "kid"}
    assert "cmmd" not in pair
    assert "lpips" not in pair
    for values in pair.values():
        assert values == (0, 0, 0)
        assert not values.excludes_zero
    assert summary.differences["teacher", "ours"]["psnr"].mean != 0


def test_the_order_of_the_models_changes_nothing(tiny_backbone, networks, result, eyes):
    turned = compare(tiny_backbone, dict(reversed(networks.items())), PHOTOS, SAMPLER, eyes)
    assert list(turned.scores) == list(reversed(result.scores))
    np.testing.assert_array_equal(turned.images["ours"], result.images["ours"])
    for model, scores in result.scores.items():
        assert turned.scores[model].keys() == scores.keys()
        for name, values in scores.items():
            np.testing.assert_array_equal(turned.scores[model][name], values)


def test_each_model_may_be_sampled_in_its_own_way(tiny_backbone, networks, result):
    few = SAMPLER.model_copy(update={"num_inference_steps": 1, "guidance_scale": 1.0})
    two = {name: networks[name] for name in ("teacher", "ours")}
    mixed = compare(tiny_backbone, two, PHOTOS[:2], {"teacher": SAMPLER, "ours": few})
    alone = compare(tiny_backbone, {"ours": networks["ours"]}, PHOTOS[:2], few)
    np.testing.assert_array_equal(mixed.images["ours"], alone.images["ours"])
    assert np.abs(mixed.images["ours"].astype(int) - result.images["ours"][:2]).max() > 1
    assert np.abs(mixed.images["teacher"].astype(int) - result.images["teacher"][:2]).max() <= 1


def test_a_report_says_how_each_model_was_sampled():
    few = SAMPLER.model_copy(update={"num_inference_steps": 1, "guidance_scale": 1.0, "sigmas": "even"})
    samplers = {"teacher": SAMPLER, "fc": SAMPLER, "ours": few}
    shared, words = (evaluating.sampler_facts(each, 5)["sampler"] for each in (SAMPLER, samplers))
    assert shared == evaluating.sampler_facts({"teacher": SAMPLER, "fc": SAMPLER}, 5)["sampler"]
    assert words.startswith(f"teacher, fc: {shared}; ours: Euler, 1 steps, even noise levels, guidance 1,")
    table = evaluating.sampling_table(samplers)
    assert [list(row[:5]) for row in table.rows][1:] == [
        ["fc", "2", "2", "0.95", "scheduler"],
        ["ours", "1", "1", "0.95", "even"],
    ]


@pytest.mark.parametrize("given", [{}, {"steps": 3}, {"guidance": 5.0}, {"guidance": 5.0, "sigmas": "scheduler"}])
def test_the_command_of_a_report_samples_every_model_the_same_way(tmp_path, tiny_backbone, tiny_student, given):
    card = StudentCard(sampling=SamplerConfig(num_inference_steps=2, sigmas="even"), most_steps=2, distilled_guidance=3)
    save_controlnet(tiny_student(1), tmp_path, 24, card=card, backbone=tiny_backbone)
    sources = {"teacher": None, "few": tmp_path}

    def samplers(steps=None, guidance=None, sigmas=None, conditioning_scale=None):
        others = {"sigmas": sigmas, "seed": 4}
        return {n: sampling("mini", each, steps, guidance, conditioning_scale, **others) for n, each in sources.items()}

    chosen = samplers(**given)
    options = evaluating._sampling_options(chosen, SamplerConfig(**own_sampling("mini")))
    types = {"steps": int, "guidance": float, "conditioning-scale": float, "sigmas": str}
    again = {name.replace("-", "_"): types[name](value) for name, value in options.items()}
    assert samplers(**again) == chosen
    assert (chosen["teacher"] != chosen["few"], "steps" in again) == (True, "steps" in given)


def test_scores_are_the_metrics_of_the_pictures(result):
    reference, masks = np.stack([p.image for p in PHOTOS]), np.stack([p.mask for p in PHOTOS])
    painted, scores = result.images["ours"], result.scores["ours"]
    np.testing.assert_array_equal(scores["psnr"], metrics.psnr(reference, painted))
    np.testing.assert_array_equal(scores["psnr_region"], metrics.psnr(reference, painted, masks))
    put_back = np.where(masks[..., None], painted, reference)
    np.testing.assert_array_equal(scores["psnr_composited"], metrics.psnr(reference, put_back))
    assert (scores["psnr_composited"] > scores["psnr"]).all()


def test_a_perfect_answer_has_the_best_scores():
    perfect = score(PHOTOS, np.stack([p.image for p in PHOTOS]), FeatureNetworks(), ({}, {}))
    assert (perfect["psnr"] == metrics.MAX_PSNR).all()
    np.testing.assert_allclose(perfect["ssim"], 1)
    assert "both" not in perfect


def test_the_share_of_the_gap_is_that_of_the_means(result):
    up = {"teacher": 4.0, "fc": 0.0, "ours": 3.0}
    clear = result._replace(
        scores={n: {m: v + up[n] for m, v in result.scores["fc"].items()} for n in ("teacher", "fc", "ours")}
    )
    assert summarise_models(clear).gap_closed["ours"]["psnr_region"].mean == pytest.approx(0.75)
    without = clear._replace(scores={n: clear.scores[n] for n in ("teacher", "ours")})
    assert "gap_closed" not in models_json(summarise_models(without), without)


def test_sharpness_is_of_the_pictures_and_compared_as_a_ratio(result):
    rows = {n: [RowResult(n, 0, "", scores, {})] for n, scores in result.scores.items()}
    masks = np.stack([photo.mask for photo in PHOTOS])
    np.testing.assert_array_equal(
        result.scores["ours"]["sharpness"], metrics.high_pass_energy(result.images["ours"], masks)
    )
    means = [result.scores[name]["sharpness"].mean() for name in ("ours", "teacher")]
    np.testing.assert_allclose(ratio_of_means(rows["ours"], rows["teacher"], "sharpness").mean, means[0] / means[1])
    np.testing.assert_allclose(ratio_of_means(rows["same"], rows["teacher"], "sharpness"), (1, 1, 1))


def test_rows_of_before_sharpness_was_measured_still_make_a_table(result):
    before = {n: {m: v for m, v in scores.items() if m != "sharpness"} for n, scores in result.scores.items()}
    rows = {n: [RowResult(n, 0, "", scores, {})] for n, scores in {**result.scores, "fc": before["fc"]}.items()}
    summary = summarise(rows, ROW_METRICS, [("teacher", "fc")])
    assert "sharpness" not in summary.metrics
    assert set(summary.differences["teacher", "fc"]) == set(summary.metrics) >= {"psnr_region", "ssim"}
    assert ratio_of_means(rows["fc"], rows["teacher"], "sharpness") is None


def test_a_share_of_a_gap_that_may_be_zero_is_not_bounded(tmp_path, result):
    noise = np.array([-1.0, 1.0])[np.arange(len(PHOTOS)) % 2]
    scores = {
        n: {"psnr_region": 20 + sign * (noise + 0.3)} for n, sign in (("teacher", 1.01), ("fc", -1.0), ("ours", 0.5))
    }
    unclear = result._replace(scores=scores, sets={})
    summary = summarise_models(unclear)
    assert not summary.gap_closed["ours"]["psnr_region"].bounded
    report = write_results(tmp_path, "Title", PHOTOS, unclear, summary, {}, {})
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert written["gap_closed"]["psnr_region"]["low"] is None
    assert (
        "that ours closes is not bounded. Not bounded: the teacher is not statistically distinguishable" in report.text
    )


def test_a_teacher_that_is_worse_leaves_no_gap_to_close(result):
    means = {"teacher": 0.0, "fc": 4.0, "ours": 1.0}
    scores = {n: {m: v + means[n] for m, v in result.scores["fc"].items() if m == "psnr_region"} for n in means}
    assert summarise_models(result._replace(scores=scores, sets={})).gap_closed == {"ours": {}}


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


def test_what_is_written_is_what_was_measured(tmp_path, result):
    cost = ModelCost(3, 10, 0.5, 1.5, 0.01, 1 << 20)
    closed = {"ours": {"psnr_region": Interval(0.87, 0.84, 0.9)}}
    summary = replace(summarise_models(result), gap_closed=closed)
    made = write_results(tmp_path, "Title", PHOTOS, result, summary, {"ours": cost}, {"model": "tiny"})
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert written["keys"] == [p.key for p in PHOTOS]
    assert written["samples"] == len(PHOTOS)
    assert written["cost"]["ours"]["num_params"] == 10
    for name, by_metric in written["models"].items():
        for metric, values in by_metric.items():
            if metric in SET_METRICS:
                assert values["mean"] == pytest.approx(result.sets[name][metric].value)
                continue
            scores = written["per_image"][name][metric]
            assert len(scores) == len(PHOTOS)
            assert values["mean"] == pytest.approx(np.mean(scores), abs=1e-5)
            assert values["low"] <= values["mean"] + 1e-9
            assert values["mean"] <= values["high"] + 1e-9
            np.testing.assert_allclose(scores, result.scores[name][metric], atol=1e-6)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    mean = f"{written['models']['ours']['psnr']['mean']:.2f}"
    for text in (made.report.read_text(), made.text, (tmp_path / "tables.md").read_text()):
        assert mean in text
        assert "teacher - ours" in text
    assert "ours closes 87 % [84, 90] of the gap between fc and the teacher in PSNR region dB." in made.text
    assert max(map(len, made.text.split("report: ")[0].splitlines())) < 200
    assert (tmp_path / "tables.tex").read_text().count(r"\toprule") == 3


def shards(folder, role, count):
    writer = ShardWriter(folder, role)
    for photo in PHOTOS[:count]:
        writer.add(photo)
    writer.finish()
    return folder


def test_test_shards_are_read_and_others_refused(tmp_path):
    photos = read_test(shards(tmp_path / "test", TEST, 3))
    assert [p.key for p in photos] == [p.key for p in PHOTOS[:3]]
    with pytest.raises(InvalidInputError, match="nothing to compare"):
        read_test(shards(tmp_path / "unlabeled", UNLABELED, 3))
    with pytest.raises(InvalidInputError, match="at least 2"):
        read_test(shards(tmp_path / "one", LABELED, 1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="no finished shards"):
        read_test(tmp_path / "empty")


def test_names_that_the_teacher_or_another_model_has_are_refused_at_once(tmp_path):
    test = shards(tmp_path / "test", TEST, 3)
    (tmp_path / "a").mkdir()
    given = ["--test", str(test), "--out", str(tmp_path / "out")]
    for words, says in [
        (["evaluate", "--student", f"teacher={tmp_path / 'a'}", *given], "use the name teacher for the teacher"),
        (["evaluate", "--student", f"x={tmp_path / 'a'}", "--baseline", "x=sd2", *given], "x is given twice"),
        (["evaluate", "--student", f"x={tmp_path / 'a'}", "--baseline", "teacher=sd2", *given], "use the name teacher"),
        (["cost", "--controlnet", f"teacher={tmp_path / 'a'}"], "use the name teacher"),
    ]:
        with pytest.raises(InvalidInputError, match=says):
            CliRunner().invoke(app, words, catch_exceptions=False)


def test_the_command_of_an_evaluation_is_one_for_a_shell():
    students = {"ours": Path("my student")}
    command = evaluating._command("mini", None, students, {}, Path("a b"), Path("out"), {"teacher": SAMPLER}, None)
    words = shlex.split(command)
    assert words[2:6] == ["--model", "mini", "--student", "ours=my student"]
    assert words[words.index("--test") + 1] == "a b"
    assert "--teacher" not in words


def test_noise_seeds_add_a_table_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(model_cost, "_peak_in_fresh_process", lambda *_: 1)  # two processes of many seconds
    build_scenes(tmp_path / "scenes", labeled=0, unlabeled=0, test=2)
    test, out = tmp_path / "scenes" / "test", tmp_path / "out"
    sampler = SamplerConfig(num_inference_steps=1, guidance_scale=1.0, conditioning_scale=1.0)
    written = evaluating.evaluate("mini", None, {"edge": EDGE}, test, out, sampler, noise_seeds=2)
    assert (out / "seeds.png").read_bytes().startswith(b"\x89PNG")
    assert "Diversity over noise seeds" in (out / "tables.md").read_text()
    assert "--noise-seeds 2" in written.report.read_text()


def test_one_noise_seed_is_refused_before_anything_is_loaded(tmp_path):
    options = ["evaluate", "--student", "edge=edge", "--test", str(tmp_path), "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*options, "--noise-seeds", "1"])
    assert isinstance(refused.exception, InvalidInputError)
    assert "one seed has nothing to differ from" in str(refused.exception)
