"""The schema: one table, from which the writer creates a file, the reader finds its way in it, and resume copies it."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dfengine.store.plan import Plan

FORMAT = "dfengine"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Dataset:
    """One dataset of the format, under /entry.

    A starred axis lies whole in one chunk, the others have a chunk an index: one write fills whole chunks.
    `marker` is the dataset of `items/` that vouches for the values; those without are written before the file is
    shared, or are markers themselves. A dataset is created where its axes, and what it `needs`, are not of size zero.
    """

    path: str
    dtype: str
    axes: str
    marker: str = ""
    long_name: str = ""
    interpretation: str = ""
    compressed: bool = False
    needs: str = "item"

    @property
    def group(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(self.axes.replace("*", "").split())

    @property
    def fill(self) -> float | None:
        return {"f": math.nan, "u": 0, "i": 0}.get(self.dtype[0])

    def index(self, where: Mapping[str, int]) -> tuple[int | slice, ...]:
        """The selection of this dataset at the given axes, whole along the others."""
        return tuple(where.get(axis, slice(None)) for axis in self.axis_names)


def _image(path: str, axes: str, marker: str, long_name: str, needs: str = "item") -> Dataset:
    return Dataset(path, "f4", axes, marker, long_name, "image", compressed=True, needs=needs)


TABLE = (
    _image("maps/saliency", "item method step y* x*", "done", "raw saliency"),
    _image("maps/error", "item method step y* x*", "done", "standard error of the saliency", needs="errors"),
    _image("cam/{u}x{v}/saliency", "item layer step u* v*", "cam_done", "raw DF-CAM map"),
    Dataset("scores/score", "f4", "item method step mask*", "done", "score of each mask", "spectrum"),
    Dataset("curves/relevance", "f4", "item token* step", "relevance_done", "relevance of each token", "spectrum"),
    _image("curves/heat", "item word step y* x*", "heat_done", "cross-attention heat map of each word"),
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
    Dataset("schedule/alpha_bar", "f8", "item step*", "trajectory_done", "cumulative signal share", "spectrum"),
    Dataset("schedule/timestep", "i4", "item step*", "trajectory_done", "step of the training schedule", "spectrum"),
    Dataset("items/key", "str", "item*", long_name="SHA-256 of the item's description"),
    Dataset("items/prompts", "str", "prompt*", long_name="every prompt, once"),
    Dataset("items/prompt_index", "u4", "item*", long_name="row of prompts"),
    Dataset("items/negative_prompt_index", "u4", "item*", long_name="row of prompts"),
    Dataset("items/seed", "u8", "item*", long_name="seed of the start noise"),
    Dataset("items/settings", "str", "method*", long_name="each method's settings, JSON"),
    Dataset("items/attempt", "u4", "item*", long_name="how often the item was begun"),
    Dataset("items/seconds", "f8", "item", long_name="wall time in seconds, NaN until the item is finished"),
    Dataset("items/done", "u1", "item method* step*", long_name="1 where map, error and scores are safe"),
    Dataset("items/cam_done", "u1", "item step*", long_name="1 where the DF-CAM maps are safe", needs="layers"),
    Dataset("items/relevance_done", "u1", "item step*", long_name="1 where relevance is safe", needs="token"),
    Dataset("items/heat_done", "u1", "item step*", long_name="1 where the heat maps are safe", needs="word"),
    Dataset("items/trajectory_done", "u1", "item", long_name="1 where image, latents and schedule are safe"),
)


def sizes(plan: Plan) -> dict[str, int]:
    """The length of every axis, those of one DF-CAM resolution apart."""
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
        "layers": len(plan.layers),
        "previews": int(plan.previews),
    }


def resolutions(plan: Plan) -> dict[tuple[int, int], list[str]]:
    """The DF-CAM layers of each resolution, in the plan's order."""
    layers: dict[tuple[int, int], list[str]] = {}
    for name, size in plan.layers:
        layers.setdefault(size, []).append(name)
    return layers


def prompts(plan: Plan) -> list[str]:
    """Every prompt and negative prompt of the plan, once, in order of appearance."""
    return list(dict.fromkeys(text for item in plan.items for text in (item.prompt, item.negative_prompt)))


def layout(plan: Plan) -> dict[str, tuple[Dataset, dict[str, int]]]:
    """Every dataset a file of this plan has, by path, with the sizes of its axes."""
    placed = {}
    for row in TABLE:
        for (u, v), layers in resolutions(plan).items() if "{u}" in row.path else [((0, 0), [])]:
            dataset = replace(row, path=row.path.format(u=u, v=v))
            size = sizes(plan) | {"u": u, "v": v, "layer": len(layers)}
            if size[dataset.needs] and all(size[axis] for axis in dataset.axis_names):
                placed[dataset.path] = dataset, {axis: size[axis] for axis in dataset.axis_names}
    return placed


