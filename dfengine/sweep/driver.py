"""The driver: assigns units to workers, and replaces workers that exit or stall. All its state is in the run folder."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dfengine import store
from dfengine.sweep.events import (
    Closed,
    Event,
    Failed,
    ModelProfile,
    Progress,
    Refused,
    UnitBusy,
    WorkerExited,
    WorkerReady,
)
from dfengine.sweep.spec import ModelSpec, Sweep
from dfengine.sweep.worker import ExplainRequest, ProfileRequest

#: Exits in a row, beyond one for each worker, after which the sweep is given up if nothing was done between them.
_MAX_EXITS = 3
#: Seconds to wait for an event before looking for stalled workers.
_POLL_SECONDS = 1.0
#: A unit that another process holds is offered this often, each time after the others.
_MAX_OFFERS = 6


@runtime_checkable
class WorkerPool(Protocol):
    """Numbered workers, on whatever they run."""

    workers: int
    """how many there is room for"""

    def start(self, worker: int) -> None:
        """Start a worker unless it runs; it reports when it is ready."""

    def send(self, worker: int, request: Any) -> None:
        """Send a request to a worker that is ready."""

    def receive(self, timeout: float) -> Iterator[tuple[int, Event]]:
        """Events since the last call, after waiting for the first for at most `timeout` seconds."""

    def stop(self, worker: int) -> None:
        """End a worker at once."""

    def close(self) -> None:
        """End all workers; what they have done is on disk."""


def profile(pool: WorkerPool, sweep: Sweep, model: ModelSpec) -> Iterator[tuple[int, Event]]:
    """Have worker 0, ready or not started, load and measure a model; yield its events, the `ModelProfile` last.

    Raises ValueError if the model cannot be used.
    """
    pool.start(0)
    result: ModelProfile | None = None
    while True:
        for worker, event in pool.receive(_POLL_SECONDS):
            match event:
                case Refused():
                    raise ValueError(event.error)
                case WorkerExited():
                    raise ValueError(
                        f"the process that loaded {model.model!r} ended without reporting an error: is there enough "
                        "memory?"
                    )
                case ModelProfile():
                    result = event
                case WorkerReady() if result is not None:
                    yield worker, result
                    return
                case WorkerReady():
                    pool.send(0, ProfileRequest(model, sweep.schedules, sweep.prompts))
                case _:
                    yield worker, event


class Driver:
    """Runs the remaining units of a sweep on the workers of a pool."""

    def __init__(
        self,
        pool: WorkerPool,
        folder: Path,
        units: Sequence[store.Unit],
        *,
        workers: int,
        stall: float,
        driver: str = "",
    ) -> None:
        """A worker that reports nothing for `stall` seconds is replaced. `driver` identifies this driver on disk."""
        self._pool, self._folder, self._stall, self._driver = pool, folder, stall, driver
        self._pending = deque(units)
        self._num_workers = min(workers, len(units))
        self._assigned: dict[int, store.Unit] = {}
        self._last_event: dict[int, float] = {}
        self._offers: Counter[str] = Counter()
        self._exits = 0

    def run(self) -> Iterator[tuple[int, Event]]:
        """Yield the workers' events, each with the worker's number, until no unit is left.

        Closing the iterator stops the workers; their units are released, and continue in the next run. Raises
        ValueError if a worker reports that the sweep is not possible, or workers keep exiting before anything is done.
        """
        for worker in range(self._num_workers):
            self._pool.start(worker)
        running = self._num_workers
        try:
            while running:
                for worker, event in self._pool.receive(_POLL_SECONDS):
                    if not isinstance(event, WorkerReady):
                        before = time.monotonic()
                        yield worker, event
                        self._discount_wait(time.monotonic() - before)
                    running -= self._handle(worker, event)
                for worker in self._stalled():
                    self._pool.stop(worker)
                    yield worker, WorkerExited()
                    running -= self._handle(worker, WorkerExited())
        finally:
            self._pool.close()
            store.release_units(self._folder, (unit.name for unit in self._assigned.values()), driver=self._driver)

    def _handle(self, worker: int, event: Event) -> bool:
        """Act on an event; return whether the worker has ended for good."""
        self._last_event[worker] = time.monotonic()
        if isinstance(event, Progress | Closed | UnitBusy | Failed):
            self._exits = 0
        match event:
            case Refused():
                raise ValueError(event.error)
            case Closed() | UnitBusy():
                unit = self._assigned.pop(worker)
                self._offers[unit.name] += 1
                if isinstance(event, UnitBusy) and self._offers[unit.name] < _MAX_OFFERS:
                    self._pending.append(unit)
            case Failed(needs_restart=True):
                self._pool.stop(worker)
                return self._requeue(worker, last=True)
            case WorkerExited():
                self._exits += 1
                if self._exits > _MAX_EXITS + self._num_workers:
                    raise ValueError(
                        f"workers exited {self._exits} times before anything was done: is there enough memory for the "
                        "model, and time to load it (--stall-minutes)? Completed work is kept"
                    )
                return self._requeue(worker, last=False)
            case WorkerReady():
                return self._assign(worker)
        return False

    def _requeue(self, worker: int, *, last: bool) -> bool:
        """Put an ended worker's unit back, and start a replacement; return whether no unit is left for one."""
        if unit := self._assigned.pop(worker, None):
            (self._pending.append if last else self._pending.appendleft)(unit)
        self._last_event.pop(worker, None)
        if not self._pending:
            return True
        self._pool.start(worker)
        return False

    def _assign(self, worker: int) -> bool:
        """Send the next unit to a worker; without one, end it and return True."""
        if not self._pending:
            self._pool.stop(worker)
            return True
        unit = self._pending.popleft()
        self._assigned[worker] = unit
        self._pool.send(worker, ExplainRequest(unit, times=1 + math.ceil(len(self._pending) / self._num_workers)))
        return False

    def _discount_wait(self, seconds: float) -> None:
        """Exclude time that the consumer of the events took from the workers' silence."""
        self._last_event = {worker: last + seconds for worker, last in self._last_event.items()}

    def _stalled(self) -> list[int]:
        """Workers that have a unit and have reported nothing for too long."""
        now = time.monotonic()
        return [worker for worker in self._assigned if now - self._last_event[worker] > self._stall]
