"""The page: choose a photograph, paint over a part of it, say what belongs there, and compare what the models paint."""

from __future__ import annotations

import html
import io
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import isgeneratorfunction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from gradio.components.image_editor import EditorData
from PIL import Image

from refine_control.app.examples import Example
from refine_control.app.offers import Offer
from refine_control.app.views import BRUSH, OPACITY, SIDE, layer, propose, read_strokes, read_upload, view
from refine_control.errors import InvalidInputError, RefineControlError
from refine_control.photos.decode import Original
from refine_control.pipeline.inpainter import check_prompt

logger = logging.getLogger(__name__)
MOST_LETTERS = 1000
MOST_STEPS = 50
MOST_REGIONS = 8
MOST_PAINTED = 12
"""Pictures that a visit's history shows."""
MOST_WAITING = 20
"""Requests in the queue; more are refused."""
MOST_SEED = 2**31 - 1
_VISITS = 200
"""Visits whose state is kept."""
_LAYERS = 4
_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "painting", "api_visibility": "private"}
TITLE = "refine-control"
_INTRO = f"""# {TITLE}
Choose a photograph, paint over a part of it, and say what belongs there. Pictures stay on the machine that serves this
page, and are deleted when it ends."""


class _LeftError(Exception):
    """The visitor closed the page."""


class Painted(NamedTuple):
    """A picture of this visit."""

    file: str
    caption: str


