"""The driver: gives units to workers, and goes on when one of them dies or stalls. It keeps nothing: the files do."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dfengine import store
from dfengine.sweep.records import Closed, Failed, Gone, Idle, Probed, Progress, Record, Refused, Taken
from dfengine.sweep.spec import Source, Sweep
from dfengine.sweep.worker import Explain, Probe

#: Workers may end so often, one after the other, before any of them has done anything.
_MOST_DEATHS = 3
#: Seconds that are waited for a worker to tell something, before looking whether one stalls.
_LOOK_SECONDS = 1.0
#: A unit that another process is at is looked at so often, after the others.
_MOST_LOOKS = 6


@runtime_checkable
class Crew(Protocol):
    """Workers, by number, on whatever they run."""

    def start(self, worker: int) -> None: ...

    def ask(self, worker: int, request: Any) -> None: ...

    def receive(self, timeout: float) -> Iterator[tuple[int, Record]]: ...

    def end(self, worker: int) -> None: ...

    def close(self) -> None: ...


def probe(crew: Crew, sweep: Sweep, source: Source) -> Iterator[tuple[int, Record]]:
    """Ask worker 0, which is idle or not there, what a model is like; the last record is the answer, `Probed`.

    Raises ValueError where the model is not possible.
    """
    crew.start(0)
    answer: Probed | None = None
    while True:
        for worker, record in crew.receive(_LOOK_SECONDS):
            if isinstance(record, Refused):
                raise ValueError(record.error)
            if isinstance(record, Gone):
                raise ValueError(
                    f"the process that loaded {source.model!r} ended without a word: is there enough memory?"
                )
            if isinstance(record, Probed):
                answer = record
            elif isinstance(record, Idle):
                if answer is not None:
                    yield worker, answer
                    return
                crew.ask(0, Probe(source, sweep.schedules, sweep.prompts))
            else:
                yield worker, record


class Driver:
    """One run of the units that are left, by some workers."""

    def __init__(
        self,
        crew: Crew,
        folder: Path,
        units: Sequence[store.Unit],
        *,
        workers: int,
        stall: float,
        driver: str = "",
    ) -> None:
        """A worker that has told nothing for `stall` seconds is ended, and its unit begun again. `driver` is what the
        workers know this driver by.
        """
        self._driver = driver
        self._looks: Counter[str] = Counter()
        self._crew, self._folder, self._stall = crew, folder, stall
        self._left = deque(units)
        self._number = min(workers, len(units))
        self._in_hand: dict[int, store.Unit] = {}
        self._heard: dict[int, float] = {}
        self._deaths = 0

    def run(self) -> Iterator[tuple[int, Record]]:
        """Everything that the workers tell, each with its worker's number, until no unit is left.

        Closing the iterator stops the workers; what they had in hand is put down, and goes on the next time. Raises
        ValueError where a worker says that the sweep is not possible, or workers keep ending before anything is done.
        """
        for worker in range(self._number):
            self._crew.start(worker)
        working = self._number
        try:
            while working:
                for worker, record in self._crew.receive(_LOOK_SECONDS):
                    if not isinstance(record, Idle):
                        before = time.monotonic()
                        yield worker, record
                        self._excuse(time.monotonic() - before)
                    working -= self._heed(worker, record)
                for worker in self._stalled():
                    self._crew.end(worker)
                    yield worker, Gone()
                    working -= self._heed(worker, Gone())
        finally:
            self._crew.close()
            store.release_units(self._folder, (unit.name for unit in self._in_hand.values()), driver=self._driver)

    def _heed(self, worker: int, record: Record) -> bool:
        """Act on a record; true where the worker was the last's, and is ended."""
        self._heard[worker] = time.monotonic()
        if isinstance(record, Refused):
            raise ValueError(record.error)
        if isinstance(record, Progress | Closed | Taken | Failed):
            self._deaths = 0
        if isinstance(record, Closed | Taken):
            unit = self._in_hand.pop(worker)
            self._looks[unit.name] += 1
            if isinstance(record, Taken) and self._looks[unit.name] < _MOST_LOOKS:
                self._left.append(unit)
        if isinstance(record, Failed) and record.fresh:
            self._crew.end(worker)
            return self._again(worker, later=True)
        if isinstance(record, Gone):
            self._deaths += 1
            if self._deaths > _MOST_DEATHS + self._number:
                raise ValueError(
                    f"workers ended {self._deaths} times before anything was done: is there enough memory for the "
                    "model, and time to load it (--stall-minutes)? what was done is kept"
                )
            return self._again(worker, later=False)
        if isinstance(record, Idle):
            return self._give(worker)
        return False

    def _again(self, worker: int, *, later: bool) -> bool:
        """Put back what an ended worker had, and begin another in its place; true where nothing is left to do."""
        if unit := self._in_hand.pop(worker, None):
            (self._left.append if later else self._left.appendleft)(unit)
        self._heard.pop(worker, None)
        if not self._left:
            return True
        self._crew.start(worker)
        return False

    def _give(self, worker: int) -> bool:
        """Give an idle worker the next unit; true where there is none, and it is ended."""
        if not self._left:
            self._crew.end(worker)
            return True
        unit = self._left.popleft()
        self._in_hand[worker] = unit
        self._crew.ask(worker, Explain(unit, times=1 + math.ceil(len(self._left) / self._number)))
        return False

    def _excuse(self, seconds: float) -> None:
        """What the consumer took its time for is no worker's stalling."""
        self._heard = {worker: heard + seconds for worker, heard in self._heard.items()}

    def _stalled(self) -> list[int]:
        """Workers that have a unit, and have told nothing for too long."""
        now = time.monotonic()
        return [worker for worker in self._in_hand if now - self._heard[worker] > self._stall]
