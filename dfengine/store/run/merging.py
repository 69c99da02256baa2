"""Merging files of equal settings into one, by copying their chunks without decoding them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dfengine.store.file import schema, template
from dfengine.store.file.errors import explain_error, translate_os_errors
from dfengine.store.file.files import check_name, create, publish_file, temporary_path
from dfengine.store.file.locks import Lock
from dfengine.store.file.plan import Item, Plan, StoreError
from dfengine.store.file.reader import Run, open_file
from dfengine.store.file.swmr import opened_for_writing
from dfengine.store.run.folder import is_folder
from dfengine.store.run.segments import ItemProgress, list_segments, select_items

#: Datasets without a marker that do not follow from the plan.
_UNMARKED = {"items/attempt", "items/seconds", *(row.path for row in schema.MARKERS.values())}


def merge(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write all items of the given files and run folders to one file, each once, and return `out`.

    If several files hold an item, the first finished copy is used, else the one with most results. Unfinished items
    stay unfinished. Chunks are copied with their checksums, and `out` appears only when it is complete. Raises
    StoreError if `out` exists (without `overwrite`), or if settings differ, naming them.
    """
    out = Path(out)
    check_name(out)
    files = list(dict.fromkeys(file for path in paths for file in _files_of(Path(path))))
    if not files:
        raise StoreError("there is nothing to merge: name at least one file, or a run folder with segments")
    selection: dict[Path, list[int]] = {}
    for number, index in select_items([ItemProgress.read(file) for file in files]):
        selection.setdefault(files[number], []).append(index)
    plan, attributes = _describe(files, selection, out)
    temporary = temporary_path(out)
    with translate_os_errors(out), Lock(out):
        if out.exists() and not overwrite:
            raise StoreError(f"{out} exists already: choose another name, or replace it with --overwrite")
        try:
            content = template.build_file(plan, compression=_compression_of(files[0]), attributes=attributes)
            with create(temporary) as file:
                file.write(content)
            with opened_for_writing(temporary) as h5:
                # All stay open until the end: HDF5 writes when a dataset is closed, and does not report a failure then.
                targets = {path: h5["entry"][path] for path in schema.layout(plan)}
                first = 0
                for source, items in selection.items():
                    with open_file(source) as run:
                        _copy(run, items, targets, first)
                    first += len(items)
            publish_file(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    return out


def _files_of(path: Path) -> list[Path]:
    return [path / "segments" / segment.file for segment in list_segments(path)[0]] if is_folder(path) else [path]


def _describe(files: Sequence[Path], selection: Mapping[Path, list[int]], out: Path) -> tuple[Plan, dict[str, str]]:
    """The plan and the attributes of the merged file.

    Raises StoreError if any two plans differ in more than their items, even if no item of one is used.
    """
    items: dict[Path, tuple[Item, ...]] = {}
    sources: list[dict[str, Any]] = []
    first: Plan | None = None
    for file in files:
        with open_file(file) as run:
            first = first or run.plan
            if differences := first.differences(replace(run.plan, items=first.items)):
                changed = "; ".join(differences)
                raise StoreError(f"{file} has other settings than {files[0]}: {changed}; merge files of equal settings")
            items[file] = tuple(run.plan.items[index] for index in selection.get(file, []))
            source = {"file": file.name, "run_id": run.run_id, "environment": run.environment}
            sources += (run.merged_from or [source]) if items[file] else []
    assert first is not None
    plan = replace(first, items=tuple(item for file in selection for item in items[file]))
    return plan, {
        "run_id": str(sources[0]["run_id"]),
        "unit_id": out.stem,
        "environment": json.dumps(sources[0]["environment"]),
        "merged_from": json.dumps(sources),
    }


def _compression_of(file: Path) -> str:
    with open_file(file) as run:
        return "gzip" if run.dataset("images/rgb").compression else "none"


def _copy(run: Run, items: Sequence[int], targets: dict[str, h5py.Dataset], first: int) -> None:
    """Copy items to the places from `first` on: marked values, markers, attempts and seconds."""
    # Read before the marks: if the file is still being written, what is finished here is then marked below.
    seconds = run.read("items/seconds", {})
    marks = {name: run.marks(name) for name in schema.MARKERS}
    known = {"items/seconds": seconds} | {f"items/{name}": marked.astype("u1") for name, marked in marks.items()}
    for path, (row, size) in run.layout.items():
        if path not in targets or not (row.marker or path in _UNMARKED):
            continue
        source, target = None if run.is_converted(path) else run.dataset(path), targets[path]
        has_equal_chunks = source is not None and _storage(source) == _storage(target)
        for place, item in enumerate(items, start=first):
            if row.marker and has_equal_chunks:
                for where in _marked_chunks(row, size, item, marks):
                    chunk = _read_chunk(run, path, source, [where.get(axis, 0) for axis in row.axis_names])
                    if chunk is not None:
                        offset, filter_mask, content = chunk
                        target.id.write_direct_chunk((place, *offset[1:]), content, filter_mask)
            elif not row.marker or marks[row.marker][item].any():
                values = known[path][item] if path in known else run.read(path, {"item": item})
                target[(place, *map(slice, values.shape))] = values


def _marked_chunks(
    row: schema.Dataset, size: dict[str, int], item: int, marks: dict[str, np.ndarray]
) -> Iterator[dict[str, int]]:
    """The indices, along the axes of chunk length 1, of every chunk of an item whose marker is set."""
    marker_axes = schema.MARKERS[row.marker].axis_names
    others = [axis for axis in row.axes.split() if not axis.endswith("*") and axis not in marker_axes]
    for place in np.argwhere(marks[row.marker][item]).tolist():
        for indices in itertools.product(*(range(size[axis]) for axis in others)):
            yield dict(zip((*marker_axes, *others), (item, *place, *indices), strict=True))


def _read_chunk(run: Run, path: str, dataset: h5py.Dataset, offset: list[int]) -> tuple[list[int], int, bytes] | None:
    """A chunk as it is stored, with its offset and the filters it lacks; None if it was never written."""
    try:
        info = dataset.id.get_chunk_info_by_coord(tuple(offset))
        if info.byte_offset is None:
            return None  # the method has no errors, or no scores
        if info.byte_offset + info.size > run.num_bytes:
            raise ValueError("it ends before this chunk")
        filter_mask, content = dataset.id.read_direct_chunk(tuple(offset))
        return offset, filter_mask, content
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"{run.path} is damaged: {path} cannot be read ({explain_error(error)})") from error


def _storage(dataset: h5py.Dataset) -> tuple[Any, ...]:
    """Chunk shape and filters, which must be equal for chunks to be copied as they are."""
    properties = dataset.id.get_create_plist()
    return dataset.chunks, *(properties.get_filter(number) for number in range(properties.get_nfilters()))
