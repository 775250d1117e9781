"""Everything runs where the backbone is, nothing is forgotten on the way there or back, and the CPU stays as it was.

The laws hold on a GPU where there is one, and everywhere on a stand-in: tensors that lie on the CPU and say that they
are on a GPU, so that whatever mixes the two, or reads the GPU's as numpy, fails as it would there."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from refine_control.cache import building
from refine_control.cache.building import write_cache
from refine_control.cache.reader import Cache
from refine_control.conditions.condition import show
from refine_control.config import Recipe, SamplerConfig
from refine_control.metrics.features import Inception, Lpips, inception_features
from refine_control.miniature import check
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models import backbone as backbone_module
from refine_control.models import devices, loading
from refine_control.models.backbone import Backbone
from refine_control.models.cpu_kernels import in_precision
from refine_control.models.devices import send
from refine_control.pipeline import files as pipeline_module
from refine_control.pipeline.files import inpaint_file
from refine_control.pipeline.painting import make_pipeline, paint, run_pipeline
from refine_control.records import LABELED
from refine_control.study import evaluate as evaluate_module
from refine_control.study import feature_metrics, model_cost
from refine_control.study.alignment import teacher_alignment
from refine_control.study.compare import compare
from refine_control.study.feature_metrics import FeatureNetworks
from refine_control.study.model_cost import model_costs
from refine_control.training.objectives import Networks
from refine_control.training.validation import Validation

GPU = torch.device("cuda", 0)


class StandIn(TorchFunctionMode):
    """A GPU that is none: what `to` sends there is marked, what is made of marked tensors is marked, too.

    Raises RuntimeError where a function gets tensors of both kinds, single numbers of the CPU apart, and TypeError
    where a marked one is read as numpy."""

    MOVES = ("to", "cpu", "copy_", "_has_compatible_shallow_copy_type")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        tensors = list(tensors_in((args, kwargs)))
        there = [tensor for tensor in tensors if marked(tensor)]
        if name in ("device", "_parse_to"):
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:
            return GPU if there else func(*args)
        if func == torch.Tensor.data.__set__:
            args[0].on_stand_in = marked(args[1])
            return func(*args)
        if there and name in ("numpy", "__array__"):
            raise TypeError("a tensor of the GPU is read as numpy")
        if there and name not in self.MOVES and any(t.ndim and not marked(t) for t in tensors):
            raise RuntimeError(f"{name}: tensors on the CPU and on the GPU")
        named = [torch.device(each) for each in (*args, *kwargs.values()) if names_device(each)]
        wanted = torch.device("cpu") if name == "cpu" else named[0] if named else None
        out = func(
            *("cpu" if names_device(each) else each for each in args),
            **{key: "cpu" if names_device(each) else each for key, each in kwargs.items()},
        )
        if name == "copy_" or not isinstance(out, torch.Tensor | tuple | list):
            return out
        if wanted is not None and any(out is each for each in tensors):
            out = out.detach()
        for tensor in tensors_in(out):
            tensor.on_stand_in = wanted == GPU if wanted else bool(there)
        return out


def marked(tensor):
    return getattr(tensor, "on_stand_in", False)


def tensors_in(values):
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list | dict):
        for each in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(each)


def names_device(value):
    return isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda"))


@pytest.fixture(params=["stand-in", *(["cuda"] if torch.cuda.is_available() else [])])
def gpu(request, monkeypatch):
    if request.param == "cuda":
        yield GPU
        return
    monkeypatch.setattr(backbone_module, "free_bytes", lambda device: float("inf"))
    with StandIn():
        yield GPU


PHOTOS = list(scene_photos(0, 0, 3))
IMAGES, MASKS = (np.stack([getattr(p, name) for p in PHOTOS]) for name in ("image", "mask"))
PROMPTS = [p.prompt for p in PHOTOS]
SHOWN = show(PHOTOS)
SAMPLER = SamplerConfig(num_inference_steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def cut(tiny_backbone):
    """The tiny backbone's pipeline with the first and the last block alone."""
    pipeline = copy.deepcopy(tiny_backbone.pipeline)
    blocks = pipeline.transformer.transformer_blocks
    pipeline.transformer.transformer_blocks = torch.nn.ModuleList([blocks[0], blocks[-1]])
    for name in ("transformer_blocks", "controlnet_blocks"):
        setattr(pipeline.controlnet, name, getattr(pipeline.controlnet, name)[:1])
    return pipeline


