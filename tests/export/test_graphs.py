"""Graphs beside those of a pipeline without T5, and the command's own list of formats."""

from typing import get_type_hints

import numpy as np
import torch
from transformers import T5Config, T5EncoderModel

from refine_control.cli.export import export
from refine_control.export.format import format_names
from refine_control.export.graphs import Graph, T5Graph
from refine_control.export.onnx_files import write_onnx
from refine_control.runtime.engines import open_graph


def test_t5_equals_pytorch_for_any_number_of_tokens(tmp_path):
    torch.manual_seed(3)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    encoder = T5EncoderModel(T5Config(vocab_size=30, **sizes)).eval()
    example = {"input_ids": torch.zeros(2, 9, dtype=torch.int64)}
    write_onnx(Graph(T5Graph(encoder).eval(), example, ("input_ids",), ("hidden",)), tmp_path / "t5.onnx")
    written = (tmp_path / "t5.onnx").read_bytes()
    assert b".py" not in written  # no stack traces of this machine
    run = open_graph("onnx", tmp_path / "t5.onnx", threads=1)
    for shape in ((1, 9), (3, 20)):
        ids = torch.randint(30, shape)
        with torch.no_grad():
            expected = encoder(ids)[0]
        np.testing.assert_allclose(run({"input_ids": ids.numpy()})[0], expected, atol=1e-5)


def test_the_help_names_every_format():
    help_text = get_type_hints(export, include_extras=True)["to"].__metadata__[0].help
    assert [name for name in format_names() if name not in help_text.replace(";", ",").split(", ")] == []
