"""One item of an open file: its arrays, by the names that a result in memory has, read when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from dfengine.result import COMBINED, Explanation
from dfengine.store import schema
from dfengine.store.plan import Item, Plan, StoreError
from dfengine.tokens import Tokens

if TYPE_CHECKING:
    from dfengine.diffusion.job import Job


@runtime_checkable
class Source(Protocol):
    """The open file that an item is read from."""

    @property
    def path(self) -> Path: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def environment(self) -> dict[str, str]: ...

    @property
    def merged_from(self) -> list[dict[str, Any]]: ...

    @property
    def layout(self) -> dict[str, tuple[schema.Dataset, dict[str, int]]]: ...

    def read(self, path: str, where: Mapping[str, Any]) -> np.ndarray:
        """The values of one dataset at the given axes."""
        ...

    def marks(self, name: str, item: int | None = None) -> Bool[np.ndarray, " ..."]:
        """A marker of `items/`, over its axes, of one item or all."""
        ...


class LazyArray:
    """Values of one item in the file, read when sliced; values not written yet read as NaN.

    Slices as h5py does: integers, slices, one list or mask, an ellipsis. `numpy.asarray` reads all of it.
    """

    def __init__(self, run: Source, path: str, where: dict[str, int], lengths: Mapping[str, int] | None = None) -> None:
        self._run = run
        self._path = path
        self._where = where
        if path not in run.layout:
            raise StoreError(f"{run.path} holds no {path}: it was not asked for")
        size = run.layout[path][1] | dict(lengths or {})
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
        places = [place for place, part in enumerate(keys) if part is Ellipsis] or [len(keys)]
        keys[places[0] : places[0] + 1] = [slice(None)] * missing
        lists = [part for part in keys if not isinstance(part, slice) and not _whole(part)]
        if len(places) > 1 or len(lists) > 1:
            raise IndexError(f"{self._path} is sliced with at most one ellipsis and one list or mask")
        chosen = {axis: _chosen(part, n) for (axis, n), part in zip(self._free.items(), keys, strict=True)}
        if not lists:
            return self._run.read(self._path, self._where | chosen)
        # A file is read in rising order, each index once.
        axis, wanted = next((axis, part) for axis, part in chosen.items() if isinstance(part, np.ndarray))
        rising, order = np.unique(wanted, return_inverse=True)
        values = self._run.read(self._path, self._where | chosen | {axis: rising})
        before = [part for name, part in chosen.items() if list(chosen).index(name) < list(chosen).index(axis)]
        return values.take(order, axis=sum(isinstance(part, slice) for part in before))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype=dtype)

    def __repr__(self) -> str:
        return f"LazyArray({self._path}, shape {self.shape}, {self.dtype})"


def _whole(part: Any) -> bool:
    return isinstance(part, int | np.integer) and not isinstance(part, bool)


def _chosen(part: Any, length: int) -> int | slice | np.ndarray:
    """An index, slice, list or mask, held against the length of its axis."""
    if isinstance(part, slice):
        return slice(*part.indices(length))
    if _whole(part):
        return range(length)[part]
    wanted = np.asarray(part)
    if wanted.dtype == bool and wanted.shape == (length,):
        return np.flatnonzero(wanted)
    if wanted.ndim != 1 or (wanted.dtype.kind not in "iu" and len(wanted)):
        raise IndexError(f"{part!r} is no index: expected a number, a slice, a list of numbers or a mask of {length}")
    return np.array([range(length)[index] for index in wanted.tolist()], dtype=np.int64)


class StoredItem(Explanation):
    """One item of a file; its arrays are read when asked for."""

    def __init__(self, run: Source, index: int, source: tuple[Path, int] | None = None) -> None:
        self._run = run
        self.index = index
        self.item: Item = run.plan.items[index]
        self.source, self.number = source or (run.path, index)
        """the file or run folder that it was opened from, and its place there"""

    key = property(lambda self: self.item.key)
    prompt = property(lambda self: self.item.prompt)
    negative_prompt = property(lambda self: self.item.negative_prompt)
    seed = property(lambda self: self.item.seed)
    model = property(lambda self: self._run.plan.model)
    words = property(lambda self: self.item.words)

    @property
    def settings(self) -> dict[str, Any]:
        """Each explainer, under the name its maps are filed by; with `job`, all that it takes to run it again.

        Raises ValueError where this dfengine does not know one; `Run.plan` then has its settings as plain values.
        """
        from dfengine.explain import rebuild

        return {method.name: rebuild(method.settings) for method in self._run.plan.methods}

    @property
    def environment(self) -> dict[str, str]:
        """Versions and device that it was made with; nothing of a file that was merged from unlike ones."""
        made = [one["environment"] for one in self._run.merged_from]
        return self._run.environment if all(one == self._run.environment for one in made) else {}

    def settings_of(self, method: str) -> Mapping[str, Any]:
        """A method's settings as plain values, and as "explainer" its class's name, whether it is known here or not."""
        return next((one.settings for one in self._run.plan.methods if one.name == method), {})

    @property
    def job(self) -> Job:
        """What was generated, as `Engine.stream` takes it."""
        from torch import from_numpy

        from dfengine.diffusion.job import Job

        settings = self.item.settings
        return Job(
            prompt=self.prompt,
            timesteps=tuple(settings["timesteps"]),
            seed=self.seed,
            negative_prompt=self.negative_prompt,
            guidance=settings["guidance"],
            image=from_numpy(self.image) if settings["image"] else None,
        )

    def _methods(self, path: str, chosen: Mapping[str, Mapping[str, int]]) -> dict[str, LazyArray]:
        names = [method.name for method in self._run.plan.methods]
        return {
            name: LazyArray(self._run, path, {"item": self.index, "method": names.index(name)}, lengths)
            for name, lengths in chosen.items()
        }

    @property
    def maps(self) -> dict[str, Any]:
        """Raw saliency by method, float32 [steps, h, w]; of DF-CAM by layer, float32 [steps, u, v], and "combined"."""
        found: dict[str, Any] = self._methods("maps/saliency", {method.name: {} for method in self._run.plan.methods})
        for method in self._run.plan.methods:
            if method.has_layers:
                found[method.name] = {COMBINED: found[method.name], **self.cam}
        return found

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
    def tokens(self) -> Tokens | None:
        """What relevance is given for, if it was asked for."""
        if not self.item.tokens:
            return None
        return Tokens(self.prompt, self.item.tokens, self.item.spans)

    @property
    def relevance(self) -> LazyArray | None:
        """Relevance of each of the item's tokens, float32 [tokens, steps], if it was asked for."""
        return (
            None
            if not self.item.tokens
            else LazyArray(self._run, "curves/relevance", {"item": self.index}, {"token": len(self.item.tokens)})
        )

    @property
    def word_maps(self) -> LazyArray | None:
        """Cross-attention heat map of each of the item's words, float32 [words, steps, h, w], if it has any."""
        return (
            None
            if not self.words
            else LazyArray(self._run, "curves/heat", {"item": self.index}, {"word": len(self.words)})
        )

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
    def timesteps(self) -> Shaped[np.ndarray, " steps"]:
        """The scheduler's own time-steps, whole numbers where all are; StoreError before the trajectory is stored."""
        steps = self._of_trajectory("schedule/timestep")
        return steps.astype(np.int64) if (steps == np.round(steps)).all() else steps

    @property
    def signal(self) -> Float[np.ndarray, " steps"]:
        """a of each step, R_t = a·x0 + b·n; StoreError where the trajectory is not stored yet."""
        return self._of_trajectory("schedule/signal")

    @property
    def noise(self) -> Float[np.ndarray, " steps"]:
        """b of each step; StoreError where the trajectory is not stored yet."""
        return self._of_trajectory("schedule/noise")

    def _of_trajectory(self, path: str) -> np.ndarray:
        if not self.has_trajectory:
            raise StoreError(f"{self._run.path}: item {self.index} has no trajectory yet")
        return self._run.read(path, {"item": self.index})

    @property
    def has_trajectory(self) -> bool:
        """Whether image, latents, ε and schedule are stored."""
        return bool(self._run.marks("trajectory_done", self.index))

    @property
    def done(self) -> dict[str, Bool[np.ndarray, " steps"]]:
        """The steps whose map, error and scores are stored, by method."""
        marks = self._run.marks("done", self.index)
        return {method.name: marks[place] for place, method in enumerate(self._run.plan.methods)}

    @property
    def seconds(self) -> float:
        """Wall time the item took, NaN until it is finished."""
        return float(self._run.read("items/seconds", {"item": self.index}))
