"""The demo's first minute: what the shipped student paints, before anything is trained."""

import re

from PIL import Image

from refine_control.study import demo


def test_the_demo_opens_with_the_shipped_student(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EDGE_SCENES", 2)
    said = []
    sentence = demo.open_with_edge(tmp_path, lambda label: None, said.append)
    assert said == [sentence]
    edge, teacher = map(float, re.findall(r"(\d+\.\d+) s[;,]", sentence))
    assert min(edge, teacher) > 0
    assert "4 steps without guidance" in sentence
    assert "20 guided steps" in sentence
    with Image.open(tmp_path / "edge.png") as picture:
        assert picture.height > 2 * 64
