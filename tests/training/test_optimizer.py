"""Checkpoints of moments in 8 bits, and moments and means in the host's memory."""

import pytest
import torch

from refine_control.config import OptimizerConfig
from refine_control.training import optimizer
from refine_control.training.optimizer import MasterWeights, Trainable, new_moments


class Half:
    """One of two processes that have the halves of every tensor."""

    count = 2

    def __init__(self, number):
        self.number = number

    def sum(self, value):
        return value

    def take(self, whole):
        return whole.chunk(2)[self.number]


def moments_of(number=None, kind="adamw8bit", **options):
    """An optimizer of a matrix, a bias and a matrix of short rows, whole or one half."""
    generator = torch.Generator().manual_seed(0)
    whole = {n: torch.randn(shape, generator=generator) for n, shape in (("w", (8, 64)), ("b", (8,)), ("s", (8, 3)))}
    rows = None if number is None else Half(number)
    named = {n: torch.nn.Parameter(rows.take(t).clone() if rows else t) for n, t in whole.items()}
    return MasterWeights(Trainable(named, named, rows), OptimizerConfig(kind=kind), **options)


def update(master, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in master.named.values():
        grad = torch.randn((8, *parameter.shape[1:]), generator=generator)
        parameter.grad = master.rows.take(grad).clone() if master.rows else grad
    master.step(1e-2, step)


def test_a_checkpoint_of_moments_in_8_bits_is_exact():
    straight, first, resumed = moments_of(), moments_of(), moments_of()
    for step in range(4):
        update(straight, step)
    for step in range(2):
        update(first, step)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    assert saved["moment1/w"].dtype == saved["moment2/w"].dtype == torch.uint8
    assert saved["scale1/w"].shape == (8, 1)
    assert saved["moment1/b"].dtype == saved["moment1/s"].dtype == torch.float32, "no row is a block"
    resumed.load(saved, 2)
    halves = [moments_of(number) for number in range(2)]  # the same run goes on in two processes
    for half in halves:
        half.load(saved, 2)
    for step in range(2, 4):
        for master in (resumed, *halves):
            update(master, step)
    expected = straight.tensors()
    for name, tensor in resumed.tensors().items():
        assert torch.equal(tensor, expected[name]), name
        assert torch.equal(torch.cat([half.tensors()[name] for half in halves]), expected[name]), name


def test_moments_in_8_bits_take_a_byte_and_a_scale_for_each_block():
    first, second = new_moments(torch.zeros(16, 1536), "adamw8bit")
    assert first.codes.nbytes + first.scale.nbytes == 16 * 1536 + 4 * 16 * 6
    assert first.signed
    assert not second.signed


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize(("offload", "away"), [("mean", {"ema"}), ("moments", {"ema", "moment1", "moment2"})])
def test_what_waits_in_the_hosts_memory_is_brought_and_taken_back_to_the_same_bytes(monkeypatch, kind, offload, away):
    brought, seen = [], []

    def bring(tensor, _):
        """Another tensor, as on a GPU, though it is on the CPU too."""
        copied = optimizer._in_host_memory(tensor)
        brought.append(tensor)
        seen.append(copied)
        return copied

    monkeypatch.setattr(optimizer, "_bring", bring)
    straight, other = (moments_of(kind=kind, ema_decay=0.9, offload=each) for each in ("none", offload))
    for step in range(3):
        update(straight, step)
        update(other, step)
    expected, tensors = straight.tensors(), other.tensors()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    held = {name: {p.data_ptr() for p in map(codes, each)} for name, each in (("host", brought), ("device", seen))}
    names = {name.partition("/")[0] for name, tensor in tensors.items() if tensor.data_ptr() in held["host"]}
    assert names == away
    assert not held["device"] & {tensor.data_ptr() for tensor in tensors.values()}
    resumed = moments_of(kind=kind, ema_decay=0.9, offload=offload)
    resumed.load(tensors, 3)
    for master in (straight, resumed):
        update(master, 3)
    assert all(torch.equal(tensor, straight.tensors()[name]) for name, tensor in resumed.tensors().items())


def codes(tensor):
    return getattr(tensor, "codes", tensor)
