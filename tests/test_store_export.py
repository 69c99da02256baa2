"""A Zarr export has the arrays that xarray shows of a file or run folder."""

import errno
from pathlib import Path

import numpy as np
import pytest
import xarray
from store_example import PLAN, PLANS, fill, half

from dfengine import store
from dfengine.store.file.locks import Lock


@pytest.fixture
def folder(tmp_path):
    """A run folder of two segments, whose prompts differ in length, in bytes and in tokens."""
    run = store.Folder(tmp_path / "run")
    for number in range(2):
        with run.segment(f"u{number}", half(PLAN, number)) as writer:
            fill(writer)
    return tmp_path / "run"


@pytest.mark.slow
def test_a_folder_is_exported_completely(folder, tmp_path):
    out = store.export_zarr(folder, tmp_path / "run.zarr")
    with store.open(folder) as run:
        expected = run.to_xarray()
    with xarray.open_zarr(out) as exported:
        assert exported.sizes == expected.sizes
        assert list(exported.prompt.values) == ["a red circle", "ein Würfel"]
        assert exported.seed.values.tolist() == [1, 2**64 - 1]
        for name in expected.variables:
            np.testing.assert_array_equal(exported[name].values, expected[name].values, err_msg=name)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.zarr"}


def test_a_file_is_exported(tmp_path):
    with store.Writer.create(tmp_path / "one.h5", PLAN) as writer:
        fill(writer)
    out = store.export_zarr(tmp_path / "one.h5", tmp_path / "one.zarr")
    with store.open(tmp_path / "one.h5") as run, xarray.open_zarr(out) as exported:
        np.testing.assert_array_equal(exported.saliency.values, run.to_xarray().saliency.values)


def test_an_existing_group_is_kept_without_overwrite(folder, tmp_path):
    (tmp_path / "run.zarr").mkdir()
    with pytest.raises(store.StoreError, match=r"run\.zarr exists already: choose another name, or .*--overwrite"):
        store.export_zarr(folder, tmp_path / "run.zarr")
    assert not list((tmp_path / "run.zarr").iterdir())


@pytest.mark.slow
def test_an_existing_group_is_replaced_with_overwrite(folder, tmp_path):
    out = tmp_path / "run.zarr"
    with store.Writer.create(tmp_path / "one.h5", PLANS["wide"]) as writer:
        fill(writer)
    store.export_zarr(tmp_path / "one.h5", out)
    store.export_zarr(folder, out, overwrite=True)
    with xarray.open_zarr(out) as exported:
        assert list(exported.prompt.values) == ["a red circle", "ein Würfel"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.zarr", "one.h5"}


@pytest.mark.grid
@pytest.mark.parametrize("name", ["notes", "notes/text", "run", "run/run.json"])
def test_only_a_zarr_group_is_overwritten(folder, tmp_path, name):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/text").write_text("precious")
    with pytest.raises(store.StoreError, match="exists and is not a Zarr group, so it is not overwritten"):
        store.export_zarr(folder, tmp_path / name, overwrite=True)
    assert (tmp_path / "notes/text").read_text() == "precious"
    with store.open(folder) as run:
        assert len(run) == 2


@pytest.mark.slow
def test_a_failed_overwrite_keeps_the_existing_group(folder, tmp_path, monkeypatch):
    out = store.export_zarr(folder, tmp_path / "run.zarr")
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".new"):
            raise OSError(errno.EIO, "")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(store.StoreError, match=r"cannot write .*run\.zarr: the disk reports an input/output error"):
        store.export_zarr(folder, out, overwrite=True)
    with xarray.open_zarr(out) as exported:
        assert exported.sizes["item"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.zarr"}


@pytest.mark.slow
def test_exports_to_a_locked_name_are_refused(folder, tmp_path):
    with Lock(tmp_path / "run.zarr"):
        for overwrite in (False, True):
            with pytest.raises(store.Busy, match=r"run\.zarr is being written by another run"):
                store.export_zarr(folder, tmp_path / "run.zarr", overwrite=overwrite)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    store.export_zarr(folder, tmp_path / "run.zarr")


def test_shapes_that_differ_are_refused_before_anything_is_written(folder, tmp_path):
    with store.Folder(folder).segment("u2", PLANS["wide"]) as writer:
        fill(writer)
    with pytest.raises(store.StoreError, match=r"differ in shape: step \(3, 2\), y \(5, 7\)"):
        store.export_zarr(folder, tmp_path / "run.zarr")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_an_export_to_an_address_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("s3://bucket/run.zarr", Path("gs://bucket/run.zarr")):
        with pytest.raises(ValueError, match=r":/bucket/run\.zarr is an address, not a path: write to a folder"):
            store.export_zarr(folder, address)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_zarr(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(store.StoreError, match=r"export to Zarr needs zarr: pip install 'dfengine\[zarr\]'"):
        store.export_zarr(folder, tmp_path / "run.zarr")
