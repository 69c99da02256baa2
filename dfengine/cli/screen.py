"""What the command line says while it works: a progress bar, notes, and where an interrupted run is."""

from __future__ import annotations

import logging
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

T = TypeVar("T")

err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def bar(what: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    """A bar on the terminal, if there is one, gone when it is done."""
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
    """The things, as they come, with a bar that counts them."""
    with bar(what, total) as (shown, task):
        for thing in things:
            shown.advance(task)
            yield thing


@contextmanager
def interruptible(out: Path) -> Iterator[None]:
    """On Ctrl-C say where what was done is, and leave with status 130."""
    from dfengine.store.files import part_path

    try:
        yield
    except KeyboardInterrupt:
        part = part_path(out)
        done = f"what was done is in {part}" if part.exists() else "nothing was written"
        err.print(f"dfengine: interrupted; {done}", markup=False)
        raise typer.Exit(130) from None


@contextmanager
def logged(note: Callable[[str], None]) -> Iterator[None]:
    """Tell the notes of the package's log."""

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
