"""A student as `train` leaves it, an evaluation of it, a hub that runs in this process, and a model of four blocks: the
exporter's time grows with the blocks, and its graphs are written once."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import SD3Transformer2DModel

from refine_control.config import SamplerConfig, resolved_yaml
from refine_control.export.format import Work
from refine_control.export.source import Source, scene_samples
from refine_control.models.controlnet import from_transformer
from refine_control.models.loading import save_controlnet
from refine_control.recipe_files import load_recipe
from refine_control.storage import sha256_file, write_json
from refine_control.training.run import student_card

PRIVATE = "/home/someone/secret"


class Trained(NamedTuple):
    """Folders of a run."""

    run: Path
    student: Path
    evaluation: Path


def interval(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 1, "high": mean + 2, "excludes_zero": True}


def make_evaluation(folder: Path, student: Path) -> Path:
    """What `evaluate` writes, of which a card reads a part."""
    folder.mkdir()
    cost = {"num_layers": 23, "num_params": 3000, "gflops_controlnet": 2.0, "gflops_step": 5.0, "step_seconds": 0.25}
    numbers = {
        "samples": 20,
        "models": {"teacher": {"psnr": interval(24)}, "mine": {"psnr": interval(18.5), "both": interval(40)}},
        "paired_differences": {"teacher - mine": {"psnr": interval(6)}},
        "cost": {"teacher": cost, "mine": {**cost, "num_layers": 2, "gflops_controlnet": 1.0, "gflops_step": 4.0}},
        "facts": {
            "command": f"refine-control evaluate --student mine={PRIVATE}/run --test {PRIVATE}/test",
            "test": f"{PRIVATE}/photographs",
            "sampler": "Euler, 4 steps",
            "machine": "x86_64, cpu",
        },
    }
    write_json(folder / "metrics.json", numbers)
    weights = student / "diffusion_pytorch_model.safetensors"
    report = f"<li>test: {PRIVATE}/photographs/manifest.json, sha256 {'a' * 16}</li>"
    report += f"<li>mine: {PRIVATE}/run/{weights.name}, sha256 {sha256_file(weights)[:16]}</li>"
    (folder / "report.html").write_text(report)
    (folder / "grid.png").write_bytes(b"a picture")
    return folder


@pytest.fixture(scope="session")
def trained(tiny_backbone, tiny_student, tmp_path_factory) -> Trained:
    """A run of a recipe for few steps on a local model, with everything that must stay at home beside the student."""
    top = tmp_path_factory.mktemp("trained")
    overrides = [f"model={PRIVATE}/model", f"init_from={PRIVATE}/stage1", f"data.unlabeled={top}/cache"]
    recipe = load_recipe("mini/end_points", overrides)
    student = top / "run" / "student"
    options = {"kind": "student", "fingerprint": "f" * 64, "recipe": recipe.model_dump(mode="json"), "steps": 7}
    save_controlnet(tiny_student(2), student, 24, card=student_card(recipe), backbone=tiny_backbone, **options)
    (top / "run" / "recipe.yaml").write_text(resolved_yaml(recipe))
    (top / "run" / "metrics.jsonl").write_text(PRIVATE)
    (student / "notes.txt").write_text(PRIVATE)
    (student / "optimizer.safetensors").write_bytes(b"")
    return Trained(top / "run", student, make_evaluation(top / "evaluation", student))


class Hub:
    """The routes of the hub that a push calls. `files` arrive by commit, or by LFS with their sha256; `answers` gives
    the status and the headers of a route that fails."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.answers: dict[str, tuple[int, dict[str, str]]] = {}
        self.private = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_POST = do_PUT = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("content-length", 0)))
        self.calls.append(f"{request.command} {request.path}")
        status, headers = next((a for part, a in self.answers.items() if part in request.path), (200, {}))
        value = self.reply(request.path, body) if status == 200 else {"error": "no"}
        data = json.dumps(value).encode()
        request.send_response(status)
        for name, each in {**headers, "Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            request.send_header(name, each)
        request.end_headers()
        request.wfile.write(data)

    def reply(self, path: str, body: bytes) -> Any:
        if path.startswith("/store/"):
            self.stored[hashlib.sha256(body).hexdigest()] = body
            return {}
        if "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.files[value["path"]] = self.stored[value["oid"]]
            return {"commitUrl": f"{self.url}/me/it/commit/1", "commitOid": "1"}
        content = json.loads(body or b"{}")
        if path.endswith("/repos/create"):
            self.created.append(content)
            return {"url": f"{self.url}/me/it", "name": "me/it"}
        if "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            each = [(file["path"], modes[file["path"].endswith(".safetensors")]) for file in content["files"]]
            return {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in each]}
        if path.endswith("/objects/batch"):
            actions = {"upload": {"href": f"{self.url}/store/it"}}
            return {"transfer": "basic", "objects": [{**each, "actions": actions} for each in content["objects"]]}
        if path.endswith("/validate-yaml"):
            return {}
        return {"id": "me/it", "private": self.private}


@pytest.fixture
def hub(monkeypatch):
    """A hub at `hub.url`; this process is online for it, and logged in."""
    import huggingface_hub.constants

    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    running = Hub()
    thread = threading.Thread(target=running.server.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.server.shutdown()
    running.server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def small(tiny_backbone):
    """The tiny backbone around a transformer of four blocks."""
    torch.manual_seed(5)
    config = {**tiny_backbone.transformer.config, "num_layers": 4}
    return tiny_backbone.with_transformer(SD3Transformer2DModel.from_config(config).eval().requires_grad_(False))


@pytest.fixture(scope="session")
def make_source(small):
    """`make_source(num_layers)`: a noisy student of the four blocks."""

    def build(num_layers):
        controlnet = from_transformer(small.transformer, num_layers).requires_grad_(False).eval()
        torch.manual_seed(num_layers)
        for part in (controlnet.controlnet_blocks, controlnet.pos_embed_input):
            for parameter in part.parameters():
                parameter.normal_(std=0.1)
        return Source("tiny", None, small, controlnet, SamplerConfig(conditioning_scale=0.8))

    return build


@pytest.fixture(scope="session")
def work(make_source, tmp_path_factory):
    """An export of two layers; its ONNX graphs are written where a test needs them."""
    source = make_source(2)
    return Work(source, scene_samples(source, 3), tmp_path_factory.mktemp("graphs"))
