"""From a sweep to units: what there is to do, in pieces of a few minutes, and what it is expected to cost."""

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
from dfengine.sweep.records import Probed
from dfengine.sweep.spec import Schedule, Source, Sweep

#: A worker takes a unit of at most so many items: its file's description has all of them.
MOST_ITEMS = 256
#: There are at least so many units of a model: workers end at about the same time.
FEWEST_UNITS = 32
#: Unless they would be shorter than this.
SHORTEST_SECONDS = 10.0


@dataclass(frozen=True)
class Estimate:
    """What a sweep is, and what it is expected to cost."""

    items: int
    units: int
    forwards: int
    hours: float
    """of all workers together, if each is as fast as the one that was measured"""
    nbytes: int
    """before compression"""
    workers: int
    devices: tuple[str, ...]


def estimate(sweep: Sweep, probed: Mapping[Source, Probed], workers: int) -> Estimate:
    """What all of a sweep costs."""
    each = len(sweep.prompts) * len(sweep.seeds)
    kinds = [(one, kind) for one in probed.values() for kind in one.kinds]
    return Estimate(
        items=each * len(kinds),
        units=sum(
            math.ceil(len(schedules) * each / _unit_size(sweep, probed[source], schedules))
            for source in sweep.models
            for schedules in _shapes(sweep)
        ),
        forwards=each * sum(kind.forwards for _, kind in kinds),
        hours=each * sum(kind.forwards * one.seconds for one, kind in kinds) / 3600 / workers,
        nbytes=each * sum(kind.nbytes for _, kind in kinds),
        workers=workers,
        devices=tuple(dict.fromkeys(one.device for one in probed.values())),
    )


def prepare(
    sweep: Sweep, path: Path, probe: Callable[[Source], Probed], *, retry_failed: bool = False
) -> list[store.Unit]:
    """The units of a sweep that are left in its run folder, in order, all planned there now if they are not yet.

    A folder's plan only grows: with prompts, seeds, schedules or models that are new, what there is stays. `probe` is
    asked about each model before anything is planned. With `retry_failed`, items that were set aside are planned again.
    Raises ValueError where the folder is another sweep's, or something else.
    """
    store.check_free(path)
    if store.is_folder(path):
        check_same(sweep, store.Folder(path))
    is_planned = sweep.digest in store.planned_specs(path)
    probed = {} if is_planned else {source: probe(source) for source in sweep.models}
    folder = store.Folder(path, settings=sweep.shared)
    with folder.planning():
        check_same(sweep, folder)
        if sweep.digest not in store.planned_specs(path):
            known = {_identity(unit.model, unit.describe(item)) for unit in _first(folder) for item in range(len(unit))}
            names = {unit.name for unit in store.planned_units(path)}
            store.plan_units(path, units(sweep, probed, known, names), spec=sweep.digest)
        if retry_failed:
            _retry(folder)
    return list(store.units_left(path, folder.closed()))


def check_same(sweep: Sweep, folder: store.Folder) -> None:
    """Raise ValueError where a folder was made with other settings, or has items that the sweep has not."""
    shared = sweep.shared
    for name, value in shared.items():
        if folder.settings.get(name) != value:
            raise ValueError(
                f"{folder.path} was begun with other settings: {name} {_shown(folder.settings.get(name))}, now "
                f"{_shown(value)}; use those, or another folder"
            )
    if sweep.digest in store.planned_specs(folder.path):
        return
    prompts, seeds, schedules = set(sweep.prompts), set(sweep.seeds), [_json(one) for one in sweep.schedules]
    models = [_json(one) for one in sweep.models]
    for unit in _first(folder):
        for what, mine, theirs in (
            ("the model", [dict(unit.model)], models),
            ("the schedule", list(map(dict, unit.schedules)), schedules),
            ("the prompt", unit.prompts, prompts),
            ("the seed", {seed for _, _, seed in unit.items}, seeds),
        ):
            if gone := [one for one in mine if one not in theirs]:
                raise ValueError(
                    f"{folder.path} has {what} {_shown(gone[0])}, which the sweep has no more: a sweep may grow, not "
                    "shrink; use another folder"
                )


