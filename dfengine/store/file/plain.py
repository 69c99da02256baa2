"""JSON that somebody else may have written, as values of the expected types."""

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints


def load_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError if it is not JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def typed(value: Any, hint: Any, place: str) -> Any:
    """A JSON value as a type annotation has it, with lists as tuples and objects as dataclasses.

    Handles plain types, literals, tuples, mappings and dataclasses of these. Raises ValueError, naming the place, for
    anything else: True is no int, and 1.0 neither.
    """
    if type(value) is hint or hint is Any:
        return value
    origin, arguments = _parts(hint)
    if isinstance(hint, type) and is_dataclass(hint) and type(value) is dict:
        hints = _hints(hint)
        if unknown := [name for name in value if name not in hints]:
            raise ValueError(f"{place} has {unknown[0]!r}, which is not known here")
        try:
            return hint(**{name: typed(member, hints[name], f"{place}.{name}") for name, member in value.items()})
        except TypeError as error:
            raise ValueError(f"{place}: {error}") from None
    if origin is tuple and type(value) is list:
        if arguments[-1] is not ...:
            if len(value) == len(arguments):
                return tuple(typed(member, kind, place) for member, kind in zip(value, arguments, strict=True))
        elif set(map(type, value)) <= {arguments[0]}:  # thousands of tokens, at once
            return tuple(value)
        else:
            return tuple(typed(member, arguments[0], f"{place}.{number}") for number, member in enumerate(value))
    elif origin is Literal:
        if type(value) is str and value in arguments:
            return value
    elif origin in (Mapping, dict) and type(value) is dict:
        if arguments[1] is Any:
            return value
        return {name: typed(member, arguments[1], f"{place}.{name}") for name, member in value.items()}
    raise ValueError(f"{place} is {repr(value)[:60]}: expected {getattr(hint, '__name__', hint)}")


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint), get_args(hint)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