def _sentences(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors become a sentence on the page; what is a bug is described in the log."""

    @contextmanager
    def sentences() -> Iterator[None]:
        try:
            yield
        except RefineControlError as error:
            text = str(error)
        except _LeftError:
            text = "the page was closed"
        except MemoryError:
            text = "out of memory; choose a smaller photograph"
        except Exception:
            logger.exception("the page failed")
            text = "this failed; the log of the server says why"
        else:
            return
        raise gr.Error(html.escape(text[:1].upper() + text[1:], quote=False) + ".", print_exception=False)

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with sentences():
            return function(*arguments, **named)

    @wraps(function)
    def generate(*arguments: Any, **named: Any) -> Any:
        with sentences():
            yield from function(*arguments, **named)

    return generate if isgeneratorfunction(function) else call


class _Warnings(logging.Handler):
    """Sentences that this package logs while a picture is painted, shown on the page."""

    def emit(self, record: logging.LogRecord) -> None:
        gr.Warning(html.escape(record.getMessage(), quote=False))

    def __enter__(self) -> None:
        self.setLevel(logging.WARNING)
        logging.getLogger("refine_control").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("refine_control").removeHandler(self)


class Page:
    """What the page's controls do."""

    def __init__(self, offers: Mapping[str, Offer], examples: Sequence[Example], folder: Path) -> None:
        self.offers, self.examples, self.folder = offers, examples, folder
        self.gone: OrderedDict[str, None] = OrderedDict()

    def upload(self, file: str) -> list[Any]:
        """A photograph -> editor, file, gallery of regions, masks of regions."""
        return [_drawn(view(read_upload(Path(file)).shown)), file, gr.Gallery(visible=False), []]

    def example(self, event: gr.SelectData) -> list[Any]:
        """A click on an example -> as `upload`, and the prompt."""
        file, mask, prompt = self.examples[event.index]
        return [_drawn(view(read_upload(file).shown), mask), str(file), gr.Gallery(visible=False), [], prompt]

    def find(self, file: str | None) -> list[Any]:
        """A photograph's file -> gallery of regions, and their masks."""
        if not (regions := propose(view(_chosen(file).shown), MOST_REGIONS)):
            raise InvalidInputError("no region stands out in this photograph; paint over the part that is to change")
        shown = gr.Gallery([region.shown for region in regions], visible=True, selected_index=None)
        return [shown, [region.mask for region in regions]]

    def choose(self, file: str | None, masks: list[bytes], event: gr.SelectData) -> dict[str, Any]:
        """A click on a region -> editor with the region painted over."""
        with Image.open(io.BytesIO(masks[event.index])) as mask:
            return _drawn(view(_chosen(file).shown), np.asarray(mask))

    def leave(self, request: gr.Request) -> None:
        """Ends the painting of a visitor who closed the page."""
        self.gone[str(request.session_hash)] = None
        while len(self.gone) > _VISITS:
            self.gone.popitem(last=False)

    def paint(
        self,
        layers: list[Path],
        file: str | None,
        prompt: str,
        names: list[str],
        seed: float,
        steps: float,
        history: list[Painted],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio passes it
    ) -> Iterator[list[Any]]:
        """Yields after each model: for each offer its slot, picture, facts and download; then gallery and history."""
        self.gone.pop(str(request.session_hash), None)  # a phone that slept is back
        photograph = _chosen(file)
        number = _check(prompt, names, seed)
        mask, before = read_strokes(layers, photograph.header.size), view(photograph.shown)
        slots = {name: [gr.Column(visible=name in names), None, "", None] for name in self.offers}
        for name in [each for each in self.offers if each in names]:

            def advance(done: int, total: int, note: str = "", name: str = name) -> None:
                if str(request.session_hash) in self.gone:
                    raise _LeftError
                progress((done, total), desc=f"{name} paints {note}", unit="steps")

            inpainter = self.offers[name].inpainter
            with _Warnings():
                sampler = inpainter.sampler(num_inference_steps=int(steps) or None, seed=number)
                result = inpainter.repaint(photograph, mask, prompt, sampler, progress=advance)
            path = result.save(_new_folder(self.folder) / "painted.png")
            cost = self.offers[name].cost(sampler)
            facts = (
                f"**{result.seconds:.2f} s** · {cost.network_calls} network calls · {cost.gflops_picture:,.1f} GFLOP"
            )
            slots[name][1:] = [(before, view(result.image)), facts, str(path)]
            history = [Painted(str(path), f"{prompt.strip()[:60]} · {name} · seed {number}"), *history][:MOST_PAINTED]
            yield [*chain.from_iterable(slots.values()), gr.Gallery(history, visible=True), history]


def _drawn(shown: Image.Image, mask: np.ndarray | None = None) -> dict[str, Any]:
    """What the editor shows: a view, and strokes where a mask (h, w) bool is proposed."""
    layers = [] if mask is None else [layer(mask)]
    return {"background": np.asarray(shown), "layers": layers, "composite": None}


def _chosen(file: str | None) -> Original:
    if file is None:
        raise InvalidInputError("there is no photograph; upload one or click an example")
    return read_upload(Path(file))


def _check(prompt: str, names: list[str], seed: float | None) -> int:
    """The seed. Raises InvalidInputError for what the page cannot paint."""
    if len(prompt) > MOST_LETTERS:
        raise InvalidInputError(f"the prompt has {len(prompt):,} characters; write at most {MOST_LETTERS:,}")
    if not names:
        raise InvalidInputError("no model is chosen; tick one or several")
    if not 0 <= (seed or 0) <= MOST_SEED:
        raise InvalidInputError(f"the seed {seed:g} is not between 0 and {MOST_SEED}")
    check_prompt(prompt)
    return int(seed or 0)


def _new_folder(parent: Path) -> Path:
    """A folder whose name nobody can guess: who knows the address of a picture can see it."""
    folder = parent / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder


def theme() -> gr.themes.Base:
    """Fonts of the visitor's system, so that no font is fetched."""
    fonts, mono = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    return gr.themes.Soft(primary_hue="rose", neutral_hue="slate", font=fonts, font_mono=mono)


def build(offers: Mapping[str, Offer], examples: Sequence[Example], folder: Path) -> gr.Blocks:
    """The page for these models; what it paints goes into `folder`, where gradio keeps uploads."""
    page = Page(offers, examples, folder)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        file, masks, history = gr.State(None), gr.State([]), gr.State([])
        gr.Markdown(_INTRO, elem_id="intro")
        with gr.Row(elem_id="work"):
            with gr.Column(scale=5, min_width=320):
                editor = _editor()
                with gr.Row():
                    upload = gr.UploadButton("Upload a photograph", file_types=["image"])
                    find = gr.Button("Propose regions")
                regions = _thumbnails("regions")
            with gr.Column(scale=4, min_width=320):
                scenes = [Image.open(example.file) for example in examples]
                gr.Markdown("Upload a photograph, or click an example and then Paint:", visible=bool(scenes))
                shown = _thumbnails("examples", list(map(view, scenes)))
                prompt = gr.Textbox(label="What belongs in the painted part?", placeholder="a red star", lines=1)
                names = gr.CheckboxGroup(list(offers), value=[next(iter(offers))], label="Paint with")
                with gr.Accordion("Settings", open=False):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED)
                    steps = gr.Slider(0, MOST_STEPS, 0, step=1, label="Steps (0: as each model was made for)")
                go = gr.Button("Paint", variant="primary", elem_id="paint", size="lg")
        with gr.Row():
            slots = list(chain.from_iterable(map(_slot, offers)))
        painted = gr.Gallery(show_label=False, visible=False, elem_id="painted", interactive=False)
        inputs, outputs = [editor, file, prompt, names, seed, steps, history], [*slots, painted, history]
        for event in (go.click, prompt.submit):
            event(_sentences(page.paint), inputs, outputs, **_QUEUE)
        photograph = [editor, file, regions, masks]
        upload.upload(_sentences(page.upload), upload, photograph, **_QUEUE)
        shown.select(_sentences(page.example), None, [*photograph, prompt], **_QUEUE)
        find.click(_sentences(page.find), file, [regions, masks], **_QUEUE)
        regions.select(_sentences(page.choose), [file, masks], editor, **_QUEUE)
        blocks.unload(page.leave)
    blocks.state_session_capacity = _VISITS
    return blocks.queue(max_size=MOST_WAITING, api_open=False)