def units(
    sweep: Sweep, probed: Mapping[Source, Probed], known: Collection[bytes] = (), names: Collection[str] = ()
) -> Iterator[store.Unit]:
    """The units of all items that are not known: model by model, and within it a prompt's items together."""
    slugs: dict[str, int] = {}
    for source in sweep.models:
        slug = re.sub(r"\W+", "-", Path(source.model).name).strip("-")[:60] or "model"
        model = _json(source)
        for schedules in _shapes(sweep):
            items = (
                (prompt, schedule, seed)
                for prompt, schedule, seed in itertools.product(sweep.prompts, schedules, sweep.seeds)
                if not known or _identity(model, _described(prompt, schedule, seed)) not in known
            )
            size = _unit_size(sweep, probed[source], schedules)
            while chosen := list(itertools.islice(items, size)):
                number = slugs.get(slug, 0)
                while (name := f"{slug}-{number:05}") in names:
                    number += 1
                slugs[slug] = number + 1
                yield _unit(name, model, chosen)


def _unit(name: str, model: Mapping[str, Any], items: list[tuple[str, Schedule, int]]) -> store.Unit:
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for prompt, _, _ in items))}
    schedules = {one: number for number, one in enumerate(dict.fromkeys(schedule for _, schedule, _ in items))}
    return store.Unit(
        name,
        model,
        tuple(map(_json, schedules)),
        tuple(prompts),
        tuple((prompts[prompt], schedules[schedule], seed) for prompt, schedule, seed in items),
    )


def _shapes(sweep: Sweep) -> list[list[Schedule]]:
    """Schedules of equally many steps, which one file can hold."""
    shapes: dict[int, list[Schedule]] = {}
    for schedule in sweep.schedules:
        shapes.setdefault(schedule.steps, []).append(schedule)
    return list(shapes.values())


def _unit_size(sweep: Sweep, probed: Probed, schedules: list[Schedule]) -> int:
    """How many items of these schedules are some minutes' work."""
    kinds = [kind for kind in probed.kinds if kind.num_steps == schedules[0].steps]
    seconds = probed.seconds * sum(kind.forwards for kind in kinds) / len(kinds)
    share = seconds * len(sweep.prompts) * len(sweep.seeds) * len(schedules) / FEWEST_UNITS
    wanted = min(60 * sweep.unit_minutes, max(share, SHORTEST_SECONDS))
    return max(1, min(MOST_ITEMS, int(wanted / max(seconds, 1e-6) + 1e-6)))


def _retry(folder: store.Folder) -> None:
    """Plan units of the items that were set aside. Whatever ends this in the middle, none is lost."""
    planned = list(store.planned_units(folder.path))
    names = {unit.name for unit in planned}
    aside: dict[str, list[int]] = {}
    for one in store.failures(folder.path):
        if one.state == "quarantined":
            aside.setdefault(one.unit, []).append(one.item)
    for unit in planned:
        if unit.name not in aside:
            continue
        first = unit.retry_of or unit.name
        name = next(name for number in itertools.count(1) if (name := f"{first}-again{number}") not in names)
        names.add(name)
        again = replace(unit, name=name, items=tuple(unit.items[item] for item in aside[unit.name]), retry_of=first)
        with contextlib.suppress(store.Busy), folder.hold(unit.name):  # what a worker is at may fail again just now
            store.plan_units(folder.path, [again])
            store.FailureLog(folder.path, unit).mark_rescheduled(aside[unit.name])


def _first(folder: store.Folder) -> Iterator[store.Unit]:
    """The planned units that are not there to try something again."""
    return (unit for unit in store.planned_units(folder.path) if not unit.retry_of)


def _described(prompt: str, schedule: Schedule, seed: int) -> dict[str, Any]:
    return {"prompt": prompt, "seed": seed, "schedule": _json(schedule)}


def _identity(model: Mapping[str, Any], described: Mapping[str, Any]) -> bytes:
    told = json.dumps([dict(model), dict(described)], sort_keys=True)
    return hashlib.sha256(told.encode()).digest()[:16]


def _json(one: Schedule | Source) -> dict[str, Any]:
    return one.model_dump(mode="json")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"
