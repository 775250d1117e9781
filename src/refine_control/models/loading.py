"""Loading of models in diffusers layout: what is on disk is what you get, or an error says why not.

A model is named `mini`, by a folder, or by a hub id. Weights are safetensors only. `models.components` loads
each component strictly, `models.fit` says whether they fit each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
)

from refine_control.config import StudentCard
from refine_control.errors import InvalidInputError, MissingError
from refine_control.folders import A_CONTROLNET, A_MODEL, refuse_other_kind
from refine_control.injection import stock_injects_exactly
from refine_control.models.backbone import Backbone
from refine_control.models.card import CARD, CONTROLNETS, packaged, write_card
from refine_control.models.components import load_network, load_scheduler, load_tokenizer, read_config, read_json
from refine_control.models.controlnet import ADDED_OPTIONS, join
from refine_control.models.cpu_kernels import use_cpu_kernels
from refine_control.models.families import condition_encoding
from refine_control.models.families.flux import is_flux_folder, stock_layer_of_site
from refine_control.models.fit import Geometry, check_controlnet, check_neighbours, geometry
from refine_control.models.flux import MAX_SEQUENCE_LENGTH as FLUX_MAX_SEQUENCE_LENGTH
from refine_control.models.flux import FluxInpaintingControlNet, is_flux
from refine_control.models.hub import folder_of
from refine_control.models.own_transformer import load_own_transformer, own_folder, save_own_transformer
from refine_control.records import INPAINT
from refine_control.storage import MANIFEST, publish_folder, read_manifest

logger = logging.getLogger(__name__)
WEIGHTS, CONFIG, INDEX = "diffusion_pytorch_model.safetensors", "config.json", "model_index.json"
SD3_MAX_SEQUENCE_LENGTH = 256


def resolve(model: str | Path) -> Path:
    """The folder of a model named `mini`, a ControlNet of `card.CONTROLNETS`, or either by a path or by a hub id
    (downloaded once, then offline).

    Raises MissingError when a hub id is neither cached nor reachable or a packaged folder is not there,
    InvalidInputError for a missing folder."""
    if folder := packaged(model):
        return folder
    files = ["*.json", "*.safetensors", "*.txt", "*.model"]
    return folder_of(model, files, "`mini`, a folder in diffusers layout, or a hub id")


def _has_our_manifest(folder: Path) -> bool:
    """Whether `folder` has a manifest that this project wrote; other programs use the same name for other contents."""
    path = folder / MANIFEST
    if folder.parent.name == "snapshots" or not path.is_file():  # the former is the hub's cache
        return False
    try:
        files = json.loads(path.read_bytes())["files"].values()
        return all({"bytes", "sha256"} <= file.keys() for file in files)
    except (KeyError, TypeError, AttributeError):
        return False
    except (ValueError, RecursionError):  # no JSON at all: `read_manifest` calls it damaged
        return True


def verify_folder(folder: Path) -> None:
    """Compares a folder that this project wrote, or a component of one, with its manifest: every size and sha256.

    Raises DamagedError for the first file that differs. Folders of other origin are not checked."""
    for root in (folder, folder.parent):
        if (root == folder or (root / INDEX).is_file()) and _has_our_manifest(root):
            read_manifest(root)
            return


def load_controlnet(folder: str | Path, own_transformer: bool = False) -> SD3ControlNetModel:
    """An fp32 ControlNet on the CPU from a folder or hub id, loaded strictly.

    One that was trained with a transformer is refused unless the caller loads the `own_transformer` too.

    A config without `extra_conditioning_channels` (docs/paper.md, trap 6) gets those of its weights.
    Raises MissingError for files that are not there, InvalidInputError when config and weights disagree or a weight is
    not finite, DamagedError where a file is not the one that was saved."""
    path = resolve(folder)
    refuse_other_kind(path, A_CONTROLNET)
    if not (path / CONFIG).is_file():
        raise InvalidInputError(f"{path} has no {CONFIG}; give a ControlNet folder in diffusers layout")
    if not own_transformer and (beside := own_folder(path)):
        raise InvalidInputError(
            f"{path} was trained together with {beside.name} and does not work without it; give it as --student or "
            "--controlnet of evaluate, inpaint or cost, or as init_from"
        )
    verify_folder(path)
    return _load_placed(path)


def controlnet_class(folder: Path) -> Any:
    """The class of the ControlNet in a folder, by its config.json: of SD3 unless that is of FLUX."""
    config = read_json(folder / CONFIG, "give a ControlNet folder in diffusers layout")
    if not is_flux_folder(config):
        return SD3ControlNetModel
    return FluxInpaintingControlNet if config.get("extra_condition_channels") else FluxControlNetModel


def _load_placed(folder: Path) -> SD3ControlNetModel:
    """The ControlNet in a folder, its config with the options that stock does not know."""
    component = controlnet_class(folder)
    controlnet, stated = load_network(component, folder), read_config(component, folder)
    controlnet.register_to_config(**{name: stated[name] for name in ADDED_OPTIONS if stated.get(name) is not None})
    return controlnet


def load_student(backbone: Backbone, folder: str | Path, name: str | Path = "") -> tuple[Backbone, SD3ControlNetModel]:
    """The ControlNet in a folder, fp32 on the CPU, and the backbone that it paints with: `backbone` itself, or around
    the student's own transformer.

    `name` stands for the folder in messages. Raises what `load_controlnet` and `load_own_transformer` raise, and
    InvalidInputError for a student of another model."""
    controlnet = load_controlnet(folder, own_transformer=True)
    check_controlnet(controlnet.config, backbone.transformer.config, name or folder)
    around = _around_own(backbone, folder)
    join(controlnet, around.transformer)
    return around, controlnet


def load_painter(
    model: str | Path, controlnet: str | Path | None = None, device: torch.device | str = "cpu"
) -> tuple[Backbone, SD3ControlNetModel]:
    """A model that need not have a ControlNet, with one from a folder as `load_student` gives it; None: the model's."""
    loaded = load_controlnet(controlnet, own_transformer=True) if controlnet else None
    backbone = load_backbone(model, loaded, device=device, controlnet_name=controlnet)
    around = _around_own(backbone, controlnet) if controlnet else backbone
    join(backbone.pipeline.controlnet, around.transformer)
    return around, backbone.pipeline.controlnet


