"""FLOPs by hand, parameters, fair timing, memory that is really counted."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from refine_control.errors import InvalidInputError, MissingError
from refine_control.metrics import cost
from refine_control.metrics.cost import (
    Timing,
    count_flops,
    count_parameters,
    interleaved,
    peak_memory,
    peak_memory_fresh,
    ratio,
    run_fresh,
    time_call,
)


def make_qkv(queries=8, keys=5, **options):
    """(B 2, heads 3, tokens, 16)"""
    return (torch.randn(2, 3, n, 16, **options) for n in (queries, keys, keys))


ATTENTION = 2 * (2 * 2 * 3 * 8 * 5 * 16)  # scores and weighted sum, each B heads queries keys depth MACs


def test_parameters_count_frozen_ones_and_shared_ones_once():
    layer = torch.nn.Linear(7, 5)
    layer.weight.requires_grad_(False)
    norm = torch.nn.BatchNorm1d(5)  # two parameters of 5; its running statistics are buffers
    assert count_parameters(torch.nn.Sequential(layer, norm, layer)) == 7 * 5 + 5 + 2 * 5


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_flops_of_a_linear_layer_by_hand(shape, bias):
    layer, x = torch.nn.Linear(7, 5, bias=bias), torch.randn(shape)
    expected = 2 * (x.numel() // 7) * 7 * 5
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) == expected
    with torch.inference_mode():
        assert count_flops(lambda: layer(x)) == expected


def test_flops_of_a_matrix_times_a_vector_by_hand():
    matrix, vector, bias = torch.randn(5, 7), torch.randn(7), torch.randn(5)
    assert count_flops(lambda: matrix @ vector) == 2 * 5 * 7
    assert count_flops(lambda: torch.addmv(bias, matrix, vector)) == 2 * 5 * 7


def test_flops_of_a_convolution_by_hand():
    layer, x = torch.nn.Conv2d(3, 4, kernel_size=3, padding=1, stride=2), torch.randn(2, 3, 8, 6)
    assert count_flops(lambda: layer(x)) == 2 * (2 * 4 * 4 * 3) * (3 * 3 * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_flops_of_attention_by_hand(dtype, masked):
    query, key, value = make_qkv(dtype=dtype)
    mask = torch.zeros(8, 5, dtype=dtype) if masked else None
    assert count_flops(lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask)) == ATTENTION


def test_fused_attention_costs_what_the_plain_formula_costs():
    query, key, value = make_qkv()
    plain = count_flops(lambda: (query @ key.transpose(-1, -2)).softmax(-1) @ value)
    assert count_flops(lambda: scaled_dot_product_attention(query, key, value)) == plain == ATTENTION


def test_a_backward_pass_is_counted_too():
    layer, x = torch.nn.Linear(7, 5), torch.randn(3, 7, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 3 * 7 * 5
    query, key, value = make_qkv(requires_grad=True)
    assert count_flops(lambda: scaled_dot_product_attention(query, key, value).sum().backward()) == 3.5 * ATTENTION


def test_a_joint_attention_block_by_hand():
    """An SD3 block's two streams: the counter agrees with the sum of its matrices."""
    from diffusers.models.attention import JointTransformerBlock

    dim, image, text = 32, 16, 6
    block = JointTransformerBlock(dim=dim, num_attention_heads=4, attention_head_dim=8)
    arguments = torch.randn(1, image, dim), torch.randn(1, text, dim), torch.randn(1, dim)
    with torch.no_grad():
        counted = count_flops(lambda: block(*arguments))
    tokens = image + text
    per_token = 4 * dim * dim + 2 * 4 * dim * dim  # q k v out, feed-forward up and down
    attention, modulation = 2 * tokens * tokens * dim, 2 * 6 * dim * dim
    assert counted == 2 * (tokens * per_token + attention + modulation)


def test_timing_reports_the_clock(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    calls = []
    timing = time_call(lambda: calls.append(1), warmup=2, repeats=3)
    assert len(calls) == 5
    assert timing.samples == (1.0, 3.0, 2.0)
    assert timing.median == 2.0
    assert timing.low == pytest.approx(1.1)
    assert timing.high == pytest.approx(2.9)
    assert timing.spread == timing[:3]


def test_interleaving_alternates_and_turns_round():
    order = []
    timings = interleaved({name: (lambda name=name: order.append(name)) for name in "abc"}, repeats=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert list(timings) == ["a", "b", "c"]
    assert {len(timing.samples) for timing in timings.values()} == {3}


def test_a_drifting_machine_does_not_move_the_ratio(monkeypatch):
    """The clock runs slower and slower; the one function does three times the work of the other."""
    now = [0.0]

    def work(units):
        for _ in range(units):
            now[0] += 1.0 + now[0] * 1e-3

    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    timings = interleaved({"slow": lambda: work(30), "fast": lambda: work(10)}, repeats=40)
    assert timings["slow"].samples[-1] > 2 * timings["slow"].samples[0]
    assert ratio(timings["slow"], timings["fast"]).median == pytest.approx(3.0, rel=0.01)


def test_ratios_are_paired_by_round():
    slow, fast = Timing(0, 0, 0, (2.0, 20.0, 200.0)), Timing(0, 0, 0, (1.0, 10.0, 100.0))
    assert ratio(slow, fast) == (2.0, 2.0, 2.0, (2.0, 2.0, 2.0))
    with pytest.raises(InvalidInputError, match="3 and 2 rounds"):
        ratio(slow, Timing(0, 0, 0, (1.0, 1.0)))


@pytest.mark.parametrize("options", [{"fns": {}}, {"fns": {"a": int}, "repeats": 0}, {"fns": {"a": int}, "warmup": -1}])
def test_timing_nothing_is_refused(options):
    with pytest.raises(InvalidInputError, match="cannot time"):
        interleaved(**options)


def measured_elsewhere(code):
    """The numbers that `code` prints in a fresh process."""
    code = f"from refine_control.metrics.cost import peak_memory\n{code}"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(number) for number in answer.stdout.split()]


def test_peak_memory_is_in_bytes_and_outlives_what_was_freed():
    before, held, freed = measured_elsewhere(
        "before = peak_memory(); block = b'x' * 200_000_000; held = peak_memory(); del block\n"
        "print(before, held, peak_memory('cpu'))"
    )
    assert 1e6 < before < 150e6
    assert held - before == pytest.approx(200e6, rel=0.05)
    assert freed == pytest.approx(held, rel=0.01)


def test_a_new_process_starts_its_own_peak():
    block = b"x" * 300_000_000
    (peak,) = measured_elsewhere("print(peak_memory())")
    assert len(block) == 300_000_000
    assert peak < 150e6


def test_a_call_in_a_new_process_is_measured_and_its_errors_are_raised():
    seconds, peak = run_fresh(bytearray, 100_000_000)
    assert seconds > 0
    assert 100e6 < peak < 300e6
    with pytest.raises(ZeroDivisionError):
        run_fresh(divmod, 1, 0)
    with pytest.raises(MissingError, match="_exit died"):
        run_fresh(os._exit, 3)


def test_memory_of_other_devices():
    with pytest.raises(InvalidInputError, match="'tpu'"):
        peak_memory("tpu")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        tensor = torch.zeros(10_000_000, device="cuda")
        assert peak_memory("cuda") >= tensor.nbytes
    else:
        with pytest.raises(MissingError, match="no GPU"):
            peak_memory("cuda")


def test_a_peak_that_cannot_be_measured_is_said(caplog):
    assert peak_memory_fresh(divmod, 1, 0) == 0
    assert "peak memory is not measured: ZeroDivisionError" in caplog.text
