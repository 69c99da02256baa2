"""One item of an open file, with the attributes of a result in memory. Arrays are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from dfengine.result import COMBINED, Explanation
from dfengine.store.file import schema
from dfengine.store.file.lazy import LazyArray
from dfengine.store.file.plan import Item, Method, StoreError
from dfengine.tokens import Tokens

if TYPE_CHECKING:
    from dfengine.store.file.reader import Run


class StoredItem(Explanation):
    """One item of a file. Its arrays are read when they are accessed."""

    def __init__(self, open_run: Callable[[], Run], index: int, source: tuple[Path, int] | None = None) -> None:
        """Item `index` of the file that `open_run` returns, which may close between accesses."""
        self._open_run = open_run
        self.index = index
        self.item: Item = self._run.plan.items[index]
        self.source, self.number = source or (self._run.path, index)
        """the file or run folder that the item was opened from, and its index there"""

    @property
    def _run(self) -> Run:
        return self._open_run()

    key = property(lambda self: self.item.key)
    prompt = property(lambda self: self.item.prompt)
    negative_prompt = property(lambda self: self.item.negative_prompt)
    seed = property(lambda self: self.item.seed)
    model = property(lambda self: self._run.plan.model)
    words = property(lambda self: self.item.words)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of each method as plain values, with the explainer's class name as "explainer"."""
        return {method.name: method.settings for method in self._run.plan.methods}

    def settings_of(self, method: str) -> Mapping[str, Any]:
        """A method's settings as plain values, with its class's name as "explainer"; empty for an unknown method."""
        return self._method(method).settings

    def label(self, method: str) -> str:
        """The method's name for readers, such as "DF-RISE"; `method` itself if the file has no label."""
        return self._method(method).label or method

    def form(self, method: str) -> str:
        """The kind of figure that suits a method's maps: "saliency", "layers", "tokens" or "words"."""
        planned = self._method(method)
        return planned.form or ("layers" if planned.has_layers else "saliency")

    def hot(self, method: str) -> str:
        """What high values of the method's maps mean, after "Hot:"; empty if the file does not say."""
        return self._method(method).hot

    def _method(self, name: str) -> Method:
        return next((method for method in self._run.plan.methods if method.name == name), Method(name))

    @property
    def environment(self) -> dict[str, str]:
        """The versions and device that produced the item; empty if the file was merged from different ones."""
        environments = [source["environment"] for source in self._run.merged_from]
        return self._run.environment if all(one == self._run.environment for one in environments) else {}

    def _by_method(self, path: str, chosen: Mapping[str, Mapping[str, int]]) -> dict[str, LazyArray]:
        names = [method.name for method in self._run.plan.methods]
        return {
            name: LazyArray(self._open_run, path, {"item": self.index, "method": names.index(name)}, lengths)
            for name, lengths in chosen.items()
        }

    @property
    def maps(self) -> dict[str, Any]:
        """Raw saliency by method, float32 [steps, h, w]; for DF-CAM by layer, [steps, u, v], and "combined"."""
        methods = self._run.plan.methods
        maps: dict[str, Any] = self._by_method("maps/saliency", {method.name: {} for method in methods})
        for method in methods:
            if method.has_layers:
                maps[method.name] = {COMBINED: maps[method.name], **self.cam}
        return maps

    @property
    def errors(self) -> dict[str, LazyArray]:
        """Standard error of the saliency, float32 [steps, h, w], for the methods that estimate one."""
        return self._by_method("maps/error", {method.name: {} for method in self._run.plan.methods if method.has_error})

    @property
    def scores(self) -> dict[str, LazyArray]:
        """Scores of the masks, float32 [steps, masks], for the methods that keep them; NaN after the last mask used."""
        methods = [method for method in self._run.plan.methods if method.num_masks]
        return self._by_method("scores/score", {method.name: {"mask": method.num_masks} for method in methods})

    @property
    def cam(self) -> dict[str, LazyArray]:
        """Raw DF-CAM maps by layer, each at the layer's own resolution, float32 [steps, u, v]."""
        by_resolution = {
            name: LazyArray(self._open_run, f"cam/{u}x{v}/saliency", {"item": self.index, "layer": place})
            for (u, v), layers in schema.resolutions(self._run.plan).items()
            for place, name in enumerate(layers)
        }
        return {name: by_resolution[name] for name, _ in self._run.plan.layers}

    @property
    def tokens(self) -> Tokens | None:
        """The tokens that have a relevance; None if relevance was not computed."""
        return Tokens(self.prompt, self.item.tokens, self.item.spans) if self.item.tokens else None

    @property
    def relevance(self) -> LazyArray | None:
        """Relevance of each token, float32 [tokens, steps]; None if it was not computed."""
        if not self.item.tokens:
            return None
        return LazyArray(self._open_run, "curves/relevance", {"item": self.index}, {"token": len(self.item.tokens)})

    @property
    def word_maps(self) -> LazyArray | None:
        """The map of each word, float32 [words, steps, h, w]; None if there are no words."""
        return self._by_word("curves/heat")

    @property
    def word_errors(self) -> LazyArray | None:
        """Standard error of the words' maps, float32 [words, steps, h, w]; None if there are none."""
        return self._by_word("curves/heat_error")

    def _by_word(self, path: str) -> LazyArray | None:
        if not self.words or path not in self._run.layout:
            return None
        return LazyArray(self._open_run, path, {"item": self.index}, {"word": len(self.words)})

    @property
    def latents(self) -> LazyArray:
        """R_t, float32 [steps, c, h, w]."""
        return LazyArray(self._open_run, "latents/latent", {"item": self.index})

    @property
    def epsilon(self) -> LazyArray:
        """ε(R_t), float32 [steps, c, h, w]."""
        return LazyArray(self._open_run, "latents/epsilon", {"item": self.index})

    @property
    def image(self) -> UInt8[np.ndarray, "H W 3"]:
        """The decoded image. Raises StoreError if the trajectory is not stored yet."""
        return self._read_trajectory("images/rgb")

    @property
    def previews(self) -> LazyArray | None:
        """The image predicted at each step, uint8 [steps, H, W, 3]; None if the file has none."""
        path = "images/preview"
        return LazyArray(self._open_run, path, {"item": self.index}) if path in self._run.layout else None

    @property
    def timesteps(self) -> Shaped[np.ndarray, " steps"]:
        """The scheduler's time-steps, integers if all are whole. Raises StoreError if they are not stored yet."""
        steps = self._read_trajectory("schedule/timestep")
        return steps.astype(np.int64) if (steps == np.round(steps)).all() and (abs(steps) < 2**53).all() else steps

    @property
    def signal(self) -> Float[np.ndarray, " steps"]:
        """a of each step, R_t = a·x0 + b·n. Raises StoreError if the trajectory is not stored yet."""
        return self._read_trajectory("schedule/signal")

    @property
    def noise(self) -> Float[np.ndarray, " steps"]:
        """b of each step. Raises StoreError if the trajectory is not stored yet."""
        return self._read_trajectory("schedule/noise")

    def _read_trajectory(self, path: str) -> np.ndarray:
        if not self.has_trajectory:
            raise StoreError(f"{self._run.path}: item {self.index} has no trajectory yet")
        return self._run.read(path, {"item": self.index})

    @property
    def has_trajectory(self) -> bool:
        """Whether image, latents, ε and schedule are stored."""
        return bool(self._run.marks("trajectory_done", self.index))

    @property
    def done(self) -> dict[str, Bool[np.ndarray, " steps"]]:
        """For each method, the steps whose map, error and scores are stored."""
        marks = self._run.marks("done", self.index)
        return {method.name: marks[place] for place, method in enumerate(self._run.plan.methods)}

    @property
    def seconds(self) -> float:
        """Wall time that the item took; NaN until it is finished."""
        return float(self._run.read("items/seconds", {"item": self.index}))
