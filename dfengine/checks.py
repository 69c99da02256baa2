"""Checks of what callers give: a value of the expected type as a plain one, or a ValueError that names what was given.

Numbers may come from NumPy or torch, as scalars or arrays without axes. A bool is no number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

#: Longer values are named by their type in messages.
_LONGEST = 100
#: A limit that no one means to reach is not mentioned to those who are far from it.
_UNBOUNDED = 2**31 - 1


def whole_number(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number as an int, from `low` to `high`. Raises ValueError for anything else."""
    try:
        number = None if _is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        raise mistake(name, value, whole_number_in_words(number, low, high))
    return number


def whole_number_in_words(number: int | None, low: int | None, high: int | None) -> str:
    """What is expected instead of a number that is out of range, or none."""
    if low is not None and high is not None and high < _UNBOUNDED:
        return f"a whole number from {low} to {high}"
    if high is not None and number is not None and number > high:
        return f"a whole number of at most {high}"
    return "a whole number" if low is None else f"a whole number of at least {low}"


def finite_number(name: str, value: Any) -> float:
    """A number as a float. Raises ValueError for anything else, infinities and NaN."""
    is_scalar = not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0
    try:
        number = float(value) if is_scalar and not _is_bool(value) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise mistake(name, value, "a finite number")
    return number


def text(name: str, value: Any) -> str:
    """A text. Raises ValueError for anything else, and for NUL and lone surrogates, which no file can hold."""
    if not isinstance(value, str):
        raise mistake(name, value, "text")
    if "\0" in value:
        raise mistake(name, value, "text without NUL characters")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise mistake(name, value, "text without lone surrogates: decode it as UTF-8")
    return str(value)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Texts as a tuple, of one or several; of a mapping its keys. Raises ValueError for anything else."""
    members = [value] if isinstance(value, str) else value
    if not isinstance(members, Iterable) or isinstance(members, bytes):
        raise mistake(name, value, "a list of texts")
    return tuple(text(name, member) for member in members)


def whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """Whole numbers as a tuple, of one or several. Raises ValueError for anything else."""
    members = value if isinstance(value, Iterable) and getattr(value, "ndim", True) else [value]
    if isinstance(members, str | bytes | Mapping):
        raise mistake(name, value, "a whole number, or several")
    return tuple(whole_number(name, member) for member in members)


def texts_by_text(name: str, value: Any) -> dict[str, tuple[str, ...]]:
    """A mapping from a text to one or several as a dict of tuples. Raises ValueError for anything else."""
    if not isinstance(value, Mapping):
        raise mistake(name, value, "a mapping to lists of texts, such as {'circle': ['star', 'ring']}")
    return {text(name, key): texts(name, members) for key, members in value.items()}


def switch(name: str, value: Any) -> bool:
    """True or False. Raises ValueError for anything else."""
    if not _is_bool(value) or getattr(value, "ndim", None):
        raise mistake(name, value, "True or False")
    return bool(value)


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """One of some names. Raises ValueError for anything else, listing them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} {value!r} is not known: expected one of {', '.join(choices)}")
    return value


def size(name: str, value: Any) -> tuple[int, int]:
    """A (height, width) in pixels. Raises ValueError for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise mistake(name, value, "(height, width) in pixels")
    return whole_number(name, value[0], 1), whole_number(name, value[1], 1)


def mistake(name: str, value: Any, expected: str) -> ValueError:
    """The error for a value that is not possible."""
    given = " ".join(repr(value).split())
    if len(given) > _LONGEST:
        shape = getattr(value, "shape", None)
        given = f"({type(value).__name__}{f' of shape {tuple(shape)}' if shape is not None else ''})"
    return ValueError(f"{name} {given} is not possible: expected {expected}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
