"""The metric networks against the reference implementations' answers; files that are absent, wrong or not whole."""

import hashlib
import re
from importlib.machinery import ModuleSpec

import golden_make as make
import numpy as np
import pytest
import torch
from PIL import Image

from refine_control.errors import DamagedError, InvalidInputError, MissingError
from refine_control.metrics.distances import cmmd, drawn_distance, frechet_distance
from refine_control.metrics.features import (
    FOLDER_VARIABLE,
    Inception,
    alexnet,
    clip,
    clip_features,
    inception,
    inception_features,
    load_clip,
    load_inception,
    load_lpips,
    lpips,
    weights,
)
from refine_control.miniature import scene_features as scene
from refine_control.miniature import scenes
from refine_control.miniature.obedience import load_classifier
from refine_control.models.card import BUNDLE
from refine_control.study.feature_metrics import SET_METRICS, load_networks, metric_notes, pair_scores, see

GOLDEN = make.answers()

HEADS = {f"lin{j}.model.1.weight": (1, c, 1, 1) for j, c in enumerate((64, 192, 384, 256, 256))}
CLASSIFIER = alexnet.CLASSIFIER


def shapes_of(state):
    return {name: tuple(v.shape) for name, v in state.items() if not name.endswith("num_batches_tracked")}


def listed(shapes):
    return sorted(f"{name} {shape}" for name, shape in shapes.items())


def trunk_shapes():
    return {k: v for k, v in shapes_of(alexnet.Lpips().state_dict()).items() if k.startswith("features.")}


def trunk_tensors():
    """The classifier, 234 MB, is there in shape only."""
    absent = {name: torch.empty(shape, device="meta") for name, shape in CLASSIFIER.items()}
    return {**make.fixed_tensors(trunk_shapes()), **absent}


@pytest.fixture(scope="module")
def inception_tensors():
    with torch.device("meta"):
        shapes = shapes_of(Inception().state_dict())
    return make.fixed_tensors(shapes)


@pytest.fixture(scope="module")
def network(inception_tensors):
    with torch.device("meta"):
        network = Inception()
    network.to_empty(device="cpu")
    weights.load_strictly(network, inception_tensors, "Inception")
    return network


@pytest.fixture(scope="module")
def perceptual():
    return alexnet.assemble(trunk_tensors(), make.fixed_tensors(HEADS))


# Inception


def test_inception_has_the_published_names_and_shapes(inception_tensors):
    assert listed(shapes_of(inception_tensors)) == list(GOLDEN["inception_names"])
    assert len(inception_tensors) == 94 * 5 + 2
    learned = [v.numel() for name, v in inception_tensors.items() if "running" not in name]
    assert sum(learned) == 23_834_568 + 8 * 2049  # torchvision's without its second head, and 1008 classes for 1000


@pytest.mark.parametrize(("name", "picture"), [("small", make.SMALL), ("large", make.LARGE)])
def test_inception_answers_as_torch_fidelity(network, name, picture):
    features = inception_features(network, make.fixed_images(*picture))
    expected = GOLDEN[f"inception_{name}"]
    assert features.shape == (1, 2048)
    assert features.dtype == np.float32
    assert expected.std() > 0.05
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4 * expected.std())


def test_the_resize_is_tensorflow_s():
    """Two pixels to four: places 0, 0.5, 1, 1.5, the last beyond the edge and so the edge itself."""
    pixels = torch.tensor([[0.0, 10.0], [100.0, 110.0]])[None, None]
    found = inception.resize_as_tensorflow(pixels, 4)[0, 0]
    torch.testing.assert_close(found[0], torch.tensor([0.0, 5.0, 10.0, 10.0]))
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 50.0, 100.0, 100.0]))
    picture = torch.rand(1, 3, 6, 9)
    torch.testing.assert_close(inception.resize_as_tensorflow(picture, 3), picture[:, :, ::2, ::3])  # no antialias


