"""The world of photographs: who sees what, encoded as it would be one by one, and a bundle that comes out of it."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from refine_control.conditions.condition import masked_pixels
from refine_control.errors import InvalidInputError
from refine_control.miniature.bundle import make_bundle
from refine_control.miniature.small_photos import read_small_photos
from refine_control.miniature.stages import Stage
from refine_control.miniature.worlds import PhotoBatches, PhotoPictures, PhotoWorld, photo_rows
from refine_control.models.backbone import encode_images
from refine_control.models.card import BUNDLE
from refine_control.models.loading import load_backbone, load_pipeline
from refine_control.randomness import derive_seed
from refine_control.training.loop import Draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(0)
    with tarfile.open(path / "0.tar", "w") as tar:
        for number in range(60):
            data = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(data, "JPEG")
            told = {"category": ("goldfish", "space heater")[number % 2], "box": [8, 8, 40, 32]}
            for suffix, content in (("jpg", data.getvalue()), ("json", json.dumps(told).encode())):
                member = tarfile.TarInfo(f"{derive_seed(number)}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def draw(step, slots=range(4)):
    return Draw(3, "joint", step, list(slots))


def test_every_slot_sees_every_photograph_once_an_epoch(folder):
    photos = read_small_photos(folder, "teacher")
    count = len(photos.keys)
    seen = np.array([photo_rows(draw(step), count) for step in range(2 * count)])
    for slot in range(4):
        assert sorted(seen[:count, slot]) == list(range(count))
        assert (seen[:count, slot] != seen[count:, slot]).any()
    assert (seen[:, 0] != seen[:, 1]).any()
    apart = [photo_rows(draw(5, [slot]), count)[0] for slot in range(4)]
    np.testing.assert_array_equal(apart, seen[5])


def test_a_batch_is_what_encoding_its_pictures_gives(folder):
    photos = read_small_photos(folder, "teacher", limit=6)
    vae = load_pipeline(BUNDLE).vae
    batch = PhotoBatches(vae, photos).batch(draw(2))
    pictures = PhotoPictures(photos).batch(draw(2))
    rows, flips = photo_rows(draw(2), 6), draw(2).uniforms("mirror") < 0.5
    masks = torch.from_numpy(photos.masks[rows])[:, None].float()
    masks = torch.where(flips[:, None, None, None], masks.flip(3), masks)
    with torch.no_grad():
        torch.testing.assert_close(batch.latents, encode_images(vae, pictures), atol=1e-4, rtol=1e-4)
        masked = encode_images(vae, masked_pixels(pictures, masks))
    torch.testing.assert_close(batch.cond_latents, masked, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.mask, torch.nn.functional.interpolate(masks, size=(8, 8)))
    assert batch.local_prompts == [photos.prompts[row] for row in rows]
    assert 0 < flips.sum() < 4


def test_new_words_want_the_stage_that_teaches_them(folder, tmp_path):
    with pytest.raises(InvalidInputError, match="only the stage base trains words"):
        PhotoWorld(folder).pipeline(None, tmp_path, 0, ["joint"])


@pytest.mark.slow
def test_a_bundle_of_photographs_knows_their_words_and_says_whose_they_are(folder, tmp_path):
    stages = {name: Stage(2, 4, 1e-3, 0.9) for name in ("base", "joint")}
    card = make_bundle(tmp_path, stages=stages, count=3, world=PhotoWorld(folder))
    assert "not for publication" in card["license"]
    assert set(card["skill"]) >= {"autoencoder_psnr", "teacher_category", "teacher_empty"}
    bundle = tmp_path / "bundle"
    assert not (bundle / "classifier.safetensors").exists()
    backbone = load_backbone(bundle)
    assert backbone.vocabulary is None
    tokenizer = backbone.pipeline.tokenizer
    assert tokenizer.tokenize("a space heater") == ["a</w>", "space</w>", "heater</w>"]
    known, shipped = backbone.pipeline.transformer, load_pipeline(BUNDLE).transformer
    assert known.config["num_layers"] == shipped.config["num_layers"]
    assert any((a != b).any() for a, b in zip(known.parameters(), shipped.parameters(), strict=True))
    with pytest.raises(InvalidInputError, match="does not know 3 words"):
        PhotoWorld(folder).pipeline(BUNDLE, tmp_path, 0, stages)
    with pytest.raises(InvalidInputError, match=r"other steps, seed, start or images"):
        make_bundle(tmp_path, stages=stages, count=0, world=PhotoWorld(folder), start=bundle)
    with pytest.raises(InvalidInputError, match=r"base was trained with other steps"):
        make_bundle(tmp_path, seed=1, stages=stages, count=0, world=PhotoWorld(folder))
    assert make_bundle(tmp_path, stages=stages, count=0, world=PhotoWorld(folder))["sittings"] == card["sittings"]
    further = {"joint": Stage(1, 4, 1e-3, 0.9)}
    again = make_bundle(tmp_path / "on", stages=further, count=0, world=PhotoWorld(folder), start=bundle)
    assert len(again["sittings"]) == 2
