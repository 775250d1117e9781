"""What this machine has and lacks: Python, the core packages, extras, GPU, offline settings; and how to repair it.

No other package is imported at the top: a broken package must not break its own diagnosis.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import shutil
from typing import NamedTuple

from refine_control.errors import MissingError, RefineControlError, StorageError
from refine_control.storage import storage_failure
from refine_control.threads import set_up

# fmt: off
CORE = (
    "torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "safetensors", "numpy", "scipy", "pillow",
    "pydantic", "pyyaml", "typer", "tqdm", "matplotlib", "jinja2", "tensorboard",
)
# fmt: on

EXTRAS = {
    "data": ("skimage", "httpx"),
    "eval": ("torchmetrics",),
    "review": ("fastapi", "uvicorn"),
    "ray": ("ray",),
    "lora": ("peft",),
    "export": ("onnx", "onnxscript", "onnxruntime", "torchao"),
    "openvino": ("openvino", "nncf"),
    "app": ("gradio",),
    "docs": ("mkdocs", "mkdocstrings"),
}
"""By extra: the modules that it brings."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


class Check(NamedTuple):
    """One finding. `state` is ok, missing (required, to be repaired) or note (optional)."""

    name: str
    state: str
    detail: str


def diagnose() -> list[Check]:
    """Every check, required ones first."""
    system = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    required = [Check("python", "ok", system), _packages(), _torchvision(), _models_import()]
    return [*required, _gpu(), Check("threads", "ok", str(set_up())), *map(_extra, EXTRAS), _offline()]


def user_error(error: Exception) -> RefineControlError | None:
    """The error that a user can correct, for an exception of this project, Python or a library; None for a bug."""
    if isinstance(error, RefineControlError):
        return error
    full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and full):
        return StorageError("out of memory; choose a smaller batch (--set training.device_batch_size=...) or size")
    module = (isinstance(error, ModuleNotFoundError) and error.name) or ""
    if extra := next((extra for extra, modules in EXTRAS.items() if module.partition(".")[0] in modules), None):
        return MissingError(f"{module} is not installed; run pip install 'refine-control[{extra}]'")
    if module.partition(".")[0] in CORE:
        return MissingError(f"{module} is not installed; run pip install refine-control")
    return storage_failure(error)


def _packages() -> Check:
    versions, absent = [], []
    for name in CORE:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    if absent:
        return Check("packages", "missing", f"not installed: {', '.join(absent)}; run pip install refine-control")
    return Check("packages", "ok", ", ".join(versions[:4]))


def _importing(*names: str) -> str | None:
    """The first failure of importing `names` (module or module:attribute), in one line, or None."""
    for name in names:
        try:
            pkgutil.resolve_name(name)
        except Exception as error:  # a broken binary package may raise anything
            return f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    return None


def _torchvision() -> Check:
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", "ok", "not installed, and not needed")
    if failure := _importing("torch", "torchvision"):
        effect = "makes transformers and diffusers fail with messages like \"Could not import module 'CLIPTextModel'\""
        detail = f"installed but broken ({failure}), which {effect}; run pip uninstall torchvision"
        return Check("torchvision", "missing", detail)
    return Check("torchvision", "ok", "installed and imports; not needed")


def _models_import() -> Check:
    classes = ("transformers:CLIPTextModelWithProjection", "diffusers:SD3ControlNetModel", "diffusers:AutoencoderKL")
    if failure := _importing("torch", *classes):
        return Check("models", "missing", f"{failure}; see the lines above, or install the core packages again")
    return Check("models", "ok", "torch, transformers and diffusers import")


def _gpu() -> Check:
    if _importing("torch"):
        return Check("gpu", "note", "unknown, for torch does not import")
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        detail = "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
        return Check("gpu", "ok", f"{detail}; bf16 {'yes' if has_units else 'no'}")
    if shutil.which("nvidia-smi"):
        sees = f"torch {torch.__version__} sees no GPU: a CPU build, or a driver too old"
        return Check("gpu", "note", f"nvidia-smi is here, but {sees}")
    return Check("gpu", "note", "none; the mini size runs on the CPU, the sd3 size needs a GPU")


def _extra(extra: str) -> Check:
    if absent := [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]:
        detail = f"not installed ({', '.join(absent)}); pip install 'refine-control[{extra}]' if you want it"
        return Check(f"extra {extra}", "note", detail)
    return Check(f"extra {extra}", "ok", ", ".join(EXTRAS[extra]))


def _offline() -> Check:
    said = [f"{name}={os.environ[name]}" for name in OFFLINE if os.environ.get(name)]
    home = os.environ.get("HF_HOME")
    detail = ("offline by " + ", ".join(said)) if said else "downloads are allowed once for each model"
    return Check("hub", "note" if said else "ok", detail + (f"; cache in {home}" if home else ""))
