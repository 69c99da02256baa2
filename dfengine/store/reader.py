"""The reader of a file: finished, being written, or what a killed writer left, all read the same way."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from jaxtyping import Bool

from dfengine.store import schema
from dfengine.store.files import cause, part_path
from dfengine.store.item import StoredItem
from dfengine.store.plan import NoSuchItem, Plan, StoreError

if TYPE_CHECKING:
    import xarray

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SWMR_FLAG = 4


class Run:
    """An open file: a sequence of its items, with what made them. A context manager; `open` makes it."""

    def __init__(self, path: Path, h5: h5py.File, *, live: bool, item: type[StoredItem] = StoredItem) -> None:
        self.path = path
        self._item = item
        self._h5 = h5
        self._live = live
        self.plan = Plan.from_json(h5.attrs["plan"])
        self.layout = schema.layout(self.plan)
        self.run_id: str = h5.attrs["run_id"]
        self.merged_from: list[dict[str, Any]] = json.loads(h5.attrs.get("merged_from", "[]"))
        """the files that this one was merged from, if it was, and what made each"""
        self.environment: dict[str, str] = json.loads(h5.attrs["environment"])

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; arrays not read yet can no longer be."""
        self._h5.close()

    def __repr__(self) -> str:
        plan = self.plan
        methods = ", ".join(method.name for method in plan.methods) or "no maps"
        state = "" if self._h5 else ", closed"
        count = f"{len(self)} item{'s' if len(self) != 1 else ''}"
        return f"Run({str(self.path)!r}: {count} of {plan.model}, {plan.num_steps} steps; {methods}{state})"

    def __len__(self) -> int:
        return len(self.plan.items)

    def __getitem__(self, index: int) -> StoredItem:
        if not -len(self) <= index < len(self):
            raise NoSuchItem(f"item {index} is not in {self.path}: it has {len(self)}, counted from 0")
        return self._item(self, range(len(self))[index])

    def __iter__(self) -> Iterator[StoredItem]:
        return (self[index] for index in range(len(self)))

    @property
    def finished(self) -> bool:
        """Whether every item is finished and the file closed; otherwise it is being written, or was cut off."""
        return not self._live and bool(np.isfinite(self.read("items/seconds", {})).all())

    def read(self, path: str, where: Mapping[str, Any]) -> np.ndarray:
        """The values of one dataset at the given axes, as they are now; StoreError where they are damaged."""
        try:
            return np.asarray(self.dataset(path)[self.layout[path][0].index(where)])
        except (OSError, RuntimeError, KeyError) as error:
            raise StoreError(
                f"{self.path} is damaged: {path} cannot be read at {dict(where)} ({cause(error)})"
            ) from error

    def dataset(self, path: str) -> h5py.Dataset:
        """A dataset of the file, as it is now."""
        dataset = self._h5["entry"][path]
        if self._live:
            dataset.refresh()
        return dataset

    def marks(self, name: str, item: int | None = None) -> Bool[np.ndarray, " ..."]:
        """A marker of `items/` over its axes, of one item or all: what is safely stored; false where there is none."""
        path, where = f"items/{name}", {} if item is None else {"item": item}
        if path in self.layout:
            return self.read(path, where).astype(bool)
        size = schema.sizes(self.plan)
        return np.zeros([size[axis] for axis in schema.MARKERS[name].axis_names if axis not in where], dtype=bool)

    def counts(self, items: Sequence[int] | None = None) -> dict[str, Any]:
        """What is done of the given items, or of all: items, trajectories, seconds, and the maps of each method."""
        chosen = np.arange(len(self)) if items is None else np.asarray(items, dtype=np.int64)
        seconds, done = self.read("items/seconds", {})[chosen], self.marks("done")[chosen]
        return {
            "items": len(chosen),
            "items_finished": int(np.isfinite(seconds).sum()),
            "seconds": float(np.nansum(seconds)),
            "trajectories": int(self.marks("trajectory_done")[chosen].sum()),
            "maps_done": {method.name: int(done[:, place].sum()) for place, method in enumerate(self.plan.methods)},
            "maps_planned": {method.name: len(chosen) * self.plan.num_steps for method in self.plan.methods},
        }

    def summary(self) -> dict[str, Any]:
        """What is inside, what is done and how it was made, as JSON values."""
        plan = self.plan
        return {
            "path": str(self.path),
            "format_version": int(self._h5.attrs["format_version"]),
            "finished": self.finished,
            "bytes": os.fstat(self._h5.id.get_vfd_handle()).st_size,
            "run_id": self.run_id,
            "model": plan.model,
            "settings": dict(plan.settings),
            "environment": self.environment,
            **self.counts(),
            "steps": plan.num_steps,
            "latent": list(plan.latent),
            "image": list(plan.image),
            "previews": plan.previews,
            "mantissa_bits": plan.mantissa_bits,
            "methods": {
                method.name: {
                    "settings": dict(method.settings),
                    "num_masks": method.num_masks,
                    "has_error": method.has_error,
                }
                for method in plan.methods
            },
            "layers": [name for name, _ in plan.layers],
            "jobs": [
                {"key": item.key, "prompt": item.prompt, "negative_prompt": item.negative_prompt, "seed": item.seed}
                | dict(item.settings)
                for item in plan.items
            ],
            "datasets": {path: list(size.values()) for path, (_, size) in self.layout.items()},
        }

    def to_xarray(self) -> "xarray.Dataset":
        """Maps, errors, scores, relevance, heat maps, images and schedule in memory, with named axes and coordinates.

        Needs xarray. Latents and DF-CAM's layers, which differ in size, are left out.

        For a view that reads lazily: xarray.open_dataset(path, group="/entry/maps", engine="h5netcdf").
        """
        try:
            import xarray
        except ImportError:
            raise StoreError("to_xarray needs xarray: pip install 'dfengine[xarray]'") from None
        paths = (
            *("maps/saliency", "maps/error", "scores/score", "curves/relevance", "curves/heat"),
            *("images/rgb", "schedule/timestep", "schedule/signal", "schedule/noise"),
        )
        variables = {
            path.rpartition("/")[2]: (
                self.layout[path][0].axis_names,
                self.read(path, {}),
                _described(self.layout[path][0]),
            )
            for path in (*paths, "items/done")
            if path in self.layout
        }
        items = self.plan.items
        coordinates = {
            "method": ("method", [method.name for method in self.plan.methods]),
            "key": ("item", [item.key for item in items]),
            "prompt": ("item", [item.prompt for item in items]),
            "seed": ("item", np.array([item.seed for item in items], dtype="u8")),
        }
        if not self.plan.methods:
            del coordinates["method"]
        return xarray.Dataset(variables, coordinates, {"model": self.plan.model, "plan": self.plan.to_json()})


