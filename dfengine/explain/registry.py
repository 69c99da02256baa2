"""An explainer is its settings: as JSON values, which a file keeps, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dfengine.explain.attention import Attention
from dfengine.explain.base import Explainer
from dfengine.explain.cam import Cam
from dfengine.explain.lime import Lime
from dfengine.explain.random import Random
from dfengine.explain.relevance import Relevance
from dfengine.explain.rise import Rise
from dfengine.explain.xdiffusion import XDiffusionCam, XDiffusionLime, XDiffusionRise

#: Every explainer that a file can name.
EXPLAINERS: dict[str, type] = {
    explainer.__name__: explainer
    for explainer in (Rise, Cam, Relevance, Attention, Lime, Random, XDiffusionRise, XDiffusionCam, XDiffusionLime)
}


@dataclasses.dataclass(frozen=True)
class MissingCallable:
    """Stands for a function of the caller's own, of which a file keeps the name only."""

    name: str

    def __call__(self, *_: Any) -> Any:
        """Raises ValueError: the function has to be given again."""
        raise ValueError(
            f"{self.name} is not in the file, which keeps a function's name only: "
            "give it again, as in dataclasses.replace(rise, similarity=...)"
        )


def describe(explainer: Explainer) -> dict[str, Any]:
    """An explainer's class and settings as JSON values; a function is told by its qualified name."""
    return {"explainer": type(explainer).__name__} | {
        name: {"function": _qualified(value)} if callable(value) else value for name, value in _settings(explainer)
    }


def rebuild(settings: Mapping[str, Any]) -> Any:
    """The explainer that `describe` was given, with `MissingCallable` for its functions.

    Raises ValueError where its class or one of its settings is not known here.
    """
    given = dict(settings)
    name = given.pop("explainer", None)
    if name not in EXPLAINERS:
        known = ", ".join(EXPLAINERS)
        raise ValueError(f"explainer {name!r} is not known: expected one of {known}, or a newer dfengine")
    if unknown := set(given) - {field.name for field in dataclasses.fields(EXPLAINERS[name])}:
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))} here: read the file with a newer dfengine")
    return EXPLAINERS[name](
        **{
            field: MissingCallable(value["function"])
            if isinstance(value, dict) and set(value) == {"function"}
            else value
            for field, value in given.items()
        }
    )


def is_serializable(explainer: Explainer) -> bool:
    """Whether the settings alone say what is computed: a caller's own function is told by its name only."""
    return not any(callable(value) for _, value in _settings(explainer))


def _settings(explainer: Explainer) -> list[tuple[str, Any]]:
    fields = dataclasses.fields(explainer)  # type: ignore[arg-type]  # every explainer is a dataclass
    return [(field.name, getattr(explainer, field.name)) for field in fields]


def _qualified(function: Any) -> str:
    if isinstance(function, MissingCallable):
        return function.name
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