@pytest.fixture
def own(cut):
    """A backbone to be moved about."""
    return Backbone(copy.deepcopy(cut), max_sequence_length=0)


def near(found, expected, levels=1):
    """Equal pictures but for rounding: alone, a prompt's last digits are not those of a batch."""
    return np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= levels


def test_the_stand_in_refuses_what_a_gpu_refuses(gpu):
    here, there = torch.ones(3), torch.ones(3).to(gpu)
    assert (here.device.type, there.device, (there + 1).device) == ("cpu", gpu, gpu)
    assert torch.zeros(2, device=gpu).device == torch.zeros_like(there[:1]).device == gpu
    assert (there * torch.tensor(2.0)).device == gpu
    assert there.cpu().numpy().sum() == there.to("cpu", torch.float64).numpy().sum() == 3
    assert torch.ones(3).copy_(there).device == here.device
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: torch.nn.Linear(3, 3)(there)):
        with pytest.raises(RuntimeError):
            mixed()
    with pytest.raises(TypeError):
        there.numpy()
    layer = torch.nn.Linear(3, 3).to(gpu)
    assert layer.weight.device == layer(there).device == gpu
    assert layer.to("cpu")(here).device == here.device


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_pictures_are_painted_there_on_the_same_noise(own, tiny_student, gpu, guidance):
    sampler, student = SAMPLER.model_copy(update={"guidance_scale": guidance}), tiny_student(1)
    expected = paint(own, student, SHOWN, PROMPTS, sampler, batch_size=2)
    one = run_pipeline(make_pipeline(own, student), own, IMAGES[0], MASKS[0], PROMPTS[0], sampler)
    assert own.to(gpu).device == own.vae.device == own.text_encoders[0].device == gpu
    assert own.decode_latents(own.encode_images(torch.zeros(1, 3, 16, 16)).cpu()).device == gpu
    assert near(paint(own, student, SHOWN, PROMPTS, sampler, batch_size=2), expected)
    assert student.device == gpu
    other = tiny_student(1)
    assert near(run_pipeline(make_pipeline(own, other), own, IMAGES[0], MASKS[0], PROMPTS[0], sampler), one)
    assert other.device == gpu


def test_text_encoders_without_room_stay_and_encode_on_the_cpu(own, tiny_student, gpu, monkeypatch, caplog):
    student = tiny_student(1)
    expected = paint(own, student, SHOWN, PROMPTS, SAMPLER)
    networks, encoders = (
        devices.missing_bytes(gpu, parts)
        for parts in ((own.vae, own.transformer, own.pipeline.controlnet), own.text_encoders)
    )
    assert networks > 4 * sum(p.numel() for p in own.transformer.parameters())
    room = (networks + encoders - 1) / devices.USABLE
    monkeypatch.setattr(backbone_module, "free_bytes", lambda device: room)
    own.to(gpu)
    assert own.device == own.vae.device == own.pipeline.controlnet.device == gpu
    assert {encoder.device.type for encoder in own.text_encoders} == {"cpu"}
    assert "the text encoders need" in caplog.text
    assert [part.device for part in own.encode_prompts(["a red circle"])] == [gpu, gpu]
    assert near(paint(own, student, SHOWN, PROMPTS, SAMPLER), expected)
    assert run_pipeline(make_pipeline(own, student), own, IMAGES[0], MASKS[0], PROMPTS[0], SAMPLER).shape == (64, 64, 3)
    own.to("cpu")
    monkeypatch.setattr(backbone_module, "free_bytes", lambda device: networks)
    assert own.to(gpu).device.type == own.vae.device.type == "cpu"
    assert "the networks need" in caplog.text


