"""What the command line prints while it works: progress bars, notes, and where an interrupted run is."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from dfengine.engine import Event
    from dfengine.sweep import Event as SweepEvent

T = TypeVar("T")

_STATES = {"failed": "it will be retried", "quarantined": "quarantined"}

err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def bar(what: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    """A bar on the terminal, if there is one, removed at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as shown:
        yield shown, shown.add_task(what, total=total)


@contextmanager
def progress(steps: int) -> Iterator[Callable[[Event], None]]:
    """A bar that follows the engine's events."""
    from dfengine import StepMap

    with bar("generating", steps) as (shown, task):

        def on_event(event: Event) -> None:
            if isinstance(event, StepMap):
                shown.advance(task)
            else:
                shown.update(task, description="explaining steps")

        yield on_event


def counted(things: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The given things, with a bar that counts them."""
    with bar(what, total) as (shown, task):
        for thing in things:
            shown.advance(task)
            yield thing


@contextmanager
def sweep_bars() -> Iterator[Callable[[int, SweepEvent], None]]:
    """A bar for the sweep and one for each worker, that follow its events; notes and failures as lines."""
    from dfengine import sweep

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    printed = set()
    with Progress(
        *columns, console=err, transient=True, disable=not err.is_terminal, speed_estimate_period=120
    ) as bars:
        total = bars.add_task("starting", total=None, rate="")
        by_worker: dict[int, TaskID] = {}

        def say(text: str) -> None:
            if text not in printed:
                printed.add(text)
                err.print(f"dfengine: {text}", markup=False)

        def show(worker: int, event: SweepEvent) -> None:
            if isinstance(event, sweep.SweepStarted):
                bars.update(total, description=f"{event.items} items", total=event.maps)
                share = event.maps / max(1, event.workers)
                by_worker.update(
                    {one: bars.add_task(f"worker {one}", total=share, rate="") for one in range(event.workers)}
                )
            elif isinstance(event, sweep.Progress):
                for task in (total, by_worker[worker]):
                    bars.advance(task, event.maps)
                    speed = bars.tasks[task].speed
                    bars.update(task, rate="" if speed is None else f"{speed:.1f}/s")
                bars.update(by_worker[worker], description=f"worker {worker}, {event.unit}")
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


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """A SIGTERM, which Slurm sends, stops the program as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interruptible(out: Path) -> Iterator[None]:
    """On Ctrl-C print where completed work is, and exit with status 130."""
    from dfengine.store import part_path

    try:
        yield
    except KeyboardInterrupt:
        part = part_path(out)
        done = f"completed work is in {part}" if part.exists() else "nothing was written"
        err.print(f"dfengine: interrupted; {done}", markup=False)
        raise typer.Exit(130) from None


@contextmanager
def logged(note: Callable[[str], None]) -> Iterator[None]:
    """While inside, the package's log entries are printed as notes."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    log, notes = logging.getLogger("dfengine"), Notes(logging.INFO)
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(notes)
    try:
        yield
    finally:
        log.removeHandler(notes)
        log.setLevel(level)
