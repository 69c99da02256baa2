"""What a sweep is: prompts × seeds × schedules × models, each explained by all the explainers. Read from YAML."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from dfengine.explain import EXPLAINERS, Explainer, describe, is_serializable, rebuild, to_xdiffusion
from dfengine.prompts import read as read_prompts

_STAGES = ("uniform", "early", "latter")
#: Explainers by the names that the command line gives them, and by their classes'.
_BY_NAME = {name: kind for key, kind in EXPLAINERS.items() for name in (key, key.lower())}


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _sampling(given: Any) -> Any:
    if isinstance(given, str) and given in _STAGES:
        return given
    if isinstance(given, list | tuple) and all(type(step) is int for step in given):
        return tuple(given)
    near = _nearest(given, _STAGES) if isinstance(given, str) else f": expected one of {', '.join(_STAGES)}"
    raise ValueError(f"{given!r} is not known{near}; or give a list of time-steps")


class Schedule(_Settings):
    """How images are sampled."""

    sampling: Annotated[Any, BeforeValidator(_sampling)] = "uniform"
    """as of `Engine.job`; a list of time-steps, too"""
    steps: Annotated[int, Field(ge=1)] = 30
    gamma: Annotated[float, Field(allow_inf_nan=False)] = 60.0
    """shift of early and latter sampling; of no meaning to others, which have 0"""
    guidance: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """guidance scale; the model's own by default"""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            given = {"sampling": given}
        sampling = given.get("sampling", "uniform")
        if isinstance(sampling, list | tuple):
            given = {**given, "steps": len(sampling)}
        return given if sampling in ("early", "latter") else {**given, "gamma": 0.0}


class Source(_Settings):
    """What loads a model: the arguments of `Engine.from_pretrained` that say what is computed."""

    model: str = "shapes"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    variant: str | None = None
    revision: str | None = None
    random_weights: bool = False
    image_size: tuple[int, int] | None = None
    """(height, width) in pixels"""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"model": given} if isinstance(given, str) else given


def _several(given: Any) -> Any:
    """A single thing stands for a list of it."""
    return given if isinstance(given, list | tuple) else [given]


def _schedules(given: Any) -> Any:
    """A single schedule stands for a list of it; numbers alone are the time-steps of one."""
    several = _several(given)
    return [several] if several and all(type(one) is int for one in several) else several


def _prompts(given: Any) -> Any:
    """A prompt, a list of them, or {file: ..., limit: ...}."""
    if not isinstance(given, Mapping):
        return _several(given)
    _check_keys(given, ("file", "limit"))
    file, limit = given.get("file"), given.get("limit")
    if not isinstance(file, str | Path) or not (limit is None or type(limit) is int):
        raise ValueError("expected a list of prompts, or {file: prompts.txt, limit: 100}")
    return [prompt.text for prompt in read_prompts(file, limit)]


def _seeds(given: Any) -> Any:
    """How many there are, from 0; a list; or {first: ..., count: ...}."""
    if isinstance(given, Mapping):
        _check_keys(given, ("first", "count"))
        first, count = given.get("first", 0), given.get("count", 1)
    else:
        first, count = 0, given
    if isinstance(given, list | tuple | range):
        return tuple(given)
    if type(first) is not int or type(count) is not int:
        raise ValueError(f"{given!r} is not understood: expected a number, a list, or {{first: 100, count: 8}}")
    if count < 1:
        raise ValueError(f"{count} seeds are not possible: expected at least 1")
    return tuple(range(first, first + count))


