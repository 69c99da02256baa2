"""Exporting a file or run folder as Zarr, for tools that read arrays from object stores."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from dfengine.files import check_local
from dfengine.store.file.errors import translate_os_errors
from dfengine.store.file.files import temporary_path
from dfengine.store.file.locks import Lock
from dfengine.store.file.plan import StoreError
from dfengine.store.run.reader import RunFolder, open


def export_zarr(path: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the arrays of `to_xarray` for a file or run folder as a Zarr group, one segment at a time; returns `out`.

    `xarray.open_zarr` reads it. It appears only when it is complete. Needs xarray and zarr. Raises StoreError if `out`
    exists (with `overwrite`, if it is not a Zarr group) or is being written, there are no items yet, or segments differ
    in shape; ValueError if `out` is an address.
    """
    out = check_local(Path(out))
    try:
        import xarray  # noqa: F401
        import zarr
    except ImportError as error:
        raise StoreError(f"export to Zarr needs {error.name}: pip install 'dfengine[zarr]'") from None
    temporary = temporary_path(out)
    with open(path) as opened, translate_os_errors(out), Lock(out):
        _check_target(out, overwrite)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for number, table in enumerate(opened.tables() if isinstance(opened, RunFolder) else [opened.to_xarray()]):
                texts = [name for name, values in table.coords.items() if values.dtype.kind == "U"]
                table = table.assign_coords({name: table[name].astype(object) for name in texts})  # of variable length
                options: dict[str, Any] = {"append_dim": "item"} if number else {"mode": "w-"}
                table.to_zarr(temporary, consolidated=False, **options)
            with warnings.catch_warnings(action="ignore"):  # that not every program reads consolidated metadata
                zarr.consolidate_metadata(temporary)
            _replace_folder(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


def _check_target(out: Path, overwrite: bool) -> None:
    """Raises StoreError if `out` exists and may not be replaced."""
    if not out.exists():
        return
    if not overwrite:
        raise StoreError(f"{out} exists already: choose another name, or replace it with --overwrite")
    if not any((out / name).is_file() for name in ("zarr.json", ".zgroup")):
        raise StoreError(f"{out} exists and is not a Zarr group, so it is not overwritten: choose another name")


def _replace_folder(new: Path, out: Path) -> None:
    """Move a folder to `out`. Folders cannot be replaced atomically: an old one is moved aside and then removed."""
    if not out.exists():
        new.rename(out)
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
