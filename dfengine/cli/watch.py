"""`dfengine watch`: a live view of a run that is being written."""

from __future__ import annotations

import time
from collections import deque
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

if TYPE_CHECKING:
    from numpy import ndarray

    from dfengine.store import LatestMap, RunProgress

#: Seconds over which the rate is taken.
_WINDOW = 120.0
#: Rows of characters that the picture has, each of two rows of pixels.
_ROWS = 12
#: A look may take this share of the time, at the most.
_SHARE = 0.2


def watch(
    run: options.Run,
    every: Annotated[float, typer.Option(help="seconds from one look to the next")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="look once, as wherever this is no terminal")] = False,
) -> None:
    """Follow a run that is being written: how far each file is, the rate, the time left, and the latest map."""
    from dfengine import store

    if not every > 0:
        raise ValueError(f"{every} seconds are not possible: expected more than 0")
    console = Console(highlight=False)
    seen, rate = store.progress(run), Rate()
    rate.add(time.monotonic(), seen.done)
    if once or not console.is_terminal:
        console.print(view(seen, rate, is_coloured=console.is_terminal))
        return
    with Live(view(seen, rate), console=console, auto_refresh=False) as live:
        took = 0.0
        while not seen.finished:
            time.sleep(max(every, took / _SHARE))
            began = time.monotonic()
            try:
                seen = store.progress(run)
            except store.StoreError:  # it gets another name just now
                continue
            took = time.monotonic() - began
            rate.add(began, seen.done)
            live.update(view(seen, rate), refresh=True)


class Rate:
    """How fast items are done, over the last minutes."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()

    def add(self, now: float, done: float) -> None:
        """So many items are done now."""
        self._points.append((now, done))
        while self._points[-1][0] - self._points[0][0] > _WINDOW and len(self._points) > 2:
            self._points.popleft()

    @property
    def items_a_second(self) -> float | None:
        """None where nothing was seen to be done yet."""
        (then, before), (now, after) = self._points[0], self._points[-1]
        return (after - before) / (now - then) if after > before else None


def view(seen: RunProgress, rate: Rate, *, is_coloured: bool = True) -> RenderableType:
    """What a look shows: a bar for all items, one for each file at work, and the latest map where there are colours."""
    from dfengine.runtime.tuning import format_duration

    speed = rate.items_a_second
    told = [f"{int(seen.done)} of {seen.items} items"]
    if seen.finished:
        told.append("finished")
    elif speed is not None:
        told += [f"{60 * speed:.1f} a minute", f"{format_duration((seen.items - seen.done) / speed)} left"]
    if seen.quarantined:
        told.append(f"{seen.quarantined} set aside")
    bars = Table.grid(padding=(0, 1))
    bars.add_row(Text(str(seen.path)), ProgressBar(seen.items, seen.done, width=30), Text(", ".join(told)))
    for part in seen.parts if not seen.finished else []:
        done = f"{part.maps} of {part.planned} maps, {part.finished} of {part.items} items"
        bars.add_row(Text(part.name), ProgressBar(part.planned, part.maps, width=30), Text(done))
    return bars if seen.latest is None or not is_coloured else Group(bars, Text(), picture(seen.latest))


def picture(latest: LatestMap) -> RenderableType:
    """The image and its map over it, side by side, in half blocks, and what they are."""
    from dfengine import figures

    both = [latest.image / 255, figures.overlay(latest.image, latest.heatmap)]
    height, width = latest.image.shape[:2]
    columns = max(1, round(2 * _ROWS * width / height))
    pixels = np.concatenate([_small(one, 2 * _ROWS, columns) for one in both], axis=1)
    lines = Text()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper, lower, strict=True):
            lines.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        lines.append("\n")
    lines.append(f"{latest.prompt!r}, seed {latest.seed}: {latest.method}, step {latest.step}, t = {latest.timestep}")
    return lines


def _small(image: ndarray, height: int, width: int) -> ndarray:
    """The nearest pixels of an image in [0, 1], as bytes."""
    rows, columns = (
        (np.arange(size) * length // size) for size, length in zip((height, width), image.shape[:2], strict=True)
    )
    return np.round(255 * image[rows][:, columns]).astype(int)
