"""The words of a prompt, and the tokens that a text encoder reads for it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import regex

import dfengine.checks as checks

#: The token that stands for all positions after the end of the prompt.
PADDING = "<padding>"

#: Words that are no concept on their own.
STOP_WORDS = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with"])
#: What is written without spaces between words: ideographs, kana, emoji, and by their class in UAX #14 the letters of
#: Thai and its neighbours and of Javanese and its.
UNSPACED = regex.compile(
    r"[\p{Ideographic}\p{Hiragana}\p{Katakana}ー\p{Emoji_Presentation}\p{Extended_Pictographic}"
    r"\p{Line_Break=SA}\p{Line_Break=AK}\p{Line_Break=AS}]"
)
#: A letter or digit.
_LETTER = r"[\w\p{No}--\p{M}\p{Cf}]"
#: A word: graphemes of letters and digits without a word boundary of UAX #29 between them, also joined by an exponent
#: ("m²") and by inner punctuation ("l'été", "art-deco", "3.5", "1,000"). Thai and its neighbours, which only a
#: dictionary divides, are words up to the next space or punctuation; ideographs, hiragana and emoji are words each. All
#: else is matched outside the group, grapheme by grapheme.
_WORD = regex.compile(
    rf"(?V1w)(?P<word>(?={_LETTER})\X(?:['’.·‧״\-](?={_LETTER})\X|(?<=\d),(?=\d)\X|\B(?={_LETTER})\X|(?=\p{{No}})\X"
    rf"|(?<=\p{{No}}\p{{M}}*)(?={_LETTER})\X|(?<=\p{{Line_Break=SA}}\p{{M}}*)(?=\p{{Line_Break=SA}})\X)*+"
    r"|(?=\p{Emoji_Presentation}|\p{Extended_Pictographic}\uFE0F)\X)|\X"
)
_IS_LETTER = regex.compile(f"(?V1){_LETTER}")

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
    """The characters [start, stop) of every word of a prompt, in order.

    Words are those of Unicode's text segmentation. Ideographs, and the letters of hiragana, are words on their own.
    """
    return [match.span() for match in _WORD.finditer(prompt) if match["word"]]


def find_occurrences(prompt: str, concept: str) -> list[Span]:
    """The characters [start, stop) of each occurrence of a word or phrase: complete words, in any case and spacing.

    In scripts without spaces any part that consists of complete graphemes. Canonically equivalent spellings (é as one
    character or as two) are equal. Raises ValueError if there is none.
    """
    checks.text("prompt", prompt)
    (text, places), (sought, _) = _fold(prompt), _fold(" ".join(concept.split()))
    occurrences: list[Span] = []
    at = text.find(sought) if sought else -1
    while at >= 0:
        stop = at + len(sought)
        is_found = at in places and stop in places and _is_apart(prompt, places[at], places[stop])
        if is_found:
            occurrences.append((places[at], places[stop]))
        at = text.find(sought, stop if is_found else at + 1)
    if not occurrences:
        words = ", ".join(dict.fromkeys(prompt[start:stop] for start, stop in word_spans(prompt))) or "none"
        raise ValueError(
            f"{concept!r} is not in the prompt {prompt!r}: expected one of its words ({words}) or a phrase of them"
        )
    return occurrences


def remove(prompt: str, spans: Iterable[Span]) -> str:
    """The prompt without some of its characters and the space before them; what they kept apart stays apart."""
    for start, stop in sorted(spans, reverse=True):
        before, after = prompt[:start], prompt[stop:]
        if regex.match(r"$|\s|\p{P}", after):
            before = before.rstrip()
        ends = [*regex.findall(r"\X", before)[-1:], *regex.findall(r"\X", after)[:1]]
        is_joined = len(ends) == 2 and all(_IS_LETTER.match(end) and not UNSPACED.match(end) for end in ends)
        prompt = f"{before} {after}" if is_joined else before + after
    return prompt.strip()


def substitute(prompt: str, texts: Mapping[Span, str]) -> str:
    """The prompt with other texts in place of some of its characters."""
    for start, stop in sorted(texts, reverse=True):
        prompt = prompt[:start] + texts[start, stop] + prompt[stop:]
    return prompt


def folded(text: str) -> str:
    """A text by which to compare words: equal for canonically equivalent ones in any case and spacing."""
    return _fold(text)[0]


def _fold(text: str) -> tuple[str, dict[int, int]]:
    """Text that is equal for canonically equivalent texts in any case and spacing, and the boundaries of its graphemes:
    positions in it → positions in the text that was given."""
    caseless, places, start = "", {0: 0}, 0
    for is_space, graphemes in groupby(regex.findall(r"\X", text), str.isspace):
        for grapheme in ["".join(graphemes)] if is_space else graphemes:
            start += len(grapheme)
            decomposed = unicodedata.normalize("NFD", grapheme).casefold()
            caseless += " " if is_space else unicodedata.normalize("NFD", decomposed)
            places[len(caseless)] = start
    return caseless, places


def _is_apart(prompt: str, start: int, stop: int) -> bool:
    """Whether no letter or digit continues the characters [start, stop); those of scripts without spaces never do."""
    before, inside, after = (regex.findall(r"\X", part) for part in (prompt[:start], prompt[start:stop], prompt[stop:]))
    return not any(
        _IS_LETTER.match(outer) and not (UNSPACED.match(outer) or UNSPACED.match(inner))
        for outer, inner in ((["", *before][-1], inside[0]), ([*after, ""][0], inside[-1]))
    )


def concept_spans(prompt: str, concepts: Sequence[str] | None) -> list[tuple[str, list[Span]]]:
    """Each concept (a word or phrase) with all its occurrences; for None, every word of the prompt on its own.

    Raises ValueError for a concept that is not in the prompt.
    """
    if concepts is None:
        return [(prompt[start:stop], [(start, stop)]) for start, stop in word_spans(prompt)]
    return [(concept, find_occurrences(prompt, concept)) for concept in concepts]


def content_words(words: Iterable[str]) -> list[str]:
    """The distinct words (see `folded`) without stop words; if there are only stop words, those."""
    distinct: dict[str, str] = {}
    for word in words:
        distinct.setdefault(folded(word), word)
    return [word for key, word in distinct.items() if key not in STOP_WORDS] or list(distinct.values())
