"""`generate`: what each ControlNet is shown of a picture of the user, how it is sampled, and what is refused."""

import sys

import numpy as np
import pytest
from diffusers import StableDiffusion3ControlNetInpaintingPipeline
from PIL import Image

from refine_control.cli import app as cli
from refine_control.conditions import depth
from refine_control.conditions.condition import find_condition
from refine_control.config import SamplerConfig, StudentCard
from refine_control.errors import InvalidInputError
from refine_control.models import loading
from refine_control.models.backbone import Backbone
from refine_control.models.controlnet import for_condition
from refine_control.models.loading import save_controlnet
from refine_control.pipeline import files as pipeline
from refine_control.pipeline.files import generate_file, inpaint_file

ONE = SamplerConfig(num_inference_steps=1, guidance_scale=1.0)
WORDS = "a red circle on a gray background"


@pytest.fixture(scope="module")
def networks(tiny_backbone, tiny_student, tmp_path_factory):
    """Folders by the condition of their ControlNet; `unsaid` does not say it, `canny` has a card."""
    root = tmp_path_factory.mktemp("networks")
    sampler = SamplerConfig(num_inference_steps=3, guidance_scale=1.0, conditioning_scale=0.7, sigmas="even")
    card = StudentCard(sampling=sampler, most_steps=4, distilled_guidance=1.0)
    for number, kind in enumerate(("canny", "lowres", "depth", "edit", "unsaid")):
        network = for_condition(tiny_student(2 + number, seed=number), kind, tiny_backbone.vae)
        if kind == "unsaid":
            network.register_to_config(condition=None)
        more = {"card": card, "backbone": tiny_backbone} if kind == "canny" else {}
        save_controlnet(network, root / kind, 24, **more)
    save_controlnet(tiny_student(2), root / "inpaint", 24)
    return root


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A wide photograph, its middle square, and the same without colour."""
    folder = tmp_path_factory.mktemp("photo")
    square = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    square[10:40, 20:50] = 200, 30, 30
    wide = np.concatenate([np.zeros((64, 20, 3), np.uint8), square, np.zeros((64, 20, 3), np.uint8)], axis=1)
    Image.fromarray(wide).save(folder / "a.png")
    Image.fromarray(wide).convert("L").save(folder / "grey.png")
    return folder / "a.png", square, folder / "grey.png"


@pytest.fixture
def painted(monkeypatch, tiny_backbone):
    """The arguments of `paint`, on the tiny backbone."""
    calls, paint = [], pipeline.paint

    def around(_model, controlnet=None, device="cpu"):
        parts = {**tiny_backbone.pipeline.components, "controlnet": controlnet}
        return Backbone(StableDiffusion3ControlNetInpaintingPipeline(**parts), max_sequence_length=0)

    def recorded(backbone, controlnet, shown, prompts, sampler, *, others=()):
        calls.append((shown, sampler, list(others)))
        return paint(backbone, controlnet, shown, prompts, sampler, others=others)

    monkeypatch.setattr(loading, "load_backbone", around)
    monkeypatch.setattr(pipeline, "paint", recorded)
    return calls


def generate(networks, out, *controls, **more):
    given = [(str(networks / kind), path) for kind, path in controls]
    return generate_file(given, WORDS, out, **{"sampler": ONE, **more})


@pytest.mark.parametrize("kind", ["canny", "lowres"])
def test_a_condition_is_prepared_of_the_middle_of_the_photograph(networks, photo, painted, tmp_path, kind):
    out = generate(networks, tmp_path / "out.png", (kind, photo[0]))
    (shown, _, others), prepare = painted[0], find_condition(kind).prepare
    np.testing.assert_array_equal(shown.pictures[0], prepare(photo[1]))
    assert (shown.masks, others) == (None, [])
    assert Image.open(out).size == (64, 64)
    grey = np.asarray(Image.open(photo[2]).convert("RGB"))[:, 20:84]
    generate(networks, tmp_path / "out.png", (kind, photo[2]), prepared=True)
    np.testing.assert_array_equal(painted[1][0].pictures[0], grey)


@pytest.mark.parametrize(("kind", "picture"), [("depth", 2), ("edit", 0), ("unsaid", 0)])
def test_a_condition_without_preparation_is_given(networks, photo, painted, tmp_path, kind, picture):
    generate(networks, tmp_path / "out.png", (kind, photo[picture]))
    given = np.asarray(Image.open(photo[picture]).convert("RGB"))[:, 20:84]
    np.testing.assert_array_equal(painted[0][0].pictures[0], given)


def test_a_model_makes_the_pictures_that_it_can(networks, photo, painted, tmp_path, monkeypatch):
    record = depth.CONDITION
    fake = record.__class__(**{**vars(record), "network": lambda model: lambda image: image // 2 + len(model)})
    monkeypatch.setattr(depth, "CONDITION", fake)
    find_condition.cache_clear()
    try:
        generate(networks, tmp_path / "out.png", ("lowres", photo[0]), ("depth", photo[0]), preparer="four")
    finally:
        find_condition.cache_clear()
    np.testing.assert_array_equal(painted[0][2][0].seen.pictures[0], photo[1] // 2 + 4)
    for more in ({"preparer": "four"}, {"preparer": "four", "prepared": True}):
        with pytest.raises(InvalidInputError, match="is to be made by the model four"):
            generate(networks, tmp_path / "out.png", ("lowres" if len(more) == 1 else "depth", photo[2]), **more)


def test_several_paint_together_each_with_a_scale_of_its_own(networks, photo, painted, tmp_path):
    two = ("lowres", photo[0]), ("canny", photo[0])
    out = tmp_path / "out.png"
    for scales in ((), (0.4,), (0.4, 0.6)):
        generate(networks, out, *two, scales=scales)
    used = [(sampler.conditioning_scale, others[0].scale) for _, sampler, others in painted]
    assert used == [(ONE.conditioning_scale, 0.7), (0.4, 0.4), (0.4, 0.6)]
    together = np.asarray(Image.open(out)).astype(int)
    generate(networks, out, two[0], scales=[0.4])
    assert np.abs(together - np.asarray(Image.open(out))).max() > 1
    with pytest.raises(InvalidInputError, match="3 conditioning scales for 2 ControlNets"):
        generate(networks, out, *two, scales=(1, 1, 1))


def call(monkeypatch, *words):
    """`main` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["refine-control", "generate", *words])
    try:
        return cli.main()
    except SystemExit as left:
        return left.code or 0


