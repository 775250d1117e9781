"""The plain processor has the results and the gradients of diffusers' own."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0

from refine_control.miniature.networks import build_controlnet
from refine_control.models.attention import PlainJointAttention, use_plain_attention


def answers(attention, image, text):
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    attention.zero_grad()
    outputs = [o for o in attention(hidden_states=leaves[0], encoder_hidden_states=leaves[1]) if o is not None]
    generator = torch.Generator().manual_seed(2)
    sum((o * torch.randn(o.shape, generator=generator)).sum() for o in outputs).backward()
    grads = [*(leaf.grad for leaf in leaves), *(p.grad for p in attention.parameters() if p.grad is not None)]
    return [o.detach() for o in outputs], [g.clone() for g in grads]


@pytest.mark.parametrize("block", [0, 23], ids=["inner", "context_pre_only"])
def test_outputs_and_gradients_are_those_of_diffusers(tiny_backbone, block):
    attention = copy.deepcopy(tiny_backbone.transformer.transformer_blocks[block].attn).requires_grad_(True)
    assert attention.context_pre_only == (block == 23)
    generator = torch.Generator().manual_seed(1)
    image, text = (3 * torch.randn(2, n, 32, generator=generator) for n in (64, 18))
    found = {}
    for name, processor in (("stock", JointAttnProcessor2_0()), ("plain", PlainJointAttention())):
        attention.set_processor(processor)
        found[name] = answers(attention, image, text)
    for stock, plain in zip(found["stock"], found["plain"], strict=True):
        assert len(stock) == len(plain) >= 2
        for a, b in zip(stock, plain, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * max(1.0, a.abs().max().item()))


def test_every_attention_of_a_network_is_set():
    controlnet = build_controlnet(3)
    use_plain_attention(controlnet)
    assert [type(b.attn.processor) for b in controlnet.transformer_blocks] == [PlainJointAttention] * 3


def test_a_mask_or_single_stream_is_refused(tiny_backbone):
    attention = tiny_backbone.transformer.transformer_blocks[0].attn
    with pytest.raises(ValueError, match="joint blocks"):
        PlainJointAttention()(attention, torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="joint blocks"):
        PlainJointAttention()(attention, torch.zeros(1, 4, 32), torch.zeros(1, 4, 32), torch.ones(1, 4))
