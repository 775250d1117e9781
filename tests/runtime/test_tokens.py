"""Token ids without transformers are those of transformers, and embeddings are joined as diffusers joins them."""

import numpy as np
import pytest
from transformers import CLIPTokenizer, T5Tokenizer

from refine_control.errors import DamagedError
from refine_control.models.card import BUNDLE
from refine_control.models.words import cut_text
from refine_control.runtime.tokens import TextTokenizer, join_embeddings

PROMPTS = [
    "",
    " ",
    "a red circle",
    "A RED,  circle!",
    "naïve café — 漢字 \U0001f600 ﬁ İ",
    "a\tb\nc\u00a0d",
    "<|endoftext|> </s> <pad> tail",
    "blue star " * 60,
]


def clip_with_letters():
    """A CLIP tokenizer that reads any ASCII word letter by letter, and pads with another token than the end."""
    letters = [chr(c) for c in range(33, 127)]
    names = ["<|startoftext|>", "<|endoftext|>", "!pad", *letters, *(f"{letter}</w>" for letter in letters)]
    special = {"bos_token": names[0], "eos_token": names[1], "unk_token": names[1], "pad_token": names[2]}
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77, **special)


def t5():
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], extra_ids=0)


@pytest.mark.parametrize(
    ("make", "length"),
    [(lambda: CLIPTokenizer.from_pretrained(BUNDLE / "tokenizer"), 18), (clip_with_letters, 77), (t5, 12)],
    ids=["mini", "clip", "t5"],
)
def test_ids_are_those_of_transformers(make, length, tmp_path, save_tokenizer):
    tokenizer = make()
    ours = TextTokenizer(save_tokenizer(tokenizer, length, tmp_path / "tokenizer.json"))
    expected = tokenizer(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    assert ours.length == length
    np.testing.assert_array_equal(ours.ids(PROMPTS), expected.input_ids)
    assert ours.ids(PROMPTS).dtype == np.int64
    lost = cut_text(ours, PROMPTS, length)
    assert lost == cut_text(tokenizer, PROMPTS, length)
    assert PROMPTS[-1] in lost


def test_what_is_no_tokenizer_is_a_sentence(tmp_path, save_tokenizer):
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"broken.json is no tokenizer"):
        TextTokenizer(tmp_path / "broken.json")
    t5().backend_tokenizer.save(str(tmp_path / "unpadded.json"))
    with pytest.raises(DamagedError, match="padding length"):
        TextTokenizer(tmp_path / "unpadded.json")


def test_zeros_stand_for_a_missing_t5():
    clips = [np.full((2, 3, 4), value, np.float32) for value in (1, 2)]
    joined = join_embeddings(clips, None, 5, 10)
    assert joined.shape == (2, 8, 10)
    np.testing.assert_array_equal(joined[1, 0], [1] * 4 + [2] * 4 + [0] * 2)
    assert not joined[:, 3:].any()
    np.testing.assert_array_equal(join_embeddings(clips, np.ones((2, 5, 10), np.float32), 5, 10)[:, 3:], 1)
