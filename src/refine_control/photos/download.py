"""Lists of addresses -> photographs in tars, by the tool img2dataset, which is run and never imported.

It is a program of its own (`pip install img2dataset`, best in an environment of its own), downloads in parallel, keeps
to the servers' wish not to be trained on, and continues where it was stopped. What it leaves in `out` is a source for
`data annotate`: the photos with their captions, where the list has any, and neither regions nor local prompts.

Lists: a TSV or CSV with a line of column names, such as `photos.tsv000` of Unsplash-Lite; parquet, one file or a folder
of them, such as LAION-2B's; a text of one address a line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from refine_control.errors import InvalidInputError, MissingError, WorkerDiedError
from refine_control.storage import only_writer, sha256_file, write_atomic

TOOL = "img2dataset"
SHORT_SIDE = 1024
SAMPLES_PER_SHARD = 10_000
REQUEST = "request"
"""The file in `out` that says what was asked for; a name in .json would be taken for one of the tool's own."""
_SEPARATORS = {".tsv": "\t", ".csv": ","}
_URL_COLUMNS = ("photo_image_url", "URL", "url", "image_url")
_CAPTION_COLUMNS = ("ai_description", "photo_description", "TEXT", "caption", "text")
_KEPT_COLUMNS = ("photo_id", "photographer_username", "license", "LICENSE")


class UrlList(NamedTuple):
    """How the tool reads a list of addresses."""

    input_format: str
    """txt, csv, tsv or parquet."""
    url: str | None
    """The column of the addresses; None in a text."""
    caption: str | None
    kept: list[str]
    """Columns that are copied into each photo's .json."""


@dataclass(frozen=True)
class Downloaded:
    """What is there after a download."""

    out: Path
    shards: int
    addresses: int
    photos: int


def read_layout(urls: Path) -> UrlList:
    """Which columns of a list are what. Raises InvalidInputError where it is no list of addresses."""
    if not urls.exists():
        raise InvalidInputError(f"{urls} does not exist; name a list of addresses: .tsv, .csv, .parquet or .txt")
    suffix = urls.suffix.lower()
    if urls.is_file() and suffix == ".txt":
        return UrlList("txt", None, None, [])
    tables = sorted(urls.glob("*.parquet")) if urls.is_dir() else [urls] if suffix == ".parquet" else []
    separator = next((each for name, each in _SEPARATORS.items() if suffix.startswith(name)), None)
    if not tables and (separator is None or not urls.is_file()):
        raise InvalidInputError(f"{urls} is no list of addresses; want .tsv, .csv, .parquet (or a folder) or .txt")
    if tables:
        kind, columns = "parquet", _parquet_columns(tables[0])
    else:
        with urls.open("rb") as lines:
            header = lines.readline(1 << 20).decode("utf-8-sig", "replace")
        kind, columns = suffix[1:4], [name.strip().strip('"') for name in header.split(separator)]
    url, caption = (
        next((name for name in names if name in columns), None) for names in (_URL_COLUMNS, _CAPTION_COLUMNS)
    )
    if url is None:
        fault = f"has no column of addresses; want one of {', '.join(_URL_COLUMNS)}, found {', '.join(columns)}"
        raise InvalidInputError(f"{urls} {fault}")
    return UrlList(kind, url, caption, [] if tables else [name for name in _KEPT_COLUMNS if name in columns])


def _parquet_columns(table: Path) -> list[str]:
    """The names of a parquet file's columns, by the footer, which is in Thrift's compact form.

    Raises InvalidInputError where the file has no footer."""
    with table.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 8))
        length, mark = int.from_bytes(file.read(4), "little"), file.read(4)
        if mark != b"PAR1" or length > end - 12:
            raise InvalidInputError(f"{table} is cut or no parquet file; get it again")
        file.seek(end - 8 - length)
        footer = file.read(length)
    paths = re.finditer(rb"\x19\x18[\x01-\x7f]", footer)  # `path_in_schema`, a list of one text
    names = (footer[path.end() : path.end() + footer[path.end() - 1]] for path in paths)
    return list(dict.fromkeys(name.decode("utf-8", "replace") for name in names))


