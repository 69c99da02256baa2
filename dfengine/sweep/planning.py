"""Splits a sweep into units of a few minutes' work each, and estimates what it costs."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dfengine import store
from dfengine.sweep.events import ModelProfile
from dfengine.sweep.spec import ModelSpec, Schedule, Sweep

#: A unit's file lists all its items in its header, which limits their number.
MAX_UNIT_ITEMS = 256
#: A model has at least this many units, so that workers finish at about the same time,
MIN_UNITS = 32
#: unless the units would be shorter than this.
MIN_UNIT_SECONDS = 10.0


@dataclass(frozen=True)
class Estimate:
    """The size and the expected cost of a sweep."""

    items: int
    units: int
    forwards: int
    """network evaluations of one latent"""
    hours: float
    """until the last worker ends, if each is as fast as the measured one"""
    nbytes: int
    """before compression"""
    workers: int
    devices: tuple[str, ...]


def estimate(sweep: Sweep, profiles: Mapping[ModelSpec, ModelProfile], workers: int) -> Estimate:
    """The cost of the complete sweep, whatever part of it is already done."""
    items_each = len(sweep.prompts) * len(sweep.seeds)
    costs = [(profile, cost) for profile in profiles.values() for cost in profile.costs]
    return Estimate(
        items=items_each * len(costs),
        units=sum(
            math.ceil(len(schedules) * items_each / _unit_size(sweep, profiles[model], schedules))
            for model in sweep.models
            for schedules in _by_num_steps(sweep)
        ),
        forwards=items_each * sum(cost.forwards for _, cost in costs),
        hours=items_each * sum(cost.forwards * profile.seconds for profile, cost in costs) / 3600 / workers,
        nbytes=items_each * sum(cost.nbytes for _, cost in costs),
        workers=workers,
        devices=tuple(dict.fromkeys(profile.device for profile in profiles.values())),
    )


def prepare(
    sweep: Sweep, path: Path, profile: Callable[[ModelSpec], ModelProfile], *, retry_failed: bool = False
) -> list[store.Unit]:
    """The remaining units of a sweep, in order, after adding to the run folder's plan whatever it does not contain yet.

    A plan only grows: new prompts, seeds, schedules or models are added to it. Units of other items, which a larger
    sweep has added, are left to that. `profile` is called for each model before anything is written. With
    `retry_failed`, quarantined items are planned again. What killed processes left behind is removed. Raises ValueError
    if the path holds another sweep or something else.
    """
    store.check_free(path)
    if store.is_folder(path):
        check_compatible(sweep, store.Folder(path))
    is_planned = sweep.digest in store.planned_specs(path)
    profiles = {} if is_planned else {model: profile(model) for model in sweep.models}
    folder = store.Folder(path, settings=sweep.shared)
    with folder.planning():
        # Another process may have created the folder or planned in it meanwhile.
        check_compatible(sweep, folder)
        if sweep.digest not in store.planned_specs(path):
            planned = {
                _item_id(unit.model, unit.describe(item))
                for unit in _original_units(folder)
                for item in range(len(unit))
            }
            names = {unit.name for unit in store.planned_units(path)}
            store.plan_units(path, make_units(sweep, profiles, planned, names), spec=sweep.digest)
        own = own_units(sweep, path)
        if retry_failed:
            _plan_retries(folder, own)
            own = own_units(sweep, path)
        folder.remove_leftovers()
    return [unit for unit in store.units_left(path, folder.closed()) if unit.name in own]


def own_units(sweep: Sweep, path: Path) -> set[str]:
    """The names of the planned units that have items of a sweep."""
    prompts, seeds, schedules = set(sweep.prompts), set(sweep.seeds), [_to_json(one) for one in sweep.schedules]
    models = [_to_json(one) for one in sweep.models]

    def has_item(unit: store.Unit) -> bool:
        own = {place for place, schedule in enumerate(unit.schedules) if dict(schedule) in schedules}
        return any(
            seed in seeds and schedule in own and unit.prompts[prompt] in prompts
            for prompt, schedule, seed in unit.items
        )

    return {unit.name for unit in store.planned_units(path) if dict(unit.model) in models and has_item(unit)}


def check_compatible(sweep: Sweep, folder: store.Folder) -> None:
    """Raise ValueError if a folder was begun with other settings, or holds items that the sweep no longer has."""
    shared = sweep.shared
    for name in {**shared, **folder.settings}:
        if folder.settings.get(name) != shared.get(name):
            raise ValueError(
                f"{folder.path} was begun with other settings: {name} {_abbreviate(folder.settings.get(name))}, now "
                f"{_abbreviate(shared.get(name))}; restore them, or use another folder"
            )
    if sweep.digest in store.planned_specs(folder.path):
        return
    prompts, seeds, schedules = set(sweep.prompts), set(sweep.seeds), [_to_json(one) for one in sweep.schedules]
    models = [_to_json(one) for one in sweep.models]
    for unit in _original_units(folder):
        for kind, planned, current in (
            ("model", [dict(unit.model)], models),
            ("schedule", list(map(dict, unit.schedules)), schedules),
            ("prompt", unit.prompts, prompts),
            ("seed", {seed for _, _, seed in unit.items}, seeds),
        ):
            if removed := [one for one in planned if one not in current]:
                raise ValueError(
                    f"{folder.path} has the {kind} {_abbreviate(removed[0])}, which the sweep no longer has: a sweep "
                    "can grow, but not shrink; use another folder"
                )


def make_units(
    sweep: Sweep,
    profiles: Mapping[ModelSpec, ModelProfile],
    planned: Collection[bytes] = (),
    names: Collection[str] = (),
) -> Iterator[store.Unit]:
    """Units of all items that are not planned yet, model by model, with the items of a prompt together.

    `names` are taken by other units.
    """
    counters: dict[str, int] = {}
    for spec in sweep.models:
        slug = re.sub(r"\W+", "-", Path(spec.model).name).strip("-")[:60] or "model"
        model = _to_json(spec)
        for schedules in _by_num_steps(sweep):
            items = (
                (prompt, schedule, seed)
                for prompt, schedule, seed in itertools.product(sweep.prompts, schedules, sweep.seeds)
                if not planned or _item_id(model, _describe_item(prompt, schedule, seed)) not in planned
            )
            size = _unit_size(sweep, profiles[spec], schedules)
            while batch := list(itertools.islice(items, size)):
                number = counters.get(slug, 0)
                while (name := f"{slug}-{number:05}") in names:
                    number += 1
                counters[slug] = number + 1
                yield _make_unit(name, model, batch)


def _make_unit(name: str, model: Mapping[str, Any], items: list[tuple[str, Schedule, int]]) -> store.Unit:
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for prompt, _, _ in items))}
    schedules = {one: number for number, one in enumerate(dict.fromkeys(schedule for _, schedule, _ in items))}
    return store.Unit(
        name,
        model,
        tuple(map(_to_json, schedules)),
        tuple(prompts),
        tuple((prompts[prompt], schedules[schedule], seed) for prompt, schedule, seed in items),
    )


def _by_num_steps(sweep: Sweep) -> list[list[Schedule]]:
    """Schedules grouped by their number of steps, which a file has one of."""
    groups: dict[int, list[Schedule]] = {}
    for schedule in sweep.schedules:
        groups.setdefault(schedule.num_steps, []).append(schedule)
    return list(groups.values())


def _unit_size(sweep: Sweep, profile: ModelProfile, schedules: list[Schedule]) -> int:
    """The number of items of these schedules that take about the sweep's `unit_minutes`."""
    costs = [cost for cost in profile.costs if cost.num_steps == schedules[0].num_steps]
    item_seconds = profile.seconds * sum(cost.forwards for cost in costs) / len(costs)
    share = item_seconds * len(sweep.prompts) * len(sweep.seeds) * len(schedules) / MIN_UNITS
    unit_seconds = min(60 * sweep.unit_minutes, max(share, MIN_UNIT_SECONDS))
    return max(1, min(MAX_UNIT_ITEMS, int(unit_seconds / max(item_seconds, 1e-6) + 1e-6)))


