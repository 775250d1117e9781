"""Prompts by a vision-language model: what it is shown and asked, how its answer is read, and when it is doubtful.

The same questions go to Qwen2.5-VL in this process (`annotation.describer`) and to a server
(`annotation.vlm_server`): both answer requests and know nothing about prompts. The question about a region shows the
whole photo with the outline of the region drawn in, and a crop around the region without the outline; the answer is
JSON with one field. If an answer has a problem (see `problems`), the question is repeated once with the problem named.
If a problem remains, the prompt is kept with it, and a person decides in the review.
"""

# H W pixels of the photo, h w pixels of a picture shown to the model

from __future__ import annotations

import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageFilter

from refine_control.annotation.masks import box_of
from refine_control.annotation.refusals import Unanswered
from refine_control.errors import InvalidInputError
from refine_control.records import Request, one_line

TEMPLATE_VERSION = "1"
"""Raised when the same region no longer leads to the same question; part of every prompt's source."""
MAX_SIDE = 768
"""Longest side of a picture shown: 28 x 28 pixels are one token of Qwen2.5-VL, so about 560 for a photo."""
MIN_SIDE = 28
"""Shortest side of a picture shown, whatever that does to the shape of a strip: less than this is not one token."""
MIN_CROP = 224
"""A crop whose longest side is less is enlarged to this."""
CROP_MARGIN = 0.25
"""Surroundings in the crop on each side, as a share of the region's longer side."""
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255)}
"""Of the outline; the one least like the photo along the outline is taken."""
ANSWER_SCHEMA = {
    "type": "object",
    "properties": {"prompt": {"type": "string"}},
    "required": ["prompt"],
    "additionalProperties": False,
}
"""JSON schema of an answer, for engines that can be held to one."""
LOCAL_QUESTION = (
    "The first picture is a photo with a thin {colour} line drawn around one part of it. The second picture shows that "
    "part from near, without the line. Describe what is inside the line, and only that: name the thing or the piece of "
    "landscape, with its colour, material, pose or kind where they can be seen. Write one English noun phrase of 3 to "
    'about 12 words that begins in lower case, like "a small brown dog lying on its side". Do not mention the line, '
    'the pictures, or what is around the part. Answer with JSON alone: {{"prompt": "..."}}'
)
GLOBAL_QUESTION = (
    "Describe this photo in one English sentence of 8 to about 25 words: the main things, what they look like or do, "
    'and where they are. Do not begin with words like "the photo shows". Answer with JSON alone: {"prompt": "..."}'
)
WORDS = {False: (2, 20), True: (4, 50)}
"""Fewest and most words of a prompt, by whether it is of the whole photo."""
_READ = 20_000
"""Characters of an answer that are read; of the braces in them the last so many are tried."""
_TRIED = 64
_KEPT = 1000
"""Characters of a prompt; many times what WORDS allows."""


class Answerer(Protocol):
    """A vision-language model."""

    @property
    def name(self) -> str:
        """Model and revision."""
        ...

    def answer(self, requests: Sequence[Request]) -> list[str | Unanswered]:
        """The model's text for each request, in their order; Unanswered where it refuses one or fails on it."""
        ...


class Described(NamedTuple):
    """A prompt, and how far to trust it."""

    prompt: str
    problems: tuple[str, ...]
    """Codes, see `problems`; empty when nothing is wrong."""
    attempts: int
    """How often the model was asked."""
    source: str
    """Model, revision and template."""


# What the model sees


def _fit(picture: Image.Image, longest: float) -> Image.Image:
    """The picture with its longest side at `longest` pixels and no side under MIN_SIDE."""
    scale = longest / max(picture.size)
    size = (max(MIN_SIDE, round(picture.width * scale)), max(MIN_SIDE, round(picture.height * scale)))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def _scaled(mask: np.ndarray, length: int, axis: int) -> np.ndarray:
    """The mask with another length of one axis; where it shrinks, no pixel of the region is lost."""
    first = np.arange(length) * mask.shape[axis] // length
    return np.logical_or.reduceat(mask, first, axis) if length <= mask.shape[axis] else mask.take(first, axis)


