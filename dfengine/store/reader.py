"""The reader: a finished file, one that is being written, or what a killed writer left, all read the same way."""

import builtins
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from dfengine.result import Explanation
from dfengine.store import schema
from dfengine.store.files import cause, part_path
from dfengine.store.plan import Item, Method, Plan, StoreError

if TYPE_CHECKING:
    import xarray

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SWMR_FLAG = 4


class LazyArray:
    """Values of one item in the file, read when sliced; values not written yet read as NaN.

    Slices as h5py does: integers, slices, one list or mask, an ellipsis. `numpy.asarray` reads all of it.
    """

    def __init__(
        self, run: "Run", path: str, where: Mapping[str, int], lengths: Mapping[str, int] | None = None
    ) -> None:
        self._run = run
        self._path = path
        self._where = where
        size = run.layout[path][1] | (lengths or {})
        self._free = {axis: size[axis] for axis in run.layout[path][0].axis_names if axis not in where}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._free.values())

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._run.layout[self._path][0].dtype)

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(self._free)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        keys = list(key) if isinstance(key, tuple) else [key]
        missing = len(self.shape) - sum(part is not Ellipsis for part in keys)
        if missing < 0:
            raise IndexError(f"{len(keys)} indices for {self._path}, which has the axes {', '.join(self._free)}")
        place = next((place for place, part in enumerate(keys) if part is Ellipsis), len(keys))
        keys[place : place + 1] = [slice(None)] * missing
        chosen = {
            axis: slice(*part.indices(length))
            if isinstance(part, slice)
            else range(length)[part]
            if _whole(part)
            else part
            for (axis, length), part in zip(self._free.items(), keys, strict=True)
        }
        return self._run.read(self._path, self._where | chosen)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype=dtype)

    def __repr__(self) -> str:
        return f"LazyArray({self._path}, shape {self.shape}, {self.dtype})"


def _whole(part: Any) -> bool:
    return isinstance(part, int | np.integer)


