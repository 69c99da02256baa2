"""The verbs that work on files: info, merge, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfengine.cli import options


def info(run: options.Run, as_json: options.Json = False) -> None:
    """Say what a file holds, what of it is done, and how it was made."""
    import json

    from dfengine import store

    with store.open(run) as opened:
        print(json.dumps(opened.summary(), indent=2) if as_json else "\n".join(store.lines(opened)))


def merge(
    runs: Annotated[list[Path], typer.Argument(help="files and run folders, made with the same settings")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HDF5 file to write")],
    overwrite: options.Overwrite = False,
) -> None:
    """Make one file of several: every image once, whatever file it is in."""
    from dfengine import store

    with store.open(store.merge(runs, out, overwrite=overwrite)) as merged:
        print(f"{out}: {len(merged)} image{'s' * (len(merged) != 1)}")


def export(
    run: options.Run,
    zarr: Annotated[Path, typer.Option("--zarr", help="Zarr group to write: what xarray sees of the run")],
) -> None:
    """Write maps, scores, images and schedules in another format, as tools on object stores read it."""
    from dfengine import store

    print(store.export_zarr(run, zarr))
