"""The words of a prompt, and the tokens that a text encoder reads for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: The token that stands for all positions after the end of the prompt.
PADDING = "<padding>"

#: Words that are no concept on their own.
STOP_WORDS = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with"])
#: Letters and digits, combining accents, and inner punctuation: "l'été", "art-deco", "3.5", "1,000".
_WORD = re.compile(r"[\w\u0300-\u036f]+(?:(?:['’.\-]|(?<=\d),(?=\d))[\w\u0300-\u036f]+)*")

#: Characters [start, stop) of a prompt.
Span = tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """The tokens of an encoded prompt: its start, the prompt's own tokens, its end, and all padding as one.

    `spans` holds each token's characters [start, stop) of the prompt, (0, 0) for special tokens.
    """

    prompt: str
    texts: tuple[str, ...]
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def own(self) -> list[int]:
        """Indices of the prompt's own tokens, without the special ones."""
        return [index for index, (start, stop) in enumerate(self.spans) if start < stop]

    def places(self, start: int, stop: int) -> list[int]:
        """Indices of the tokens that overlap the characters [start, stop) of the prompt."""
        return [index for index, (first, last) in enumerate(self.spans) if first < stop and last > start]

    def find(self, concept: str) -> list[int]:
        """Indices of the tokens of a word or phrase, over all its occurrences.

        Raises ValueError if it is not in the prompt.
        """
        return sorted({index for span in find_occurrences(self.prompt, concept) for index in self.places(*span)})


def word_spans(prompt: str) -> list[Span]:
    """The characters [start, stop) of every word of a prompt, in order."""
    return [match.span() for match in _WORD.finditer(prompt)]


def find_occurrences(prompt: str, concept: str) -> list[Span]:
    """The characters [start, stop) of each occurrence of a word or phrase: complete words, in any case and spacing.

    Raises ValueError if there is none.
    """
    parts = concept.split()
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, parts)) + r"(?!\w)"
    occurrences = [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)] if parts else []
    if not occurrences:
        words = ", ".join(dict.fromkeys(prompt[start:stop] for start, stop in word_spans(prompt))) or "none"
        raise ValueError(
            f"{concept!r} is not in the prompt {prompt!r}: expected one of its words ({words}) or a phrase of them"
        )
    return occurrences


def concept_spans(prompt: str, concepts: Sequence[str] | None) -> list[tuple[str, list[Span]]]:
    """Each concept (a word or phrase) with all its occurrences; for None, every word of the prompt on its own.

    Raises ValueError for a concept that is not in the prompt.
    """
    if concepts is None:
        return [(prompt[start:stop], [(start, stop)]) for start, stop in word_spans(prompt)]
    return [(concept, find_occurrences(prompt, concept)) for concept in concepts]


def content_words(words: Iterable[str]) -> list[str]:
    """The distinct words, ignoring case, without stop words; if there are only stop words, those."""
    distinct: dict[str, str] = {}
    for word in words:
        distinct.setdefault(word.casefold(), word)
    return [word for key, word in distinct.items() if key not in STOP_WORDS] or list(distinct.values())
