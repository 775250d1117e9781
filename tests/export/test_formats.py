"""Every format computes what PyTorch does; what a format cannot say exactly is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from refine_control.errors import InvalidInputError
from refine_control.export import exporting
from refine_control.export.exporting import compare, export_format, torch_velocity
from refine_control.export.format import find_format, format_names
from refine_control.export.graphs import denoising_graphs, example_inputs, layers_of_sites
from refine_control.export.pipeline_folder import joined, load_velocity
from refine_control.export.stock import comfy_layers, comfy_warning
from refine_control.injection import layer_of_site, stock_injects_exactly
from refine_control.models.controlnet import ControlNet
from refine_control.runtime.description import read_description
from refine_control.runtime.engines import open_graph

EXACT = 2e-5


@pytest.fixture(autouse=True)
def _one_round(monkeypatch):
    monkeypatch.setattr(exporting, "ROUNDS", 1)


@pytest.fixture(scope="module")
def exported(work, tmp_path_factory):
    """By format: the report and its folder, written once."""
    written = {}

    def get(name):
        if name not in written:
            out = tmp_path_factory.mktemp("exports") / name
            written[name] = export_format(work, find_format(name), out), out
        return written[name]

    return get


@pytest.mark.parametrize("name", [name for name in format_names() if name != "web"])  # that is in test_web.py
def test_the_velocity_equals_that_of_pytorch_within_the_bound(exported, name):
    report, out = exported(name)
    assert 0 < report.relative_error <= find_format(name).bound
    assert report.bytes >= sum(path.stat().st_size for path in out.rglob("*")) / 2
    assert json.loads((out / "manifest.json").read_text())["format"] == name


def test_fp32_graphs_are_exact_and_eight_bits_are_smaller(exported):
    assert exported("onnx")[0].relative_error < EXACT
    sizes = {name: (exported(name)[1] / "denoiser.onnx").stat().st_size for name in ("onnx", "onnx-int8")}
    assert sizes["onnx-int8"] < 0.6 * sizes["onnx"]


@pytest.mark.parametrize(("batch", "height", "width", "tokens"), [(1, 8, 8, 18), (3, 6, 12, 5)])
def test_batch_size_and_tokens_of_the_denoiser_vary(work, exported, batch, height, width, tokens):
    inputs = example_inputs(work.source.backbone, work.source.controlnet)
    shapes = {"noisy_latents": (height, width), "control_cond": (height, width), "prompt_embeds": (tokens,)}
    arrays = {}
    for name, value in inputs.items():
        shape = list(value.shape)
        if name in shapes:
            shape[-2:] = shapes[name] if len(shapes[name]) == 2 else [*shapes[name], shape[-1]]
        shape[:1] = [batch] if shape else []
        arrays[name] = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))).numpy()
    arrays["conditioning_scale"] = np.array(0.3, np.float32)
    velocity = load_velocity(exported("onnx")[1], "onnx", "fp32", ".onnx")
    assert compare(torch_velocity(work.source)(arrays), velocity(arrays)).relative < EXACT


def test_the_conditioning_scale_is_an_input(work, exported):
    velocity = load_velocity(exported("onnx")[1], "onnx", "fp32", ".onnx")
    arrays = work.samples.arrays
    other = {**arrays, "conditioning_scale": np.array(0, np.float32)}
    assert compare(velocity(arrays), velocity(other)).relative > 1e-3


@pytest.mark.parametrize("height", [64, 48])
def test_vae_and_text_encoders_equal_those_of_the_pipeline(work, exported, height):
    out, backbone = exported("onnx")[1], work.source.backbone
    run = {part: open_graph("onnx", out / f"{part}.onnx", threads=1) for part in read_description(out).parts}
    pixels = torch.linspace(-1, 1, 3 * 3 * height * 64).reshape(3, 3, height, 64)
    latents = run["vae_encoder"]({"pixel_values": pixels.numpy()})[0]
    np.testing.assert_allclose(latents, backbone.encode_images(pixels), atol=1e-4)
    painted = run["vae_decoder"]({"latents": latents})[0]
    np.testing.assert_allclose(painted, backbone.decode_latents(torch.from_numpy(latents)), atol=1e-4)
    prompts = ["a red circle", "a blue ring on a gray background"]
    ids = backbone.pipeline.tokenizer(prompts, padding="max_length", return_tensors="np").input_ids
    results = [run[name]({"input_ids": ids}) for name in ("text_encoder", "text_encoder_2")]
    embeds, pooled = backbone.encode_prompts(prompts)
    hidden = np.concatenate([each[0] for each in results], -1)
    np.testing.assert_allclose(hidden, embeds[:, : hidden.shape[1], : hidden.shape[2]], atol=1e-5)
    np.testing.assert_allclose(np.concatenate([each[1] for each in results], -1), pooled, atol=1e-5)


def test_the_description_says_what_a_runtime_needs(work, exported):
    about, backbone = read_description(exported("onnx")[1]), work.source.backbone
    assert set(about.parts) == {"denoiser", "vae_encoder", "vae_decoder", "text_encoder", "text_encoder_2"}
    assert about.geometry == backbone.geometry
    assert about.sampling.conditioning_scale == 0.8
    assert (about.shift, about.downscale, about.layer_of_site) == (backbone.shift, 8, None)


def test_a_layer_count_that_stock_injects_wrongly_is_refused_but_not_for_onnx(make_source):
    assert not stock_injects_exactly(3, 4)
    source = make_source(3)
    for name in ("diffusers", "single-file", "torchao"):
        with pytest.raises(InvalidInputError, match="--to onnx"):
            find_format(name).refuse(source)
    find_format("onnx").refuse(source)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 6, 8, 12])
def test_comfyui_injects_these_counts_as_we_do(layers):
    assert comfy_layers(layers, 24) == layer_of_site(layers)


def test_the_single_file_has_the_names_and_shapes_by_which_comfyui_knows_it(exported):
    with safe_open(exported("single-file")[1] / "controlnet.safetensors", "pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        types = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    assert types == {"F16"}
    assert not {name for name in shapes if name.endswith("adaLN_modulation.1.bias")}  # by which it knows SD3.5's own
    assert shapes == recorded(layers=2, width=32, heads=2, text=64, pooled=64, patch=1, positions=12, hidden=128)


def test_the_published_shape_has_the_recorded_names():
    config = {"num_layers": 12, "extra_conditioning_channels": 1, "pos_embed_max_size": 192, "sample_size": 128}
    with torch.device("meta"):
        state = ControlNet(**config, joint_attention_dim=4096, num_attention_heads=24, caption_projection_dim=1536)
    state = state.state_dict()
    expected = recorded(12, 1536, 24, text=4096, pooled=2048, patch=2, positions=192, hidden=6144)
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def recorded(layers, width, heads, text, pooled, patch, positions, hidden):
    """Names and shapes of an SD3 ControlNet of 17 channels, which ComfyUI's `convert_diffusers_mmdit` maps to its own
    and whose layers it counts by `transformer_blocks.N.`."""
    square = (width, width)
    linear = {
        "time_text_embed.timestep_embedder.linear_1": (width, 256),
        "time_text_embed.timestep_embedder.linear_2": square,
        "time_text_embed.text_embedder.linear_1": (width, pooled),
        "time_text_embed.text_embedder.linear_2": square,
        "context_embedder": (width, text),
        "pos_embed.proj": (width, 16, patch, patch),
        "pos_embed_input.proj": (width, 17, patch, patch),
    }
    parts = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    for layer in range(layers):
        block = f"transformer_blocks.{layer}."
        linear[f"controlnet_blocks.{layer}"] = square
        linear |= {f"{block}attn.{part}": square for part in parts}
        linear |= {f"{block}{norm}.linear": (6 * width, width) for norm in ("norm1", "norm1_context")}
        for stream in ("ff", "ff_context"):
            linear |= {f"{block}{stream}.net.0.proj": (hidden, width), f"{block}{stream}.net.2": (width, hidden)}
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return {**shapes, "pos_embed.pos_embed": (1, positions**2, width)}


def test_a_model_that_comfyui_cannot_run_is_warned_of(work):
    assert "heads of 16" in comfy_warning(work.source)


def test_an_error_above_the_bound_publishes_nothing(work, tmp_path):
    strict = dataclasses.replace(find_format("single-file"), bound=1e-9)
    with pytest.raises(InvalidInputError, match="nothing is written"):
        export_format(work, strict, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_publishes_nothing_and_keeps_the_old_one(work, tmp_path):
    def stop(work, folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    form = find_format("single-file")
    export_format(work, form, tmp_path / "out")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        export_format(work, dataclasses.replace(form, write=stop), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_controlnet_and_transformer_apart_compute_what_they_do_together(make_source):
    source = make_source(3)
    graphs, layers = denoising_graphs(source.backbone, source.controlnet, separate=True), [0, 1, 2]
    assert layers_of_sites(source.controlnet, source.backbone) == layers
    assert (
        graphs["controlnet"].outputs == graphs["transformer"].inputs[4:] == ("residual_0", "residual_1", "residual_2")
    )

    def engine(part):
        graph = graphs[part]

        def run(arrays):
            given = {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}
            named = {name: given[name] for name in graph.inputs if not name.startswith("residual")}
            if part == "transformer":
                named["residuals"] = [given[name] for name in graph.inputs[4:]]
            with torch.no_grad():
                result = graph.network(**named)
            return [each.numpy() for each in (result if isinstance(result, tuple) else [result])]

        return run

    arrays = {name: value.numpy() for name, value in example_inputs(source.backbone, source.controlnet).items()}
    apart = joined({part: engine(part) for part in graphs}, layers)
    assert compare(torch_velocity(source)(arrays), apart(arrays)).relative < EXACT


def test_an_unknown_format_is_refused_with_the_names():
    with pytest.raises(InvalidInputError, match="onnx-int8"):
        find_format("onnx8")
