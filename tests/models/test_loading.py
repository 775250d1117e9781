"""What is on disk is what you get, or a sentence says why not."""

import json
import logging

import pytest
import torch
from diffusers import SD3ControlNetModel
from safetensors.torch import load_file, save_file

from refine_control.errors import InvalidInputError, MissingError
from refine_control.models.loading import WEIGHTS, load_backbone, load_controlnet, resolve, save_controlnet

LAST = "transformer_blocks.2.attn.to_q.weight"


@pytest.fixture
def saved(tmp_path, tiny_student):
    save_controlnet(tiny_student(3), tmp_path / "student", 24, kind="student")
    return tmp_path / "student"


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def reconfigure(folder, **changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_there_and_back_and_by_stock_diffusers(saved, tiny_student):
    wanted = tiny_student(3).state_dict()
    loaded, stock = load_controlnet(saved), SD3ControlNetModel.from_pretrained(saved)
    assert same(loaded.state_dict(), wanted)
    assert same(stock.state_dict(), wanted)
    assert not loaded.training
    assert json.loads((saved / "manifest.json").read_text())["kind"] == "student"


def test_half_precision_weights_arrive_in_full(saved, tiny_student):
    rewrite(saved, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    loaded = load_controlnet(saved).state_dict()
    assert all(v.dtype == torch.float32 for v in loaded.values())
    assert torch.equal(loaded[LAST], tiny_student(3).state_dict()[LAST].half().float())


def test_a_config_without_the_extra_channel_gets_one(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["extra_conditioning_channels"]
    (saved / "config.json").write_text(json.dumps(config))
    assert load_controlnet(saved).config["extra_conditioning_channels"] == 1


def test_the_fixed_table_of_positions_may_be_missing(saved, tiny_student):
    rewrite(saved, lambda tensors: tensors.pop("pos_embed.pos_embed"))
    assert same(load_controlnet(saved).state_dict(), tiny_student(3).state_dict())


@pytest.mark.parametrize(("layers", "word"), [(2, "holds unknown"), (4, "lacks")])
def test_another_layer_count_is_refused(saved, layers, word):
    reconfigure(saved, num_layers=layers)
    with pytest.raises(InvalidInputError, match=word):
        load_controlnet(saved)


def test_stock_diffusers_does_not_mind_another_layer_count(saved):
    reconfigure(saved, num_layers=2)
    assert len(SD3ControlNetModel.from_pretrained(saved).transformer_blocks) == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop(LAST), "lacks 1 tensors, first transformer_blocks.2"),
        (lambda t: t.update(novel=torch.zeros(1)), "holds unknown 1 tensors, first novel"),
        (lambda t: t.update({LAST: torch.zeros(31, 32)}), "has another shape for 1 tensors"),
        (lambda t: t.update({LAST: torch.full((32, 32), float("nan"))}), "not finite"),
        (lambda t: t[LAST].view(-1)[7:8].fill_(float("inf")), "not finite"),
        (lambda t: t.update({"pos_embed.pos_embed": torch.zeros(1, 4, 32)}), "another shape"),
        (lambda t: t["pos_embed.pos_embed"].fill_(float("nan")), "not finite"),
    ],
    ids=["missing", "extra", "reshaped", "nan", "one inf", "positions reshaped", "positions nan"],
)
def test_weights_that_disagree_are_refused(saved, change, word):
    rewrite(saved, change)
    with pytest.raises(InvalidInputError, match=word):
        load_controlnet(saved)


def test_a_cut_file_is_refused(saved):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidInputError, match="copy the weights again"):
        load_controlnet(saved)


def test_pickled_weights_are_not_read(saved):
    (saved / WEIGHTS).rename(saved / "diffusion_pytorch_model.bin")
    with pytest.raises(InvalidInputError, match="only safetensors"):
        load_controlnet(saved)


def test_a_folder_without_a_readable_config_is_refused(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(InvalidInputError, match="not JSON"):
        load_controlnet(saved)
    (saved / "config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"no config\.json"):
        load_controlnet(saved)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "none", "a/b/c"])
def test_a_missing_folder_is_refused(name):
    with pytest.raises(InvalidInputError, match="no model folder"):
        resolve(name)


def test_a_hub_id_that_cannot_be_had_is_missing():
    with pytest.raises(MissingError, match="the hub did not give it"):
        load_controlnet("nobody-at-all/no-such-model")


def test_a_pipeline_folder_without_an_index_is_refused(saved):
    with pytest.raises(InvalidInputError, match=r"no model_index\.json"):
        load_backbone(saved)


@pytest.mark.parametrize(("layers", "warned"), [(5, True), (12, False)])
def test_a_student_that_stock_would_inject_shifted_is_warned_of(tmp_path, tiny_student, caplog, layers, warned):
    with caplog.at_level(logging.WARNING, logger="refine_control"):
        save_controlnet(tiny_student(layers), tmp_path / "student", 24)
    assert any("shifted" in record.message for record in caplog.records) == warned
