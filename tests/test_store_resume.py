"""An interrupted run continues where it stopped, computes nothing twice, and ends with the same data."""

import dataclasses
import shutil

import h5py
import numpy as np
import pytest
from store_example import PLAN, SMALL, check, fill, total

from dfengine import store


class Stopped(Exception):
    pass


class Counting:
    """A writer that counts its calls and raises after a given number."""

    def __init__(self, writer, stop=None, how=Stopped):
        self.writer, self.stop, self.how, self.calls = writer, stop, how, []

    def __getattr__(self, name):
        method = getattr(self.writer, name)
        if name not in ("trajectory", "step", "cam", "curves"):
            return method

        def count(*place, **values):
            if name == "curves" and not values:
                return
            if len(self.calls) == self.stop:
                raise self.how
            self.calls.append((name, *place))
            method(*place, **values)

        return count


def interrupt(path, stop, plan=PLAN):
    with pytest.raises(Stopped), store.Writer.create(path, plan) as writer:
        fill(Counting(writer, stop))


def data(path):
    """All values of a file as bytes, except attempts and seconds."""
    datasets = {}

    def visit(name, thing):
        if isinstance(thing, h5py.Dataset) and name.rpartition("/")[2] not in ("attempt", "seconds"):
            values = thing[()]
            datasets[name] = values.tolist() if values.dtype == object else values.tobytes()

    with h5py.File(path) as h5:
        h5["entry"].visititems(visit)
        return datasets


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run.h5"
    with store.Writer.create(path, PLAN) as writer:
        fill(writer)
    return data(path)


def test_a_run_interrupted_before_the_first_result_leaves_no_file(tmp_path):
    interrupt(tmp_path / "run.h5", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2, 9, 13, 14, 20])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, complete, stop):
    path = tmp_path / "run.h5"
    interrupt(path, stop)
    assert not path.exists()
    with store.open(tmp_path / "run.part.h5") as run:
        assert not run.finished
        marks = check(run)
    with store.Writer.resume(path, PLAN) as writer:
        counting = Counting(writer)
        fill(counting)
    full = len(PLAN.items) * (1 + PLAN.num_steps * (len(PLAN.methods) + 2))
    assert len(counting.calls) == full - stop, "nothing is computed twice"
    assert data(path) == complete
    assert marks >= stop
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.h5"]


@pytest.mark.slow
def test_a_run_interrupted_twice(tmp_path, complete):
    interrupt(tmp_path / "run.h5", 5)
    with pytest.raises(KeyboardInterrupt), store.Writer.resume(tmp_path / "run.h5", PLAN) as writer:
        fill(Counting(writer, 8, KeyboardInterrupt))
    with store.open(tmp_path / "run.part.h5") as run:
        assert check(run) >= 13
    with store.Writer.resume(tmp_path / "run.h5", PLAN) as writer:
        fill(writer)
    assert data(tmp_path / "run.h5") == complete


@pytest.mark.slow
def test_attempts_are_counted_for_items_that_were_not_finished(tmp_path):
    interrupt(tmp_path / "run.h5", 20)
    with store.Writer.resume(tmp_path / "run.h5", PLAN) as writer:
        fill(writer)
    with h5py.File(tmp_path / "run.h5") as h5:
        assert h5["entry/items/attempt"][:].tolist() == [1, 2]
        assert h5["entry/items/seconds"][:].tolist() == [1.5, 2.5]


@pytest.mark.slow
def test_finished_and_interrupted_files_are_protected(tmp_path):
    path = tmp_path / "run.h5"
    interrupt(path, 5)
    with pytest.raises(store.StoreError, match=r"run.part.h5 holds an interrupted run: resume it, or .*--overwrite"):
        store.Writer.create(path, PLAN)
    with store.Writer.create(path, SMALL, overwrite=True) as writer:
        fill(writer)
    with pytest.raises(store.StoreError, match=r"run.h5 exists already: .*--overwrite"):
        store.Writer.resume(path, SMALL)
    with store.open(path) as run:
        assert check(run) == total(SMALL)
    with store.Writer.create(path, PLAN, overwrite=True) as writer:
        with store.open(path) as run:
            assert run.plan == SMALL, "kept until the new one is complete"
        fill(writer)
    with store.open(path) as run:
        assert check(run) == total(PLAN)


