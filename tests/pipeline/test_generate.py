"""`generate`, and `inpaint` with further ControlNets: what each is shown of a picture of the user, how it is sampled,
and what is refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import StableDiffusion3ControlNetInpaintingPipeline
from PIL import Image

from refine_control.cli import app as cli
from refine_control.conditions import depth
from refine_control.conditions.condition import Shown, find_condition
from refine_control.config import SamplerConfig, StudentCard
from refine_control.errors import InvalidInputError
from refine_control.models import loading
from refine_control.models.backbone import Backbone
from refine_control.models.controlnet import Control, for_condition
from refine_control.models.loading import load_controlnet, save_controlnet
from refine_control.pipeline import files as pipeline
from refine_control.pipeline import painting
from refine_control.pipeline.files import generate_file, inpaint_file
from refine_control.pipeline.framing import Frame
from refine_control.pipeline.inpainter import Inpainter, TorchPainter
from refine_control.pipeline.together import Reading, name_conditions

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

    def around(_model, controlnet=None, **_):
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


def test_a_controlnet_that_does_not_say_its_condition_takes_the_one_that_is_named(networks, photo, painted, tmp_path):
    generate(networks, tmp_path / "out.png", ("unsaid", photo[0]), ("lowres", photo[0]), conditions=["canny", "lowres"])
    np.testing.assert_array_equal(painted[0][0].pictures[0], find_condition("canny").prepare(photo[1]))
    for conditions, said in (
        (["canny"], "1 conditions for 2 ControlNets; give one for each"),
        (["canny", "depth"], "lowres is for lowres, and the samples are of the condition depth"),
        (["inpaint", "lowres"], "unsaid is for another condition, of 0 channels"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            generate(networks, tmp_path / "out.png", ("unsaid", photo[0]), ("lowres", photo[0]), conditions=conditions)


def test_edges_may_be_meant_where_a_single_stream_does_not_say_its_condition(caplog):
    for config, warned in (
        ({"joint_attention_dim": None}, True),
        ({"joint_attention_dim": None, "condition": "depth"}, False),
        ({"joint_attention_dim": 64}, False),
    ):
        caplog.clear()
        name_conditions([SimpleNamespace(config=config)], ["here"], [])
        assert ("of here does not say its condition; if it was trained on canny" in caplog.text) == warned


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


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A photograph, another of its size, and a region of two holes that do not fit into one frame."""
    folder = tmp_path_factory.mktemp("wide")
    pictures = np.random.default_rng(1).integers(0, 256, (2, 64, 160, 3), dtype=np.uint8)
    region = np.zeros((64, 160), bool)
    region[20:44, 20:40] = region[10:30, 130:150] = True
    for name, picture in {"photo": pictures[0], "other": pictures[1], "mask": region}.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(("layers", "steps"), [(23, 1), (2, 2)])
def test_further_controlnets_add_their_residuals_in_every_frame_of_inpaint(
    networks, wide, tiny_backbone, tiny_student, layers, steps
):
    """The first one reads the photograph without its holes, the second one the same frame of its whole picture."""
    first = tiny_backbone.pipeline.controlnet if layers == 23 else tiny_student(layers)
    inpainter = Inpainter(TorchPainter(tiny_backbone, first))
    files, how = (wide / "photo.png", wide / "mask.png", WORDS), {"num_inference_steps": steps, "guidance_scale": 1.0}
    controls, scales = [(networks / "lowres", wide / "other.png")], [0.9, 0.5]
    painted, alone, off = (
        np.asarray(inpainter.inpaint(*files, conditioning_scale=factors, controls=given, feather=0, **how).image)
        for factors, given in ((scales, controls), (0.9, ()), ([0.9, 0], controls))
    )
    photo, other, mask = (np.asarray(Image.open(wide / f"{name}.png")) for name in ("photo", "other", "mask"))
    hidden, second = mask > 0, load_controlnet(networks / "lowres")
    sampler = SamplerConfig(conditioning_scale=0.9, **how)
    for place in (np.s_[:, :64], np.s_[:, 96:]):
        seen = Control(second, Shown(find_condition("lowres").prepare(other[place])[None]), 0.5)
        shown = Shown(photo[place][None], hidden[place][None])
        expected = painting.paint(tiny_backbone, first, shown, [WORDS], sampler, others=[seen])[0]
        hole = hidden[place]
        assert np.abs(painted[place][hole].astype(int) - expected[hole]).max() <= 1
        assert np.abs(alone[place][hole].astype(int) - expected[hole]).max() > 5
        assert np.abs(off[place].astype(int) - alone[place]).max() <= 1
        assert np.array_equal(painted[place][~hole], photo[place][~hole])