@pytest.mark.parametrize(("prompts", "posterior"), [("full", "mean"), ("int8", "mean_std"), ("none", "mean")])
def test_a_cache_is_made_there(own, gpu, tmp_path, prompts, posterior):
    stored = {"source": {}, "prompts": prompts, "posterior": posterior, "completions": SAMPLER}
    write_cache(PHOTOS, tmp_path / "here", own, LABELED, **stored)
    write_cache(PHOTOS, tmp_path / "there", own.to(gpu), LABELED, **stored)
    here = Cache(tmp_path / "here")
    there = Cache(tmp_path / "there", here.manifest["model"])  # the same model, wherever it is
    assert here.arrays.keys() == there.arrays.keys()
    for name, array in here.arrays.items():
        np.testing.assert_allclose(there.arrays[name], array, rtol=1e-3, atol=1e-3)


def test_without_completions_a_cache_needs_no_transformer_there(own, gpu, tmp_path):
    own.to(gpu, painting=False)
    assert own.device.type == own.pipeline.controlnet.device.type == "cpu"
    assert own.vae.device == own.text_encoders[1].device == gpu
    write_cache(PHOTOS, tmp_path / "cache", own, LABELED, source={})
    assert len(Cache(tmp_path / "cache")) == len(PHOTOS)


def test_models_are_compared_and_costed_there(own, tiny_student, gpu, monkeypatch):
    eyes = FeatureNetworks(Classifier(), Lpips().eval().requires_grad_(False))
    expected = compare(own, {"ours": tiny_student(1)}, PHOTOS, SAMPLER, eyes)
    own.to(gpu)
    eyes.lpips.to(gpu)
    student = tiny_student(1)
    found = compare(own, {"ours": student}, PHOTOS, SAMPLER, eyes)
    assert student.device == gpu
    assert near(found.images["ours"], expected.images["ours"])
    for name in ("psnr", "lpips"):
        np.testing.assert_allclose(found.scores["ours"][name], expected.scores["ours"][name], rtol=1e-3)
    monkeypatch.setattr("refine_control.study.model_cost._peak_in_fresh_process", lambda *_: 0)
    assert model_costs(own, {"ours": student}, "tiny", {"ours": None}, repeats=1)["ours"].num_layers == 1


def test_in_bf16_there_is_no_kernel_of_the_cpu(own, tiny_student, gpu):
    student = tiny_student(1)
    in_precision("bf16", own.to(gpu), student)
    assert student.device == gpu
    compare(own, {"ours": student}, PHOTOS[:2], SAMPLER.model_copy(update={"precision": "bf16"}))
    kinds = {type(part).__name__ for network in (own.transformer, student) for part in network.modules()}
    assert not {name for name in kinds if name.startswith("Fused")}
    assert student.dtype == own.transformer.dtype == torch.bfloat16
    assert own.text_encoders[0].dtype == torch.float32


def test_residuals_are_measured_there(own, gpu):
    teacher = own.pipeline.controlnet
    here = teacher_alignment(own, teacher, PHOTOS, [1])
    there = teacher_alignment(own.to(gpu), teacher, PHOTOS, [1])
    np.testing.assert_allclose(there.power, here.power, rtol=1e-3)
    assert there.power.all()


def test_the_bundle_is_checked_there(own, gpu, monkeypatch):
    asked = []

    def load(model, cpu_kernels, device):
        asked.append((cpu_kernels, device))
        return own.to(device)

    monkeypatch.setattr(check, "best_device", lambda: gpu)
    monkeypatch.setattr(check, "load_backbone", load)
    monkeypatch.setattr(check, "CHECK_SAMPLER", SAMPLER)
    assert check.check_bundle(2, prompts=("local",))["scenes"] == 2
    assert asked == [(True, gpu)]
    assert own.device == gpu