@pytest.mark.parametrize(("height", "width"), [(40, 64), (330, 310), (700, 500)])
def test_the_resize_is_two_interpolations_one_after_the_other(height, width):
    """In float64 by numpy, along each side for itself; bytes and the same numbers in fp32 give the same bits."""

    def along(values, axis):
        size = values.shape[axis]
        places = np.arange(299) * size / 299
        beyond = np.concatenate([values, values.take([-1], axis)], axis)
        first = np.floor(places).astype(int)
        share = (places - first).reshape([-1 if d == axis else 1 for d in range(4)])
        return beyond.take(first, axis) * (1 - share) + beyond.take(first + 1, axis) * share

    images = make.fixed_images(1, 2, height, width).transpose(0, 3, 1, 2)
    found = inception.resize_as_tensorflow(torch.from_numpy(images), 299)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, along(along(images.astype(np.float64), 2), 3), atol=0.02)
    assert torch.equal(found, inception.resize_as_tensorflow(torch.from_numpy(images).float(), 299))


class Means(torch.nn.Module):
    """Stands in for a network."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, pixels):
        return pixels.float().mean((2, 3)) * self.one


def test_batches_change_nothing():
    images = make.fixed_images(1, 7, 12, 9)
    features = inception_features(Means(), images, batch_size=3)
    np.testing.assert_allclose(features, images.mean((1, 2)), rtol=1e-5)


def test_features_are_computed_in_fp32_on_any_device():
    """cuDNN is asked for full precision while a network runs, and has its own setting back afterwards."""
    before, seen = torch.backends.cudnn.allow_tf32, []
    network = Means()
    network.register_forward_hook(lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.is_grad_enabled())))
    inception_features(network, make.fixed_images(1, 2, 8, 8))
    assert seen == [(False, False)]
    assert (torch.backends.cudnn.allow_tf32, torch.is_grad_enabled()) == (before, True)
    assert before is True


# LPIPS


def test_lpips_has_the_published_names_and_shapes():
    assert listed({**trunk_shapes(), **CLASSIFIER}) == list(GOLDEN["alexnet_names"])
    assert listed(HEADS) == list(GOLDEN["heads_names"])
    assert sum(np.prod(shape) for shape in {**trunk_shapes(), **CLASSIFIER}.values()) == 61_100_840


def test_lpips_answers_as_the_lpips_package(perceptual):
    pair = [make.fixed_images(*picture) for picture in make.PAIR]
    found = lpips(perceptual, *pair)
    assert GOLDEN["lpips"].min() > 0.1
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, GOLDEN["lpips"], rtol=1e-4)


def test_lpips_is_zero_for_equal_pictures_symmetric_and_grows(perceptual):
    reference, noise = make.fixed_images(1, 3, 64, 64), np.random.default_rng(0).integers(-1, 2, (3, 64, 64, 3))
    little, much = ((reference + amount * noise).clip(0, 255).astype(np.uint8) for amount in (8, 60))
    np.testing.assert_array_equal(lpips(perceptual, reference, reference), 0)
    assert (lpips(perceptual, reference, little) > 0).all()
    assert (lpips(perceptual, reference, little) < lpips(perceptual, reference, much)).all()
    np.testing.assert_allclose(lpips(perceptual, little, reference), lpips(perceptual, reference, little), rtol=1e-5)
    apart = lpips(perceptual, reference, much, batch_size=2)
    np.testing.assert_allclose(apart, lpips(perceptual, reference, much), rtol=1e-4)
    assert len(set(apart)) == 3


def test_lpips_refuses_pictures_that_its_pools_eat_up(perceptual):
    smallest = make.fixed_images(1, 1, 31, 40)
    assert np.isfinite(lpips(perceptual, smallest, smallest[:, ::-1])).all()
    with pytest.raises(InvalidInputError, match="at least 31 x 31 pixels; these are 40 x 30"):
        lpips(perceptual, smallest[:, :30], smallest[:, :30])
    with pytest.raises(InvalidInputError, match="40 x 31 pixels and generated ones 40 x 30"):
        lpips(perceptual, smallest, smallest[:, :30])


# CLIP


@pytest.fixture(scope="module")
def clip_config():
    from transformers import CLIPVisionConfig

    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionConfig(**{**clip.LARGE_336, **tiny, "image_size": 28, "projection_dim": 8})


@pytest.fixture(scope="module")
def clip_tensors(clip_config):
    """As the published file: with the text tower, and positions that today's class computes."""
    from transformers import CLIPVisionModelWithProjection

    tensors = CLIPVisionModelWithProjection(clip_config).state_dict()
    other = {name: torch.zeros(1) for name in ("logit_scale", "text_model.x.weight", "text_projection.weight")}
    return {**tensors, **other, "vision_model.embeddings.position_ids": torch.arange(5)[None]}


