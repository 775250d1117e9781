"""Exported pipeline folders whose graphs are PyTorch's own functions, or small ones of the functions' traces."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refine_control.models.backbone import Backbone, decode_latents, encode_images, predict_velocity
from refine_control.models.controlnet import ControlNet, control_residuals, from_transformer, injection_of
from refine_control.runtime import exported
from refine_control.storage import publish_folder, write_json

Graph = Callable[[Mapping[str, Any]], list[torch.Tensor]]


def _save_tokenizer(tokenizer: Any, length: int, file: Path) -> Path:
    """A transformers tokenizer as a tokenizer.json that cuts and pads to `length`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(file))
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": length},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": tokenizer.pad_token_id,
        "pad_type_id": 0,
        "pad_token": tokenizer.pad_token,
    }
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def save_tokenizer() -> Callable[..., Path]:
    return _save_tokenizer


def torch_graphs(backbone: Any, controlnet: Any) -> dict[str, Graph]:
    """The graphs of an export as functions of tensors, fused and separate."""
    p = backbone.pipeline

    def clip(encoder: Any) -> Graph:
        def run(x: Mapping[str, Any]) -> list[torch.Tensor]:
            output = encoder(x["input_ids"], output_hidden_states=True)
            return [output.hidden_states[-2], output[0]]

        return run

    def residuals(x: Mapping[str, Any]) -> list[torch.Tensor]:
        text = x["prompt_embeds"], x["control_cond"], x["pooled_prompt_embeds"]
        return control_residuals(controlnet, x["noisy_latents"], x["sigmas"], *text, x["conditioning_scale"])

    def velocity(x: Mapping[str, Any], given: list[torch.Tensor], injection: Any) -> list[torch.Tensor]:
        text = x["prompt_embeds"], x["pooled_prompt_embeds"]
        return [predict_velocity(p.transformer, x["noisy_latents"], x["sigmas"], *text, given, injection)]

    sites = list(range(backbone.num_blocks - 1))
    return {
        "text_encoder": clip(p.text_encoder),
        "text_encoder_2": clip(p.text_encoder_2),
        "text_encoder_3": lambda x: [p.text_encoder_3(x["input_ids"])[0]],
        "vae_encoder": lambda x: [encode_images(p.vae, x["pixel_values"])],
        "vae_decoder": lambda x: [decode_latents(p.vae, x["latents"])],
        "denoiser": lambda x: velocity(x, residuals(x), injection_of(controlnet)),
        "controlnet": residuals,
        "transformer": lambda x: velocity(x, [x[f"residual_{site}"] for site in sites], sites),
    }


@pytest.fixture(scope="session")
def sd3(tiny_backbone: Backbone) -> Callable[..., tuple[Backbone, ControlNet]]:
    """`sd3(with_t5)`: a model of two blocks that reads wider embeddings than CLIP's, and a student of one layer."""
    from diffusers import SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    def build(with_t5: bool) -> tuple[Backbone, ControlNet]:
        torch.manual_seed(3)
        letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
        tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], extra_ids=0)
        sizes = {"d_model": 80, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))
        config = {**tiny_backbone.transformer.config, "joint_attention_dim": 80, "num_layers": 2}
        transformer = SD3Transformer2DModel.from_config(config)
        more = {"text_encoder_3": t5, "tokenizer_3": tokenizer} if with_t5 else {}
        parts = {**tiny_backbone.pipeline.components, "transformer": transformer, **more}
        backbone = Backbone(type(tiny_backbone.pipeline)(**parts), max_sequence_length=9)
        student = from_transformer(transformer, 1).requires_grad_(False).eval()
        for part in (student.controlnet_blocks, student.pos_embed_input):
            for parameter in part.parameters():
                parameter.normal_(std=0.1)
        return backbone, student

    return build


class _Traced(torch.nn.Module):
    def __init__(self, graph: Graph, names: list[str]):
        super().__init__()
        self.graph, self.names = graph, names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.graph(dict(zip(self.names, tensors, strict=True))))


def _trace(graph: Graph, arrays: Mapping[str, np.ndarray], file: Path) -> None:
    """Writes an ONNX graph for inputs of these sizes alone, which takes a tenth of the exporter's time."""
    names, tensors = list(arrays), [torch.from_numpy(np.asarray(array)) for array in arrays.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Traced(graph, names), tuple(tensors), str(file), input_names=names, dynamo=False, opset_version=17
        )


@pytest.fixture
def trace_exported(write_exported: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`trace_exported(backbone, controlnet, *painted)`: a folder with ONNX graphs for what paints `painted`."""

    def write(backbone: Any, controlnet: Any, *painted: Any) -> Path:
        folder, traced, calls = write_exported(backbone, controlnet), tmp_path / "traced", {}
        pipeline = exported.ExportedPipeline(folder)
        for name, run in pipeline._graphs.items():
            pipeline._graphs[name] = lambda arrays, name=name, run=run: run(calls.setdefault(name, arrays) and arrays)
        pipeline.paint(*painted)
        graphs = torch_graphs(backbone, controlnet)
        with publish_folder(traced, kind="exported") as temporary:
            shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True)
            for name, arrays in calls.items():
                _trace(graphs[name], arrays, temporary / f"{name}.onnx")
        return traced

    return write


@pytest.fixture
def write_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`write_exported(backbone, controlnet, parts=..., **entries)`: a folder for ExportedPipeline in this test."""

    def write(backbone: Any, controlnet: Any, parts: tuple[str, ...] = ("denoiser",), **entries: Any) -> Path:
        graphs, p = torch_graphs(backbone, controlnet), backbone.pipeline

        def open_torch(engine: str, file: Path, precision: str, threads: int | None) -> Any:
            def run(arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
                with torch.no_grad():
                    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
                    return [output.numpy() for output in graphs[file.stem](tensors)]

            return run

        monkeypatch.setattr(exported, "open_graph", open_torch)
        limits = [("", p.tokenizer_max_length), ("_2", p.tokenizer_max_length), ("_3", backbone.max_sequence_length)]
        encoders = {f"text_encoder{n}": length for n, length in limits if getattr(p, f"text_encoder{n}") is not None}
        folder = tmp_path / "exported"
        with publish_folder(folder, kind="exported") as temporary:
            names = ("vae_encoder", "vae_decoder", *encoders, *parts)
            for name in names:
                (temporary / f"{name}.onnx").write_text(name)
            for name, length in encoders.items():
                tokenizer = getattr(p, name.replace("text_encoder", "tokenizer"))
                _save_tokenizer(tokenizer, length, temporary / name / "tokenizer.json")
            description = {
                "version": 1,
                "engine": "onnx",
                "precision": "fp32",
                "condition": "inpaint",
                "parts": {name: f"{name}.onnx" for name in names},
                "tokenizers": {name: f"{name}/tokenizer.json" for name in encoders},
                "vocabulary": sorted(backbone.vocabulary) if backbone.vocabulary else None,
                "max_sequence_length": backbone.max_sequence_length,
                "text_width": p.transformer.config["joint_attention_dim"],
                "latent_channels": 16,
                "downscale": p.vae_scale_factor,
                **backbone.geometry._asdict(),
                "shift": backbone.shift,
                "sampling": {"num_inference_steps": 2, "guidance_scale": 1.0, "sigmas": "even"},
            }
            write_json(temporary / "pipeline.json", description | entries)
        return folder

    return write
