"""A run folder: segments of many writers are read as one run, however the writers ended."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_example import PLAN, PLANS, check, fill, half, step, total, trajectory

from dfengine import store

FIRST, SECOND = half(PLAN, 0), half(PLAN, 1)

WRITE = """
import sys
sys.path.insert(0, "tests")
import store_faults
from store_example import PLANS, fill, half
from dfengine import store

for number in range(int(sys.argv[2]), int(sys.argv[3])):
    with store.Folder(sys.argv[1]).segment(f"u{number:03}", half(PLANS["two"], number % 2)) as writer:
        fill(writer)
"""


def part_of(writer: store.Writer, steps: int = 2) -> None:
    """Write a trajectory and a few maps, and stop there."""
    writer.trajectory(0, **trajectory(writer.plan, 0))
    for at in range(steps):
        writer.step(0, "rise", at, **step(writer.plan, 0, 0, at))
    writer.close(publish=False)


def complete(folder: store.Folder, unit: str, plan: store.Plan) -> None:
    with folder.segment(unit, plan) as writer:
        fill(writer)


@pytest.fixture
def path(tmp_path):
    """Two finished segments, of one item each."""
    folder = store.Folder(tmp_path / "run")
    complete(folder, "u1", SECOND)
    complete(folder, "u0", FIRST)
    return tmp_path / "run"


@pytest.mark.slow
def test_a_folder_is_read_as_one_run(path):
    with store.open(path) as run:
        assert isinstance(run, store.RunFolder)
        assert (len(run), run.finished) == (2, True)
        assert [item.key for item in run] == ["k0", "k1"], "by unit, not in order of completion"
        np.testing.assert_array_equal(run[-1].maps["random"][2], step(SECOND, 0, 1, 2)["saliency"])
        np.testing.assert_array_equal(run[0].image, trajectory(FIRST, 0)["image"])
        assert run[1].heatmap("rise", 1).shape == (10, 12)
        assert [item.seconds for item in run] == [1.5, 1.5]
        with pytest.raises(store.StoreError, match=r"item 2 is not in .*run: it has 2"):
            run[2]
    assert sum(check(store.open(file)) for file in (path / "segments").iterdir()) == total(PLAN)


def test_the_layout_of_a_folder(path):
    files = {str(file.relative_to(path)) for file in path.rglob("*")}
    assert files == {"run.json", "manifest.jsonl", "segments", "segments/u0.1.h5", "segments/u1.1.h5"}
    lines = [json.loads(line) for line in (path / "manifest.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "file": "u0.1.h5",
        "unit": "u0",
        "attempt": 1,
        "keys": ["k0"],
        "finished": [True],
        "marks": [16],
    }
    assert json.loads((path / "run.json").read_text())["run_id"] == "run"
    with h5py.File(path / "segments/u0.1.h5") as h5:
        assert (h5.attrs["run_id"], h5.attrs["unit_id"]) == ("run", "u0.1")


@pytest.mark.slow
def test_the_summary_counts_every_item_once(path):
    folder = store.Folder(path)
    part_of(folder.segment("u2", dataclasses.replace(FIRST, items=(*FIRST.items, store.Item("k7", "a cat")))))
    with store.open(path) as run:
        summary = json.loads(json.dumps(run.summary()))
    assert (summary["items"], summary["items_finished"], summary["finished"]) == (3, 2, False)
    assert summary["maps_done"] == {"rise": 6, "random": 6}
    assert summary["maps_planned"] == {"rise": 9, "random": 9}
    assert [(part["file"], part["finished"], part["is_part"]) for part in summary["segments"]] == [
        ("u0.1.h5", 1, False),
        ("u1.1.h5", 1, False),
        ("u2.1.part.h5", 0, True),
    ]


@pytest.mark.slow
def test_to_xarray_equals_that_of_one_file(path, tmp_path):
    with store.Writer.create(tmp_path / "one.h5", PLAN) as writer:
        fill(writer)
    with store.open(path) as run, store.open(tmp_path / "one.h5") as single:
        assert run.to_xarray().drop_attrs().identical(single.to_xarray().drop_attrs())
        complete(store.Folder(path), "u2", PLANS["wide"])
    with (
        store.open(path) as run,
        pytest.raises(store.StoreError, match=r"differ in shape: step \(3, 2\), .*; open them one by one"),
    ):
        run.to_xarray()


@pytest.mark.slow
def test_a_unit_continues_where_its_last_attempt_stopped(tmp_path):
    folder = store.Folder(tmp_path / "run")
    part_of(folder.segment("u", PLAN))
    writer = folder.segment("u", PLAN)
    assert writer.done[0, 0].tolist() == [True, True, False]
    assert sorted(os.listdir(tmp_path / "run/segments")) == [".u.2.h5.lock", "u.2.part.h5"]
    writer.step(0, "rise", 2, **step(PLAN, 0, 0, 2))
    writer.close(publish=False)
    with folder.segment("u", PLAN) as writer:
        assert writer.done[0, 0].all()
        fill(writer)
    assert os.listdir(tmp_path / "run/segments") == ["u.3.h5"]
    with store.open(tmp_path / "run/segments/u.3.h5") as run:
        assert check(run) == total(PLAN)
    with pytest.raises(store.StoreError, match=r"unit 'u' of .*run is finished: it is u.3.h5"):
        folder.segment("u", PLAN)


def test_a_unit_that_closed_with_items_missing_can_be_restarted(tmp_path):
    folder = store.Folder(tmp_path / "run")
    with folder.segment("u", PLAN) as writer:
        writer.trajectory(0, **trajectory(PLAN, 0))
        writer.finish(0, 1.0)
    assert folder.finished() == {"k0"}
    complete(folder, "u", PLAN)
    assert folder.finished() == {"k0", "k1"}
    with store.open(tmp_path / "run") as run:
        assert (len(run), run.finished) == (2, True)


@pytest.mark.slow
def test_a_unit_continues_all_its_attempts(tmp_path):
    """The stalled first attempt got further than the second, which continued it; both are then removed."""
    folder = store.Folder(tmp_path / "run")
    stalled = folder.segment("u", PLAN)
    second = folder.segment("u", PLAN)
    second.step(0, "random", 1, **step(PLAN, 0, 1, 1))
    second.close(publish=False)
    part_of(stalled)
    with store.open(tmp_path / "run") as run:
        assert (len(run), run[0].has_trajectory) == (2, True), "the attempt with more done is read"
    writer = folder.segment("u", PLAN)
    assert writer.done[0].tolist() == [[True, True, False], [False, True, False]]
    assert writer.has_trajectory(0)
    writer.close(publish=False)
    assert os.listdir(tmp_path / "run/segments") == ["u.3.part.h5"]


@pytest.mark.slow
def test_ten_attempts_are_in_order(tmp_path):
    folder = store.Folder(tmp_path / "run")
    held = [folder.segment("u", FIRST)]
    held[0].trajectory(0, **trajectory(FIRST, 0))
    while not held[0].has_trajectory(0):
        pass
    held += [folder.segment("u", FIRST) for _ in range(10)]
    with store.open(tmp_path / "run") as run:
        assert [segment.attempt for segment in run.segments] == list(range(1, 12))
        assert run[0]._run.path.name == "u.11.part.h5", "the latest of equals"
    for writer in held:
        writer.close(publish=False)


@pytest.mark.slow
def test_overwriting_a_unit(tmp_path):
    folder = store.Folder(tmp_path / "run")
    part_of(folder.segment("u", PLAN))
    with folder.segment("u", dataclasses.replace(PLAN, model="other"), overwrite=True) as writer:
        assert not writer.done.any()
        fill(writer)
    assert os.listdir(tmp_path / "run/segments") == ["u.2.h5"]
    with pytest.raises(store.StoreError, match="is finished"):
        folder.segment("u", PLAN)
    folder.segment("u", PLAN, overwrite=True).close(publish=False)


def test_an_unreadable_attempt_is_skipped(tmp_path):
    folder = store.Folder(tmp_path / "run")
    part_of(folder.segment("u", PLAN))
    os.truncate(tmp_path / "run/segments/u.1.part.h5", 1000)
    with pytest.warns(UserWarning, match=r"u.1.part.h5 .*; the segment is skipped"):
        writer = folder.segment("u", PLAN)
    assert not writer.done.any()
    writer.close(publish=False)


@pytest.mark.slow
def test_a_missing_segment_is_reported(path):
    (path / "segments/u1.1.h5").unlink()
    with (
        pytest.warns(UserWarning, match="u1.1.h5 is missing, although the manifest lists it"),
        store.open(path) as run,
    ):
        assert (len(run), run.finished, run.lost) == (1, False, ["u1.1.h5"])


def test_the_summary_of_a_published_part(tmp_path):
    with store.Folder(tmp_path / "run").segment("u", FIRST) as writer:
        run = store.open(tmp_path / "run")
        assert run.summary()["items_finished"] == 0
        fill(writer)
    assert run.summary()["bytes"] > 0
    run.close()


@pytest.mark.slow
def test_a_stalled_writer_does_not_hold_its_unit(tmp_path):
    """Another attempt continues it meanwhile; it keeps its file and may yet finish it. Every item is read once."""
    folder = store.Folder(tmp_path / "run")
    stalled = folder.segment("u", PLAN)
    stalled.trajectory(0, **trajectory(PLAN, 0))
    while not stalled.has_trajectory(0):
        pass
    with folder.segment("u", PLAN) as writer:
        assert writer.has_trajectory(0)
        with store.open(tmp_path / "run") as run:
            assert run.summary()["items"] == 2
            assert {run[0]._run.path.name, run[1]._run.path.name} == {"u.2.part.h5"}, "the latest attempt"
        assert (tmp_path / "run/segments/u.1.part.h5").exists()
        fill(writer)
    with store.open(tmp_path / "run") as run:
        assert (len(run), run.finished) == (2, True)
    fill(stalled)
    stalled.close()
    with store.open(tmp_path / "run") as run:
        assert (len(run), [segment.attempt for segment in run.segments]) == (2, [1, 2])
        assert run.summary()["maps_done"] == {"rise": 6, "random": 6}


def test_other_settings_for_a_unit_are_refused(tmp_path):
    folder = store.Folder(tmp_path / "run")
    part_of(folder.segment("u", PLAN))
    with pytest.raises(store.StoreError, match=r"u.1.part.h5 was begun with other settings: model"):
        folder.segment("u", dataclasses.replace(PLAN, model="other"))
    assert os.listdir(tmp_path / "run/segments") == ["u.1.part.h5"]


@pytest.mark.soak
def test_many_processes_write_one_folder(tmp_path):
    folder, here = tmp_path / "run", Path(__file__).parent.parent
    command = [sys.executable, "-c", WRITE, folder]
    writers = [subprocess.Popen([*command, str(first), str(first + 8)], cwd=here) for first in (0, 8, 16)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["unit"] for line in lines) == [f"u{number:03}" for number in range(24)]
    with store.open(folder) as run:
        assert (len(run), len(run.segments), run.finished) == (2, 24, True), "two items, each computed twelve times"


def test_a_folder_that_another_process_is_creating(tmp_path, monkeypatch):
    """It creates run.json between the check for that file and the check for other entries."""
    exists, path = Path.exists, tmp_path / "run"

    def late(self):
        does_exist = exists(self)
        if self.name == "run.json" and not does_exist:
            monkeypatch.undo()
            complete(store.Folder(path, run_id="first"), "u", FIRST)
        return does_exist

    monkeypatch.setattr(Path, "exists", late)
    assert store.Folder(path, run_id="second").run_id == "first"
    assert sorted(os.listdir(path)) == ["manifest.jsonl", "run.json", "segments"]


@pytest.mark.slow
def test_more_segments_than_files_may_be_open(path, monkeypatch):
    monkeypatch.setattr("dfengine.store.run.reader._MAX_OPEN_FILES", 1)
    with store.open(path) as run:
        first, second = run
        assert len(run._files) == 1
        lazy = first.maps["rise"]
        np.testing.assert_array_equal(second.maps["rise"][0], step(SECOND, 0, 0, 0)["saliency"])
        np.testing.assert_array_equal(lazy[0], step(FIRST, 0, 0, 0)["saliency"])


def test_a_part_that_is_published_is_still_read(tmp_path):
    folder = store.Folder(tmp_path / "run")
    writer = folder.segment("u", FIRST)
    with store.open(tmp_path / "run") as run:
        assert not run.finished
        run.close()
        fill(writer)
        writer.close()
        np.testing.assert_array_equal(run[0].maps["rise"][0], step(FIRST, 0, 0, 0)["saliency"])


@pytest.mark.grid
@pytest.mark.parametrize("torn", ['{"file": "u1.1.h5", "un', "", "[]\n", '{"file": 3}\n', "\x00\x00\n", b"\xff\xfe\n"])
def test_the_manifest_is_only_an_index(path, torn):
    """Torn by a kill, damaged or missing: the segments are still read, and the next line is intact."""
    (path / "manifest.jsonl").write_bytes(torn if isinstance(torn, bytes) else torn.encode())
    complete(store.Folder(path), "u2", dataclasses.replace(FIRST, items=(store.Item("k5", "a cat"),)))
    assert json.loads((path / "manifest.jsonl").read_bytes().splitlines()[-1])["unit"] == "u2"
    with store.open(path) as run:
        assert [item.key for item in run] == ["k0", "k1", "k5"]


def test_a_damaged_segment_is_skipped_and_named(path):
    (path / "manifest.jsonl").unlink()
    os.truncate(path / "segments/u0.1.h5", 1000)
    with pytest.warns(UserWarning, match=r"u0.1.h5 is truncated: .*; the segment is skipped"), store.open(path) as run:
        assert [item.key for item in run] == ["k1"]


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(store.StoreError, match="is not a run folder, and not empty: name a new or an empty folder"):
        store.Folder(tmp_path)
    with pytest.raises(store.StoreError, match="file is a file: name a folder"):
        store.Folder(tmp_path / "file")
    for content, message in {
        "{": "its run.json cannot be read",
        "{}": "its run.json cannot be read",
        '{"format": "other", "format_version": 1}': "dfengine did not write its run.json",
        '{"format": "dfengine run", "format_version": 9}': "format version 9, this dfengine reads up to 2: upgrade",
    }.items():
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(store.StoreError, match=message) as refused:
            store.open(tmp_path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("unit", ["", "a/b", "../u", "u\0"])
def test_the_name_of_a_unit_must_be_a_file_name(tmp_path, unit):
    with pytest.raises(store.StoreError, match="cannot be the name of a unit"):
        store.Folder(tmp_path / "run").segment(unit, PLAN)
    assert os.listdir(tmp_path / "run/segments") == []


def test_an_empty_folder(tmp_path):
    store.Folder(tmp_path / "run")
    with store.open(tmp_path / "run") as run:
        assert (len(run), run.finished, run.summary()["items"]) == (0, False, 0)
        with pytest.raises(store.StoreError, match="has no items yet"):
            run.to_xarray()
