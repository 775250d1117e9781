"""Examples of the page: rendered scenes with prompts that the mini model knows."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from refine_control.app.views import view
from refine_control.miniature.scenes import render

PROMPTS = ("a red star", "a blue circle", "a yellow square", "a white ring")
_SEED = 11


class Example(NamedTuple):
    """A scene in a file, and what is painted over."""

    file: Path
    mask: np.ndarray
    """(h, w) bool, of the view."""
    prompt: str


def write_examples(folder: Path) -> list[Example]:
    """Renders a scene for each of PROMPTS into `folder`."""
    scenes, examples = render(_SEED, 0, len(PROMPTS)), []
    for number, prompt in enumerate(PROMPTS):
        file = folder / f"example-{number}.png"
        Image.fromarray(scenes.images[number].numpy()).save(file)
        mask = np.asarray(view(Image.fromarray(scenes.masks[number].numpy())))[..., 0] > 127
        examples.append(Example(file, mask, prompt))
    return examples
