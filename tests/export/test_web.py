"""Laws of the exported page: it paints as PyTorch does, in a browser that reaches no other host."""

import copy
import functools
import hashlib
import http.server
import io
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from PIL import Image, ImageFilter

from refine_control.config import SamplerConfig
from refine_control.errors import DamagedError, InvalidInputError, MissingError
from refine_control.export import web
from refine_control.export.format import Work, find_format
from refine_control.export.pipeline_folder import write_tokenizers
from refine_control.export.source import Source
from refine_control.miniature import scenes, vocabulary
from refine_control.pipeline.painting import make_pipeline, run_pipeline
from refine_control.randomness import derive_seed, slot_normals

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / ".venv" / f"onnxruntime-web-{web.ORT_VERSION}.tgz"
SAMPLER = SamplerConfig(num_inference_steps=4, guidance_scale=1.0, sigmas="even")


@pytest.fixture(scope="module")
def closed(work) -> Work:
    """The small export, for a model with the vocabulary of the scenes and a shifted scheduler."""
    backbone = work.source.backbone.with_transformer(work.source.backbone.transformer)
    backbone.vocabulary = frozenset(vocabulary.WORDS)
    backbone.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return replace(work, source=work.source._replace(backbone=backbone, sampler=SAMPLER))


# What is refused


def test_what_cannot_run_in_a_page_is_refused(work, closed, tmp_path):
    form = find_format("web")
    form.refuse(closed.source)
    with pytest.raises(InvalidInputError, match="tiny is for a model without a closed vocabulary"):
        form.refuse(work.source)
    controlnet = copy.copy(closed.source.controlnet)
    controlnet._internal_dict = FrozenDict(controlnet.config, condition="canny")
    with pytest.raises(InvalidInputError, match="for the condition canny"):
        form.refuse(closed.source._replace(controlnet=controlnet))
    with pytest.raises(InvalidInputError, match="leave out --separate"):
        form.write(replace(closed, separate=True), tmp_path)


# onnxruntime-web


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_the_files_of_a_package_are_checked_whether_packed_or_not(tmp_path, monkeypatch):
    files = {name: name.encode() for name in web.ORT_FILES}
    (tmp_path / "dist").mkdir()
    for name, data in files.items():
        (tmp_path / "dist" / name).write_bytes(data)
    package = packed(tmp_path / "package.tgz", {**files, "other.js": b"not taken"})
    with pytest.raises(DamagedError, match="is not that of onnxruntime-web"):
        web.write_runtime(tmp_path / "refused", package)
    monkeypatch.setattr(web, "ORT_FILES", {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    for number, given in enumerate((package, tmp_path)):
        web.write_runtime(tmp_path / f"{number}", given)
        assert {file.name: file.read_bytes() for file in (tmp_path / f"{number}").iterdir()} == files


@pytest.mark.parametrize("content", [None, b"", b"no archive", "another package", "cut"])
def test_another_package_is_refused(tmp_path, content):
    path = tmp_path / "it.tgz"
    if isinstance(content, str):
        packed(path, {"index.js": bytes(5000)})
    elif content is not None:
        path.write_bytes(content)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InvalidInputError, match=r"does not hold dist/ort.*npm pack onnxruntime-web@"):
        web.write_runtime(tmp_path / "ort", path)


@pytest.mark.parametrize(
    ("script", "reason"), [(None, "npm is not on the PATH"), ("echo no network >&2; exit 1", "no network")]
)
def test_without_npm_or_its_registry_a_sentence_says_what_to_do(tmp_path, monkeypatch, script, reason):
    if script:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match=rf"{reason}.*--ort") as refused:
        web.write_runtime(tmp_path / "ort", None)
    assert refused.value.exit_code == 69