class StoredItem(Explanation):
    """One item of a file; its arrays are read when asked for."""

    def __init__(self, run: "Run", index: int) -> None:
        self._run = run
        self.index = index
        self.item: Item = run.plan.items[index]

    key = property(lambda self: self.item.key)
    prompt = property(lambda self: self.item.prompt)
    negative_prompt = property(lambda self: self.item.negative_prompt)
    seed = property(lambda self: self.item.seed)
    model = property(lambda self: self._run.plan.model)
    tokens = property(lambda self: self.item.tokens)
    words = property(lambda self: self.item.words)

    def _methods(self, path: str, chosen: Mapping[str, Mapping[str, int]]) -> dict[str, LazyArray]:
        names = [method.name for method in self._run.plan.methods]
        return {
            name: LazyArray(self._run, path, {"item": self.index, "method": names.index(name)}, lengths)
            for name, lengths in chosen.items()
        }

    @property
    def maps(self) -> dict[str, LazyArray]:
        """Raw saliency, float32 [steps, h, w], by method."""
        return self._methods("maps/saliency", {method.name: {} for method in self._run.plan.methods})

    @property
    def errors(self) -> dict[str, LazyArray]:
        """Standard error of the saliency, float32 [steps, h, w], by the methods that give one."""
        return self._methods("maps/error", {method.name: {} for method in self._run.plan.methods if method.has_error})

    @property
    def scores(self) -> dict[str, LazyArray]:
        """The masks' scores, float32 [steps, masks], by the methods that keep them; NaN after the last mask drawn."""
        methods = [method for method in self._run.plan.methods if method.num_masks]
        return self._methods("scores/score", {method.name: {"mask": method.num_masks} for method in methods})

    @property
    def cam(self) -> dict[str, LazyArray]:
        """Raw DF-CAM maps at the layer's own resolution, float32 [steps, u, v], by layer."""
        found = {}
        for (u, v), layers in schema.resolutions(self._run.plan).items():
            for place, name in enumerate(layers):
                found[name] = LazyArray(self._run, f"cam/{u}x{v}/saliency", {"item": self.index, "layer": place})
        return {name: found[name] for name, _ in self._run.plan.layers}

    @property
    def relevance(self) -> LazyArray:
        """Relevance of each of the item's tokens, float32 [tokens, steps]."""
        return LazyArray(self._run, "curves/relevance", {"item": self.index}, {"token": len(self.tokens)})

    @property
    def heat(self) -> LazyArray:
        """Cross-attention heat map of each of the item's words, float32 [words, steps, h, w]."""
        return LazyArray(self._run, "curves/heat", {"item": self.index}, {"word": len(self.words)})

    @property
    def latents(self) -> LazyArray:
        """R_t, float32 [steps, c, h, w]."""
        return LazyArray(self._run, "latents/latent", {"item": self.index})

    @property
    def epsilon(self) -> LazyArray:
        """ε(R_t), float32 [steps, c, h, w]."""
        return LazyArray(self._run, "latents/epsilon", {"item": self.index})

    @property
    def image(self) -> UInt8[np.ndarray, "H W 3"]:
        """The decoded image; StoreError where the trajectory is not stored yet."""
        return self._of_trajectory("images/rgb")

    @property
    def previews(self) -> LazyArray | None:
        """The image predicted at each step, uint8 [steps, H, W, 3], if the file keeps them."""
        path = "images/preview"
        return LazyArray(self._run, path, {"item": self.index}) if path in self._run.layout else None

    @property
    def timesteps(self) -> Int[np.ndarray, " steps"]:
        """The steps of the training schedule; StoreError where the trajectory is not stored yet."""
        return self._of_trajectory("schedule/timestep")

    @property
    def alpha_bar(self) -> Float[np.ndarray, " steps"]:
        """ᾱ of each step; StoreError where the trajectory is not stored yet."""
        return self._of_trajectory("schedule/alpha_bar")

    def _of_trajectory(self, path: str) -> np.ndarray:
        if not self.has_trajectory:
            raise StoreError(f"{self._run.path}: item {self.index} has no trajectory yet")
        return self._run.read(path, {"item": self.index})

    @property
    def has_trajectory(self) -> bool:
        """Whether image, latents, ε and schedule are stored."""
        return bool(self._run.marks("trajectory_done")[self.index])

    @property
    def done(self) -> dict[str, Bool[np.ndarray, " steps"]]:
        """The steps whose map, error and scores are stored, by method."""
        marks = self._run.marks("done")[self.index]
        return {method.name: marks[place] for place, method in enumerate(self._run.plan.methods)}

    @property
    def seconds(self) -> float:
        """Wall time the item took, NaN until it is finished."""
        return float(self._run.read("items/seconds", {"item": self.index}))


