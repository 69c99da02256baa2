"""`dfengine report`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from dfengine.cli import options, progress, screen


def report(
    run: options.Run,
    out: Annotated[
        Path | None,
        options.path_option("-o", "--out", "--output", help="page to write; by default run.html for run.h5"),
    ] = None,
    item: options.Items = None,
    limit: options.Limit = None,
    title: Annotated[str, typer.Option(help="title of the page; the first image's prompt by default")] = "",
) -> None:
    """Write one page of a run's images for any browser, offline: every step, method, layer and word."""
    from dfengine import figures, report, store

    options.refuse(limit is not None and bool(item), "--limit", "for images that no --item names")
    out = figures.check_name(out or options.sibling(run, ".html"), (".html", ".htm"))
    with store.open(run) as opened:
        for place in item or []:
            if not opened[place].has_trajectory:
                raise ValueError(f"item {place} is not generated yet: follow it with dfengine watch {run}")
        most = min(limit or options.MOST_IMAGES, len(opened))
        there = (one for one in opened if one.has_trajectory)
        shown = [opened[place] for place in dict.fromkeys(item)] if item else list(islice(there, most))
        if not item and next(there, None) is not None:
            screen.note(f"{most} of {len(opened)} images; --limit or --item for others")
        with progress.bar("packing", len(shown)) as bar:
            page = report.write(shown, out, title=title, on_progress=bar.advance)
    screen.say(f"{page}: {len(shown)} image{'s' * (len(shown) != 1)}, {page.stat().st_size / 1e6:.1f} MB")