def _editor() -> gr.ImageEditor:
    brush = gr.Brush(default_size=32, colors=[f"rgba({', '.join(map(str, BRUSH))}, {OPACITY})"], color_mode="fixed")
    options: dict[str, Any] = {
        "sources": None,
        "transforms": None,
        "layers": False,
        "buttons": [],
        "canvas_size": (SIDE, SIDE),
    }
    editor = gr.ImageEditor(show_label=False, brush=brush, elem_id="photo", height=520, format="png", **options)
    editor.preprocess = _layers  # type: ignore[method-assign] - gradio's would decode pictures of any size
    return editor


def _layers(drawing: EditorData | None) -> list[Path]:
    """Files of the strokes that an editor sends; gradio has checked that they are uploads."""
    layers = drawing.layers if drawing is not None else []
    return [Path(each.path) for each in layers[:_LAYERS] if each is not None]


def _thumbnails(name: str, pictures: Sequence[Image.Image] = ()) -> gr.Gallery:
    """A row of pictures to click."""
    options: dict[str, Any] = {
        "columns": 4,
        "height": "auto",
        "allow_preview": False,
        "buttons": [],
        "object_fit": "contain",
    }
    return gr.Gallery(
        list(pictures), elem_id=name, show_label=False, visible=bool(pictures), interactive=False, **options
    )


def _slot(name: str) -> list[Any]:
    """Where what one model painted is shown: column, slider, facts and download."""
    with gr.Column(visible=False, min_width=300) as column:
        slider = gr.ImageSlider(
            label=f"{name}: before and after",
            format="png",
            interactive=False,
            slider_position=25,
            buttons=["fullscreen"],
        )
        facts = gr.Markdown(elem_classes="facts")
        download = gr.DownloadButton("Download the PNG", size="sm")
    return [column, slider, facts, download]