def test_clip_of_the_published_size_has_the_published_parameters():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        network = CLIPVisionModelWithProjection(CLIPVisionConfig(**clip.LARGE_336))
    assert sum(p.numel() for p in network.parameters()) == 304_293_888
    assert network.vision_model.embeddings.position_embedding.weight.shape == (24 * 24 + 1, 1024)


def test_clip_features_have_length_one_and_are_what_the_processor_would_make(clip_config, clip_tensors):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    network = clip.assemble(clip_config, clip_tensors)
    images = make.fixed_images(1, 3, 50, 70)
    features = clip_features(network, images, batch_size=2)
    assert features.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    processor = CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False, do_convert_rgb=False)
    squares = [Image.fromarray(image[:, 10:60]) for image in images]
    with torch.no_grad():
        raw = network(**processor(squares, return_tensors="pt")).image_embeds.numpy()
    np.testing.assert_allclose(features, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-4)
    assert cmmd(features[:1], features[1:]) > 1e-3


def test_only_the_central_square_counts():
    image = make.fixed_images(1, 1, 40, 61)[0]
    other = image.copy()
    other[:, :10], other[:, 50:] = 0, 255
    np.testing.assert_array_equal(clip.central_square(image, 28), clip.central_square(other, 28))
    np.testing.assert_array_equal(clip.central_square(image[:, :40], 40), image[:, :40])
    assert clip.central_square(image.transpose(1, 0, 2), 28).shape == (28, 28, 3)


# Files


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("Mixed_6b.branch7x7_2.conv.weight"), "lack 1 tensor, first Mixed_6b.branch7x7_2.conv.weight"),
        (lambda t: t.update({"AuxLogits.fc.bias": torch.zeros(1)}), "hold unknown 1 tensor, first AuxLogits.fc.bias"),
        (lambda t: t.update({"fc.bias": torch.zeros(1000)}), "another shape for 1 tensor, first fc.bias"),
    ],
)
def test_inception_is_loaded_whole_or_not_at_all(inception_tensors, change, says):
    tensors = dict(inception_tensors)
    change(tensors)
    with torch.device("meta"):
        network = Inception()
    with pytest.raises(InvalidInputError) as refusal:
        weights.load_strictly(network, tensors, "Inception")
    assert says in str(refusal.value)


@pytest.mark.parametrize("missing", ["features.6.bias", "classifier.4.weight", "lin3.model.1.weight"])
def test_lpips_is_loaded_whole_or_not_at_all(missing):
    trunk, heads = trunk_tensors(), make.fixed_tensors(HEADS)
    (heads if missing in heads else trunk).pop(missing)
    with pytest.raises(InvalidInputError, match=f" {re.escape(missing)}"):
        alexnet.assemble(trunk, heads)


@pytest.mark.parametrize("extra", ["features.12.bias", "classifier.7.bias"])
def test_lpips_refuses_another_trunk(extra):
    with pytest.raises(InvalidInputError, match=f"unknown 1 tensor, first {extra}"):
        alexnet.assemble({**trunk_tensors(), extra: torch.zeros(1)}, make.fixed_tensors(HEADS))


def test_clip_is_loaded_whole_or_not_at_all(clip_config, clip_tensors):
    lacking = {k: v for k, v in clip_tensors.items() if k != "visual_projection.weight"}
    with pytest.raises(InvalidInputError, match=r"lack 1 tensor, first visual_projection\.weight"):
        clip.assemble(clip_config, lacking)
    with pytest.raises(InvalidInputError, match=r"unknown 1 tensor, first vision_model\.other"):
        clip.assemble(clip_config, {**clip_tensors, "vision_model.other": torch.zeros(1)})


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """Nothing is anywhere: neither in the caches of torch and the hub nor in an installed package."""
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    return tmp_path


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (load_inception, "FID and KID not computed: needs pt_inception-2015-12-05-6726825d.pth"),
        (load_lpips, "LPIPS not computed: needs alexnet-owt-7be5be79.pth"),
        (load_clip, "CMMD not computed: needs pytorch_model.bin"),
    ],
)
def test_without_its_file_a_metric_is_not_computed(no_cache, load, says):
    with pytest.raises(MissingError) as refusal:
        load()
    assert says in str(refusal.value)
    assert "get it from https://" in str(refusal.value) or "hf download openai/clip-vit" in str(refusal.value)
    with pytest.raises(MissingError, match=r"which is not at .*elsewhere"):
        load(no_cache / "elsewhere")


