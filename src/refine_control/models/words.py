"""What of a prompt a model does not read: words outside a closed vocabulary, and text beyond its encoders' tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

_SHOWN_WORDS, _SHOWN_LETTERS = 8, 60


def words(prompt: str) -> list[str]:
    """Lower-case words of a prompt, punctuation dropped."""
    return "".join(c if c.isalnum() else " " for c in prompt.lower()).split()


def unknown_words(prompts: Sequence[str], vocabulary: Collection[str]) -> tuple[list[str], float]:
    """Distinct words outside the vocabulary, most frequent first, and their share of all words (0 to 1)."""
    counts = Counter(word for prompt in prompts for word in words(prompt))
    unknown = Counter({word: n for word, n in counts.items() if word not in vocabulary})
    return [word for word, _ in unknown.most_common()], unknown.total() / max(1, counts.total())


def only_known(prompt: str, vocabulary: Collection[str]) -> str:
    """The prompt unchanged where every word is known, else its known words in order."""
    every = words(prompt)
    known = [word for word in every if word in vocabulary]
    return prompt if len(known) == len(every) else " ".join(known)


def unknown_words_warning(prompts: Sequence[str], vocabulary: Collection[str]) -> str | None:
    """A sentence that lists the words of the prompts that a model ignores; None where it knows all of them."""
    unknown, share = unknown_words(prompts, vocabulary)
    if not unknown:
        return None
    listed = ", ".join(repr(word) for word in unknown[:_SHOWN_WORDS]) + (" ..." if len(unknown) > _SHOWN_WORDS else "")
    return (
        f"this model has a closed vocabulary without {len(unknown)} words of the prompts, {100 * share:.0f} % of all "
        f"their words: {listed}; they are ignored"
    )


def cut_text(tokenizer: Any, prompts: Sequence[str], limit: int) -> dict[str, str]:
    """What lies beyond `limit` tokens, special ones included, by prompt; prompts that fit are left out."""
    cut, fast = {}, tokenizer.is_fast
    for prompt in prompts:
        tokens = tokenizer(prompt, return_offsets_mapping=fast)
        if len(ids := tokens["input_ids"]) > limit:
            start = tokens["offset_mapping"][limit - 1][0] if fast else 0
            cut[prompt] = prompt[start:] if fast else tokenizer.decode(ids[limit - 1 : -1])
    return cut


def cut_warnings(encoders: Sequence[tuple[str, Any, int]], prompts: Sequence[str]) -> list[str]:
    """Sentences that say which text of the prompts is cut, and where: one for encoders that cut alike.

    `encoders` are (name, tokenizer, tokens that it reads)."""
    alike: dict[tuple[int, tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for name, tokenizer, limit in encoders:
        if cut := cut_text(tokenizer, prompts, limit):
            alike.setdefault((limit, tuple(cut), tuple(cut.values())), []).append(name)
    return [
        f"{len(cut)} of {len(prompts)} prompts are longer than the {limit} tokens of {' and '.join(names)}; the end is "
        f"cut off: {_shortened(lost[0])!r} of {_shortened(cut[0])!r}" + (" and so on" if len(cut) > 1 else "")
        for (limit, cut, lost), names in alike.items()
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_LETTERS else text[:_SHOWN_LETTERS] + "..."
