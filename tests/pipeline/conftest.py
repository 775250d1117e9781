"""A stand-in for a model that paints."""

import numpy as np
import pytest

from refine_control.config import SamplerConfig
from refine_control.models.fit import Geometry
from refine_control.pipeline.inpainter import Inpainter


class Green:
    """A painter that fills the whole picture and remembers what it was shown."""

    geometry = Geometry(multiple=16, largest=192, side=64)

    def __init__(self):
        self.calls = []

    def choose_sampler(self, given):
        return SamplerConfig(**{"num_inference_steps": 2, **{k: v for k, v in given.items() if v is not None}})

    def paint(self, image, mask, prompt, sampler, progress=None):
        self.calls.append((image, mask, prompt, sampler))
        for step in range(sampler.num_inference_steps):
            if progress:
                progress(step + 1, sampler.num_inference_steps, "paint")
        return np.broadcast_to(np.array([0, 200, 0], np.uint8), image.shape).copy()


@pytest.fixture
def painter():
    return Green()


@pytest.fixture
def inpainter(painter):
    return Inpainter(painter)
