"""Arrays of one item, read from the file when they are sliced."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from dfengine.store.file.plan import StoreError

if TYPE_CHECKING:
    from dfengine.store.file.reader import Run


class LazyArray(NDArrayOperatorsMixin):
    """Values of one item, read when sliced; values that are not written yet read as NaN.

    It is indexed as h5py's datasets are: by integers, slices, one list or mask, and an ellipsis. Otherwise it is used
    as an array of NumPy that cannot be written to: arithmetic, functions and methods (`mean`, `astype` …) read all of
    it, each time.
    """

    def __init__(
        self, open_run: Callable[[], Run], path: str, where: dict[str, int], lengths: Mapping[str, int] | None = None
    ) -> None:
        """`where` selects along some axes of a dataset, and `lengths` replaces those that are shorter there."""
        self._open_run, self._path, self._where = open_run, path, where
        run = open_run()
        if path not in run.layout:
            raise StoreError(f"{run.path} does not contain {path}: it was not requested when the file was written")
        dataset, size = run.layout[path]
        self._dtype = np.dtype(dataset.dtype)
        self._lengths = {axis: (lengths or {}).get(axis, length) for axis, length in size.items() if axis not in where}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._lengths.values())

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(self._lengths)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        selection = self._selection(key)
        arrays = {axis: part for axis, part in selection.items() if isinstance(part, np.ndarray)}
        if not arrays:
            return self._read(selection)
        # HDF5 reads indices in increasing order and without repetition.
        ((axis, indices),) = arrays.items()
        increasing, order = np.unique(indices, return_inverse=True)
        values = self._read(selection | {axis: increasing})
        axes = list(selection)
        kept_before = [name for name in axes[: axes.index(axis)] if isinstance(selection[name], slice)]
        return values.take(order, axis=len(kept_before))

    def _selection(self, key: Any) -> dict[str, int | slice | np.ndarray]:
        """A key as one index, slice or array of indices per axis. Raises IndexError for an invalid one."""
        keys = list(key) if isinstance(key, tuple) else [key]
        missing = len(self.shape) - sum(part is not Ellipsis for part in keys)
        if missing < 0:
            raise IndexError(f"{len(keys)} indices for {self._path}, which has the axes {', '.join(self._lengths)}")
        ellipses = [place for place, part in enumerate(keys) if part is Ellipsis] or [len(keys)]
        keys[ellipses[0] : ellipses[0] + 1] = [slice(None)] * missing
        lists = [part for part in keys if not isinstance(part, slice) and not _is_integer(part)]
        if len(ellipses) > 1 or len(lists) > 1:
            raise IndexError(f"{self._path} can be indexed with at most one ellipsis and one list or mask")
        return {
            axis: _normalize(part, length) for (axis, length), part in zip(self._lengths.items(), keys, strict=True)
        }

    def _read(self, selection: dict[str, Any]) -> np.ndarray:
        return self._open_run().read(self._path, self._where | selection)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype=dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if any(isinstance(target, LazyArray) for target in options.get("out", ())):
            return NotImplemented  # it cannot be written to
        values = [np.asarray(one) if isinstance(one, LazyArray) else one for one in inputs]
        return getattr(ufunc, method)(*values, **options)

    def __getattr__(self, name: str) -> Any:
        """The attributes and methods of an array of NumPy."""
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"{name!r} is no attribute of a LazyArray or of an array of NumPy")
        values = self[...]
        values.flags.writeable = False  # what changed it would be lost
        return getattr(values, name)

    def __repr__(self) -> str:
        return f"LazyArray({self._path}, shape {self.shape}, {self.dtype})"


def _is_integer(part: Any) -> bool:
    return isinstance(part, int | np.integer) and not isinstance(part, bool)


def _normalize(part: Any, length: int) -> int | slice | np.ndarray:
    """An index, slice, list or mask of an axis, with bounds checked and negative indices resolved."""
    if isinstance(part, slice):
        return slice(*part.indices(length))
    if _is_integer(part):
        return range(length)[part]
    indices = np.asarray(part)
    if indices.dtype == bool and indices.shape == (length,):
        return np.flatnonzero(indices)
    if indices.ndim != 1 or (indices.dtype.kind not in "iu" and len(indices)):
        raise IndexError(
            f"invalid index {part!r}: expected an integer, a slice, a list of integers or a mask of {length}"
        )
    return np.array([range(length)[index] for index in indices.tolist()], dtype=np.int64)
