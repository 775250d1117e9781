"""Strict loading of one component of a model folder in diffusers layout: network, tokenizer or scheduler.

The headers of the safetensors (names, shapes, types) are compared with a network on the meta device before any weight
is read. diffusers and transformers accept weights that disagree with the config (docs/paper.md, trap 5).
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refine_control.errors import InvalidInputError, MissingError

VARIANTS = ("", ".fp32", ".bf16", ".fp16")
"""Suffixes of files that hold the same weights, in the order of preference."""
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_TABLE = "pos_embed.pos_embed"
"""Fixed positions of SD3's networks, which some files leave out."""
_MOST_TABLE_ELEMENTS = 2**29
_TEXT_PREFIX = "text_model."
"""Of the tensors of a CLIPTextModel, until transformers 5."""
_POSITIVE = re.compile("(size|heads|head_dim|channels|groups)$")
_UNSEEN = {
    "AutoencoderKL": ("block_out_channels", "norm_num_groups", "scaling_factor"),
    "SD3Transformer2DModel": ("attention_head_dim", "num_attention_heads", "patch_size", "sample_size"),
    "SD3ControlNetModel": ("attention_head_dim", "num_attention_heads", "patch_size", "sample_size"),
    "CLIPTextModelWithProjection": ("num_attention_heads", "hidden_act", "eos_token_id"),
    "T5EncoderModel": ("num_heads", "feed_forward_proj"),
    "FlowMatchEulerDiscreteScheduler": ("shift",),
}
"""Options that a config must state: their defaults may be another model's, and no shape would show it."""
_CONDITION = "pos_embed_input.proj.weight"
"""What an SD3 ControlNet reads its condition with: (D, channels, patch, patch)."""


class Header(NamedTuple):
    """One tensor of a weight file, unread."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises MissingError with the `advice` where there is no file, InvalidInputError for one that holds no object."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingError(f"{path.parent} has no {path.name}; {advice}") from None
    except (ValueError, RecursionError):
        raise InvalidInputError(f"{path} is not JSON; copy it again") from None
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read ({error.strerror}); copy it again") from None
    if not isinstance(content, dict):
        raise InvalidInputError(f"{path} does not hold a JSON object; copy it again")
    return content


@contextmanager
def _refused(fault: str, advice: str) -> Iterator[None]:
    """Any error of a library (they have no common class) becomes an InvalidInputError."""
    try:
        yield
    except InvalidInputError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InvalidInputError(f"{fault} ({why}); {advice}") from error


def _check_class(path: Path, config: Mapping[str, Any], component: Any) -> None:
    """The class that a config names is that of the component or one that it extends."""
    accepted = {ancestor.__name__ for ancestor in component.__mro__}
    stated = config.get("architectures") if hasattr(component, "config_class") else config.get("_class_name")
    names = stated if isinstance(stated, list) else [stated] if stated is not None else []
    if names and not accepted.intersection(map(str, names)):
        raise InvalidInputError(f"{path} describes a {names[0]}; {path.parent} must hold a {component.__name__}")


def _accepts(parameter: inspect.Parameter, value: Any) -> bool:
    """Whether a JSON value is of one of the types in an annotation; one that names no simple type accepts all."""
    words = set(re.findall(r"\w+", str(parameter.annotation)))
    kinds = {bool: {"bool"}, int: {"int", "float"}, float: {"float"}, str: {"str", "Literal"}, list: {"tuple", "list"}}
    simple = set().union(*kinds.values())
    return type(value) not in kinds or not words & simple or bool(words & (kinds[type(value)] | {"Sequence", "Any"}))


def _check_options(path: Path, config: Mapping[str, Any], component: Any) -> None:
    """Options have the types of the constructor and are finite, sizes positive, and what no shape shows is stated."""
    if absent := [name for name in _UNSEEN.get(component.__name__, ()) if config.get(name) is None]:
        raise InvalidInputError(f"{path} has no {absent[0]}; use the config that belongs to these weights")
    # transformers checks the types of its options itself
    parameters = {} if hasattr(component, "config_class") else inspect.signature(component.__init__).parameters
    for name, value in config.items():
        if name in parameters and not _accepts(parameters[name], value):
            annotation = str(parameters[name].annotation).removeprefix("<class '").removesuffix("'>")
            raise InvalidInputError(
                f"{path}: {name} is {value!r:.40}, which is not of the type {annotation}; correct it"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInputError(f"{path}: {name} is {value}, which is not finite; correct it")
        positive = _POSITIVE.search(name) and name != "extra_conditioning_channels"
        if name in parameters and positive and isinstance(value, int) and value < 1:
            raise InvalidInputError(f"{path}: {name} is {value}; it must be at least 1")


def find_weights(folder: Path, stem: str) -> list[Path]:
    """The safetensors files that together hold a network's weights: one, or all shards, of the first whole variant.

    Raises MissingError that names the files of an incomplete set."""
    shard = re.compile(rf"{re.escape(stem)}((?:\.\w+)?)-(\d+)-of-(\d+)((?:\.\w+)?)\.safetensors")
    present = {path.name: path for path in folder.iterdir() if path.is_file()}
    for variant in VARIANTS:
        if single := present.get(f"{stem}{variant}.safetensors"):
            return [single]
        matches = [match for match in map(shard.fullmatch, sorted(present)) if match and match[1] + match[4] == variant]
        if not matches:
            continue
        total = matches[0][3]
        shards = {int(match[2]): present[match[0]] for match in matches if match[3] == total}
        absent = sorted(set(range(1, int(total) + 1)) - shards.keys()) if int(total) < 10_000 else [1]
        if absent:
            before, after = matches[0][1], matches[0][4]
            name = f"{stem}{before}-{absent[0]:05d}-of-{total}{after}.safetensors"
            raise MissingError(f"{folder} lacks {len(absent)} of {int(total)} files of weights, first {name}; fetch it")
        return [shards[number] for number in sorted(shards)]
    others = sorted(name for name in present if name.endswith((".bin", ".safetensors", ".ckpt", ".pt", ".msgpack")))
    seen = f", only {others[0]}, which is not read" if others else ""
    raise MissingError(f"{folder} has no {stem}.safetensors{seen}; only safetensors are read: fetch or copy that file")


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """The tensors of weight files by name, unread. Raises InvalidInputError for a file that is damaged."""
    from safetensors import safe_open

    headers: dict[str, Header] = {}
    for file in files:
        with (
            _refused(f"{file} is cut or not a safetensors file", "copy the weights again"),
            safe_open(file, "pt") as opened,
        ):
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                if name in headers:
                    raise InvalidInputError(f"{file} and {headers[name].file.name} both hold the tensor {name}")
                tensor = opened.get_slice(name)
                headers[name] = Header(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
    return headers


def _renamed(headers: dict[str, Header], network: Any) -> dict[str, Header]:
    """The headers by today's names: attention of older VAEs, and text models with and without their prefix."""
    if fix := getattr(network, "_fix_state_dict_keys_on_load", None):
        fix(headers)
    if any(name.startswith(_TEXT_PREFIX) for name in network.state_dict()):
        return headers
    return {name.removeprefix(_TEXT_PREFIX): header for name, header in headers.items()}