def test_other_settings_are_refused_and_named(tmp_path):
    path = tmp_path / "run.h5"
    interrupt(path, 5)
    other = store.Plan(
        **vars(PLAN)
        | {
            "settings": {"sampling": "early", "gamma": 10, "timesteps": [900, 500, 100]},
            "methods": (store.Method("rise", {"keep_probability": 0.5, "kind": "rise"}, 7, True), PLAN.methods[1]),
            "items": (store.Item(**vars(PLAN.items[0]) | {"seed": 2, "key": "k2"}), PLAN.items[1]),
        }
    )
    with pytest.raises(store.StoreError) as refused:
        store.Writer.resume(path, other)
    assert str(refused.value) == (
        f"{tmp_path / 'run.part.h5'} was begun with other settings: seed of image 0 (1, now 2); "
        'kind of rise ("gaussian", now "rise"); gamma (60, now 10); '
        "use those, or discard it with --overwrite"
    )
    with store.open(tmp_path / "run.part.h5") as run:
        assert check(run) >= 5
    with store.Writer.resume(path, other, overwrite=True) as writer:
        assert not writer.done.any()


@pytest.mark.parametrize("values", [list(range(100, 130)), "/models/" + "x" * 200])
def test_settings_that_differ_late_are_other_settings(tmp_path, values):
    """Long values are shortened in the message, not before they are compared."""
    late = [*values[:-1], 999] if isinstance(values, list) else values[:-1] + "y"
    plan = dataclasses.replace(SMALL, settings={"values": values})
    interrupt(tmp_path / "run.h5", 2, plan)
    with pytest.raises(store.StoreError, match=r"other settings: values \(.*… of \d+ characters, now .*…"):
        store.Writer.resume(tmp_path / "run.h5", dataclasses.replace(SMALL, settings={"values": late}))


def test_settings_are_equal_regardless_of_order_and_sequence_type():
    mine = store.Plan(**vars(SMALL) | {"settings": {"a": (1, 2), "b": 1}})
    assert mine.differences(store.Plan(**vars(SMALL) | {"settings": {"b": 1, "a": [1, 2]}})) == []
    assert mine.differences(SMALL) == ["a ([1, 2], now unset)", "b (1, now unset)"]


def test_damaged_values_are_computed_again(tmp_path, complete):
    path = tmp_path / "run.h5"
    interrupt(path, 20)
    part = tmp_path / "run.part.h5"
    with store.open(part) as run:
        assert np.isfinite(run[0].seconds)
    with h5py.File(part) as h5:
        chunk = h5["entry/maps/saliency"].id.get_chunk_info(1)
    with part.open("r+b") as file:
        file.seek(chunk.byte_offset + 5)
        file.write(b"\xff\x00\xff")
    with store.Writer.resume(path, PLAN) as writer:
        assert writer.done[0, 0].tolist() == [True, False, True]
        assert np.isnan(writer.stored(0).seconds), "not finished any more"
        fill(writer)
    assert data(path) == complete


def test_a_part_is_kept_until_the_fresh_file_holds_it(tmp_path, monkeypatch):
    path, part = tmp_path / "run.h5", tmp_path / "run.part.h5"
    interrupt(path, 9)
    shutil.copy(part, tmp_path / "before")

    def fail(handle):
        raise OSError(5, "")

    monkeypatch.setattr("dfengine.store.file.files.os.fsync", fail)
    with pytest.raises(store.StoreError, match="input/output"):
        store.Writer.resume(path, PLAN)
    assert part.read_bytes() == (tmp_path / "before").read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["before", "run.part.h5"]


def test_resume_without_anything_to_resume(tmp_path, complete):
    with store.Writer.resume(tmp_path / "run.h5", PLAN) as writer:
        assert not writer.done.any()
        fill(writer)
    assert data(tmp_path / "run.h5") == complete
    assert np.all([len(values) for values in complete.values()])
