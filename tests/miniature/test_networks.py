"""The tokenizer knows every word as one token, and the longest prompt fits."""

from itertools import product

import pytest
import torch

from refine_control.miniature.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    MAX_TOKENS,
    SHAPES,
    WORDS,
    global_prompt,
    local_prompt,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return tiny_backbone.pipeline.tokenizer


def test_every_word_is_one_token_of_its_own(tokenizer):
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in WORDS]
    assert [len(i) for i in ids] == [1] * len(WORDS)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len({i[0] for i in ids} | special) == len(WORDS) + 3
    assert len(tokenizer) > max(i[0] for i in ids)


def test_the_marks_are_those_that_the_text_encoders_look_for(tokenizer, tiny_backbone):
    for encoder in tiny_backbone.text_encoders:
        assert (encoder.config.bos_token_id, encoder.config.eos_token_id) == (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
        assert encoder.config.vocab_size == len(tokenizer)


def test_the_longest_prompt_fits_with_its_end_mark(tokenizer):
    for background in range(len(BACKGROUNDS)):
        prompt = global_prompt([(1, 2), (0, 0), (7, 5)], background)
        ids = tokenizer(prompt).input_ids
        assert len(ids) <= MAX_TOKENS == tokenizer.model_max_length
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids


def test_the_comma_is_a_word(tokenizer):
    comma = tokenizer(",", add_special_tokens=False).input_ids
    assert tokenizer("a red circle, a blue ring", add_special_tokens=False).input_ids.count(comma[0]) == 1


def test_prompts_differ_in_their_tokens(tokenizer):
    prompts = [local_prompt(c, s) for c, s in product(range(len(COLOURS)), range(len(SHAPES)))]
    assert len({tuple(tokenizer(p).input_ids) for p in prompts}) == len(prompts)


@pytest.mark.parametrize("prompt", ["a zebra", "Ünïcödé ☃", "", "red" * 200, "an elephant " * 90])
def test_strange_prompts_are_encoded(tiny_backbone, prompt):
    embeds, pooled = tiny_backbone.encode_prompts([prompt])
    assert embeds.shape == (1, MAX_TOKENS, 64)
    assert pooled.shape == (1, 64)
    assert bool(torch.isfinite(embeds).all())


def test_an_unknown_word_is_not_a_known_one(tokenizer):
    assert tokenizer("zebra", add_special_tokens=False).input_ids.count(tokenizer.unk_token_id) >= 1


def test_the_pooled_embedding_depends_on_the_last_word(tiny_backbone):
    _, pooled = tiny_backbone.encode_prompts(["a red circle", "a red ring"])
    assert not torch.allclose(pooled[0], pooled[1], atol=1e-4)
