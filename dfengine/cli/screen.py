"""What the command line prints: its output, notes, errors, and where an interrupted run is."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from dfengine.text import printable

#: Where torch warns that it finds CUDA's compiler but no GPU, which is no fault.
_CUDA_LOGGER = "torch.utils.cpp_extension"
#: What to do after an interruption that kept something.
RESUME = "rerun the same command to resume"

err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(*lines: object) -> None:
    """Print lines to stdout."""
    print("\n".join(map(printable, lines)), flush=True)


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Print a value to stdout as JSON, on one line unless it is indented."""
    say(*json.dumps(value, indent=indent).split("\n"))


def complain(text: object) -> None:
    """Print one line to stderr."""
    err.print(Text(f"dfengine: {printable(' '.join(str(text).split()))}"))


def note(text: object) -> None:
    """Print a note to stderr."""
    complain(f"note: {text}")


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
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C or SIGTERM print what `kept` says of completed work, and exit with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        complain(f"interrupted; {kept() or 'nothing was written'}")
        raise typer.Exit(130) from None


@contextmanager
def logged() -> Iterator[None]:
    """While inside, the package's log entries are printed as notes; torch says nothing of a missing CUDA runtime."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    log, notes, cuda = logging.getLogger("dfengine"), Notes(logging.INFO), logging.getLogger(_CUDA_LOGGER)
    levels = log.level, cuda.level
    log.setLevel(logging.INFO)
    cuda.setLevel(logging.ERROR)
    log.addHandler(notes)
    try:
        yield
    finally:
        log.removeHandler(notes)
        log.setLevel(levels[0])
        cuda.setLevel(levels[1])
