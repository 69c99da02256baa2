"""Failed items of a sweep (failures/<unit>.json), and the items that a worker is computing at the moment.

A crashed process cannot report what caused the crash. A worker therefore records on disk which items it begins, and
for which driver, and the next worker of the unit reads that record. If the driver survived the crash, the recorded
items are blamed: a single one has failed, several are suspects and are tried one at a time. If the driver is gone as
well (a kill, a power cut), no item is blamed.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dfengine.store.file.errors import explain_error, translate_os_errors
from dfengine.store.file.files import atomic_write_text, read_text
from dfengine.store.file.plain import load_json, typed
from dfengine.store.run.units import Unit, planned_units
from dfengine.text import printable

#: An item is quarantined after so many failures, each in a new process.
MAX_FAILURES = 2
#: The state of an item that is not tried again.
QUARANTINED: Literal["quarantined"] = "quarantined"
#: States of items that this unit does not try again.
_SETTLED = (QUARANTINED, "retried")
#: States as earlier versions wrote them.
_OLD_STATES = {"aside": QUARANTINED}


@dataclass(frozen=True)
class Failure:
    """An item that failed, or is suspected."""

    unit: str
    item: int
    """its index in the unit"""
    described: dict[str, Any]
    """its prompt, seed and schedule"""
    state: Literal["suspect", "failed", "quarantined", "retried"]
    """one of several items in progress at a failure; to be tried again; not to be tried again; planned again in another
    unit"""
    errors: tuple[str, ...] = ()
    """one for each time it failed alone"""


@dataclass(frozen=True)
class _Described:
    """What an item's description has."""

    prompt: str
    seed: int
    schedule: Mapping[str, Any]


class FailureLog:
    """The failures of one unit, on which the process holds the lock (`Folder.hold`)."""

    def __init__(self, folder: Path, unit: Unit, *, driver: str = "") -> None:
        """`driver` identifies the current driver among all, including earlier ones."""
        self._unit, self._driver = unit, driver
        self._folder = folder / "failures"
        self._in_progress = self._folder / f".{unit.name}.json"
        with translate_os_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
        self._failures = {failure.item: failure for failure in _read_failures(self._folder / f"{unit.name}.json")}

    def recover(self, remaining: Collection[int]) -> list[Failure]:
        """Record and return which of the remaining items a process was computing when it ended unexpectedly."""
        record = _read_in_progress(self._in_progress)
        items = [item for item in record["items"] if item in remaining]
        if items and record["driver"] == self._driver:
            recovered = self.failed(items, "its process crashed, or was ended because it no longer responded")
        else:
            recovered = [self._suspect(item) for item in items]
        self.release()
        return recovered

    def take(self, items: Sequence[int]) -> None:
        """Record that these items are being computed; the record is on the disk when this returns."""
        with translate_os_errors(self._in_progress):
            atomic_write_text(self._in_progress, json.dumps({"driver": self._driver, "items": list(items)}))

    def release(self) -> None:
        """Clear that record: the items are finished, or were stopped through no fault of theirs."""
        with translate_os_errors(self._in_progress):
            self._in_progress.unlink(missing_ok=True)

    def settle(self) -> None:
        """The unit is done: keep only the items that are not tried again, since all others have succeeded."""
        self.release()
        settled = {item: failure for item, failure in self._failures.items() if failure.state in _SETTLED}
        if settled != self._failures:
            self._failures = settled
            self._write()

    def failed(self, items: Sequence[int], error: str, *, for_good: bool = False) -> list[Failure]:
        """Record that items failed together, and return their failures.

        A single item is quarantined at its second failure, or at once with `for_good`; several become suspects.
        """
        for item in items:
            failure = self._suspect(item)
            if len(items) == 1:
                errors = (*failure.errors, error)
                is_last = for_good or len(errors) >= MAX_FAILURES
                failure = replace(failure, state=QUARANTINED if is_last else "failed", errors=errors)
            self._failures[item] = failure
        self._write()
        return [self._failures[item] for item in items]

    def _suspect(self, item: int) -> Failure:
        """The failure known for an item, or a new suspect, which is written with the next failure."""
        return self._failures.setdefault(item, Failure(self._unit.name, item, self._unit.describe(item), "suspect"))

    def mark_rescheduled(self, items: Iterable[int]) -> None:
        """Mark quarantined items as planned again, in another unit."""
        self._failures |= {item: replace(self._failures[item], state="retried") for item in items}
        self._write()

    def _write(self) -> None:
        path = self._folder / f"{self._unit.name}.json"
        with translate_os_errors(path):
            if not self._failures:
                path.unlink(missing_ok=True)
                return
            atomic_write_text(path, json.dumps([asdict(failure) for failure in self._failures.values()], indent=1))

    @property
    def quarantined(self) -> set[int]:
        """Items that this unit does not try again."""
        return {item for item, failure in self._failures.items() if failure.state in _SETTLED}

    @property
    def suspects(self) -> list[int]:
        """Items to try one at a time, those with the fewest failures first."""
        items = [item for item, failure in self._failures.items() if failure.state not in _SETTLED]
        return sorted(items, key=lambda item: len(self._failures[item].errors))


def failures(folder: Path) -> Iterator[Failure]:
    """Every failure of a run folder, by unit."""
    for path in sorted((folder / "failures").glob("[!.]*.json")):
        yield from _read_failures(path)


def units_left(folder: Path, closed: Collection[str]) -> Iterator[Unit]:
    """The planned units that are neither closed nor have all their items quarantined."""
    settled = Counter(failure.unit for failure in failures(folder) if failure.state in _SETTLED)
    return (unit for unit in planned_units(folder) if unit.name not in closed and settled[unit.name] < len(unit))


def release_units(folder: Path, units: Iterable[str], *, driver: str = "") -> None:
    """Clear which items of these units a driver's workers were computing: they were stopped, and did not crash."""
    for unit in units:
        path = folder / "failures" / f".{unit}.json"
        with contextlib.suppress(OSError):
            if _read_in_progress(path)["driver"] == driver:
                path.unlink(missing_ok=True)


def _read_in_progress(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = typed(load_json(read_text(path)), Mapping[str, Any], "record")
        return {"driver": record.get("driver"), "items": typed(record.get("items"), tuple[int, ...], "items")}
    except (OSError, ValueError):
        return {"driver": None, "items": ()}


def _read_failures(path: Path) -> list[Failure]:
    """The failures of a unit. A damaged file is reported, and its items count as not failed: they are tried again."""
    try:
        records = typed(load_json(read_text(path)), tuple[Mapping[str, Any], ...], "failures")
        return list(map(_read_failure, records))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        reason = printable(f"{path} cannot be read: {explain_error(error)}")
        warnings.warn(f"{reason}; its items are tried again", stacklevel=2)
        return []


def _read_failure(record: Mapping[str, Any]) -> Failure:
    """Raises ValueError if the record is not one of a failure."""
    state = str(record.get("state"))
    failure: Failure = typed({**record, "state": _OLD_STATES.get(state, state)}, Failure, "failure")
    typed(failure.described, _Described, "described")
    if failure.state == QUARANTINED and not failure.errors:
        raise ValueError("an item is quarantined without an error")
    return failure
