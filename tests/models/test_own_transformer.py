"""A student's own transformer: what its copies share, what its adapters do, and what of it is saved and refused."""

import json

import pytest
import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from refine_control.conditions.condition import Shown
from refine_control.config import SamplerConfig
from refine_control.errors import DamagedError, InvalidInputError, MissingError
from refine_control.models.backbone import Backbone, predict_velocity
from refine_control.models.cpu_kernels import in_precision, use_cpu_kernels
from refine_control.models.loading import load_controlnet, load_painter, load_student, save_controlnet
from refine_control.models.own_transformer import set_lora, sharing_copy, trainable_copy
from refine_control.pipeline.painting import make_pipeline, paint, run_pipeline
from refine_control.storage import MANIFEST, write_json

FILE = "transformer_lora/pytorch_lora_weights.safetensors"
SAMPLER = SamplerConfig(num_inference_steps=2, guidance_scale=1.0, conditioning_scale=1.0)


def disturbed(backbone, kind, rank=4, seed=0, size=0.5):
    """A trainable copy after some training: nothing of what is trained has the value that it began with."""
    own, generator = trainable_copy(backbone.transformer, kind, rank, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.requires_grad:
                parameter.add_((size if kind == "lora" else 0.1) * torch.randn(parameter.shape, generator=generator))
    return own


def velocity(transformer, backbone, dtype=torch.float32):
    noisy = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    embeds, pooled = backbone.encode_prompts(["a red circle"] * 2)
    return predict_velocity(transformer, noisy, torch.tensor([0.3, 1.0]), embeds, pooled)


def picture(backbone):
    side = backbone.geometry.side
    image = torch.arange(side * side * 3).reshape(1, side, side, 3).remainder(251).to(torch.uint8).numpy()
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, 8:40, 16:48] = True
    return image, mask.numpy()


def painted(backbone, controlnet):
    return paint(backbone, controlnet, Shown(*picture(backbone)), ["a red circle"], SAMPLER)


