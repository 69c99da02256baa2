"""A merged file holds every item once, unchanged, and appears completely or not at all."""

import dataclasses
import json
import os

import h5py
import numpy as np
import pytest
from store_example import PLAN, PLANS, check, fill, half, step, total, trajectory
from test_store_resume import data

from dfengine import store
from dfengine.store.run import merging


def write_run(path, plan, **options):
    with store.Writer.create(path, plan, **options) as writer:
        fill(writer)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["gzip", "none"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_merged_file_equals_one_written_directly(tmp_path, plan, compression):
    """The number of chunks is equal too, even if the halves differ in their numbers of tokens and words."""
    if len(plan.items) == 1:
        plan = dataclasses.replace(plan, items=(*plan.items, store.Item("k9", "a dog", tokens=("a", "dog"))))
    halves = [write_run(tmp_path / f"{item}.h5", half(plan, item), compression=compression) for item in range(2)]
    merged = store.merge(halves, tmp_path / "all.h5")
    direct = write_run(tmp_path / "whole.h5", plan, compression=compression)
    assert data(merged) == data(direct)
    with store.open(merged) as run, h5py.File(merged) as merged_h5, h5py.File(direct) as direct_h5:
        assert check(run) == total(plan)
        assert run.finished
        assert run.plan == plan
        for path in run.layout:
            assert merged_h5["entry"][path].id.get_num_chunks() == direct_h5["entry"][path].id.get_num_chunks(), path
            assert merged_h5["entry"][path].compression == direct_h5["entry"][path].compression
    assert sorted(os.listdir(tmp_path)) == ["0.h5", "1.h5", "all.h5", "whole.h5"]


@pytest.mark.slow
def test_sources_are_recorded(tmp_path):
    first = write_run(tmp_path / "a.h5", half(PLAN, 0), device="one", run_id="r1")
    second = write_run(tmp_path / "b.h5", half(PLAN, 1), device="other", run_id="r2")
    with h5py.File(store.merge([first, second], tmp_path / "all.h5")) as h5:
        sources = json.loads(h5.attrs["merged_from"])
    assert [(source["file"], source["run_id"], source["environment"]["device"]) for source in sources] == [
        ("a.h5", "r1", "one"),
        ("b.h5", "r2", "other"),
    ]
    with store.open(tmp_path / "all.h5") as differing, store.open(first) as single:
        assert [item.environment for item in differing] == [
            {},
            {},
        ]  # it is unknown which of the two
        assert [item.environment["device"] for item in single] == ["one"]


@pytest.mark.slow
def test_each_item_is_taken_once_and_finished_if_possible(tmp_path):
    writer = store.Writer.create(tmp_path / "cut.h5", PLAN)
    writer.trajectory(1, **trajectory(PLAN, 1))
    writer.step(1, "rise", 1, **step(PLAN, 1, 0, 1))
    writer.close(publish=False)
    first = write_run(tmp_path / "first.h5", half(PLAN, 0))
    with store.open(store.merge([tmp_path / "cut.part.h5", first], tmp_path / "one.h5")) as run:
        assert [item.key for item in run] == ["k0", "k1"]
        assert [item.seconds for item in run] == pytest.approx([1.5, np.nan], nan_ok=True)
        assert check(run) == 2 + total(half(PLAN, 0)), "unfinished items stay unfinished"
        assert not run.finished
    second = write_run(tmp_path / "second.h5", half(PLAN, 1))
    paths = [tmp_path / "cut.part.h5", first, second, first]
    with store.open(store.merge(paths, tmp_path / "two.h5")) as run:
        assert [item.key for item in run] == ["k0", "k1"]
        assert check(run) == total(PLAN)


@pytest.mark.slow
def test_a_run_folder_is_merged_with_its_segments_and_with_files(tmp_path):
    folder = store.Folder(tmp_path / "run")
    for unit, item in (("b", 0), ("a", 1)):
        with folder.segment(unit, half(PLAN, item)) as writer:
            fill(writer)
    other = write_run(tmp_path / "more.h5", dataclasses.replace(PLAN, items=(store.Item("k5", "a cat"),)))
    with store.open(store.merge([tmp_path / "run", other], tmp_path / "all.h5")) as run:
        assert [item.key for item in run] == ["k1", "k0", "k5"]
        check(run)


def test_a_part_is_merged_as_it_was_when_it_was_read(tmp_path, monkeypatch):
    """Its writer completes it meanwhile: values that were not copied are not marked."""
    plan, copied = half(PLAN, 0), merging._read_chunk
    writer = store.Writer.create(tmp_path / "run.h5", plan)
    writer.step(0, "rise", 0, **step(plan, 0, 0, 0))
    while not writer.done.any():
        pass

    def read_late(*place):
        if not writer._closed:
            fill(writer)
            writer.close()
        return copied(*place)

    monkeypatch.setattr(merging, "_read_chunk", read_late)
    with store.open(store.merge([tmp_path / "run.part.h5"], tmp_path / "all.h5")) as run:
        assert (check(run), run.finished) == (1, False)


@pytest.mark.slow
def test_chunks_with_other_filters_are_copied_by_value(tmp_path):
    first = write_run(tmp_path / "a.h5", half(PLAN, 0), compression="gzip")
    second = write_run(tmp_path / "b.h5", half(PLAN, 1), compression="none")
    for paths in ([first, second], [second, first]):
        with store.open(store.merge(paths, tmp_path / "all.h5", overwrite=True)) as run:
            assert check(run) == total(PLAN)


def test_equal_keys_of_other_settings_are_refused(tmp_path):
    first = write_run(tmp_path / "a.h5", PLAN)
    other = write_run(tmp_path / "b.h5", dataclasses.replace(PLAN, previews=False, model="m" * 70 + "b"))
    with pytest.raises(store.StoreError, match=r"other settings than .*a.h5: previews \(true, now false\); model"):
        store.merge([first, other], tmp_path / "all.h5")


@pytest.mark.slow
def test_merging_merged_files_records_all_sources(tmp_path):
    files = [write_run(tmp_path / f"{item}.h5", half(PLAN, item)) for item in range(2)]
    store.merge(files[:1], tmp_path / "one.h5")
    with store.open(store.merge([tmp_path / "one.h5", files[1]], tmp_path / "all.h5")) as run:
        assert [source["file"] for source in run.merged_from] == ["0.h5", "1.h5"]


@pytest.mark.slow
def test_invalid_merges_are_refused(tmp_path):
    first = write_run(tmp_path / "a.h5", half(PLAN, 0))
    other = dataclasses.replace(half(PLAN, 1), num_steps=2, methods=(store.Method("rise", {"p": 1}, 7, True),))
    second, out = write_run(tmp_path / "b.h5", other), tmp_path / "all.h5"
    with pytest.raises(
        store.StoreError,
        match=r"b.h5 has other settings than .*a.h5: random \(removed\); keep_probability of .*merge files of equal",
    ):
        store.merge([first, second], out)
    with pytest.raises(store.StoreError, match="there is nothing to merge"):
        store.merge([], out)
    with pytest.raises(store.StoreError, match="cannot be the name of a result"):
        store.merge([first], tmp_path / "all.txt")
    with store.Writer.create(out, PLAN) as writer:
        with pytest.raises(store.StoreError, match=r"all.h5 is being written by another run"):
            store.merge([first], out)
        writer.trajectory(0, **trajectory(PLAN, 0))
    out.unlink()
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "b.h5"]
    with pytest.raises(store.StoreError, match=r"a.h5 exists already: .*--overwrite"):
        store.merge([first], first)
    store.merge([first], first, overwrite=True)
    with store.open(first) as run:
        assert check(run) == total(half(PLAN, 0)), "merged into itself"
