"""SD3's transformers and ControlNets as plain functions over packed weights, to paint fast on a CPU.

At the width of the miniature a block's arithmetic takes less time than calling its modules. Here a block is some 25
operators instead of 60: one product for query, key and value, one for the modulations of all blocks, additions fused
with products, and nothing for outputs that nobody reads (the text stream of a ControlNet's last block). The weights
are the module's, rearranged once. Results equal the module's up to rounding, which the bits of finished rows would not
survive: only callers that ask for it by `pack` get it. Measure with `refine-control bench sampling`.
"""

# B batch, h w latents, N image tokens, M text tokens, T = N + M, D width, H heads, L layers

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention import JointTransformerBlock
from torch import nn
from torch.nn import functional

from refine_control.models.cpu_kernels import linear as onednn_linear
from refine_control.models.devices import first_weight

_EPS = 1e-6
_MANY_ROWS = 256
"""From so many rows on oneDNN's product with a fused GELU is faster than torch's two operators."""
_ZERO, _CONTINUOUS = (False, True, False, False, True, False), (True, False)
"""Which chunks of AdaLayerNormZero and of AdaLayerNormContinuous are scales."""


class _Linear(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """Then tanh GELU."""
        if x.shape[0] * x.shape[1] >= _MANY_ROWS:
            return onednn_linear(x, self.weight, self.bias, gelu=True)
        return functional.gelu(self(x), approximate="tanh")


def _joined(*layers: Any) -> _Linear:
    """Several layers of one input as one."""
    weights, biases = ([getattr(layer, name).detach() for layer in layers] for name in ("weight", "bias"))
    return _Linear(torch.cat(weights), torch.cat(biases)) if len(layers) > 1 else _Linear(weights[0], biases[0])


def _scales_plus_one(layer: Any, scales: Sequence[bool]) -> Any:
    """A modulation's layer that answers 1 + scale where the module answers scale."""
    ones = torch.tensor(scales).repeat_interleave(len(layer.bias) // len(scales)).to(layer.bias)
    return _Linear(layer.weight.detach(), layer.bias.detach() + ones)


class _Stream(NamedTuple):
    """What one of the two streams of a block multiplies with; `after` is None where nobody reads its output."""

    qkv: _Linear
    after: tuple[_Linear, _Linear, _Linear] | None
    """Output projection, and both layers of the feed-forward."""

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor, modulation: Sequence[torch.Tensor]) -> torch.Tensor:
        """The stream (B,N,D) after attention and feed-forward, or as it was."""
        if self.after is None:
            return hidden
        (out, into, out_of), (gate, shift, scale, gate_mlp) = self.after, modulation
        hidden = torch.addcmul(hidden, gate, out(attended))
        return torch.addcmul(hidden, gate_mlp, out_of(into.gelu(_modulated(hidden, shift, scale))))


def _modulated(hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm(hidden) scale + shift, `scale` with its 1: (B,N,D), (B,1,D) twice -> (B,N,D)."""
    return torch.addcmul(shift, functional.layer_norm(hidden, hidden.shape[-1:], eps=_EPS), scale)


def _attend(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) v: (B,T,3D) -> (B,T,D); the softmax in fp32."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)  # (BH,T,d) each
    scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
    probabilities = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(probabilities, value).unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


class _Block(NamedTuple):
    image: _Stream
    text: _Stream
    heads: int
    num_text: int
    """Modulations of the text stream: 6, or 2 in the transformer's last block."""


def _pack_block(block: Any, text_is_read: bool) -> _Block:
    attn = block.attn
    image = (_joined(attn.to_out[0]), _joined(block.ff.net[0].proj), _joined(block.ff.net[2]))
    text = None
    if text_is_read and not block.context_pre_only:
        text = (_joined(attn.to_add_out), _joined(block.ff_context.net[0].proj), _joined(block.ff_context.net[2]))
    return _Block(
        _Stream(_joined(attn.to_q, attn.to_k, attn.to_v), image),
        _Stream(_joined(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), text),
        attn.heads,
        len(_CONTINUOUS if block.context_pre_only else _ZERO),
    )


class Packed:
    """The packed weights of one frozen network; `refresh` packs again what was loaded or cast since."""

    def __init__(self, network: Any):
        self.network, self._mark = network, ()
        self.refresh()

    def refresh(self) -> None:
        """Does nothing while the network's weights are those that were packed."""
        first = self.network.pos_embed.proj.weight
        mark = (first.data_ptr(), first.dtype, first._version)
        if mark == self._mark:
            return
        network, self._mark = self.network, mark
        is_transformer = hasattr(network, "proj_out")
        blocks, modulations = list(network.transformer_blocks), []
        for block in blocks:
            scales = _CONTINUOUS if block.context_pre_only else _ZERO
            modulations.append(_scales_plus_one(block.norm1.linear, _ZERO))
            modulations.append(_scales_plus_one(block.norm1_context.linear, scales))
        modulations += [_scales_plus_one(network.norm_out.linear, _CONTINUOUS)] if is_transformer else []
        self._modulation = _joined(*modulations)
        self._blocks = [_pack_block(block, block is not blocks[-1]) for block in blocks]
        self._width = blocks[0].attn.to_q.in_features

    def _run(
        self,
        hidden: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
        timestep: torch.Tensor,
        residuals: Sequence[torch.Tensor] = (),
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """What each block leaves in the image stream, residuals added, L of (B,N,D); and the modulations left over."""
        network = self.network
        temb, text = network.time_text_embed(timestep, pooled), network.context_embedder(prompt_embeds)
        rest = self._modulation(functional.silu(temb)).unflatten(1, (-1, 1, self._width)).unbind(1)
        hidden, out, count = hidden.contiguous(), [], hidden.shape[1]
        for number, block in enumerate(self._blocks):
            (shift, scale, *of_image), rest = rest[:6], rest[6:]
            of_text, rest = rest[: block.num_text], rest[block.num_text :]
            text_shift, text_scale = of_text[:2] if block.num_text == len(_ZERO) else of_text[::-1]
            streams = (
                block.image.qkv(_modulated(hidden, shift, scale)),
                block.text.qkv(_modulated(text, text_shift, text_scale)),
            )
            attended = _attend(torch.cat(streams, 1), block.heads)
            hidden = block.image.finish(hidden, attended[:, :count], of_image)
            text = block.text.finish(text, attended[:, count:], of_text[2:])
            if number < len(residuals):
                hidden = hidden + residuals[number]
            out.append(hidden)
        return out, rest


class PackedTransformer(Packed):
    """Called as `models.backbone.predict_velocity` calls the module."""

    def __call__(
        self,
        *,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        block_controlnet_hidden_states: Sequence[torch.Tensor] | None,
        return_dict: bool,
    ) -> tuple[torch.Tensor]:
        """(B,16,h,w) in the network's type; residuals (B,N,D), one for each block that takes one."""
        network, patch = self.network, self.network.config["patch_size"]
        tokens, given = network.pos_embed(hidden_states), (encoder_hidden_states, pooled_projections, timestep)
        takers = sum(not block.context_pre_only for block in network.transformer_blocks)
        outputs, (scale, shift) = self._run(tokens, *given, (block_controlnet_hidden_states or ())[:takers])
        tokens = network.proj_out(_modulated(outputs[-1], shift, scale))
        height, width = (size // patch for size in hidden_states.shape[-2:])
        pixels = tokens.reshape(len(tokens), height, width, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return (pixels.reshape(len(tokens), -1, height * patch, width * patch),)


class PackedControlNet(Packed):
    """Called as `models.controlnet.control_residuals` calls the module."""

    def __call__(
        self,
        *,
        hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        return_dict: bool,
    ) -> tuple[list[torch.Tensor]]:
        """The L residuals (B,N,D), scaled."""
        network = self.network
        tokens = network.pos_embed(hidden_states) + network.pos_embed_input(controlnet_cond)
        outputs, _ = self._run(tokens, encoder_hidden_states, pooled_projections, timestep)
        residuals = [layer(hidden) for layer, hidden in zip(network.controlnet_blocks, outputs, strict=True)]
        return ([each * conditioning_scale for each in residuals] if conditioning_scale != 1 else residuals,)


def _can_be_packed(network: Any) -> bool:
    blocks = getattr(network, "transformer_blocks", None) or ()
    adapted = any(
        hasattr(part, "base_layer") for part in network.modules()
    )  # LoRA, whose layers show the base's weight
    return (
        bool(blocks)
        and not adapted
        and all(
            isinstance(b, JointTransformerBlock) and not b.use_dual_attention and b.attn.norm_q is None for b in blocks
        )
    )


def pack(*networks: nn.Module) -> None:
    """From now on `predict_velocity` and `control_residuals` run these SD3 networks packed where no gradient is asked
    for, and VAEs keep the channels of a pixel together, as oneDNN's convolutions like them.

    Networks with dual attention, query norms, LoRA or other blocks, and those on a GPU, run as they are."""
    for network in networks:
        if isinstance(network, AutoencoderKL) and first_weight(network).device.type == "cpu":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif _can_be_packed(network):
            kind = PackedTransformer if hasattr(network, "proj_out") else PackedControlNet
            network.packed = kind(network)  # type: ignore[assignment]


def packed(network: Any) -> Any:
    """The packed form of a network that `pack` was called for and that runs on the CPU; else None."""
    form = getattr(network, "packed", None)
    if form is None or torch.is_grad_enabled() or first_weight(network).device.type != "cpu":
        return None
    form.refresh()
    return form
