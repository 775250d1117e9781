"""What of a prompt is not read, and that a warning says so once, in every verb that encodes."""

import logging

import pytest

from refine_control.miniature.vocabulary import WORDS
from refine_control.models.backbone import Backbone
from refine_control.models.words import cut_text, only_known, unknown_words

LONG = "a red circle " * 7 + "and a blue ring"


@pytest.fixture
def backbone(tiny_backbone):
    return Backbone(tiny_backbone.pipeline, 0, frozenset(WORDS))


def warnings(caplog, call):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="refine_control"):
        call()
    return [record.getMessage() for record in caplog.records if record.name.startswith("refine_control")]


def test_words_outside_a_closed_vocabulary():
    assert unknown_words(["a dog, a dog", "red"], {"a", "red"}) == (["dog"], 0.4)
    assert only_known("A red dog!", {"a", "red"}) == "a red"
    assert only_known("A red!", {"a", "red"}) == "A red!"


@pytest.mark.parametrize(("count", "cut"), [(16, ""), (17, "circle"), (19, "red red circle")])
def test_the_text_beyond_the_last_token_is_what_is_cut(tiny_backbone, count, cut):
    prompt = " ".join(["red"] * (count - 1) + ["circle"])
    assert cut_text(tiny_backbone.pipeline.tokenizer, [prompt], 18) == ({prompt: cut} if cut else {})


def test_the_cut_is_what_the_encoders_do_not_read(backbone):
    kept = LONG.removesuffix(cut_text(backbone.pipeline.tokenizer, [LONG], 18)[LONG])
    longer, shorter = (backbone.encode_prompts([prompt])[0] for prompt in (LONG, kept))
    assert kept != LONG
    assert (longer == shorter).all()
    assert not (longer == backbone.encode_prompts([kept.rsplit(maxsplit=1)[0]])[0]).all()


def test_encoding_warns_of_a_prompt_once(backbone, caplog):
    first = warnings(caplog, lambda: backbone.encode_prompts([LONG, "a red circle"]))
    assert len(first) == 1
    assert "1 of 2 prompts" in first[0]
    assert "18 tokens" in first[0]
    assert "text_encoder and text_encoder_2" in first[0]
    assert "blue ring" in first[0]
    assert warnings(caplog, lambda: backbone.encode_prompts([LONG])) == []
    [unknown] = warnings(caplog, lambda: backbone.encode_prompts(["a red zeppelin"]))
    assert "'zeppelin'" in unknown


def test_batches_of_long_prompts_do_not_fill_the_screen(backbone, caplog):
    said = warnings(caplog, lambda: [backbone.warn_unread([f"{LONG} {n}"]) for n in range(20)])
    assert 0 < len(said) < 10
    assert "no more" in said[-1]


def test_short_and_empty_prompts_are_read_in_silence(backbone, caplog):
    assert warnings(caplog, lambda: backbone.encode_prompts(["", "a red circle"])) == []
