"""WebDataset shards: tar files that any tool reads, with an index and hashes that find every changed bit.

A folder holds one role: `shard-00000.tar`..., `index.jsonl` (a line for each sample: where each member lies and
its sha256) and `manifest.json`, written last (what the samples are, and the sha256 of index and shards).
Members of sample KEY: `KEY.json` (prompt, global_prompt, meta), `KEY.mask.png` (0 keep, 255 inpaint) and
`KEY.webp` (lossless), `KEY.png` or `KEY.jpg` (quality 95, 4:4:4). For a condition without a region, `condition` in the
manifest, the condition picture `KEY.cond.png` takes the place of the mask. The same samples give the same bytes.

Neither writer nor reader holds the samples: of each some 60 bytes are kept while writing, less than one while reading.

In the role `unlabeled` the pixels of the hole do not exist: the hole is mid-grey (HOLE_FILL) before the
image is encoded, and is filled again after decoding, because JPEG rings. Without a region there is no picture at all.
"""

# H W pixels

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import PIL
from PIL import Image

from refine_control import __version__
from refine_control.conditions.condition import INPAINT, find_condition
from refine_control.errors import DamagedError, InvalidInputError
from refine_control.folders import ONE_ROLE, SHARDS_OR_BUILD, refuse_other_kind
from refine_control.photos.seen import Seen
from refine_control.photos.shard_index import INDEX, Index, IndexWriter, SampleRecord
from refine_control.records import ROLES, UNLABELED, Photo
from refine_control.storage import MANIFEST, TEMPORARY, fsync_path, sha256_file, storage_errors, write_atomic

