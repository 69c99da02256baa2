"""The writer: one thread behind a bounded queue, in HDF5's single-writer-multiple-reader mode.

Every object exists before the first value is written, and a value is flushed before the marker that vouches for it: the
file can be read at any moment, also after a kill, and what is marked in it is whole. (After a power cut a marker may
have reached the disk before its data: the checksums tell, and resume computes such a step again.)
"""

import contextlib
import errno
import hashlib
import os
import queue
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from dfengine.store import empty, schema
from dfengine.store.files import (
    Lock,
    cause,
    check_name,
    fresh_path,
    network_storage,
    part_path,
    publish_file,
    sync,
    working_path,
    writing,
)
from dfengine.store.item import StoredItem
from dfengine.store.plan import Plan, StoreError
from dfengine.store.resume import copy, interrupted_run, open_same
from dfengine.store.sink import SYNC_SECONDS, Sink, Write
from dfengine.store.values import as_planned, checked


class Writer:
    """Writes one file; a context manager that publishes it on leaving, unless the body raised.

    Calls copy their arrays and return at once; a full queue holds them back. They raise ValueError for a wrong shape or
    place, and StoreError where an earlier write failed; what had been flushed until then can be read.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        sink: Sink,
        lock: Lock,
        *,
        queue_size: int = 64,
        on_publish: Callable[[], None] | None = None,
    ) -> None:
        """Use `create`."""
        self.path = path
        self.part = part_path(path)
        self.plan = plan
        self._on_publish = on_publish
        self._size = schema.sizes(plan)
        self._sink = sink
        self._lock = lock
        self._places = {method.name: place for place, method in enumerate(plan.methods)}
        self._queue: queue.Queue[Write | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._work, name=f"store {path.name}", daemon=True)
        self._error: Exception | None = None
        self._closed = False

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        plan: Plan,
        *,
        overwrite: bool = False,
        resume: bool = False,
        compression: str = "gzip",
        queue_size: int = 64,
        device: str = "cpu",
        run_id: str | None = None,
        sources: Sequence[Path] = (),
        on_publish: Callable[[], None] | None = None,
    ) -> "Writer":
        """Begins <name>.part.h5, which becomes `path` when the writer closes; `on_publish` is called then.

        A finished file at `path` is refused unless `overwrite`. So is an interrupted one, unless `resume` is given and
        its plan is this one (it is then gone on with: see `done`) or else `overwrite` (it is then lost). Where there is
        none, what is done in `sources`, other files of the same plan, is gone on with.

        Where `path` is on network storage the part is in the temporary folder (TMPDIR), and is copied when it is whole.
        """
        path = Path(path)
        check_name(path)
        part, fresh = part_path(path), fresh_path(working_path(path))
        with contextlib.ExitStack() as undo:
            undo.enter_context(writing(path))
            lock = Lock(working_path(path))
            undo.callback(lock.release)
            _check_folder(path)
            interrupted = interrupted_run(path, plan, overwrite, resume)
            begun = [interrupted] if interrupted else [open_same(source, plan) for source in sources]
            for run in begun:
                undo.enter_context(run)
            fresh.unlink(missing_ok=True)
            attributes = {
                "run_id": run_id or hashlib.sha256(plan.to_json().encode()).hexdigest()[:16],
                "unit_id": os.fsencode(path.stem).decode(errors="replace"),
                "environment": empty.environment(device),
            }
            undo.callback(fresh.unlink, missing_ok=True)
            sink = Sink(fresh, plan, compression=compression, attributes=attributes)
            undo.callback(sink.abandon)
            for run in begun:
                copy(run, sink)
                run.close()
            sync(fresh)
            fresh.replace(part)
            sync(part.parent)
            undo.pop_all()
        writer = cls(path, plan, sink, lock, queue_size=queue_size, on_publish=on_publish)
        writer._thread.start()
        return writer

    @classmethod
    def resume(cls, path: str | os.PathLike[str], plan: Plan, **options: Any) -> "Writer":
        """`create`, going on with an interrupted file where there is one."""
        return cls.create(path, plan, resume=True, **options)

    def __enter__(self) -> "Writer":
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
        return self._sink.marks["done"].copy()

    def has_trajectory(self, item: int) -> bool:
        """Whether the item's trajectory is safely stored."""
        return bool(self._sink.marks["trajectory_done"][item])

    def has_cam(self, item: int, step: int) -> bool:
        """Whether the DF-CAM maps of a step are safely stored."""
        return bool(self._sink.marks["cam_done"][item, step])

    def has_relevance(self, item: int, step: int) -> bool:
        """Whether the tokens' relevance of a step is safely stored."""
        return bool(self._sink.marks["relevance_done"][item, step])

    def has_heat(self, item: int, step: int) -> bool:
        """Whether the words' heat maps of a step are safely stored."""
        return bool(self._sink.marks["heat_done"][item, step])

    def stored(self, item: int) -> StoredItem:
        """What the file holds of an item so far, until the writer closes."""
        return self._sink.stored[item]

    def trajectory(
        self,
        item: int,
        *,
        timesteps: Shaped[np.ndarray, " steps"],
        signal: Float[np.ndarray, " steps"],
        noise: Float[np.ndarray, " steps"],
        latents: Float[np.ndarray, "steps c h w"],
        epsilon: Float[np.ndarray, "steps c h w"],
        image: UInt8[np.ndarray, "H W 3"],
        previews: UInt8[np.ndarray, "steps H W 3"] | None = None,
    ) -> None:
        """Stores an item's R_t, ε(R_t), schedule and decoded image, and its previews if the plan has them."""
        values: dict[str, np.ndarray] = {
            "latents/latent": latents,
            "latents/epsilon": epsilon,
            "schedule/timestep": timesteps,
            "schedule/signal": signal,
            "schedule/noise": noise,
            "images/rgb": image,
        }
        as_planned("previews", previews is not None, self.plan.previews)
        if previews is not None:
            values["images/preview"] = previews
        self._put("trajectory_done", {"item": item}, values)

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
        masks = 0 if scores is None else len(scores)
        as_planned(f"error of method {method!r}", error is not None, planned.has_error)
        as_planned(f"scores of method {method!r}", masks > 0, planned.num_masks > 0)
        if masks > planned.num_masks:
            raise ValueError(f"{masks} scores of method {method!r}: the plan has {planned.num_masks} masks")
        values: dict[str, Any] = {"maps/saliency": saliency}
        if error is not None:
            values["maps/error"] = error
        if masks:
            values["scores/score"] = scores
        self._put("done", {"item": item, "method": self._places[method], "step": step}, values, masks)

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
        self._put("cam_done", {"item": item, "step": step}, values)

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
            self._put("relevance_done", {"item": item, "step": step}, {"curves/relevance": relevance})
        if heat is not None:
            self._put("heat_done", {"item": item, "step": step}, {"curves/heat": heat})

    def finish(self, item: int, seconds: float) -> None:
        """Records that nothing more will come of an item, and the wall time it took."""
        self._put("", {"item": item}, {"items/seconds": np.asarray(seconds, dtype=np.float64)})

    def close(self, *, publish: bool = True) -> None:
        """Writes what is queued, closes the file and gives it its final name.

        Without `publish` it stays a .part, or is removed where nothing is done yet.
        StoreError where a write failed: the .part then holds what was flushed until then.
        """
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        try:
            self._raise()
            with writing(self.part):
                self._sink.close()
                if not publish:
                    sync(self.part)
            if publish:
                with writing(self.path):
                    publish_file(self.part, self.path)
                if self._on_publish:
                    self._on_publish()
            elif not any(marks.any() for marks in self._sink.marks.values()):
                self.part.unlink(missing_ok=True)
        finally:
            self._lock.release()

    def _raise(self) -> None:
        if self._error:
            raise StoreError(f"cannot write {self.part}: {cause(self._error)}") from self._error

    def _put(self, marker: str, where: Mapping[str, int], values: Mapping[str, Any], masks: int = 0) -> None:
        """Queues values for one place, with the given number of masks."""
        if self._closed:
            raise StoreError(f"{self.path} is closed: nothing more can be written to it")
        self._raise()
        size = self._size
        for axis, index in where.items():
            if not 0 <= index < size[axis]:
                raise ValueError(f"{axis} {index} is outside [0, {size[axis] - 1}]: the plan has {size[axis]}")
        item = self.plan.items[where["item"]]
        lengths = {"mask": masks, "token": len(item.tokens), "word": len(item.words)}
        layout = self._sink.stored.layout
        if missing := set(values) - set(layout):
            raise ValueError(f"{', '.join(missing)}: the plan has none")
        kept = {
            name: checked(*layout[name], value, where, lengths, self.plan.mantissa_bits)
            for name, value in values.items()
        }
        self._queue.put(Write(where, kept, marker))

    def _work(self) -> None:
        """The thread: writes what is queued until None; after a failure it empties the queue, so that nobody waits."""
        while (one := self._next()) is not None:
            if self._error is None:
                try:
                    self._sink.write(one)
                except Exception as error:
                    self._error = error

    def _next(self) -> Write | None:
        try:
            return self._queue.get(timeout=SYNC_SECONDS)
        except queue.Empty:
            return Write({}, {})  # keeps the ten seconds of `Sink.write` while nothing comes


def _check_folder(path: Path) -> None:
    """StoreError where the folder cannot take a result; a note where it is not written in directly."""
    path.parent.stat()
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "")
    if working_path(path) != path:
        kind, part = network_storage(path.parent), part_path(path)
        warnings.warn(f"{path} is on {kind} storage: it is written as {part} and copied when it is whole", stacklevel=3)
