"""The reader of a run folder: its segments as one sequence of items, each item once."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from dfengine.store import schema
from dfengine.store.failures import failures, units_left
from dfengine.store.files import final_name
from dfengine.store.folder import Segment, is_folder, read_description, segments, take_best
from dfengine.store.item import StoredItem
from dfengine.store.plan import NoSuchItem, Plan, StoreError
from dfengine.store.reader import Run, open_file
from dfengine.store.units import planned_units

if TYPE_CHECKING:
    import xarray

#: A folder may have thousands of segments, a process a thousand open files.
_OPEN_FILES = 32


def open(path: str | os.PathLike[str], item: type[StoredItem] = StoredItem) -> Run | RunFolder:
    """Opens a finished file, a .part that is being written or was left by a killed run, or a run folder.

    `item` is what its items are made as. StoreError tells apart: missing, not finished yet, not HDF5, another program's
    HDF5, a newer format, truncated, and being written by another program; for a folder, one that is no run's.
    """
    path = Path(path)
    if path.is_dir() and not is_folder(path):
        raise StoreError(f"{path} is a folder, but not a run's: it has no run.json")
    return RunFolder(path, item) if path.is_dir() else open_file(path, item)


class _Part:
    """A segment's file, opened when it is read: the source of its items."""

    def __init__(self, folder: RunFolder, file: str) -> None:
        self._folder, self._file = folder, file

    @property
    def path(self) -> Path:
        return self._run.path

    @property
    def plan(self) -> Plan:
        return self._run.plan

    @property
    def environment(self) -> dict[str, str]:
        return self._run.environment

    @property
    def merged_from(self) -> list[dict[str, Any]]:
        return self._run.merged_from

    @property
    def layout(self) -> dict[str, tuple[schema.Dataset, dict[str, int]]]:
        return self._run.layout

    def read(self, path: str, where: Mapping[str, Any]) -> np.ndarray:
        return self._run.read(path, where)

    def marks(self, name: str, item: int | None = None) -> Bool[np.ndarray, " ..."]:
        return self._run.marks(name, item)

    @property
    def _run(self) -> Run:
        return self._folder.opened(self._file)


