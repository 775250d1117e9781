"""The cache holds what the model would encode, knows what made it, and is made once."""

import json

import numpy as np
import pytest
import torch

from refine_control.config import SamplerConfig
from refine_control.data import cache_writer
from refine_control.data.cache import Cache, build_cache, model_mark, write_cache
from refine_control.data.cache_writer import photos_as_tensors
from refine_control.data.records import LABELED, TEST, UNLABELED
from refine_control.data.scene_shards import scene_photos
from refine_control.data.shards import ShardWriter
from refine_control.errors import DamagedError, InvalidInputError
from refine_control.models.backbone import masked_pixels

PHOTOS = list(scene_photos(0, 0, 40))  # more than one batch of encoding


@pytest.fixture(scope="module")
def cached(tiny_backbone, tmp_path_factory):
    root = tmp_path_factory.mktemp("cached")
    for role, dtype in ((LABELED, torch.float32), (UNLABELED, torch.float32), (TEST, torch.bfloat16)):
        write_cache(PHOTOS, root / role, tiny_backbone, role, source={"of": "tests"}, dtype=dtype)
    return root


@pytest.fixture
def shards(tmp_path):
    writer = ShardWriter(tmp_path / "shards", LABELED)
    for photo in PHOTOS[:6]:
        writer.add(photo)
    writer.finish()
    return tmp_path / "shards"


@pytest.mark.parametrize("row", [0, 31, 32, 39])
def test_a_row_is_what_the_model_encodes(cached, tiny_backbone, row):
    cache, photo = Cache(cached / LABELED), PHOTOS[row]
    pixels, mask = photos_as_tensors([photo])
    expected = {
        "latents": tiny_backbone.encode_images(pixels),
        "masked_latents": tiny_backbone.encode_images(masked_pixels(pixels, mask)),
        "masks": torch.nn.functional.interpolate(mask, size=(8, 8)).to(torch.uint8),
    }
    for name, value in expected.items():
        torch.testing.assert_close(cache.take(name, [row]), value, rtol=1e-5, atol=1e-5)
    number = cache.take("prompt_index", [row])
    assert cache.prompts[number] == photo.prompt
    assert cache.keys[row] == photo.key
    embeds, pooled = tiny_backbone.encode_prompts([photo.prompt])
    torch.testing.assert_close(cache.take("prompt_embeds", number), embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.take("pooled_prompt_embeds", number), pooled, rtol=1e-5, atol=1e-5)


def test_every_prompt_is_stored_once_and_the_empty_one_first(cached, tiny_backbone):
    cache = Cache(cached / LABELED)
    assert cache.prompts[0] == ""
    assert sorted(cache.prompts[1:]) == sorted({p.prompt for p in PHOTOS})
    assert len(cache.prompts) - 1 < len(PHOTOS)
    assert len(cache.arrays["prompt_embeds"]) == len(cache.prompts)
    empty = tiny_backbone.encode_prompts([""])[1]
    torch.testing.assert_close(cache.take("pooled_prompt_embeds", [0]), empty, rtol=1e-5, atol=1e-5)


def test_an_unlabeled_cache_has_no_latents(cached):
    cache = Cache(cached / UNLABELED)
    assert set(cache.arrays) == {"masked_latents", "masks", "prompt_index", "prompt_embeds", "pooled_prompt_embeds"}
    with pytest.raises(InvalidInputError, match="has no latents"):
        cache.take("latents", [0])
    assert torch.equal(cache.take("masked_latents", [3]), Cache(cached / LABELED).take("masked_latents", [3]))


def test_half_precision_goes_there_and_back(cached):
    full, half = Cache(cached / LABELED), Cache(cached / TEST)
    for name in ("latents", "masked_latents", "prompt_embeds"):
        rows = range(len(full.arrays[name]))
        assert half.take(name, rows).dtype == torch.bfloat16
        assert torch.equal(half.take(name, rows), full.take(name, rows).bfloat16())
    assert half.take("masks", [0]).dtype == torch.uint8
    assert half.arrays["latents"].nbytes * 2 == full.arrays["latents"].nbytes


def test_a_role_serves_itself_and_labels_may_be_ignored(cached):
    assert Cache(cached / LABELED).require(UNLABELED)
    assert Cache(cached / LABELED).require(LABELED)
    for have, want in ((UNLABELED, LABELED), (TEST, UNLABELED), (TEST, LABELED), (LABELED, TEST)):
        with pytest.raises(InvalidInputError, match=f"of role {have}"):
            Cache(cached / have).require(want)


def test_a_cache_of_another_model_is_refused(cached, tiny_backbone):
    mark = model_mark(tiny_backbone)
    assert Cache(cached / LABELED, mark).manifest["source"] == {"of": "tests"}
    with pytest.raises(InvalidInputError, match="another model"):
        Cache(cached / LABELED, "0" * 64)
    weight = tiny_backbone.pipeline.text_encoder_2.text_model.embeddings.token_embedding.weight
    with torch.no_grad():
        kept = weight[3, 3].clone()
        weight[3, 3] += 1e-3
        changed = model_mark(tiny_backbone)
        weight[3, 3] = kept
    assert changed != mark == model_mark(tiny_backbone)


