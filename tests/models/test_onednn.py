"""A linear layer is the same by oneDNN and by torch, with its gradients, in every layout."""

import pytest
import torch

from refine_control.models import onednn
from refine_control.models.onednn import linear


def answers(x, weight, bias, gelu):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = linear(*leaves, *([None] if bias is None else []), gelu=gelu)
    out[:, ::2].transpose(0, 1).sum().backward()  # a gradient that is neither dense nor contiguous
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "transposed"])
def test_onednn_and_torch_agree(monkeypatch, gelu, with_bias, contiguous):
    torch.manual_seed(0)
    x = 2 * (torch.randn(3, 7, 32) if contiguous else torch.randn(7, 3, 32).transpose(0, 1))
    weight, bias = torch.randn(48, 32), torch.randn(48) if with_bias else None
    fast = answers(x, weight, bias, gelu)
    monkeypatch.setattr(onednn, "_computes", lambda _: False)
    plain = answers(x, weight, bias, gelu)
    assert len(fast) == len(plain) == 3 + with_bias
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_wanted_gradients_are_made():
    x, weight, bias = torch.randn(2, 5, 8, requires_grad=True), torch.randn(4, 8), torch.randn(4)
    linear(x, weight, bias).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert bias.grad is None


def test_a_type_that_onednn_does_not_know_goes_to_torch():
    x, weight, bias = torch.randn(2, 5, 8).double(), torch.randn(4, 8).double(), torch.randn(4).double()
    assert not onednn._computes(x)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
