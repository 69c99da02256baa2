"""What a sweep is: prompts × seeds × schedules × models, each explained by all the explainers. Read from YAML."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
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

from dfengine.explain import EXPLAINERS, Explainer, as_released, describe, rebuild, told_whole
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
    gamma: float = 60.0
    """shift of early and latter sampling; of no meaning to others, which have 0"""
    guidance: float | None = None
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


def _prompts(given: Any) -> Any:
    """A prompt, a list of them, or {file: ..., limit: ...}."""
    if not isinstance(given, Mapping):
        return _several(given)
    _check_keys(given, ("file", "limit"))
    if "file" not in given:
        raise ValueError("expected a list of prompts, or {file: prompts.txt, limit: 100}")
    return [prompt.text for prompt in read_prompts(given["file"], given.get("limit"))]


def _seeds(given: Any) -> Any:
    """How many there are, from 0; a list; or {first: ..., count: ...}."""
    if isinstance(given, Mapping):
        _check_keys(given, ("first", "count"))
        first, count = int(given.get("first", 0)), int(given.get("count", 1))
    elif isinstance(given, int):
        first, count = 0, given
    else:
        return given
    if count < 1:
        raise ValueError(f"{count} seeds are not possible: expected at least 1")
    return tuple(range(first, first + count))


def _explainers(given: Any) -> tuple[Explainer, ...]:
    """Each a name, {name: settings}, or an explainer."""
    return tuple(map(_explainer, _several(given)))


def _explainer(given: Any) -> Explainer:
    if isinstance(given, Explainer):
        if not told_whole(given):
            raise ValueError(f"{given!r} has a function of the caller's own, which other processes do not have")
        return given
    name, settings = next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else (given, None)
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"explainer {name!r} is not known{_nearest(name, _BY_NAME)}")
    kind, settings = _BY_NAME[name], settings or {}
    _check_keys(settings, [field.name for field in dataclasses.fields(kind)], f"of {name}")
    return TypeAdapter(kind).validate_python(settings)


class Sweep(_Settings):
    """A whole sweep. `read` makes it from a file; in Python `explainers` may be explainers.

    Raises ValueError (pydantic's ValidationError) for what is not possible.
    """

    prompts: Annotated[tuple[str, ...], BeforeValidator(_prompts), Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(_seeds)] = (0,)
    schedules: Annotated[tuple[Schedule, ...], BeforeValidator(_several), Field(min_length=1)] = (Schedule(),)
    models: Annotated[tuple[Source, ...], BeforeValidator(_several), Field(min_length=1)] = (Source(),)
    explainers: Annotated[tuple[Any, ...], BeforeValidator(_explainers), Field(min_length=1)]
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
            {**shared, **(one if isinstance(one, Mapping) else {"sampling": one})}
            for one in _several(given.get("schedules", "uniform"))
        ]
        return {name: value for name, value in given.items() if name not in shared} | {"schedules": schedules}

    @field_validator("prompts", "seeds", "schedules", "models")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if any(isinstance(value, str) and not value.strip() for value in values):
            raise ValueError("a prompt is empty: say what the image should show")
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
        return [as_released(one) if self.behaviour == "xdiffusion" else one for one in self.explainers]

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
            explainers = [as_released(one) for one in explainers]
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
        told = "; ".join(_told(one) for one in _without_branches(error.errors()))
        raise ValueError(f"{path}: {told}") from error


def _told(error: Any) -> str:
    """One of pydantic's errors in the words of the file."""
    place = [str(part) for part in error["loc"] if isinstance(part, int) or part.isidentifier()]
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


def _without_branches(errors: Sequence[Any]) -> list[Any]:
    """Of a value that fits none of several kinds, one error instead of one a kind."""
    found: dict[tuple[Any, ...], Any] = {}
    for error in errors:
        branches = [part for part in error["loc"] if isinstance(part, str) and not part.isidentifier()]
        place = error["loc"][: error["loc"].index(branches[0])] if branches else error["loc"]
        found.setdefault(tuple(place), error)
    return list(found.values())


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
