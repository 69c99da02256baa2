"""Resume: a killed file is never appended to; what is marked in it is written again into a fresh one."""

from pathlib import Path

import numpy as np

from dfengine.store import schema
from dfengine.store.files import part_path
from dfengine.store.plan import Plan, StoreError
from dfengine.store.reader import Run, open_file
from dfengine.store.sink import Sink, Write


def interrupted_run(path: Path, plan: Plan, overwrite: bool, resume: bool) -> Run | None:
    """The interrupted file to go on with, if any; StoreError where something is in the way that may not be lost."""
    part = part_path(path)
    if path.is_dir():
        raise StoreError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise StoreError(f"{path} exists already: choose another name, or --overwrite to replace it")
    if not part.exists() or (overwrite and not resume):
        return None
    if not resume:
        raise StoreError(f"{part} holds an interrupted run: go on with it (resume), or overwrite it (--overwrite)")
    try:
        return open_same(part, plan)
    except StoreError:
        if not overwrite:
            raise
        return None


def open_same(part: Path, plan: Plan) -> Run:
    """A file to go on with; StoreError where its plan is another."""
    run = open_file(part)
    if differences := run.plan.differences(plan):
        run.close()
        told = "; ".join(differences)
        raise StoreError(f"{part} was begun with other settings: {told}; use those, or --overwrite to start afresh")
    return run


def copy(source: Run, sink: Sink) -> None:
    """Writes again what is marked in another file of the same plan and not here yet.

    What is damaged there stays unmarked here, and its item unfinished.
    """
    # Before the marks: of a file that is being written, what is finished by now is marked when they are read.
    seconds, attempts = source.read("items/seconds", {}), source.read("items/attempt", {})
    for marker, row in schema.MARKERS.items():
        members = [name for name, (dataset, _) in source.layout.items() if dataset.marker == marker]
        for place in np.argwhere(source.marks(marker) & ~sink.marks[marker]):
            where = dict(zip(row.axis_names, place.tolist(), strict=True))
            try:
                values = {name: source.read(name, where) for name in members}
            except StoreError:
                seconds[where["item"]] = np.nan
                continue
            sink.write(Write(where, {name: values[name] for name in members if _written(values[name])}, marker))
    seconds = np.where(np.isnan(seconds), sink.stored.read("items/seconds", {}), seconds)
    attempts = np.maximum(attempts + np.isnan(seconds), sink.stored.read("items/attempt", {}))
    sink.write(Write({}, {"items/seconds": seconds, "items/attempt": attempts}))


def _written(values: np.ndarray) -> bool:
    """Whether there is anything in what was read: a place without an array reads as NaN."""
    return values.dtype.kind != "f" or not np.isnan(values).all()
