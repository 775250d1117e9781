"""One thread a worker, no network, default signals, and no skip that `allowed_skips.txt` does not name."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("laws", deadline=None)  # a busy machine breaks no law
settings.load_profile("laws")

if TYPE_CHECKING:
    from collections.abc import Callable

    from refine_control.models.backbone import Backbone
    from refine_control.models.controlnet import ControlNet

# A suite that a script starts in the background, or nohup, inherits an ignored SIGINT; tests need the default.
signal.signal(signal.SIGINT, signal.default_int_handler)

_LIST = Path(__file__).with_name("allowed_skips.txt")
_ALLOWED = {line.partition("#")[0].strip() for line in _LIST.read_text().splitlines()} - {""}


def _refuse_skip(report: Any) -> None:
    """Turns a skip that is not in the list into a failure; an expected failure is no skip."""
    if report.skipped and not hasattr(report, "wasxfail") and report.nodeid.partition("[")[0] not in _ALLOWED:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped ({reason}) and {_LIST.name} does not name it"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _refuse_skip(report)
    return report


# SD3's own classes, small enough for laws: 24 blocks of width 32. Nothing in them is zero but what a test makes zero.


def _disturb(controlnet: ControlNet, seed: int) -> ControlNet:
    """Noise in the layers that are zero at birth, so that residuals, losses and gradients are not trivially zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (controlnet.controlnet_blocks, controlnet.pos_embed_input):
            for parameter in part.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return controlnet


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """An untrained backbone with a noisy 23-layer teacher; shared, so leave it as it is."""
    return build_tiny_backbone(tmp_path_factory.mktemp("tiny"))


def build_tiny_backbone(folder: Path) -> Backbone:
    """The backbone of the fixture; the same wherever it is built."""
    from refine_control.miniature import networks as mini
    from refine_control.models.backbone import Backbone

    narrow = {"attention_head_dim": 16, "caption_projection_dim": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini, "TRANSFORMER", {**mini.TRANSFORMER, **narrow})
        patch.setattr(mini, "VAE", {**mini.VAE, "block_out_channels": (8, 8, 16, 16)})
        pipeline = mini.new_pipeline(folder, seed=0)
    pipeline.vae.register_to_config(shift_factor=0.1, scaling_factor=1.7)
    pipeline.set_progress_bar_config(disable=True)
    _disturb(pipeline.controlnet, 1)
    return Backbone(pipeline, max_sequence_length=0)


@pytest.fixture(scope="session")
def tiny_student(tiny_backbone: Backbone) -> Callable[..., ControlNet]:
    """`tiny_student(num_layers, seed=2)`: a new noisy ControlNet on the tiny backbone's transformer."""
    return partial(build_tiny_student, tiny_backbone)


def build_tiny_student(backbone: Backbone, num_layers: int, seed: int = 2) -> ControlNet:
    """What the fixture builds."""
    from refine_control.models.controlnet import from_transformer

    return _disturb(from_transformer(backbone.transformer, num_layers), seed).eval()


# FLUX's own classes: 7 double and 4 single blocks of width 16, in the published layout of folders.

FLUX_SIZES = {"in_channels": 64, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8}
FLUX_SIZES |= {"pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": [2, 2, 4]}


def _randomised(network: Any, seed: int) -> Any:
    """The network with noise in every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline `model`, and ControlNets with a mask (`inpaint`) and without one (`plain`)."""
    root = tmp_path_factory.mktemp("flux")
    build_tiny_flux(root)
    return root


def build_tiny_flux(root: Path) -> None:
    """What the fixture builds."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxControlNetModel,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

    from refine_control.miniature import networks as mini
    from refine_control.models.flux import FluxInpaintingControlNet
    from refine_control.storage import write_json

    tokenizer = mini.write_tokenizer(root / "words")
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    t5_tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], extra_ids=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(**{**mini.VAE, "block_out_channels": (8, 8, 16, 16)})
        vae.register_to_config(scaling_factor=0.36, shift_factor=0.12)
        with torch.no_grad():
            vae.encoder.conv_out.bias[16:] = -60  # log variance: stock's draw is the mean
        clip: Any = mini.build_text_encoder(len(tokenizer)).config.to_dict()
        t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=CLIPTextModel(CLIPTextConfig(**clip)),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(t5),
            tokenizer_2=t5_tokenizer,
            transformer=_randomised(FluxTransformer2DModel(num_layers=7, num_single_layers=4, **FLUX_SIZES), 0),
        ).save_pretrained(root / "model")
    write_json(root / "model" / "refine_control.json", {"max_sequence_length": 12})
    teacher = FluxInpaintingControlNet(num_layers=6, num_single_layers=0, **FLUX_SIZES)
    _randomised(teacher, 1).save_pretrained(root / "inpaint")
    plain = FluxControlNetModel(num_layers=4, num_single_layers=2, **FLUX_SIZES)
    _randomised(plain, 2).save_pretrained(root / "plain")
