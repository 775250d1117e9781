"""Checkpoints of moments in 8 bits."""

import torch

from refine_control.config import OptimizerConfig
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


def moments_of(number=None):
    """An optimizer of a matrix, a bias and a matrix of short rows, whole or one half."""
    generator = torch.Generator().manual_seed(0)
    whole = {n: torch.randn(shape, generator=generator) for n, shape in (("w", (8, 64)), ("b", (8,)), ("s", (8, 3)))}
    rows = None if number is None else Half(number)
    named = {n: torch.nn.Parameter(rows.take(t).clone() if rows else t) for n, t in whole.items()}
    return MasterWeights(Trainable(named, named, rows), OptimizerConfig(kind="adamw8bit"))


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