def _compare(headers: dict[str, Header], network: Any, folder: Path) -> dict[str, Header]:
    """The headers of the tensors to load. Raises InvalidInputError unless they are those of the network, both ways."""
    expected = network.state_dict()
    optional = {name: buffer for name, buffer in network.named_buffers() if name not in expected or name == _TABLE}
    tied: Mapping[str, str] = getattr(network, "_tied_weights_keys", None) or {}
    for copy, original in tied.items():
        if copy in headers:
            headers.setdefault(original, headers[copy])
    ignored = [re.compile(pattern) for pattern in getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()]
    headers = {n: h for n, h in headers.items() if n in expected or not any(p.search(n) for p in ignored)}
    known = {**optional, **expected}
    both = sorted(known.keys() & headers.keys())
    disagreements = {
        "lacks": sorted(expected.keys() - headers.keys() - {*optional, *tied}),
        "holds unknown": sorted(headers.keys() - known.keys()),
        "has another shape for": [n for n in both if headers[n].shape != tuple(known[n].shape)],
        "has another type for": [n for n in both if known[n].is_floating_point() and headers[n].dtype not in _FLOATS],
    }
    for complaint, names in disagreements.items():
        if names:
            first = names[0]
            details = f" ({headers[first].dtype} {list(headers[first].shape)})" if first in both else ""
            raise InvalidInputError(
                f"the weights in {folder} disagree with its config.json: it {complaint} {len(names)} tensors, first "
                f"{first}{details}; use the config that belongs to these weights"
            )
    return {name: headers[name] for name in both if name in expected}


