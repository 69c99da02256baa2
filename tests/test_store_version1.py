"""Files of format version 1, written by dfengine 0.1.0, are read, exported and merged.

`data/version1.h5` explains one image of a tiny model with random weights in two steps by DF-RISE, DF-CAM of one layer,
relevance and attention.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray

import dfengine
from dfengine import store
from dfengine.store.file import version1

FILE = Path(__file__).parent / "data/version1.h5"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copy(FILE, tmp_path / "run.h5"))


def open_zarr(path: Path) -> xarray.Dataset:
    return xarray.open_zarr(path)


def with_key(path: Path, key: str) -> Path:
    """The file with another key for its item, as if it had another seed."""
    with h5py.File(path, "r+") as h5:
        plan = json.loads(h5.attrs["plan"])
        plan["items"][0]["key"] = key
        h5.attrs["plan"] = json.dumps(plan)
        h5["entry/items/key"][0] = key
    return path


def test_the_schedule_is_computed_from_alpha_bar(path: Path) -> None:
    with h5py.File(path) as h5:
        alpha_bar, timesteps = h5["entry/schedule/alpha_bar"][0], h5["entry/schedule/timestep"][0]
    with store.open(path) as run:
        assert run.format_version == run.summary()["format_version"] == 1
        (item,) = run
        np.testing.assert_array_equal(item.signal, alpha_bar**0.5)
        np.testing.assert_array_equal(item.noise, (1 - alpha_bar) ** 0.5)
        np.testing.assert_allclose(item.signal**2 + item.noise**2, 1, rtol=1e-15)
        assert item.timesteps.tolist() == timesteps.tolist() == [501, 1]


def test_all_other_data_are_read_unchanged(path: Path) -> None:
    with h5py.File(path) as h5, dfengine.open(path) as run:
        entry, item = h5["entry"], run[0]
        assert run.finished
        for place, name in enumerate(("rise", "cam", "relevance", "attention")):
            np.testing.assert_array_equal(item.saliency(name), entry["maps/saliency"][0, place])
            assert item.done[name].all()
        np.testing.assert_array_equal(item.errors["rise"], entry["maps/error"][0, 0])
        np.testing.assert_array_equal(item.maps["cam"]["mid_block.resnets.0"], entry["cam/4x4/saliency"][0, 0])
        np.testing.assert_array_equal(item.relevance, entry["curves/relevance"][0])
        np.testing.assert_array_equal(item.word_maps, entry["curves/heat"][0])
        np.testing.assert_array_equal(item.image, entry["images/rgb"][0])
        assert item.heatmap("rise", 1).shape == item.image.shape[:2]


def test_methods_have_their_current_names_labels_and_forms(path: Path) -> None:
    with dfengine.open(path) as run:
        item = run[0]
        assert {name: (item.label(name), item.form(name)) for name in item.maps} == {
            "rise": ("DF-RISE", "saliency"),
            "cam": ("DF-CAM", "layers"),
            "relevance": ("relevance", "tokens"),
            "attention": ("attention", "words"),
        }
        assert [item.hot(name) for name in item.maps] == [""] * 4  # such files do not say what is hot
        assert item.settings_of("rise")["mask_kind"] == "gaussian"
        assert item.settings_of("cam")["loss_scale"] == 256
        assert item.job.timesteps == (501, 1)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (store.Method("a", {"explainer": "ReleasedRise"}), ("DF-RISE (released code)", "saliency")),
        (store.Method("a", {"explainer": "ReleasedCam"}, has_layers=True), ("DF-CAM (released code)", "layers")),
        (store.Method("a", {"explainer": "Mine", "masks": 3}), ("", "")),
        (store.Method("a", {}, has_layers=True), ("", "layers")),
    ],
)
def test_labels_of_other_explainers(method: store.Method, expected: tuple[str, str]) -> None:
    plan = store.Plan((store.Item("k", "a"),), (method,), num_steps=1, latent=(1, 1, 1), image=(1, 1))
    (upgraded,) = version1.upgrade(plan).methods
    assert (upgraded.label, upgraded.form) == expected
    assert upgraded.settings.get("masks") == method.settings.get("masks")


def test_files_are_exported(path: Path, tmp_path: Path) -> None:
    with store.open(path) as run, open_zarr(store.export_zarr(path, tmp_path / "run.zarr")) as exported:
        np.testing.assert_array_equal(exported.signal[0], run[0].signal)
        np.testing.assert_array_equal(exported.noise[0], run[0].noise)
        np.testing.assert_array_equal(exported.timestep[0], [501, 1])
        assert "alpha_bar" not in exported
        assert [line for line in store.summary_lines(run) if "4 masks" in line or "2 of 2 maps" in line]


def test_files_are_merged_into_one_of_the_current_version(path: Path, tmp_path: Path) -> None:
    other = with_key(Path(shutil.copy(FILE, tmp_path / "other.h5")), "k" * 64)
    with store.open(store.merge([path, other], tmp_path / "all.h5")) as merged, store.open(path) as run:
        assert (merged.format_version, len(merged), merged.finished) == (2, 2, True)
        for item in merged:
            np.testing.assert_array_equal(item.signal, run[0].signal)
            np.testing.assert_array_equal(item.noise, run[0].noise)
            assert item.timesteps.tolist() == [501, 1]
            np.testing.assert_array_equal(item.maps["cam"]["combined"], run[0].maps["cam"]["combined"])
            np.testing.assert_array_equal(item.scores["rise"], run[0].scores["rise"])
            np.testing.assert_array_equal(item.word_maps, run[0].word_maps)
            assert item.label("rise") == "DF-RISE"
    with h5py.File(tmp_path / "all.h5") as h5:
        assert set(h5["entry/schedule"]) == {"item", "step", "timestep", "signal", "noise"}


def test_an_interrupted_file_is_not_continued(path: Path, tmp_path: Path) -> None:
    with store.open(path) as run:
        plan = run.plan
    path.rename(tmp_path / "run.part.h5")
    with pytest.raises(store.StoreError, match=r"run.part.h5 has format version 1 and cannot be resumed .*--overwrite"):
        store.Writer.resume(path, plan)
    with store.Writer.resume(path, plan, overwrite=True) as writer:
        assert not writer.done.any()


def test_how_a_method_is_presented_does_not_make_plans_differ(path: Path) -> None:
    with store.open(path) as run:
        plain = tuple(dataclasses.replace(method, label="", form="", hot="elsewhere.") for method in run.plan.methods)
        assert run.plan.differences(dataclasses.replace(run.plan, methods=plain)) == []
