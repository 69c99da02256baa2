"""The plan of a sweep: plan.jsonl in its run folder, one unit a line. Lines are only ever appended."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfengine.store.file.errors import explain_error, translate_os_errors
from dfengine.store.file.files import append_lines, check_regular
from dfengine.store.file.plain import load_json, typed
from dfengine.store.file.plan import StoreError

#: Names of units are parts of file names.
UNIT_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Unit:
    """Some items of one model, all with the same number of steps: what a worker computes at a time, in one segment.

    Together with what the whole run shares (run.json), its line determines the work completely.
    """

    name: str
    model: Mapping[str, Any]
    """how to load the model, as JSON values"""
    schedules: tuple[Mapping[str, Any], ...]
    """the sampling schedules, as JSON values"""
    prompts: tuple[str, ...]
    items: tuple[tuple[int, int, int], ...]
    """for each item the index of its prompt, the index of its schedule, and its seed"""
    retry_of: str = ""
    """the unit whose quarantined items this one tries again, if any"""

    def __len__(self) -> int:
        return len(self.items)

    def describe(self, item: int) -> dict[str, Any]:
        """An item's prompt, seed and schedule, as JSON values."""
        prompt, schedule, seed = self.items[item]
        return {"prompt": self.prompts[prompt], "seed": seed, "schedule": dict(self.schedules[schedule])}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Unit:
        """The unit of a line of the plan. Raises ValueError if the line is something else."""
        unit: Unit = typed(values, cls, "unit")
        sizes = len(unit.prompts), len(unit.schedules)
        if not UNIT_NAME.fullmatch(unit.name) or (unit.retry_of and not UNIT_NAME.fullmatch(unit.retry_of)):
            raise ValueError(f"{unit.name!r} cannot be the name of a unit")
        if any(not (0 <= prompt < sizes[0] and 0 <= schedule < sizes[1]) for prompt, schedule, _ in unit.items):
            raise ValueError(f"{unit.name} has an item without its prompt or schedule")
        return unit


def plan_units(folder: Path, units: Iterable[Unit], *, spec: str = "") -> None:
    """Append units to the plan of a run folder, and then the digest of the sweep that they complete, if given."""
    path = folder / "plan.jsonl"
    lines = (json.dumps(vars(unit), ensure_ascii=False) for unit in units)
    with translate_os_errors(path):
        append_lines(path, lines)
        if spec:  # only once the units are on the disk
            append_lines(path, [json.dumps({"planned": spec})])


def planned_specs(folder: Path) -> set[str]:
    """The digests of the sweeps that are planned completely."""
    return {str(line["planned"]) for line in _read_lines(folder) if set(line) == {"planned"}}


def planned_units(folder: Path) -> Iterator[Unit]:
    """The units of a run folder's plan, in order; none if it has no plan."""
    for line in _read_lines(folder):
        # A line that is not a unit is a sweep's digest, or was cut off by a kill: planning again adds what is missing.
        with contextlib.suppress(ValueError):
            yield Unit.from_json(line)


def _read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / "plan.jsonl"
    try:
        check_regular(path)
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    values = load_json(line)
                    if isinstance(values, dict):
                        yield values
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"cannot read {path}: {explain_error(error)}") from error
