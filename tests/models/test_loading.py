"""What is on disk is what you get, or a sentence says why not: of every component of a model folder."""

import json
import logging
import os
import shutil

import pytest
import torch
from diffusers import SD3ControlNetModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from refine_control.errors import DamagedError, InvalidInputError, MissingError
from refine_control.models.loading import (
    WEIGHTS,
    load_backbone,
    load_controlnet,
    load_pipeline,
    resolve,
    save_controlnet,
    weights_mark,
)

LAST = "transformer_blocks.2.attn.to_q.weight"
NAN = float("nan")
# component -> its weight file and a tensor of it
TENSORS = {
    "vae": (WEIGHTS, "decoder.conv_in.weight"),
    "transformer": (WEIGHTS, "transformer_blocks.7.attn.to_q.weight"),
    "text_encoder": ("model.safetensors", "text_projection.weight"),
    "text_encoder_2": ("model.safetensors", "text_model.final_layer_norm.bias"),
    "text_encoder_3": ("model.safetensors", "encoder.final_layer_norm.weight"),
    "controlnet": (WEIGHTS, "controlnet_blocks.3.weight"),
}
PUBLIC = {name: word for name, word in TENSORS.items() if name not in ("text_encoder_3",)}


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_backbone):
    """A whole model folder, without a manifest, as anybody publishes one."""
    folder = tmp_path_factory.mktemp("published") / "model"
    tiny_backbone.pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(published, tmp_path):
    """A copy to break; files are links until `put` replaces them."""
    return shutil.copytree(published, tmp_path / "model", copy_function=os.link)


