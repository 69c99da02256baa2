"""Merging: many files of like settings as one, their chunks copied as they are."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dfengine.store import empty, schema
from dfengine.store.files import Lock, check_name, fresh_path, publish_file, writing
from dfengine.store.folder import Segment, is_folder, segments, take_best
from dfengine.store.plan import Item, Plan, StoreError
from dfengine.store.reader import Run, open_file
from dfengine.store.sink import opened_to_write

#: What a marker does not vouch for, and the plan does not say.
_WITHOUT_MARKER = {"items/attempt", "items/seconds", *(row.path for row in schema.MARKERS.values())}


def merge(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Makes one file of all items of the given files and run folders, each once: the first finished, or the fullest.

    What is not done stays not done. Chunks are copied without being decoded, their checksums with them. Returns `out`,
    which is not there until it is whole. StoreError where `out` exists, or settings differ (it names them).
    """
    out = Path(out)
    check_name(out)
    files = list(dict.fromkeys(file for path in paths for file in _files(Path(path))))
    if not files:
        raise StoreError("there is nothing to merge: name at least one file, or a run folder with segments")
    chosen = _choose(files)
    plan, attributes = _describe(files, chosen, out)
    fresh = fresh_path(out)
    with contextlib.ExitStack() as undo, writing(out):
        lock = Lock(out)
        undo.callback(lock.release)
        if out.exists() and not overwrite:
            raise StoreError(f"{out} exists already: choose another name, or --overwrite to replace it")
        undo.callback(fresh.unlink, missing_ok=True)
        fresh.write_bytes(empty.image(plan, compression=_compression(files[0]), attributes=attributes))
        with opened_to_write(fresh) as h5:
            # All open until the end: HDF5 writes when one is closed, and does not say if that fails.
            targets = {path: h5["entry"][path] for path in schema.layout(plan)}
            first = 0
            for file, items in chosen.items():
                with open_file(file) as run:
                    _copy(run, items, targets, first)
                first += len(items)
        publish_file(fresh, out)
    return out


def _files(path: Path) -> list[Path]:
    return [path / "segments" / segment.file for segment in segments(path)[0]] if is_folder(path) else [path]


def _choose(files: Sequence[Path]) -> dict[Path, list[int]]:
    """The items to take of each file."""
    chosen: dict[Path, list[int]] = {}
    for number, place in take_best([Segment.contents(file) for file in files]):
        chosen.setdefault(files[number], []).append(place)
    return chosen


def _describe(files: Sequence[Path], chosen: Mapping[Path, list[int]], out: Path) -> tuple[Plan, dict[str, str]]:
    """The plan and the attributes of the merged file.

    StoreError where any two files' plans differ but for their items, also if nothing is taken of one.
    """
    items: dict[Path, tuple[Item, ...]] = {}
    sources: list[dict[str, Any]] = []
    first: Plan | None = None
    for file in files:
        with open_file(file) as run:
            first = first or run.plan
            if differences := first.differences(replace(run.plan, items=first.items)):
                told = "; ".join(differences)
                raise StoreError(f"{file} was made with other settings than {files[0]}: {told}; merge like with like")
            items[file] = tuple(run.plan.items[item] for item in chosen.get(file, []))
            made = {"file": file.name, "run_id": run.run_id, "environment": run.environment}
            sources += (run.merged_from or [made]) if items[file] else []
    assert first is not None
    plan = replace(first, items=tuple(item for file in chosen for item in items[file]))
    return plan, {
        "run_id": str(sources[0]["run_id"]),
        "unit_id": out.stem,
        "environment": json.dumps(sources[0]["environment"]),
        "merged_from": json.dumps(sources),
    }


def _compression(file: Path) -> str:
    with open_file(file) as run:
        return "gzip" if run.dataset("images/rgb").compression else "none"


def _copy(run: Run, items: Sequence[int], targets: dict[str, h5py.Dataset], first: int) -> None:
    """Copies items to the places from `first` on: what is marked, the markers, and what tells of the items."""
    # Before the marks: of a file that is being written, what is finished by now is marked when they are read.
    seconds = run.read("items/seconds", {})
    marks = {name: run.marks(name) for name in schema.MARKERS}
    known = {"items/seconds": seconds} | {f"items/{name}": marked.astype("u1") for name, marked in marks.items()}
    for path, (row, size) in run.layout.items():
        if path not in targets or not (row.marker or path in _WITHOUT_MARKER):
            continue
        source, target = run.dataset(path), targets[path]
        as_it_is = source.chunks == target.chunks and _filters(source) == _filters(target)
        for place, item in enumerate(items, start=first):
            if row.marker and as_it_is:
                for where in _marked(row, size, item, marks):
                    _copy_chunk(source, target, [where.get(axis, 0) for axis in row.axis_names], place)
            elif not row.marker or marks[row.marker][item].any():
                values = known[path][item] if path in known else run.read(path, {"item": item})
                target[(place, *map(slice, values.shape))] = values


def _marked(
    row: schema.Dataset, size: dict[str, int], item: int, marks: dict[str, np.ndarray]
) -> Iterator[dict[str, int]]:
    """The place of every chunk of an item's that its marker vouches for."""
    loose = [axis for axis in row.axes.split() if not axis.endswith("*")]
    marker = schema.MARKERS[row.marker].axis_names
    for place in itertools.product([item], *(range(size[axis]) for axis in loose[1:])):
        where = dict(zip(loose, place, strict=True))
        if marks[row.marker][tuple(where[axis] for axis in marker)]:
            yield where


def _copy_chunk(source: h5py.Dataset, target: h5py.Dataset, offset: list[int], place: int) -> None:
    if source.id.get_chunk_info_by_coord(tuple(offset)).byte_offset is None:
        return  # a method without an error, or without scores
    filter_mask, chunk = source.id.read_direct_chunk(tuple(offset))
    target.id.write_direct_chunk((place, *offset[1:]), chunk, filter_mask)


def _filters(dataset: h5py.Dataset) -> list[Any]:
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(number) for number in range(properties.get_nfilters())]