def _described(dataset: schema.Dataset) -> dict[str, str]:
    return {"long_name": dataset.long_name}


def open_file(path: str | os.PathLike[str], item: type[StoredItem] = StoredItem) -> Run:
    """Opens a finished file, or a .part that is being written or was left by a killed run.

    StoreError tells apart: missing, not finished yet, not HDF5, another program's HDF5, a newer format, truncated, and
    being written by another program.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except FileNotFoundError:
        part = part_path(path)
        raise StoreError(
            f"{path} is not finished: open {part}" if part.exists() else f"{path} does not exist"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {cause(error)}") from error
    if len(head) < 12 or (not head.startswith(_SIGNATURE) and not h5py.is_hdf5(path)):
        raise StoreError(f"{path} is not an HDF5 file")
    live = head[8:9] == b"\x03" and bool(head[11] & _SWMR_FLAG)
    try:
        h5 = h5py.File(path, "r", swmr=live)
    except OSError as error:
        raise StoreError(_open_error(path, error)) from error
    try:
        _check_format(path, h5)
        return Run(path, h5, live=live, item=item)
    except StoreError:
        h5.close()
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        h5.close()
        raise StoreError(f"{path} is damaged: what it says of itself cannot be read ({cause(error)})") from error


def _open_error(path: Path, error: OSError) -> str:
    text = str(error)
    if "truncated" in text:
        return f"{path} is truncated: it was cut short after it was written; copy it again from its source"
    if "lock" in text or "already open" in text:
        return f"{path} is being written by another program: try again when that has closed it"
    return f"{path} is damaged: {cause(error)}"


def _check_format(path: Path, h5: h5py.File) -> None:
    if h5.attrs.get("format") != schema.FORMAT:
        raise StoreError(f"{path} is an HDF5 file, but dfengine did not write it")
    version = int(h5.attrs["format_version"])
    if version > schema.FORMAT_VERSION:
        known = schema.FORMAT_VERSION
        raise StoreError(f"{path} has format version {version}, this dfengine reads up to {known}: upgrade dfengine")