HOLE_FILL = 128
IMAGE_FORMATS: dict[str, dict[str, Any]] = {
    "webp": {"format": "WEBP", "lossless": True, "quality": 70, "method": 4},
    "png": {"format": "PNG", "compress_level": 6},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
MADE_BY = {"refine_control": __version__, "pillow": PIL.__version__}
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_BLOCK = 512


class File(TypedDict):
    """A file in a manifest."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """`manifest.json` of a folder of shards or of a build; which of the keys it has depends on that."""

    kind: str
    """shards or build."""
    role: str
    condition: NotRequired[str]
    """Of the samples, where it is not inpainting."""
    samples: int
    photos: int
    image_size: list[int] | None
    """[H, W]; None where there are several sizes."""
    image_sizes: NotRequired[list[list[int]]]
    """With buckets: [H, W, samples] of each."""
    image_format: str
    hole_fill: int | None
    sources: dict[str, int]
    licenses: dict[str, int]
    entries: int
    """Of a build: all samples and all rejects."""
    rejects: dict[str, int]
    made_by: dict[str, str]
    files: dict[str, File]
    digest: str


def fill_hole(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of (H, W, 3) uint8 with HOLE_FILL wherever `mask` (H, W) bool is True."""
    return np.where(mask[..., None], np.uint8(HOLE_FILL), image)


def _encode(array: np.ndarray, options: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, **options)
    return buffer.getvalue()


def _decode(data: bytes | None) -> np.ndarray | None:
    """(H, W, 3) uint8; None of nothing."""
    return None if data is None else np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def encode(photo: Photo, role: str, image_format: str) -> dict[str, bytes]:
    """The files of one sample by extension, sorted: nearly all the work of writing it, and any process may do it."""
    words = {"prompt": photo.prompt, "global_prompt": photo.global_prompt, "meta": photo.meta}
    members = {"json": json.dumps(words, sort_keys=True, allow_nan=False).encode()}
    if photo.cond is None:
        members["mask.png"] = _encode(photo.mask.astype(np.uint8) * 255, IMAGE_FORMATS["png"])
    else:
        members["cond.png"] = _encode(photo.cond, IMAGE_FORMATS["png"])
    if photo.cond is None or role != UNLABELED:
        image = fill_hole(photo.image, photo.mask) if role == UNLABELED else photo.image
        members[image_format] = _encode(image, IMAGE_FORMATS[image_format])
    return dict(sorted(members.items()))


def write_manifest(folder: Path, described: Mapping[str, object], files: Sequence[str]) -> Manifest:
    """Publishes `manifest.json`: what is `described`, size and sha256 of each of the `files`, and its own digest."""
    listed = {n: {"bytes": (folder / n).stat().st_size, "sha256": sha256_file(folder / n)} for n in files}
    manifest: dict[str, object] = {**described, "made_by": MADE_BY, "files": listed}
    manifest["digest"] = hashlib.sha256(_canonical(manifest)).hexdigest()
    write_atomic(folder / MANIFEST, _canonical(manifest))
    return cast(Manifest, manifest)


def _canonical(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def open_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards or of a build, checked against its own digest.

    Raises InvalidInputError where there is none, DamagedError where a bit of it has changed."""
    refuse_other_kind(folder, SHARDS_OR_BUILD)
    path = folder / MANIFEST
    if not path.is_file():
        refuse_other_kind(folder, ONE_ROLE)  # the roles of a build that has no manifest
        raise InvalidInputError(f"{folder} holds no finished shards (no {MANIFEST}); make them with `data build`")
    text = path.read_bytes()
    try:
        manifest = json.loads(text)
        without = {key: value for key, value in manifest.items() if key != "digest"}
        whole = _canonical(manifest) == text and manifest["digest"] == hashlib.sha256(_canonical(without)).hexdigest()
    except (ValueError, AttributeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{path} is damaged; delete {folder} and build it again")
    return manifest


class ShardWriter:
    """Writes the shards of one role into `folder`; hold `storage.only_writer` around it.

    `add` every sample, then `finish`. A shard appears whole or not at all; without `finish` there is no manifest.
    All samples have one size, unless `several_sizes`: then the manifest says `image_sizes`, [H, W, samples] of each."""

    def __init__(
        self,
        folder: Path,
        role: str,
        samples_per_shard: int = 1000,
        image_format: str = "webp",
        several_sizes: bool = False,
        condition: str = INPAINT,
    ) -> None:
        region = find_condition(condition).region
        if role not in ROLES:
            raise InvalidInputError(f"there is no role {role!r}; the roles are {', '.join(ROLES)}")
        if image_format not in IMAGE_FORMATS:
            raise InvalidInputError(f"there is no image format {image_format!r}; choose {', '.join(IMAGE_FORMATS)}")
        if samples_per_shard < 1:
            raise InvalidInputError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        self.folder, self.role, self.image_format = folder, role, image_format
        self.samples_per_shard, self.several_sizes = samples_per_shard, several_sizes
        self.condition, self._region = condition, region
        self._open: tarfile.TarFile | None = None
        self._pending: list[SampleRecord] = []
        self._shards: list[str] = []
        self._keys, self._photos = Seen(), Seen()
        self._sources, self._licenses, self._sizes = Counter[str](), Counter[str](), Counter[tuple[int, ...]]()
        self._size: tuple[int, int] | None = None
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._index = IndexWriter(folder)

    def add(self, photo: Photo, members: dict[str, bytes] | None = None) -> None:
        """Appends a sample. `members` are its files where another process has encoded them.

        Raises InvalidInputError for a bad key or array."""
        height, width = photo.mask.shape if photo.mask.ndim == 2 else (0, 0)
        if photo.mask.dtype != bool or photo.image.dtype != np.uint8 or photo.image.shape != (height, width, 3):
            raise InvalidInputError(f"{photo.key}: want image (H, W, 3) uint8 and mask (H, W) bool of one size")
        self._check_condition(photo)
        if not _KEY.fullmatch(photo.key) or photo.key in self._keys:
            raise InvalidInputError(
                f"key {photo.key!r} is taken or holds characters other than letters, digits, _ and -"
            )
        if not self.several_sizes and (self._size or (height, width)) != (height, width):
            raise InvalidInputError(f"{photo.key} is {width} x {height}, the samples before it are not; use one size")
        if len(self._pending) == self.samples_per_shard:
            self.cut()
        self._size = (height, width)
        self._keys.add(photo.key)
        with storage_errors(self.folder):
            self._write(photo, members or encode(photo, self.role, self.image_format))

    def _check_condition(self, photo: Photo) -> None:
        if self._region:
            fault = "" if photo.cond is None else "takes no condition picture"
        else:
            fits = photo.cond is not None and photo.cond.dtype == np.uint8 and photo.cond.shape == photo.image.shape
            fault = "" if fits else "wants a condition picture (H, W, 3) uint8 of the size of the image"
        if fault:
            raise InvalidInputError(f"{photo.key}: the condition {self.condition} {fault}")

    def _write(self, photo: Photo, encoded: dict[str, bytes]) -> None:
        name = f"shard-{len(self._shards):05d}.tar"
        if self._open is None:
            self._open = tarfile.open(self._temporary(name), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        members: dict[str, tuple[int, int, str]] = {}
        for extension, data in encoded.items():
            info = tarfile.TarInfo(f"{photo.key}.{extension}")  # mtime, uid and gid are 0
            info.size = len(data)
            members[extension] = (self._open.offset + _BLOCK, len(data), hashlib.sha256(data).hexdigest())
            self._open.addfile(info, io.BytesIO(data))
        self._open.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        source, license = (str(photo.meta.get(field) or "unknown") for field in ("source", "license"))
        photo_id, shape = str(photo.meta.get("photo") or photo.key), list(photo.mask.shape)
        record = SampleRecord(
            shard=name, key=photo.key, photo=photo_id, shape=shape, source=source, license=license, members=members
        )
        self._pending.append(record)

    def _temporary(self, name: str) -> Path:
        return self.folder / f".{name}.{os.getpid()}{TEMPORARY}"

    def cut(self) -> list[SampleRecord]:
        """Publishes the current shard now; its index records, none where nothing was added since the last."""
        if self._open is None:
            return []
        published, name = self._pending, self._pending[0]["shard"]
        with storage_errors(self.folder):
            self._open.close()
            fsync_path(self._temporary(name))
            self._temporary(name).replace(self.folder / name)
            fsync_path(self.folder)
        self._open, self._pending = None, []
        self._take(published)
        return published

    def adopt(self, records: list[SampleRecord]) -> None:
        """Takes over the next shard, published by an earlier run, with the records that `cut` gave for it."""
        height, width = records[0]["shape"]
        self._size = height, width
        for record in records:
            self._keys.add(record["key"])
        self._take(records)

    def _take(self, records: list[SampleRecord]) -> None:
        """Counts the samples of a shard that is published and puts them into the index."""
        self._shards.append(records[0]["shard"])
        for record in records:
            self._photos.add(record["photo"])
            self._sources[record["source"]] += 1
            self._licenses[record["license"]] += 1
            self._sizes[tuple(record["shape"])] += 1
        self._index.write(records)

    def finish(self, **described: object) -> Manifest:
        """Publishes the last shard, the index and then the manifest, which is returned."""
        self.cut()
        self._index.publish()
        facts = {
            "kind": "shards",
            "role": self.role,
            "samples": self._sizes.total(),
            "photos": len(self._photos),
            "image_size": list(next(iter(self._sizes))) if len(self._sizes) == 1 else None,
            "image_format": self.image_format,
            "hole_fill": HOLE_FILL if self.role == UNLABELED and self._region else None,
            "sources": dict(self._sources),
            "licenses": dict(self._licenses),
        }
        if self.condition != INPAINT:
            facts["condition"] = self.condition
        if self.several_sizes:
            facts["image_sizes"] = [[*size, count] for size, count in sorted(self._sizes.items())]
        return write_manifest(self.folder, {**described, **facts}, [INDEX, *self._shards])


class Shards(Sequence[Photo]):
    """Random access to a folder of shards: `len`, `[i]`, iteration; every byte handed out has been checked.

    Holds no open file, so it may be pickled and shared by forked workers.
    Raises InvalidInputError where there are no shards, DamagedError where something is not what was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        refuse_other_kind(self.folder, ONE_ROLE)
        self.manifest = open_manifest(self.folder)
        for name, expected in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                raise DamagedError(f"{path} is missing or cut; delete {folder} and build it again")
        self.records = Index(self.folder, self.manifest["files"][INDEX]["sha256"])

    @property
    def condition(self) -> str:
        """The name of the condition of all samples."""
        return self.manifest.get("condition", INPAINT)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Photo:  # type: ignore[override]
        return self._photo(self.records[index])

    def __iter__(self) -> Iterator[Photo]:
        return map(self._photo, self.records)

    def _photo(self, record: SampleRecord) -> Photo:
        data = self._read(record)
        words = json.loads(data["json"])
        cond, image = (_decode(data.get(name)) for name in ("cond.png", self.manifest["image_format"]))
        if cond is None:
            mask = np.asarray(Image.open(io.BytesIO(data["mask.png"]))) > 0
        else:
            mask = np.ones(cond.shape[:2], bool)
        if image is None:
            image = np.full((*mask.shape, 3), HOLE_FILL, np.uint8)
        elif self.manifest["role"] == UNLABELED:
            image = fill_hole(image, mask)
        return Photo(record["key"], image, mask, words["prompt"], words["global_prompt"], words["meta"], cond)

    def _read(self, record: SampleRecord) -> dict[str, bytes]:
        """The checked bytes of each member."""
        path, data = self.folder / record["shard"], {}
        with path.open("rb") as file:
            for extension, (offset, length, sha256) in record["members"].items():
                file.seek(offset)
                data[extension] = file.read(length)
                if hashlib.sha256(data[extension]).hexdigest() != sha256:
                    member = f"{record['key']}.{extension}"
                    raise DamagedError(f"{member} in {path} is damaged; delete {self.folder} and build it again")
        return data

    def is_whole(self, record: SampleRecord) -> bool:
        """Whether a sample is what was written."""
        try:
            return bool(self._read(record))
        except DamagedError:
            return False


def read_shards(folder: Path) -> Iterator[Photo]:
    """Every sample in the order of the index, checked; errors as `Shards`."""
    return iter(Shards(folder))


def verify(folder: Path) -> list[str]:
    """Reads every byte of a folder of shards, or of a whole build, and names whatever is missing, cut or changed.

    An empty list: all is as it was written. Raises InvalidInputError for a folder of another kind."""
    refuse_other_kind(folder, SHARDS_OR_BUILD)
    try:
        manifest = open_manifest(folder)
    except (InvalidInputError, DamagedError) as error:
        return [str(error)]
    problems = []
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes, written were {expected['bytes']}")
        elif sha256_file(path) != expected["sha256"]:
            problems.append(f"{path} has changed since it was written{_damaged_samples(folder, name)}")
        if path.name == MANIFEST:
            problems += verify(path.parent)
    strangers = sorted(path for path in folder.glob("*.tar") if path.name not in manifest["files"])
    return problems + [f"{path} is not in the manifest" for path in strangers]


def _damaged_samples(folder: Path, shard: str) -> str:
    """` (samples KEY, ...)` of a shard with changed bytes, nothing where they are not known."""
    keys: list[str] = []
    with contextlib.suppress(InvalidInputError, DamagedError):
        shards = Shards(folder)
        keys = [record["key"] for record in shards.records if record["shard"] == shard and not shards.is_whole(record)]
    return f" (samples {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})" if keys else ""
