"""The description of a sweep: prompts × seeds × schedules × models, each explained by all the explainers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

import dfengine.checks as checks
from dfengine.explain import Explainer
from dfengine.explain.registry import describe, rebuild
from dfengine.sweep.loading import load
from dfengine.sweep.parsing import (
    as_list,
    parse_explainer,
    parse_preset,
    parse_prompts,
    parse_sampling,
    parse_schedules,
    parse_seeds,
    rename_steps,
    suggestion,
)
from dfengine.text import printable

#: No number is given as true, and none as "7": YAML has types.
_Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
_Flag = Annotated[bool, Field(strict=True)]
_Size = Annotated[int, Field(ge=1, strict=True)]
#: Every item is a line's part of the plan on disk, and is compared in memory: more are several sweeps.
_MAX_ITEMS = 10_000_000


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(_Settings):
    """How images are sampled."""

    sampling: Annotated[Any, BeforeValidator(parse_sampling)] = "uniform"
    """as for `Engine.job`: "uniform", "early", "latter" or a list of time-steps"""
    num_steps: Annotated[int, Field(ge=1, strict=True)] = 30
    gamma: _Finite = 60.0
    """shift of early and latter sampling; 0 for the others, which do not use it"""
    guidance: _Finite | None = None
    """guidance scale; None for the model's own"""

    @model_validator(mode="before")
    @classmethod
    def _canonicalize(cls, given: Any) -> Any:
        """Accept a bare sampling, and give equal schedules equal settings."""
        given = rename_steps(given) if isinstance(given, Mapping) else {"sampling": given}
        sampling = given.get("sampling", "uniform")
        if isinstance(sampling, list | tuple):
            given = {**given, "num_steps": len(sampling)}
        return given if sampling in ("early", "latter") else {**given, "gamma": 0.0}


class ModelSpec(_Settings):
    """The arguments of `Engine.from_pretrained` that determine what is computed."""

    model: str = "shapes"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    variant: str | None = None
    revision: str | None = None
    random_weights: _Flag = False
    image_size: tuple[_Size, _Size] | None = None
    """(height, width) in pixels"""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"model": given} if isinstance(given, str) else given


def _explainer(value: Any, info: Any) -> Explainer:
    """`info` is pydantic's ValidationInfo, with the fields declared before."""
    return parse_explainer(value, info.data.get("preset", "default"))


