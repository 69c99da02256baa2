"""`dfengine watch`: a live view of a run that is being written."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dfengine.cli import options
from dfengine.text import printable

if TYPE_CHECKING:
    from numpy import ndarray

    from dfengine.store import LatestMap, RunProgress

#: Seconds between updates.
_EVERY = 2.0
#: Seconds over which the rate is averaged.
_WINDOW = 120.0
#: Height of the picture in characters, each of two pixels.
_ROWS = 12
#: The largest share of the time that reading may take.
_MAX_SHARE = 0.2


def watch(
    run: options.Run,
    every: Annotated[
        float | None, options.real(help="seconds between updates, 2 by default", above=0, high=86400)
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="print the state once, as without a terminal")] = False,
) -> None:
    """Follow a run that is being written: progress of each file, rate, time left, and the latest map."""
    from dfengine import store

    options.refuse(once and every is not None, "--every", "for a state that is printed more than --once")
    console = Console(highlight=False)
    progress, rate = store.progress(run), Rate()
    rate.add(time.monotonic(), progress.done)
    if once or not console.is_terminal:
        console.print(view(progress, rate, is_coloured=console.is_terminal))
        return
    with _until_interrupted(), Live(view(progress, rate), console=console, auto_refresh=False) as live:
        seconds = 0.0
        while not progress.finished:
            time.sleep(max(every or _EVERY, seconds / _MAX_SHARE))
            started = time.monotonic()
            try:
                progress = store.progress(run)
            except store.StoreError:  # it is being renamed
                continue
            seconds = time.monotonic() - started
            rate.add(started, progress.done)
            live.update(view(progress, rate), refresh=True)


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """Ctrl-C is how watching ends: nothing needs to be said."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


class Rate:
    """The rate at which items are completed, over the last minutes."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()

    def add(self, now: float, done: float) -> None:
        """Note how many items are done at a time in seconds."""
        self._points.append((now, done))
        while self._points[-1][0] - self._points[0][0] > _WINDOW and len(self._points) > 2:
            self._points.popleft()

    @property
    def items_a_second(self) -> float | None:
        """None until progress has been seen."""
        (then, before), (now, after) = self._points[0], self._points[-1]
        return (after - before) / (now - then) if after > before else None


def view(progress: RunProgress, rate: Rate, *, is_coloured: bool = True) -> RenderableType:
    """A bar for all items, one for each file being written, and the latest map if there are colours."""
    from dfengine.runtime.tuning import format_duration

    speed = rate.items_a_second
    parts = [f"{int(progress.done)} of {progress.items} items"]
    if progress.finished:
        parts.append("finished")
    elif speed is not None:
        remaining = format_duration((progress.items - progress.done) / speed)
        parts += [f"{60 * speed:.1f} a minute", f"{remaining} left"]
    if progress.quarantined:
        parts.append(f"{progress.quarantined} quarantined")
    bars = Table.grid(padding=(0, 1))
    bars.add_row(
        Text(printable(progress.path)), ProgressBar(progress.items, progress.done, width=30), Text(", ".join(parts))
    )
    for part in progress.parts if not progress.finished else []:
        done = f"{part.maps} of {part.planned} maps, {part.finished} of {part.items} items"
        bars.add_row(Text(printable(part.name)), ProgressBar(part.planned, part.maps, width=30), Text(done))
    return bars if progress.latest is None or not is_coloured else Group(bars, Text(), picture(progress.latest))


def picture(latest: LatestMap) -> RenderableType:
    """The image, and its map over it, side by side in half blocks, with a caption."""
    from dfengine import figures

    both = [latest.image / 255, figures.overlay(latest.image, latest.heatmap)]
    height, width = latest.image.shape[:2]
    columns = max(1, round(2 * _ROWS * width / height))
    pixels = np.concatenate([_resize(one, 2 * _ROWS, columns) for one in both], axis=1)
    lines = Text()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper, lower, strict=True):
            lines.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        lines.append("\n")
    lines.append(
        printable(f"{latest.prompt!r}, seed {latest.seed}: {latest.method}, step {latest.step}, t = {latest.timestep}")
    )
    return lines


def _resize(image: ndarray, height: int, width: int) -> ndarray:
    """An image in [0, 1] at another size, by its nearest pixels, as integers up to 255."""
    rows, columns = (
        (np.arange(size) * length // size) for size, length in zip((height, width), image.shape[:2], strict=True)
    )
    return np.round(255 * image[rows][:, columns]).astype(int)