def read_tensors(headers: Mapping[str, Header], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The tensors by name, floats in `dtype` (None: as stored). Raises InvalidInputError where one is not finite."""
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        files = {file: stack.enter_context(safe_open(file, "pt")) for file in {each.file for each in headers.values()}}
        for name, header in headers.items():
            tensor = files[header.file].get_tensor(header.name)
            tensors[name] = tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)
            if tensor.numel() and not all(math.isfinite(end) for end in torch.aminmax(tensors[name])):
                raise InvalidInputError(
                    f"{header.file}: the tensor {name} holds values that are not finite; use another checkpoint"
                )
    return tensors


def read_config(component: Any, folder: Path, name: str = "config.json") -> Mapping[str, Any]:
    """The config of a component, its class and options checked; what it leaves out is not filled in."""
    path = folder / name
    config = read_json(path, f"fetch or copy the whole {component.__name__}")
    _check_class(path, config, component)
    _check_options(path, config, component)
    return config


def load_network(component: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A network of the class `component` (diffusers or transformers) on the CPU, floats in `dtype`, for inference.

    Raises MissingError for files that are not there, InvalidInputError for a config or weights that cannot be used or
    disagree."""
    from accelerate import init_empty_weights

    path, config = folder / "config.json", dict(read_config(component, folder))
    of_transformers = hasattr(component, "config_class")
    stem = "model" if of_transformers else "diffusion_pytorch_model"
    headers = read_headers(find_weights(folder, stem))
    if deep := [n for n, v in config.items() if "layers" in n and isinstance(v, int) and v > max(1, len(headers))]:
        raise InvalidInputError(f"{path}: {deep[0]} is {config[deep[0]]}, more layers than {folder} holds tensors")
    if component.__name__ == "SD3ControlNetModel" and _CONDITION in headers:  # published configs may leave it out
        extra = headers[_CONDITION].shape[1] - config.get("in_channels", 16)
        config.setdefault("extra_conditioning_channels", max(0, extra))
    advice = "use the config that belongs to these weights"
    with _refused(f"{path} does not describe a {component.__name__}", advice), torch.device("meta"):
        network = _build(component, config)
    headers = _compare(_renamed(headers, network), network, folder)
    computed = {name: buffer for name, buffer in network.named_buffers() if name not in headers}
    if too_large := [name for name, buffer in computed.items() if buffer.numel() > _MOST_TABLE_ELEMENTS]:
        raise InvalidInputError(
            f"{path} describes a {too_large[0]} of {computed[too_large[0]].numel():.0e} numbers; correct it"
        )
    if computed:
        with init_empty_weights(include_buffers=False):
            network = _build(component, config)
    network.load_state_dict(read_tensors(headers, dtype), strict=False, assign=True)
    if of_transformers:
        network.tie_weights()
    return network.eval()


def _build(component: Any, config: Mapping[str, Any]) -> Any:
    """A new network of `component`; options that it does not know are left out, as diffusers and transformers do."""
    if hasattr(component, "config_class"):
        return component(component.config_class.from_dict(dict(config)))
    known = component._get_init_keys(component)
    return component(**{name: value for name, value in config.items() if name in known})


def load_pretrained(component: Any, folder: Path) -> Any:
    """A network of the class `component` of transformers, which renames tensors of earlier versions; on the CPU.

    Raises MissingError where there are no weights, InvalidInputError for those that do not fit or are not whole: a
    weight that the file lacks would be random."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = component.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except OSError as error:
        raise MissingError(
            f"{folder} has a config.json and no model.safetensors; download the model whole, as with `hf download`"
        ) from error
    except Exception as error:  # safetensors' and transformers' own, for cut files, other shapes, unknown fields
        raise InvalidInputError(f"{folder}: {error}; download the model again") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise InvalidInputError(
            f"the weights in {folder} lack {len(info['missing_keys'])} tensors, first {first}; use the config.json "
            "that belongs to these weights"
        )
    return model


def load_scheduler(component: Any, folder: Path) -> Any:
    """A scheduler of the class `component`, every option checked as a network's. Raises as `load_network`."""
    path = folder / "scheduler_config.json"
    config = read_config(component, folder, path.name)
    with _refused(f"{path} does not describe a {component.__name__}", "copy it again"):
        return component.from_config(config)


def load_tokenizer(component: Any, folder: Path) -> Any:
    """A tokenizer of the class `component`, by its files alone. Raises as `load_network`."""
    if not folder.is_dir():
        raise MissingError(f"there is no folder {folder}; fetch or copy the whole model")
    read_json(folder / "tokenizer_config.json", "fetch or copy the whole tokenizer")
    sets = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
    if not any(all((folder / name).is_file() for name in names) for names in sets):
        raise MissingError(
            f"{folder} has no tokenizer.json (nor vocab.json with merges.txt, nor spiece.model); fetch it"
        )
    with _refused(f"{folder} does not hold a {component.__name__}", "copy it again"):
        tokenizer = component.from_pretrained(folder, local_files_only=True)
        tokenizer("a red circle")
    if absent := _unreachable_tokens(tokenizer):
        raise InvalidInputError(
            f"{folder} has no merges for {len(absent)} of its tokens, first {absent[0]!r}: one of its files is "
            "cut; copy the tokenizer again"
        )
    return tokenizer


def _unreachable_tokens(tokenizer: Any) -> list[str]:
    """Tokens of a BPE vocabulary that no merge makes, as where its list of merges was cut; none for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    if model.get("type") != "BPE":
        return []
    suffix = model.get("end_of_word_suffix") or ""
    merged = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]}
    reachable = merged | set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    return sorted(token for token in model["vocab"] if len(token.removesuffix(suffix)) > 1 and token not in reachable)
