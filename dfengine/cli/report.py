"""`dfengine report`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from dfengine.cli import options, screen


def report(
    run: options.Run,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="page to write; by default run.html of run.h5")
    ] = None,
    item: Annotated[list[int] | None, typer.Option(help="which image of the file, from 0; repeat for several")] = None,
    limit: Annotated[int, typer.Option(help="images at most, where none is named")] = 8,
    title: Annotated[str, typer.Option(help="of the page; the first image's prompt by default")] = "",
) -> None:
    """Make one page of a run's images, to open in any browser: every step, method, layer and word, offline."""
    from dfengine import report, store

    if limit < 1:
        raise ValueError(f"{limit} images are not possible: expected at least 1")
    with store.open(run) as opened:
        if any(not opened[place].has_trajectory for place in item or []):
            raise ValueError(f"an image that is named is not generated yet: watch it with dfengine watch {run}")
        there = (place for place in range(len(opened)) if opened[place].has_trajectory)
        numbers = [*dict.fromkeys(place % len(opened) for place in item)] if item else list(islice(there, limit))
        if not item and next(there, None) is not None:
            screen.err.print(f"dfengine: note: {len(numbers)} of {len(opened)} images; --limit or --item for others")
        page = report.write(
            screen.counted((opened[place] for place in numbers), "packing", len(numbers)),
            out or run.parent / f"{run.resolve().name.removesuffix('.h5')}.html",
            title=title,
            source=str(run),
            numbers=numbers,
        )
    print(f"{page}: {len(numbers)} image{'s' * (len(numbers) != 1)}, {page.stat().st_size / 1e6:.1f} MB")