@pytest.mark.parametrize("load", [load_inception, load_lpips, load_clip])
def test_another_file_under_the_name_is_refused_unopened(no_cache, monkeypatch, load):
    impostor = no_cache / "weights.pth"
    impostor.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("opened"))
    with pytest.raises(DamagedError) as refusal:
        load(impostor)
    begins = hashlib.sha256(impostor.read_bytes()).hexdigest()[:12]
    assert f"{impostor} is not the published file: its sha256 begins {begins}" in str(refusal.value)


@pytest.fixture
def published(no_cache):
    """A small file that stands in for published weights, and what it is known by."""
    path = no_cache / "made.pth"
    torch.save({"a": torch.arange(3.0)}, path)
    mark = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, weights.Published("A", ("w-1.pth", "w-2.pth"), mark, "from nowhere")


def test_weights_are_found_where_the_documentation_says(published, no_cache, monkeypatch):
    path, known = published
    assert torch.equal(weights.read_weights(known, path)["a"], torch.arange(3.0))
    cache, folder = no_cache / "torch" / "checkpoints", no_cache / "mine"
    for place in (cache, folder):
        place.mkdir(parents=True)
    path.rename(cache / "w-2.pth")
    assert weights.find_weights(known) == cache / "w-2.pth"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    assert weights.find_weights(known) == cache / "w-2.pth"
    (folder / "w-1.pth").write_bytes((cache / "w-2.pth").read_bytes())
    assert weights.find_weights(known) == folder / "w-1.pth"
    assert weights.find_weights(known, cache) == cache / "w-2.pth"
    with pytest.raises(MissingError):  # what is asked for is not looked for elsewhere
        weights.find_weights(known, no_cache)


def test_heads_come_with_a_package_and_clip_from_the_hub_s_cache(published, no_cache, monkeypatch):
    path, known = published
    spec = ModuleSpec("p", None, is_package=True)
    spec.submodule_search_locations.append(str(no_cache))
    monkeypatch.setattr(weights.importlib.util, "find_spec", {"p": spec, "absent": None}.get)
    inside = known._replace(packages=(("absent", "x.pth"), ("p", path.name)))
    assert weights.find_weights(inside) == path
    cached = {("openai/clip-vit-large-patch14-336", "pytorch_model.bin"): str(path)}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: cached.get(asked))
    assert weights.find_weights(weights.CLIP) == path


def test_a_file_of_anything_but_tensors_is_refused(no_cache):
    path = no_cache / "made.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    known = weights.Published("A", ("a.pth",), hashlib.sha256(path.read_bytes()).hexdigest(), "from nowhere")
    with pytest.raises(InvalidInputError, match="something else than tensors"):
        weights.read_weights(known, path)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((2, 8, 8, 3)), "the images are float64"),
        (np.zeros((2, 8, 8, 1), np.uint8), "have shape (2, 8, 8, 1)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "have shape (0, 8, 8, 3)"),
        ([1], "the images are list"),
    ],
)
def test_what_is_no_set_of_pictures_is_refused(images, says):
    with pytest.raises(InvalidInputError) as refusal:
        inception_features(Means(), images)
    assert says in str(refusal.value)
    with pytest.raises(InvalidInputError, match="batch_size is 0"):
        inception_features(Means(), np.zeros((2, 8, 8, 3), np.uint8), batch_size=0)


# The mini world


@pytest.fixture(scope="module")
def rendered():
    made = scenes.render(2024, 0, 120)
    return made._replace(images=made.images.numpy(), masks=made.masks.numpy())