def test_pictures_on_the_way_of_training_are_painted_there(own, tiny_student, gpu, monkeypatch, tmp_path):
    from refine_control.training import validation

    monkeypatch.setattr(validation, "Shards", lambda folder: PHOTOS)
    recipe = Recipe.model_validate({"name": "tiny", "data": {"test": "x"}, "sampler": {"num_inference_steps": 1}})
    for part in (own.transformer, own.pipeline.controlnet):  # as `prepare` leaves a run that reads a cache
        part.to(gpu)
    student = tiny_student(1).to(gpu)
    validate = Validation(recipe, Networks(own, own.pipeline.controlnet, student), tmp_path)
    painted = validate(1, dict(validate.networks.trainable.parameters))
    assert painted.dtype == np.uint8


def test_features_are_seen_there(gpu):
    network = Inception().eval().requires_grad_(False)
    here = inception_features(network, IMAGES[:1])
    np.testing.assert_allclose(inception_features(network.to(gpu), IMAGES[:1]), here, rtol=1e-3, atol=1e-4)


def test_networks_of_features_go_to_the_best_device(gpu, monkeypatch):
    asked = {}
    for name in ("lpips", "inception", "clip", "clip_text"):
        monkeypatch.setattr(
            feature_metrics.features, f"load_{name}", lambda *given, name=name: asked.update({name: given[-1]})
        )
    monkeypatch.setattr(feature_metrics, "best_device", lambda: gpu)
    feature_metrics.load_networks()
    assert asked == dict.fromkeys(["lpips", "inception", "clip", "clip_text"], gpu)
    feature_metrics.load_networks(device="cpu")
    assert set(asked.values()) == {"cpu"}


@pytest.mark.parametrize("kernels", [True, False])
def test_a_model_is_loaded_there_without_the_kernels_of_the_cpu(own, gpu, monkeypatch, tmp_path, kernels):
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: own.pipeline)
    backbone = loading.load_backbone(tmp_path, cpu_kernels=kernels, device=gpu)
    assert backbone.device == backbone.pipeline.controlnet.device == gpu
    assert not any(type(part).__name__.startswith("Fused") for part in backbone.transformer.modules())


class Asked(Exception):
    """What `load_backbone` was asked for."""


def test_verbs_ask_for_the_best_device(monkeypatch, tmp_path):
    def load(model, controlnet=None, **given):
        raise Asked(given)

    for module in (devices, model_cost, pipeline_module, check, building):
        monkeypatch.setattr(module, "best_device", lambda: GPU)
    for module in (loading, model_cost, check, building):
        monkeypatch.setattr(module, "load_backbone", load)
    monkeypatch.setattr(evaluate_module, "read_test", lambda folder: PHOTOS)
    monkeypatch.setattr(evaluate_module, "Shards", lambda folder: SimpleNamespace(condition="inpaint"))
    monkeypatch.setattr(building, "check_folders", lambda source, out: None)
    half = np.zeros((80, 80), np.uint8)
    half[20:50, 20:50] = 255
    Image.fromarray(half).save(tmp_path / "a.png")
    verbs = {
        "evaluate": lambda: evaluate_module.evaluate("mini", None, {}, tmp_path, tmp_path / "out", SAMPLER),
        "inpaint": lambda: inpaint_file(tmp_path / "a.png", tmp_path / "a.png", "a circle", tmp_path / "b.png"),
        "check": lambda: check.check_bundle(2),
        "cache": lambda: building.cache_folder(tmp_path, tmp_path / "cache", "mini"),
        "completions": lambda: building.cache_folder(tmp_path, tmp_path / "cache", "mini", complete=2),
    }
    asked = {}
    for verb, run in verbs.items():
        with pytest.raises(Asked) as told:
            run()
        asked[verb] = told.value.args[0]
    assert {given["device"] for given in asked.values()} == {GPU}
    assert [asked[verb]["painting"] for verb in ("cache", "completions")] == [False, True]
    assert [asked[verb]["cpu_kernels"] for verb in ("cache", "completions", "check")] == [False, True, True]


