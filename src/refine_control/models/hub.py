"""Where a model's files are: a local folder, or the hub's cache of an id, downloaded once and then read offline."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from refine_control.errors import InvalidInputError, MissingError

_ENDS = 1 << 16


def folder_of(name: str | Path, files: Sequence[str], accepted: str) -> Path:
    """The folder of a model named by a path or by a hub id, of which the `files` (patterns) are downloaded
    unless they are in the hub's cache.

    `accepted` says what may be named, for the message. Raises InvalidInputError for a folder that is not there,
    MissingError when a hub id is neither cached nor reachable."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).count("/") != 1 or str(name).startswith((".", "~")):
        raise InvalidInputError(f"no model folder at {name}; name {accepted}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:  # the hub's errors have no common ancestor
        raise MissingError(
            f"{name} is no local folder, and the hub did not give it ({type(error).__name__}); check the name, "
            f"accept its licence if it is gated, or fetch it with `hf download {name}` and name the folder"
        ) from error


def revision(folder: Path) -> str:
    """12 characters: the commit of a hub snapshot, else a hash of the config and both ends of each weight file."""
    if folder.parent.name == "snapshots":
        return folder.name[:12]
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()[:12]
