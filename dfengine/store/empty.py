"""An empty file of a plan: every group, dataset, dimension scale and attribute, and what is known beforehand."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from dfengine.store.plan import Plan, StoreError
from dfengine.store.schema import FORMAT, FORMAT_VERSION, Dataset, layout, prompts, resolutions, sizes

#: Of maps, images and latents. gzip's fastest level halves exact maps at the most; there is no gain in a slower one.
COMPRESSIONS = ("gzip", "none")


def image(plan: Plan, *, compression: str, attributes: Mapping[str, str]) -> bytes:
    """The file's bytes, made in memory: HDF5 is never left with half a file that it cannot write.

    StoreError where the compression is not known.
    """
    if compression not in COMPRESSIONS:
        known = ", ".join(COMPRESSIONS)
        raise StoreError(f"compression {compression!r} is not known: expected one of {known}, which every reader has")
    with h5py.File("empty", "w", driver="core", backing_store=False, libver=("v110", "v110")) as h5:
        placed = layout(plan)
        groups = list(dict.fromkeys(dataset.group for dataset, _ in placed.values()))
        h5.attrs.update({"NX_class": "NXroot", "default": "entry", "format": FORMAT, "format_version": FORMAT_VERSION})
        h5.attrs.update({"plan": plan.to_json(), "model": plan.model, **attributes})
        entry = h5.create_group("entry")
        entry.attrs.update({"NX_class": "NXentry", "default": groups[0]})
        for name in groups:
            members = [(dataset, size) for dataset, size in placed.values() if dataset.group == name]
            _create_group(entry, name, members, plan, compression)
        for name, values in _static(plan).items():
            if name in placed:
                entry[name][...] = values
        h5.flush()
        return bytes(h5.id.get_file_image())


def _create_group(
    entry: h5py.Group, name: str, members: list[tuple[Dataset, dict[str, int]]], plan: Plan, compression: str
) -> None:
    group = entry.require_group(name)
    if "/" in name:
        group.parent.attrs["NX_class"] = "NXcollection"
    scales = {axis: length for _, lengths in members for axis, length in lengths.items()}
    for axis, length in scales.items():
        growing = {"maxshape": (None,), "chunks": (length,)} if axis == "item" else {}
        scale = group.create_dataset(axis, data=_coordinate(axis, length, name, plan), **growing)
        scale.make_scale(axis)
    for dataset, size in members:
        made = _create_dataset(group, dataset, size, compression, plan.mantissa_bits)
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
    group: h5py.Group, dataset: Dataset, size: Mapping[str, int], compression: str, mantissa_bits: int
) -> h5py.Dataset:
    stars = dataset.axes.split()
    filters: dict[str, Any] = {"shuffle": True, "fletcher32": True} if dataset.compressed else {}
    if dataset.compressed and compression == "gzip":
        filters |= {"compression": "gzip", "compression_opts": 1}
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
    if dataset.rounded:
        made.attrs["mantissa_bits"] = mantissa_bits
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
