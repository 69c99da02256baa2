"""The verbs that work on files: info, merge, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from dfengine.cli import options


def info(run: options.Run, as_json: options.Json = False) -> None:
    """Print what a file holds, how much of it is done, and how it was computed."""
    import json

    from dfengine import store

    with store.open(run) as opened:
        print(json.dumps(opened.summary(), indent=2) if as_json else "\n".join(store.lines(opened)))


def merge(
    runs: Annotated[list[Path], options.path_argument("files and run folders with the same settings")],
    out: Annotated[Path, options.path_option("-o", "--out", "--output", help="HDF5 file to write")],
    overwrite: options.Overwrite = False,
) -> None:
    """Merge several files into one; an image that several of them have is kept once."""
    from dfengine import store

    with store.open(store.merge(runs, out, overwrite=overwrite)) as merged:
        print(f"{out}: {len(merged)} image{'s' * (len(merged) != 1)}")


def export(
    run: options.Run,
    out: Annotated[Path, options.path_option("-o", "--out", "--output", "--zarr", help="Zarr group to write")],
    overwrite: options.Overwrite = False,
) -> None:
    """Export maps, scores, images and schedules to Zarr, for xarray.open_zarr and tools on object stores."""
    from dfengine import store

    print(store.export_zarr(run, out, overwrite=overwrite))