def test_the_command_line_samples_as_the_first_card_says(networks, photo, painted, tmp_path, monkeypatch, capsys):
    controls = [f"--control={networks / kind}={photo[0]}" for kind in ("canny", "edit")]
    words = [*controls, "--prompt", WORDS, "--out", f"{tmp_path}/out.webp", "--seed", "3"]
    assert call(monkeypatch, *words) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out.webp\n"
    ((_, sampler, (other,)),) = painted
    assert (sampler.num_inference_steps, sampler.sigmas, sampler.conditioning_scale, sampler.seed) == (
        3,
        "even",
        0.7,
        3,
    )
    assert other.scale == 1  # the miniature's
    assert call(monkeypatch, *words, "--dry-run", "--conditioning-scale", "0.5") == 0
    assert "scales: [0.5]" in capsys.readouterr().out


def test_misuse_is_a_sentence(networks, photo, painted, tmp_path, monkeypatch, capsys):
    out, mask = tmp_path / "out.png", tmp_path / "mask.png"
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), ((16, 16), (36, 36)))).save(mask)
    colour = "is in colour, and the condition depth is a depth map"
    for kind, path, said in (
        ("inpaint", photo[0], "inpaint reads a mask; use it by `refine-control inpaint`"),
        ("depth", photo[0], colour),
        ("canny", tmp_path / "none.png", r"no file at .*none\.png"),
        ("canny", networks / "canny" / "config.json", r"config\.json: .*unreadable"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            generate(networks, out, (kind, path))
    with pytest.raises(InvalidInputError, match="condition canny is white edges on black"):
        generate(networks, out, ("canny", photo[0]), prepared=True)
    with pytest.raises(InvalidInputError, match="inpaint reads a mask"):
        generate(networks, out, ("canny", photo[0]), ("inpaint", photo[0]))
    with pytest.raises(InvalidInputError, match="canny is shown no mask; use it by `refine-control generate`"):
        inpaint_file(photo[0], mask, WORDS, out, controlnet=str(networks / "canny"))
    for control in ("canny", "=a.png", "canny="):
        assert call(monkeypatch, "--control", control, "--prompt", WORDS, "--out", str(out)) == 2
        assert f"--control {control}: write CONTROLNET=PICTURE" in capsys.readouterr().err
    assert not painted
    assert not out.exists()


def test_a_transformer_of_its_own_is_used_alone(networks, photo, painted, tmp_path, tiny_backbone, tiny_student):
    network = for_condition(tiny_student(2), "canny", tiny_backbone.vae)
    save_controlnet(network, tmp_path / "whole", 24, own_transformer=tiny_backbone.transformer)
    for order in (1, -1):
        controls = [(str(tmp_path / "whole"), photo[0]), (str(networks / "edit"), photo[0])][::order]
        with pytest.raises(InvalidInputError, match="whole was trained together with a transformer"):
            generate_file(controls, WORDS, tmp_path / "out.png", sampler=ONE)