class Counted:
    """An `encode_prompts` that notes what it was asked."""

    def __init__(self, encode):
        self.encode, self.asked = encode, []

    def __call__(self, prompts):
        self.asked.append(list(prompts))
        return self.encode(prompts)


def test_there_a_prompt_is_encoded_once(own, tiny_student, gpu, monkeypatch):
    monkeypatch.setattr(own, "encode_prompts", Counted(own.to(gpu).encode_prompts))
    again = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    paint(own, tiny_student(1), SHOWN, again, SAMPLER, batch_size=2)
    assert own.encode_prompts.asked == [[PROMPTS[0]], [PROMPTS[1]], [""]]


def test_on_the_cpu_batches_stay_whole_and_none_is_encoded_twice(own, tiny_student, monkeypatch):
    expected = paint(own, tiny_student(1), SHOWN, PROMPTS, SAMPLER, batch_size=2)
    counted = Counted(own.encode_prompts)
    monkeypatch.setattr(own, "encode_prompts", counted)
    assert (paint(own, tiny_student(1), SHOWN, PROMPTS, SAMPLER, batch_size=2) == expected).all()
    assert counted.asked == [PROMPTS[:2], ["", ""], PROMPTS[2:], [""]]
    counted.asked.clear()
    paint(own, tiny_student(1), SHOWN, PROMPTS, SAMPLER, batch_size=1)
    assert counted.asked == [PROMPTS[:1], [""], PROMPTS[1:2], PROMPTS[2:]]
    counted.asked.clear()
    paint(own, tiny_student(1), SHOWN, PROMPTS, SamplerConfig(num_inference_steps=1, guidance_scale=1))
    assert counted.asked == [PROMPTS]


def test_large_pictures_go_through_a_gpu_a_few_at_a_time(own, tiny_student, gpu, monkeypatch):
    seen = []
    forward = own.vae.encode
    monkeypatch.setattr(own.vae, "encode", lambda pixels: seen.append(len(pixels)) or forward(pixels))
    expected = paint(own, tiny_student(1), SHOWN, PROMPTS, SAMPLER)
    assert seen == [3]
    own.to(gpu)
    monkeypatch.setattr(backbone_module, "ENCODED_PIXELS", 2 * 64 * 64)
    assert near(paint(own, tiny_student(1), SHOWN, PROMPTS, SAMPLER), expected)
    assert seen == [3, 2, 1]
    at_once = devices.pictures_at_once
    assert [at_once(gpu, side, side, 64) for side in (64, 512, 1024, 4096)] == [64, 16, 4, 1]
    assert at_once(torch.device("cpu"), 4096, 4096, 64) == 64


def test_the_best_device_is_a_gpu_where_there_is_one(monkeypatch):
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert devices.best_device().type == kind
    assert devices.free_bytes(torch.device("cpu")) == float("inf")
    assert devices.device_name(torch.device("cpu")) == "cpu"


def test_a_tensor_goes_to_a_gpu_through_pinned_memory_and_is_cast_there():
    calls = []

    class Recorded:
        device = torch.device("cpu")

        def pin_memory(self):
            calls.append("pin")
            return self

        def to(self, *given, **options):
            calls.append((*given, *options))
            return self

    send(Recorded(), "cuda:1", torch.float32)
    assert calls == ["pin", ("cuda:1", "non_blocking"), (torch.float32,)]
    sent = send(torch.ones(2, dtype=torch.bfloat16), "cpu", torch.float32)
    assert sent.dtype == torch.float32
    same = torch.ones(2)
    assert send(same, torch.device("cpu")) is same