def _explainer(given: Any) -> Explainer:
    """A name, {name: settings}, or an explainer."""
    if isinstance(given, Explainer):
        if type(given) not in EXPLAINERS.values() or not is_serializable(given):
            raise ValueError(f"{given!r} has code of the caller's own, which other processes do not have")
        return given
    name, settings = next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else (given, None)
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"explainer {name!r} is not known{_nearest(name, [key for key in _BY_NAME if key.islower()])}")
    kind, settings = _BY_NAME[name], settings or {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _check_keys(settings, fields, f"of {name}")
    lists = {key for key, value in settings.items() if isinstance(value, str) and "Sequence" in str(fields[key].type)}
    try:
        return TypeAdapter(kind).validate_python(
            {key: [value] if key in lists else value for key, value in settings.items()}
        )
    except ValidationError as error:
        first = error.errors()[0]  # of a value that is of none of several kinds there is one for each
        place = f"{name}.{first['loc'][0]}" if first["loc"] else name
        raise ValueError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error


class Sweep(_Settings):
    """A whole sweep. `read` makes it from a file; in Python `explainers` may be explainers.

    Raises ValueError (pydantic's ValidationError) for what is not possible.
    """

    prompts: Annotated[tuple[str, ...], BeforeValidator(_prompts), Field(min_length=1)]
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(_seeds), Field(min_length=1)
    ] = (0,)
    schedules: Annotated[tuple[Schedule, ...], BeforeValidator(_schedules), Field(min_length=1)] = (Schedule(),)
    models: Annotated[tuple[Source, ...], BeforeValidator(_several), Field(min_length=1)] = (Source(),)
    explainers: Annotated[
        tuple[Annotated[Any, BeforeValidator(_explainer)], ...], BeforeValidator(_several), Field(min_length=1)
    ]
    negative_prompt: str = ""
    behaviour: Literal["paper", "xdiffusion"] = "paper"
    previews: bool = False
    """whether the image predicted at each step is kept"""
    compression: Literal["gzip", "none"] = "gzip"
    mantissa_bits: Annotated[int, Field(ge=1, le=23)] = 23
    """of errors, layers' and words' maps"""
    unit_minutes: Annotated[float, Field(gt=0)] = 5.0
    """about how long a worker is at one file"""

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, given: Any) -> Any:
        """Steps, γ and guidance at the top are those of every schedule that does not say."""
        shared = {name: given[name] for name in ("steps", "gamma", "guidance") if name in given}
        if not shared:
            return given
        schedules = [
            one if isinstance(one, Schedule) else {**shared, **(one if isinstance(one, Mapping) else {"sampling": one})}
            for one in _schedules(given.get("schedules", "uniform"))
        ]
        return {name: value for name, value in given.items() if name not in shared} | {"schedules": schedules}

    @field_validator("prompts", "seeds", "schedules", "models")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        for text in (value for value in values if isinstance(value, str)):
            if not text.strip():
                raise ValueError("a prompt is empty: say what the image should show")
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"{text!r} has half a character: it is no text")
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _named_apart(self) -> Sweep:
        names = [explainer.name for explainer in self.released]
        if len(set(names)) < len(names):
            raise ValueError(
                f"explainers share a name ({', '.join(names)}): give each its own, as in - rise: {{name: rise-global}}"
            )
        return self

    @property
    def released(self) -> list[Explainer]:
        """The explainers, as they are with the sweep's behaviour."""
        return [to_xdiffusion(one) if self.behaviour == "xdiffusion" else one for one in self.explainers]

    @property
    def shared(self) -> dict[str, Any]:
        """What holds for every item, as JSON values: what a run folder is made with, once."""
        told = self.model_dump(mode="json", include=set(_SHARED))
        return json.loads(json.dumps(told | {"explainers": [describe(one) for one in self.explainers]}))

    @property
    def digest(self) -> str:
        """SHA-256 of what there is to do."""
        axes = self.model_dump(mode="json", include={"prompts", "seeds", "schedules", "models"})
        return hashlib.sha256(json.dumps(axes | self.shared, sort_keys=True).encode()).hexdigest()


_SHARED = ("negative_prompt", "behaviour", "previews", "compression", "mantissa_bits")


@dataclasses.dataclass(frozen=True)
class Shared:
    """What holds for every item of a sweep, as a worker has it."""

    explainers: tuple[Explainer, ...]
    negative_prompt: str
    behaviour: str
    previews: bool
    compression: str
    mantissa_bits: int

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Shared:
        """From what a run folder was made with."""
        explainers = [rebuild(one) for one in settings["explainers"]]
        if settings["behaviour"] == "xdiffusion":
            explainers = [to_xdiffusion(one) for one in explainers]
        return cls(tuple(explainers), **{name: settings[name] for name in _SHARED})


def read(path: str | Path) -> Sweep:
    """The sweep that a YAML file describes; files of prompts are looked for beside it.

    Raises ValueError, naming the place, for a file that is not there, keys that are not known (with the nearest that
    is), and values that are not possible.
    """
    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{str(path)!r} describes no sweep: expected keys, of which prompts and explainers are needed")
    prompts = given.get("prompts")
    if isinstance(prompts, dict) and isinstance(prompts.get("file"), str):
        given = given | {"prompts": prompts | {"file": str(path.parent / prompts["file"])}}
    try:
        return Sweep.model_validate(given)
    except ValidationError as error:
        told = "; ".join(map(_told, error.errors()))
        raise ValueError(f"{path}: {told}") from error


def _told(error: Any) -> str:
    """One of pydantic's errors in the words of the file."""
    place = list(map(str, error["loc"]))
    *parents, last = place or [""]
    where = ".".join(place)
    if error["type"] == "extra_forbidden":
        homes: dict[str, type[BaseModel]] = {"schedules": Schedule, "models": Source}
        home = homes.get(parents[0], Sweep) if parents else Sweep
        known = [*home.model_fields, *(("steps", "gamma", "guidance") if home is Sweep else ())]
        return f"{where} is not known{_nearest(last, known)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _check_keys(given: Any, known: Iterable[str], what: str = "") -> None:
    """Raise ValueError for a key that is not known, with the nearest that is."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{given!r} is no set of settings{f' {what}' if what else ''}: expected names and values")
    for key in given:
        if key not in known:
            raise ValueError(f"{key!r}{f' {what}' if what else ''} is not known{_nearest(key, known)}")


def _nearest(name: Any, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(str(name), known, 1)
    return f": did you mean {near[0]!r}?" if near else f": expected one of {', '.join(known)}"