class Sweep(_Settings):
    """A complete sweep; `read` builds it from a file.

    Raises ValueError (pydantic's ValidationError) for unknown keys and invalid values.
    """

    prompts: Annotated[tuple[str, ...], BeforeValidator(parse_prompts), Field(min_length=1)]
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**63, strict=True)], ...],
        BeforeValidator(parse_seeds),
        Field(min_length=1),
    ] = (0,)
    schedules: Annotated[tuple[Schedule, ...], BeforeValidator(parse_schedules), Field(min_length=1)] = (Schedule(),)
    models: Annotated[tuple[ModelSpec, ...], BeforeValidator(as_list), Field(min_length=1)] = (ModelSpec(),)
    preset: Annotated[str, BeforeValidator(parse_preset)] = "default"
    """of every explainer given by name that does not name its own"""
    explainers: Annotated[
        tuple[Annotated[Any, BeforeValidator(_explainer)], ...], BeforeValidator(as_list), Field(min_length=1)
    ]
    negative_prompt: str = ""
    previews: _Flag = False
    """whether to keep the image predicted at each step"""
    compression: Literal["gzip", "none"] = "gzip"
    mantissa_bits: Annotated[int, Field(ge=1, le=23, strict=True)] = 23
    """precision of errors, layers' maps and words' maps in the files"""
    unit_minutes: Annotated[_Finite, Field(gt=0)] = 5.0
    """approximate time that a worker spends on one file"""

    @model_validator(mode="before")
    @classmethod
    def _distribute(cls, given: Any) -> Any:
        """Give num_steps, gamma and guidance of the top level to every schedule that does not set them."""
        if "behaviour" in given:
            raise ValueError(
                f"behaviour has been replaced by presets: write preset: {given['behaviour']} instead, or give an "
                "explainer its own, as in - rise: {preset: xdiffusion}"
            )
        given = rename_steps(given)
        shared = {name: given[name] for name in ("num_steps", "gamma", "guidance") if name in given}
        if not shared:
            return given
        schedules = [
            one
            if isinstance(one, Schedule)
            else {**shared, **(rename_steps(one) if isinstance(one, Mapping) else {"sampling": one})}
            for one in parse_schedules(given.get("schedules", "uniform"))
        ]
        return {name: value for name, value in given.items() if name not in shared} | {"schedules": schedules}

    @field_validator("prompts", "seeds", "schedules", "models")
    @classmethod
    def _deduplicate(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        for text in (value for value in values if isinstance(value, str)):
            if not text.strip():
                raise ValueError("a prompt is empty: say what the image should show")
            checks.text("text", text)
        return tuple(dict.fromkeys(values))

    @field_validator("negative_prompt")
    @classmethod
    def _check_text(cls, text: str) -> str:
        checks.text("text", text)
        return text

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        names = [explainer.name for explainer in self.explainers]
        for name in names:
            checks.text("name", name)
            if not name.strip():
                raise ValueError("the name of an explainer is empty: its maps are stored under it")
        if len(set(names)) < len(names):
            raise ValueError(
                f"explainers share a name ({', '.join(names)}): give each its own, as in - rise: {{name: rise-global}}"
            )
        size = math.prod(map(len, (self.prompts, self.seeds, self.schedules, self.models)))
        if size > _MAX_ITEMS:
            raise ValueError(f"{size:,} items are not possible: expected at most {_MAX_ITEMS:,}, or several sweeps")
        for schedule in self.schedules:
            if self.preset == "xdiffusion" and schedule.sampling in ("early", "latter") and schedule.gamma == 0:
                raise ValueError(
                    f"schedule {schedule.sampling!r} has gamma 0, which in the released code means uniform sampling: "
                    "write schedules: uniform for that, or use another gamma"
                )
        return self

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that hold for every item, as JSON values: a run folder is created with them."""
        settings = self.model_dump(mode="json", include=set(_SHARED))
        return json.loads(json.dumps(settings | {"explainers": [describe(one) for one in self.explainers]}))

    @property
    def digest(self) -> str:
        """SHA-256 of everything the sweep computes."""
        axes = self.model_dump(mode="json", include={"prompts", "seeds", "schedules", "models"})
        return hashlib.sha256(json.dumps(axes | self.shared, sort_keys=True).encode()).hexdigest()


_SHARED = ("negative_prompt", "previews", "compression", "mantissa_bits")


@dataclasses.dataclass(frozen=True)
class SharedSettings:
    """The settings that hold for every item of a sweep, as a worker uses them."""

    explainers: tuple[Explainer, ...]
    negative_prompt: str
    previews: bool
    compression: str
    mantissa_bits: int

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> SharedSettings:
        """The settings that `Sweep.shared` describes."""
        explainers = tuple(map(rebuild, settings["explainers"]))
        return cls(explainers, **{name: settings[name] for name in _SHARED})


def read(path: str | Path) -> Sweep:
    """The sweep that a YAML file describes; a file of prompts is resolved relative to it.

    Raises ValueError, naming the place in the file, for a missing file, unknown keys (with the nearest valid one) and
    invalid values.
    """
    path = Path(path).expanduser()
    given = load(path)
    if not isinstance(given, dict):
        raise ValueError(f"{str(path)!r} is not a sweep: expected keys, at least prompts and explainers")
    prompts = given.get("prompts")
    if isinstance(prompts, dict) and isinstance(prompts.get("file"), str):
        given = given | {"prompts": prompts | {"file": str(path.parent / Path(prompts["file"]).expanduser())}}
    try:
        return Sweep.model_validate(given)
    except ValidationError as error:
        raise ValueError(printable(f"{path}: {'; '.join(map(_error_message, error.errors()))}")) from error


def _error_message(error: Any) -> str:
    """One of pydantic's errors, worded for the file."""
    keys = list(map(str, error["loc"]))
    place = ".".join(keys)
    if error["type"] == "extra_forbidden":
        sections: dict[str, type[BaseModel]] = {"schedules": Schedule, "models": ModelSpec}
        section = sections.get(keys[0], Sweep) if len(keys) > 1 else Sweep
        known = [*section.model_fields, *(("num_steps", "gamma", "guidance") if section is Sweep else ())]
        return f"{place} is not known{suggestion(keys[-1], known)}"
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
