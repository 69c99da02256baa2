"""Text from files and other machines, made safe to print."""

from __future__ import annotations

import unicodedata

#: Characters that a terminal acts on instead of showing them: control characters, lone surrogates, line separators,
_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
#: and those that reorder what stands beside them.
_DIRECTIONS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}


def printable(text: object) -> str:
    r"""A text on one line, with every character that a terminal would act on as its escape: \x1b, \n, \u202e.

    Everything passes through here that comes from a file, a name, a prompt, the environment or an error. In valid JSON
    the escapes that are added are JSON's own.
    """
    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_escape, text))


def _escape(letter: str) -> str:
    if unicodedata.category(letter) in _CATEGORIES or unicodedata.bidirectional(letter) in _DIRECTIONS:
        return repr(letter)[1:-1] if letter < "\x7f" else f"\\u{ord(letter):04x}"
    return letter
