"""CLIP's obedience: it looks where the mask is, and a region that shows its prompt scores above all others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from refine_control.errors import InvalidInputError, MissingError
from refine_control.metrics import region_clip as module
from refine_control.metrics.features import ClipText, clip, load_clip_text, text_features
from refine_control.metrics.region_clip import clip_scores, mask_square, prompts_asked, region_pictures
from refine_control.miniature.networks import write_tokenizer
from refine_control.miniature.scene_shards import scene_photos


def mask_of(rows, columns, shape=(40, 60)):
    mask = np.zeros(shape, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "square"),
    [
        (mask_of((10, 20), (20, 30)), ((10, 20), (20, 30))),
        (mask_of((10, 14), (20, 30)), ((7, 17), (20, 30))),
        (mask_of((0, 4), (50, 60)), ((0, 10), (50, 60))),  # moved into the picture
        (mask_of((36, 40), (0, 30)), ((10, 40), (0, 30))),
        (mask_of((5, 10), (0, 60)), ((0, 40), (10, 50))),  # no larger than the shorter side
    ],
)
def test_the_square_holds_the_mask_and_stays_in_the_picture(mask, square):
    found = mask_square(mask)
    assert tuple((s.start, s.stop) for s in found) == square


def test_an_empty_mask_has_no_region():
    with pytest.raises(ValueError, match="no region"):
        mask_square(mask_of((0, 0), (0, 0)))


def test_only_what_is_in_the_square_is_seen():
    masks = np.stack([mask_of((10, 20), (20, 30))] * 2)
    images = np.zeros((2, 40, 60, 3), np.uint8)
    images[:, 10:20, 20:30] = 200
    images[1, :10] = 90
    seen = region_pictures(images, masks, 8)
    assert seen.shape == (2, 8, 8, 3)
    assert (seen == 200).all()


def test_which_prompts_are_asked():
    one, two, three = (
        replace(p, prompt=text, meta={"photo": photo}, global_prompt="all")
        for p, text, photo in zip(scene_photos(0, 0, 3), ("a", "b", "c"), ("x", "x", "y"), strict=True)
    )
    assert prompts_asked([one, two]) == {"clip_local": ["a", "b"], "clip_global": ["all"] * 2, "clip_other": ["b", "a"]}
    alone = prompts_asked([one, two, three])
    assert alone["clip_other"] == ["b", "a", "a"]  # a photograph with one region asks for the next photograph's
    untold = prompts_asked([replace(p, global_prompt="") for p in (one, two, three)])
    assert untold["clip_global"] == ["a, b", "a, b", "c"]
    assert set(prompts_asked([one, one])) == {"clip_local", "clip_global"}


@pytest.fixture
def text(tmp_path):
    from transformers import CLIPTextConfig

    tokenizer = write_tokenizer(tmp_path)
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(**{**clip.LARGE_TEXT, **tiny, "projection_dim": 8, "vocab_size": len(tokenizer)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        from transformers import CLIPTextModelWithProjection

        tensors = CLIPTextModelWithProjection(config).state_dict()
    foreign = {
        "vision_model.post_layernorm.weight": torch.ones(3),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    return ClipText(clip.assemble_text(config, {**tensors, **foreign}), tokenizer), config, tensors


def test_prompts_have_length_one_whatever_their_batch(text):
    prompts = ["a red circle", "a blue ring", "a green star"]
    found = text_features(text[0], prompts)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(text_features(text[0], prompts, batch_size=1), found, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_the_text_tower_is_loaded_whole_or_not_at_all(text):
    _, config, tensors = text
    with pytest.raises(InvalidInputError, match="lack 1 tensor"):
        clip.assemble_text(config, {k: v for k, v in tensors.items() if k != "text_projection.weight"})


def test_a_region_that_shows_its_prompt_scores_a_hundred(text, monkeypatch):
    prompts = ["a red circle", "a blue ring"]
    shown = text_features(text[0], prompts)
    monkeypatch.setattr(module, "clip_features", lambda network, pictures: shown)
    tower = torch.nn.Module()
    tower.config = type("Config", (), {"image_size": 8})()
    masks = np.stack([mask_of((10, 20), (20, 30))] * 2)
    asked = {"clip_local": prompts, "clip_other": prompts[::-1]}
    scores = clip_scores(tower, text[0], np.zeros((2, 40, 60, 3), np.uint8), masks, asked)
    np.testing.assert_allclose(scores["clip_local"], 100, rtol=1e-5)
    np.testing.assert_allclose(scores["clip_other"], 100 * (shown[0] @ shown[1]), rtol=1e-5)
    assert (scores["clip_other"] < 99).all()


def test_a_tokenizer_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "find_weights", lambda published, given: tmp_path / "pytorch_model.bin")
    with pytest.raises(MissingError, match=r"CLIP score not computed: needs vocab\.json"):
        load_clip_text()
