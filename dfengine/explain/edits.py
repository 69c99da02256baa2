"""A prompt without one of its words: others of the same kind in its place, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dfengine.tokens import Span, find_occurrences, substitute


@dataclass(frozen=True)
class Edit:
    """A word or phrase, and the prompt without it."""

    concept: str
    spans: Sequence[Span]
    """its characters [start, stop) of the prompt"""
    prompts: Sequence[str]
    """the edited prompts, each once; none if the encoding is edited instead"""


class Replacements:
    """What may stand in place of the words of a prompt."""

    def __init__(
        self,
        prompt: str,
        given: Mapping[str, Sequence[str]],
        alternatives: Mapping[str, Sequence[str]],
        num_alternatives: int,
    ) -> None:
        """All that are given for a word, or else the first alternatives that the prompt does not have already.

        Raises ValueError for replacements of a word that is not in the prompt.
        """
        self.prompt, self._used = prompt, set[Span]()
        self._given: dict[str, list[Span]] = {}
        known: dict[Span, Sequence[str]] = {}
        for word, others in alternatives.items():
            if spans := _occurrences(prompt, word):
                absent = [other for other in others if not _occurrences(prompt, other)][:num_alternatives]
                known |= dict.fromkeys(spans, absent)
        for word, others in given.items():
            try:
                self._given[word] = find_occurrences(prompt, word)
            except ValueError as error:
                raise ValueError(f"replace: {error}") from None
            known |= dict.fromkeys(self._given[word], others)
        longest_first = sorted(known, key=lambda span: span[0] - span[1])
        self._known = {span: known[span] for span in longest_first if known[span]}

    def prompts(self, spans: Sequence[Span]) -> list[str]:
        """The prompt with replacements within the spans, word by word unless a phrase of them has its own.

        Each word has its n-th replacement in the n-th prompt, and begins again where it has fewer than another one.
        """
        chosen: dict[Span, Sequence[str]] = {}
        for (first, last), others in self._known.items():
            is_inside = any(start <= first and last <= stop for start, stop in spans)
            if is_inside and not any(first < stop and start < last for start, stop in chosen):
                chosen[first, last] = others
        self._used |= chosen.keys()
        count = max(map(len, chosen.values()), default=0)
        numbered = ({span: others[n % len(others)] for span, others in chosen.items()} for n in range(count))
        return list(dict.fromkeys(substitute(self.prompt, texts) for texts in numbered))

    def unused(self) -> list[str]:
        """The words with given replacements that no prompt has had."""
        return [word for word, spans in self._given.items() if not self._used.intersection(spans)]


def _occurrences(prompt: str, text: str) -> list[Span]:
    with suppress(ValueError):
        return find_occurrences(prompt, text)
    return []
