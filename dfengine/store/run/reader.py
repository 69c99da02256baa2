"""The reader of a run folder: the items of all its segments as one sequence, each item once."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfengine.store.file import schema
from dfengine.store.file.files import final_name
from dfengine.store.file.item import StoredItem
from dfengine.store.file.plan import NoSuchItem, Plan, StoreError
from dfengine.store.file.reader import Run, open_file
from dfengine.store.run.failures import QUARANTINED, failures, units_left
from dfengine.store.run.folder import is_folder, read_description
from dfengine.store.run.segments import Segment, list_segments, select_items
from dfengine.store.run.units import planned_units
from dfengine.text import printable

if TYPE_CHECKING:
    import xarray

#: A folder may have thousands of segments, but a process may open only about a thousand files.
_MAX_OPEN_FILES = 32


def open(path: str | os.PathLike[str], item: type[StoredItem] = StoredItem) -> Run | RunFolder:
    """Open a finished file, a .part that is being written or was left behind by a killed process, or a run folder.

    `item` is the class of the items. The StoreError distinguishes a file that is missing, unfinished, not HDF5, from
    another program, of a newer format, truncated, or being written by another program; and a folder that is not a run.
    """
    path = Path(path).expanduser()
    if path.is_dir() and not is_folder(path):
        raise StoreError(f"{path} is not a run folder: it has no run.json")
    return RunFolder(path, item) if path.is_dir() else open_file(path, item)


class RunFolder:
    """A run folder as it was when it was opened: a sequence of its items. A context manager that closes its files.

    Items are ordered by unit and by their place in it. If several segments hold an item, because a unit was begun
    again, the first finished copy is used, else the one with most results, else the latest.
    """

    def __init__(self, path: Path, item: type[StoredItem] = StoredItem) -> None:
        """Raises StoreError if it is not a run folder. An unreadable segment is skipped with a warning."""
        self.path = path
        self._item = item
        self.run_id: str = read_description(path)["run_id"]
        self.segments, self.lost = list_segments(path)
        closed = {segment.unit for segment in self.segments if not segment.is_part}
        self.planned = sum(len(unit) for unit in planned_units(path) if not unit.retry_of)
        """the number of items that a sweep has planned, begun or not; 0 without a plan"""
        self.units_left = [unit.name for unit in units_left(path, closed)]
        self.failures = list(failures(path))
        for file in self.lost:
            missing = printable(path / "segments" / file)
            warnings.warn(f"{missing} is missing, although the manifest lists it", stacklevel=3)
        self._files: OrderedDict[str, Run] = OrderedDict()
        self._keys = {segment.file: list(segment.progress.keys) for segment in self.segments}
        self._places = select_items(segment.progress for segment in self.segments)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open files."""
        while self._files:
            self._files.popitem()[1].close()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r}: {len(self)} items, {self.num_finished} finished)"

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> StoredItem:
        if not -len(self) <= index < len(self):
            raise NoSuchItem(f"item {index} is not in {self.path}: it has {len(self)}, counted from 0")
        number, place = self._places[index]
        open_run = partial(self.opened, self.segments[number].file)
        return self._item(open_run, place, (self.path, range(len(self))[index]))

    def __iter__(self) -> Iterator[StoredItem]:
        return (self[index] for index in range(len(self)))

    @property
    def num_finished(self) -> int:
        """The number of finished items."""
        return sum(self.segments[number].progress.finished[place] for number, place in self._places)

    @property
    def finished(self) -> bool:
        """Whether every item, including a sweep's planned ones, is finished and no closed segment is missing."""
        is_incomplete = self.lost or self.units_left or any(one.state == QUARANTINED for one in self.failures)
        return bool(self._places) and self.num_finished == len(self) and not is_incomplete

    def opened(self, file: str) -> Run:
        """A segment's file, open. Only the most recently used files stay open."""
        if file not in self._files:
            path = self.path / "segments" / file
            run = open_file(path if path.exists() else path.with_name(final_name(file)))
            if [item.key for item in run.plan.items] != self._keys[file]:
                run.close()
                raise StoreError(f"{path} has other items than manifest.jsonl says, which is an index: delete that")
            self._files[file] = run
        self._files.move_to_end(file)
        if len(self._files) > _MAX_OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return self._files[file]

    def _selection(self) -> Iterator[tuple[Segment, list[int]]]:
        """Each segment, with the items that are read from it."""
        places: dict[int, list[int]] = {number: [] for number in range(len(self.segments))}
        for number, place in self._places:
            places[number].append(place)
        return ((self.segments[number], selected) for number, selected in places.items())

    def summary(self) -> dict[str, Any]:
        """Contents, progress and provenance as JSON values."""
        models, environments, segments = set(), {}, []
        methods: dict[str, dict[str, Any]] = {}
        totals = {"items": 0, "items_finished": 0, "seconds": 0.0, "trajectories": 0}
        maps: dict[str, dict[str, int]] = {"maps_done": {}, "maps_planned": {}}
        size = 0
        for segment, selected in self._selection():
            run = self.opened(segment.file)
            summary = run.summary()
            counts = run.counts(selected)
            models.add(summary["model"])
            environments[str(summary["environment"])] = summary["environment"]
            methods |= summary["methods"]
            size += summary["bytes"]
            totals = {name: totals[name] + counts[name] for name in totals}
            for name, by_method in maps.items():
                for method, count in counts[name].items():
                    by_method[method] = by_method.get(method, 0) + count
            progress = {"items": len(segment.progress.keys), "finished": sum(segment.progress.finished)}
            segments.append({"file": segment.file, **progress, "is_part": segment.is_part})
        return {
            "path": str(self.path),
            "finished": self.finished,
            "bytes": size,
            "run_id": self.run_id,
            "planned": self.planned,
            "units_left": len(self.units_left),
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
            "models": sorted(models),
            "environments": list(environments.values()),
            **totals,
            **maps,
            "methods": methods,
            "segments": segments,
        }

    def to_xarray(self) -> xarray.Dataset:
        """Maps, errors, scores, images and schedule of all items in memory, as `Run.to_xarray` returns them.

        Raises StoreError if segments differ in steps, methods, number of scores, or size of latents or images.
        """
        tables = list(self.tables())
        import xarray

        return xarray.concat(tables, dim="item", join="exact", combine_attrs="drop_conflicts")

    def tables(self) -> Iterator[xarray.Dataset]:
        """`to_xarray` one segment at a time; the tokens and words of shorter prompts are padded with NaN."""
        selection = [(segment.file, selected) for segment, selected in self._selection() if selected]
        if not selection:
            raise StoreError(f"{self.path} has no items yet")
        shapes = [_shape(self.opened(file).plan) for file, _ in selection]
        longest = {axis: max(shape.pop(axis) for shape in shapes) for axis in ("token", "word")}
        first = shapes[0]
        for shape in shapes:
            if differences := [
                f"{axis} ({first[axis]}, {length})" for axis, length in shape.items() if length != first[axis]
            ]:
                raise StoreError(
                    f"the segments of {self.path} differ in shape: {', '.join(differences)}; open them one by one"
                )
        for file, selected in selection:
            table = self.opened(file).to_xarray().isel(item=selected)
            yield table.pad(
                {axis: (0, length - table.sizes[axis]) for axis, length in longest.items() if axis in table.sizes}
            )


def _shape(plan: Plan) -> dict[str, Any]:
    """The lengths of the axes of a file's table, and its methods."""
    size = schema.sizes(plan)
    axes = ("step", "y", "x", "height", "width", "mask", "errors", "token", "word")
    return {axis: size[axis] for axis in axes} | {"methods": [method.name for method in plan.methods]}
