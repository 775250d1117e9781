"""The cache holds what the model would encode, knows what made it, and is made once."""

import copy
import json
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from refine_control.cache import writer as cache_writer
from refine_control.cache.building import (
    build_cache,
    completion_sampler,
    encode_posterior,
    path_noise,
    write_cache,
)
from refine_control.cache.marks import model_mark
from refine_control.cache.reader import Cache
from refine_control.conditions.condition import show
from refine_control.config import SamplerConfig
from refine_control.errors import DamagedError, InvalidInputError
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models.backbone import Backbone
from refine_control.photos.shards import ShardWriter
from refine_control.pixels import from_images
from refine_control.records import LABELED, TEST, UNLABELED, Photo

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
    pictures, mask = show([photo]).tensors()
    expected = {
        "latents": tiny_backbone.encode_images(from_images(photo.image[None])),
        "cond_latents": tiny_backbone.encode_images(pictures),
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
    assert set(cache.arrays) == {"cond_latents", "masks", "prompt_index", "prompt_embeds", "pooled_prompt_embeds"}
    with pytest.raises(InvalidInputError, match="has no latents"):
        cache.take("latents", [0])
    assert torch.equal(cache.take("cond_latents", [3]), Cache(cached / LABELED).take("cond_latents", [3]))


def test_half_precision_goes_there_and_back(cached):
    full, half = Cache(cached / LABELED), Cache(cached / TEST)
    for name in ("latents", "cond_latents", "prompt_embeds"):
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
    with pytest.raises(InvalidInputError, match=r"is the shards of one role, .* `refine-control cache"):
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
    assert build_cache(shards, out, tiny_backbone, dtype=torch.bfloat16)
    assert Cache(out).bfloat16
    assert not build_cache(shards, out, tiny_backbone, dtype=torch.bfloat16)


def test_completions_fill_the_holes_once(shards, tmp_path, tiny_backbone):
    sampler = SamplerConfig(num_inference_steps=1, guidance_scale=2.0)
    assert build_cache(shards, tmp_path / "cache", tiny_backbone, completions=sampler)
    assert not build_cache(shards, tmp_path / "cache", tiny_backbone, completions=sampler)
    cache = Cache(tmp_path / "cache")
    assert cache.take("completions", range(6)).shape == (6, 16, 8, 8)
    assert cache.manifest["completions"]["guidance_scale"] == 2.0
    assert build_cache(shards, tmp_path / "cache", tiny_backbone)


def test_completions_in_bf16_are_those_in_fp32_up_to_rounding(shards, tmp_path, tiny_backbone):
    painted = {}
    for precision in ("fp32", "bf16"):
        backbone, out = copy.deepcopy(tiny_backbone), tmp_path / precision
        assert build_cache(shards, out, backbone, completions=completion_sampler(1, precision=precision))
        assert backbone.vae.dtype == torch.float32
        painted[precision] = Cache(out)
    exact, near = (each.take("completions", range(6)) for each in painted.values())
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.02
    assert painted["fp32"].manifest["teacher"] == painted["bf16"].manifest["teacher"]


def test_a_folder_of_something_else_is_not_replaced(shards, tmp_path, tiny_backbone):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.txt").write_text("dear")
    for out, fault in ((tmp_path / "mine", "no cache"), (shards, "choose a new folder")):
        with pytest.raises(InvalidInputError, match=fault):
            build_cache(shards, out, tiny_backbone)
    assert (tmp_path / "mine" / "photo.txt").read_text() == "dear"
    with pytest.raises(InvalidInputError, match="holds no shards"):
        build_cache(tmp_path / "mine", tmp_path / "cache", tiny_backbone)


class Killed(Exception):
    pass


def test_completions_of_another_teacher_are_made_again(shards, tmp_path, tiny_backbone):
    sampler = SamplerConfig(num_inference_steps=1, guidance_scale=1.0)
    assert build_cache(shards, tmp_path / "plain", tiny_backbone)
    assert build_cache(shards, tmp_path / "cache", tiny_backbone, completions=sampler)
    weight = next(tiny_backbone.pipeline.controlnet.parameters())
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(0.5)
        assert build_cache(shards, tmp_path / "cache", tiny_backbone, completions=sampler)
        assert not build_cache(shards, tmp_path / "plain", tiny_backbone)  # no teacher has a part in it
    finally:
        with torch.no_grad():
            weight.copy_(before)


COMPLETED = {
    "source": {},
    "prompts": "int8",
    "completions": SamplerConfig(num_inference_steps=1, guidance_scale=1.0),
}


@pytest.fixture(scope="module")
def completed(tiny_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("completed") / "cache"
    write_cache(PHOTOS, folder, tiny_backbone, LABELED, **COMPLETED)
    return folder


@pytest.mark.parametrize("word", [LABELED, "prompts", "completions"])
@pytest.mark.parametrize("saved", [True, False])
def test_what_was_encoded_before_a_kill_is_not_encoded_again(
    completed, tmp_path, tiny_backbone, monkeypatch, word, saved
):
    monkeypatch.setattr(cache_writer, "_SECONDS_BETWEEN_SAVES", -1.0 if saved else 1e9)

    def kill(done, total, said):
        if said == word:
            raise Killed

    with pytest.raises(Killed):
        write_cache(PHOTOS, tmp_path / "cache", tiny_backbone, LABELED, **COMPLETED, progress=kill)
    assert not (tmp_path / "cache").exists()
    calls = []
    write_cache(
        PHOTOS, tmp_path / "cache", tiny_backbone, LABELED, **COMPLETED, progress=lambda *said: calls.append(said[::2])
    )
    first = {said: done for done, said in reversed(calls)}
    order = [LABELED, "prompts", "completions"]
    assert not set(first) & set(order[: order.index(word)])  # phases that were over are not begun again
    if word != "prompts":  # all prompts are one batch, which is saved when the phase is over
        assert first[word] == (40 if saved else 32)
    whole, again = (json.loads((f / "manifest.json").read_text()) for f in (completed, tmp_path / "cache"))
    assert whole == again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


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


# Samples of several sizes.

SIZES = [(48, 80), (64, 64), (48, 80), (80, 48), (48, 80)]


def of_sizes(count):
    """Noise of three sizes in turn, with prompts of the scenes."""
    photos = []
    for number in range(count):
        h, w = SIZES[number % len(SIZES)]
        image = np.random.default_rng(number).integers(0, 256, (h, w, 3), np.uint8)
        mask = np.zeros((h, w), bool)
        mask[h // 4 : h // 2, w // 3 : w // 2 + number % 4] = True
        photos.append(Photo(f"k{number}", image, mask, PHOTOS[number % 7].prompt))
    return photos


def test_a_cache_of_several_sizes_holds_what_the_model_encodes(tmp_path, tiny_backbone):
    photos = of_sizes(12)
    writer = ShardWriter(tmp_path / "shards", LABELED, samples_per_shard=5, several_sizes=True)
    for photo in photos:
        writer.add(photo)
    writer.finish()
    sampler = SamplerConfig(num_inference_steps=1, guidance_scale=2.0)
    assert build_cache(tmp_path / "shards", tmp_path / "cache", tiny_backbone, completions=sampler)
    assert not build_cache(tmp_path / "shards", tmp_path / "cache", tiny_backbone, completions=sampler)
    cache = Cache(tmp_path / "cache")
    assert cache.groups == {(6, 10): range(7), (8, 8): range(7, 10), (10, 6): range(10, 12)}
    assert sorted(cache.keys) == sorted(photo.key for photo in photos)
    named = {photo.key: photo for photo in photos}
    for (h, w), group in cache.groups.items():
        for row in group:
            photo = named[cache.keys[row]]
            pixels = from_images(photo.image[None])
            expected = tiny_backbone.encode_images(show([photo]).tensors()[0])
            torch.testing.assert_close(cache.take("cond_latents", [row]), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                cache.take("latents", [row]), tiny_backbone.encode_images(pixels), rtol=1e-5, atol=1e-5
            )
            assert cache.prompts[cache.take("prompt_index", [row])] == photo.prompt
        for name, channels in (("completions", 16), ("latents", 16), ("masks", 1)):
            assert cache.take(name, list(group)).shape == (len(group), channels, h, w)
    assert cache.has("latents")
    assert not cache.has("latents_std")
    with pytest.raises(ValueError, match="several sizes"):
        cache.take("latents", [6, 7])
    with pytest.raises(InvalidInputError, match="has no latents_std"):
        cache.take("latents_std", [0])


def test_one_size_of_a_build_with_buckets_is_stored_as_ever(cached, tmp_path, tiny_backbone):
    writer = ShardWriter(tmp_path / "shards", LABELED, several_sizes=True)
    for photo in PHOTOS:
        writer.add(photo)
    writer.finish()
    build_cache(tmp_path / "shards", tmp_path / "cache", tiny_backbone)
    files, expected = (
        json.loads((f / "manifest.json").read_text())["files"] for f in (tmp_path / "cache", cached / LABELED)
    )
    assert files == expected


def test_several_sizes_continue_after_a_kill(tmp_path, tiny_backbone, monkeypatch):
    photos, wanted = of_sizes(12), {"source": {}, "prompts": "none", "posterior": "mean_std"}
    wanted["completions"] = SamplerConfig(num_inference_steps=1, guidance_scale=1.0)
    write_cache(photos, tmp_path / "whole", tiny_backbone, LABELED, **wanted)
    monkeypatch.setattr(cache_writer, "_SECONDS_BETWEEN_SAVES", -1.0)
    for word, at in ((LABELED, 10), ("completions", 7)):

        def kill(done, total, said, word=word, at=at):
            assert total == 12
            if (said, done) == (word, at):
                raise Killed

        with pytest.raises(Killed):
            write_cache(photos, tmp_path / "cache", tiny_backbone, LABELED, **wanted, progress=kill)
    write_cache(photos, tmp_path / "cache", tiny_backbone, LABELED, **wanted)
    whole, again = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("whole", "cache"))
    assert whole == again


def test_sizes_without_positions_are_refused(tmp_path, tiny_backbone):
    large = Photo("k", np.zeros((80, 112, 3), np.uint8), np.eye(80, 112, dtype=bool), "a circle")
    with pytest.raises(InvalidInputError, match=r"size 112 x 80 is beyond this model, .* 96 pixels a side"):
        write_cache([large], tmp_path / "cache", tiny_backbone, LABELED, source={})
    assert not list(tmp_path.iterdir())


# The posterior's deviation, and caches without prompt embeddings.


def test_the_deviation_stands_beside_the_same_mean(cached, tmp_path, tiny_backbone):
    for role in (LABELED, UNLABELED):
        write_cache(PHOTOS, tmp_path / role, tiny_backbone, role, source={"of": "tests"}, posterior="mean_std")
        files, means = (
            json.loads((f / "manifest.json").read_text())["files"] for f in (tmp_path / role, cached / role)
        )
        stds = {f"{name}_std.npy" for name in ("masked_latents", "latents")[: 2 if role == LABELED else 1]}
        assert set(files) - set(means) == stds
        assert all(files[name] == means[name] for name in means)  # the means are those of a cache without, to the bit
    cache, rows = Cache(tmp_path / LABELED), [0, 31, 39]
    pixels = from_images(np.stack([PHOTOS[row].image for row in rows]))
    vae = tiny_backbone.vae
    posterior = vae.encode(pixels).latent_dist
    std = cache.take("latents_std", rows)
    torch.testing.assert_close(std, torch.exp(0.5 * posterior.logvar) * 1.7, rtol=1e-5, atol=1e-6)
    assert (std > 0).all()
    assert torch.equal(encode_posterior(vae, pixels)[0], tiny_backbone.encode_images(pixels))


def test_another_posterior_or_none_of_the_prompts_is_another_cache(shards, tmp_path, tiny_backbone):
    out = tmp_path / "cache"
    for stored in ({}, {"posterior": "mean_std"}, {}, {"prompts": "none"}, {}):
        assert build_cache(shards, out, tiny_backbone, **stored)
        assert not build_cache(shards, out, tiny_backbone, **stored)
        assert Cache(out).has("latents_std") == ("posterior" in stored)
        assert Cache(out).has("prompt_embeds") == ("prompts" not in stored)
    build_cache(shards, out, tiny_backbone, prompts="none")
    cache = Cache(out)
    assert set(cache.arrays) == {"latents", "cond_latents", "masks", "prompt_index"}
    assert [cache.prompts[n] for n in cache.take("prompt_index", range(6))] == [p.prompt for p in PHOTOS[:6]]


def test_completions_without_stored_prompts_are_those_with_them(shards, tmp_path, tiny_backbone):
    sampler = SamplerConfig(num_inference_steps=1, guidance_scale=2.0)
    painted = []
    for prompts in ("full", "none"):
        build_cache(shards, tmp_path / prompts, tiny_backbone, prompts=prompts, completions=sampler)
        painted.append(Cache(tmp_path / prompts).take("completions", range(6)))
    torch.testing.assert_close(*painted, rtol=1e-4, atol=1e-4)


# The way of a completion.


def shifted(backbone, shift):
    """The same networks under a scheduler of another shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline = type(backbone.pipeline)(**{**backbone.pipeline.components, "scheduler": scheduler})
    return Backbone(pipeline, max_sequence_length=0)


@torch.no_grad()
def by_hand(backbone, cache, rows, levels, guidance):
    """The teacher's guided Euler steps from the noise of `rows` at these noise levels: all points."""
    teacher, transformer = backbone.pipeline.controlnet, backbone.transformer
    cond = torch.cat([cache.take("cond_latents", rows), 1 - cache.take("masks", rows).float()], 1)
    x = path_noise((16, *cond.shape[2:]), rows, 0)
    numbers, points = cache.take("prompt_index", rows).tolist(), [x]
    for now, following in pairwise(levels):
        velocities = []
        for prompts in (numbers, [0] * len(rows)):
            embeds, pooled = cache.take("prompt_embeds", prompts), cache.take("pooled_prompt_embeds", prompts)
            time = torch.full((len(rows),), 1000 * now)
            own = teacher(x, cond, 1.0, embeds, torch.zeros_like(pooled), time, return_dict=False)[0]
            residuals = [own[min(block, 22)] for block in range(24)]
            velocities.append(transformer(x, embeds, pooled, time, residuals, return_dict=False)[0])
        v, empty = velocities
        x = x + (following - now) * (empty + guidance * (v - empty))
        points.append(x)
    return points


@pytest.mark.parametrize(
    ("path", "shift", "levels"), [(2, 1.0, (1, 0.75, 0.5, 0.25, 0)), (4, 3.0, (1, 0.9, 0.75, 0.5, 0))]
)
def test_a_path_is_kept_at_even_levels_of_the_teacher_s_sampler(tmp_path, tiny_backbone, path, shift, levels):
    backbone = shifted(tiny_backbone, shift)
    options = {"completions": completion_sampler(4, 3.0, even=True), "path": path}
    write_cache(of_sizes(3), tmp_path / "cache", backbone, LABELED, source={}, **options)
    cache = Cache(tmp_path / "cache")
    assert (cache.manifest["path"], cache.manifest["completions"]["sigmas"]) == (path, "even")
    for (h, w), group in cache.groups.items():
        rows = list(group)
        points = by_hand(backbone, cache, rows, levels, 3.0)
        stored = cache.take("path", rows)
        assert stored.shape == (len(rows), path - 1, 16, h, w)
        for number in range(1, path):
            torch.testing.assert_close(stored[:, number - 1], points[number * 4 // path], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache.take("completions", rows), points[-1], rtol=1e-4, atol=1e-4)
    assert len(cache.groups) == 2


def test_a_path_continues_after_a_kill_and_says_what_remains(tmp_path, tiny_backbone, monkeypatch):
    photos, notes = of_sizes(4), []
    options = {"source": {}, "completions": completion_sampler(2, 3.0, even=True), "path": 2, "note": notes.append}
    write_cache(photos, tmp_path / "whole", tiny_backbone, LABELED, **options)
    monkeypatch.setattr(cache_writer, "_SECONDS_BETWEEN_SAVES", -1.0)

    def kill(done, total, word):
        if (word, done) == ("completions", 2):  # the first of three sizes
            raise Killed

    with pytest.raises(Killed):
        write_cache(photos, tmp_path / "cache", tiny_backbone, LABELED, **options, progress=kill)
    write_cache(photos, tmp_path / "cache", tiny_backbone, LABELED, **options)
    whole, again = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("whole", "cache"))
    assert whole == again
    assert {"path-6x10.npy", "path-8x8.npy", "path-10x6.npy"} <= set(again["files"])
    work = "calls of the ControlNet and the transformer"
    whole_cost = (2 * 60 + 64 + 60) * 16 * 4 * 2 / 1e9  # completion and one point of the way, fp32
    assert notes[:2] == [f"completions: 4 samples, 16 {work}, {whole_cost:.2g} GB"] * 2
    rest = (64 + 60) * 16 * 4 * 2 / 1e9
    assert notes[2:] == [f"completions: 2 of 4 samples remain, 8 {work}, {rest:.2g} GB"]


def test_what_completions_cost_is_said_before_anything_is_encoded(shards, tmp_path, tiny_backbone):
    order = []
    options = {"completions": completion_sampler(2), "note": order.append, "dtype": torch.bfloat16}
    progress = lambda done, total, word: order.append(word)  # noqa: E731
    assert build_cache(shards, tmp_path / "cache", tiny_backbone, progress, **options)
    assert order[0].startswith("completions: 6 samples, 12 calls ")
    assert len([each for each in order if "calls" in each]) == 1
    assert not build_cache(shards, tmp_path / "cache", tiny_backbone, progress, **options)
    assert build_cache(shards, tmp_path / "plain", tiny_backbone, note=order.append)
    assert len([each for each in order if "calls" in each]) == 1


def test_a_cache_without_a_path_is_described_as_ever_and_one_with_another_path_is_made_again(tmp_path, tiny_backbone):
    photos, plain, path = of_sizes(2), completion_sampler(4), completion_sampler(4, even=True)
    make = partial(write_cache, photos, tmp_path / "cache", tiny_backbone, LABELED, source={})
    assert make(completions=plain)
    manifest = Cache(tmp_path / "cache").manifest
    assert not {"path", "posterior"} & manifest.keys()
    assert manifest["completions"].keys() == SamplerConfig.model_fields.keys() - {"sigmas", "stochastic"}
    for options in ({"completions": path, "path": 2}, {"completions": path, "path": 4}, {"completions": path}):
        assert make(**options)
        assert not make(**options)
        assert Cache(tmp_path / "cache").has("path") == ("path" in options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": 4}, "--path 4 does not divide --complete 0"),
        ({"path": 3, "completions": completion_sampler(8, even=True)}, "--path 3 does not divide --complete 8"),
        ({"path": 4, "completions": completion_sampler(8)}, "set sigmas of the completions to even"),
    ],
)
def test_a_path_that_the_sampler_does_not_pass_is_refused(tmp_path, tiny_backbone, options, said):
    with pytest.raises(InvalidInputError, match=said):
        write_cache(PHOTOS[:1], tmp_path / "cache", tiny_backbone, LABELED, source={}, **options)
    assert not list(tmp_path.iterdir())
