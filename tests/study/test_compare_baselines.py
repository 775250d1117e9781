"""A baseline's row stands beside the others with its own pictures, scores, costs and words."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel

from refine_control.baselines import cost as baseline_cost
from refine_control.baselines import models as baselines
from refine_control.baselines.models import load_baseline
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.miniature import networks as mini
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.scene_shards import scene_photos
from refine_control.miniature.tasks.task import find_task
from refine_control.study.compare import Result
from refine_control.study.compare_baselines import add_baselines
from refine_control.study.evaluate import summarise_models
from refine_control.study.feature_metrics import FeatureNetworks
from refine_control.study.row_results import read_row, write_row
from refine_control.study.row_tables import BaselineWay, baseline_table
from refine_control.study.runs import run_baseline
from refine_control.study.tables import Table

PHOTOS = list(scene_photos(0, 0, 3))
SAMPLER = SamplerConfig(num_inference_steps=28, guidance_scale=7.0, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A U-Net of 16 pixels: VAE of factor 2."""
    from transformers import CLIPTextModel

    root = tmp_path_factory.mktemp("sd")
    torch.manual_seed(1)
    tokenizer = mini.write_tokenizer(root / "words")
    levels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    levels |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    blocks |= {"cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1}
    StableDiffusionInpaintPipeline(
        vae=AutoencoderKL(**{**mini.VAE, **levels}),
        text_encoder=CLIPTextModel(mini.build_text_encoder(len(tokenizer)).config),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=8, in_channels=9, out_channels=4, block_out_channels=(8,), **blocks),
        scheduler=DDIMScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "tiny")
    return root / "tiny"


@pytest.fixture
def quick(monkeypatch):
    """No fresh process, and two steps in place of fifty."""
    two = baselines.KNOWN["sd2"]._replace(num_inference_steps=2)
    monkeypatch.setattr(baselines, "KNOWN", {**baselines.KNOWN, "sd2": two})
    monkeypatch.setattr(baseline_cost, "_peak_in_fresh_process", lambda *_: 7)


def test_a_baseline_joins_the_others(folder, quick):
    result = Result({}, {}, {}, {})
    seen = []
    rows = add_baselines(
        result, {"one": str(folder), "two": str(folder)}, PHOTOS, SAMPLER, progress=lambda *t: seen.append(t)
    )
    assert list(result.scores) == ["one", "two"]
    assert result.images["one"].shape == (3, 64, 64, 3)
    assert seen[0] == (3, 6, "one")
    assert seen[-1] == (6, 6, "two")
    np.testing.assert_array_equal(result.images["one"], result.images["two"])
    assert summarise_models(result).differences["one", "two"]["psnr"].mean == 0
    cost = rows["one"].cost
    assert (cost.size, cost.model.num_layers, cost.model.num_params, cost.model.peak_memory) == (16, 0, 0, 7)
    assert cost.denoiser_params > 0
    assert cost.model.gflops_step > cost.model.gflops_controlnet == 0
    table = baseline_table({n: BaselineWay(r.facts, r.cost.denoiser_params, r.paper) for n, r in rows.items()})
    assert isinstance(table, Table)
    assert all(len(line) == len(table.columns) for line in table.rows)
    assert "2 steps, guidance 7.5, seed 3" in table.rows[0][3]
    assert "64 x 64 pictures are resized" in table.rows[0][2]


def test_a_name_that_is_taken_is_refused(folder, quick):
    result = Result({"teacher": {}}, {}, {}, {})
    with pytest.raises(InvalidInputError, match="teacher is given twice"):
        add_baselines(result, {"teacher": str(folder)}, PHOTOS, SAMPLER)


def test_samples_of_several_sizes_are_refused(folder):
    narrow = replace(PHOTOS[0], image=PHOTOS[0].image[:, :48], mask=PHOTOS[0].mask[:, :48])
    with pytest.raises(InvalidInputError, match="of one size"):
        add_baselines(Result({}, {}, {}, {}), {"sd2": str(folder)}, [narrow, PHOTOS[1]], SAMPLER)


def test_a_row_of_reproduce_is_written_and_read(folder, quick, tmp_path):
    classifier = Classifier().eval()
    networks = FeatureNetworks(classifier, oracle=partial(find_task().score, classifier=classifier))
    row = run_baseline("sd2", str(folder), "mark", 0, PHOTOS, SAMPLER, networks, tmp_path / "sd2-0")
    assert row.scores["psnr"].shape == (3,)
    assert {"colour", "shape", "both"} <= row.scores.keys()
    assert np.load(tmp_path / "sd2-0" / "images.npy").shape == (3, 64, 64, 3)
    assert row.facts.num_layers is None
    write_row(row, tmp_path / "sd2-0.json")
    again = read_row(tmp_path / "sd2-0.json", "mark")
    assert again is not None
    assert again.facts == row.facts
    assert again.steps == 0
    np.testing.assert_allclose(again.scores["psnr"], row.scores["psnr"], atol=1e-4)


@pytest.mark.slow
def test_memory_is_that_of_a_process_that_repaints(folder):
    baseline = load_baseline(folder, device="cpu")
    assert baseline_cost._peak_in_fresh_process(baseline) > 100 * 2**20
