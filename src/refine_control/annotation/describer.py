"""Qwen2.5-VL in this process, by transformers: questions with pictures -> the model's words, greedily and in batches.

transformers' own processor of Qwen2.5-VL demands torchvision for videos; here its parts are put together without: the
PIL image processor, the tokenizer with its chat template, and each picture's `<|image_pad|>` repeated to the number of
its merged patches. Sequences are padded on the left, so an answer does not depend on its neighbours in the batch.
"""

# h w pixels of a picture, B batch, T tokens of a question, P patches of all pictures, D values of a patch

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from refine_control.annotation.refusals import CONTROL, Unanswered, fault_of_picture
from refine_control.errors import InvalidInputError, MissingError, RefineControlError
from refine_control.models.components import read_json
from refine_control.models.devices import best_device
from refine_control.models.hub import folder_of, revision
from refine_control.records import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

MODEL_TYPE = "qwen2_5_vl"
IMAGE_TOKEN = "<|image_pad|>"
PICTURE = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + PICTURE + "{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's turns, for a tokenizer that was saved without its chat template."""
ENDS = ("<|im_end|>", "<|endoftext|>")
_EXAMPLE = "Qwen/Qwen2.5-VL-7B-Instruct"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


class Inputs(NamedTuple):
    """What the model takes, for B questions."""

    input_ids: torch.Tensor
    """(B, T) int64, padded on the left."""
    attention_mask: torch.Tensor
    """(B, T) int64, 0 = padding."""
    mm_token_type_ids: torch.Tensor
    """(B, T) int64, 1 = a merged patch of a picture."""
    pixel_values: torch.Tensor
    """(P, D) float32."""
    image_grid_thw: torch.Tensor
    """(pictures, 3) int64: frames (1), rows and columns of patches."""


