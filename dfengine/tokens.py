"""The words of a prompt, and the tokens that a text encoder reads in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Stands among the tokens for all positions behind the end of the prompt.
PADDING = "<padding>"

#: Words that are no concept by themselves.
STOP_WORDS = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with"])
#: Letters and digits, with accents that follow their letter and what joins them: "l'été", "art-deco", "3.5", "1,000".
_WORD = re.compile(r"[\w\u0300-\u036f]+(?:(?:['’.\-]|(?<=\d),(?=\d))[\w\u0300-\u036f]+)*")


@dataclass(frozen=True)
class Tokens:
    """What the positions of a prompt's encoding stand for: its start, its own tokens, its end, and all padding as one.

    `spans` has the characters [from, to) of the prompt that each token was made of, nothing for the special ones.
    """

    prompt: str
    texts: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def own(self) -> list[int]:
        """The places of the prompt's own tokens, between the special ones."""
        return [place for place, (start, stop) in enumerate(self.spans) if start < stop]

    def places(self, start: int, stop: int) -> list[int]:
        """The places of the tokens that these characters of the prompt are in."""
        return [place for place, (first, last) in enumerate(self.spans) if first < stop and last > start]

    def find(self, concept: str) -> list[int]:
        """The places of the tokens of a word or phrase, wherever it stands in the prompt.

        Raises ValueError where it does not.
        """
        found = [self.places(*span) for span in occurrences(self.prompt, concept)]
        return sorted({place for places in found for place in places})


def words(prompt: str) -> list[tuple[int, int]]:
    """The characters [from, to) of every word of a prompt, in order."""
    return [match.span() for match in _WORD.finditer(prompt)]


def occurrences(prompt: str, concept: str) -> list[tuple[int, int]]:
    """The characters [from, to) of a word or phrase wherever it stands in a prompt, as whole words, in any case.

    Raises ValueError where it does not.
    """
    parts = concept.split()
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, parts)) + r"(?!\w)"
    found = [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)] if parts else []
    if not found:
        known = ", ".join(dict.fromkeys(prompt[start:stop] for start, stop in words(prompt))) or "none"
        raise ValueError(
            f"{concept!r} is not in the prompt {prompt!r}: name one of its words ({known}) or a phrase of it"
        )
    return found


def concepts(prompt: str, wanted: Sequence[str] | None) -> list[tuple[str, list[tuple[int, int]]]]:
    """Words and phrases of a prompt with the characters of each; every word by itself where none are named.

    A named one is all its occurrences together. Raises ValueError for one that is not in the prompt.
    """
    if wanted is None:
        return [(prompt[start:stop], [(start, stop)]) for start, stop in words(prompt)]
    return [(concept, occurrences(prompt, concept)) for concept in wanted]


def content_words(words: Iterable[str]) -> list[str]:
    """Each word once, in whatever case, without stop words; those too where there are no others."""
    distinct: dict[str, str] = {}
    for word in words:
        distinct.setdefault(word.casefold(), word)
    return [word for key, word in distinct.items() if key not in STOP_WORDS] or list(distinct.values())
