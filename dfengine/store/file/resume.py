"""Resuming: an interrupted file is never appended to; its marked values are copied into a new one."""

from pathlib import Path

import numpy as np

from dfengine.store.file import schema
from dfengine.store.file.errors import translate_os_errors
from dfengine.store.file.files import check_folder, check_name, part_path
from dfengine.store.file.plan import Plan, StoreError
from dfengine.store.file.reader import Run, open_file
from dfengine.store.file.swmr import SWMRFile, Write


def check_target(path: Path, overwrite: bool) -> None:
    """Raise StoreError if a result cannot be written to a path, or would replace one without `overwrite`."""
    check_name(path)
    with translate_os_errors(path):
        check_folder(path)
        _check_free(path, overwrite)


def _check_free(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise StoreError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise StoreError(f"{path} exists already: choose another name, or replace it with --overwrite")


def interrupted_run(path: Path, plan: Plan, overwrite: bool, resume: bool) -> Run | None:
    """The interrupted file to continue, if any. Raises StoreError if something would be lost."""
    part = part_path(path)
    _check_free(path, overwrite)
    if not part.exists() or (overwrite and not resume):
        return None
    if not resume:
        raise StoreError(f"{part} holds an interrupted run: resume it, or discard it with --overwrite")
    try:
        return open_to_resume(part, plan)
    except StoreError:
        if not overwrite:
            raise
        return None


def open_to_resume(part: Path, plan: Plan) -> Run:
    """A file to continue. Raises StoreError if it has another plan, or is of an earlier format version."""
    run = open_file(part)
    if run.format_version != schema.FORMAT_VERSION:
        run.close()
        raise StoreError(
            f"{part} has format version {run.format_version} and cannot be resumed with version "
            f"{schema.FORMAT_VERSION}: finish it with the dfengine that began it, or discard it with --overwrite"
        )
    if differences := run.plan.differences(plan):
        run.close()
        changed = "; ".join(differences)
        raise StoreError(f"{part} was begun with other settings: {changed}; use those, or discard it with --overwrite")
    return run


def copy(source: Run, target: SWMRFile) -> None:
    """Copy what is marked in another file of the same plan and not in the target yet.

    Damaged values stay unmarked in the target, and their item unfinished.
    """
    # Read before the marks: if the source is still being written, what is finished here is then marked below.
    seconds, attempts = source.read("items/seconds", {}), source.read("items/attempt", {})
    for marker, row in schema.MARKERS.items():
        paths = [path for path, (dataset, _) in source.layout.items() if dataset.marker == marker]
        for place in np.argwhere(source.marks(marker) & ~target.marks[marker]):
            where = dict(zip(row.axis_names, place.tolist(), strict=True))
            try:
                values = {path: source.read(path, where) for path in paths}
            except StoreError:
                seconds[where["item"]] = np.nan
                continue
            target.write(Write(where, {path: values[path] for path in paths if _is_written(values[path])}, marker))
    seconds = np.where(np.isnan(seconds), target.stored.read("items/seconds", {}), seconds)
    attempts = np.maximum(attempts + np.isnan(seconds), target.stored.read("items/attempt", {}))
    target.write(Write({}, {"items/seconds": seconds, "items/attempt": attempts}))


def _is_written(values: np.ndarray) -> bool:
    """False where no array was ever written, which reads as NaN."""
    return values.dtype.kind != "f" or not np.isnan(values).all()
