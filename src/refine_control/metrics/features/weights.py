"""The published weights of the metric networks: finds, verifies and loads them.

A file is looked for where the caller says, or else in the folder of the environment variable
REFINE_CONTROL_WEIGHTS, then in the caches of torch and of the hub. Nothing is downloaded. A file is opened
only after its sha256 matched, and then with weights_only: these are the only .pth files that are ever opened.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from refine_control.errors import DamagedError, InvalidInputError, MissingError
from refine_control.storage import sha256_file

FOLDER_VARIABLE = "REFINE_CONTROL_WEIGHTS"


class Published(NamedTuple):
    """The published file of weights of a metric."""

    metric: str
    names: tuple[str, ...]
    """Its file names, the usual one first, relative to the searched folders."""
    sha256: str
    source: str
    """How to get it: `from ...` or `with ...`."""
    packages: tuple[tuple[str, str], ...] = ()
    """Installed packages that contain it: name, path inside. They are not imported."""
    repository: str | None = None
    """On the hub."""


INCEPTION = Published(
    "FID and KID",
    ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "from https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
ALEXNET = Published(
    "LPIPS",
    ("alexnet-owt-7be5be79.pth",),
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    "from https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
LPIPS_HEADS = Published(
    "LPIPS",
    ("alex.pth",),
    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "from https://github.com/richzhang/PerceptualSimilarity (lpips/weights/v0.1/alex.pth), "
    "or with `pip install 'refine-control[eval]'`",
    packages=(("torchmetrics", "functional/image/lpips_models/alex.pth"), ("lpips", "weights/v0.1/alex.pth")),
)
CLIP = Published(
    "CMMD",
    ("openai/clip-vit-large-patch14-336/pytorch_model.bin", "clip-vit-large-patch14-336/pytorch_model.bin"),
    "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
    "with `hf download openai/clip-vit-large-patch14-336 pytorch_model.bin`",
    repository="openai/clip-vit-large-patch14-336",
)


def find_weights(published: Published, given: Path | None = None) -> Path:
    """The file of `published`: `given` (a file, or a folder that holds it) or, without it, the first place with one.

    Raises MissingError with the metrics that cannot be computed and where to get the file."""
    places = list(_places(published)) if given is None else _inside(given, published)
    existing = next((path for path in places if path.is_file()), None)
    if existing is None:
        where = f"not at {given}" if given is not None else f"not in the folder {FOLDER_VARIABLE} names, nor in a cache"
        raise MissingError(
            f"{published.metric} not computed: needs {Path(published.names[0]).name}, which is {where}; "
            f"get it {published.source}"
        )
    return existing


def folder_with(published: Published, folder: Path | None) -> Path | None:
    """`folder` if it holds the file of `published`, else None: then it is looked for where it always is."""
    return folder if folder is not None and any(p.is_file() for p in _inside(folder, published)) else None


def read_weights(published: Published, given: Path | None = None) -> dict[str, torch.Tensor]:
    """The tensors of `published` on the CPU, by name.

    Raises MissingError as `find_weights` does, DamagedError for a file with another sha256."""
    path = find_weights(published, given)
    digest = sha256_file(path)
    if digest != published.sha256:
        raise DamagedError(
            f"{path} is not the published file: its sha256 begins {digest[:12]} and should begin "
            f"{published.sha256[:12]}; get the right one {published.source}"
        )
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InvalidInputError(f"{path} holds something else than tensors by name")
    return dict(tensors)


def load_strictly(network: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Every tensor of `network` from `tensors`, which hold these names and shapes and no others; then frozen, in eval.

    The counters of batch normalisation, which count training steps, may be there or not: old files have none.
    Raises InvalidInputError with the first name that disagrees."""
    expected, given = _without_counters(network.state_dict()), _without_counters(tensors)
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    shapes = sorted(k for k in expected.keys() & given.keys() if expected[k].shape != given[k].shape)
    for names, what in ((missing, "lack"), (unknown, "hold unknown"), (shapes, "have another shape for")):
        if names:
            raise InvalidInputError(
                f"the weights of {name} {what} {len(names)} tensor{'s' * (len(names) != 1)}, first {names[0]}; "
                "use the published file"
            )
    network.load_state_dict({k: v.float() for k, v in given.items()}, strict=False)  # but for the counters
    network.eval().requires_grad_(False)


def _without_counters(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors.items() if not k.endswith(".num_batches_tracked")}


def _inside(place: Path, published: Published) -> list[Path]:
    if not place.is_dir():
        return [place]
    return [place / name for name in dict.fromkeys([*published.names, *(Path(n).name for n in published.names)])]


def _places(published: Published) -> Iterator[Path]:
    if folder := os.environ.get(FOLDER_VARIABLE):
        yield from _inside(Path(folder), published)
    if not published.packages and not published.repository:  # those are no downloads of torch's
        yield from _inside(Path(torch.hub.get_dir()) / "checkpoints", published)
    for package, inside in published.packages:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            yield Path(root) / inside
    if published.repository:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(published.repository, Path(published.names[0]).name)
        if isinstance(cached, str):
            yield Path(cached)
