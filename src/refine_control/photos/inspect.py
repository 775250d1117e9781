"""`data inspect`: what shards hold, in numbers, on one sheet, and as one page that needs no other file."""

# H W pixels of a sample

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from refine_control import picture_grid
from refine_control.errors import InvalidInputError
from refine_control.photos.shards import Manifest, Shards, open_manifest
from refine_control.records import ROLES, UNLABELED, Photo, Row
from refine_control.storage import write_output

QUANTILES = {"min": 0.0, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}
_SHOWN = {"role", "condition", "samples", "photos", "image_size", "image_sizes", "image_format", "sources", "licenses"}
"""Of a manifest."""
_REJECTS = "rejects.jsonl"
_TILE = 224
_MARK = (224, 16, 127, 255)
_BINS = 20
_COMMON = 24
_REJECTS_SHOWN = 100
_PLAIN_WORDS = frozenset(
    ["a", "an", "and", "at", "by", "from", "in", "into", "of", "on", "or", "over", "the", "to", "with"]
)
"""Not counted among the frequent words: they name nothing."""


class _Measured(NamedTuple):
    """What one pass over samples keeps of them."""

    areas: list[float]
    """The masked share of each, 0 to 1; none where the condition has no region."""
    lengths: list[int]
    """Words in each prompt."""
    words: Counter[str]
    """How many prompts hold a word."""


class _Opened(NamedTuple):
    """A folder of shards or a build."""

    manifest: Manifest
    built: bool
    roles: dict[str, Shards]


def _open(folder: Path) -> _Opened:
    """Raises InvalidInputError where there are no shards, DamagedError where they are damaged."""
    manifest = open_manifest(folder)
    if manifest.get("kind") == "build":
        return _Opened(manifest, True, {role: Shards(folder / role) for role in ROLES})
    shards = Shards(folder)
    return _Opened(manifest, False, {shards.manifest["role"]: shards})


def _spread(roles: dict[str, Shards], count: int, what: str) -> list[tuple[str, Photo]]:
    """`count` samples with their roles, evenly spread. Raises InvalidInputError for a count below 1."""
    if count < 1:
        raise InvalidInputError(f"count is {count}; {what} shows at least one sample")
    places = [(role, index) for role, shards in roles.items() for index in range(len(shards))]
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    return [(role, roles[role][index]) for role, index in (places[number] for number in chosen)]


def inspect(folder: Path) -> dict[str, Any]:
    """Statistics of one role's folder, or of a build: `{"roles": {role: statistics}, "entries", "rejects"}`.

    Statistics: role, condition where it is not inpainting, samples, photos, bytes, image_size (with buckets also
    image_sizes: [H, W, samples] of each), image_format, sources, licenses, and quantiles of the masked share
    (`mask_fraction`, 0 to 1, of inpainting) and of the words in a prompt (`prompt_words`). Raises InvalidInputError
    where there are no shards, DamagedError where they are damaged."""
    opened = _open(Path(folder))
    roles = {role: _statistics(shards)[0] for role, shards in opened.roles.items()}
    if not opened.built:
        return next(iter(roles.values()))
    return {"roles": roles, "entries": opened.manifest["entries"], "rejects": opened.manifest["rejects"]}


def _statistics(shards: Shards) -> tuple[Row, _Measured]:
    """By one pass over the samples of a role."""
    measured, described = _Measured([], [], Counter()), 0
    for photo in shards:
        words = photo.prompt.lower().split()
        measured.areas.extend([float(photo.mask.mean())] if photo.cond is None else [])
        measured.lengths.append(len(words))
        measured.words.update({word.strip(".,;:!?\"'()") for word in words} - _PLAIN_WORDS - {""})
        described += bool(photo.global_prompt)
    statistics = {name: value for name, value in shards.manifest.items() if name in _SHOWN} | {
        "bytes": sum(file["bytes"] for file in shards.manifest["files"].values()),
        "mask_fraction": _quantiles(measured.areas),
        "prompt_words": _quantiles(measured.lengths),
        "with_global_prompt": described,
    }
    return statistics, measured


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    """The QUANTILES; nothing of nothing."""
    numbers = np.quantile(values, list(QUANTILES.values())).tolist() if values else []
    return {name: round(number, 4) for name, number in zip(QUANTILES, numbers, strict=False)}