def draw_outline(image: np.ndarray, mask: np.ndarray, max_side: int = MAX_SIDE) -> tuple[np.ndarray, str]:
    """(H, W, 3) uint8 and (H, W) bool -> the photo (h, w, 3) with a line around the region, and the line's colour.

    The line lies outside of the region, so none of it is covered, and may be cut by the photo's edge."""
    picture = _fit(Image.fromarray(image), min(max_side, max(image.shape[:2])))
    region = _scaled(_scaled(mask, picture.height, axis=0), picture.width, axis=1)
    thickness = max(2, round(max(picture.size) / 256))
    grown = Image.fromarray(region).convert("L").filter(ImageFilter.MaxFilter(2 * thickness + 1))
    line = (np.asarray(grown) > 0) & ~region
    shown = np.array(picture)
    under = shown[line].astype(np.float32)
    distances = [np.linalg.norm(under - colour, axis=1).mean() if len(under) else 0.0 for colour in COLOURS.values()]
    name = list(COLOURS)[int(np.argmax(distances))]
    shown[line] = COLOURS[name]
    return shown, name


def crop_around(image: np.ndarray, mask: np.ndarray, max_side: int = MAX_SIDE) -> np.ndarray:
    """(H, W, 3) uint8 and (H, W) bool -> (h, w, 3): the region with a margin on each side, as far as the photo goes."""
    y0, x0, y1, x1 = box_of(mask)
    margin = math.ceil(CROP_MARGIN * max(y1 - y0, x1 - x0))
    part = Image.fromarray(image[max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin])
    return np.asarray(_fit(part, min(max_side, max(MIN_CROP, *part.size))))


def local_request(image: np.ndarray, mask: np.ndarray, max_side: int = MAX_SIDE) -> Request:
    """(H, W, 3) uint8 and (H, W) bool with at least one pixel -> what fills the region?"""
    if mask.shape != image.shape[:2] or not mask.any():
        raise InvalidInputError(f"a mask is (H, W) with at least one pixel, not {mask.shape} for a photo {image.shape}")
    outlined, colour = draw_outline(image, mask, max_side)
    return Request((outlined, crop_around(image, mask, max_side)), LOCAL_QUESTION.format(colour=colour))


def global_request(image: np.ndarray, max_side: int = MAX_SIDE) -> Request:
    """(H, W, 3) uint8 -> what does the photo show?"""
    whole = _fit(Image.fromarray(image), min(max_side, max(image.shape[:2])))
    return Request((np.asarray(whole),), GLOBAL_QUESTION, whole=True)


# What the model says


def parse(answer: str) -> str:
    """The prompt of an answer: that of the last JSON object with one, whatever is around it; without one, its words.

    One line, without quotes around it, a full stop at its end, or a capital in its first article. Any text is read."""
    words = _from_json(answer)
    return _tidy(_loose(answer) if words is None else words)


def _from_json(answer: str) -> str | None:
    """The text under "prompt" in the last JSON object that has it; None without one."""
    answer, decoder = answer[:_READ], json.JSONDecoder()
    for brace in [place.start() for place in re.finditer(r"\{", answer)][: -_TRIED - 1 : -1]:
        try:
            value, _ = decoder.raw_decode(answer, brace)
        except (ValueError, RecursionError):
            continue
        if isinstance(value.get("prompt"), str):
            return value["prompt"]
    return None


def _loose(answer: str) -> str:
    """The words of an answer that is not JSON: where an object was cut off, what follows "prompt"; else all of them."""
    answer = answer[:_READ]
    cut = re.search(r"""["']prompt["']\s*:\s*["'](.*)""", answer, re.DOTALL)
    return cut[1].rstrip(" \n\t`}\"'") if cut else re.sub(r"```(?:json)?", " ", answer)


def _tidy(words: str) -> str:
    words = one_line(words)[:_KEPT].strip()
    for pair in ('""', "''", "“”", "``"):
        if len(words) > 1 and words[0] == pair[0] and words[-1] == pair[1]:
            words = words[1:-1].strip()
    words = words if words.endswith("..") else words.removesuffix(".").rstrip()
    return re.sub(r"^(A|An|The) ", lambda article: article[0].lower(), words)


# Whether that is a prompt

