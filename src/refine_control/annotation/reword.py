"""`data reword`: the same regions with prompts of another quality, so that what prompts are worth can be measured.

Every region stays, in its order and under its id, so that `data build` makes the same split of it: data sets that
differ in their words alone (the paper's third open question).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from refine_control.errors import InvalidInputError
from refine_control.photos.decisions import id_of
from refine_control.photos.sources import MANIFEST_NAME, entries
from refine_control.randomness import permutation
from refine_control.records import one_line, with_article
from refine_control.storage import only_writer, write_atomic

Kind = Literal["template", "shuffled", "global"]

_MASS = frozenset(
    {"grass", "sand", "snow", "water", "sky", "sea", "gravel", "dirt", "food", "clothing", "broccoli", "paper"}
)
"""Categories that take no article."""


def local_prompt_from(category: str) -> str:
    """The fixed words for a category: `a dog`; for COCO's `wall-brick` `a brick wall`; without one `an object`."""
    parts = one_line(category).lower().replace("_", " ").split("-")
    parts = [part for part in parts if part not in ("", "other", "merged", "stuff")]
    if not parts:
        return "an object"
    name = " ".join(reversed(parts) if parts[0] in ("wall", "floor") else parts)
    return name if parts[0] in _MASS else with_article(name)


class Worded(NamedTuple):
    """The words of one sample."""

    photo: str
    """Which photograph it is, whatever the mask."""
    prompt: str
    category: str = ""
    global_prompt: str = ""


def variant(
    samples: Sequence[Worded], kind: Literal["given", "template", "shuffled", "global"], seed: int = 0
) -> list[str]:
    """The prompts of the same samples, of another quality, one for each sample.

    given: as they are. template: from the category alone. shuffled: every prompt goes to a sample of another photo, a
    function of the seed; words that two photos share may therefore come back. global: the whole photo's. Raises
    InvalidInputError where a photo has more than half of the samples (shuffled), or samples lack a global prompt."""
    if kind == "given":
        return [each.prompt for each in samples]
    if kind == "template":
        return [local_prompt_from(each.category) for each in samples]
    if kind == "shuffled":
        return _shuffled(samples, seed)
    if kind != "global":
        raise InvalidInputError(f"prompts {kind!r} are not known; choose given, template, shuffled or global")
    if lacking := sum(not each.global_prompt.strip() for each in samples):
        raise InvalidInputError(
            f"{lacking} of {len(samples)} samples have no global prompt; have them written by `data annotate`, "
            "or choose other prompts"
        )
    return [each.global_prompt for each in samples]


def _shuffled(samples: Sequence[Worded], seed: int) -> list[str]:
    """With the samples of a photo side by side, a turn by at least the most of a photo meets no photo twice."""
    order = permutation(seed, len(samples))
    places: dict[str, list[int]] = {}
    for index in order:
        places.setdefault(samples[index].photo, []).append(int(index))
    most = max(map(len, places.values()), default=0)
    if 2 * most > len(samples):
        raise InvalidInputError(
            f"one photo has {most} of {len(samples)} samples; prompts can be shuffled between photos only where no "
            "photo has more than half"
        )
    row = [index for group in places.values() for index in group]
    prompts = [""] * len(samples)
    for here, there in zip(row, row[most:] + row[:most], strict=True):
        prompts[here] = samples[there].prompt
    return prompts


class Reworded(NamedTuple):
    """Where the new manifest is, and how many rows have other words than before."""

    manifest: Path
    rows: int
    changed: int


def reword(source: Path, out: Path, kind: Kind, seed: int = 0, images: Path | None = None) -> Reworded:
    """Writes `out/manifest.jsonl`: the usable entries of `source` (see `photos.sources`) with the prompts of `variant`.

    Raises InvalidInputError for a source without prompts, an `out` that holds another manifest, and as `variant`."""
    usable = [entry for entry in entries(source, images) if entry.problem is None and entry.prompt]
    if not usable:
        raise InvalidInputError(f"{source} holds no region with a prompt; write them with `data annotate`")
    samples = [
        Worded(each.photo, each.prompt or "", str(each.meta.get("category") or ""), each.global_prompt)
        for each in usable
    ]
    prompts = variant(samples, kind, seed)
    header = {"root": str(usable[0].root.resolve()), "reworded": kind, "seed": seed}
    lines = [json.dumps(header, sort_keys=True)]
    for entry, prompt in zip(usable, prompts, strict=True):
        region = {"mask": entry.mask} if entry.mask else {"segmentation": entry.segmentation}
        words = {"local_prompt": prompt, "local_prompt_source": kind, "global_prompt": entry.global_prompt}
        row = {**entry.meta, "id": id_of(entry), "image": entry.image, **region, **words}
        lines.append(json.dumps(row, sort_keys=True))
    text = "".join(f"{line}\n" for line in lines)
    manifest = out / MANIFEST_NAME
    with only_writer(out):
        if manifest.is_file() and manifest.read_text() != text:
            raise InvalidInputError(f"{manifest} is there and says something else; name a new folder")
        write_atomic(manifest, text)
    changed = sum(entry.prompt != prompt for entry, prompt in zip(usable, prompts, strict=True))
    return Reworded(manifest, len(usable), changed)
