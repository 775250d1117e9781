"""Memory of painting with a student of SD3 in stock diffusers, by arithmetic: what fits devices of 8 to 24 GB."""

# B pictures, h w latents, T text tokens

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import torch

from refine_control.metrics.live_bytes import LiveBytes
from refine_control.models.backbone import decode_latents, predict_velocity
from refine_control.models.controlnet import build_student, control_residuals
from refine_control.models.quantised import quantise
from refine_control.models.skeleton import SD3, skeleton, text_tokens
from refine_control.study.tables import Table
from refine_control.training.memory import fused_attention

LAYERS, SIDES = 12, (512, 1024)
CARDS = 8, 12, 16, 24
"""GB."""
USED = 0.9
"""Of a card's memory; the rest is the driver's, and what the allocator loses."""


class _Parts(NamedTuple):
    """Bytes of weights in bf16 unless said otherwise."""

    painters: int
    """Transformer and student."""
    painters_int8: int
    vae: int
    clips: int
    t5: int


class _Work(NamedTuple):
    """Bytes alive beside the weights."""

    guided: int
    """Of a denoising step of two pictures."""
    plain: int
    decoding: int


def _tensors(modules: Iterable[Any]) -> Iterator[torch.Tensor]:
    return chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)


def _bytes(modules: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in _tensors(modules))


def _peak(fn: Callable[[], Any], *networks: Any) -> int:
    """Bytes that `fn` needs beside the weights of its networks."""
    live = LiveBytes()
    weights = live.hold("weights", _tensors(networks))
    with torch.no_grad(), fused_attention(), live:
        fn()
    return live.peak - weights


@cache
def _count() -> tuple[_Parts, dict[int, _Work]]:
    """Of SD3's published shapes, by the side of a picture."""
    backbone = skeleton(SD3, controlled=False)
    transformer, vae, bf16 = backbone.transformer, backbone.vae, torch.bfloat16
    with torch.device("meta"):
        student: Any = build_student(transformer, None, LAYERS, "transformer", 0)
    for module in (student, transformer, vae, *backbone.text_encoders):
        module.to(bf16)
    config, scale, painters = transformer.config, backbone.pipeline.vae_scale_factor, (transformer, student)

    def work(side: int) -> _Work:
        size = side // scale, side // scale

        def step(count: int) -> None:
            def new(*shape: int) -> torch.Tensor:
                return torch.empty(count, *shape, dtype=bf16, device="meta")

            given = new(16, *size), new(), new(text_tokens(backbone), config["joint_attention_dim"])
            pooled = new(config["pooled_projection_dim"])
            predict_velocity(transformer, *given, pooled, control_residuals(student, *given, new(17, *size), pooled))

        latents = torch.empty(1, 16, *size, dtype=bf16, device="meta")
        guided, plain = (_peak(partial(step, count), *painters) for count in (2, 1))
        return _Work(guided, plain, _peak(partial(decode_latents, vae, latents), vae))

    works, whole = {side: work(side) for side in SIDES}, _bytes(painters)
    for each in painters:
        quantise(each, "int8")
    *clips, t5 = backbone.text_encoders
    return _Parts(whole, _bytes(painters), _bytes([vae]), _bytes(clips), _bytes([t5])), works


def small_devices_table() -> Table:
    """Weights and peak on the device for each way of loading, and the smallest card that holds it."""
    parts, works = _count()
    bf16, int8 = ("bf16", parts.painters), ("int8", parts.painters_int8)
    ways = [
        (*bf16, True, False),
        (*bf16, False, False),
        (*bf16, False, True),
        (*int8, False, False),
        (*int8, False, True),
    ]
    rows = []
    for kind, painters, t5, offload in ways:
        encoders = parts.clips + t5 * parts.t5
        cells = [f"{kind}, {'with' if t5 else 'no'} T5, {'networks by turns' if offload else 'all on the device'}"]
        for side, guided in ((side, guided) for side in SIDES for guided in (True, False)):
            step, decoding = works[side].guided if guided else works[side].plain, works[side].decoding
            together = painters + parts.vae + encoders + max(step, decoding)
            turns = max(encoders, painters + step, parts.vae + decoding)
            peak = (turns if offload else together) / 1e9
            card = next((f"{card} GB" for card in CARDS if peak <= USED * card), "more")
            cells.append(f"{peak:.1f} ({card})")
        rows.append(cells)
    columns = [f"{side} px, {way}" for side in SIDES for way in ("guided", "1 to 4 steps")]
    sizes = ", ".join(f"{name.replace('_', ' in ')} {size / 1e9:.2f}" for name, size in parts._asdict().items())
    cards = ", ".join(str(card) for card in CARDS)
    notes = [
        f"GB at the peak, and the smallest card of {cards} GB of which it takes at most {USED:.0%}. Weights in GB, "
        f"bf16 where nothing is said: {sizes}."
    ]
    return Table("Painting with a student on small devices", ["transformer and student", *columns], rows, notes)
