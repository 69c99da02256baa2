"""The verbs that work on files: info, merge, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from dfengine.cli import options, screen


def info(run: options.Run, as_json: options.Json = False) -> None:
    """Print what a file holds, how much of it is done, and how it was computed."""
    from dfengine import store

    with store.open(run) as opened:
        if as_json:
            screen.say_json(opened.summary(), indent=2)
        else:
            screen.say(*store.summary_lines(opened, _format_settings))


def _format_settings(settings: Mapping[str, Any]) -> str:
    """The explainer with the settings that are not defaults; all settings if the explainer is not known here."""
    from dfengine.explain import rebuild
    from dfengine.result import as_call

    try:
        explainer = rebuild(settings)
    except ValueError:
        return as_call(settings)
    values = {field.name: getattr(explainer, field.name) for field in dataclasses.fields(explainer)}
    changed = {
        field.name: values[field.name] for field in dataclasses.fields(explainer) if values[field.name] != field.default
    }
    return f"{type(explainer).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def merge(
    runs: Annotated[list[Path], options.path_argument("files and run folders with the same settings")],
    out: Annotated[Path, options.path_option("-o", "--out", "--output", help="HDF5 file to write")],
    overwrite: options.Overwrite = False,
) -> None:
    """Merge several files into one; an image that several of them have is kept once."""
    from dfengine import store
    from dfengine.store.file.resume import check_target

    check_target(out, overwrite)
    with store.open(store.merge(runs, out, overwrite=overwrite)) as merged:
        screen.say(f"{out}: {len(merged)} image{'s' * (len(merged) != 1)}")


def export(
    run: options.Run,
    out: Annotated[Path, options.path_option("-o", "--out", "--output", "--zarr", help="Zarr group to write")],
    overwrite: options.Overwrite = False,
) -> None:
    """Export maps, scores, images and schedules to Zarr, for xarray.open_zarr and tools on object stores."""
    from dfengine import store

    screen.say(store.export_zarr(run, out, overwrite=overwrite))
