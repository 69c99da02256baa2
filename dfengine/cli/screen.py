"""What the command line prints: its output, notes, errors, and where an interrupted run is."""

from __future__ import annotations

import json
import logging
import signal
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

#: Characters that a terminal acts on instead of showing them: control characters, lone surrogates, line separators,
_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
#: and those that reorder what stands beside them.
_DIRECTIONS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}

#: Where torch warns that it finds CUDA's compiler but no GPU, which is no fault.
_CUDA_LOGGER = "torch.utils.cpp_extension"
#: What to do after an interruption that kept something.
RESUME = "rerun the same command to resume"

err = Console(stderr=True, highlight=False, soft_wrap=True)


def printable(text: object) -> str:
    r"""A text on one line, with every character that a terminal would act on as its escape: \x1b, \n, \u202e.

    Everything passes through here that comes from a file, a name, a prompt, the environment or an error. In valid JSON
    the escapes that are added are JSON's own.
    """
    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_escape, text))


def _escape(letter: str) -> str:
    if unicodedata.category(letter) in _CATEGORIES or unicodedata.bidirectional(letter) in _DIRECTIONS:
        return repr(letter)[1:-1] if letter < "\x7f" else f"\\u{ord(letter):04x}"
    return letter


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
