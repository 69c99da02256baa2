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
        Path | None,
        options.path_option("-o", "--out", "--output", help="page to write; by default run.html for run.h5"),
    ] = None,
    item: Annotated[
        list[int] | None, typer.Option(min=0, help="image of the file, counted from 0; repeat for several")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="images at most, if no --item is named")] = 8,
    title: Annotated[str, typer.Option(help="title of the page; the first image's prompt by default")] = "",
) -> None:
    """Write one page of a run's images for any browser, offline: every step, method, layer and word."""
    from dfengine import report, store

    with store.open(run) as opened:
        for place in item or []:
            if not opened[place].has_trajectory:
                raise ValueError(f"item {place} is not generated yet: follow it with dfengine watch {run}")
        most = min(limit, len(opened))
        there = (one for one in opened if one.has_trajectory)
        shown = [opened[place] for place in dict.fromkeys(item)] if item else list(islice(there, most))
        if not item and next(there, None) is not None:
            screen.err.print(f"dfengine: note: {limit} of {len(opened)} images; --limit or --item for others")
        with screen.bar("packing", len(shown)) as (bar, task):
            page = report.write(
                shown, out or options.sibling(run, ".html"), title=title, on_progress=lambda: bar.advance(task)
            )
    print(f"{page}: {len(shown)} image{'s' * (len(shown) != 1)}, {page.stat().st_size / 1e6:.1f} MB")
