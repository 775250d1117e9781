"""Networks that make condition pictures, loaded by hub id or folder."""

from __future__ import annotations

from typing import Any

from refine_control.errors import InvalidInputError


def load_preparer(model: str, network_class: Any, name: str, example: str) -> Any:
    """A frozen network of a transformers class, on the GPU if there is one.

    `name` and `example` stand in errors: the class in words, and a hub id of it. Raises MissingError for a model that
    is not there, InvalidInputError for a folder with a model of another class."""
    from refine_control.models.components import load_pretrained, read_json
    from refine_control.models.devices import best_device
    from refine_control.models.hub import folder_of

    example = f"a hub id such as {example}, or the folder that `hf download` of it prints"
    folder = folder_of(model, ["*.json", "*.safetensors"], example)
    kind = read_json(folder / "config.json", f"fetch {example}").get("model_type")
    if kind != network_class.config_class.model_type:
        raise InvalidInputError(f"{folder} holds a model of type {kind!r}, not a {name}; name {example}")
    return load_pretrained(network_class, folder).to(best_device()).eval().requires_grad_(False)