def test_a_given_picture_is_cut_resized_and_padded_as_the_photograph_is():
    picture = np.random.default_rng(2).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    frame = Frame((10, 0, 110, 80), (50, 40), (20, 20, 60, 60))
    part = Image.fromarray(picture[:80, 10:110])
    for kind, how in (("depth", Image.Resampling.BILINEAR), ("edit", Image.Resampling.LANCZOS)):
        (seen,) = Reading(kind, True, None).of_frame(picture, frame, 16).pictures
        assert seen.shape == (48, 64, 3)
        assert np.array_equal(seen[:40, :50], np.asarray(part.resize((50, 40), how)))
        assert np.array_equal(seen[40:], seen[38:30:-1])


def call(monkeypatch, *words, verb="generate"):
    """`main` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["refine-control", verb, *words])
    try:
        return cli.main()
    except SystemExit as left:
        return left.code or 0


def inpaint_words(networks, wide, out, *more):
    files = ["--image", f"{wide}/photo.png", "--mask", f"{wide}/mask.png", "--prompt", WORDS, "--out", str(out)]
    return [*files, "--controlnet", str(networks / "inpaint"), *more]


def test_inpaint_takes_further_controlnets_by_the_command_line(networks, wide, painted, tmp_path, monkeypatch):
    calls, paint = [], painting.paint

    def recorded(*given, others, progress):
        calls.append((given[4], others))
        return paint(*given, others=others, progress=progress)

    monkeypatch.setattr(painting, "paint", recorded)
    controls = [f"--control={networks / kind}={wide}/other.png" for kind in ("canny", "edit")]
    words = inpaint_words(networks, wide, tmp_path / "out.png", *controls, "--steps", "1", "--guidance", "1")
    for scales in ([], ["0.3", "0.4", "0.5"]):
        assert call(monkeypatch, *words, *(f"--conditioning-scale={each}" for each in scales), verb="inpaint") == 0
    used = [[sampler.conditioning_scale, *(each.scale for each in others)] for sampler, others in calls[::2]]
    assert used == [[1, 0.7, 1], [0.3, 0.4, 0.5]]
    other = np.asarray(Image.open(wide / "other.png"))
    canny, edit = calls[0][1]  # the upper hole first
    assert np.array_equal(canny.seen.pictures[0], find_condition("canny").prepare(other[:, 96:]))
    assert np.array_equal(edit.seen.pictures[0], other[:, 96:])


def test_misuse_of_further_controlnets_is_a_sentence(networks, wide, photo, painted, tmp_path, monkeypatch, capsys):
    out, other = tmp_path / "out.png", f"={wide}/other.png"
    canny = f"--control={networks}/canny{other}"
    refused = {
        f"--control={networks}/canny={photo[0]}": "condition picture 104 x 64, photo 160 x 64 (",
        f"--control={networks}/canny": "write CONTROLNET=PICTURE",
        f"--control={networks}/canny={wide}/none.png": "none.png; give a picture of the photograph's size",
        f"--control={networks}/inpaint{other}": "inpaint reads a mask; use it by `refine-control inpaint`, once",
        f"--control={networks}/depth{other}": "is in colour, and the condition depth is a depth map",
        f"{canny} --preparer four": "no condition picture is to be made by the model four",
        f"{canny} --conditioning-scale 1 --conditioning-scale 1 --conditioning-scale 1": "3 conditioning scales for 2",
        f"{canny} --runtime onnx": "an exported folder paints with its own ControlNet alone; leave out --control",
        f"{canny} --size 64": "leave out --control",
        f"{canny} --image {wide} --prompt=a": "--mask is for one photograph",
        f"--dry-run --control={networks}/canny={wide}/none.png": "none.png; give a picture of the photograph's size",
        f"{canny} --condition depth": "canny is for canny, and the samples are of the condition depth",
        f"{canny} --condition canny --condition canny": "2 conditions for 1 ControlNets; give one for each",
        "--condition canny": "1 conditions for 0 ControlNets",
        "--prepared": "--prepared is about the pictures of --control",
    }
    for more, said in refused.items():
        assert call(monkeypatch, *inpaint_words(networks, wide, out, *more.split()), verb="inpaint") == 2, more
        assert said in (printed := capsys.readouterr().err), more
        assert printed.count("\n") == 1
    folder = ["--image", str(wide), "--prompt", WORDS, "--out", str(tmp_path / "out"), canny]
    assert call(monkeypatch, *folder, verb="inpaint") == 2
    assert "--control is for one photograph" in capsys.readouterr().err
    assert not out.exists()


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
    there, gone = (f"{networks / 'canny'}={path}" for path in (photo[0], tmp_path / "none.png"))
    for control, prompt, name, said in (
        (gone, WORDS, "a.png", "none.png; give a picture for each ControlNet"),
        (there, " ", "a.png", "the prompt is empty; describe the picture"),
        (there, WORDS, "a.bmp", "a.bmp ends in none of .png"),
        (there, WORDS, "a.png --condition colour", "there is no condition 'colour'; choose one of"),
    ):
        assert call(monkeypatch, "--control", control, "--prompt", prompt, "--out", *name.split(), "--dry-run") == 2
        assert said in capsys.readouterr().err
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
