"""Folders of a whole pipeline for runtimes without torch: graphs, tokenizers, and `pipeline.json` that describes them.

`runtime.description.Description` has the entries of pipeline.json, `graphs.py` what each graph computes. Graph inputs
and outputs are float32, tokens int64; batch, size and number of tokens are variable:

- text_encoder, text_encoder_2: `input_ids` (B,T) -> `hidden` (B,T,D), `pooled` (B,P); text_encoder_3 (T5): `input_ids`
  -> `hidden`
- vae_encoder: `pixel_values` (B,3,H,W) in [-1, 1] -> `latents` (B,16,h,w); vae_decoder: the way back
- denoiser: `noisy_latents`, `control_cond`, `prompt_embeds`, `pooled_prompt_embeds`, `sigmas` (B,), and
  `conditioning_scale` () -> `velocity` (B,16,h,w)
- or controlnet: the same inputs -> `residual_0` ... for each layer, scaled; and transformer, without `control_cond`
  and `conditioning_scale`: `residual_0` ... for each injection site -> `velocity`. The layer of a site is in
  `layer_of_site`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refine_control.config import CHOSEN_BY_MODEL
from refine_control.export.format import Format, Velocity, Work
from refine_control.export.graphs import DENOISING, denoising_graphs, frame_graphs, layers_of_sites
from refine_control.export.onnx_files import write_onnx
from refine_control.runtime.description import DESCRIPTION, Description
from refine_control.runtime.engines import Engine, open_graph
from refine_control.storage import write_json

Convert = Callable[[str, Path, Path], None]
"""Name of a part, its fp32 ONNX file, and the file to write."""


def fp32_graphs(work: Work) -> dict[str, Path]:
    """The ONNX graphs of all parts in fp32, written once for all formats that start from them."""
    source = work.source
    files: dict[str, Path] = {}
    graphs = frame_graphs(source.backbone, source.controlnet)
    graphs |= denoising_graphs(source.backbone, source.controlnet, work.separate)
    for part, graph in graphs.items():
        files[part] = work.graphs / f"{part}.onnx"
        if not files[part].is_file():
            write_onnx(graph, files[part])
    return files


def write_pipeline(work: Work, folder: Path, engine: str, precision: str, suffix: str, convert: Convert) -> None:
    """Writes every part by `convert`, the tokenizers and the description."""
    parts = {}
    for part, file in fp32_graphs(work).items():
        parts[part] = f"{part}{suffix}"
        convert(part, file, folder / parts[part])
    described = describe(work, engine, precision, parts, write_tokenizers(work, folder))
    kept: Any = dict.fromkeys(Description.model_fields, True) | {"sampling": set(CHOSEN_BY_MODEL)}
    write_json(folder / DESCRIPTION, described.model_dump(mode="json", include=kept))


def every_step(convert: Callable[[Path, Path], None]) -> Convert:
    """Converts what runs in every step and leaves the text encoders and the VAE in fp32."""

    def chosen(part: str, file: Path, written: Path) -> None:
        if part in DENOISING:
            convert(file, written)
        else:
            copy_graph(part, file, written)

    return chosen


def copy_graph(part: str, file: Path, written: Path) -> None:
    """The fp32 graph as it is, with the file of its weights where it has one."""
    for each in file.parent.glob(f"{file.name}*"):
        shutil.copyfile(each, written.with_name(each.name))


def write_tokenizers(work: Work, folder: Path) -> dict[str, str]:
    """Writes tokenizer.json of each text encoder with its padding and truncation; the files by text encoder."""
    backbone, files = work.source.backbone, {}
    pipeline, clip = backbone.pipeline, backbone.pipeline.tokenizer_max_length
    for suffix, length in (("", clip), ("_2", clip), ("_3", backbone.max_sequence_length)):
        tokenizer: Any = getattr(pipeline, f"tokenizer{suffix}")
        if tokenizer is None:
            continue
        fixed = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        fixed.enable_truncation(length)
        fixed.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
        files[f"text_encoder{suffix}"] = f"tokenizer{suffix}/tokenizer.json"
        (folder / f"tokenizer{suffix}").mkdir()
        fixed.save(str(folder / files[f"text_encoder{suffix}"]))
    return files


def describe(
    work: Work, engine: str, precision: str, parts: Mapping[str, str], tokenizers: Mapping[str, str]
) -> Description:
    """What pipeline.json says."""
    source, backbone = work.source, work.source.backbone
    card, sizes = source.card, backbone.geometry
    learnt = {} if card is None else {"most_steps": card.most_steps, "distilled_guidance": card.distilled_guidance}
    return Description(
        engine=engine,  # type: ignore[arg-type]
        precision=precision,
        condition=source.condition,
        parts=dict(parts),
        tokenizers=dict(tokenizers),
        vocabulary=None if backbone.vocabulary is None else sorted(backbone.vocabulary),
        max_sequence_length=backbone.max_sequence_length,
        text_width=backbone.transformer.config["joint_attention_dim"],
        latent_channels=backbone.transformer.config["in_channels"],
        downscale=backbone.pipeline.vae_scale_factor,
        shift=backbone.shift,
        layer_of_site=layers_of_sites(source.controlnet, backbone) if work.separate else None,
        sampling=source.sampler,
        **sizes._asdict(),
        **learnt,
    )


def onnx_format(name: str, title: str, bound: float, precision: str, convert: Convert) -> Format:
    """The record of a pipeline for ONNX Runtime whose parts `convert` writes; the rest as in `Format`."""
    return Format(
        name,
        title,
        bound,
        write=lambda work, folder: write_pipeline(work, folder, "onnx", precision, ".onnx", convert),
        load=lambda work, folder: load_velocity(folder, "onnx", precision, ".onnx"),
    )


def load_velocity(folder: Path, engine: str, precision: str, suffix: str) -> Velocity:
    """What the graphs of the denoising step in a folder compute, on one thread."""
    graphs = {
        part: open_graph(engine, folder / f"{part}{suffix}", precision, threads=1)
        for part in DENOISING
        if (folder / f"{part}{suffix}").is_file()
    }
    return joined(graphs, Description.model_validate_json((folder / DESCRIPTION).read_bytes()).layer_of_site)


def joined(graphs: Mapping[str, Engine], layers: list[int] | None) -> Velocity:
    """Denoiser, or ControlNet and transformer with the residual of each site between them."""
    if layers is None:
        return lambda arrays: graphs["denoiser"](arrays)[0]

    def run(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        residuals = graphs["controlnet"](arrays)
        sites = {f"residual_{site}": residuals[layer] for site, layer in enumerate(layers)}
        return graphs["transformer"]({**arrays, **sites})[0]

    return run