class RunFolder:
    """A run folder as it was when it was opened: a sequence of its items, with what made them. A context manager.

    Items come in order of unit and place in it. Where several segments have one (a unit was begun again), the first
    that is finished counts, or else the one with most of it, the latest of equals.
    """

    def __init__(self, path: Path, item: type[StoredItem] = StoredItem) -> None:
        """StoreError where it is no run folder. A segment that cannot be read is left out, with a warning."""
        self.path = path
        self._item = item
        self.run_id: str = read_description(path)["run_id"]
        self.segments, self.lost = segments(path)
        closed = {segment.unit for segment in self.segments if not segment.is_part}
        self.planned = sum(len(unit) for unit in planned_units(path) if not unit.retry_of)
        """the items that a sweep has planned, those that are not begun included; 0 where there is no plan"""
        self.units_left = [unit.name for unit in units_left(path, closed)]
        self.failures = list(failures(path))
        for file in self.lost:
            warnings.warn(f"{path / 'segments' / file} was finished, and is not there any more", stacklevel=3)
        self._files: OrderedDict[str, Run] = OrderedDict()
        self._places = take_best((segment.keys, segment.finished, segment.marks) for segment in self.segments)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes its files."""
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
        return self._item(_Part(self, self.segments[number].file), place, (self.path, range(len(self))[index]))

    def __iter__(self) -> Iterator[StoredItem]:
        return (self[index] for index in range(len(self)))

    @property
    def num_finished(self) -> int:
        """How many items are finished."""
        return sum(self.segments[number].finished[place] for number, place in self._places)

    @property
    def finished(self) -> bool:
        """Whether every item is finished, those of a sweep's plan included, and every finished segment still there."""
        done = self.num_finished == len(self)
        missing = self.lost or self.units_left or any(one.state == "aside" for one in self.failures)
        return done and bool(self._places) and not missing

    def opened(self, file: str) -> Run:
        """A segment's file, open; only the latest few are kept open."""
        if file not in self._files:
            path = self.path / "segments" / file
            self._files[file] = open_file(path if path.exists() else path.with_name(final_name(file)))
        self._files.move_to_end(file)
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return self._files[file]

    def _chosen(self) -> Iterator[tuple[Segment, list[int]]]:
        """Each segment, and which of its items count."""
        chosen: dict[int, list[int]] = {number: [] for number in range(len(self.segments))}
        for number, place in self._places:
            chosen[number].append(place)
        return ((self.segments[number], places) for number, places in chosen.items())

    def summary(self) -> dict[str, Any]:
        """What is inside, what is done and how it was made, as JSON values."""
        models, environments, parts = set(), {}, []
        methods: dict[str, dict[str, Any]] = {}
        total = {"items": 0, "items_finished": 0, "seconds": 0.0, "trajectories": 0}
        maps: dict[str, dict[str, int]] = {"maps_done": {}, "maps_planned": {}}
        size = 0
        for segment, places in self._chosen():
            run = self.opened(segment.file)
            told = run.summary()
            counts = run.counts(places)
            models.add(told["model"])
            environments[str(told["environment"])] = told["environment"]
            methods |= told["methods"]
            size += told["bytes"]
            total = {name: total[name] + counts[name] for name in total}
            for name, by_method in maps.items():
                for method, count in counts[name].items():
                    by_method[method] = by_method.get(method, 0) + count
            parts.append(
                {"file": segment.file, "items": len(segment.keys), "finished": sum(segment.finished)}
                | {"is_part": segment.is_part}
            )
        return {
            "path": str(self.path),
            "finished": self.finished,
            "bytes": size,
            "run_id": self.run_id,
            "planned": self.planned,
            "units_left": len(self.units_left),
            "failures": [dataclasses.asdict(one) for one in self.failures],
            "models": sorted(models),
            "environments": list(environments.values()),
            **total,
            **maps,
            "methods": methods,
            "segments": parts,
        }

    def to_xarray(self) -> xarray.Dataset:
        """The items' maps, errors, scores, images and schedule in memory, as of a single file (`Run.to_xarray`).

        StoreError where segments differ in shape: steps, latents, images, methods and scores.
        """
        tables = list(self.tables())
        import xarray

        return xarray.concat(tables, dim="item", join="exact", combine_attrs="drop_conflicts")

    def tables(self) -> Iterator[xarray.Dataset]:
        """`to_xarray` a segment at a time; tokens and words of the shorter prompts end in NaN."""
        chosen = [(segment.file, places) for segment, places in self._chosen() if places]
        if not chosen:
            raise StoreError(f"{self.path} has no items yet")
        shapes = [_shape(self.opened(file).plan) for file, _ in chosen]
        longest = {axis: max(shape.pop(axis) for shape in shapes) for axis in ("token", "word")}
        for shape in shapes:
            if apart := [
                f"{axis} ({shapes[0][axis]}, {shape[axis]})" for axis in shape if shape[axis] != shapes[0][axis]
            ]:
                raise StoreError(
                    f"the segments of {self.path} differ in shape: {', '.join(apart)}; open them one by one"
                )
        for file, places in chosen:
            table = self.opened(file).to_xarray().isel(item=places)
            yield table.pad(
                {axis: (0, most - table.sizes[axis]) for axis, most in longest.items() if axis in table.sizes}
            )


def _shape(plan: Plan) -> dict[str, Any]:
    """The lengths of the axes of a file's table, and its methods."""
    size = schema.sizes(plan)
    axes = ("step", "y", "x", "height", "width", "mask", "errors", "token", "word")
    return {axis: size[axis] for axis in axes} | {"methods": [method.name for method in plan.methods]}
