"""The schema: one table of datasets, used by the template, the writer, the reader and merging."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from dfengine.store.file.plan import Plan

FORMAT = "dfengine"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Dataset:
    """One dataset of the format, under /entry.

    A chunk spans the axes marked with a star and one index of each other axis, so that each write fills whole chunks.
    `marker` names the dataset of `items/` that is set once the values are stored; static datasets, written before the
    file is shared, and markers themselves have none. A dataset is created unless an axis, or the size that it `needs`,
    is zero. `rounded` datasets have the mantissa that the plan gives.
    """

    path: str
    dtype: str
    axes: str
    marker: str = ""
    long_name: str = ""
    interpretation: str = ""
    compressed: bool = False
    rounded: bool = False
    needs: str = "item"

    @property
    def group(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(self.axes.replace("*", "").split())

    @property
    def fill(self) -> float | None:
        """NaN for floats; None, HDF5's default of 0, for others: netCDF would mask pixels equal to a fill of 255."""
        return math.nan if self.dtype[0] == "f" else None

    def index(self, where: Mapping[str, Any]) -> tuple[Any, ...]:
        """The selection at the given axes, complete along the others."""
        return tuple(where.get(axis, slice(None)) for axis in self.axis_names)


def _image(path: str, axes: str, marker: str, long_name: str, needs: str = "item", *, rounded: bool = False) -> Dataset:
    return Dataset(path, "f4", axes, marker, long_name, "image", compressed=True, rounded=rounded, needs=needs)


TABLE = (
    _image("maps/saliency", "item method step y* x*", "done", "raw saliency"),
    _image("maps/error", "item method step y* x*", "done", "standard error of the saliency", "errors", rounded=True),
    _image("cam/{u}x{v}/saliency", "item layer step u* v*", "cam_done", "raw DF-CAM map", rounded=True),
    Dataset("scores/score", "f4", "item method step mask*", "done", "score of each mask", "spectrum"),
    Dataset("curves/relevance", "f4", "item token* step", "relevance_done", "relevance of each token", "spectrum"),
    _image("curves/heat", "item word step y* x*", "heat_done", "map of each word", rounded=True),
    _image(
        "curves/heat_error",
        "item word step y* x*",
        "heat_done",
        "standard error of each word's map",
        "word_errors",
        rounded=True,
    ),
    Dataset("curves/token_text", "str", "item* token*", long_name="the item's tokens"),
    Dataset("curves/word_text", "str", "item* word*", long_name="the item's words"),
    Dataset("images/rgb", "u1", "item height* width* color*", "trajectory_done", "image", "rgb-image", compressed=True),
    Dataset(
        "images/preview",
        "u1",
        "item step height* width* color*",
        "trajectory_done",
        "image predicted at each step (x0, decoded)",
        "rgb-image",
        compressed=True,
        needs="previews",
    ),
    _image("latents/latent", "item step channel* y* x*", "trajectory_done", "latent of the trajectory"),
    _image("latents/epsilon", "item step channel* y* x*", "trajectory_done", "predicted noise"),
    Dataset("schedule/timestep", "f8", "item step*", "trajectory_done", "time-step of the scheduler", "spectrum"),
    Dataset("schedule/signal", "f8", "item step*", "trajectory_done", "a of latent = a x0 + b noise", "spectrum"),
    Dataset("schedule/noise", "f8", "item step*", "trajectory_done", "b of latent = a x0 + b noise", "spectrum"),
    Dataset("items/key", "str", "item*", long_name="SHA-256 of the item's description"),
    Dataset("items/prompts", "str", "prompt*", long_name="every distinct prompt"),
    Dataset("items/prompt_index", "u4", "item*", long_name="row in prompts"),
    Dataset("items/negative_prompt_index", "u4", "item*", long_name="row in prompts"),
    Dataset("items/seed", "u8", "item*", long_name="seed of the initial noise"),
    Dataset("items/settings", "str", "method*", long_name="each method's settings, JSON"),
    Dataset("items/attempt", "u4", "item*", long_name="number of attempts at the item"),
    Dataset("items/seconds", "f8", "item", long_name="wall time in seconds, NaN until the item is finished"),
    Dataset("items/done", "u1", "item method* step*", long_name="1 where map, error and scores are stored"),
    Dataset("items/cam_done", "u1", "item step*", long_name="1 where the DF-CAM maps are stored", needs="layers"),
    Dataset("items/relevance_done", "u1", "item step*", long_name="1 where relevance is stored", needs="token"),
    Dataset("items/heat_done", "u1", "item step*", long_name="1 where the word maps are stored", needs="word"),
    Dataset("items/trajectory_done", "u1", "item", long_name="1 where image, latents and schedule are stored"),
)

#: The table by path. Paths with {u} and {v} stand for one dataset per resolution of DF-CAM's layers.
DATASETS: Mapping[str, Dataset] = MappingProxyType({row.path: row for row in TABLE})
#: The datasets that mark values as stored, by name.
MARKERS = {name: DATASETS[f"items/{name}"] for name in sorted({row.marker for row in TABLE} - {""})}


def sizes(plan: Plan) -> dict[str, int]:
    """The length of every axis, except those that depend on a DF-CAM resolution."""
    channels, h, w = plan.latent
    return {
        "item": len(plan.items),
        "method": len(plan.methods),
        "step": plan.num_steps,
        "channel": channels,
        "y": h,
        "x": w,
        "height": plan.image[0],
        "width": plan.image[1],
        "color": 3,
        "mask": max((method.num_masks for method in plan.methods), default=0),
        "token": max(len(item.tokens) for item in plan.items),
        "word": max(len(item.words) for item in plan.items),
        "prompt": len(prompts(plan)),
        "errors": sum(method.has_error for method in plan.methods),
        "word_errors": sum(method.has_word_error for method in plan.methods),
        "layers": len(plan.layers),
        "previews": int(plan.previews),
    }


def nbytes(plan: Plan) -> int:
    """Size in bytes of all arrays in a file of this plan, uncompressed and without texts."""
    arrays = [(dataset, size) for dataset, size in layout(plan).values() if dataset.dtype != "str"]
    return sum(np.dtype(dataset.dtype).itemsize * math.prod(size.values()) for dataset, size in arrays)


def resolutions(plan: Plan) -> dict[tuple[int, int], list[str]]:
    """The DF-CAM layers of each resolution, in the plan's order."""
    layers: dict[tuple[int, int], list[str]] = {}
    for name, size in plan.layers:
        layers.setdefault(size, []).append(name)
    return layers


def prompts(plan: Plan) -> list[str]:
    """The distinct prompts and negative prompts, in order of appearance."""
    return list(dict.fromkeys(text for item in plan.items for text in (item.prompt, item.negative_prompt)))


def layout(plan: Plan) -> dict[str, tuple[Dataset, dict[str, int]]]:
    """Every dataset in a file of this plan, by path, with the lengths of its axes."""
    datasets = {}
    common, by_resolution = sizes(plan), resolutions(plan)
    for row in TABLE:
        for (u, v), layers in by_resolution.items() if "{u}" in row.path else [((0, 0), [])]:
            dataset = replace(row, path=row.path.format(u=u, v=v))
            size = common | {"u": u, "v": v, "layer": len(layers)}
            if size[dataset.needs] and all(size[axis] for axis in dataset.axis_names):
                datasets[dataset.path] = dataset, {axis: size[axis] for axis in dataset.axis_names}
    return datasets
