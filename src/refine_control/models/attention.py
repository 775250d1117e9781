"""Joint attention in few and plain operators, for processors whose fused attention is slow in bf16.

On CPU the backward of torch's fused attention takes longer in bf16 than all other operations of a small SD3 block
together; batched products and an fp32 softmax take a fifth of it. One product makes query, key and value of a
stream, and one copy brings both streams into the layout of the heads (`refine-control bench step`).
"""

# B batch, N image tokens, M text tokens, T = N + M, D width, H heads

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from refine_control.models.onednn import linear

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class _JointAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v over both streams: (B,N,3D), (B,M,3D), H -> (B,N,D), (B,M,D).

    Keeps one set of probabilities in the type of the inputs for the backward; the softmax itself is fp32."""

    @staticmethod
    def forward(ctx: Any, image: torch.Tensor, text: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        streams = [stream.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4) for stream in (image, text)]
        query, key, value = torch.cat(streams, 3).flatten(1, 2)  # (BH,T,d) each
        scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
        probabilities = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.heads, ctx.count = heads, image.shape[1]
        joined = torch.bmm(probabilities, value).unflatten(0, (-1, heads)).transpose(1, 2)  # (B,T,H,d)
        return joined[:, : ctx.count].flatten(2), joined[:, ctx.count :].flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        query, key, value, probabilities = ctx.saved_tensors
        streams = [grad.unflatten(-1, (ctx.heads, -1)).transpose(1, 2) for grad in grads]
        grad = torch.cat(streams, 2).flatten(0, 1)
        grad_scores = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, probabilities.dtype)
        scale = query.shape[-1] ** -0.5
        parts = [
            torch.bmm(grad_scores, key * scale),
            torch.bmm(grad_scores.transpose(1, 2), query * scale),
            torch.bmm(probabilities.transpose(1, 2), grad),
        ]
        parts = [part.unflatten(0, (-1, ctx.heads)).transpose(1, 2) for part in parts]  # (B,T,H,d) each
        image = torch.stack([part[:, : ctx.count] for part in parts], 2).flatten(2)
        return image, torch.stack([part[:, ctx.count :] for part in parts], 2).flatten(2), None


def _fused_linear(hidden_states: torch.Tensor, layers: Sequence[nn.Linear]) -> torch.Tensor:
    """Several linear layers of one input in one product: (B,N,D) -> (B,N,len(layers) D)."""
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    return linear(hidden_states, weight, bias)


class PlainJointAttention:
    """A diffusers attention processor with the results of `JointAttnProcessor2_0` (no mask, no query norm).

    hidden_states (B,N,D) and encoder_hidden_states (B,M,D) -> the same shapes."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if attention_mask is not None or attn.norm_q is not None or encoder_hidden_states is None:
            raise ValueError("PlainJointAttention serves SD3's joint blocks without query norms or masks")
        own: Any = attn  # diffusers leaves the types of its projections open
        image = _fused_linear(hidden_states, (own.to_q, own.to_k, own.to_v))
        text = _fused_linear(encoder_hidden_states, (own.add_q_proj, own.add_k_proj, own.add_v_proj))
        image, text = _JointAttention.apply(image, text, attn.heads)
        return own.to_out[1](own.to_out[0](image)), text if attn.context_pre_only else own.to_add_out(text)


def use_plain_attention(*modules: nn.Module) -> None:
    """Sets `PlainJointAttention` on every joint attention of the given transformers and ControlNets."""
    from diffusers.models.attention_processor import Attention

    for module in modules:
        for part in module.modules():
            if isinstance(part, Attention):
                part.set_processor(PlainJointAttention())  # type: ignore[arg-type]
