"""An exported pipeline folder whose graphs are PyTorch's own functions, so that no test exports a graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refine_control.models.backbone import decode_latents, encode_images, predict_velocity
from refine_control.models.controlnet import control_residuals, injection_of
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
        return control_residuals(controlnet, x["noisy_latents"], x["sigmas"], *text, float(x["conditioning_scale"]))

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
