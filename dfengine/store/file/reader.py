"""The reader of one file, whether it is finished, being written, or left behind by a killed process."""

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from jaxtyping import Bool

from dfengine.store.file import checking, schema, version1
from dfengine.store.file.errors import explain_error
from dfengine.store.file.files import check_regular, part_path
from dfengine.store.file.item import StoredItem
from dfengine.store.file.plain import load_json, typed
from dfengine.store.file.plan import NoSuchItem, Plan, StoreError

if TYPE_CHECKING:
    import xarray

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SWMR_FLAG = 4
#: Of metadata in a file that is being written: 0.3 seconds.
_READ_ATTEMPTS = 28


class Run:
    """An open file: a sequence of its items. A context manager that closes it; `open` creates one."""

    def __init__(self, path: Path, h5: h5py.File, *, live: bool, item: type[StoredItem] = StoredItem) -> None:
        """`live` marks a file that is being written, whose datasets are refreshed before each read.

        Raises ValueError if the file is not what its plan says.
        """
        self.path = path
        self._item = item
        self._h5 = h5
        self._live = live
        self.format_version = int(h5.attrs["format_version"])
        texts = checking.read_texts(h5)
        plan = Plan.from_json(texts["plan"])
        self.plan = plan if self.format_version > 1 else version1.upgrade(plan)
        self.layout = schema.layout(self.plan)
        """every dataset by path, with the lengths of its axes, as of the current format version"""
        self.run_id = texts["run_id"]
        self.merged_from = [_read_source(one) for one in load_json(texts.get("merged_from", "[]"))]
        """for a merged file, the files that it was merged from, with run id and environment"""
        self.environment: dict[str, str] = _read_environment(load_json(texts["environment"]))
        self._datasets = checking.open_datasets(h5, self._expected())

    def _expected(self) -> dict[str, checking.Expected]:
        """What the plan says about each dataset, by its path in the file."""
        expected = {}
        for path, (dataset, size) in self.layout.items():
            stored_path, dtype, _ = version1.SCHEDULE[path] if self.is_converted(path) else (path, dataset.dtype, None)
            # Markers and times are read for all items at once, everything else as one chunk of the schema.
            is_whole = dataset.group == "items" and not dataset.marker
            piece = tuple(
                length if is_whole or axis.endswith("*") else 1
                for axis, length in zip(dataset.axes.split(), size.values(), strict=True)
            )
            expected[stored_path] = checking.Expected(dtype, tuple(size.values()), piece)
        return expected

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Lazy arrays cannot be read afterwards."""
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
        return self._item(lambda: self, range(len(self))[index])

    def __iter__(self) -> Iterator[StoredItem]:
        return (self[index] for index in range(len(self)))

    @property
    def finished(self) -> bool:
        """Whether every item is finished and the file is closed; otherwise it is being written or was interrupted."""
        return not self._live and bool(np.isfinite(self.read("items/seconds", {})).all())

    @property
    def num_bytes(self) -> int:
        """The size of the file at the moment."""
        return os.fstat(self._h5.id.get_vfd_handle()).st_size

    def read(self, path: str, where: Mapping[str, Any]) -> np.ndarray:
        """The current values of a dataset at the given axes. Raises StoreError if they are damaged."""
        stored_path, _, convert = version1.SCHEDULE[path] if self.is_converted(path) else (path, "", None)
        try:
            values = np.asarray(self.dataset(stored_path)[self.layout[path][0].index(where)])
        except (OSError, RuntimeError, KeyError) as error:
            raise StoreError(
                f"{self.path} is damaged: {path} cannot be read at {dict(where)} ({explain_error(error)})"
            ) from error
        return convert(values) if convert else values

    def is_converted(self, path: str) -> bool:
        """Whether a dataset is stored differently, as an earlier format version did, and converted by `read`."""
        return self.format_version == 1 and path in version1.SCHEDULE

    def dataset(self, path: str) -> h5py.Dataset:
        """A dataset as stored in the file, up to date. Raises KeyError if the plan has none of this path."""
        dataset = self._datasets[path]
        if self._live:
            dataset.refresh()
        return dataset

    def marks(self, name: str, item: int | None = None) -> Bool[np.ndarray, " ..."]:
        """Where a marker of `items/` is set, over its axes, for one item or all; all False without one."""
        path, where = f"items/{name}", {} if item is None else {"item": item}
        if path in self.layout:
            return self.read(path, where).astype(bool)
        size = schema.sizes(self.plan)
        return np.zeros([size[axis] for axis in schema.MARKERS[name].axis_names if axis not in where], dtype=bool)

    def counts(self, items: Sequence[int] | None = None) -> dict[str, Any]:
        """Progress of the given items, or of all: items, trajectories, seconds, and maps by method."""
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
        """Contents, progress and provenance as JSON values."""
        plan = self.plan
        return {
            "path": str(self.path),
            "format_version": self.format_version,
            "finished": self.finished,
            "bytes": self.num_bytes,
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
            "jobs": [item.describe() for item in plan.items],
            "datasets": {path: list(size.values()) for path, (_, size) in self.layout.items()},
        }

    def to_xarray(self) -> "xarray.Dataset":
        """Maps, errors, scores, relevance, word maps, images and schedule in memory, with named axes and coordinates.

        Needs xarray. Latents and DF-CAM's layers, which differ in size, are left out. For a lazy view of one group:
        xarray.open_dataset(path, group="/entry/maps", engine="h5netcdf").
        """
        try:
            import xarray
        except ImportError:
            raise StoreError("to_xarray needs xarray: pip install 'dfengine[xarray]'") from None
        paths = (
            *("maps/saliency", "maps/error", "scores/score", "curves/relevance", "curves/heat", "curves/heat_error"),
            *("images/rgb", "schedule/timestep", "schedule/signal", "schedule/noise", "items/done"),
        )
        datasets = [self.layout[path][0] for path in paths if path in self.layout]
        variables = {
            dataset.name: (dataset.axis_names, self.read(dataset.path, {}), {"long_name": dataset.long_name})
            for dataset in datasets
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


def open_file(path: str | os.PathLike[str], item: type[StoredItem] = StoredItem) -> Run:
    """Open a finished file, or a .part that is being written or was left behind by a killed process.

    The StoreError distinguishes a file that is missing, unfinished, not HDF5, from another program, of a newer format,
    truncated, or being written by another program.
    """
    path = Path(path)
    try:
        check_regular(path)
        with path.open("rb") as file:
            head = file.read(12)
    except FileNotFoundError:
        part = part_path(path)
        raise StoreError(
            f"{path} is not finished: open {part}" if part.exists() else f"{path} does not exist"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {explain_error(error)}") from error
    if len(head) < 12 or (not head.startswith(_SIGNATURE) and not h5py.is_hdf5(path)):
        raise StoreError(f"{path} is not an HDF5 file")
    live = head[8:9] == b"\x03" and bool(head[11] & _SWMR_FLAG)
    try:
        h5 = _open_live(path) if live else h5py.File(path, "r")
    except OSError as error:
        raise StoreError(_explain_open_error(path, error)) from error
    try:
        _check_format(path, h5)
        return Run(path, h5, live=live, item=item)
    except StoreError:
        h5.close()
        raise
    except MemoryError:
        h5.close()
        raise
    except Exception as error:  # the library's errors for damaged files are of any type
        h5.close()
        raise StoreError(f"{path} is damaged: its description cannot be read ({explain_error(error)})") from error


def _open_live(path: Path) -> h5py.File:
    """The file as its writer is writing it, or was when it was killed.

    HDF5 then reads metadata again, after twice the time, if a checksum is wrong: by default a hundred times, which for
    a damaged file is for ever. h5py has no function for that number.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    hdf5 = ctypes.CDLL(h5py.h5p.__file__)  # through which the library is found that h5py uses
    hdf5.H5Pset_metadata_read_attempts(ctypes.c_int64(access.id), ctypes.c_uint(_READ_ATTEMPTS))
    flags = h5py.h5f.ACC_RDONLY | h5py.h5f.ACC_SWMR_READ
    return h5py.File(h5py.h5f.open(os.fsencode(path), flags, fapl=access))


