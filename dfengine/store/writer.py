"""The writer: one thread behind a bounded queue, in HDF5's single-writer-multiple-reader mode.

Every object exists before the first value is written, and a value is flushed before the marker that vouches for it: the
file can be read at any moment, also after a kill, and what is marked in it is whole. (After a power cut a marker may
have reached the disk before its data: the checksums tell, and resume computes such a step again.)
"""

import contextlib
import hashlib
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from dfengine.store import schema
from dfengine.store.files import Lock, cause, fresh_path, part_path, sync
from dfengine.store.plan import Plan, StoreError
from dfengine.store.reader import Run, StoredItem
from dfengine.store.reader import open as open_run

_SYNC_SECONDS = 10.0


@dataclass(frozen=True)
class _Job:
    """Values at one place, by dataset, and the marker that is set once they are flushed."""

    where: Mapping[str, int]
    values: Mapping[str, np.ndarray]
    marker: str = ""


class Writer:
    """Writes one file; a context manager that publishes it on leaving, unless the body raised.

    Calls copy their arrays and return at once; a full queue holds them back. They raise ValueError for a wrong shape or
    place, and StoreError where an earlier write failed; what had been flushed until then can be read.
    """

    def __init__(self, path: Path, plan: Plan, h5: h5py.File, lock: Lock, queue_size: int) -> None:
        """Use `create`."""
        self.path = path
        self.plan = plan
        self._h5 = h5
        self._lock = lock
        self._stored = Run(part_path(path), h5, live=False)
        self._layout = self._stored.layout
        self._datasets = {name: h5["entry"][name] for name in self._layout}
        self._marks = {row.path: self._stored.marks(row.path[6:]) for row in schema.TABLE if row.path.endswith("done")}
        self._places = {method.name: place for place, method in enumerate(plan.methods)}
        self._queue: queue.Queue[_Job | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._work, name=f"store {path.name}", daemon=True)
        self._error: Exception | None = None
        self._closed = False
        self._synced = time.monotonic()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        plan: Plan,
        *,
        overwrite: bool = False,
        resume: bool = False,
        compression: str | None = "gzip",
        queue_size: int = 64,
        device: str = "cpu",
        run_id: str | None = None,
    ) -> Self:
        """Begins <name>.part.h5, which becomes `path` when the writer closes.

        A finished file at `path` is refused unless `overwrite`. So is an interrupted one, unless `resume` is given and
        its plan is this one (it is then gone on with: see `done`) or else `overwrite` (it is then lost).
        """
        path = Path(path)
        fresh = fresh_path(path)
        with contextlib.ExitStack() as undo:
            undo.enter_context(_named(path))
            lock = Lock(path)
            undo.callback(lock.release)
            interrupted = _interrupted(path, plan, overwrite, resume)
            if interrupted:
                undo.enter_context(interrupted)
            fresh.unlink(missing_ok=True)
            attributes = {
                "run_id": run_id or hashlib.sha256(plan.to_json().encode()).hexdigest()[:16],
                "unit_id": path.stem,
                "environment": schema.environment(device),
            }
            undo.callback(fresh.unlink, missing_ok=True)
            h5 = schema.create(fresh, plan, compression=compression, attributes=attributes)
            undo.callback(h5.close)
            writer = cls(path, plan, h5, lock, queue_size)
            if interrupted:
                writer._copy(interrupted)
                interrupted.close()
            sync(fresh)
            fresh.replace(part_path(path))
            sync(path.parent)
            undo.pop_all()
        writer._thread.start()
        return writer

    @classmethod
    def resume(cls, path: str | os.PathLike[str], plan: Plan, **options: Any) -> Self:
        """`create`, going on with an interrupted file where there is one."""
        return cls.create(path, plan, resume=True, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(StoreError):
            self.close(publish=False)

    @property
    def done(self) -> Bool[np.ndarray, "items methods steps"]:
        """The maps that are safely stored, those of a resumed file included."""
        return self._marks["items/done"].copy()

    def has_trajectory(self, item: int) -> bool:
        """Whether the item's trajectory is safely stored."""
        return bool(self._marks["items/trajectory_done"][item])

    def has_cam(self, item: int, step: int) -> bool:
        """Whether the DF-CAM maps of a step are safely stored."""
        return bool(self._marks["items/cam_done"][item, step])

    def has_relevance(self, item: int, step: int) -> bool:
        """Whether the tokens' relevance of a step is safely stored."""
        return bool(self._marks["items/relevance_done"][item, step])

    def has_heat(self, item: int, step: int) -> bool:
        """Whether the words' heat maps of a step are safely stored."""
        return bool(self._marks["items/heat_done"][item, step])

    def stored(self, item: int) -> StoredItem:
        """What the file holds of an item so far, until the writer closes."""
        return self._stored[item]

    def trajectory(
        self,
        item: int,
        *,
        timesteps: Int[np.ndarray, " steps"],
        alpha_bar: Float[np.ndarray, " steps"],
        latents: Float[np.ndarray, "steps c h w"],
        epsilon: Float[np.ndarray, "steps c h w"],
        image: UInt8[np.ndarray, "H W 3"],
        previews: UInt8[np.ndarray, "steps H W 3"] | None = None,
    ) -> None:
        """Stores an item's R_t, ε(R_t), schedule and decoded image, and its previews if the plan has them."""
        values = {
            "latents/latent": latents,
            "latents/epsilon": epsilon,
            "schedule/timestep": timesteps,
            "schedule/alpha_bar": alpha_bar,
            "images/rgb": image,
        }
        if (previews is not None) != self.plan.previews:
            raise ValueError(f"previews: {'missing' if self.plan.previews else 'given'}, against the plan")
        if previews is not None:
            values["images/preview"] = previews
        self._put("items/trajectory_done", {"item": item}, values)

    def step(
        self,
        item: int,
        method: str,
        step: int,
        *,
        saliency: Float[np.ndarray, "h w"],
        error: Float[np.ndarray, "h w"] | None = None,
        scores: Float[np.ndarray, " masks"] | None = None,
    ) -> None:
        """Stores a method's map of one step, with what the plan says it has; scores may be fewer than planned."""
        if method not in self._places:
            raise ValueError(f"method {method!r} is not in the plan: expected one of {', '.join(self._places)}")
        planned = self.plan.methods[self._places[method]]
        for name, given, expected in (
            ("error", error is not None, planned.has_error),
            ("scores", scores is not None, planned.num_masks > 0),
        ):
            if given != expected:
                raise ValueError(f"{name} of method {method!r}: {'given' if given else 'missing'}, against the plan")
        values = {"maps/saliency": saliency}
        masks = 0
        if error is not None:
            values["maps/error"] = error
        if scores is not None:
            masks = len(scores)
            values["scores/score"] = scores
        if masks > planned.num_masks:
            raise ValueError(f"{masks} scores of method {method!r}: the plan has {planned.num_masks} masks")
        self._put("items/done", {"item": item, "method": self._places[method], "step": step}, values, mask=masks)

    def cam(self, item: int, step: int, maps: Mapping[str, Float[np.ndarray, "u v"]]) -> None:
        """Stores the DF-CAM maps of one step, one for every layer of the plan."""
        layers = [name for name, _ in self.plan.layers]
        if set(maps) != set(layers):
            wrong = sorted(set(maps) ^ set(layers))
            raise ValueError(f"DF-CAM maps do not match the plan's layers: {', '.join(wrong)} missing or unknown")
        values = {
            f"cam/{u}x{v}/saliency": np.stack([maps[name] for name in names])
            for (u, v), names in schema.resolutions(self.plan).items()
        }
        self._put("items/cam_done", {"item": item, "step": step}, values)

    def curves(
        self,
        item: int,
        step: int,
        *,
        relevance: Float[np.ndarray, " tokens"] | None = None,
        heat: Float[np.ndarray, "words h w"] | None = None,
    ) -> None:
        """Stores one step's relevance of the item's tokens, heat maps of its words, or both."""
        if relevance is not None:
            tokens = len(self.plan.items[item].tokens)
            self._put(
                "items/relevance_done", {"item": item, "step": step}, {"curves/relevance": relevance}, token=tokens
            )
        if heat is not None:
            words = len(self.plan.items[item].words)
            self._put("items/heat_done", {"item": item, "step": step}, {"curves/heat": heat}, word=words)

    def finish(self, item: int, seconds: float) -> None:
        """Records that nothing more will come of an item, and the wall time it took."""
        self._put("", {"item": item}, {"items/seconds": np.asarray(seconds, dtype=np.float64)})

    def close(self, *, publish: bool = True) -> None:
        """Writes what is queued, closes the file and gives it its final name; without `publish` it stays a .part.

        StoreError where a write failed: the .part then holds what was flushed until then.
        """
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        part = part_path(self.path)
        try:
            self._raise()
            with _named(part):
                self._h5.close()
                sync(part)
                if publish:
                    part.replace(self.path)
                    sync(self.path.parent)
        finally:
            self._lock.release()

    def _raise(self) -> None:
        if self._error:
            raise StoreError(f"cannot write {part_path(self.path)}: {cause(self._error)}") from self._error

    def _put(self, marker: str, where: Mapping[str, int], values: Mapping[str, Any], **lengths: int) -> None:
        """Queues values for one place; `lengths` are those of axes that this place does not fill."""
        if self._closed:
            raise StoreError(f"{self.path} is closed: nothing more can be written to it")
        self._raise()
        size = schema.sizes(self.plan)
        for axis, index in where.items():
            if not 0 <= index < size[axis]:
                raise ValueError(f"{axis} {index} is outside [0, {size[axis] - 1}]: the plan has {size[axis]}")
        self._queue.put(
            _Job(where, {name: self._checked(name, values[name], where, lengths) for name in values}, marker)
        )

    def _checked(self, name: str, value: Any, where: Mapping[str, int], lengths: Mapping[str, int]) -> np.ndarray:
        """A copy of the value as the file holds it; ValueError where its kind or shape is not the plan's."""
        if name not in self._layout:
            raise ValueError(f"{name}: the plan has none")
        dataset, size = self._layout[name]
        array = np.asarray(value)
        if not np.can_cast(array.dtype, dataset.dtype, "same_kind"):
            raise ValueError(f"{name} of type {array.dtype}: expected {np.dtype(dataset.dtype)}")
        expected = {axis: lengths.get(axis, length) for axis, length in size.items() if axis not in where}
        if array.shape != tuple(expected.values()):
            raise ValueError(
                f"{name} of shape {array.shape}: expected {tuple(expected.values())}, {' × '.join(expected)}"
            )
        return np.array(array, dtype=dataset.dtype, order="C")

    def _work(self) -> None:
        """The thread: writes jobs until None; after a failure it only empties the queue, so that nobody waits on it."""
        while (job := self._next()) is not None:
            if self._error is None:
                try:
                    self._write(job)
                except Exception as error:
                    self._error = error

    def _next(self) -> _Job | None:
        try:
            return self._queue.get(timeout=_SYNC_SECONDS)
        except queue.Empty:
            return _Job({}, {})

    def _write(self, job: _Job) -> None:
        for name, value in job.values.items():
            lengths = iter(value.shape)
            axes = self._layout[name][0].axis_names
            place = tuple(job.where[axis] if axis in job.where else slice(next(lengths)) for axis in axes)
            self._datasets[name][place] = value
        for name in job.values:
            self._datasets[name].flush()
        if job.marker:
            place = self._layout[job.marker][0].index(job.where)
            self._datasets[job.marker][place] = 1
            self._datasets[job.marker].flush()
            self._marks[job.marker][place] = True
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._h5.id.get_vfd_handle())
            self._synced = time.monotonic()

    def _copy(self, interrupted: Run) -> None:
        """Writes again whatever is marked in an interrupted file; what is damaged there stays unmarked here."""
        for marker in (name for name in self._marks if name in self._layout):
            members = [
                name for name, (dataset, _) in self._layout.items() if dataset.marker == marker.removeprefix("items/")
            ]
            axes = self._layout[marker][0].axis_names
            for place in np.argwhere(interrupted.marks(marker.removeprefix("items/"))):
                where = dict(zip(axes, place.tolist(), strict=True))
                with contextlib.suppress(StoreError):
                    self._write(
                        _Job(where, _written({name: interrupted.read(name, where) for name in members}), marker)
                    )
        seconds = interrupted.read("items/seconds", {})
        attempts = interrupted.read("items/attempt", {}) + np.isnan(seconds)
        self._write(_Job({}, {"items/seconds": seconds, "items/attempt": attempts}))


def _written(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the arrays that are all NaN: those that the place does not have."""
    return {name: value for name, value in values.items() if value.dtype.kind != "f" or not np.isnan(value).all()}


def _interrupted(path: Path, plan: Plan, overwrite: bool, resume: bool) -> Run | None:
    """The interrupted file to go on with, if any; StoreError where something is in the way that may not be lost."""
    part = part_path(path)
    if path.is_dir():
        raise StoreError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise StoreError(f"{path} exists already: choose another name, or --overwrite to replace it")
    if not part.exists() or (overwrite and not resume):
        return None
    if not resume:
        raise StoreError(f"{part} holds an interrupted run: --resume to go on with it, or --overwrite to start afresh")
    try:
        run = open_run(part)
        if differences := run.plan.differences(plan):
            run.close()
            told = "; ".join(differences)
            raise StoreError(f"{part} was begun with other settings: {told}; use those, or --overwrite to start afresh")
    except StoreError:
        if not overwrite:
            raise
        return None
    return run


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns the system's errors into a line that names the file; HDF5 raises some of them as RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise StoreError(f"cannot write {path}: {cause(error)}") from error