def test_scene_features_read_the_square_around_the_mask_alone(rendered):
    classifier, masks = load_classifier(BUNDLE), np.zeros((120, 64, 64), bool)
    masks[:, 20:40, 10:30] = True
    features = scene.scene_features(classifier, rendered.images, masks, batch_size=50)
    assert features.shape == (120, 64)
    elsewhere = rendered.images.copy()
    elsewhere[:, :19], elsewhere[:, 41:], elsewhere[:, :, :9], elsewhere[:, :, 31:] = 0, 0, 0, 0
    np.testing.assert_allclose(scene.scene_features(classifier, elsewhere, masks), features, atol=1e-4)
    elsewhere[:, 25:35, 15:25] = 0
    assert np.abs(scene.scene_features(classifier, elsewhere, masks) - features).max(1).min() > 0.01


def test_scene_distances_are_zero_for_equal_pictures_and_order_worse_ones(rendered):
    classifier = load_classifier(BUNDLE)
    reference = scene.scene_features(classifier, rendered.images, rendered.masks)
    noise = np.random.default_rng(0).normal(0, 1, rendered.images.shape)
    found = []
    for amount in (0, 25, 100):
        images = (rendered.images + amount * noise).clip(0, 255).astype(np.uint8)
        worse = scene.scene_features(classifier, images, rendered.masks)
        measured = (
            frechet_distance(reference, worse),
            scene.scene_mmd(reference, worse),
            scene.scene_perceptual(reference, worse).mean(),
        )
        found.append(measured)
    np.testing.assert_allclose(found[0], 0, atol=1e-9)
    assert (np.array(found[1]) > 1e-3).all()
    assert (np.array(found[2]) > 2 * np.array(found[1])).all()


def test_scene_perceptual_is_of_pairs():
    a, b = np.eye(3), np.array([[2.0, 0, 0], [0, -3, 0], [1, 0, 0]])
    np.testing.assert_allclose(scene.scene_perceptual(a, b), [0, 4, 2])
    with pytest.raises(InvalidInputError, match="3 reference images and 2 generated ones"):
        scene.scene_perceptual(a, b[:2])
    with pytest.raises(InvalidInputError, match="not finite"):
        scene.scene_perceptual(a, b * np.nan)


def test_metrics_whose_weights_are_not_here_are_named_and_left_out(no_cache):
    networks = load_networks()
    assert (networks.lpips, networks.inception, networks.clip, networks.classifier) == (None, None, None, None)
    assert set(networks.missing) == {"LPIPS", "FID and KID", "CMMD", "CLIP score"}
    for sentence, file in ((networks.missing["FID and KID"], "pt_inception"), (networks.missing["LPIPS"], "alexnet")):
        assert f"not computed: needs {file}" in sentence
    assert len(set(networks.missing.values())) == 4
    assert all(sentence.startswith(metric) for metric, sentence in networks.missing.items())
    pictures, masks = np.zeros((2, 64, 64, 3), np.uint8), np.ones((2, 64, 64), bool)
    assert see(networks, pictures, masks) == {}
    assert pair_scores(networks, [], pictures, ({}, {})) == {}
    assert metric_notes(["psnr"], 2) == []
    assert "biased upward by much" in metric_notes(["psnr", "fid"], 2)[0]


def test_a_folder_is_looked_into_before_the_caches_and_a_wrong_file_in_it_is_refused(no_cache):
    assert weights.folder_with(weights.INCEPTION, no_cache) is None
    (no_cache / weights.INCEPTION.names[0]).write_bytes(b"another network")
    assert weights.folder_with(weights.INCEPTION, no_cache) == no_cache
    with pytest.raises(DamagedError, match="not the published file"):
        load_networks(no_cache)


@pytest.mark.parametrize("name", SET_METRICS)
def test_drawn_sets_of_every_metric_are_those_one_by_one(name):
    left = np.random.default_rng(1).normal(size=(40, 64))
    right, metric = left + 0.3 * np.random.default_rng(2).normal(size=(40, 64)), SET_METRICS[name]
    at_once = drawn_distance(metric.distance, left, right, 3, 8, of_draws=metric.of_draws)
    np.testing.assert_allclose(at_once.drawn, drawn_distance(metric.distance, left, right, 3, 8).drawn, rtol=1e-8)
