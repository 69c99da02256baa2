"""What went wrong with single items of a sweep: failures/<unit>.json, and which items a worker is at just now.

A crash tells nobody what caused it. So a worker says on the disk which items it begins, and for which driver; the next
one to take the unit knows which were in its hands. Where its driver outlived it, one alone is to blame, and several are
each tried alone. Where the driver is gone, too (a kill, a power cut), none is to blame.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dfengine.store.files import write_whole, writing
from dfengine.store.units import Unit, planned_units

#: An item is set aside after so many failures, each in a fresh process.
MOST_FAILURES = 2


@dataclass(frozen=True)
class Failure:
    """An item that something went wrong with."""

    unit: str
    item: int
    """its place in the unit"""
    described: dict[str, Any]
    """prompt, seed and schedule"""
    state: Literal["suspect", "failed", "aside", "retried"]
    """one of several that were in hand at a failure; to be tried once more; set aside; planned again in another unit"""
    errors: tuple[str, ...] = ()
    """one for each time it failed alone"""


class Troubles:
    """The failures of one unit, which the process has to itself (`Folder.hold`)."""

    def __init__(self, folder: Path, unit: Unit, *, driver: str = "") -> None:
        """`driver` tells the driver from any other, those of earlier times included."""
        self._unit, self._driver = unit, driver
        self._folder = folder / "failures"
        self._in_hand = self._folder / f".{unit.name}.json"
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        self._failures = {one.item: one for one in _read(self._folder / f"{unit.name}.json")}

    def after_crash(self, left: Collection[int]) -> list[Failure]:
        """Of the items that are left, those that a process had in its hands when it ended without a word; recorded."""
        in_hand = _in_hand(self._in_hand)
        items = [item for item in in_hand["items"] if item in left]
        if items and in_hand["driver"] == self._driver:
            found = self.failed(items, "its process ended without a word, or was ended as it told nothing any more")
        else:
            found = [self._suspect(item) for item in items]
        self.put_down()
        return found

    def take(self, items: Sequence[int]) -> None:
        """Items are begun: known on the disk before this returns."""
        with writing(self._in_hand):
            write_whole(self._in_hand, json.dumps({"driver": self._driver, "items": list(items)}))

    def put_down(self) -> None:
        """The items begun last are finished, or let go of without anybody's fault."""
        with writing(self._in_hand):
            self._in_hand.unlink(missing_ok=True)

    def settle(self) -> None:
        """The unit is done: what is not set aside has worked after all."""
        self.put_down()
        settled = {item: one for item, one in self._failures.items() if one.state in ("aside", "retried")}
        if settled != self._failures:
            self._failures = settled
            self._write()

    def failed(self, items: Sequence[int], error: str, *, for_good: bool = False) -> list[Failure]:
        """Records that items failed together; one alone is set aside at its second time, or at once `for_good`."""
        alone = len(items) == 1
        for item in items:
            known = self._suspect(item)
            if alone:
                errors = (*known.errors, error)
                aside = for_good or len(errors) >= MOST_FAILURES
                known = replace(known, state="aside" if aside else "failed", errors=errors)
            self._failures[item] = known
        self._write()
        return [self._failures[item] for item in items]

    def _suspect(self, item: int) -> Failure:
        """What is known of an item, now at least that it is to be tried alone; recorded with the next that fails."""
        return self._failures.setdefault(item, Failure(self._unit.name, item, self._unit.describe(item), "suspect"))

    def hand_on(self, items: Iterable[int]) -> None:
        """Marks items that were set aside as planned again, in another unit."""
        self._failures |= {item: replace(self._failures[item], state="retried") for item in items}
        self._write()

    def _write(self) -> None:
        path = self._folder / f"{self._unit.name}.json"
        with writing(path):
            if not self._failures:
                path.unlink(missing_ok=True)
                return
            write_whole(path, json.dumps([asdict(one) for one in self._failures.values()], indent=1))

    @property
    def aside(self) -> set[int]:
        """Items that are not to be tried here again."""
        return {item for item, one in self._failures.items() if one.state in ("aside", "retried")}

    @property
    def suspects(self) -> list[int]:
        """Items to be tried alone, those that have failed come last."""
        items = [item for item, one in self._failures.items() if one.state in ("suspect", "failed")]
        return sorted(items, key=lambda item: len(self._failures[item].errors))


def failures(folder: Path) -> Iterator[Failure]:
    """Every failure of a run folder, by unit."""
    for path in sorted((folder / "failures").glob("[!.]*.json")):
        yield from _read(path)


def units_left(folder: Path, closed: Collection[str]) -> Iterator[Unit]:
    """The planned units that are not done: neither closed, nor with every item set aside."""
    aside = Counter(one.unit for one in failures(folder) if one.state in ("aside", "retried"))
    return (unit for unit in planned_units(folder) if unit.name not in closed and aside[unit.name] < len(unit))


def let_go(folder: Path, units: Iterable[str], *, driver: str = "") -> None:
    """Clears what a driver's workers of these units had in their hands: they were stopped, and did not crash."""
    for unit in units:
        path = folder / "failures" / f".{unit}.json"
        with contextlib.suppress(OSError):
            if _in_hand(path)["driver"] == driver:
                path.unlink(missing_ok=True)


def _in_hand(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {"driver": None, "items": []}


def _read(path: Path) -> list[Failure]:
    try:
        return [Failure(**values | {"errors": tuple(values["errors"])}) for values in json.loads(path.read_text())]
    except FileNotFoundError:
        return []
