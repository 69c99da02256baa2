"""The file being written: values, then the marker that vouches for them; and what becomes of it when a write fails."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from dfengine.store import empty, schema
from dfengine.store.files import cut_off
from dfengine.store.plan import Plan, StoreError
from dfengine.store.reader import Run

SYNC_SECONDS = 10.0


@dataclass(frozen=True)
class Write:
    """Values at one place, by dataset, and the marker that is set once they are flushed."""

    where: Mapping[str, int]
    values: Mapping[str, np.ndarray]
    marker: str = ""


class Sink:
    """A new file of the plan, open in SWMR mode. An error closes it, and leaves on the disk what a kill would leave."""

    def __init__(self, path: Path, plan: Plan, *, compression: str, attributes: Mapping[str, str]) -> None:
        with path.open("xb") as file:
            file.write(empty.image(plan, compression=compression, attributes=attributes))
        self._h5 = h5py.File(path, "r+", libver=("v110", "v110"), rdcc_nbytes=_cache(plan), rdcc_w0=1.0)
        self._handle: int = self._h5.id.get_vfd_handle()
        self._about = os.fstat(self._handle)
        with self._or_cut_off():
            self._h5.swmr_mode = True
        self.stored = Run(path, self._h5, live=False)
        self._layout = self.stored.layout
        self._datasets = {name: self._h5["entry"][name] for name in self._layout}
        self.marks = {name: self.stored.marks(name) for name in schema.MARKERS}
        self._synced = time.monotonic()

    def write(self, one: Write) -> None:
        """Writes and flushes the values, then sets and flushes the marker; every ten seconds all goes to the disk.

        StoreError for a dataset that does not exist: in SWMR mode HDF5 would create it, and ruin the file.
        """
        if missing := set(one.values) - set(self._datasets):
            raise StoreError(f"{', '.join(missing)} was not made with the file: nothing can be added in SWMR mode")
        with self._or_cut_off():
            for name, value in one.values.items():
                lengths = iter(value.shape)
                axes = self._layout[name][0].axis_names
                place = tuple(one.where[axis] if axis in one.where else slice(next(lengths)) for axis in axes)
                self._datasets[name][place] = value
            for name in one.values:
                self._datasets[name].flush()
            if one.marker:
                marker = self._datasets[f"items/{one.marker}"]
                place = self._layout[f"items/{one.marker}"][0].index(one.where)
                marker[place] = 1
                marker.flush()
                self.marks[one.marker][place] = True
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._handle)
                self._synced = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        with self._or_cut_off():
            self._h5.flush()
            self._h5.close()

    def abandon(self) -> None:
        """Closes the file without another write to the disk."""
        cut_off(self._handle, self._about)
        with contextlib.suppress(Exception):
            self._h5.close()

    @contextlib.contextmanager
    def _or_cut_off(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.abandon()
            raise


def _cache(plan: Plan) -> int:
    """Bytes for the chunks of one dataset: twice an item's largest, as a smaller cache writes chunks more than once."""
    written = [(dataset, size) for dataset, size in schema.layout(plan).values() if dataset.marker]
    return 2 * max(
        np.dtype(dataset.dtype).itemsize * math.prod(size.values()) // size["item"] for dataset, size in written
    )


@contextlib.contextmanager
def opened_to_write(path: Path) -> Iterator[h5py.File]:
    """An existing file, that nobody reads yet, open for writing; an error leaves it cut off."""
    h5 = h5py.File(path, "r+", libver=("v110", "v110"))
    handle = h5.id.get_vfd_handle()
    about = os.fstat(handle)
    try:
        yield h5
        h5.flush()
        h5.close()
    except BaseException:
        cut_off(handle, about)
        with contextlib.suppress(Exception):
            h5.close()
        raise
