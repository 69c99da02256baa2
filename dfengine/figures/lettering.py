"""Texts of figures in any script: how wide they are, how they break into lines, and fonts that have their letters."""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import regex
from matplotlib import font_manager, rcParams
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from dfengine.tokens import UNSPACED

#: A grapheme with the punctuation that may not begin a line.
_PIECE = regex.compile(r"\X(?:[\p{Po}\p{Pe}\p{Pf}]\p{M}*)*")


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
        for chunk in super()._split(text):
            is_divisible = not chunk.isspace() and (columns(chunk) > self.width or UNSPACED.search(chunk))
            pieces += map(_Piece, _PIECE.findall(chunk) if is_divisible else [chunk])
        return pieces


def measurable(text: str) -> str:
    """The text with a dash and a sixth of an em, as wide as a box, for each letter that matplotlib's own fonts lack."""
    missing = _missing(text)
    return "".join("—\u2006" if one in missing else one for one in text)


@contextmanager
def readable(figure: Any) -> Iterator[None]:
    """Inside, a figure's texts are drawn in installed fonts that have their letters.

    Letters that no font has are named in one warning, in place of matplotlib's for each of them.
    """
    texts = {text: missing for text in figure.findobj(Text) if (missing := _missing(text.get_text()))}
    families, unreadable = _fallbacks(frozenset().union(*texts.values()))
    for text in texts:
        text.set_fontfamily([*rcParams["font.family"], *families])
    if not unreadable:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


def _missing(text: str) -> frozenset[str]:
    """The characters that matplotlib's own fonts lack, without spaces and invisible ones."""
    characters = {one for one in text if one != "\n" and unicodedata.category(one) not in ("Cf", "Zs", "Zl", "Zp")}
    if all(" " < one < "\x7f" for one in characters):
        return frozenset()
    own = [FontProperties(family=[family]) for family in rcParams["font.family"]]
    fonts = [font_manager.get_font(font_manager.findfont(one)) for one in own]
    return frozenset(one for one in characters if not any(face.get_char_index(ord(one)) for face in fonts))


@cache
def _fallbacks(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The families of installed fonts that have these letters, the fewest that do, and the letters that none has."""
    families: list[str] = []
    rest, letters_of = letters, _letters_by_family(letters) if letters else {}
    while best := max(letters_of, key=lambda name: len(letters_of[name] & rest), default=""):
        if not letters_of[best] & rest:
            break
        families.append(best)
        rest -= letters_of[best]
    if rest:
        names = " ".join(one if one.isprintable() else repr(one) for one in sorted(rest))
        warnings.warn(  # once for these letters, since the answer is kept
            f"no installed font has {names}, drawn as boxes: install one that does, such as Noto Sans "
            "(for Chinese, Japanese and Korean: Noto Sans CJK)",
            stacklevel=2,
        )
    return tuple(families), rest


def _letters_by_family(letters: frozenset[str]) -> dict[str, frozenset[str]]:
    """By font family, those of the letters that its upright font of normal weight has; sans-serif families first."""
    for path in set(font_manager.findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}:
        with suppress(Exception):  # installed since matplotlib listed the fonts; it cannot read all of them
            fontManager.addfont(path)
    paths = {entry.name: entry.fname for entry in fontManager.ttflist if (entry.style, entry.weight) == ("normal", 400)}
    found = {}
    for name in sorted(paths, key=lambda name: ("Sans" not in name, name)):
        if "Last Resort" not in name:  # matplotlib's boxes for all letters
            with suppress(OSError, RuntimeError):
                face = FT2Font(paths[name])
                found[name] = frozenset(one for one in letters if face.get_char_index(ord(one)))
    return found
