"""The writer: one thread behind a bounded queue, in HDF5's single-writer-multiple-reader mode.

Every object exists before the first value is written, and values are flushed before their marker is set. The file can
therefore be read at any moment, also after a kill, and marked values are complete. (After a power cut a marker may have
reached the disk before its values: the checksums detect this, and resuming computes such a step again.)
"""

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from dfengine.store.file import schema, template
from dfengine.store.file.errors import explain_error, translate_os_errors
from dfengine.store.file.files import (
    check_folder,
    check_name,
    fsync,
    part_path,
    publish_file,
    temporary_path,
    warn_of_network_storage,
    working_path,
)
from dfengine.store.file.item import StoredItem
from dfengine.store.file.locks import Lock
from dfengine.store.file.plan import Plan, StoreError
from dfengine.store.file.resume import copy, interrupted_run, open_to_resume
from dfengine.store.file.swmr import SYNC_SECONDS, SWMRFile, Write
from dfengine.store.file.values import check_presence, checked_copy


class Writer:
    """Writes one file. A context manager that publishes the file on exit, unless its body raised.

    Calls copy their arrays and return at once; they block while the queue is full. They raise ValueError for a wrong
    shape or place, and StoreError if an earlier write failed: what was flushed before that can be read.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        file: SWMRFile,
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
        self._file = file
        self._lock = lock
        self._method_index = {method.name: index for index, method in enumerate(plan.methods)}
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
        """Create <name>.part.h5, which becomes `path` when the writer closes; `on_publish` is called then.

        An existing `path` is refused without `overwrite`. An interrupted file is continued with `resume` if its plan is
        the same (see `done`), discarded with `overwrite`, and refused otherwise. If there is none, what is done in
        `sources`, other files of the same plan, is copied. If `path` is on network storage, the part is written to the
        temporary folder (TMPDIR) and copied on completion.
        """
        path = Path(path)
        check_name(path)
        part, temporary = part_path(path), temporary_path(working_path(path))
        with contextlib.ExitStack() as undo:
            undo.enter_context(translate_os_errors(path))
            lock = undo.enter_context(Lock(working_path(path)))
            check_folder(path)
            warn_of_network_storage(path)
            interrupted = interrupted_run(path, plan, overwrite, resume)
            earlier = [interrupted] if interrupted else [open_to_resume(source, plan) for source in sources]
            for run in earlier:
                undo.enter_context(run)
            temporary.unlink(missing_ok=True)
            attributes = {
                "run_id": run_id or hashlib.sha256(plan.to_json().encode()).hexdigest()[:16],
                "unit_id": os.fsencode(path.stem).decode(errors="replace"),
                "environment": template.environment(device),
            }
            undo.callback(temporary.unlink, missing_ok=True)
            file = SWMRFile(temporary, plan, compression=compression, attributes=attributes)
            undo.callback(file.abandon)
            for run in earlier:
                copy(run, file)
                run.close()
            fsync(temporary)
            temporary.replace(part)
            fsync(part.parent)
            undo.pop_all()
        writer = cls(path, plan, file, lock, queue_size=queue_size, on_publish=on_publish)
        writer._thread.start()
        return writer

    @classmethod
    def resume(cls, path: str | os.PathLike[str], plan: Plan, **options: Any) -> "Writer":
        """`create`, continuing an interrupted file if there is one."""
        return cls.create(path, plan, resume=True, **options)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(StoreError):
            self.close(publish=False)

    @property
    def done(self) -> Bool[np.ndarray, "items methods steps"]:
        """The maps that are safely stored, including those of a resumed file."""
        return self._file.marks["done"].copy()

    def has_trajectory(self, item: int) -> bool:
        """Whether the item's trajectory is safely stored."""
        return bool(self._file.marks["trajectory_done"][item])

    def has_cam(self, item: int, step: int) -> bool:
        """Whether the DF-CAM maps of a step are safely stored."""
        return bool(self._file.marks["cam_done"][item, step])

    def has_relevance(self, item: int, step: int) -> bool:
        """Whether the token relevance of a step is safely stored."""
        return bool(self._file.marks["relevance_done"][item, step])

    def has_word_maps(self, item: int, step: int) -> bool:
        """Whether the word maps of a step are safely stored."""
        return bool(self._file.marks["heat_done"][item, step])

    def stored(self, item: int) -> StoredItem:
        """What the file holds of an item so far; valid until the writer closes."""
        return self._file.stored[item]

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
        """Store an item's R_t, ε(R_t), schedule (a, b) and decoded image, and its previews if they are in the plan."""
        values: dict[str, np.ndarray] = {
            "latents/latent": latents,
            "latents/epsilon": epsilon,
            "schedule/timestep": timesteps,
            "schedule/signal": signal,
            "schedule/noise": noise,
            "images/rgb": image,
        }
        check_presence("previews", previews is not None, self.plan.previews)
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
        """Store a method's map of one step, with error and scores if they are in the plan; scores may be fewer."""
        if method not in self._method_index:
            raise ValueError(f"method {method!r} is not in the plan: expected one of {', '.join(self._method_index)}")
        planned = self.plan.methods[self._method_index[method]]
        num_scores = 0 if scores is None else len(scores)
        check_presence(f"error of method {method!r}", error is not None, planned.has_error)
        check_presence(f"scores of method {method!r}", num_scores > 0, planned.num_masks > 0)
        if num_scores > planned.num_masks:
            raise ValueError(f"{num_scores} scores of method {method!r}: the plan has {planned.num_masks} masks")
        values: dict[str, Any] = {"maps/saliency": saliency}
        if error is not None:
            values["maps/error"] = error
        if num_scores:
            values["scores/score"] = scores
        where = {"item": item, "method": self._method_index[method], "step": step}
        self._put("done", where, values, num_scores)

    def cam(self, item: int, step: int, maps: Mapping[str, Float[np.ndarray, "u v"]]) -> None:
        """Store the DF-CAM maps of one step, one for every layer of the plan."""
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
        word_maps: Float[np.ndarray, "words h w"] | None = None,
        word_errors: Float[np.ndarray, "words h w"] | None = None,
    ) -> None:
        """Store one step's relevance of the item's tokens, maps of its words with their errors if these are in the
        plan, or both."""
        if relevance is not None:
            self._put("relevance_done", {"item": item, "step": step}, {"curves/relevance": relevance})
        if word_maps is not None:
            has_errors = any(method.has_word_error for method in self.plan.methods)
            check_presence("errors of the words' maps", word_errors is not None, has_errors)
            errors = {} if word_errors is None else {"curves/heat_error": word_errors}
            self._put("heat_done", {"item": item, "step": step}, {"curves/heat": word_maps, **errors})

    def finish(self, item: int, seconds: float) -> None:
        """Mark an item as finished and store the wall time it took."""
        self._put("", {"item": item}, {"items/seconds": np.asarray(seconds, dtype=np.float64)})

    def close(self, *, publish: bool = True) -> None:
        """Write what is queued, close the file, and give it its final name.

        Without `publish` it stays a .part, and is removed if it holds nothing yet. Raises StoreError if a write failed:
        the .part then holds what was flushed before that.
        """
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        with self._lock:
            self._raise_error()
            with translate_os_errors(self.part):
                self._file.close()
                if not publish:
                    fsync(self.part)
            if publish:
                with translate_os_errors(self.path):
                    publish_file(self.part, self.path)
                if self._on_publish:
                    self._on_publish()
            elif not any(marks.any() for marks in self._file.marks.values()):
                self.part.unlink(missing_ok=True)

    def _raise_error(self) -> None:
        if self._error:
            raise StoreError(f"cannot write {self.part}: {explain_error(self._error)}") from self._error

    def _put(self, marker: str, where: Mapping[str, int], values: Mapping[str, Any], num_scores: int = 0) -> None:
        """Check and queue the values for one place, and the marker for them."""
        if self._closed:
            raise StoreError(f"{self.path} is closed: nothing more can be written to it")
        self._raise_error()
        for axis, index in where.items():
            if not 0 <= index < self._size[axis]:
                raise ValueError(f"{axis} {index} is outside [0, {self._size[axis] - 1}]")
        item = self.plan.items[where["item"]]
        lengths = {"mask": num_scores, "token": len(item.tokens), "word": len(item.words)}
        layout = self._file.stored.layout
        if missing := set(values) - set(layout):
            raise ValueError(f"{', '.join(missing)}: not in the plan")
        copies = {
            path: checked_copy(*layout[path], value, where, lengths, self.plan.mantissa_bits)
            for path, value in values.items()
        }
        self._queue.put(Write(where, copies, marker))

    def _work(self) -> None:
        """The thread: writes until it takes None. After a failure it only empties the queue, so that no call blocks."""
        while (write := self._next()) is not None:
            if self._error is None:
                try:
                    self._file.write(write)
                except Exception as error:
                    self._error = error

    def _next(self) -> Write | None:
        try:
            return self._queue.get(timeout=SYNC_SECONDS)
        except queue.Empty:
            return Write({}, {})  # lets `SWMRFile.write` sync to disk in time while nothing arrives
