"""Bytes alive, by name, of tensors with and without data."""

import pytest
import torch

from refine_control.metrics.cost import count_flops
from refine_control.metrics.live_bytes import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_storage_counts_once_until_it_is_let_go(device):
    live, weight = LiveBytes(device), torch.ones(10, device=device)
    assert live.hold("weights", [weight, weight[:3]]) == 40
    with live:
        with live.named("work"):
            doubled = weight * 2
            again = weight * 2
            view = doubled.view(2, 5)
        assert (live.alive["work"], live.total) == (80, 120)
        del doubled, again
        assert live.total == 80  # of the view
        del view
    assert (live.total, live.peak, live.at_peak["work"]) == (40, 120, 80)


def test_operations_are_those_of_the_counter():
    def work():
        torch.autograd.backward((layer(torch.ones(4, 7, device="meta")) ** 2).sum())

    layer, live = torch.nn.Linear(7, 5, device="meta"), LiveBytes()
    with live:
        work()
    assert live.flops == count_flops(work) > 0
