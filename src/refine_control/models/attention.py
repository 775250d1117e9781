"""Joint attention as two plain matrix products, for processors whose fused kernel is slow in bf16.

On CPU the backward of torch's fused attention takes longer in bf16 than all other operations of a
small SD3 block together; two batched products and an fp32 softmax take a fifth of it
(`refine-control bench attention`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


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
        count, heads = hidden_states.shape[1], attn.heads

        def split(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return torch.cat([image, text], 1).unflatten(-1, (heads, -1)).transpose(1, 2)

        query = split(attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states))
        key = split(attn.to_k(hidden_states), attn.add_k_proj(encoder_hidden_states))
        value = split(attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states))
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        joined = (scores.float().softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        image = attn.to_out[1](attn.to_out[0](joined[:, :count]))
        text = joined[:, count:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def use_plain_attention(*modules: torch.nn.Module) -> None:
    """Sets `PlainJointAttention` on every joint attention of the given transformers and ControlNets."""
    from diffusers.models.attention_processor import Attention

    for module in modules:
        for part in module.modules():
            if isinstance(part, Attention):
                part.set_processor(PlainJointAttention())
