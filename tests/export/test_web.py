"""Laws of the exported page: it paints as PyTorch does in a browser that reaches no other host; its parts are checked."""

import functools
import http.server
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from refine_control.config import SamplerConfig
from refine_control.errors import DamagedError, InvalidInputError, MissingError
from refine_control.export import web
from refine_control.miniature import scenes, vocabulary
from refine_control.randomness import derive_seed, slot_normals

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / ".venv" / f"onnxruntime-web-{web.ORT_VERSION}.tgz"
PARTS = ("denoiser", "vae_encoder", "vae_decoder", "text_encoder", "text_encoder_2")


# What is refused


@pytest.mark.parametrize(
    ("words", "condition", "parts", "sentence"),
    [
        (None, "inpaint", PARTS, "without a closed vocabulary"),
        (["a"], "inpaint", (*PARTS, "text_encoder_3"), "without a closed vocabulary"),
        (["a"], "canny", PARTS, "for the condition canny"),
        (["a"], "inpaint", ("controlnet", "transformer"), "leave out --separate"),
    ],
)
def test_what_cannot_run_in_a_page_is_refused(words, condition, parts, sentence):
    with pytest.raises(InvalidInputError, match=sentence):
        web.check_page("x", words, condition, parts)


def test_a_student_of_the_mini_model_is_not_refused():
    web.check_page("edge", vocabulary.WORDS, "inpaint", PARTS)


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
        web.runtime_files(package)
    sums = {name: web.hashlib.sha256(data).hexdigest() for name, data in files.items()}
    monkeypatch.setattr(web, "ORT_FILES", sums)
    assert web.runtime_files(package) == web.runtime_files(tmp_path) == files


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
        web.runtime_files(path)


@pytest.mark.parametrize(("script", "reason"), [(None, "npm is not on the PATH"), ("echo no network >&2; exit 1", "no network")])
def test_without_npm_or_its_registry_a_sentence_says_what_to_do(tmp_path, monkeypatch, script, reason):
    if script:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match=rf"{reason}.*--ort") as refused:
        web.runtime_files(None)
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


def test_a_prompt_is_its_words_one_after_another(folder):
    from transformers import CLIPTokenizer

    from refine_control.models.card import BUNDLE

    tokenizer = CLIPTokenizer.from_pretrained(BUNDLE / "tokenizer")
    for table in json.loads((folder / "page.json").read_bytes())["tables"].values():
        for prompt in PROMPTS:
            ids = [table["begin"], *(i for word in prompt.replace(",", " ,").split() for i in table["ids"][word])]
            ids = [*ids[: table["length"] - 1], table["end"]]
            ids += [table["pad"]] * (table["length"] - len(ids))
            assert ids == tokenizer(prompt, padding="max_length", truncation=True).input_ids, prompt


LONG = "a red circle, a blue ring and an orange star on a gray background, a red circle"
PROMPTS = [LONG, *scenes.render(0, 0, 20).global_prompts]


# In the browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    graphs, out = Path("/tmp/webgraphs/site"), tmp_path_factory.mktemp("page") / "site"
    shutil.copytree(graphs, out, ignore=shutil.ignore_patterns("ort", "examples", "*.js"))
    web.write_page(out, "The edge student paints here", PACKAGE)
    return out


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


def torch_picture(image: np.ndarray, mask: np.ndarray, prompt: str, steps: int, seed: int) -> np.ndarray:
    from refine_control.models.card import choose_sampler
    from refine_control.models.loading import load_painter
    from refine_control.pipeline.painting import make_pipeline, run_pipeline

    backbone, controlnet = load_painter("mini", "edge", "cpu")
    sampler: SamplerConfig = choose_sampler("mini", "edge", {"num_inference_steps": steps, "seed": seed})
    return run_pipeline(make_pipeline(backbone, controlnet), backbone, image, mask, prompt, sampler)


@pytest.mark.slow
def test_the_page_paints_what_pytorch_paints_and_reaches_no_other_host(folder, serve, browser, tmp_path):
    from playwright.sync_api import expect

    expect.set_options(timeout=120_000)
    (here, asked), (elsewhere, leaked) = serve(folder), serve(tmp_path)
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page, faults, requests = context.new_page(), [], []
    page.on("pageerror", lambda error: faults.append(error))
    context.on("request", lambda request: requests.append(request.url))
    page.goto(here)
    expect(page.locator("#paint")).to_be_enabled()
    expect(page.locator("[data-number='0']")).to_have_attribute("aria-pressed", "true")
    assert all(url.startswith((here, "blob:", "data:")) for url in requests)

    # the noise, the words and the noise levels are Python's
    check_modules(page, here)

    # without a network the example is painted as by PyTorch, up to rounding, and nothing else is touched
    loaded = len(asked)
    context.set_offline(True)
    image, mask = pixels(page, "picture")[..., :3], pixels(page, "mask")[..., 3] > 127
    page.fill("#prompt", "a purple star")
    page.fill("#seed", "7")
    result = paint(page)
    expected = torch_picture(image, mask, "a purple star", 4, 7)
    difference = np.abs(result.astype(int) - expected)[mask]
    assert difference.max() <= 1
    assert np.abs(expected.astype(int) - image)[mask].mean() > 20
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


def check_modules(page, here: str) -> None:
    noise = "([url, ...given]) => import(url).then(m => [m.deriveSeed(...given, 0).toString(), ...m.normals(1045, ...given, 0)])"
    for parts in ((7, "initial noise"), (2**53 - 1, "fresh noise", 3)):
        seed, *values = page.evaluate(noise, [here + "noise.js", *parts])
        assert int(seed) == derive_seed(*parts, 0)
        assert np.abs(np.array(values) - slot_normals((1045,), [0], *parts).numpy()[0]).max() < 1e-5


@pytest.mark.slow
def test_on_a_phone_a_finger_draws_and_nothing_is_cut_off(folder, serve, browser):
    from playwright.sync_api import expect

    expect.set_options(timeout=120_000)
    here, _ = serve(folder)
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