def _plan_retries(folder: store.Folder, chosen: Collection[str]) -> None:
    """Plan new units of the chosen units' quarantined items; an interruption at any point loses none of them."""
    units = list(store.planned_units(folder.path))
    names = {unit.name for unit in units}
    quarantined: dict[str, list[int]] = {}
    for one in store.failures(folder.path):
        if one.state == "quarantined":
            quarantined.setdefault(one.unit, []).append(one.item)
    for unit in units:
        items = [item for item in quarantined.get(unit.name, []) if item < len(unit)]
        if unit.name not in chosen or not items:
            continue
        original = unit.retry_of or unit.name
        name = next(name for number in itertools.count(1) if (name := f"{original}-retry{number}") not in names)
        names.add(name)
        retry = replace(unit, name=name, items=tuple(unit.items[item] for item in items), retry_of=original)
        # A unit that a worker holds may be about to record another failure: its items wait for the next run.
        with contextlib.suppress(store.Busy), folder.hold(unit.name):
            store.plan_units(folder.path, [retry])
            store.FailureLog(folder.path, unit).mark_rescheduled(items)


def _original_units(folder: store.Folder) -> Iterator[store.Unit]:
    """The planned units that are not retries."""
    return (unit for unit in store.planned_units(folder.path) if not unit.retry_of)


def _describe_item(prompt: str, schedule: Schedule, seed: int) -> dict[str, Any]:
    return {"prompt": prompt, "seed": seed, "schedule": _to_json(schedule)}


def _item_id(model: Mapping[str, Any], item: Mapping[str, Any]) -> bytes:
    text = json.dumps([dict(model), dict(item)], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:16]


def _to_json(one: Schedule | ModelSpec) -> dict[str, Any]:
    return one.model_dump(mode="json")


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"