@pytest.fixture
def with_t5(folder):
    """The model with a tiny T5, as SD3's."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(3)
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], extra_ids=0)
    config = {"d_model": 64, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **config)).save_pretrained(folder / "text_encoder_3")
    tokenizer.save_pretrained(folder / "tokenizer_3")
    classes = {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    put_json(folder / "model_index.json", **classes)
    return folder


@pytest.fixture
def saved(tmp_path, tiny_student):
    save_controlnet(tiny_student(3), tmp_path / "student", 24, kind="student")
    return tmp_path / "student"


@pytest.fixture
def foreign(saved):
    """A ControlNet of which no manifest says what it must be."""
    (saved / "manifest.json").unlink()
    return saved


def put(path, data):
    path.unlink(missing_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def put_json(path, **changed):
    put(path, json.dumps({**json.loads(path.read_text()), **changed}))


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def refused(call, *words, kind=InvalidInputError):
    with pytest.raises(kind) as caught:
        call()
    said = str(caught.value)
    assert type(caught.value) is kind, said
    assert "\n" not in said
    assert all(word in said for word in words), said


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def networks(pipeline):
    return {name: part.state_dict() for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def test_a_pipeline_arrives_as_it_was_saved(published, tiny_backbone):
    loaded = load_pipeline(published)
    expected = networks(tiny_backbone.pipeline)
    assert networks(loaded).keys() == expected.keys()
    assert all(same(state, expected[name]) for name, state in networks(loaded).items())
    assert not any(part.training for part in loaded.components.values() if isinstance(part, torch.nn.Module))
    buffers = dict(loaded.text_encoder.named_buffers())
    assert torch.equal(buffers["text_model.embeddings.position_ids"], torch.arange(18)[None])


def test_loading_leaves_progress_bars_and_the_generator_as_they_are(published):
    states = []
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    torch.manual_seed(5)
    try:
        load_pipeline(published)
        states = [diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()]
    finally:
        for library in (diffusers_logging, transformers_logging):
            library.enable_progress_bar()
    assert states == [False, False]
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("component", PUBLIC)
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t, name: t.pop(name), "lacks 1 tensors, first {}"),
        (lambda t, name: t.update({name: torch.full_like(t[name], NAN)}), "{} holds values that are not finite"),
    ],
    ids=["missing", "not finite"],
)
def test_every_network_is_loaded_strictly(folder, component, change, word):
    file, name = TENSORS[component]
    rewrite(folder / component / file, lambda tensors: change(tensors, name))
    refused(lambda: load_pipeline(folder), f"/{component}", word.format(name))


@pytest.mark.parametrize("component", ["vae", "text_encoder_2"])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t, name: t.update(novel=torch.zeros(1)), "unknown 1 tensors, first novel"),
        (lambda t, name: t.update({f"{name}x": t.pop(name)}), "lacks 1 tensors, first {}"),
        (lambda t, name: t.update({name: torch.zeros(3, 1)}), "another shape for 1 tensors, first {}"),
        (lambda t, name: t.update({name: t[name].to(torch.int8)}), "another type for 1 tensors, first {}"),
        (lambda t, name: t[name].view(-1)[1:2].fill_(float("inf")), "{} holds values that are not finite"),
    ],
    ids=["unknown", "renamed", "reshaped", "int8", "one inf"],
)
def test_tensors_that_are_not_the_config_s_are_refused(folder, component, change, word):
    file, name = TENSORS[component]
    rewrite(folder / component / file, lambda tensors: change(tensors, name))
    refused(lambda: load_pipeline(folder), f"/{component}", word.format(name))


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
@pytest.mark.parametrize("data", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None])
def test_a_cut_download_is_refused(folder, component, data):
    path = folder / component / TENSORS[component][0]
    put(path, path.read_bytes()[:-100] if data is None else data)
    refused(lambda: load_pipeline(folder), str(path), "copy the weights again")


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_what_is_not_there_is_named(folder, component):
    file = TENSORS[component][0]
    (folder / component / file).rename(folder / component / file.replace(".safetensors", ".bin"))
    refused(lambda: load_pipeline(folder), component, file, ".bin", "only safetensors", kind=MissingError)
    (folder / component / "config.json").unlink()
    refused(lambda: load_pipeline(folder), component, "config.json", kind=MissingError)
    shutil.rmtree(folder / component)
    refused(lambda: load_pipeline(folder), f"no folder {component}", kind=MissingError)


@pytest.mark.parametrize("component", ["vae", "scheduler", "text_encoder", "model_index.json"])
@pytest.mark.parametrize("data", ["{", "[1]", "null", "[" * 100_000])
def test_garbage_in_place_of_a_config_is_refused(folder, component, data):
    name = {"scheduler": "scheduler_config.json"}.get(component, "config.json")
    path = folder / component if component.endswith(".json") else folder / component / name
    put(path, data)
    refused(lambda: load_pipeline(folder), str(path), "copy it again")


@pytest.mark.parametrize(
    ("component", "changed", "word"),
    [
        ("vae", {"scaling_factor": None}, "scaling_factor"),
        ("vae", {"scaling_factor": "0.5"}, "scaling_factor"),
        ("vae", {"scaling_factor": NAN}, "scaling_factor"),
        ("vae", {"shift_factor": None}, "shift_factor"),
        ("vae", {"act_fn": "none such"}, "AutoencoderKL"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ("transformer", {"num_layers": 23}, "unknown"),
        ("transformer", {"num_layers": "24"}, "num_layers"),
        ("transformer", {"num_attention_heads": 0}, "num_attention_heads"),
        ("scheduler", {"shift": None}, "shift"),
        ("scheduler", {"shift": "3"}, "shift"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ("text_encoder", {"num_hidden_layers": 3}, "lacks"),
        ("text_encoder", {"num_hidden_layers": "2"}, "num_hidden_layers"),
        ("text_encoder", {"num_attention_heads": 0}, "CLIPTextModelWithProjection"),
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(folder, component, changed, word):
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    put_json(folder / component / name, **changed)
    refused(lambda: load_pipeline(folder), component, word)


@pytest.mark.parametrize(("component", "key"), [("vae", "layers_per_block"), ("text_encoder", "num_hidden_layers")])
def test_layers_without_end_are_refused_before_they_are_built(folder, component, key):
    put_json(folder / component / "config.json", **{key: 3_000_000})
    refused(lambda: load_pipeline(folder), component, key, "3000000")


@pytest.mark.parametrize(
    ("name", "change", "kind", "word"),
    [
        ("tokenizer", lambda path: (path / "tokenizer.json").unlink(), MissingError, "tokenizer.json"),
        ("tokenizer_2", lambda path: put(path / "tokenizer.json", "{}"), InvalidInputError, "CLIPTokenizer"),
        ("tokenizer", lambda path: put(path / "tokenizer_config.json", "null"), InvalidInputError, "tokenizer_config"),
        ("tokenizer_2", shutil.rmtree, MissingError, "no folder"),
        (
            "tokenizer_2",
            lambda path: put_json(path / "tokenizer_config.json", model_max_length=77),
            InvalidInputError,
            "model_max_length",
        ),
    ],
)
def test_tokenizers_are_whole_and_fit_their_encoders(folder, name, change, kind, word):
    change(folder / name)
    refused(lambda: load_pipeline(folder), name, word, kind=kind)


@pytest.mark.parametrize("layout", ["tokenizer.json", "merges.txt"])
def test_a_tokenizer_whose_merges_are_cut_is_refused(folder, layout):
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    model = content["model"]

    def write(merges):
        if layout == "tokenizer.json":
            put(path, json.dumps({**content, "model": {**model, "merges": merges}}))
        else:
            path.unlink(missing_ok=True)
            put(path.with_name("vocab.json"), json.dumps(model["vocab"]))
            put(path.with_name("merges.txt"), "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))

    write(model["merges"])
    assert load_pipeline(folder).tokenizer("a red circle") == load_pipeline(folder).tokenizer_2("a red circle")
    write(model["merges"][:-9])
    refused(lambda: load_pipeline(folder), "tokenizer", "9 of its tokens")


def test_components_of_two_models_are_refused(folder, tiny_backbone):
    from diffusers import AutoencoderKL

    config = {**tiny_backbone.vae.config, "latent_channels": 4}
    shutil.rmtree(folder / "vae")
    AutoencoderKL.from_config(config).save_pretrained(folder / "vae")
    refused(lambda: load_pipeline(folder), "vae", "latent_channels is 4")


def test_a_controlnet_of_another_width_does_not_fit(published):
    from diffusers import SD3ControlNetModel

    from refine_control.miniature.networks import TRANSFORMER

    other = SD3ControlNetModel(**{**TRANSFORMER, "num_layers": 2}, extra_conditioning_channels=1)
    refused(lambda: load_pipeline(published, other), "ControlNet", "width is 64")


@pytest.mark.parametrize("entry", [["diffusers", "UNet2DConditionModel"], [None, None], "vae", ["diffusers"]], ids=str)
def test_an_index_of_other_parts_is_refused(folder, entry):
    put_json(folder / "model_index.json", vae=entry)
    refused(lambda: load_pipeline(folder), "model_index.json", "AutoencoderKL")
    put_json(folder / "model_index.json", _class_name="FluxPipeline")
    refused(lambda: load_pipeline(folder), "names CLIPTokenizer as tokenizer_2; FLUX has a T5Tokenizer there")
    put_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    refused(lambda: load_pipeline(folder), "StableDiffusionPipeline")


def as_variant(folder, component, variant="fp16"):
    file = TENSORS[component][0]
    (folder / component / file).rename(folder / component / file.replace(".safetensors", f".{variant}.safetensors"))


def in_shards(path, name="{stem}-{number:05d}-of-{total:05d}.safetensors", total=3):
    tensors, stem = load_file(path), path.name.partition(".")[0]
    path.unlink()
    for number in range(total):
        part = {key: tensors[key] for key in sorted(tensors)[number::total]}
        save_file(part, path.with_name(name.format(stem=stem, number=number + 1, total=total)), {"format": "pt"})


def test_variants_and_shards_of_the_same_weights_are_read(with_t5):
    before = networks(load_pipeline(with_t5))
    as_variant(with_t5, "vae")
    as_variant(with_t5, "text_encoder_2", "bf16")
    in_shards(with_t5 / "transformer" / WEIGHTS)
    in_shards(with_t5 / "controlnet" / WEIGHTS, "{stem}.fp16-{number:05d}-of-{total:05d}.safetensors")
    in_shards(with_t5 / "text_encoder" / "model.safetensors", "{stem}-{number:05d}-of-{total:05d}.fp16.safetensors")
    in_shards(with_t5 / "text_encoder_3" / "model.safetensors", total=2)
    put(with_t5 / "text_encoder_3" / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {}}))
    pipeline = load_pipeline(with_t5)
    assert all(same(state, before[name]) for name, state in networks(pipeline).items())
    assert "text_encoder_3" in before
    assert pipeline.text_encoder_3.shared.weight is pipeline.text_encoder_3.encoder.embed_tokens.weight
    (with_t5 / "text_encoder_3" / "model-00002-of-00002.safetensors").unlink()
    words = ("text_encoder_3", "lacks 1 of 2 files", "model-00002-of-00002.safetensors")
    refused(lambda: load_pipeline(with_t5), *words, kind=MissingError)


def test_the_t5_may_be_left_out_by_name_alone(with_t5):
    rewrite(with_t5 / "text_encoder_3" / "model.safetensors", lambda tensors: tensors.pop("shared.weight"))
    refused(lambda: load_pipeline(with_t5), "text_encoder_3", "shared.weight")
    shutil.rmtree(with_t5 / "text_encoder_3")
    refused(lambda: load_pipeline(with_t5), "text_encoder_3", "[null, null]", kind=MissingError)
    put_json(with_t5 / "model_index.json", text_encoder_3=[None, None])
    refused(lambda: load_pipeline(with_t5), "tokenizer_3")
    put_json(with_t5 / "model_index.json", tokenizer_3=[None, None])
    assert load_pipeline(with_t5).text_encoder_3 is None


# ControlNets by themselves


def test_there_and_back_and_by_stock_diffusers(saved, tiny_student):
    expected = tiny_student(3).state_dict()
    loaded, stock = load_controlnet(saved), SD3ControlNetModel.from_pretrained(saved)
    assert same(loaded.state_dict(), expected)
    assert same(stock.state_dict(), expected)
    assert not loaded.training
    assert json.loads((saved / "manifest.json").read_text())["kind"] == "student"


def test_half_precision_weights_arrive_in_full(foreign, tiny_student):
    rewrite(foreign / WEIGHTS, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    loaded = load_controlnet(foreign).state_dict()
    assert all(v.dtype == torch.float32 for v in loaded.values())
    assert torch.equal(loaded[LAST], tiny_student(3).state_dict()[LAST].half().float())


def test_a_config_without_the_extra_channel_gets_that_of_the_weights(foreign):
    config = json.loads((foreign / "config.json").read_text())
    del config["extra_conditioning_channels"]
    put(foreign / "config.json", json.dumps(config))
    assert load_controlnet(foreign).config["extra_conditioning_channels"] == 1


def test_the_fixed_table_of_positions_may_be_missing(foreign, tiny_student):
    rewrite(foreign / WEIGHTS, lambda tensors: tensors.pop("pos_embed.pos_embed"))
    assert same(load_controlnet(foreign).state_dict(), tiny_student(3).state_dict())
    put_json(foreign / "config.json", pos_embed_max_size=100_000)
    refused(lambda: load_controlnet(foreign), "pos_embed")


@pytest.mark.parametrize(("layers", "word"), [(2, "holds unknown"), (4, "lacks"), (3_000_000, "more layers")])
def test_another_layer_count_is_refused(foreign, layers, word):
    put_json(foreign / "config.json", num_layers=layers)
    refused(lambda: load_controlnet(foreign), word)


def test_stock_diffusers_does_not_mind_another_layer_count(saved):
    put_json(saved / "config.json", num_layers=2)
    assert len(SD3ControlNetModel.from_pretrained(saved).transformer_blocks) == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop(LAST), "lacks 1 tensors, first transformer_blocks.2"),
        (lambda t: t.update({LAST: torch.zeros(31, 32)}), "another shape for 1 tensors"),
        (lambda t: t.update({LAST: torch.zeros(32, 32, dtype=torch.int8)}), "another type for 1 tensors"),
        (lambda t: t.update({"pos_embed.pos_embed": torch.zeros(1, 4, 32)}), "another shape"),
        (lambda t: t["pos_embed.pos_embed"].fill_(NAN), "not finite"),
    ],
    ids=["missing", "reshaped", "int8", "positions reshaped", "positions nan"],
)
def test_weights_that_disagree_are_refused(foreign, change, word):
    rewrite(foreign / WEIGHTS, change)
    refused(lambda: load_controlnet(foreign), word)


@pytest.mark.parametrize(
    "changed", [{"patch_size": 0}, {"num_layers": "3"}, {"_class_name": "ControlNetModel"}], ids=str
)
def test_a_config_that_cannot_be_meant_is_refused(foreign, changed):
    put_json(foreign / "config.json", **changed)
    refused(lambda: load_controlnet(foreign), "config.json", str(next(iter(changed.values()))))


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_file_that_is_not_the_one_that_was_saved_is_damage(saved, name):
    mark, data = weights_mark(saved), bytearray((saved / name).read_bytes())
    data[-40] ^= 1
    put(saved / name, bytes(data))
    refused(lambda: load_controlnet(saved), str(saved / name), kind=DamagedError)
    assert weights_mark(saved) == mark


@pytest.mark.parametrize("content", ['{"name": "an extension"}', '{"files": {"a": "b"}}', '{"files": ["a"]}', "[1]"])
def test_a_manifest_of_somebody_else_says_nothing(foreign, content):
    mark = weights_mark(foreign)
    put(foreign / "manifest.json", content)
    assert load_controlnet(foreign).config["num_layers"] == 3
    assert weights_mark(foreign) == mark
    put(foreign / "manifest.json", "{")
    refused(lambda: load_controlnet(foreign), "manifest.json is damaged", kind=DamagedError)


def test_a_component_of_a_bundle_is_compared_with_the_bundle_s_manifest(folder):
    from refine_control.storage import publish_folder

    with publish_folder(folder.with_name("bundle"), kind="bundle") as unfinished:
        shutil.copytree(folder, unfinished, dirs_exist_ok=True)
    bundle = folder.with_name("bundle")
    assert load_controlnet(bundle / "controlnet").config["num_layers"] == 23
    put_json(bundle / "vae" / "config.json", shift_factor=0.2)
    refused(lambda: load_pipeline(bundle), "vae/config.json", kind=DamagedError)


def test_a_folder_of_another_kind_names_the_right_one(saved, published):
    refused(lambda: load_controlnet(published), "a model in diffusers layout", f"give {published / 'controlnet'}")
    refused(lambda: load_pipeline(saved), "a trained ControlNet", "a model must be given here")


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "none", "a/b/c"])
def test_a_missing_folder_is_refused(name):
    refused(lambda: resolve(name), "no model folder")


def test_a_hub_id_that_cannot_be_had_is_missing():
    refused(lambda: load_controlnet("nobody-at-all/no-such-model"), "the hub did not give it", kind=MissingError)


def test_a_folder_without_an_index_or_config_is_refused(tmp_path):
    refused(lambda: load_backbone(tmp_path), "no model_index.json")
    refused(lambda: load_controlnet(tmp_path), "no config.json")


@pytest.mark.parametrize(("layers", "warned"), [(5, True), (12, False)])
def test_a_student_that_stock_would_inject_shifted_is_warned_of(tmp_path, tiny_student, caplog, layers, warned):
    with caplog.at_level(logging.WARNING, logger="refine_control"):
        save_controlnet(tiny_student(layers), tmp_path / "student", 24)
    assert any("shifted" in record.message for record in caplog.records) == warned
