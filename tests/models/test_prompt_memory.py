"""Encoding on demand: what is remembered is not encoded again, and what is encoded depends on nothing else."""

import torch

from refine_control.models.prompt_memory import PromptMemory


class Encoder:
    """Answers with the length of a prompt, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts):
        self.asked.append(list(prompts))
        lengths = torch.tensor([float(len(p)) for p in prompts], dtype=torch.float64)
        return lengths[:, None, None].expand(-1, 2, 3), lengths[:, None]


def test_a_prompt_is_encoded_alone_and_once():
    encoder = Encoder()
    memory = PromptMemory(encoder)
    embeds, pooled = memory(["a", "", "abc", "a"])
    assert (embeds.shape, pooled.shape, embeds.dtype) == ((4, 2, 3), (4, 1), torch.float32)
    assert pooled[:, 0].tolist() == embeds[:, 1, 2].tolist() == [1, 0, 3, 1]
    memory(["abc", "a"])
    assert encoder.asked == [["a"], [""], ["abc"]]


def test_the_least_recent_goes_first():
    encoder = Encoder()
    memory = PromptMemory(encoder, limit=2 * (2 * 3 + 1) * 4)
    for prompts in (["a"], ["bb"], ["a"], ["ccc"]):
        memory(prompts)
    assert list(memory.known) == ["a", "ccc"]
    memory(["bb"])
    assert encoder.asked == [["a"], ["bb"], ["ccc"], ["bb"]]
    assert len(PromptMemory(encoder, limit=1)(["long", "longer"])[0]) == 2


def test_it_says_what_the_model_says(tiny_backbone):
    prompts = ["a red circle", "", "a blue ring", "a red circle"]
    memory = PromptMemory(tiny_backbone.encode_prompts)
    for given in (prompts, prompts[::-1]):
        for row, prompt in enumerate(given):
            for own, theirs in zip(memory(given), tiny_backbone.encode_prompts([prompt]), strict=True):
                assert torch.equal(own[row], theirs[0])
    together = tiny_backbone.encode_prompts(prompts)
    for own, theirs in zip(memory(prompts), together, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)