def outline(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (H, W) bool: pixels of the mask with a neighbour, left, right, above or below, outside it.

    The border of the picture is no neighbour."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def contact_sheet(folder: Path, path: Path, count: int = 64) -> None:
    """Writes a PNG of `count` samples, evenly spread, each with its hole outlined and its prompt below.

    Of a build every role is shown, each in its share. Raises InvalidInputError where there is no sample, StorageError
    when the disk refuses."""
    shown = [_side_by_side(*each) for each in _spread(_open(Path(folder)).roles, count, "a sheet")]
    if not shown:
        raise InvalidInputError(f"{folder} holds no sample to show")
    sheet = picture_grid.contact_sheet([p.image for p in shown], [p.mask for p in shown], [p.prompt for p in shown])
    write_output(Path(path), sheet)


def _side_by_side(role: str, photo: Photo) -> Photo:
    """The photo, where there is one, and its condition picture as one picture without a hole."""
    if photo.cond is None:
        return photo
    both = photo.cond if role == UNLABELED else np.hstack([photo.image, photo.cond])
    return replace(photo, image=both, mask=np.zeros(both.shape[:2], bool))


# The page


class Bar(NamedTuple):
    """One column of a histogram."""

    label: str
    count: int
    share: float
    """Of the tallest, 0 to 1."""


class Charts(NamedTuple):
    """The histograms of one role, or of all of them under the name ""."""

    role: str
    areas: list[Bar]
    lengths: list[Bar]
    words: list[Bar]


class Tile(NamedTuple):
    """A sample to look at; the pictures are data URLs."""

    role: str
    prompt: str
    note: str
    """The source, and the masked share where there is a region."""
    license: str
    image: str
    """Empty where there is none."""
    outline: str
    cond: str
    """Empty where the condition is the photo without its hole."""


class Refusals(NamedTuple):
    """The entries refused for one reason."""

    reason: str
    count: int
    lines: list[Row]
    """The first of them: row, key, path, detail."""


def write_page(folder: Path, out_html: Path, count: int = 200) -> None:
    """Writes the page of one role's folder or of a build, with `count` samples spread evenly, each role in its share.

    Raises InvalidInputError where there are no shards, DamagedError where they are damaged, StorageError when the disk
    refuses."""
    import jinja2

    folder = Path(folder)
    manifest, built, shards = _open(folder)
    tiles = [_tile(role, photo) for role, photo in _spread(shards, count, "a page")]
    roles = {role: _statistics(each) for role, each in shards.items()}
    measured = {role: each for role, (_, each) in roles.items()}
    if len(roles) > 1:
        parts = measured.values()
        areas, lengths = [a for part in parts for a in part.areas], [n for part in parts for n in part.lengths]
        measured = {"": _Measured(areas, lengths, sum((part.words for part in parts), Counter())), **measured}
    page = {
        "title": folder.resolve().name,
        "built": built,
        "entries": manifest["entries"] if built else None,
        "made_by": ", ".join(f"{name} {version}" for name, version in manifest["made_by"].items()),
        "roles": {role: statistics for role, (statistics, _) in roles.items()},
        "condition": next(iter(shards.values())).condition,
        "pairs": any(tile.cond for tile in tiles),
        "charts": [_charts(role, each) for role, each in measured.items()],
        "tiles": tiles,
        "samples": sum(map(len, shards.values())),
        "refusals": _refusals(folder / _REJECTS) if built else [],
        "refusals_shown": _REJECTS_SHOWN,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("refine_control.photos", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("inspect_page.html.j2").render(page)
    write_output(Path(out_html), text.encode("utf-8", "backslashreplace"))  # for names that are no UTF-8


def _charts(role: str, measured: _Measured) -> Charts:
    common = sorted(measured.words.items(), key=lambda item: (-item[1], item[0]))[:_COMMON]
    return Charts(role, area_bars(measured.areas), length_bars(measured.lengths), _bars(common))


def area_bars(areas: Sequence[float]) -> list[Bar]:
    """Masked shares, 0 to 1, in steps of a twentieth; a share on a step belongs to the column above, 1 to the last."""
    counts, _ = np.histogram(areas, bins=_BINS, range=(0, 1))
    step = 100 // _BINS
    return _bars([(f"{step * k} to {step * (k + 1)} %", int(number)) for k, number in enumerate(counts)])


def length_bars(lengths: Sequence[int]) -> list[Bar]:
    """Words in a prompt, one column for each number up to the longest; the last holds all from `2 _BINS` on."""
    last = min(max(lengths, default=0), 2 * _BINS)
    counts = Counter(min(length, last) for length in lengths)
    more = " and more" if max(lengths, default=0) > last else ""
    return _bars([(f"{k}{more if k == last else ''}", counts[k]) for k in range(1, last + 1)])


def _bars(counted: Sequence[tuple[str, int]]) -> list[Bar]:
    tallest = max((number for _, number in counted), default=0) or 1
    return [Bar(label, number, number / tallest) for label, number in counted]


def _tile(role: str, photo: Photo) -> Tile:
    """The sample, at most _TILE pixels long, and the outline of its hole at exactly the size of the tile."""
    scale = _TILE / max(photo.image.shape)
    size = (max(1, round(photo.image.shape[1] * scale)), max(1, round(photo.image.shape[0] * scale)))
    image, cond = (_small(each, size) for each in (photo.image, photo.cond))
    mask = np.asarray(Image.fromarray(photo.mask).resize(size, Image.Resampling.NEAREST))
    edge = outline(mask)
    line = np.where((edge | outline(mask & ~edge))[..., None], np.array(_MARK, np.uint8), np.uint8(0))
    source, license = (str(photo.meta.get(name) or "") for name in ("source", "license"))
    if photo.cond is not None:
        return Tile(role, photo.prompt, source, license, "" if role == UNLABELED else image, "", cond)
    note = f"{source}, " * bool(source) + f"{100 * photo.mask.mean():.0f} % masked"
    return Tile(role, photo.prompt, note, license, image, _data_url(Image.fromarray(line), "PNG"), "")


def _small(pixels: np.ndarray | None, size: tuple[int, int]) -> str:
    """The picture at most of (width, height) as a data URL; empty for none."""
    if pixels is None:
        return ""
    picture = Image.fromarray(pixels)
    small = picture.resize(size, Image.Resampling.LANCZOS) if size < picture.size else picture
    return _data_url(small, "JPEG", quality=85)


def _data_url(picture: Image.Image, file_format: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _refusals(path: Path) -> list[Refusals]:
    """By reason, the most frequent first."""
    lines: dict[str, list[Row]] = {}
    counts = Counter[str]()
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            counts[line["reason"]] += 1
            if counts[line["reason"]] <= _REJECTS_SHOWN:
                lines.setdefault(line["reason"], []).append(line)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Refusals(reason, number, lines[reason]) for reason, number in ordered]