class Describer:
    """A loaded Qwen2.5-VL. `name` is model and revision."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        name: str,
        batch_size: int = 8,
        max_new_tokens: int = 64,
    ) -> None:
        from transformers import GenerationConfig

        self.model, self.tokenizer, self.image_processor, self.name = model.eval(), tokenizer, image_processor, name
        self.batch_size = batch_size
        self.image_token_id = _token_id(tokenizer, IMAGE_TOKEN, name)
        if model.config.image_token_id != self.image_token_id:
            raise InvalidInputError(
                f"{name}: the tokenizer's {IMAGE_TOKEN} is {self.image_token_id}, the model's is "
                f"{model.config.image_token_id}; use the tokenizer that belongs to these weights"
            )
        ends = [_token_id(tokenizer, token, name) for token in ENDS]
        # the published one samples and penalises repetition, over the padding too: no batch would equal its rows
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[-1]
        )

    def answer(self, requests: Sequence[Request]) -> list[str | Unanswered]:
        """The model's text for each request, in their order; Unanswered for a picture on which the model fails.

        Raises InvalidInputError where the memory does not suffice for any picture."""
        answers: list[str | Unanswered] = []
        for start in range(0, len(requests), self.batch_size):
            answers += self._answer_batch(requests[start : start + self.batch_size])
        return answers

    def _answer_batch(self, requests: Sequence[Request]) -> Sequence[str | Unanswered]:
        """The answers of a batch; where it fails, of its questions one by one."""
        try:
            return self._generate(requests)
        except RefineControlError:
            raise
        except Exception as error:  # transformers raises nearly anything at a picture that it cannot process
            failure = error.with_traceback(None)  # whose frames hold tensors
        if len(requests) > 1:
            return [answer for request in requests for answer in self._answer_batch([request])]
        return [Unanswered(fault_of_picture(failure, self.name, lambda: self._generate([CONTROL])))]

    def _generate(self, requests: Sequence[Request]) -> list[str]:
        inputs = self.prepare(requests)
        with torch.inference_mode():
            placed = {name: value.to(self.model.device) for name, value in inputs._asdict().items()}
            # transformers binds `generate` to a protocol that its own models do not fulfil
            tokens = self.model.generate(**placed)  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(tokens, torch.Tensor)  # generate gives a record only when asked for scores
        return self.tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    def prepare(self, requests: Sequence[Request]) -> Inputs:
        """B questions, each with at least one picture -> what the model takes, on the CPU."""
        pictures = [picture for request in requests for picture in request.pictures]
        if not all(request.pictures for request in requests):
            raise InvalidInputError("a question without a picture is none for a vision-language model")
        seen = self.image_processor(images=pictures, return_tensors="pt")
        merged = seen["image_grid_thw"].prod(1) // self.image_processor.merge_size**2
        counts = iter(merged.tolist())
        texts = [self._text(request, [next(counts) for _ in request.pictures]) for request in requests]
        tokens = self.tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        is_image = tokens["input_ids"] == self.image_token_id
        assert int(is_image.sum()) == int(merged.sum())  # no question of ours holds a special token
        ids, pixels = (tokens["input_ids"], tokens["attention_mask"]), (seen["pixel_values"], seen["image_grid_thw"])
        return Inputs(*ids, is_image.long(), *pixels)

    def _text(self, request: Request, counts: Sequence[int]) -> str:
        """The question as one turn of a chat, with a token for each merged patch; `counts`: of each picture."""
        content = [*({"type": "image"} for _ in request.pictures), {"type": "text", "text": request.text}]
        turn = [{"role": "user", "content": content}]
        template = None if self.tokenizer.chat_template else TEMPLATE  # None: the tokenizer's own
        text = self.tokenizer.apply_chat_template(
            turn, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        parts = str(text).split(IMAGE_TOKEN)
        if len(parts) != len(counts) + 1:
            raise InvalidInputError(
                f"{self.name}: the chat template of its tokenizer shows {len(parts) - 1} of {len(counts)} pictures; "
                "save the tokenizer of Qwen2.5-VL beside the weights"
            )
        return "".join(part + IMAGE_TOKEN * count for part, count in zip(parts, [*counts, 0], strict=True))


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str, name: str) -> int:
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise InvalidInputError(f"{name}: the tokenizer does not know {token}; it is not that of Qwen2.5-VL")
    return number


def load_describer(
    name_or_folder: str | Path,
    device: str | torch.device | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 64,
) -> Describer:
    """Loads a Qwen2.5-VL from a folder or by its hub id, strictly.

    `device`: by default the GPU where there is one, on which it computes in bfloat16; on the CPU in float32. Raises
    MissingError for weights that are missing, InvalidInputError where they are no Qwen2.5-VL or disagree with their
    config."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = folder_of(name_or_folder, _FILES, f"a folder with Qwen2.5-VL, or a hub id like {_EXAMPLE}")
    _check(folder)
    device = torch.device(device or best_device())
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )  # a pair, as asked by the last argument; transformers annotates the model alone
    except Exception as error:  # transformers, tokenizers and safetensors share no error; all mean a folder at fault
        why = " ".join(str(error).split())[:200]
        raise InvalidInputError(f"{folder} cannot be loaded as Qwen2.5-VL ({why}); copy or save it again") from error
    wrong = sorted(
        str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loading[kind]
    )
    if wrong:
        raise InvalidInputError(
            f"the weights in {folder} disagree with its config.json in {len(wrong)} tensors, first {wrong[0]}; use the "
            "config that belongs to these weights"
        )
    name = f"{Path(name_or_folder).name}@{revision(folder)}"
    return Describer(model.to(device), tokenizer, image_processor, name, batch_size, max_new_tokens)


def _check(folder: Path) -> None:
    """Refuses a folder without weights, or of another model."""
    if not (folder / "config.json").is_file():
        raise InvalidInputError(f"{folder} has no config.json; name a folder with Qwen2.5-VL")
    kind = read_json(folder / "config.json", "copy the model again").get("model_type")
    if kind != MODEL_TYPE:
        raise InvalidInputError(f"{folder} holds a {kind!r}, not a {MODEL_TYPE!r}; name a folder with Qwen2.5-VL")
    if not any(folder.glob("*.safetensors")):
        raise MissingError(
            f"{folder} has no weights (*.safetensors); fetch them, for example with `hf download {_EXAMPLE}`"
        )
    if not (folder / "preprocessor_config.json").is_file():
        raise MissingError(f"{folder} has no preprocessor_config.json; fetch it from where the weights come from")
