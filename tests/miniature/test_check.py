"""The shipped bundle is what its card says: `refine-control mini check` on 48 scenes."""

from __future__ import annotations

import json

import pytest
import torch

from refine_control.miniature.check import check_bundle
from refine_control.models.card import BUNDLE
from refine_control.storage import read_manifest
from refine_control.training.run import fast_precision

SCENES, CHANCE_SCENES = 48, 20


@pytest.fixture(scope="module")
def measured():
    return check_bundle(SCENES, seed=1, prompts=("local",), precision=fast_precision(torch.device("cpu")))


@pytest.fixture(scope="module")
def chance():
    return check_bundle(
        CHANCE_SCENES, seed=2, prompts=("empty", "wrong"), precision=fast_precision(torch.device("cpu"))
    )


@pytest.fixture(scope="module")
def card():
    return json.loads((BUNDLE / "refine_control.json").read_text())


def test_every_file_of_the_bundle_is_as_published():
    assert read_manifest(BUNDLE)["kind"] == "bundle"


def test_the_bundle_is_small_enough_to_ship():
    assert sum(p.stat().st_size for p in BUNDLE.rglob("*") if p.is_file()) < 30e6


def test_the_autoencoder_keeps_scenes(measured):
    assert measured["autoencoder_psnr"] >= 30


def test_the_oracle_reads_clean_renders_and_guesses_on_noise(measured):
    assert min(measured["oracle_clean"].values()) >= 99
    assert measured["oracle_noise"]["colour"] < 100 / 8 + 4 * 100 * (0.125 * 0.875 / SCENES) ** 0.5
    assert measured["oracle_noise"]["shape"] < 100 / 6 + 4 * 100 * (1 / 6 * 5 / 6 / SCENES) ** 0.5


def test_the_teacher_is_as_skilled_as_its_card_says(measured, card):
    said, found = card["skill"]["teacher_local"], measured["teacher_local"]
    for name in ("colour", "shape", "both"):
        share = said[name] / 100
        assert found[name] >= said[name] - 4 * 100 * (share * (1 - share) / SCENES) ** 0.5 - 1
    assert found["psnr_region"] >= said["psnr_region"] - 1


def test_the_teacher_is_at_chance_without_the_right_prompt(chance):
    for kind in ("empty", "wrong"):
        assert chance[f"teacher_{kind}"]["colour"] < 100 / 8 + 4 * 100 * (0.125 * 0.875 / CHANCE_SCENES) ** 0.5
        assert chance[f"teacher_{kind}"]["shape"] < 100 / 6 + 4 * 100 * (1 / 6 * 5 / 6 / CHANCE_SCENES) ** 0.5
