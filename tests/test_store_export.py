"""Zarr has what xarray sees of a file or a run folder."""

import numpy as np
import pytest
import xarray
from store_example import PLAN, PLANS, fill, half

from dfengine import store


@pytest.fixture
def folder(tmp_path):
    """A run folder of two segments, whose prompts differ in length, in bytes and in tokens."""
    made = store.Folder(tmp_path / "run")
    for number in range(2):
        with made.segment(f"u{number}", half(PLAN, number)) as writer:
            fill(writer)
    return tmp_path / "run"


def test_a_folder_is_exported_whole(folder, tmp_path):
    out = store.export_zarr(folder, tmp_path / "run.zarr")
    with store.open(folder) as run:
        expected = run.to_xarray()
    with xarray.open_zarr(out, consolidated=False) as found:
        assert found.sizes == expected.sizes
        assert list(found.prompt.values) == ["a red circle", "ein Würfel"]
        assert found.seed.values.tolist() == [1, 2**64 - 1]
        for name in expected.variables:
            np.testing.assert_array_equal(found[name].values, expected[name].values, err_msg=name)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.zarr"}


def test_so_is_a_file(tmp_path):
    with store.Writer.create(tmp_path / "one.h5", PLAN) as writer:
        fill(writer)
    out = store.export_zarr(tmp_path / "one.h5", tmp_path / "one.zarr")
    with store.open(tmp_path / "one.h5") as run, xarray.open_zarr(out, consolidated=False) as found:
        np.testing.assert_array_equal(found.saliency.values, run.to_xarray().saliency.values)


def test_what_is_there_already_stays(folder, tmp_path):
    (tmp_path / "run.zarr").mkdir()
    with pytest.raises(store.StoreError, match=r"run\.zarr exists already: choose another name, or remove it"):
        store.export_zarr(folder, tmp_path / "run.zarr")
    assert not list((tmp_path / "run.zarr").iterdir())


def test_shapes_that_differ_are_refused_before_anything_is_written(folder, tmp_path):
    with store.Folder(folder).segment("u2", PLANS["wide"]) as writer:
        fill(writer)
    with pytest.raises(store.StoreError, match=r"differ in shape: step \(3, 2\), y \(5, 7\)"):
        store.export_zarr(folder, tmp_path / "run.zarr")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_without_zarr(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(store.StoreError, match=r"this needs zarr: pip install 'dfengine\[zarr\]'"):
        store.export_zarr(folder, tmp_path / "run.zarr")