def command_for(urls: Path, out: Path) -> list[str]:
    """The command line that `download` runs. Photos are reduced, never enlarged, to a shorter side of SHORT_SIDE."""
    layout = read_layout(urls)
    kept = json.dumps(layout.kept, separators=(",", ":")) if layout.kept else None
    options: dict[str, object] = {
        "url_list": urls.absolute(),  # the tool takes a bare number for a number
        "output_folder": out.absolute(),
        "output_format": "webdataset",
        "input_format": layout.input_format,
        "image_size": SHORT_SIDE,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_quality": 95,
        "extract_exif": False,
        "number_sample_per_shard": SAMPLES_PER_SHARD,
        "processes_count": 1,
        "thread_count": 32,
        "url_col": layout.url,
        "caption_col": layout.caption,
        "save_additional_columns": kept,
    }
    return [TOOL, *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def download(urls: Path, out: Path) -> Downloaded:
    """Downloads what `urls` lists into tars under `out`, or continues; the tool's output goes to stderr.

    Raises MissingError without the tool, or when not one photo came; InvalidInputError for a list that is none and for
    an `out` of another download; InUseError while another process writes there; WorkerDiedError when the tool fails."""
    command = command_for(urls, out)
    program = shutil.which(TOOL)
    if program is None:
        raise MissingError(f"{TOOL} is not on the PATH; install it with `pip install {TOOL}` and run this again")
    options = {"longest_short_side": SHORT_SIDE, "samples_per_shard": SAMPLES_PER_SHARD}
    request = json.dumps({"urls_sha256": _digest(urls), **options}, sort_keys=True)
    _check_out(out, request)
    with only_writer(out):
        _check_out(out, request)
        write_atomic(out / REQUEST, request + "\n")
        try:
            left = subprocess.run([program, *command[1:]], check=False, stdin=subprocess.DEVNULL, stdout=2).returncode
        except OSError as error:
            raise MissingError(f"{program} cannot be run ({error.strerror}); mend it by `pip install {TOOL}`") from None
    if left:
        raise WorkerDiedError(
            f"{TOOL} ended with code {left}, see its words above; the tars it finished in {out} are kept: "
            "run the same command again"
        )
    return _count(urls, out)


def _check_out(out: Path, request: str) -> None:
    """Refuses a folder of something else: the tool goes by the numbers of its tars and would take them for its own."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InvalidInputError(f"{out} is a file; name a folder")
    path = out / REQUEST
    if path.is_file():
        if path.read_text("utf-8", "replace").strip() != request:
            raise InvalidInputError(f"{out} holds another list's photos, or of another size; name a new folder")
    elif strangers := sorted(each.name for each in out.iterdir() if not each.name.startswith(".")):
        raise InvalidInputError(f"{out} holds {strangers[0]!r} and is no download; name a new folder")


def _digest(urls: Path) -> str:
    """Of a file its content; of a folder, which may hold hundreds of gigabytes, names and sizes."""
    if urls.is_file():
        return sha256_file(urls)
    listed = sorted((path.name, path.stat().st_size) for path in urls.glob("*.parquet"))
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _count(urls: Path, out: Path) -> Downloaded:
    """The sums of the tool's statistics, which it writes after each finished tar. MissingError without one photo."""
    counts: list[tuple[int, int]] = []
    for path in sorted(out.glob("*_stats.json")):
        try:
            stats = json.loads(path.read_bytes())
            counts.append((int(stats["count"]), int(stats["successes"])))
        except (ValueError, KeyError, TypeError):
            raise InvalidInputError(f"{path} is not the tool's; delete it and run the same command again") from None
    addresses, photos = (sum(count[which] for count in counts) for which in (0, 1))
    if not photos:
        raise MissingError(
            f"none of the {addresses} addresses in {urls} gave a photo; is there a network? "
            f"The tool's reasons are in {out}/*_stats.json: delete {out} and run the same command again"
        )
    return Downloaded(out, len(counts), addresses, photos)