_MASK = re.compile(
    r"\b(masked|(the|this|binary) mask|mask(ed)? (area|region)|outlin(e|es|ed|ing)|contour(s|ed)?|regions?|highlighted"
    r"|selected|encircled|circled|cropped|bounding box|segmentation|(marked|indicated|specified|given) (part|area)"
    r"|(the|this|first|second|whole) (images?|pictures?|photos?|photograph|crop|area|part)"
    r"|(image|picture|photo|photograph) (shows|showing|depicts|contains|features|is)"
    rf"|(inside|within|around) the line|({'|'.join(COLOURS)}) line)\b"
    r"|^(an? |the )?(image|picture|photo|photograph|close-?up|shot|view) of\b",
    re.IGNORECASE,
)
_REST = re.compile(
    r"\b(in front of|next to|beside|adjacent to|alongside|in the (background|foreground|distance)|background"
    r"|foreground|backdrop|surrounded by|surroundings?|the rest of|overlooking|(on|to|at) the (left|right)"
    r"|(left|right)(-hand)? side|behind (an?|the|it|him|her|them|some)|in between|between (an?|the|two)"
    r"|near (an?|the|some)|close to|(above|below|beneath|underneath|under) (an?|the)|against an? [\w -]{0,40}\bsky)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_NAMED = {
    "not_json": 'it was not JSON of the form {"prompt": "..."}',
    "empty": "it had no words",
    "too_short": "it had too few words",
    "too_long": "it had too many words",
    "not_english": "it was not in English",
    "talks_about_mask": "it spoke of the line, the region or the picture instead of what is there",
    "talks_about_rest": "it spoke of what is around the part",
    "repeats": "it repeated itself",
}
"""Every code with the words that tell a model about it."""


def problems(prompt: str, whole: bool = False) -> list[str]:
    """What makes a prompt doubtful, as codes in a fixed order; `whole`: it describes the whole photo.

    empty: no letter and no digit. too_short, too_long: words outside WORDS. not_english: a letter of another script
    than Latin, or one letter in five outside a-z; other languages in Latin letters pass. talks_about_mask: names the
    mask, its outline or the picture. talks_about_rest: names what lies around the region (not asked of the whole
    photo). repeats: a word twice running, four words in a row twice, or a long word three times. not_json: braces or
    code fences are left of an answer that could not be read."""
    words = [word.lower() for word in _WORD.findall(prompt)]
    if not words:
        return ["empty"]
    fewest, most = WORDS[whole]
    checks = {
        "not_json": bool(re.search(r"[{}]|```", prompt)),
        "too_short": len(words) < fewest,
        "too_long": len(words) > most,
        "not_english": _is_foreign(prompt),
        "talks_about_mask": bool(_MASK.search(prompt)),
        "talks_about_rest": not whole and bool(_REST.search(prompt)),
        "repeats": _repeats(words),
    }
    return [code for code, is_so in checks.items() if is_so]


def _is_foreign(prompt: str) -> bool:
    letters = [sign for sign in prompt if sign.isalpha()]
    if not all(unicodedata.name(sign, "").startswith("LATIN") for sign in letters):
        return True
    return sum(not sign.isascii() for sign in letters) * 5 > len(letters)


def _repeats(words: Sequence[str]) -> bool:
    twice = any(one == other for one, other in itertools.pairwise(words))
    fours = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    long = Counter(word for word in words if len(word) > 3)
    return twice or max(fours.values(), default=0) > 1 or max(long.values(), default=0) > 2


# Question and answer


def _read(answer: str, request: Request, attempts: int, source: str) -> Described:
    """The prompt of an answer, and its problems."""
    prompt = parse(answer)
    unread = ["not_json"] if _from_json(answer) is None else []
    return Described(prompt, tuple(dict.fromkeys(unread + problems(prompt, request.whole))), attempts, source)


def _again(request: Request, codes: Sequence[str]) -> Request:
    """The question once more, with what was wrong with its answer."""
    named = " and ".join(_NAMED[code] for code in codes)
    return replace(request, text=f"{request.text}\nYour last answer was not accepted: {named}. Answer again.")


def describe_many(engine: Answerer, requests: Sequence[Request]) -> list[Described | Unanswered]:
    """Asks for all prompts at once, and a second time for those with a fault.

    The second answer is taken, unless it is refused, or is empty or has more faults than the first."""
    source = f"{engine.name}, template {TEMPLATE_VERSION}"
    described: list[Described | Unanswered] = []
    for answer, request in zip(engine.answer(requests) if requests else [], requests, strict=True):
        described.append(answer if isinstance(answer, Unanswered) else _read(answer, request, 1, source))
    doubtful = {i: each for i, each in enumerate(described) if isinstance(each, Described) and each.problems}
    repeated = [_again(requests[i], first.problems) for i, first in doubtful.items()]
    for (i, first), answer in zip(doubtful.items(), engine.answer(repeated) if repeated else [], strict=True):
        if not isinstance(answer, Unanswered):
            pair = _read(answer, requests[i], 2, source), first._replace(attempts=2)
            described[i] = min(pair, key=lambda each: ("empty" in each.problems, len(each.problems)))
        elif answer.ends_run:  # the same command asks again
            described[i] = answer
    return described
