"""Graphs run alike in every engine; a missing library and a broken file are sentences."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from refine_control.errors import DamagedError, MissingError
from refine_control.runtime.engines import ENGINES, open_graph


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """x (B,3), scale () -> scale x, and x + x."""
    nodes = [helper.make_node("Mul", ["x", "scale"], ["scaled"]), helper.make_node("Add", ["x", "x"], ["twice"])]
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, ["batch", 3]), value("scale", TensorProto.FLOAT, [])]
    outputs = [value(name, TensorProto.FLOAT, ["batch", 3]) for name in ("scaled", "twice")]
    model = helper.make_model(
        helper.make_graph(nodes, "two", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    file = tmp_path_factory.mktemp("graph") / "two.onnx"
    onnx.save(model, file)
    return file


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_come_in_order_for_any_batch_from_any_thread(graph, engine):
    run = open_graph(engine, graph, threads=1)

    def outputs(count):
        x = np.full((count, 3), count, np.float32)
        return run({"x": x, "scale": np.array(0.5, np.float32), "unknown": x})

    with ThreadPoolExecutor(4) as pool:
        for count, (scaled, twice) in zip(range(1, 9), pool.map(outputs, range(1, 9)), strict=True):
            np.testing.assert_array_equal(scaled, np.full((count, 3), count / 2))
            np.testing.assert_array_equal(twice, np.full((count, 3), count * 2))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_no_graph_is_a_sentence(tmp_path, engine):
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(DamagedError, match=r"x.onnx is no graph that this version of \w+ loads: .*; export again$"):
        open_graph(engine, tmp_path / "x.onnx")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_library_names_its_extra(graph, engine, monkeypatch):
    library, extra, _ = ENGINES[engine]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingError, match=rf"{library} is not installed; run pip install 'refine-control\[{extra}\]'"):
        open_graph(engine, graph)


def test_threads_are_those_asked_for(graph, monkeypatch):
    import onnxruntime

    counts = []
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda file, options, **more: counts.append(options.intra_op_num_threads) or session(file, options, **more),
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    open_graph("onnx", graph, threads=3)
    open_graph("onnx", graph)
    assert counts == [3, 2]