def test_npm_is_asked_for_the_pinned_version(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\n/bin/echo "$@" > onnxruntime-web-0.tgz\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = web.fetch_package(tmp_path).read_text()
    assert asked.startswith(f"pack {web.ORT_PACKAGE} ")
    assert f"onnxruntime-web-{web.ORT_VERSION}\n" in (ROOT / "Makefile").read_text()


# Words


def test_a_prompt_is_its_words_one_after_another(closed, tmp_path):
    tokenizer = closed.source.backbone.pipeline.tokenizer
    for file in write_tokenizers(closed, tmp_path).values():
        table = web.token_table(tmp_path / file, vocabulary.WORDS)
        for prompt in PROMPTS:
            words = prompt.replace(",", " ,").split()
            ids = [i for word in words for i in table["ids"][word]][: table["length"] - 2]
            padded = [table["begin"], *ids, table["end"]]
            padded += [table["pad"]] * (table["length"] - len(padded))
            assert padded == tokenizer(prompt, padding="max_length", truncation=True).input_ids, prompt


LONG = "a red circle, a blue ring and an orange star on a gray background, a red circle"
PROMPTS = [LONG, *scenes.render(0, 0, 20).global_prompts]


# In the browser


@pytest.fixture(scope="module")
def site(closed, tmp_path_factory) -> Path:
    if not PACKAGE.is_file():
        pytest.skip(f"{PACKAGE} is missing; make browser fetches it by npm")
    folder = tmp_path_factory.mktemp("page")
    find_format("web").write(replace(closed, ort=PACKAGE), folder)
    return folder


class Silent(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def log_message(self, *_) -> None:
        self.requests.append(self.path)


@pytest.fixture
def serve() -> Iterator:
    """Starts a file server on the loopback interface -> (its address, the paths that it is asked for)."""
    servers = []

    def start(folder: Path) -> tuple[str, list[str]]:
        asked: list[str] = []
        handler = type("Handler", (Silent,), {"requests": asked})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "this test drives a browser: apt-get install chromium"
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=120_000)
        yield running
        running.close()


PIXELS = """id => {
    const canvas = document.getElementById(id), {width, height} = canvas;
    return [width, height, ...canvas.getContext("2d").getImageData(0, 0, width, height).data];
}"""


def pixels(page, canvas: str) -> np.ndarray:
    """(H, W, 4) of a canvas."""
    width, height, *values = page.evaluate(PIXELS, canvas)
    return np.array(values, np.uint8).reshape(height, width, 4)


def paint(page) -> np.ndarray:
    """The result of a click on Paint, (H, W, 3)."""
    from playwright.sync_api import expect

    page.click("#paint")
    expect(page.locator("#status")).to_contain_text("Painted in")
    return pixels(page, "result")[..., :3]


def drag(page, x0: float, y0: float, x1: float, y1: float) -> None:
    """A stroke between two places of the picture, as shares of its sides."""
    box = page.locator("#mask").bounding_box()
    place = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    page.mouse.move(*place(x0, y0))
    page.mouse.down()
    page.mouse.move(*place(x1, y1), steps=4)
    page.mouse.up()


def torch_picture(source: Source, image: np.ndarray, mask: np.ndarray, prompt: str, **sampling) -> np.ndarray:
    pipeline = make_pipeline(source.backbone, source.controlnet)
    sampler = SamplerConfig(**{**SAMPLER.model_dump(), **sampling})
    return run_pipeline(pipeline, source.backbone, image, mask, prompt, sampler)


@pytest.mark.slow
def test_the_page_paints_what_pytorch_paints_and_reaches_no_other_host(closed, site, serve, browser, tmp_path):
    from playwright.sync_api import expect

    expect.set_options(timeout=120_000)
    (here, asked), (elsewhere, leaked) = serve(site), serve(tmp_path)
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page, faults, requests = context.new_page(), [], []
    page.on("pageerror", lambda error: faults.append(error))
    context.on("request", lambda request: requests.append(request.url))
    page.goto(here)
    expect(page.locator("#paint")).to_be_enabled()
    expect(page.locator("[data-number='0']")).to_have_attribute("aria-pressed", "true")
    assert all(url.startswith((here, "blob:", "data:")) for url in requests)

    # without a network the example is painted as by PyTorch, up to rounding, and nothing else is touched
    loaded = len(asked)
    context.set_offline(True)
    image, mask = pixels(page, "picture")[..., :3], pixels(page, "mask")[..., 3] > 127
    page.fill("#prompt", "a purple star")
    page.fill("#seed", "7")
    result = paint(page)
    expected = torch_picture(closed.source, image, mask, "a purple star", seed=7)
    assert np.abs(result.astype(int) - expected)[mask].max() <= 1
    assert np.abs(image.astype(int) - expected)[mask].mean() > 20
    far = np.asarray(Image.fromarray(255 * mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(7))) == 0
    assert far.any()
    assert (result == image)[far].all()
    assert len(asked) == loaded

    # what is missing is asked for
    page.click("[data-view=draw]")
    page.fill("#prompt", "a dog")
    expect(page.locator("#ignored")).to_contain_text("dog")
    page.fill("#prompt", "dog")
    page.click("#paint")
    expect(page.locator("#status")).to_contain_text("no word of this model")
    page.click("#clear")
    page.click("#paint")
    expect(page.locator("#status")).to_contain_text("nothing to paint yet")

    # a photograph keeps its size, and what is far from the stroke
    context.set_offline(False)
    photo = np.random.default_rng(0).integers(0, 256, (13, 20, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(photo)).save(tmp_path / "photo.jpg", quality=95, exif=turned)
    page.set_input_files("#file", tmp_path / "photo.jpg")
    expect(page.locator("#status")).to_contain_text("Draw over")
    page.fill("#prompt", "a red circle")
    page.click("[data-steps='1']")
    drag(page, 0.3, 0.4, 0.4, 0.5)
    before, region, result = pixels(page, "picture")[..., :3], pixels(page, "mask")[..., 3] > 127, paint(page)
    assert before.shape == photo.shape
    assert np.abs(before.astype(int) - photo).mean() < 12  # upright; but for the JPEG
    assert (result[:, 150:] == before[:, 150:]).all()
    assert np.abs(result.astype(int) - before)[region].mean() > 20
    with page.expect_download() as saved:
        page.click("#download")
    assert (np.asarray(Image.open(saved.value.path()).convert("RGB")) == result).all()

    # neither the page nor a worker of it reaches another host
    assert page.evaluate(FETCH, elsewhere) == "refused"
    assert page.evaluate(FETCH_IN_WORKER, elsewhere) == "refused"
    assert leaked == []
    assert faults == []
    context.close()


FETCH = "url => fetch(url, {mode: 'no-cors'}).then(() => 'answered', () => 'refused')"
FETCH_IN_WORKER = f"""url => new Promise(done => {{
    const code = `({FETCH})(${{JSON.stringify(url)}}).then(postMessage)`;
    const worker = new Worker(URL.createObjectURL(new Blob([code], {{type: "text/javascript"}})), {{type: "module"}});
    worker.onmessage = ({{data}}) => done(data);
}})"""


PAINT = """async ([url, job, sampling]) => {
    const painter = window.painter ??= await (await import(url)).Painter.load();
    Object.assign(painter.about.sampling, sampling);
    return [...await painter.paint(job)];
}"""
NOISE = """async ([url, ...parts]) => {
    const noise = await import(url);
    return [noise.deriveSeed(...parts, 0).toString(), ...noise.normals(1045, ...parts, 0)];
}"""


@pytest.mark.slow
def test_every_sampler_and_size_of_pytorch_is_that_of_the_page(closed, site, serve, browser):
    here, _ = serve(site)
    page = browser.new_page()
    page.goto(here)
    for parts in ((7, "initial noise"), (2**53 - 1, "fresh noise", 3)):
        seed, *values = page.evaluate(NOISE, [here + "noise.js", *parts])
        assert int(seed) == derive_seed(*parts, 0)
        assert np.abs(np.array(values) - slot_normals((1045,), [0], *parts).numpy()[0]).max() < 1e-5
    scene, pictures = scenes.render(3, 0, 1), []
    image, mask = scene.images[0, :48].numpy(), scene.masks[0, :48].numpy()
    job = {"pixels": image.ravel().tolist(), "mask": mask.astype(int).ravel().tolist(), "width": 64, "height": 48}
    for sampling in (
        {"sigmas": "even", "guidance_scale": 1.0, "stochastic": False},
        {"sigmas": "scheduler", "guidance_scale": 3.0, "stochastic": False},
        {"sigmas": "even", "guidance_scale": 1.0, "stochastic": True},
    ):
        for prompt in ("a red circle", LONG, "Red DOG, cross"):
            asked = {**job, "prompt": prompt, "steps": 3, "seed": 5}
            painted = np.array(page.evaluate(PAINT, [here + "painter.js", asked, sampling])).reshape(image.shape)
            expected = torch_picture(closed.source, image, mask, prompt, num_inference_steps=3, seed=5, **sampling)
            assert np.abs(painted - expected).max() <= 1, (sampling, prompt)
            assert all((expected != other).any() for other in pictures)
            pictures.append(expected)


@pytest.mark.slow
def test_on_a_phone_a_finger_draws_and_nothing_is_cut_off(site, serve, browser):
    from playwright.sync_api import expect

    expect.set_options(timeout=120_000)
    here, _ = serve(site)
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.goto(here)
    expect(page.locator("#paint")).to_be_enabled()
    page.click("[data-number='1']")
    expect(page.locator("[data-number='1']")).to_have_attribute("aria-pressed", "true")
    page.click("#clear")
    assert not pixels(page, "mask").any()
    page.locator("#mask").tap(position={"x": 100, "y": 120})
    assert pixels(page, "mask")[..., 3].any()
    assert paint(page).shape == (64, 64, 3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
