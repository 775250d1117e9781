"""The closed vocabulary of the scenes: colours, shapes, backgrounds and the prompts that name them."""

from __future__ import annotations

from collections.abc import Sequence

# name -> sRGB; far enough apart that shading (0.75 to 1.15 times) does not confuse them
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 40),
    "orange": (248, 140, 24),
    "yellow": (245, 224, 40),
    "green": (44, 160, 50),
    "cyan": (40, 208, 218),
    "blue": (36, 74, 214),
    "purple": (138, 52, 168),
    "white": (246, 246, 246),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "ring", "cross", "star")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (128, 128, 128),
    "brown": (116, 80, 52),
    "black": (34, 34, 38),
    "tan": (196, 172, 132),
}
WORDS: tuple[str, ...] = (",", "a", "an", "and", "on", "background", *COLOURS, *SHAPES, *BACKGROUNDS)
"""Every word of the scenes' prompts."""
MAX_TOKENS = 18
"""The longest prompt with start and end token: three objects on a background are 14 words and a comma."""


def local_prompt(colour: int, shape: int) -> str:
    """`a red circle`, `an orange star`: indices into COLOURS and SHAPES."""
    name = list(COLOURS)[colour]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} {SHAPES[shape]}"


def global_prompt(objects: Sequence[tuple[int, int]], background: int) -> str:
    """`a red circle, a blue ring and a green star on a gray background`."""
    names = [local_prompt(*each) for each in objects]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} on a {list(BACKGROUNDS)[background]} background"
