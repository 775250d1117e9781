"""Closed vocabularies: which words of a prompt a small model was trained on, and which it ignores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence


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
    spoken = words(prompt)
    known = [word for word in spoken if word in vocabulary]
    return prompt if len(known) == len(spoken) else " ".join(known)
