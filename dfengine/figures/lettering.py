"""Texts of figures in any script: how wide they are, how they break into lines, and fonts that have their letters."""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import matplotlib
import regex
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.text import Text

from dfengine.tokens import UNSPACED

#: A grapheme with the punctuation that may not begin a line.
_PIECE = regex.compile(r"\X(?:[\p{Po}\p{Pe}\p{Pf}]\p{M}*)*")
#: Stands where a letter is measured that no font has.
_BOX = "\u25a1"


def columns(text: str) -> int:
    """The width of a line in columns: wide letters of East Asia take two, marks and invisible characters none."""
    return sum(
        0 if unicodedata.category(one) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(one) in "WF")
        for one in text
    )


def fill(text: str, width: int) -> str:
    """The text in lines of at most `width` columns, broken at spaces, within words longer than a line, and anywhere in
    scripts without spaces."""
    return _Wrapper(width).fill(text)


def shorten(text: str, width: int) -> str:
    """The text without repeated spaces, cut with an ellipsis if it is wider than `width` columns."""
    return _Wrapper(width, max_lines=1, placeholder=" …").fill(" ".join(text.split()))


class _Piece(str):
    """A part of a line whose length is its width in columns."""

    def __len__(self) -> int:
        return columns(self)


class _Wrapper(textwrap.TextWrapper):
    """Counts columns instead of characters."""

    def _split(self, text: str) -> list[str]:
        pieces: list[str] = []
        for chunk in super()._split(text):  # offered to subclasses by a comment there
            is_divisible = columns(chunk) > self.width or UNSPACED.search(chunk)
            pieces += map(_Piece, _PIECE.findall(chunk) if is_divisible else [chunk])
        return pieces


def measurable(text: str) -> str:
    """The text with a box for each letter that no installed font has."""
    _, unreadable = _fallbacks(_missing(text))
    return "".join(_BOX if one in unreadable else one for one in text)


def font(text: str, **properties: Any) -> FontProperties:
    """The font of a text: matplotlib's own, followed by installed ones that have the letters that it lacks.

    Letters that no installed font has are named in a warning, once.
    """
    families, _ = _fallbacks(_missing(text))
    return FontProperties(family=[*matplotlib.rcParams["font.family"], *families], **properties)


@contextmanager
def readable(figure: Any) -> Iterator[None]:
    """Inside, a figure's texts are drawn in fonts that have their letters, and no letter is reported by matplotlib."""
    has_unreadable = False
    for text in figure.findobj(Text):
        if missing := _missing(text.get_text()):
            families, unreadable = _fallbacks(missing)
            text.set_fontfamily([*matplotlib.rcParams["font.family"], *families])
            has_unreadable |= bool(unreadable)
    if not has_unreadable:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


def _missing(text: str) -> frozenset[str]:
    """The visible characters that matplotlib's own fonts lack."""
    if text.isascii():
        return frozenset()
    fonts = [
        font_manager.get_font(font_manager.findfont(FontProperties(family=[one])))
        for one in matplotlib.rcParams["font.family"]
    ]
    visible = (one for one in text if columns(one) and not one.isspace())
    return frozenset(one for one in visible if not any(face.get_char_index(ord(one)) for face in fonts))


@cache
def _fallbacks(missing: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The fewest installed fonts that have these letters, as far as any do, and the letters that none has."""
    families: list[str] = []
    rest, letters_of = missing, _letters_by_font(missing) if missing else {}
    while found := max((letters & rest for letters in letters_of.values()), key=len, default=frozenset()):
        families.append(next(name for name, letters in letters_of.items() if letters & rest == found))
        rest -= found
    if rest:
        warnings.warn(
            f"no installed font has {' '.join(sorted(rest))}, drawn as boxes: install one that does, such as Noto Sans "
            "(for Chinese, Japanese and Korean: Noto Sans CJK)",
            stacklevel=2,
        )
    return tuple(families), rest


def _letters_by_font(letters: frozenset[str]) -> dict[str, frozenset[str]]:
    """By font family, those of the letters that it has; upright sans-serif ones first."""
    for path in set(font_manager.findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}:
        with suppress(Exception):  # installed since matplotlib listed the fonts; it cannot read all of them
            fontManager.addfont(path)
    families = {entry.name for entry in fontManager.ttflist if "Last Resort" not in entry.name}
    found = {}
    for name in sorted(families, key=lambda name: ("Sans" not in name, len(name), name)):
        with suppress(OSError, RuntimeError, ValueError):
            face = font_manager.get_font(font_manager.findfont(FontProperties(family=name)))
            found[name] = frozenset(one for one in letters if face.get_char_index(ord(one)))
    return found