def create(path: Path, plan: Plan, *, compression: str | None, attributes: Mapping[str, str]) -> h5py.File:
    """A new file with every group, dataset, dimension scale and attribute of the plan, in SWMR mode.

    The chunk cache holds twice an item's largest dataset: a smaller one writes chunks more than once.
    """
    placed = layout(plan)
    largest = max(
        np.dtype(dataset.dtype).itemsize * math.prod(size.values()) // size["item"]
        for dataset, size in placed.values()
        if dataset.marker
    )
    h5 = h5py.File(path, "x", libver=("v110", "v110"), rdcc_nbytes=max(2 * largest, 1 << 20), rdcc_w0=1.0)
    try:
        text = {"plan": plan.to_json(), "model": plan.model, **attributes}
        groups = list(dict.fromkeys(dataset.group for dataset, _ in placed.values()))
        h5.attrs.update({"NX_class": "NXroot", "default": "entry", "format": FORMAT, "format_version": FORMAT_VERSION})
        h5.attrs.update(text)
        entry = h5.create_group("entry")
        entry.attrs.update({"NX_class": "NXentry", "default": groups[0]})
        for name in groups:
            members = [(dataset, size) for dataset, size in placed.values() if dataset.group == name]
            _create_group(entry, name, members, plan, compression)
        for name, values in _static(plan).items():
            if name in placed:
                entry[name][...] = values
        h5.flush()
        h5.swmr_mode = True
    except BaseException:
        h5.close()
        raise
    return h5


def _create_group(
    entry: h5py.Group, name: str, members: list[tuple[Dataset, dict[str, int]]], plan: Plan, compression: str | None
) -> None:
    group = entry.require_group(name)
    if "/" in name:
        group.parent.attrs["NX_class"] = "NXcollection"
    scales = {axis: size for _, sizes_ in members for axis, size in sizes_.items()}
    for axis, size in scales.items():
        growing = {"maxshape": (None,), "chunks": (size,)} if axis == "item" else {}
        scale = group.create_dataset(axis, data=_coordinate(axis, size, name, plan), **growing)
        scale.make_scale(axis)
    for dataset, size in members:
        made = _create_dataset(group, dataset, size, compression)
        for place, axis in enumerate(dataset.axis_names):
            made.dims[place].attach_scale(group[axis])
    signal, size = members[0]
    if name == "items":
        group.attrs["NX_class"] = "NXcollection"
        return
    # A viewer takes numbers only as axes: "." leaves an axis of names without one, while its dimension scale stays.
    axes = ["." if axis in ("method", "layer") else axis for axis in signal.axis_names]
    others = [
        dataset.path.rpartition("/")[2] for dataset, other in members[1:] if other == size and dataset.dtype != "str"
    ]
    group.attrs.update({"NX_class": "NXdata", "signal": signal.path.rpartition("/")[2], "axes": axes})
    if others:
        group.attrs["auxiliary_signals"] = others


def _create_dataset(
    group: h5py.Group, dataset: Dataset, size: Mapping[str, int], compression: str | None
) -> h5py.Dataset:
    stars = dataset.axes.split()
    filters = {"shuffle": True, "fletcher32": True} if dataset.compressed else {}
    if dataset.compressed and compression:
        filters |= {"compression": compression, "compression_opts": 1}
    made = group.create_dataset(
        dataset.path.rpartition("/")[2],
        shape=tuple(size.values()),
        maxshape=tuple(None if axis == "item" else length for axis, length in size.items()),
        chunks=tuple(length if star.endswith("*") else 1 for star, length in zip(stars, size.values(), strict=True)),
        dtype=h5py.string_dtype() if dataset.dtype == "str" else dataset.dtype,
        fillvalue=dataset.fill,
        **filters,
    )
    made.attrs["long_name"] = dataset.long_name
    if dataset.interpretation:
        made.attrs["interpretation"] = dataset.interpretation
    return made


def _coordinate(axis: str, size: int, group: str, plan: Plan) -> np.ndarray:
    if axis not in ("method", "layer"):
        return np.arange(size, dtype="i4")
    names = [method.name for method in plan.methods]
    if axis == "layer":
        names = {f"cam/{u}x{v}": layers for (u, v), layers in resolutions(plan).items()}[group]
    return np.array(names, dtype=h5py.string_dtype())


def _static(plan: Plan) -> dict[str, Any]:
    """What is known before the first step, by path."""
    rows = {text: row for row, text in enumerate(prompts(plan))}
    size = sizes(plan)
    return {
        "items/key": [item.key for item in plan.items],
        "items/prompts": list(rows),
        "items/prompt_index": [rows[item.prompt] for item in plan.items],
        "items/negative_prompt_index": [rows[item.negative_prompt] for item in plan.items],
        "items/seed": np.array([item.seed for item in plan.items], dtype="u8"),
        "items/settings": [json.dumps(dict(method.settings), default=dict) for method in plan.methods],
        "items/attempt": np.ones(len(plan.items), dtype="u4"),
        "curves/token_text": [[*item.tokens, *[""] * (size["token"] - len(item.tokens))] for item in plan.items],
        "curves/word_text": [[*item.words, *[""] * (size["word"] - len(item.words))] for item in plan.items],
    }


def environment(device: str) -> str:
    """Where the values were computed, as JSON: Python, platform, package versions and the device."""
    versions = {}
    for package in ("dfengine", "torch", "triton", "diffusers", "numpy", "h5py"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["hdf5"] = h5py.version.hdf5_version
    return json.dumps(
        {"python": platform.python_version(), "platform": platform.platform(), "device": device, **versions}
    )