@pytest.fixture(scope="module")
def model(tiny_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_backbone.pipeline.save_pretrained(folder)
    write_json(folder / "refine_control.json", {"max_sequence_length": 0})
    return folder


@pytest.fixture(scope="module")
def students(tiny_backbone, tiny_student, tmp_path_factory):
    """By kind: the trained transformer, and the folder in which it was saved with its ControlNet."""
    root = tmp_path_factory.mktemp("students")
    out = {}
    for kind in ("lora", "whole"):
        own = disturbed(tiny_backbone, kind)
        save_controlnet(tiny_student(2), root / kind, 24, own_transformer=own)
        out[kind] = own, root / kind
    return out


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_a_trainable_copy_begins_equal_and_every_trainable_parameter_gets_a_gradient(tiny_backbone, kind):
    own = trainable_copy(tiny_backbone.transformer, kind, 4, 0)
    assert torch.equal(velocity(own, tiny_backbone), velocity(tiny_backbone.transformer, tiny_backbone))
    own = disturbed(tiny_backbone, kind)
    velocity(own, tiny_backbone).square().sum().backward()
    trained = {name for name, p in own.named_parameters() if p.requires_grad}
    assert {name for name, p in own.named_parameters() if p.grad is not None and p.grad.any()} == trained
    assert all(".lora_" in name for name in trained) == (kind == "lora")
    assert not any(p.requires_grad for p in tiny_backbone.transformer.parameters())


def test_adapters_share_every_frozen_weight_and_a_whole_copy_none(tiny_backbone):
    frozen = {p.data_ptr() for p in tiny_backbone.transformer.parameters()}
    lora, whole = (trainable_copy(tiny_backbone.transformer, kind, 4, 0) for kind in ("lora", "whole"))
    assert {p.data_ptr() for p in lora.parameters() if not p.requires_grad} == frozen
    assert not {p.data_ptr() for p in whole.parameters()} & frozen
    mean = sharing_copy(lora)
    own = [(a, b) for a, b in zip(lora.parameters(), mean.parameters(), strict=True) if a.requires_grad]
    assert {p.data_ptr() for p in mean.parameters()} & {p.data_ptr() for p in lora.parameters()} == frozen
    assert all(torch.equal(a, b) for a, b in own)


def test_adapters_are_drawn_from_their_seed_alone(tiny_backbone):
    def drawn(seed):
        own = trainable_copy(tiny_backbone.transformer, "lora", 4, seed)
        return torch.cat([p.detach().flatten() for p in own.parameters() if p.requires_grad])

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = drawn(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(drawn(0), first)
    assert not torch.equal(drawn(1), first)


@pytest.mark.parametrize("first", ["kernels", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapters_act_in_full_with_the_kernels_of_the_cpu(tiny_backbone, first, dtype):
    stock = disturbed(tiny_backbone, "lora", size=0.1)
    expected = velocity(stock, tiny_backbone).detach()
    change = (expected - velocity(tiny_backbone.transformer, tiny_backbone)).norm()
    assert change > 0.05 * expected.norm()
    base = Backbone(tiny_backbone.pipeline, 0).with_transformer(
        trainable_copy(tiny_backbone.transformer, "whole", 1, 0)
    )
    base.transformer.requires_grad_(False)
    if first == "kernels":
        use_cpu_kernels(base.transformer)
    own = disturbed(base, "lora", size=0.1)
    use_cpu_kernels(own)
    error = (velocity(own.to(dtype), tiny_backbone, dtype).float() - expected).norm()
    assert error < (1e-4 if dtype == torch.float32 else 0.4) * change


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_a_saved_student_paints_what_the_trained_one_did(model, students, tiny_student, kind):
    own, folder = students[kind]
    backbone, controlnet = load_painter(model, folder)
    plain, _ = load_painter(model)
    before = velocity(plain.transformer, plain)
    around, again = load_student(plain, folder)
    trained = painted(plain.with_transformer(own), tiny_student(2)).astype(int)
    for pair in ((backbone, controlnet), (around, again)):
        assert abs(painted(*pair).astype(int) - trained).max() <= 1
    assert abs(painted(plain, again).astype(int) - trained).max() > 5
    assert torch.equal(velocity(plain.transformer, plain), before)
    parameters = sum(p.numel() for p in plain.transformer.parameters())
    assert sum(p.numel() for p in around.transformer.parameters()) == parameters
    assert not any(p.requires_grad for p in around.transformer.parameters())
    in_precision("bf16", around, again)
    assert {p.dtype for p in around.transformer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_stock_diffusers_paints_the_same_from_the_folder(model, students, kind):
    folder = students[kind][1]
    backbone, controlnet = load_painter(model, folder)
    ours = make_pipeline(backbone, controlnet)
    (image,), (mask,) = picture(backbone)
    expected = run_pipeline(ours, backbone, image, mask, "a red circle", SAMPLER).astype(int)
    plain, _ = load_painter(model)
    stock = make_pipeline(plain, SD3ControlNetModel.from_pretrained(folder))
    if kind == "lora":
        stock.load_lora_weights(folder / "transformer_lora")
    else:
        stock.register_modules(transformer=SD3Transformer2DModel.from_pretrained(folder / "transformer"))
    around = plain.with_transformer(stock.transformer)
    found = run_pipeline(stock, around, image, mask, "a red circle", SAMPLER).astype(int)
    assert abs(found - expected).max() <= 1


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_a_student_with_a_transformer_cannot_pass_for_a_controlnet_alone(students, kind):
    with pytest.raises(InvalidInputError, match="trained together with transformer"):
        load_controlnet(students[kind][1])


def copied(folder, to, change):
    """The LoRA of a student with other tensors, in a folder without a manifest."""
    save_controlnet(load_controlnet(folder, own_transformer=True), to, 24)
    (to / MANIFEST).unlink()
    (to / FILE).parent.mkdir()
    tensors = load_file(folder / FILE)
    metadata = change(tensors)
    save_file(tensors, to / FILE, metadata)
    return to


def _rename(tensors):
    tensors["transformer.none.lora_A.weight"] = tensors.pop(next(iter(tensors)))


def _narrow(tensors):
    tensors[name] = tensors[name := next(iter(tensors))][:, :-1].contiguous()


def _halve(tensors):
    del tensors[next(name for name in tensors if "lora_B" in name)]


def _spoil(tensors):
    tensors[next(iter(tensors))][0, 0] = float("nan")


def _scale(tensors):
    return {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 32, "transformer.r": 4})}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_rename, "no LoRA of this transformer"),
        (_narrow, "no LoRA of this transformer"),
        (_halve, r"lora_B\.weight is absent and should be \[32, 4\]"),
        (_spoil, "not finite"),
        (_scale, "whose scale is 1"),
        (dict.clear, "whose scale is 1"),
    ],
)
def test_other_adapters_are_refused_in_a_sentence(tiny_backbone, students, tmp_path, change, said):
    with pytest.raises(InvalidInputError, match=said):
        load_student(tiny_backbone, copied(students["lora"][1], tmp_path / "copy", change))


def test_missing_damaged_and_foreign_files_are_refused(tiny_backbone, students, tiny_student, tmp_path):
    copy = copied(students["lora"][1], tmp_path / "copy", lambda tensors: None)
    assert load_student(tiny_backbone, copy)[0] is not tiny_backbone
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:-9])
    with pytest.raises(InvalidInputError, match="cut or not a safetensors file"):
        load_student(tiny_backbone, copy)
    (copy / FILE).unlink()
    with pytest.raises(MissingError, match="pytorch_lora_weights"):
        load_student(tiny_backbone, copy)
    own = disturbed(tiny_backbone, "whole")
    save_controlnet(tiny_student(1), tmp_path / "whole", 24, own_transformer=own)
    config = tmp_path / "whole" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 8', '"sample_size": 16'))
    with pytest.raises(DamagedError):
        load_student(tiny_backbone, tmp_path / "whole")
    (tmp_path / "whole" / MANIFEST).unlink()
    with pytest.raises(InvalidInputError, match="sample_size is 16, that of the model's transformer 8"):
        load_student(tiny_backbone, tmp_path / "whole")


def test_adapters_go_on_from_a_saved_student_of_their_rank(tiny_backbone, students):
    own, folder = students["lora"]
    again = trainable_copy(tiny_backbone.transformer, "lora", 4, 7)
    set_lora(again, folder / "transformer_lora")
    assert torch.equal(velocity(again, tiny_backbone), velocity(own, tiny_backbone))
    with pytest.raises(InvalidInputError, match="of rank 4 on 190 layers"):
        set_lora(trainable_copy(tiny_backbone.transformer, "lora", 8, 7), folder / "transformer_lora")
