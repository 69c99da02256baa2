"""The plan of a sweep: plan.jsonl in its run folder, a unit a line. Lines are only ever added."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dfengine.store.files import append_lines, writing


@dataclass(frozen=True)
class Unit:
    """Some items of one model, all with equally many steps: what one worker does at a time, in one segment.

    Its line says all that it takes to do it, beside what the whole run shares (run.json).
    """

    name: str
    model: Mapping[str, Any]
    """what loads it, as JSON values"""
    schedules: tuple[Mapping[str, Any], ...]
    """each the sampling, as JSON values"""
    prompts: tuple[str, ...]
    items: tuple[tuple[int, int, int], ...]
    """each the number of its prompt and of its schedule, and its seed"""
    retry_of: str = ""
    """the unit of which its items were set aside, if it is one that tries them again"""

    def __len__(self) -> int:
        return len(self.items)

    def describe(self, item: int) -> dict[str, Any]:
        """An item's prompt, seed and schedule, as JSON values."""
        prompt, schedule, seed = self.items[item]
        return {"prompt": self.prompts[prompt], "seed": seed, "schedule": dict(self.schedules[schedule])}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Unit:
        """From what its line says."""
        lists = {name: tuple(values[name]) for name in ("schedules", "prompts")}
        return cls(**dict(values) | lists | {"items": tuple(map(tuple, values["items"]))})


def plan_units(folder: Path, units: Iterable[Unit], *, spec: str = "") -> None:
    """Adds units to the plan of a run folder, and what digest of a sweep is planned with them."""
    path = folder / "plan.jsonl"
    lines = (json.dumps(_plain(unit), ensure_ascii=False) for unit in units)
    with writing(path):
        append_lines(path, lines)
        if spec:  # not until the units are on the disk
            append_lines(path, [json.dumps({"planned": spec})])


def planned_specs(folder: Path) -> set[str]:
    """The digests of sweeps of which all is in the plan."""
    return {line["planned"] for line in _lines(folder) if set(line) == {"planned"}}


def planned_units(folder: Path) -> Iterator[Unit]:
    """The units of a run folder's plan, in its order; none where it has no plan."""
    for line in _lines(folder):
        # What is no unit was cut off by a kill, or is a sweep's digest: whoever plans again adds what is missing.
        with contextlib.suppress(KeyError, TypeError, ValueError):
            yield Unit.from_json(line)


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    try:
        with (folder / "plan.jsonl").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):
                    values = json.loads(line)
                    if isinstance(values, dict):
                        yield values
    except FileNotFoundError:
        return


def _plain(unit: Unit) -> dict[str, Any]:
    return {field.name: getattr(unit, field.name) for field in fields(unit)}
