"""Prompt embeddings encoded on demand, the most recent ones cached."""

# B prompts, T tokens, D width

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

Encode = Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]]
"""B prompts -> prompt_embeds (B,T,D_text) and pooled_prompt_embeds (B,D_pooled), as `Backbone.encode_prompts`."""
REMEMBERED_BYTES = 2**30
"""About 195 prompts of SD3 in fp32."""


class PromptMemory:
    """`encode` for one prompt at a time, on the CPU, fp32.

    Alone, because the last digits of an embedding depend on what is encoded with it: this way they depend on neither
    the batch nor what is remembered, and a run that continues has the bytes of one that was never stopped."""

    def __init__(self, encode: Encode, limit: int = REMEMBERED_BYTES):
        self.encode, self.limit = encode, limit
        self.known: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self.bytes = 0

    def __call__(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B prompts -> prompt_embeds (B,T,D_text) and pooled_prompt_embeds (B,D_pooled)."""
        embeds, pooled = zip(*map(self._one, prompts), strict=True)
        return torch.cat(embeds), torch.cat(pooled)

    def _one(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        if prompt in self.known:
            self.known.move_to_end(prompt)
            return self.known[prompt]
        embeds, pooled = (part.detach().to("cpu", torch.float32) for part in self.encode([prompt]))
        self.known[prompt] = embeds, pooled
        self.bytes += embeds.nbytes + pooled.nbytes
        while self.bytes > self.limit and len(self.known) > 1:
            self.bytes -= sum(part.nbytes for part in self.known.popitem(last=False)[1])
        return embeds, pooled
