"""Laws of the local describer, through transformers' own classes: a tiny random Qwen2.5-VL that is saved and loaded."""

import json
import shutil

import numpy as np
import pytest
import torch

from refine_control.annotation.describer import IMAGE_TOKEN, MODEL_TYPE, TEMPLATE, load_describer
from refine_control.errors import InvalidInputError, MissingError
from refine_control.models.hub import revision
from refine_control.records import Request

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN]
NEW_TOKENS = 6


def tokenizer():
    """All bytes and a few merges, as Qwen's: whatever is asked can be written."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    made = Qwen2Tokenizer({piece: number for number, piece in enumerate(pieces)}, [("t", "h"), ("th", "e")])
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL, "<|video_pad|>"]})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen2.5-VL of width 32 with large random weights, so that its words depend on what it sees."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    out, words = tmp_path_factory.mktemp("qwen") / "tiny", tokenizer()
    number = words.get_vocab()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": len(words), "rope_parameters": rope, "initializer_range": 0.5}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1], "initializer_range": 0.5}
    text |= {"bos_token_id": None, "eos_token_id": number["<|im_end|>"]}
    torch.manual_seed(5)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number[IMAGE_TOKEN],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(out)
    words.save_pretrained(out)
    Qwen2VLImageProcessorPil().save_pretrained(out)
    # as the published one: what it says of sampling must not count
    (out / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 3.0, "repetition_penalty": 1.05})
    )
    return out


@pytest.fixture(scope="module")
def describer(folder):
    return load_describer(folder, device="cpu", batch_size=4, max_new_tokens=NEW_TOKENS)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Coarse stripes of two colours: a random network takes note of them, noise it averages away."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 3), np.uint8)
    return colours[(np.arange(height)[:, None] + np.zeros(width, int)) // 20 % 2]


REQUESTS = [
    Request((picture(60, 90, 0), picture(30, 30, 1)), "what is in the line?"),
    Request((picture(90, 60, 2),), "what?"),
    Request((picture(28, 200, 3), picture(100, 28, 4), picture(56, 56, 5)), "the three: " + "word " * 20),
    Request((picture(60, 90, 0), picture(30, 30, 6)), "what is in the line?"),
    Request((picture(64, 64, 7),), "été 日本 ?"),
]


def test_a_batch_answers_as_its_rows_do_alone(describer):
    together = describer.answer(REQUESTS)
    assert together == [describer.answer([request])[0] for request in REQUESTS]
    assert together == describer.answer(REQUESTS[::-1])[::-1]  # other neighbours, other batches
    assert len(set(together)) == len(REQUESTS)  # questions that differ only in a picture among them
    assert all(together)
    assert describer.answer([]) == []


def out_of_memory(monkeypatch, describer, *, above: int, tokens: int = 10_000) -> None:
    """The model runs out of memory for batches of more than `above` questions, or of more than `tokens` tokens."""
    generate = describer.model.generate

    def limited(**inputs):
        if len(inputs["input_ids"]) > above or inputs["input_ids"].shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(describer.model, "generate", limited)


def test_memory_for_single_questions_suffices(describer, monkeypatch):
    expected = describer.answer(REQUESTS)
    out_of_memory(monkeypatch, describer, above=1)
    assert describer.answer(REQUESTS) == expected


def test_a_picture_on_which_the_model_fails_costs_itself(describer, monkeypatch):
    expected = describer.answer(REQUESTS)
    prepare = describer.prepare

    def processor_error(requests):
        if any(request.pictures[0].shape[0] == 64 for request in requests):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return prepare(requests)

    monkeypatch.setattr(describer, "prepare", processor_error)
    answers = describer.answer(REQUESTS)
    assert answers[:4] == expected[:4]
    assert "aspect ratio" in answers[4].why
    assert answers[4].ends_run is None
    out_of_memory(monkeypatch, describer, above=1, tokens=describer.prepare(REQUESTS[:4]).input_ids.shape[1] - 1)
    answers = describer.answer(REQUESTS[:4])
    assert [isinstance(answer, str) for answer in answers] == [True, True, False, True]
    assert "out of memory" in answers[2].why


def test_a_model_that_fails_on_any_picture_ends_the_run(describer, monkeypatch):
    out_of_memory(monkeypatch, describer, above=0)
    with pytest.raises(InvalidInputError, match="not even with one small picture"):
        describer.answer(REQUESTS)
    monkeypatch.setattr(describer.model, "generate", None)
    with pytest.raises(TypeError):
        describer.answer(REQUESTS)


def test_padding_is_on_the_left_and_every_picture_has_its_tokens(describer):
    inputs = describer.prepare(REQUESTS)
    assert (inputs.attention_mask.diff(dim=1) >= 0).all()
    assert inputs.attention_mask[:, -1].all()
    assert not inputs.attention_mask.all()
    # 28 pixels are one merged patch; sides are rounded to them, and 56 x 56 pixels are the least
    counts = [[2 * 3, 2 * 2], [3 * 2], [1 * 7, 4 * 1, 2 * 2], [2 * 3, 2 * 2], [2 * 2]]
    assert inputs.mm_token_type_ids.sum(1).tolist() == [sum(of_request) for of_request in counts]
    assert inputs.image_grid_thw.prod(1).tolist() == [4 * count for of_request in counts for count in of_request]
    assert len(inputs.pixel_values) == 4 * sum(map(sum, counts))
    for ids, of_request in zip(inputs.input_ids, counts, strict=True):
        text = describer.tokenizer.decode(ids)
        runs = [part.partition("<|vision_end|>")[0] for part in text.split("<|vision_start|>")[1:]]
        assert runs == [IMAGE_TOKEN * count for count in of_request]
    one = inputs._replace(image_grid_thw=inputs.image_grid_thw[1:], pixel_values=inputs.pixel_values[24:])
    with pytest.raises(RuntimeError, match="mismatch"):  # and the model counts them itself
        describer.model.generate(**one._asdict())


def test_the_question_is_a_turn_of_qwens_chat(describer):
    ids = describer.prepare(REQUESTS[1:2]).input_ids[0]
    assert describer.tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{IMAGE_TOKEN * 6}<|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert describer.tokenizer.chat_template is None


def test_the_tokenizers_own_template_goes_first(copied, describer):
    words = describer.tokenizer.__class__.from_pretrained(copied)
    words.chat_template = TEMPLATE.replace("You are a helpful assistant.", "Be brief.")
    words.save_pretrained(copied)
    ids = load_describer(copied, "cpu").prepare(REQUESTS[:1]).input_ids[0]
    assert "Be brief." in words.decode(ids)
    words.chat_template = "{{ messages[0]['role'] }}"  # of a model without eyes
    words.save_pretrained(copied)
    with pytest.raises(InvalidInputError, match="0 of 2 pictures"):
        load_describer(copied, "cpu").answer(REQUESTS[:1])


def test_answers_are_greedy_and_end_where_the_turn_ends(describer, monkeypatch):
    inputs = describer.prepare(REQUESTS[:2])
    with torch.inference_mode():
        tokens = describer.model.generate(**inputs._asdict())[:, inputs.input_ids.shape[1] :]
        logits = describer.model(**inputs._asdict()).logits[:, -1]
    assert tokens.shape == (2, NEW_TOKENS)
    assert torch.equal(tokens[:, 0], logits.argmax(-1))
    end = describer.tokenizer.get_vocab()["<|im_end|>"]
    head = describer.model.lm_head
    biased = torch.zeros_like(logits[0])
    biased[end] = 1e6
    monkeypatch.setattr(head, "forward", lambda hidden: torch.nn.functional.linear(hidden, head.weight, biased))
    assert describer.answer(REQUESTS[:2]) == ["", ""]


def test_the_name_tells_weights_apart(folder, copied, describer, tmp_path):
    assert describer.name == f"tiny@{revision(folder)}"
    assert revision(copied) == revision(folder)
    file = copied / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    assert revision(copied) != revision(folder)
    snapshot = tmp_path / "models--Q--q" / "snapshots" / "0123456789abcdef0123"
    snapshot.mkdir(parents=True)
    assert revision(snapshot) == "0123456789ab"


def test_what_cannot_be_loaded_is_said_in_a_sentence(copied, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(MissingError, match="hf download Qwen/no-such"):
        load_describer("Qwen/no-such")
    with pytest.raises(InvalidInputError, match="no model folder"):
        load_describer(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match=r"no config\.json"):
        load_describer(tmp_path)
    weights = copied / "model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    whole = weights.read_bytes()
    save_file({key: value for key, value in tensors.items() if key != name}, weights, {"format": "pt"})
    with pytest.raises(InvalidInputError, match="disagree"):
        load_describer(copied)
    weights.write_bytes(whole[:-100])
    with pytest.raises(InvalidInputError, match="cannot be loaded"):
        load_describer(copied)
    weights.unlink()
    with pytest.raises(MissingError, match="hf download"):
        load_describer(copied)
    weights.write_bytes(whole)
    (copied / "preprocessor_config.json").rename(tmp_path / "kept")
    with pytest.raises(MissingError, match="preprocessor_config"):
        load_describer(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    with pytest.raises(InvalidInputError, match=f"not a '{MODEL_TYPE}'"):
        load_describer(copied)
    (copied / "config.json").write_text("[1]")
    with pytest.raises(InvalidInputError, match="does not hold a JSON object"):
        load_describer(copied)


def test_a_foreign_tokenizer_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"image_token_id": config["image_token_id"] - 1}))
    with pytest.raises(InvalidInputError, match="the tokenizer that belongs"):
        load_describer(copied, "cpu")
