"""The file while it is written: values first, then the marker for them, and a safe way out when a write fails."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from dfengine.store.file import schema, template
from dfengine.store.file.errors import detach_to_devnull
from dfengine.store.file.plan import Plan, StoreError
from dfengine.store.file.reader import Run

SYNC_SECONDS = 10.0


@dataclass(frozen=True)
class Write:
    """Values at one place, by dataset, and the marker to set once they are flushed."""

    where: Mapping[str, int]
    values: Mapping[str, np.ndarray]
    marker: str = ""


class SWMRFile:
    """A new file of a plan, open for writing in HDF5's single-writer-multiple-reader mode.

    An error closes it and leaves on disk what a kill at that moment would have left.
    """

    def __init__(self, path: Path, plan: Plan, *, compression: str, attributes: Mapping[str, str]) -> None:
        with path.open("xb") as file:
            file.write(template.build_file(plan, compression=compression, attributes=attributes))
        self._h5 = h5py.File(path, "r+", libver=("v110", "v110"), rdcc_nbytes=_chunk_cache_bytes(plan), rdcc_w0=1.0)
        self._handle: int = self._h5.id.get_vfd_handle()
        self._stat = os.fstat(self._handle)
        with self._abandoned_on_error():
            self._h5.swmr_mode = True
        self.stored = Run(path, self._h5, live=False)
        self._layout = self.stored.layout
        self._datasets = {path: self._h5["entry"][path] for path in self._layout}
        self.marks = {name: self.stored.marks(name) for name in schema.MARKERS}
        self._synced = time.monotonic()

    def write(self, write: Write) -> None:
        """Write and flush the values, then set and flush their marker. Every ten seconds the file is synced to disk.

        Raises StoreError for a dataset that does not exist: in SWMR mode HDF5 would create it and corrupt the file.
        """
        if missing := set(write.values) - set(self._datasets):
            raise StoreError(f"{', '.join(missing)} is not in the file: nothing can be added in SWMR mode")
        with self._abandoned_on_error():
            for path, values in write.values.items():
                lengths = iter(values.shape)
                axes = self._layout[path][0].axis_names
                place = tuple(write.where[axis] if axis in write.where else slice(next(lengths)) for axis in axes)
                self._datasets[path][place] = values
            for path in write.values:
                self._datasets[path].flush()
            if write.marker:
                marker = self._datasets[f"items/{write.marker}"]
                place = self._layout[f"items/{write.marker}"][0].index(write.where)
                marker[place] = 1
                marker.flush()
                self.marks[write.marker][place] = True
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._handle)
                self._synced = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        with self._abandoned_on_error():
            self._h5.flush()
            self._h5.close()

    def abandon(self) -> None:
        """Close the file without writing anything more to the disk."""
        detach_to_devnull(self._handle, self._stat)
        with contextlib.suppress(Exception):
            self._h5.close()

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.abandon()
            raise


def _chunk_cache_bytes(plan: Plan) -> int:
    """Cache size per dataset: twice an item's largest dataset, since a smaller cache writes chunks more than once."""
    written = [(dataset, size) for dataset, size in schema.layout(plan).values() if dataset.marker]
    return 2 * max(
        np.dtype(dataset.dtype).itemsize * math.prod(size.values()) // size["item"] for dataset, size in written
    )


@contextlib.contextmanager
def opened_for_writing(path: Path) -> Iterator[h5py.File]:
    """An existing file without readers, open for writing. After an error nothing more is written to it."""
    h5 = h5py.File(path, "r+", libver=("v110", "v110"))
    handle = h5.id.get_vfd_handle()
    stat = os.fstat(handle)
    try:
        yield h5
        h5.flush()
        h5.close()
    except BaseException:
        detach_to_devnull(handle, stat)
        with contextlib.suppress(Exception):
            h5.close()
        raise
