"""A static page in which an exported pipeline paints in the visitor's browser, by onnxruntime-web's WebAssembly."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from refine_control.errors import DamagedError, InvalidInputError, MissingError
from refine_control.miniature import vocabulary
from refine_control.records import INPAINT
from refine_control.runtime.description import DESCRIPTION
from refine_control.storage import write_atomic, write_json

if TYPE_CHECKING:
    from refine_control.export.format import Work
    from refine_control.export.source import Source

PAGE = Path(__file__).parent / "web_page"
ORT_VERSION = "1.30.0"
ORT_PACKAGE = f"onnxruntime-web@{ORT_VERSION}"
ORT_FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""Files of the package that the page loads, in its folder dist, with their sha256."""
EXAMPLES = 5
_EXAMPLE_SEED = 16


def check_source(source: Source) -> None:
    """Raises InvalidInputError for a student that cannot run in a page."""
    if source.backbone.vocabulary is None or source.backbone.pipeline.text_encoder_3 is not None:
        raise InvalidInputError(
            f"{source.name} is for a model without a closed vocabulary, whose text encoders and transformer take "
            "gigabytes, too much for a browser; export it with `--to onnx`, or a student of the mini model"
        )
    if source.condition != INPAINT:
        raise InvalidInputError(
            f"{source.name} is for the condition {source.condition}, and the page paints a region of a picture; export "
            "a student for inpainting"
        )


def write_site(work: Work, folder: Path) -> None:
    """Writes the fp32 ONNX graphs and the page. Raises what `runtime_files` raises, InvalidInputError for two graphs
    in place of one."""
    from refine_control.export.pipeline_folder import copy_graph, write_pipeline

    if work.separate:
        raise InvalidInputError("the page runs ControlNet and transformer as one graph; leave out --separate")
    write_runtime(folder / "ort", work.ort)  # before the graphs, which take longer
    write_pipeline(work, folder, "onnx", "fp32", ".onnx", copy_graph)
    networks = work.source.controlnet, work.source.backbone.transformer
    parameters = sum(weight.numel() for network in networks for weight in network.parameters())
    layers, blocks = len(networks[0].controlnet_blocks), work.source.backbone.num_blocks
    write_page(
        folder,
        f"A ControlNet of {layers} layers and a transformer of {blocks} blocks, {parameters / 1e6:.1f} million "
        f"parameters together, run by ONNX Runtime Web {ORT_VERSION} in WebAssembly on one thread of the processor.",
    )


def write_page(folder: Path, about: str) -> None:
    """Adds the page to a folder of ONNX graphs with their pipeline.json. `about` says in a sentence what runs."""
    described = json.loads((folder / DESCRIPTION).read_bytes())
    for file in sorted(PAGE.iterdir()):
        write_atomic(folder / file.name, file.read_bytes())
    words = sorted(described["vocabulary"], key=lambda word: (*vocabulary.WORDS, word).index(word))
    page = {
        "about": about,
        "words": words,
        "tables": {part: token_table(folder / file, words) for part, file in described["tokenizers"].items()},
        "bytes": {part: (folder / file).stat().st_size for part, file in described["parts"].items()},
        "examples": _write_examples(folder) if set(vocabulary.WORDS) <= set(words) else [],
    }
    write_json(folder / "page.json", page)
    write_atomic(folder / "README.md", _README.format(about=about))


def token_table(tokenizer: Path, words: Collection[str]) -> dict[str, Any]:
    """Token ids of each word by a CLIP's tokenizer.json: those of a prompt are the ids of its words, one after another,
    between `begin` and `end`, padded by `pad` to `length`."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(tokenizer))
    padded = reader.encode("").ids
    reader.no_padding()
    begin, end = reader.encode("").ids
    ids = {word: reader.encode(word, add_special_tokens=False).ids for word in words}
    return {"begin": begin, "end": end, "pad": padded[-1], "length": len(padded), "ids": ids}


def _write_examples(folder: Path) -> list[dict[str, str]]:
    """Scenes with a hole and a prompt of another object, as files of the page."""
    from refine_control.miniature import scenes

    (folder / "examples").mkdir()
    drawn = scenes.render(_EXAMPLE_SEED, 0, EXAMPLES, "distinct")
    colours, shapes = list(vocabulary.COLOURS), vocabulary.SHAPES
    examples = []
    for i in range(EXAMPLES):
        image, mask = f"examples/{i}.png", f"examples/{i}_mask.png"
        alpha = 255 * drawn.masks[i].numpy().astype(np.uint8)
        Image.fromarray(drawn.images[i].numpy()).save(folder / image)
        Image.fromarray(np.stack([alpha, alpha], -1)).save(folder / mask)
        colour, shape = (drawn.colour[i] + 3) % len(colours), (drawn.shape[i] + 2) % len(shapes)
        prompt = vocabulary.local_prompt(int(colour), int(shape))
        examples.append({"picture": image, "mask": mask, "prompt": prompt})
    return examples


def write_runtime(folder: Path, package: Path | None) -> None:
    """Writes the files of `ORT_FILES` from a folder or a .tgz file of the npm package, or as npm fetches it.

    Raises InvalidInputError for another package, DamagedError for files that differ, MissingError without npm or where
    npm fetches nothing."""
    if package is None:
        with tempfile.TemporaryDirectory() as temporary:
            return write_runtime(folder, fetch_package(Path(temporary)))
    folder.mkdir()
    for name, expected in ORT_FILES.items():
        data = _packed(package, f"dist/{name}")
        if hashlib.sha256(data).hexdigest() != expected:
            raise DamagedError(
                f"{name} of {package} is not that of {ORT_PACKAGE}; fetch it by `npm pack {ORT_PACKAGE}`"
            )
        write_atomic(folder / name, data)


def _packed(package: Path, name: str) -> bytes:
    with suppress(OSError, tarfile.TarError, KeyError, EOFError):
        if package.is_dir():
            return (package / name).read_bytes()
        with tarfile.open(package, "r:gz") as archive:
            if member := archive.extractfile(f"package/{name}"):
                return member.read()
    raise InvalidInputError(
        f"{package} does not hold {name} of the npm package {ORT_PACKAGE}; give --ort the .tgz file that "
        f"`npm pack {ORT_PACKAGE}` writes, or the folder node_modules/onnxruntime-web"
    )


def fetch_package(folder: Path) -> Path:
    """The .tgz file of `ORT_PACKAGE`, fetched into `folder` by npm as the user has configured it.

    Raises MissingError."""
    advice = f"give --ort a file that `npm pack {ORT_PACKAGE}` has written on a machine with npm"
    if (npm := shutil.which("npm")) is None:
        raise MissingError(f"the page needs the npm package {ORT_PACKAGE}, and npm is not on the PATH; {advice}")
    command = [npm, "pack", ORT_PACKAGE, "--silent", "--pack-destination", str(folder.resolve())]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    packages = list(folder.glob("onnxruntime-web-*.tgz"))
    if run.returncode or not packages:
        reason = (run.stderr.strip() or f"exit code {run.returncode}").splitlines()[0]
        raise MissingError(f"npm does not fetch {ORT_PACKAGE} ({reason}); {advice}")
    return packages[0]


_README = """# Inpainting in the browser

A static page made by `refine-control export --to web`. {about}
Nothing leaves the visitor's device.

Browsers load WebAssembly and modules from a server only, not from `file://`. Any static file server will do:

```bash
python -m http.server --directory .
```

Copyright of the files in `ort/`: Microsoft Corporation, MIT License (npm package `onnxruntime-web`).
"""
