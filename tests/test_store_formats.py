"""Other tools open a file directly: xarray and h5netcdf are run, NXdata viewers are represented by their rules."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray
from store_example import PLAN, fill, step, trajectory

from dfengine import store
from dfengine.store.file import schema

AXES = {
    "maps": ("item", "method", "step", "y", "x"),
    "cam/5x6": ("item", "layer", "step", "u", "v"),
    "cam/3x3": ("item", "layer", "step", "u", "v"),
    "scores": ("item", "method", "step", "mask"),
    "curves": ("item", "token", "step"),
    "images": ("item", "height", "width", "color"),
    "latents": ("item", "step", "channel", "y", "x"),
    "schedule": ("item", "step"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "run.h5"
    with store.Writer.create(path, PLAN) as writer:
        fill(writer)
    return path


@pytest.mark.parametrize("group", AXES)
def test_xarray_names_the_axes(path, group):
    with xarray.open_dataset(path, group=f"/entry/{group}", engine="h5netcdf") as opened:
        assert opened[opened.attrs["signal"]].dims == AXES[group]
        names = {"method": ["rise", "random"], "layer": ["mid"] if group == "cam/3x3" else ["down.0", "up.0"]}
        for axis in AXES[group]:
            expected = names.get(axis, np.arange(opened.sizes[axis]))
            assert opened[axis].values.tolist() == list(expected), axis


def test_xarray_selects_by_name(path):
    with xarray.open_dataset(path, group="/entry/maps", engine="h5netcdf") as maps:
        saliency = maps["saliency"].sel({"item": 1, "method": "random", "step": 2})  # sel has a keyword "method"
        np.testing.assert_array_equal(saliency.values, step(PLAN, 1, 1, 2)["saliency"])


@pytest.mark.slow
def test_the_file_is_a_tree_of_datasets(path):
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        assert {f"/entry/{group}" for group in AXES} < set(tree.groups)


def test_viewers_find_the_maps(path):
    with h5py.File(path) as h5:
        assert h5.attrs["NX_class"] == "NXroot"
        entry = h5[h5.attrs["default"]]
        assert entry.attrs["NX_class"] == "NXentry"
        assert entry[entry.attrs["default"]].name == "/entry/maps"


@pytest.mark.parametrize("group", AXES)
def test_viewers_show_pictures_and_axes(path, group):
    """h5web: each dimension of the signal has an axis of its length or "."; auxiliary signals have its shape."""
    shown = {"images": "rgb-image", "scores": "spectrum", "curves": "spectrum", "schedule": "spectrum"}
    with h5py.File(path) as h5:
        data = h5["entry"][group]
        signal = data[data.attrs["signal"]]
        assert data.attrs["NX_class"] == "NXdata"
        assert signal.attrs["interpretation"] == shown.get(group, "image")
        assert len(data.attrs["axes"]) == signal.ndim
        for axis, expected, length in zip(data.attrs["axes"], AXES[group], signal.shape, strict=True):
            assert axis == ("." if expected in ("method", "layer") else expected)
            if axis != ".":
                assert (data[axis].shape, data[axis].dtype.kind) == ((length,), "i")
        for name in data.attrs.get("auxiliary_signals", ()):
            assert data[name].shape == signal.shape


def test_every_axis_has_a_dimension_scale(path):
    def visit(name, thing):
        if isinstance(thing, h5py.Dataset) and not h5py.h5ds.is_scale(thing.id):
            checked.append(name)
            for dimension, length in zip(thing.dims, thing.shape, strict=True):
                assert [scale.shape for scale in dimension.values()] == [(length,)], name

    checked = []
    with h5py.File(path) as h5:
        h5.visititems(visit)
        assert len(checked) == len(store.open(path).layout)


def test_hdf5_1_10_and_later_can_read_it(path):
    superblock_version, hdf5_1_10 = path.read_bytes()[8], 3
    assert superblock_version == hdf5_1_10


HDF5_1_14 = """
import sys
import netCDF4

print(netCDF4.__hdf5libversion__)
with netCDF4.Dataset(sys.argv[1]) as file:
    maps = file["entry/maps"]
    print(",".join(maps["saliency"].dimensions), maps["method"][0], maps["saliency"][1, 1, 2].tolist())
    print(*file["entry/items/prompts"][:], file["entry/images/rgb"][1].sum(dtype=int))
"""


def test_an_hdf5_1_14_reader_reads_it(path):
    """netCDF4 with its bundled HDF5, in a process without ours: compressed maps, strings and images."""
    run = subprocess.run([sys.executable, "-c", HDF5_1_14, path], capture_output=True, text=True, check=True)
    version, saliency, texts = run.stdout.splitlines()
    assert version.startswith("1.14")
    names, method, values = saliency.split(" ", 2)
    assert (names, method) == (",".join(AXES["maps"]), "rise")
    np.testing.assert_array_equal(np.array(json.loads(values), np.float32), step(PLAN, 1, 1, 2)["saliency"])
    image = int(trajectory(PLAN, 1)["image"].sum(dtype=int))
    assert texts == f"a red circle  ein Würfel blurry {image}"


def test_to_xarray(path):
    with store.open(path) as run:
        held = run.to_xarray()
    assert held["saliency"].dims == AXES["maps"]
    assert held["prompt"].values.tolist() == ["a red circle", "ein Würfel"]
    np.testing.assert_array_equal(held["error"].sel({"method": "rise"})[1, 2], step(PLAN, 1, 0, 2)["error"])
    assert held["timestep"].values.tolist() == [[900, 600, 300]] * 2


def test_to_xarray_without_xarray(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with store.open(path) as run, pytest.raises(store.StoreError, match="pip install 'dfengine\\[xarray\\]'"):
        run.to_xarray()


def test_the_documentation_lists_the_contents():
    text = (Path(__file__).parent.parent / "docs/format.md").read_text()
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| `" in line]
    assert rows == [[row.path, row.dtype, ", ".join(row.axis_names), row.marker, row.long_name] for row in schema.TABLE]
