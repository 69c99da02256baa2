"""Progress on stderr: bars on a terminal, and in a log a line every so often."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dfengine.cli.screen import complain, err
from dfengine.text import printable

if TYPE_CHECKING:
    from dfengine.sweep import Event as SweepEvent

T = TypeVar("T")

#: Seconds between two lines of a log.
LOG_SECONDS = 30.0

_STATES = {"failed": "it will be retried", "quarantined": "quarantined"}


class Bar:
    """How much of some work is done."""

    def __init__(self, what: str, total: float = 0, show: Callable[[Bar], None] = lambda _: None) -> None:
        """`show` is called whenever something changed."""
        self.what, self.total, self.done = what, total, 0.0
        self._show, self._first, self._started = show, 0.0, time.monotonic()

    def begin(self, what: str, total: float, done: float = 0) -> None:
        """The work itself begins; what an earlier run has done of it does not count for the rate."""
        self._first, self._started = done, time.monotonic()
        self.update(done, what, total)

    def update(self, done: float, what: str = "", total: float = 0) -> None:
        """Report how much is done, and of what."""
        self.done, self.what, self.total = done, what or self.what, total or self.total
        self._show(self)

    def advance(self, count: float = 1) -> None:
        """Report that so much more is done."""
        self.update(self.done + count)

    def __str__(self) -> str:
        """The line of a log, such as "explaining, maps: 12 of 30, 4.1 a minute, 4 min left"."""
        from dfengine.runtime.tuning import format_duration

        parts = [f"{self.what}: {self.done:.0f} of {self.total:.0f}" if self.total else self.what]
        progress, seconds = self.done - self._first, time.monotonic() - self._started
        if progress > 0:
            left = (self.total - self.done) * seconds / progress
            parts += [f"{60 * progress / max(seconds, 1e-9):.1f} a minute", f"{format_duration(left)} left"]
        return ", ".join(parts)


@contextmanager
def bar(what: str, total: float = 0) -> Iterator[Bar]:
    """A bar that follows some work, removed at the end; without a terminal, lines for a log."""
    if not err.is_terminal:
        plain = Bar(what, total)
        with _logged(plain):
            yield plain
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as drawn:
        task = drawn.add_task(printable(what), total=total or None)

        def show(bar: Bar) -> None:
            drawn.update(task, description=printable(bar.what), completed=bar.done, total=bar.total or None)

        yield Bar(what, total, show)


@contextmanager
def _logged(bar: Bar) -> Iterator[None]:
    """While inside, print a line every `LOG_SECONDS`, and one at the end if there was one before."""
    stop, printed = threading.Event(), ""

    def follow() -> None:
        nonlocal printed
        while not stop.wait(LOG_SECONDS):
            printed = str(bar)
            complain(printed)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if printed not in ("", str(bar)):
            complain(bar)


def counted(things: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The given things, with a bar that counts them."""
    with bar(what, total) as shown:
        for thing in things:
            shown.advance()
            yield thing


@contextmanager
def sweep_bars() -> Iterator[Callable[[int, SweepEvent], None]]:
    """A bar for the sweep and one for each worker, that follow its events; notes and failures as lines."""
    from dfengine import sweep

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    printed = set()
    whole = Bar("measuring the models")
    log = nullcontext() if err.is_terminal else _logged(whole)
    bars = Progress(*columns, console=err, transient=True, disable=not err.is_terminal, speed_estimate_period=120)
    with log, bars:
        total = bars.add_task(whole.what, total=None, rate="")
        by_worker: dict[int, TaskID] = {}

        def say(text: str) -> None:
            if text not in printed:
                printed.add(text)
                complain(text)

        def show(worker: int, event: SweepEvent) -> None:
            if isinstance(event, sweep.SweepStarted):
                whole.begin(f"{event.items} items, maps", event.maps)
                bars.update(total, description=f"{event.items} items", total=event.maps)
                share = event.maps / max(1, event.workers)
                by_worker.update(
                    {one: bars.add_task(f"worker {one}", total=share, rate="") for one in range(event.workers)}
                )
            elif isinstance(event, sweep.Progress):
                whole.advance(event.maps)
                for task in (total, by_worker[worker]):
                    bars.advance(task, event.maps)
                    speed = bars.tasks[task].speed
                    bars.update(task, rate="" if speed is None else f"{speed:.1f}/s")
                bars.update(by_worker[worker], description=printable(f"worker {worker}, {event.unit}"))
            elif isinstance(event, sweep.Note):
                say(f"note: {event.text}")
            elif isinstance(event, sweep.Failed):
                for one in event.failures:
                    if one.errors:
                        item = f"{one.described['prompt']!r}, seed {one.described['seed']}"
                        say(f"{item}: {one.errors[-1]}; {_STATES[one.state]}")
            elif isinstance(event, sweep.WorkerExited):
                say(f"worker {worker} exited unexpectedly or stalled: another takes over")
            elif isinstance(event, sweep.UnitBusy):
                say(f"{event.unit} is being written by another run: skipped")

        yield show
