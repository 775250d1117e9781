"""`data inspect --html`: a folder of shards as one page to look through, which needs no other file and no network."""

# H W pixels of a sample, h w of its tile

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from refine_control.errors import InvalidInputError
from refine_control.photos.inspect import inspect, outline
from refine_control.photos.shards import Shards, open_manifest
from refine_control.records import ROLES, Photo
from refine_control.storage import write_output

_REJECTS = "rejects.jsonl"
_TILE = 224
_MARK = (224, 16, 127, 255)
_BINS = 20
_COMMON = 24
_REJECTS_SHOWN = 100
_PLAIN_WORDS = frozenset(
    ("a", "an", "and", "at", "by", "from", "in", "into", "of", "on", "or", "over", "the", "to", "with")
)
"""Not counted among the frequent words: they name nothing."""


class Bar(NamedTuple):
    """One column of a histogram."""

    label: str
    count: int
    share: float
    """Of the tallest, 0 to 1."""


class Tile(NamedTuple):
    """A sample to look at."""

    role: str
    key: str
    prompt: str
    note: str
    """The source and the masked share."""
    license: str
    image: str
    """Data URL, JPEG."""
    outline: str
    """Data URL, transparent PNG of the same size."""


class Words(NamedTuple):
    """What one pass over a role's samples keeps of them."""

    areas: list[float]
    """The masked share of each, 0 to 1."""
    lengths: list[int]
    """Words in each prompt."""
    counts: Counter[str]
    """How many prompts hold a word."""


class Charts(NamedTuple):
    """The histograms of one role, or of all of them under the name ""."""

    role: str
    areas: list[Bar]
    lengths: list[Bar]
    words: list[Bar]


class Refusals(NamedTuple):
    """The entries refused for one reason."""

    reason: str
    count: int
    lines: list[dict[str, Any]]
    """The first of them: row, key, path, detail."""


def write_page(folder: Path, out_html: Path, count: int = 200) -> None:
    """Writes the page of one role's folder or of a build, with `count` samples spread evenly, each role in its share.

    Raises InvalidInputError where there are no shards, DamagedError where they are damaged, StorageError when the disk
    refuses."""
    if count < 1:
        raise InvalidInputError(f"count is {count}; a page shows at least one sample")
    folder = Path(folder)
    manifest, inspected = open_manifest(folder), inspect(folder)
    built = manifest.get("kind") == "build"
    statistics = inspected["roles"] if built else {inspected["role"]: inspected}
    shards = {role: Shards(folder / role if built else folder) for role in ROLES if role in statistics}
    numbers = {role: _words(each) for role, each in shards.items()}
    together = Words(
        [area for each in numbers.values() for area in each.areas],
        [length for each in numbers.values() for length in each.lengths],
        sum((each.counts for each in numbers.values()), Counter[str]()),
    )
    several = {"": together} if len(numbers) > 1 else {}
    page = {
        "title": folder.resolve().name,
        "built": built,
        "entries": inspected["entries"] if built else None,
        "made_by": ", ".join(f"{name} {version}" for name, version in manifest["made_by"].items()),
        "roles": statistics,
        "charts": [_charts(role, each) for role, each in {**several, **numbers}.items()],
        "tiles": _tiles(shards, count),
        "samples": sum(len(each) for each in shards.values()),
        "refusals": _refusals(folder / _REJECTS) if built else [],
        "refusals_shown": _REJECTS_SHOWN,
    }
    write_output(Path(out_html), _render(page).encode("utf-8", "backslashreplace"))  # for names that are no UTF-8


def _render(page: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("refine_control.photos", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("inspect_page.html.j2").render(page)


def _words(shards: Shards) -> Words:
    kept = Words([], [], Counter())
    for photo in shards:
        parts = photo.prompt.lower().split()
        kept.areas.append(float(photo.mask.mean()))
        kept.lengths.append(len(parts))
        kept.counts.update({part.strip(".,;:!?\"'()") for part in parts} - _PLAIN_WORDS - {""})
    return kept


def _charts(role: str, kept: Words) -> Charts:
    common = sorted(kept.counts.items(), key=lambda item: (-item[1], item[0]))[:_COMMON]
    return Charts(role, area_bars(kept.areas), length_bars(kept.lengths), _bars(common))


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


def _tiles(shards: dict[str, Shards], count: int) -> list[Tile]:
    places = [(role, index) for role, each in shards.items() for index in range(len(each))]
    if not places:
        return []
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    return [_tile(places[number][0], shards[places[number][0]][places[number][1]]) for number in chosen]


def _tile(role: str, photo: Photo) -> Tile:
    """The sample at most _TILE pixels long, and the outline of its hole at exactly the size of the tile."""
    picture = Image.fromarray(photo.image)
    scale = _TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(size, Image.Resampling.LANCZOS) if scale < 1 else picture
    mask = np.asarray(Image.fromarray(photo.mask).resize(size, Image.Resampling.NEAREST))
    edge = outline(mask)
    inner = outline(mask & ~edge)
    line = np.where((edge | inner)[..., None], np.array(_MARK, np.uint8), np.uint8(0))
    source, note = str(photo.meta.get("source") or ""), f"{100 * photo.mask.mean():.0f} % masked"
    note = f"{source}, {note}" if source else note
    address = _data_url(small, "JPEG", quality=85)
    return Tile(
        role,
        photo.key,
        photo.prompt,
        note,
        str(photo.meta.get("license") or ""),
        address,
        _data_url(Image.fromarray(line), "PNG"),
    )


def _data_url(picture: Image.Image, file_format: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _refusals(path: Path) -> list[Refusals]:
    """By reason, the most frequent first."""
    lines: dict[str, list[dict[str, Any]]] = {}
    counts = Counter[str]()
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            counts[line["reason"]] += 1
            if counts[line["reason"]] <= _REJECTS_SHOWN:
                lines.setdefault(line["reason"], []).append(line)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Refusals(reason, number, lines[reason]) for reason, number in ordered]
