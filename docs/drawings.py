"""The two drawings of the docs: `python docs/drawings.py` writes alignment.svg and data_flow.svg beside this file.

The alignment is computed from `refine_control.injection`, so the drawing cannot disagree with the code.
`tests/test_docs.py` fails when a committed SVG is not the one that this file writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from refine_control.injection import groups, layer_of_site

NUM_BLOCKS = 24
"""Joint blocks of SD3-medium; the last one takes no residual."""
TEACHER_LAYERS, STUDENT_LAYERS = 23, 12

# An SVG in an <img> follows the reader's system colours, not those of the page, so each drawing brings its background.
STYLE = """<style>
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1f2328; }
  .mono { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #0550ae; }
  .small { font-size: 12px; fill: #59636e; }
  .bold { font-weight: 600; }
  .middle { text-anchor: middle; }
  .page { fill: #ffffff; stroke: #d1d9e0; }
  .box { fill: #f6f8fa; stroke: #59636e; }
  .even { fill: #ddf4ff; stroke: #0969da; }
  .odd { fill: #fff1e5; stroke: #bc4c00; }
  .none { fill: none; stroke: #59636e; stroke-dasharray: 3 3; }
  .line { fill: none; stroke: #59636e; stroke-width: 1.3; }
  .even-line { fill: none; stroke: #0969da; stroke-width: 1.3; }
  .odd-line { fill: none; stroke: #bc4c00; stroke-width: 1.3; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .mono { fill: #79c0ff; }
    .small { fill: #9198a1; }
    .page { fill: #0d1117; stroke: #3d444d; }
    .box { fill: #151b23; stroke: #9198a1; }
    .even { fill: #0c2d4d; stroke: #4493f8; }
    .odd { fill: #4a2208; stroke: #f0883e; }
    .none, .line { stroke: #9198a1; }
    .even-line { stroke: #4493f8; }
    .odd-line { stroke: #f0883e; }
  }
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
  <path d="M0 0 L8 4 L0 8 z" fill="#7d8590"/></marker></defs>"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A complete SVG document with a background, a title for screen readers and `parts` in their order."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img"><title>{title}</title>'
    )
    page = f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    return "\n".join([head, STYLE, page, *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """One line of text at (x, y), with `kind` as its CSS classes."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rounded rectangle."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'


def alignment() -> str:
    """Which residual of the teacher and of the student feeds which block, and the groups of Eq. 5."""
    edge, left, column, size = 24, 128, 35, 28
    teacher_y, block_y, student_y = 56, 156, 256

    def x(number: int) -> int:
        return left + column * number

    parts = [text(edge, 32, "Which residual feeds which block of SD3-medium (numbered from 0)", "bold")]
    for y, name, count in (
        (teacher_y, "teacher", f"{TEACHER_LAYERS} layers"),
        (block_y, "transformer", f"{NUM_BLOCKS} blocks"),
        (student_y, "student", f"{STUDENT_LAYERS} layers"),
    ):
        parts += [text(edge, y + 11, name, "bold"), text(edge, y + 27, count, "small")]
    teacher = layer_of_site(TEACHER_LAYERS, NUM_BLOCKS - 1)
    student = groups(STUDENT_LAYERS, NUM_BLOCKS - 1)
    kinds = {site: ("even", "odd")[layer % 2] for layer, sites in enumerate(student) for site in sites}
    for site, layer in enumerate(teacher):
        centre = x(site) + size / 2
        parts += [
            box(x(layer), teacher_y, size, size, kinds[site]),
            text(x(layer) + size / 2, teacher_y + 19, str(layer), "middle"),
            f'<path class="{kinds[site]}-line" d="M{x(layer) + size / 2:g} {teacher_y + size} '
            f'L{centre:g} {block_y}" marker-end="url(#tip)"/>',
        ]
    for block in range(NUM_BLOCKS):
        parts += [
            box(x(block), block_y, size, size, "box" if block in kinds else "none"),
            text(x(block) + size / 2, block_y + 19, str(block), "middle"),
        ]
    for layer, sites in enumerate(student):
        kind = ("even", "odd")[layer % 2]
        start, width = x(sites[0]), x(sites[-1]) + size - x(sites[0])
        middle = start + width / 2
        parts += [
            box(start, student_y, width, size, kind),
            text(middle, student_y + 19, str(layer), "middle"),
            text(middle, student_y + size + 17, f"G{layer}", "small middle"),
        ]
        parts += [
            f'<path class="{kind}-line" d="M{middle:g} {student_y} L{x(site) + size / 2:g} {block_y + size}" '
            'marker-end="url(#tip)"/>'
            for site in sites
        ]
    last = student[-1]
    alone = f"Layer {STUDENT_LAYERS - 1} feeds block {last[0]} alone; " if len(last) == 1 else ""
    notes = [
        "Teacher layer i feeds block i; student layer j feeds every block of its group Gj. One colour is one group.",
        "Eq. 5 compares what a group injects in total: |Gj| times the residual of student layer j with the sum of the "
        "teacher's residuals in Gj.",
        f"{alone}block {NUM_BLOCKS - 1} takes no residual.",
    ]
    parts += [text(edge, 334 + 20 * line, note, "small") for line, note in enumerate(notes)]
    return svg(x(NUM_BLOCKS - 1) + size + edge, 390, "Alignment of student and teacher", parts)


class Station(NamedTuple):
    """One state of the data: what it is, the command that makes it, and the folder of the code."""

    title: str
    command: str
    folder: str


STATIONS = [
    Station("photographs", "data download", "photos"),
    Station("masks", "data annotate --masks", "annotation"),
    Station("prompts", "data annotate --prompts", "annotation"),
    Station("human review", "data review", "annotation"),
    Station("shards of 3 roles", "data build", "photos"),
    Station("cached latents", "cache", "cache"),
    Station("batch", "train", "training"),
    Station("losses, Eq. 1 to 6", "train", "losses.py"),
    Station("checkpoint, student", "train", "training"),
    Station("inpainted images", "inpaint, evaluate", "pipeline"),
    Station("metrics", "evaluate", "metrics"),
    Station("tables, report", "evaluate, reproduce", "study"),
]
"""In the order in which data pass. Each station reads one place and writes another."""


def data_flow() -> str:
    """The way of the data from a photograph to a table, four stations in a line."""
    width, height, gap, left, top, line_height, in_line = 196, 78, 34, 24, 52, 120, 4
    parts = [text(left, 30, "The data, the command and the folder in src/refine_control", "bold")]
    for number, station in enumerate(STATIONS):
        line, place = divmod(number, in_line)
        x, y = left + place * (width + gap), top + line * line_height
        parts += [
            box(x, y, width, height, ("even", "odd", "even")[line]),
            text(x + 12, y + 24, station.title, "bold"),
            text(x + 12, y + 45, station.command, "mono"),
            text(x + 12, y + 65, station.folder, "small"),
        ]
        if number + 1 == len(STATIONS):
            break
        if place + 1 < in_line:
            path = f"M{x + width} {y + height / 2:g} H{x + width + gap - 1}"
        else:
            below = y + height + (line_height - height) / 2
            path = f"M{x + width / 2:g} {y + height} V{below:g} H{left + width / 2:g} V{y + line_height - 1}"
        parts.append(f'<path class="line" d="{path}" marker-end="url(#tip)"/>')
    lines = len(STATIONS) // in_line
    total = 2 * left + in_line * width + (in_line - 1) * gap
    return svg(total, top + (lines - 1) * line_height + height + 20, "The way of the data", parts)


DRAWINGS = {"alignment.svg": alignment, "data_flow.svg": data_flow}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (Path(__file__).parent / name).write_text(draw())
