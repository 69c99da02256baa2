"""The forms in which a sweep file may give a value, each turned into the value itself. All raise ValueError."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dfengine.explain import Explainer
from dfengine.explain.registry import PRESETS, Entry, entries, entry_of, is_serializable, make, nearest
from dfengine.prompts import read as read_prompts

#: Seeds of one sweep.
MAX_SEEDS = 1_000_000
STAGES = ("uniform", "early", "latter")
#: Settings of explainers that had another name before version 0.2.
_RENAMED = {"masks": "mask_kind", "scale": "loss_scale"}


def as_list(value: Any) -> Any:
    """A single value stands for a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def parse_schedules(value: Any) -> Any:
    """A list of schedules, from a list, from a single schedule or from the time-steps of one."""
    schedules = as_list(value)
    return [schedules] if schedules and all(map(_is_number, schedules)) else schedules


def rename_steps(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that may call `num_steps` by its short name `steps`, under their full names."""
    if {"steps", "num_steps"} <= set(given):
        raise ValueError("steps is another name of num_steps: give one of them")
    return {"num_steps" if name == "steps" else name: value for name, value in given.items()}


def parse_sampling(value: Any) -> str | tuple[float, ...]:
    """The name of a stage, or time-steps: whole numbers as int, so that 9 and 9.0 make one schedule."""
    if isinstance(value, str) and value in STAGES:
        return value
    if isinstance(value, list | tuple) and all(map(_is_number, value)):
        return tuple(int(step) if step == int(step) else step for step in value)
    hint = suggestion(value, STAGES) if isinstance(value, str) else f": expected one of {', '.join(STAGES)}"
    raise ValueError(f"{value!r} is not known{hint}; or give a list of time-steps")


def parse_prompts(value: Any) -> Any:
    """A list of prompts, from a prompt, a list or `{file: ..., limit: ...}`."""
    if not isinstance(value, Mapping):
        return as_list(value)
    check_keys(value, ("file", "limit"))
    file, limit = value.get("file"), value.get("limit")
    if not isinstance(file, str | Path) or not (limit is None or type(limit) is int):
        raise ValueError("expected a list of prompts, or {file: prompts.txt, limit: 100}")
    return [prompt.text for prompt in read_prompts(file, limit)]


def parse_seeds(value: Any) -> tuple[Any, ...]:
    """Seeds, from their number (they start at 0), a list or `{first: ..., count: ...}`."""
    if isinstance(value, range):
        value = {"first": value.start, "count": len(value)} if value.step == 1 else list(value[: MAX_SEEDS + 1])
    if isinstance(value, list | tuple):
        if len(value) > MAX_SEEDS:
            raise ValueError(f"more than {MAX_SEEDS:,} seeds are not possible")
        return tuple(value)
    first, count = 0, value
    if isinstance(value, Mapping):
        check_keys(value, ("first", "count"))
        first, count = value.get("first", 0), value.get("count", 1)
    if type(first) is not int or type(count) is not int:
        raise ValueError(f"{value!r} is not valid: expected a number, a list, or {{first: 100, count: 8}}")
    if not 1 <= count <= MAX_SEEDS:
        limit = "at least 1" if count < 1 else f"at most {MAX_SEEDS:,}"
        raise ValueError(f"{count} seeds are not possible: expected {limit}")
    return tuple(range(first, first + count))


def parse_preset(value: Any, owner: str = "") -> str:
    """A preset's name."""
    if value not in PRESETS:
        raise ValueError(f"preset {value!r}{owner} is not known{suggestion(value, PRESETS)}")
    return str(value)


def parse_explainer(value: Any, preset: str) -> Explainer:
    """An explainer, from its name, `{name: settings}` or an explainer of this process.

    Settings that are not given have the values of the preset, for which the settings may name another.
    """
    if isinstance(value, Explainer):
        entry = entry_of(value)
        if entry is None or entry.explainer is not type(value) or not is_serializable(value):
            raise ValueError(
                f"{value!r} contains code that worker processes do not have: use registered explainers, without "
                "functions of your own"
            )
        return value
    name, settings = next(iter(value.items())) if isinstance(value, Mapping) and len(value) == 1 else (value, None)
    if not isinstance(name, str):
        raise ValueError(f"{value!r} is not an explainer: expected a name or {{name: settings}}, each in its own entry")
    entry, settings = _find_entry(name), {} if settings is None else settings
    types = typing.get_type_hints(entry.explainer)
    check_keys(settings, ["name", *(option.name for option in entry.options), "preset"], f" of {name}")
    preset = parse_preset(settings["preset"], f" of {name}") if "preset" in settings else preset
    repeated = {option.name for option in entry.options if option.is_repeated}
    values = {}
    for key, setting in settings.items():
        if key != "preset":
            setting = [setting] if key in repeated and isinstance(setting, int | str) else setting
            if isinstance(setting, Mapping):
                setting = {word: [others] if isinstance(others, str) else others for word, others in setting.items()}
            setting = tuple(setting) if isinstance(setting, list) else setting
            try:
                values[key] = TypeAdapter(types[key]).validate_python(setting, strict=True)
            except ValidationError as error:  # of a union it has an error for each alternative
                raise ValueError(f"{name}.{key}: {setting!r} is not possible: {error.errors()[0]['msg']}") from error
            if isinstance(values[key], float) and not math.isfinite(values[key]):
                raise ValueError(f"{name}.{key}: {values[key]} is not possible: expected a finite number")
    try:
        return make(name, preset, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _find_entry(name: str) -> Entry:
    known = entries()
    if name in known:
        return known[name]
    for entry in known.values():
        if _normalized(name) in (_normalized(entry.name), _normalized(entry.explainer.__name__)):
            raise ValueError(f"explainer {name!r} is now spelled {entry.name!r}")
    raise ValueError(f"explainer {name!r} is not known{suggestion(name, known)}")


def _normalized(name: str) -> str:
    """A name without case and hyphens. Before version 0.2 sweeps had the classes' names, and `Released…`."""
    name = name.lower().replace("-", "").replace("_", "")
    return f"xdiffusion{name.removeprefix('released')}" if name.startswith("released") else name


def check_keys(value: Any, known: Iterable[str], owner: str = "") -> None:
    """Raise ValueError if the value is no mapping, or for an unknown key, with the nearest valid one."""
    known = list(known)
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not valid: expected settings{owner} as {{name: value}}")
    for key in value:
        if key in known:
            continue
        if key == "masks" and _is_number(value[key]):
            raise ValueError(f"{key!r}{owner} is not known: their number is called 'num_masks'")
        if _RENAMED.get(key) in known:
            raise ValueError(f"{key!r}{owner} is now called {_RENAMED[key]!r}")
        raise ValueError(f"{key!r}{owner} is not known{suggestion(key, known)}")


def suggestion(name: Any, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    near = nearest(name, known)
    return f": expected one of {', '.join(known)}" if near is None else f": did you mean {near!r}?"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
