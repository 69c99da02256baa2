"""The template of a file: every group, dataset, dimension scale and attribute, with the static values filled in."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from dfengine.store.file.checking import CHECKSUM, checksum
from dfengine.store.file.plan import Plan, StoreError
from dfengine.store.file.schema import FORMAT, FORMAT_VERSION, Dataset, layout, prompts, resolutions, sizes

#: For maps, images and latents. gzip level 1 about halves exact maps; higher levels gain nothing.
COMPRESSIONS = ("gzip", "none")


def build_file(plan: Plan, *, compression: str, attributes: Mapping[str, str]) -> bytes:
    """The bytes of a file that holds no results yet.

    It is built in memory, so that HDF5 never holds a half-created file that it cannot write to a full disk.
    Raises StoreError for an unknown compression.
    """
    if compression not in COMPRESSIONS:
        known = ", ".join(COMPRESSIONS)
        raise StoreError(f"compression {compression!r} is not supported: expected one of {known}")
    with h5py.File("template", "w", driver="core", backing_store=False, libver=("v110", "v110")) as h5:
        datasets = layout(plan)
        groups = list(dict.fromkeys(dataset.group for dataset, _ in datasets.values()))
        h5.attrs.update({"NX_class": "NXroot", "default": "entry", "format": FORMAT, "format_version": FORMAT_VERSION})
        texts = {"plan": plan.to_json(), "model": plan.model, **attributes}
        h5.attrs.update(texts | {CHECKSUM: checksum(texts)})
        entry = h5.create_group("entry")
        entry.attrs.update({"NX_class": "NXentry", "default": groups[0]})
        for name in groups:
            members = [(dataset, size) for dataset, size in datasets.values() if dataset.group == name]
            _create_group(entry, name, members, plan, compression)
        for path, values in _static_values(plan).items():
            if path in datasets:
                entry[path][...] = values
        h5.flush()
        return bytes(h5.id.get_file_image())


def _create_group(
    entry: h5py.Group, name: str, members: list[tuple[Dataset, dict[str, int]]], plan: Plan, compression: str
) -> None:
    group = entry.require_group(name)
    if "/" in name:
        group.parent.attrs["NX_class"] = "NXcollection"
    lengths = {axis: length for _, size in members for axis, length in size.items()}
    for axis, length in lengths.items():
        resizable = {"maxshape": (None,), "chunks": (length,)} if axis == "item" else {}
        scale = group.create_dataset(axis, data=_coordinates(axis, length, name, plan), **resizable)
        scale.make_scale(axis)
    for dataset, size in members:
        created = _create_dataset(group, dataset, size, compression, plan.mantissa_bits)
        for place, axis in enumerate(dataset.axis_names):
            created.dims[place].attach_scale(group[axis])
    if name == "items":
        group.attrs["NX_class"] = "NXcollection"
        return
    signal, size = members[0]
    # NXdata viewers accept only numeric axes: "." leaves an axis of names unlabelled, but its dimension scale stays.
    axes = ["." if axis in ("method", "layer") else axis for axis in signal.axis_names]
    auxiliary = [dataset.name for dataset, other in members[1:] if other == size and dataset.dtype != "str"]
    group.attrs.update({"NX_class": "NXdata", "signal": signal.name, "axes": axes})
    if auxiliary:
        group.attrs["auxiliary_signals"] = auxiliary


def _create_dataset(
    group: h5py.Group, dataset: Dataset, size: Mapping[str, int], compression: str, mantissa_bits: int
) -> h5py.Dataset:
    axes = dataset.axes.split()
    filters: dict[str, Any] = {"shuffle": True, "fletcher32": True} if dataset.compressed else {}
    if dataset.compressed and compression == "gzip":
        filters |= {"compression": "gzip", "compression_opts": 1}
    created = group.create_dataset(
        dataset.name,
        shape=tuple(size.values()),
        maxshape=tuple(None if axis == "item" else length for axis, length in size.items()),
        chunks=tuple(length if axis.endswith("*") else 1 for axis, length in zip(axes, size.values(), strict=True)),
        dtype=h5py.string_dtype() if dataset.dtype == "str" else dataset.dtype,
        fillvalue=dataset.fill,
        **filters,
    )
    created.attrs["long_name"] = dataset.long_name
    if dataset.rounded:
        created.attrs["mantissa_bits"] = mantissa_bits
    if dataset.interpretation:
        created.attrs["interpretation"] = dataset.interpretation
    return created


def _coordinates(axis: str, length: int, group: str, plan: Plan) -> np.ndarray:
    if axis not in ("method", "layer"):
        return np.arange(length, dtype="i4")
    names = [method.name for method in plan.methods]
    if axis == "layer":
        names = {f"cam/{u}x{v}": layers for (u, v), layers in resolutions(plan).items()}[group]
    return np.array(names, dtype=h5py.string_dtype())


def _static_values(plan: Plan) -> dict[str, Any]:
    """The values that are known before the first step, by path."""
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
    """What the values are computed with, as JSON: Python, platform, package versions and device."""
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
