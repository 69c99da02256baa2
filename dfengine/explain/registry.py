"""The explainers by name, and everything that the rest of dfengine derives from their declaration.

    @register("rise", label="DF-RISE")
    @dataclass(frozen=True)
    class Rise(Explainer): ...

makes `Rise` available to the command line, to sweeps, to files and in `dfengine`'s own namespace. Every module of this
package is found automatically; other packages name theirs in the entry-point group "dfengine.explainers".
"""

from __future__ import annotations

import dataclasses
import difflib
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from dfengine.explain.base import Explainer

#: How maps are drawn and shown: one map a step, a map for each layer, a value for each token, or a map for each word.
FORMS = ("saliency", "layers", "tokens", "words")
#: default: what explains best; paper: the equations as printed; xdiffusion: the authors' released code.
PRESETS = ("default", "paper", "xdiffusion")

E = TypeVar("E", bound=Explainer)


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting of an explainer."""

    name: str
    type: type
    """int, float, bool or str"""
    default: Any
    help: str
    is_repeated: bool = False
    """whether it takes several values"""
    is_mapping: bool = False
    """whether each of these is a text with one or several others"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered explainer."""

    name: str
    """its name on the command line and in sweeps"""
    explainer: type[Explainer]
    label: str
    """its name in figures, reports and tables"""
    form: str
    """one of `FORMS`"""
    hot: str | Callable[[Any], str] = ""
    """what high values of its maps mean: how a sentence for readers goes on that begins with "Hot:"; a function of the
    explainer if its settings change that"""

    @property
    def summary(self) -> str:
        """The first paragraph of the explainer's docstring."""
        return " ".join((self.explainer.__doc__ or "").strip().partition("\n\n")[0].split())

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """The explainer's settings except `name`, in the order of their declaration."""
        hints = typing.get_type_hints(self.explainer)
        fields = (one for one in dataclasses.fields(self.explainer) if one.name != "name")
        return tuple(_option(one, hints[one.name]) for one in fields)


_entries: dict[str, Entry] = {}


def register(
    name: str, *, label: str, form: str = "saliency", hot: str | Callable[[Any], str] = ""
) -> Callable[[type[E]], type[E]]:
    """Register an explainer class under a name. Raises ValueError if the name is taken or the form unknown.

    `label`, `form` and `hot` are what figures and reports know of it: see `Entry`.
    """

    def add(explainer: type[E]) -> type[E]:
        if form not in FORMS:
            raise ValueError(f"form {form!r} is not known: expected one of {', '.join(FORMS)}")
        # The same class may be defined again, as a notebook's cell or a reloaded module does.
        if name in _entries and _entries[name].explainer.__qualname__ != explainer.__qualname__:
            raise ValueError(f"the name {name!r} belongs to {_entries[name].explainer.__qualname__}: choose another")
        _entries[name] = Entry(name, explainer, label, form, hot)
        return explainer

    return add


def entries() -> dict[str, Entry]:
    """Every explainer by name, those of this package first."""
    _discover()
    return dict(_entries)


@cache
def _discover() -> None:
    package = import_module("dfengine.explain")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")
    for plugin in entry_points(group="dfengine.explainers"):
        plugin.load()


def entry_of(explainer: Explainer | type | str) -> Entry | None:
    """The entry of an explainer, of its class, or of its class's name; None if it is not registered."""
    match explainer:
        case str():
            name = explainer
        case type():
            name = explainer.__name__
        case _:
            name = type(explainer).__name__
    return next((entry for entry in entries().values() if entry.explainer.__name__ == name), None)


def hot(explainer: Explainer) -> str:
    """What high values of an explainer's maps mean, with its settings, after "Hot:"; empty if that is not declared."""
    entry = entry_of(explainer)
    meaning = entry.hot if entry else ""
    return meaning if isinstance(meaning, str) else meaning(explainer)


def make(explainer: str, /, preset: str = "default", **settings: Any) -> Explainer:
    """The explainer of a name with the given settings, all others at the preset's values.

    An explainer without such a preset has its defaults. Raises ValueError for an unknown name, preset or setting.
    """
    known = entries()
    if explainer not in known:
        names = ", ".join(known)
        raise ValueError(f"explainer {explainer!r} is not known: expected one of {names}{suggestion(explainer, known)}")
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not known: expected one of {', '.join(PRESETS)}")
    cls = known[explainer].explainer
    if preset != "default" and hasattr(cls, preset):
        return getattr(cls, preset)(**settings)
    return cls(**checked(cls, settings))