def _explain_open_error(path: Path, error: OSError) -> str:
    text = str(error)
    if "truncated" in text:
        return f"{path} is truncated: it was cut short after it was written; copy it again from its source"
    if "lock" in text or "already open" in text:
        return f"{path} is being written by another program: try again when it is closed there"
    return f"{path} is damaged: {explain_error(error)}"


def _read_environment(values: Any) -> dict[str, str]:
    environment: dict[str, str] = typed(values, Mapping[str, str], "environment")
    return environment


def _read_source(values: Any) -> dict[str, Any]:
    """One of the files that a file was merged from."""
    source: dict[str, Any] = typed(values, Mapping[str, Any], "merged_from")
    named = {name: typed(source.get(name), str, f"merged_from.{name}") for name in ("file", "run_id")}
    return {**source, **named, "environment": _read_environment(source.get("environment"))}


def _check_format(path: Path, h5: h5py.File) -> None:
    if str(h5.attrs.get("format")) != schema.FORMAT:
        raise StoreError(f"{path} is an HDF5 file, but dfengine did not write it")
    version = int(h5.attrs["format_version"])
    if version < 1:
        raise ValueError(f"its format version is {version}")
    if version > schema.FORMAT_VERSION:
        supported = schema.FORMAT_VERSION
        raise StoreError(
            f"{path} has format version {version}, this dfengine reads up to {supported}: upgrade dfengine"
        )
