"""An exported student is measured beside the others: by its own runtime, on the same noise."""

import numpy as np
import pytest

from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.miniature.scene_shards import scene_photos
from refine_control.runtime.description import is_exported
from refine_control.study import exported
from refine_control.study.compare import Result


class Pipeline:
    """Paints the number of the slot."""

    def __init__(self, folder):
        self.folder = folder

    def paint(self, image, mask, prompt, sampler, progress=None, *, slot=0):
        assert mask.shape == image.shape[:2]
        assert prompt
        return np.full_like(image, 10 * slot + sampler.seed)


def test_each_picture_is_painted_with_the_noise_of_its_number(monkeypatch, tmp_path):
    monkeypatch.setattr(exported, "ExportedPipeline", Pipeline)
    photos, result, calls = list(scene_photos(0, 0, 3)), Result({}, {}, {}, {}), []
    samplers = {"int8": SamplerConfig(seed=2)}
    exported.add_exported(result, {"int8": tmp_path}, photos, samplers, progress=lambda *a: calls.append(a))
    assert [int(picture[0, 0, 0]) for picture in result.images["int8"]] == [2, 12, 22]
    assert calls[-1] == (3, 3, "int8")
    assert result.scores["int8"]["psnr"].shape == (3,)


def test_an_export_of_another_condition_is_refused(monkeypatch, tmp_path):
    assert not is_exported(tmp_path)
    (tmp_path / "pipeline.json").write_text("{}")
    assert is_exported(tmp_path)
    monkeypatch.setattr(exported, "read_description", lambda folder: type("About", (), {"condition": "canny"}))
    exported.refuse_other_conditions({"int8": tmp_path}, "canny")
    with pytest.raises(InvalidInputError, match="int8 takes the condition canny and the test shards are of inpaint"):
        exported.refuse_other_conditions({"int8": tmp_path}, "inpaint")
