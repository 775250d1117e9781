"""Prompts as token ids without transformers, and the embeddings of several text encoders as SD3 joins them."""

# B batch, T text tokens, D width

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refine_control.errors import DamagedError, MissingError


class TextTokenizer:
    """A tokenizer.json whose truncation and padding are those of one text encoder."""

    is_fast = True

    def __init__(self, file: Path):
        """Raises MissingError without the library tokenizers, DamagedError for a file that it cannot read."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingError("tokenizers is not installed; run pip install tokenizers") from None
        try:
            self._padded, self._whole = (Tokenizer.from_file(str(file)) for _ in range(2))
            self.length: int = self._padded.padding["length"]
        except Exception as error:  # the library raises Exception itself
            raise DamagedError(f"{file} is no tokenizer with a padding length: {error}; export again") from None
        self._whole.no_padding()
        self._whole.no_truncation()

    def ids(self, prompts: Sequence[str]) -> np.ndarray:
        """B prompts -> (B,T) int64, cut and padded to `length` tokens."""
        return np.array([each.ids for each in self._padded.encode_batch(list(prompts))], np.int64)

    def __call__(self, prompt: str, return_offsets_mapping: bool = True) -> dict[str, Any]:
        """All tokens of a prompt, with the characters that each stands for, as `models.words.cut_text` reads them."""
        tokens = self._whole.encode(prompt)
        return {"input_ids": tokens.ids, "offset_mapping": tokens.offsets}


def join_embeddings(clips: Sequence[np.ndarray], t5: np.ndarray | None, length: int, width: int) -> np.ndarray:
    """prompt_embeds as `StableDiffusion3Pipeline.encode_prompt` joins them: (B,T,D) of each CLIP beside each other,
    widened by zeros to T5's (B,T,D), and T5's tokens after them; without T5 `length` zeros of `width`."""
    joined = np.concatenate(clips, axis=-1)
    if t5 is None:
        t5 = np.zeros((len(joined), length, width), joined.dtype)
    widened = np.pad(joined, [(0, 0), (0, 0), (0, t5.shape[-1] - joined.shape[-1])])
    return np.concatenate([widened, t5], axis=1)