def checked(explainer: type[Explainer], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, if the explainer has all of them. Raises ValueError for one that it does not have."""
    names = [one.name for one in dataclasses.fields(explainer)]
    for name in settings:
        if name not in names:
            raise ValueError(
                f"{explainer.__name__} has no setting {name!r}: expected some of {', '.join(names)}"
                f"{suggestion(name, names)}"
            )
    return dict(settings)


def nearest(name: object, known: Iterable[str]) -> str | None:
    """What is probably meant by a name that is not known: the most similar one, or one that it contains."""
    by_lower = {one.lower(): one for one in known}
    text = str(name).lower()
    contained = sorted((one for one in by_lower if one in text), key=len)
    near = difflib.get_close_matches(text, by_lower, 1) or contained[-1:]
    return by_lower[near[0]] if near else None


def suggestion(name: object, known: Iterable[str]) -> str:
    """The end of an error message about a name that is not known: "" if nothing resembles it."""
    near = nearest(name, known)
    return "" if near is None else f" (did you mean {near!r}?)"


@dataclasses.dataclass(frozen=True)
class MissingCallable:
    """Stands for a function of the caller's, of which a file keeps only the name."""

    name: str

    def __call__(self, *_: Any) -> Any:
        """Raises ValueError: the function must be given again."""
        raise ValueError(
            f"{self.name} is not in the file, which keeps only the names of functions: "
            "give it again, as in dataclasses.replace(rise, similarity=...)"
        )


def describe(explainer: Explainer) -> dict[str, Any]:
    """An explainer's class and settings as JSON values; a function is described by its qualified name."""
    return {"explainer": type(explainer).__name__} | {
        name: {"function": _qualified_name(value)} if callable(value) else _plain(value)
        for name, value in _settings(explainer).items()
    }


def _plain(value: Any) -> Any:
    """A setting as JSON has it: a tuple is a list there."""
    return list(value) if isinstance(value, tuple) else value


def rebuild(description: Mapping[str, Any]) -> Explainer:
    """The explainer that `describe` described, with `MissingCallable` for its functions.

    Raises ValueError if its class or one of its settings is not known here, or of another type.
    """
    settings = dict(description)
    name = settings.pop("explainer", None)
    entry = entry_of(str(name))
    if entry is None:
        known = ", ".join(one.explainer.__name__ for one in entries().values())
        raise ValueError(f"explainer {name!r} is not known: expected one of {known}, or a newer dfengine")
    settings = dict(entry.explainer.completed(settings))
    if unknown := set(settings) - {one.name for one in dataclasses.fields(entry.explainer)}:
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))} here: read the file with a newer dfengine")
    values = {
        key: MissingCallable(value["function"]) if _is_function(value) else value for key, value in settings.items()
    }
    try:
        return entry.explainer(**values)
    except TypeError as error:  # a file may have been written by anybody
        raise ValueError(f"the settings of {name} are not of the types that it has: {error}") from None


def is_serializable(explainer: Explainer) -> bool:
    """Whether the settings alone determine what is computed: of a caller's function only the name is known."""
    return not any(callable(value) for value in _settings(explainer).values())


def _settings(explainer: Explainer) -> dict[str, Any]:
    return {one.name: getattr(explainer, one.name) for one in dataclasses.fields(explainer)}


def _is_function(value: Any) -> bool:
    """Whether `describe` wrote a function's name. A setting that is a mapping has lists of texts."""
    return isinstance(value, dict) and set(value) == {"function"} and isinstance(value["function"], str)


def _qualified_name(function: Any) -> str:
    if isinstance(function, MissingCallable):
        return function.name
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    """A field as an option: the first plain type of its annotation, repeated where that is a sequence or mapping."""
    alternatives = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for alternative in alternatives:
        arguments = typing.get_args(alternative)
        is_repeated = bool(arguments) and arguments[0] in (int, str)
        is_mapping = typing.get_origin(alternative) is Mapping
        plain = arguments[0] if is_repeated else alternative
        if plain in (int, float, bool, str):
            return Option(field.name, plain, field.default, field.metadata.get("help", ""), is_repeated, is_mapping)
    raise TypeError(
        f"the setting {field.name!r} is {hint}: expected int, float, bool, str, a sequence of str or a mapping to such "
        "sequences"
    )
