"""A folder of graphs as the exporter writes them paints what PyTorch paints."""

import numpy as np

from refine_control.conditions.condition import Shown
from refine_control.config import SamplerConfig
from refine_control.export.format import find_format
from refine_control.pipeline.painting import paint
from refine_control.runtime.exported import ExportedPipeline
from refine_control.storage import publish_folder

SAMPLER = SamplerConfig(num_inference_steps=2, guidance_scale=3, seed=4, sigmas="even", stochastic=True)


def test_an_exported_folder_paints_what_pytorch_paints(work, tmp_path):
    with publish_folder(tmp_path / "onnx", kind="export") as folder:
        find_format("onnx").write(work, folder)
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[9:40, 20:51] = True
    painted = ExportedPipeline(tmp_path / "onnx", threads=1).paint(image, mask, "a red circle", SAMPLER)
    source = work.source
    shown = Shown(image[None], mask[None])
    expected = paint(source.backbone, source.controlnet, shown, ["a red circle"], SAMPLER)[0]
    assert np.abs(painted.astype(int) - expected).max() <= 1