class Run:
    """An open file: a sequence of its items, with what made them. A context manager; `open` makes it."""

    def __init__(self, path: Path, h5: h5py.File, *, live: bool) -> None:
        self.path = path
        self._h5 = h5
        self._live = live
        self.plan = Plan.from_json(h5.attrs["plan"])
        self.layout = schema.layout(self.plan)
        self.environment: dict[str, str] = json.loads(h5.attrs["environment"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; arrays not read yet can no longer be."""
        self._h5.close()

    def __len__(self) -> int:
        return len(self.plan.items)

    def __getitem__(self, index: int) -> StoredItem:
        return StoredItem(self, range(len(self))[index])

    def __iter__(self) -> Iterator[StoredItem]:
        return (self[index] for index in range(len(self)))

    @property
    def finished(self) -> bool:
        """Whether the file was closed by its writer; otherwise it is being written, or its writer was killed."""
        return not self._live

    def read(self, path: str, where: Mapping[str, Any]) -> np.ndarray:
        """The values of one dataset at the given axes, as they are now; StoreError where they are damaged."""
        try:
            dataset = self._h5["entry"][path]
            if self._live:
                dataset.refresh()
            return dataset[self.layout[path][0].index(where)]
        except OSError as error:
            raise StoreError(
                f"{self.path} is damaged: {path} cannot be read at {dict(where)} ({cause(error)})"
            ) from error

    def marks(self, name: str) -> Bool[np.ndarray, " ..."]:
        """A marker of the schema's `items/`, over its axes: what is safely stored; all false where it does not apply."""
        path = f"items/{name}"
        if path in self.layout:
            return self.read(path, {}).astype(bool)
        size = schema.sizes(self.plan)
        return np.zeros([size[axis] for row in schema.TABLE if row.path == path for axis in row.axis_names], dtype=bool)

    def summary(self) -> dict[str, Any]:
        """What is inside, what is done and how it was made, as JSON values."""
        plan, done = self.plan, self.marks("done")
        seconds = self.read("items/seconds", {})
        return {
            "path": str(self.path),
            "format_version": int(self._h5.attrs["format_version"]),
            "finished": self.finished,
            "bytes": self.path.stat().st_size,
            "run_id": self._h5.attrs["run_id"],
            "model": plan.model,
            "settings": dict(plan.settings),
            "environment": self.environment,
            "items": len(self),
            "items_finished": int(np.isfinite(seconds).sum()),
            "seconds": float(np.nansum(seconds)),
            "trajectories": int(self.marks("trajectory_done").sum()),
            "steps": plan.num_steps,
            "latent": list(plan.latent),
            "image": list(plan.image),
            "methods": {
                method.name: {
                    "settings": dict(method.settings),
                    "num_masks": method.num_masks,
                    "has_error": method.has_error,
                    "maps_done": int(done[:, place].sum()),
                    "maps_planned": len(self) * plan.num_steps,
                }
                for place, method in enumerate(plan.methods)
            },
            "layers": [name for name, _ in plan.layers],
            "datasets": {path: list(size.values()) for path, (_, size) in self.layout.items()},
        }

    def to_xarray(self) -> "xarray.Dataset":
        """Maps, errors, scores, images and schedule in memory, with named axes and coordinates; needs xarray.

        For a view that reads lazily: xarray.open_dataset(path, group="/entry/maps", engine="h5netcdf").
        """
        try:
            import xarray
        except ImportError:
            raise StoreError("to_xarray needs xarray: pip install 'dfengine[xarray]'") from None
        paths = ("maps/saliency", "maps/error", "scores/score", "images/rgb", "schedule/alpha_bar", "schedule/timestep")
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


def open(path: str | os.PathLike[str]) -> Run:
    """Opens a finished file, or a .part that is being written or was left by a killed run.

    StoreError tells apart: missing, not finished yet, not HDF5, another program's HDF5, a newer format, truncated, and
    being written by another program.
    """
    path = Path(path)
    try:
        with builtins.open(path, "rb") as file:
            head = file.read(12)
    except FileNotFoundError:
        part = part_path(path)
        raise StoreError(
            f"{path} is not finished: open {part}" if part.exists() else f"{path} does not exist"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {cause(error)}") from error
    if not head.startswith(_SIGNATURE) and not h5py.is_hdf5(path):
        raise StoreError(f"{path} is not an HDF5 file")
    live = head[8:9] == b"\x03" and bool(head[11] & _SWMR_FLAG)
    try:
        h5 = h5py.File(path, "r", swmr=live)
    except OSError as error:
        raise StoreError(_open_error(path, error)) from error
    try:
        _check_format(path, h5)
        return Run(path, h5, live=live)
    except BaseException:
        h5.close()
        raise


def _open_error(path: Path, error: OSError) -> str:
    text = str(error)
    if "truncated" in text:
        return f"{path} is truncated: it was cut short after it was written; copy it again from its source"
    if "lock" in text or "already open" in text:
        return f"{path} is being written by another program: try again when that has closed it"
    return f"cannot read {path}: {cause(error)}"


def _check_format(path: Path, h5: h5py.File) -> None:
    if h5.attrs.get("format") != schema.FORMAT:
        raise StoreError(f"{path} is an HDF5 file, but dfengine did not write it")
    version = int(h5.attrs["format_version"])
    if version > schema.FORMAT_VERSION:
        known = schema.FORMAT_VERSION
        raise StoreError(f"{path} has format version {version}, this dfengine reads up to {known}: upgrade dfengine")
