"""What a file or run folder holds, as Zarr: for tools that read arrays from object stores."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from dfengine.store.files import writing
from dfengine.store.folder_reader import RunFolder, open
from dfengine.store.plan import StoreError


def export_zarr(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Writes all that `to_xarray` has of a file or run folder as a Zarr group, a segment at a time; returns `out`.

    `xarray.open_zarr` reads it. It is not there until it is whole. Needs xarray and zarr. StoreError where `out`
    exists, there are no items yet, or segments differ in shape.
    """
    out = Path(out)
    try:
        import xarray  # noqa: F401
        import zarr  # noqa: F401
    except ImportError as error:
        raise StoreError(f"this needs {error.name}: pip install 'dfengine[zarr]'") from None
    if out.exists():
        raise StoreError(f"{out} exists already: choose another name, or remove it")
    fresh = out.with_name(f".{out.name}.new")
    with open(path) as opened, writing(out):
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            for number, table in enumerate(opened.tables() if isinstance(opened, RunFolder) else [opened.to_xarray()]):
                texts = [name for name, values in table.coords.items() if values.dtype.kind == "U"]
                table = table.assign_coords({name: table[name].astype(object) for name in texts})  # of any length
                more: dict[str, Any] = {"append_dim": "item"} if number else {"mode": "w-"}
                table.to_zarr(fresh, consolidated=False, **more)
            fresh.rename(out)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return out
