"""What stands in the place of the store's own files: links are not followed, pipes do not hang, leftovers go."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from store_example import PLAN, SMALL, fill, half

from dfengine import store
from dfengine.store.file import template
from dfengine.store.file.locks import Lock

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of the user's, beside the folder that others write to."""
    path = tmp_path / "precious"
    path.write_text("precious")
    (tmp_path / "run").mkdir()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with store.Writer.create(tmp_path / "one.h5", SMALL) as writer:
        fill(writer)
    return tmp_path / "one.h5"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two closed units."""
    folder = store.Folder(tmp_path_factory.mktemp("intruders") / "folder")
    for number in range(2):
        with folder.segment(f"u{number}", half(PLAN, number)) as writer:
            fill(writer)
    return folder.path


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> store.Folder:
    """A copy of that folder."""
    return store.Folder(shutil.copytree(written, tmp_path / "folder"))


PLACES: dict[str, Callable[[Path, Path], object]] = {
    "a symbolic link": lambda place, precious: place.symlink_to(precious),
    "a hard link": lambda place, precious: place.hardlink_to(precious),
    "a pipe": lambda place, _: os.mkfifo(place),
    "a folder": lambda place, _: place.mkdir(),
}


@pytest.mark.parametrize("kind", PLACES)
def test_only_a_file_of_its_own_is_a_lock(precious: Path, kind: str) -> None:
    out = precious.parent / "run/run.h5"
    PLACES[kind](out.with_name(".run.h5.lock"), precious)
    for open_lock in (lambda: Lock(out), lambda: Lock(out, wait=True), lambda: store.Writer.create(out, SMALL)):
        with pytest.raises(store.StoreError, match=r"\.run\.h5\.lock is in the place of a lock file: remove it"):
            open_lock()
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("kind", ["a symbolic link", "a hard link", "a pipe"])
def test_temporary_files_are_created_anew(precious: Path, file: Path, kind: str) -> None:
    out = precious.parent / "run/run.h5"
    PLACES[kind](out.with_name(".run.h5.new"), precious)
    store.merge([file], out)
    PLACES[kind](out.with_name(".run.h5.new"), precious)
    with store.Writer.create(out, SMALL, overwrite=True) as writer:
        fill(writer)
    assert precious.read_text() == "precious"
    with store.open(out) as run:
        assert run.finished


@pytest.mark.parametrize("name", ["manifest.jsonl", "plan.jsonl", ".plan.lock", "failures/.u.json", "failures/u.json"])
def test_a_run_folder_writes_nothing_through_a_link(precious: Path, name: str) -> None:
    folder = store.Folder(precious.parent / "run")
    (folder.path / "failures").mkdir()
    unit = store.Unit("u", {}, ({},), ("a",), ((0, 0, 0),))
    (folder.path / name).symlink_to(precious)
    for write in (
        lambda: store.plan_units(folder.path, [unit]),
        lambda: folder.planning().__enter__(),
        lambda: store.FailureLog(folder.path, unit).take([0]),
        lambda: store.FailureLog(folder.path, unit).failed([0], "no"),
    ):
        try:
            write()
        except store.StoreError as error:
            refused = str(error)
            assert refused.count("\n") == 0  # not every write meets this link
    with pytest.MonkeyPatch.context(), folder.segment("v", SMALL) as writer:
        fill(writer)
        if name == "manifest.jsonl":
            with pytest.raises(store.StoreError, match=r"manifest\.jsonl: it is a symbolic link"):
                writer.close()
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", ["segments/u1.2.h5", "segments/u2.1.part.h5", "manifest.jsonl", "failures/u0.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
def test_a_run_folder_is_read_beside_what_is_no_file(folder: store.Folder, name: str, kind: str) -> None:
    """Only a pipe that somebody waits at would hang, and so would this test."""
    (folder.path / "failures").mkdir()
    (folder.path / name).unlink(missing_ok=True)
    PLACES[kind](folder.path / name, folder.path)
    with store.open(folder.path) as run:
        assert len(run) == 2
    assert store.progress(folder.path).items == 2
    assert store.merge([folder.path], folder.path.parent / "all.h5").exists()


@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
@pytest.mark.parametrize("name", ["run.json", "plan.jsonl"])
def test_a_description_that_is_no_file_is_refused(folder: store.Folder, name: str, kind: str) -> None:
    (folder.path / name).unlink(missing_ok=True)
    PLACES[kind](folder.path / name, folder.path)
    with pytest.raises(store.StoreError, match=r"is not a run folder|cannot read .*plan\.jsonl") as refused:
        store.open(folder.path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
def test_a_part_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    PLACES[kind](tmp_path / "run.part.h5", tmp_path)
    for verb in (store.open, store.progress, lambda path: store.merge([path], tmp_path / "all.h5")):
        with pytest.raises(store.StoreError, match=r"run\.part\.h5"):
            verb(tmp_path / "run.part.h5")
    with pytest.raises(store.StoreError, match=r"run\.part\.h5: it is a (pipe|folder)"):
        store.Writer.resume(tmp_path / "run.h5", SMALL)


DAMAGED = {
    "not json": "{",
    "nested": "[" * 20_000,
    "no run id": {"run_id": None},
    "a number": {"run_id": 7},
    "settings": {"settings": [1]},
    "version": {"format_version": "2"},
    "version of a float": {"format_version": 2.5},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_run_json_is_one_line(folder: store.Folder, name: str) -> None:
    path, damage = folder.path / "run.json", DAMAGED[name]
    path.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(path.read_text()) | damage))
    for read in (store.open, store.Folder, store.progress):
        with pytest.raises(store.StoreError, match=r"is not a run folder: its run\.json cannot be read \(.+\)$"):
            read(folder.path)


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "u0.1.h5", "unit": "u0", "attempt": 1, "keys": [[1]], "finished": [true], "marks": [1]}',
        '{"file": "u0.1.h5", "unit": "u0", "attempt": 1, "keys": ["k0"], "finished": [], "marks": [1]}',
        '{"file": 7, "unit": "u0", "attempt": 1, "keys": [], "finished": [], "marks": []}',
        "[" * 20_000,
        "7",
        "{}",
    ],
)
def test_a_damaged_line_of_the_manifest_is_passed_over(folder: store.Folder, line: str) -> None:
    (folder.path / "manifest.jsonl").write_text(line + "\n")
    with store.open(folder.path) as run:
        assert (len(run), run.finished) == (2, True)
        assert [item.prompt for item in run] == ["a red circle", "ein Würfel"]


def test_a_manifest_of_other_files_is_refused(folder: store.Folder) -> None:
    line = {"file": "u0.1.h5", "unit": "u0", "attempt": 1, "keys": ["x", "y"], "finished": [True] * 2, "marks": [1] * 2}
    (folder.path / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    with (
        store.open(folder.path) as run,
        pytest.raises(store.StoreError, match=r"has other items than manifest\.jsonl says"),
    ):
        _ = run[1].prompt


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "../../precious"},
        {"name": "u/x"},
        {"retry_of": "../x"},
        {"items": [[0, 0]]},
        {"items": [[9, 0, 0]]},
        {"items": [[0, -1, 0]]},
        {"items": "abc"},
        {"prompts": [1]},
        {"schedules": ["uniform"]},
        {"model": "shapes"},
        {"more": 1},
    ],
)
def test_a_line_that_is_no_unit_is_passed_over(tmp_path: Path, changed: dict[str, object]) -> None:
    unit = store.Unit("u", {}, ({"num_steps": 1},), ("a",), ((0, 0, 0),))
    store.plan_units(tmp_path, [unit])
    with (tmp_path / "plan.jsonl").open("a") as file:
        file.write(json.dumps(vars(unit) | {"name": "v"} | changed) + "\n" + "[" * 20_000 + "\n")
    assert list(store.planned_units(tmp_path)) == [unit]


@pytest.mark.parametrize(
    "text",
    ["{", "[" * 20_000, "{}", "[1]", '[{"state": ["aside"]}]', '[{"unit": "u0", "item": 0, "state": "quarantined"}]'],
)
def test_damaged_failures_are_reported_and_their_items_tried_again(folder: store.Folder, text: str) -> None:
    (folder.path / "failures").mkdir()
    (folder.path / "failures/u0.json").write_text(text)
    with pytest.warns(UserWarning, match=r"u0\.json cannot be read: .*; its items are tried again"):
        assert list(store.failures(folder.path)) == []


def test_what_killed_processes_left_is_removed(folder: store.Folder) -> None:
    segments = folder.path / "segments"
    for name in (".u0.1.h5.lock", ".u0.unit.lock", ".u9.1.h5.new", "u0.1.part.h5"):
        (segments / name).write_text("")
    with Lock(segments / "u8.1.h5"):
        (segments / ".u8.1.h5.new").write_text("")
        (segments / "u8.1.part.h5").write_text("")
        folder.remove_leftovers()
        assert {path.name for path in segments.iterdir()} == {
            *("u0.1.h5", "u1.1.h5", ".u8.1.h5.new", ".u8.1.h5.lock", "u8.1.part.h5")
        }, "what a process uses stays"
    folder.remove_leftovers()
    assert {path.name for path in segments.iterdir()} == {"u0.1.h5", "u1.1.h5", "u8.1.part.h5"}


def test_files_without_a_checksum_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As versions before it wrote them."""
    h5py = pytest.importorskip("h5py")
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        fill(writer)
    with h5py.File(tmp_path / "run.h5", "r+") as h5:
        del h5.attrs["checksum"]
    with store.open(tmp_path / "run.h5") as run:
        assert run.finished
    assert template.CHECKSUM == "checksum"


@pytest.mark.slow
def test_any_change_of_the_description_is_noticed(file: Path) -> None:
    """A bit of each text in turn: the file says that it is damaged, or reads as it was."""
    content = file.read_bytes()
    with store.open(file) as run:
        expected = run.plan, run.environment, run.run_id
    start = content.index(b'{"items"')
    places = [*range(start, start + len(run.plan.to_json()), 7), content.index(b'{"python"') + 3]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(store.StoreError, match="is damaged"):
            store.open(file)
    file.write_bytes(content)
    with store.open(file) as run:
        assert (run.plan, run.environment, run.run_id) == expected