@pytest.mark.parametrize("name", ["latents.npy", "samples.jsonl", "manifest.json"])
def test_damage_is_refused(shards, tmp_path, tiny_backbone, name):
    build_cache(shards, tmp_path / "cache", tiny_backbone)
    path = tmp_path / "cache" / name
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(data[: len(data) // 2]) if name == "manifest.json" else bytes([*data[:-1], data[-1] ^ 1]))
    with pytest.raises(DamagedError, match="delete"):
        Cache(tmp_path / "cache")


def test_what_is_no_cache_is_refused(shards, tmp_path):
    with pytest.raises(InvalidInputError, match="is no cache"):
        Cache(tmp_path / "nothing")
    with pytest.raises(InvalidInputError, match="is no cache"):
        Cache(shards)


def files_of(folder):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_the_same_command_again_does_nothing(shards, tmp_path, tiny_backbone):
    out = tmp_path / "cache"
    assert build_cache(shards, out, tiny_backbone)
    made, before = Cache(out), files_of(out)
    assert (len(made), made.role) == (6, LABELED)
    assert not build_cache(shards, out, tiny_backbone)
    assert files_of(out) == before
    assert build_cache(shards, out, tiny_backbone, torch.bfloat16)
    assert Cache(out).bfloat16
    assert not build_cache(shards, out, tiny_backbone, torch.bfloat16)


def test_completions_fill_the_holes_once(shards, tmp_path, tiny_backbone):
    sampler = SamplerConfig(num_inference_steps=1, guidance_scale=2.0)
    assert build_cache(shards, tmp_path / "cache", tiny_backbone, completions=sampler)
    assert not build_cache(shards, tmp_path / "cache", tiny_backbone, completions=sampler)
    cache = Cache(tmp_path / "cache")
    assert cache.take("completions", range(6)).shape == (6, 16, 8, 8)
    assert cache.manifest["completions"]["guidance_scale"] == 2.0
    assert build_cache(shards, tmp_path / "cache", tiny_backbone)


def test_a_folder_of_something_else_is_not_replaced(shards, tmp_path, tiny_backbone):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.txt").write_text("dear")
    for out in (tmp_path / "mine", shards):
        with pytest.raises(InvalidInputError, match="no cache"):
            build_cache(shards, out, tiny_backbone)
    assert (tmp_path / "mine" / "photo.txt").read_text() == "dear"
    with pytest.raises(InvalidInputError, match="holds no shards"):
        build_cache(tmp_path / "mine", tmp_path / "cache", tiny_backbone)


class Killed(Exception):
    pass


@pytest.mark.parametrize("word", [LABELED, "prompts", "completions"])
@pytest.mark.parametrize("saved", [True, False])
def test_what_was_encoded_before_a_kill_is_not_encoded_again(tmp_path, tiny_backbone, monkeypatch, word, saved):
    wanted = {
        "source": {},
        "prompts": "int8",
        "completions": SamplerConfig(num_inference_steps=1, guidance_scale=1.0),
    }
    write_cache(PHOTOS, tmp_path / "whole", tiny_backbone, LABELED, **wanted)
    monkeypatch.setattr(cache_writer, "_SECONDS_BETWEEN_SAVES", -1.0 if saved else 1e9)

    def kill(done, total, said):
        if said == word:
            raise Killed

    with pytest.raises(Killed):
        write_cache(PHOTOS, tmp_path / "cache", tiny_backbone, LABELED, **wanted, progress=kill)
    assert not (tmp_path / "cache").exists()
    told = []
    write_cache(
        PHOTOS, tmp_path / "cache", tiny_backbone, LABELED, **wanted, progress=lambda *said: told.append(said[::2])
    )
    first = {said: done for done, said in reversed(told)}
    order = [LABELED, "prompts", "completions"]
    assert not set(first) & set(order[: order.index(word)])  # phases that were over are not begun again
    if word != "prompts":  # all prompts are one batch, which is saved when the phase is over
        assert first[word] == (40 if saved else 32)
    whole, again = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("whole", "cache"))
    assert whole == again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "whole"]


def test_eight_bits_hold_an_embedding(cached, tmp_path, tiny_backbone):
    write_cache(PHOTOS, tmp_path / "small", tiny_backbone, LABELED, source={}, prompts="int8")
    full, small = Cache(cached / LABELED), Cache(tmp_path / "small")
    rows = range(len(full.prompts))
    torch.testing.assert_close(small.take("prompt_embeds", rows), full.take("prompt_embeds", rows), rtol=0, atol=0.02)
    error = small.manifest["prompt_relative_error"]
    assert 0 < error["bfloat16"] < error["int8"] < 0.01
    stored = sum(small.arrays[name].nbytes for name in ("prompt_codes", "prompt_scales"))
    assert stored < 0.3 * full.arrays["prompt_embeds"].nbytes
    assert "prompt_embeds" not in small.arrays


def test_an_empty_source_is_refused(tmp_path, tiny_backbone):
    with pytest.raises(InvalidInputError, match="nothing to cache"):
        write_cache([], tmp_path / "cache", tiny_backbone, LABELED, source={})


def test_the_same_photos_give_the_same_bytes(cached, tmp_path, tiny_backbone):
    write_cache(PHOTOS, tmp_path / "again", tiny_backbone, LABELED, source={"of": "tests"})
    first, again = (json.loads((f / "manifest.json").read_text()) for f in (cached / LABELED, tmp_path / "again"))
    assert first == again
    assert len(first["files"]) == 7
    assert np.isfinite(Cache(tmp_path / "again").take("latents", range(40)).numpy()).all()