def _around_own(backbone: Backbone, folder: str | Path) -> Backbone:
    beside = load_own_transformer(resolve(folder), backbone.transformer)
    return backbone if beside is None else backbone.with_transformer(beside)


def weights_mark(name: str | Path) -> str:
    """A hash of a folder's weights and configurations; a hub's id as it is.

    From the manifest where this project wrote the folder; else of each file, which may hold gigabytes, the size and
    three pieces."""
    folder = packaged(name) if str(name) in CONTROLNETS else Path(name)
    if folder is None or not folder.is_dir():
        return str(name)
    marks = (".safetensors", "config.json")
    if _has_our_manifest(folder):
        files = read_manifest(folder, verify=False)["files"]
        weights = {path: file["sha256"] for path, file in files.items() if path.endswith(marks)}
    else:
        paths = sorted(path for path in folder.rglob("*") if path.name.endswith(marks) and path.is_file())
        weights = {path.relative_to(folder).as_posix(): _pieces_hash(path) for path in paths}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def _pieces_hash(path: Path) -> str:
    piece, size, digest = 1 << 20, path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for start in (0, (size - piece) // 2, size - piece):
            file.seek(max(0, start))
            digest.update(file.read(piece))
    return digest.hexdigest()


def stock_warning(config: Mapping[str, Any], num_blocks: int) -> str:
    """What stock diffusers does wrong with a ControlNet of this config, and what to do; empty where it injects as we
    do."""
    layers, placed = config["num_layers"], config.get("layer_of_site")
    if placed and "num_single_layers" in config:
        right = placed == stock_layer_of_site(config)
        return "" if right else "stock diffusers injects this FLUX ControlNet otherwise; run it by refine-control"
    if stock_injects_exactly(layers, num_blocks, placed):
        return ""
    fitting = "1, 2, 3, 4, 6, 8 or 12" if num_blocks == 24 else f"1 to {num_blocks // 2}"
    return (
        f"stock diffusers injects a ControlNet of {layers} layers into {num_blocks} blocks shifted; run it by "
        f"refine-control, or choose {fitting} layers{' of equal placement' if placed else ''}"
    )


def save_controlnet(
    controlnet: SD3ControlNetModel,
    folder: Path,
    num_blocks: int,
    *,
    own_transformer: SD3Transformer2DModel | None = None,
    card: StudentCard | None = None,
    backbone: Backbone | None = None,
    **described: Any,
) -> None:
    """Publishes a folder that stock `SD3ControlNetModel.from_pretrained` loads; warns where stock injects wrongly.

    A transformer that was trained with it is saved in a folder of its own beside the ControlNet's files.
    A student for few steps has a `card` and the `backbone` that it was trained for, of which `write_card` writes.
    `described` goes into the folder's manifest: what made it."""
    warning = stock_warning(controlnet.config, num_blocks)
    if warning:
        logger.warning("%s", warning)
    with publish_folder(folder, **described) as temporary:
        controlnet.save_pretrained(temporary, max_shard_size="100GB")
        if own_transformer is not None:
            save_own_transformer(own_transformer, temporary)
        if card is not None and backbone is not None:
            card = card.model_copy(update={"condition": controlnet.config.get("condition", INPAINT)})
            write_card(temporary, card, backbone, warning, condition_encoding(controlnet.config))


class PipelineLayout(NamedTuple):
    """A kind of pipeline folder in diffusers layout."""

    name: str
    pipeline: type
    """What its components are put into."""
    classes: Mapping[str, type]
    """Of its components, the small ones first: a wrong folder is refused before gigabytes are read."""


def pipeline_layout(index: Mapping[str, Any]) -> PipelineLayout | None:
    """The kind of a model_index.json, by the class of its pipeline; None for one that is neither SD3 nor FLUX."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    scheduler = {"scheduler": FlowMatchEulerDiscreteScheduler}
    if is_flux_folder(index):
        tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5Tokenizer}
        networks = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        networks |= {"transformer": FluxTransformer2DModel, "text_encoder_2": T5EncoderModel}
        return PipelineLayout("FLUX", FluxControlNetPipeline, scheduler | tokenizers | networks)
    if not str(index.get("_class_name")).startswith("StableDiffusion3"):
        return None
    tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5Tokenizer}
    networks = {"vae": AutoencoderKL, "text_encoder": CLIPTextModelWithProjection}
    networks |= {"text_encoder_2": CLIPTextModelWithProjection, "transformer": SD3Transformer2DModel}
    networks |= {"text_encoder_3": T5EncoderModel}
    classes = scheduler | tokenizers | networks
    return PipelineLayout("SD3", StableDiffusion3ControlNetInpaintingPipeline, classes)


def read_index(path: Path) -> tuple[PipelineLayout, dict[str, str | None]]:
    """The kind of an SD3 or FLUX pipeline folder, and the class of each component; None: it does without."""
    refuse_other_kind(path, A_MODEL)
    if not (path / INDEX).is_file():
        raise InvalidInputError(f"{path} has no {INDEX}; give a pipeline folder in diffusers layout")
    index = read_json(path / INDEX, "give a pipeline folder in diffusers layout")
    if (layout := pipeline_layout(index)) is None:
        raise InvalidInputError(
            f"{path / INDEX} describes a {index.get('_class_name')}; give a folder of SD3's or FLUX's pipeline"
        )
    named = dict[str, str | None]()
    for name in (*layout.classes, "controlnet"):
        entry = index.get(name, [None, None])
        named[name] = entry[1] if isinstance(entry, list) and len(entry) == 2 else str(entry)
    for name, component in layout.classes.items():
        optional = named[name] is None and name.endswith("_3")
        if not optional and str(named[name]).removesuffix("Fast") != component.__name__:
            raise InvalidInputError(
                f"{path / INDEX} names {named[name]} as {name}; {layout.name} has a {component.__name__} there"
            )
    if (named.get("text_encoder_3") is None) != (named.get("tokenizer_3") is None):
        raise InvalidInputError(f"{path / INDEX} names one of text_encoder_3 and tokenizer_3; name both or none")
    return layout, named


def has_controlnet(model: str | Path) -> bool:
    """Whether a model brings a ControlNet of its own. Raises what `resolve` does, and for a broken index."""
    return read_index(resolve(model))[1]["controlnet"] is not None


def load_pipeline(
    model: str | Path,
    controlnet: SD3ControlNetModel | None = None,
    controlled: bool = True,
    controlnet_name: str | Path | None = None,
) -> Any:
    """The stock pipeline (`PipelineLayout`) of a model in fp32, every component loaded strictly and fitting the others.

    The folder may lack a ControlNet (plain SD3, FLUX) if one is given; unless `controlled`, the pipeline has none.
    `controlnet_name` is the ControlNet's in messages. Raises what `load_controlnet` raises."""
    path = resolve(model)
    layout, named = read_index(path)
    if controlled and controlnet is None and named["controlnet"] is None:
        raise InvalidInputError(
            f"{path} holds no ControlNet; name one with --controlnet, --teacher or `teacher:` in the recipe"
        )
    verify_folder(path)
    components: dict[str, Any] = {}
    for name, component in layout.classes.items():
        if named[name] and not (path / name).is_dir():
            advice = f", or write [null, null] for {name} and its tokenizer" if name.endswith("_3") else ""
            raise MissingError(f"{path} has no folder {name}, which its {INDEX} names; fetch it{advice}")
        load = {"scheduler": load_scheduler, "tokenizer": load_tokenizer}.get(name.split("_")[0], load_network)
        components[name] = load(component, path / name) if named[name] else None
    if controlled and controlnet is None:
        controlnet = _load_placed(path / "controlnet")
    components["controlnet"] = controlnet
    check_neighbours(components, path, controlnet_name or path)
    if controlled:
        join(cast(SD3ControlNetModel, controlnet), components["transformer"])
    return layout.pipeline(**components)


def read_geometry(model: str | Path) -> Geometry:
    """The sizes that a model paints, by its configs, without loading it. Raises what `resolve` does, and for a broken
    config what `load_network` does."""
    path = resolve(model)
    layout, _ = read_index(path)
    vae = read_config(AutoencoderKL, path / "vae")
    return geometry(vae, read_config(layout.classes["transformer"], path / "transformer"))


def load_backbone(
    model: str | Path,
    controlnet: SD3ControlNetModel | None = None,
    cpu_kernels: bool = False,
    device: torch.device | str = "cpu",
    painting: bool = True,
    controlled: bool = True,
    controlnet_name: str | Path | None = None,
) -> Backbone:
    """The frozen parts of a model, put on `device` as `Backbone.to` does; unless `controlled` without its ControlNet.

    `cpu_kernels` uses the operators that are fast on a CPU, where the model runs there. A bundle of this project
    states its closed vocabulary in its card. Raises what `load_pipeline` raises, with its
    `controlnet_name`."""
    pipeline, file = load_pipeline(model, controlnet, controlled, controlnet_name), resolve(model) / CARD
    card = json.loads(file.read_text()) if file.is_file() else {}
    vocabulary = frozenset(card.get("vocabulary") or ()) or None
    usual = FLUX_MAX_SEQUENCE_LENGTH if is_flux(pipeline.transformer) else SD3_MAX_SEQUENCE_LENGTH
    length = card.get("max_sequence_length", usual)
    backbone = Backbone(pipeline, length, vocabulary).to(device, painting)
    if cpu_kernels and backbone.device.type == "cpu":
        use_cpu_kernels(backbone.transformer, *([pipeline.controlnet] if controlled else []))
    return backbone
