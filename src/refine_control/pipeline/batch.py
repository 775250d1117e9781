"""Many photographs through one `Inpainter`, and variants of one: what `refine-control inpaint` writes.

A batch is a source of photographs as `data build` reads it (`photos.sources`). Each (photograph, region) becomes
OUT/KEY.png, with several seeds KEY-0.png, KEY-1.png, ...; what cannot be used becomes a line of OUT/rejects.jsonl, and
the counts add up. A picture names in a text chunk the hash of all that it depends on: the same command again keeps the
pictures that are there and paints the others.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.photos.decode import Original, read_original
from refine_control.photos.files import read_bytes
from refine_control.photos.load import load_mask
from refine_control.photos.sources import entries
from refine_control.pipeline.framing import CONTEXT
from refine_control.pipeline.inpainter import Inpainted, Inpainter, check_edges
from refine_control.pipeline.pictures import check_ending, check_prompt, encode_picture
from refine_control.pipeline.together import Beside
from refine_control.progress import Progress
from refine_control.records import Entry, Rejected, RejectReason
from refine_control.storage import MANIFEST, only_writer, sha256_file, write_atomic

REJECTS = "rejects.jsonl"
_MARK = "refine-control"
"""The text chunk of a PNG that holds the hash of what it depends on."""


class Plan(NamedTuple):
    """How each photograph is painted."""

    sampler: SamplerConfig
    """With the seed of the first variant."""
    seeds: int = 1
    """Number of variants, with the seeds sampler.seed, sampler.seed + 1, ..."""
    whole: bool = False
    context: float = CONTEXT
    feather: int | None = None

    def check(self) -> None:
        """Raises InvalidInputError for a context or a feather out of range."""
        check_edges(self.context, self.feather)

    def variants(
        self,
        inpainter: Inpainter,
        photograph: Original,
        mask: np.ndarray,
        prompt: str,
        progress: Progress | None = None,
        others: Sequence[Beside] = (),
    ) -> Iterator[Inpainted]:
        """Paints one after the other, each with the `others` of `Inpainter.beside`; `progress` counts their steps."""
        for number in range(self.seeds):
            sampler = self.sampler.model_copy(update={"seed": self.sampler.seed + number})

            def advance(done: int, total: int, note: str = "", number: int = number) -> None:
                if progress:
                    progress(number * total + done, self.seeds * total, note)

            edges = {"whole": self.whole, "context": self.context, "feather": self.feather}
            yield inpainter.repaint(photograph, mask, prompt, sampler, others, **edges, progress=advance)

    def files(self, out: Path) -> list[Path]:
        """`out` for one variant; for several out-0.png, out-1.png, ..."""
        if self.seeds == 1:
            return [out]
        return [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(self.seeds)]


class Summary(NamedTuple):
    """The result of a batch: entries = painted + kept + rejected."""

    out: Path
    entries: int
    painted: int
    kept: int
    """Those that an earlier run painted."""
    rejects: dict[str, int]
    """By reason."""
    seconds: float

    def __str__(self) -> str:
        rejected = ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejects.items()))
        rejected = f"; rejected {sum(self.rejects.values())}: {rejected}, see {self.out / REJECTS}" * bool(rejected)
        kept = f", {self.kept} were already there" * bool(self.kept)
        return f"{self.entries} entries -> {self.painted} painted in {self.seconds:.1f} s{kept}{rejected}"


def inpaint_photograph(
    inpainter: Inpainter,
    photograph: Original,
    mask: np.ndarray,
    prompt: str,
    out: Path,
    plan: Plan,
    progress: Progress | None = None,
    others: Sequence[Beside] = (),
) -> list[Path]:
    """Writes a photograph with the region of mask (H, W) bool repainted, one file for each seed; returns their paths.

    `others` are ControlNets that paint with the inpainter's own (`Inpainter.beside`).

    Raises what `Inpainter.repaint` and `Inpainted.save` raise."""
    check_ending(out)
    painted = plan.variants(inpainter, photograph, mask, prompt, progress, others)
    return [result.save(path) for path, result in zip(plan.files(out), painted, strict=True)]


def inpaint_source(
    inpainter: Inpainter,
    source: Path,
    out: Path,
    plan: Plan,
    prompt: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Paints the photographs of a source (see above) into the folder `out`.

    `prompt` is that of the photographs that have none. `progress` counts the photographs. Raises InvalidInputError for
    a source without a photograph that can be used, InUseError while another process paints there, StorageError."""
    began, folder = time.monotonic(), source if source.is_dir() else source.parent
    if out.resolve().is_relative_to(folder.resolve()):
        raise InvalidInputError(f"{out} lies in {folder}, whose photographs are read; name a folder outside")
    if prompt is not None:
        check_prompt(prompt)
    left_out: list[Entry] = []
    listed = list(entries(source, left_out=left_out.append))
    settings, counts, lines = _settings(inpainter, plan), Counter[str](), []
    with only_writer(out):
        for number, entry in enumerate(listed, 1):
            try:
                counts[_paint(inpainter, entry, out, plan, prompt, settings)] += 1
            except Rejected as error:
                lines.append(_line(entry, error.reason.value, error.detail))
            except InvalidInputError as error:
                lines.append(_line(entry, "refused", str(error)))
            if progress:
                progress(number, len(listed), "paint")
        usable = bool(counts)
        lines += [_line(each, each.problem[0].value, each.problem[1]) for each in left_out if each.problem]
        write_atomic(out / REJECTS, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    reasons = dict(Counter(line["reason"] for line in lines))
    total = len(listed) + len(left_out)
    if not usable:
        known = ", ".join(sorted(reasons)) or "no photograph"
        raise InvalidInputError(
            f"none of the {total} entries of {source} can be painted ({known}); see {out / REJECTS}"
        )
    return Summary(out, total, counts["painted"], counts["kept"], reasons, time.monotonic() - began)


def _line(entry: Entry, reason: str, detail: str) -> dict[str, str]:
    return {"key": entry.key, "path": entry.image, "reason": reason, "detail": detail}


def _settings(inpainter: Inpainter, plan: Plan) -> bytes:
    """What all pictures of a batch depend on, as bytes that differ where it does."""
    exported = Path(inpainter.controlnet or "", MANIFEST)
    if inpainter.exported:
        weights = [sha256_file(exported)]
    else:
        from refine_control.models.loading import weights_mark

        weights = [weights_mark(name) for name in (inpainter.model, inpainter.controlnet) if name is not None]
    return json.dumps([weights, plan.sampler.model_dump(mode="json"), *plan[2:]], sort_keys=True).encode()


def _paint(inpainter: Inpainter, entry: Entry, out: Path, plan: Plan, prompt: str | None, settings: bytes) -> str:
    """Paints an entry in all variants, or keeps it: "painted" or "kept". Raises Rejected with the reason."""
    if entry.problem is not None:
        raise Rejected(*entry.problem)
    words = entry.prompt or prompt
    if words is None:
        raise Rejected(RejectReason.NO_PROMPT, "no words for the hole")
    data = read_bytes(entry.root, entry.image)
    described = json.dumps([entry.segmentation, words], sort_keys=True).encode()
    mask_bytes = read_bytes(entry.root, entry.mask) if entry.mask else b""
    digests = [hashlib.sha256(part).digest() for part in (settings, data, mask_bytes, described)]
    mark = hashlib.sha256(b"".join(digests)).hexdigest()
    paths = plan.files(out / f"{entry.key}.png")
    if all(_mark(path) == mark for path in paths):
        return "kept"
    photograph = read_original(data)
    mask = load_mask(entry, photograph.header)
    note = PngInfo()
    note.add_text(_MARK, mark)
    for path, result in zip(paths, plan.variants(inpainter, photograph, mask, words), strict=True):
        write_atomic(path, encode_picture(result.image, path, pnginfo=note))
    return "painted"


def _mark(path: Path) -> str | None:
    """What a picture says that it depends on; None where there is none."""
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG",)) as picture:
            return picture.info.get(_MARK)
    except (OSError, SyntaxError, ValueError):
        return None
