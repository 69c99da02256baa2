"""After any fault of the disk, the process or the file, marked values are complete and the error is one line."""

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from marks import soak
from store_example import SMALL, check, fill, step, total

from dfengine import store
from dfengine.store.file.swmr import SWMRFile

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "store_shim.c", "-ldl"], check=True)
    return library


@pytest.fixture
def path(tmp_path):
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        fill(writer)
    return tmp_path / "run.h5"


@pytest.fixture
def memory(tmp_path):
    """A folder in memory, if available: thousands of fsyncs are slow on a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield folder


def count_writes(shim, memory, error, scenario, plan, stride):
    """The number of writes of a run; every `stride`th of them has failed once, in a separate run."""
    command = [sys.executable, HERE / "store_faults.py", shim, memory, str(error), scenario, plan, str(stride)]
    environment = os.environ | {"LD_PRELOAD": str(shim)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert (done.returncode, done.stderr) == (0, "")
    return int(done.stdout)


#: Every fifth write; in soak every one.
STRIDES = pytest.mark.parametrize("stride", [5, soak(1)])
ERRORS = pytest.mark.parametrize("error", [0, errno.ENOSPC], ids=["kill", "disk full"])


@pytest.mark.grid
@pytest.mark.slow
@STRIDES
@ERRORS
@pytest.mark.parametrize("scenario", ["new", "resumed", "segment", "resumed-segment"])
def test_a_fault_at_any_write(shim, memory, error, scenario, stride):
    writes = count_writes(shim, memory, error, scenario, "small", stride)
    assert writes > 4 * total(SMALL), "a value, its index, a marker: several writes a mark"


@pytest.mark.soak
@ERRORS
def test_a_fault_at_some_writes_of_a_merge(shim, memory, error):
    """Chunks are copied unchanged: there are few writes, after which the file is complete."""
    assert count_writes(shim, memory, error, "merge", "two", stride=13) > 20


@pytest.mark.soak
@pytest.mark.parametrize(("plan", "stride"), [("two", 1), ("latent64", 3), ("wide", 3)])
@pytest.mark.parametrize("scenario", ["new", "resumed", "segment", "resumed-segment", "merge"])
@ERRORS
def test_a_fault_at_any_write_of_larger_runs(shim, memory, error, scenario, plan, stride):
    writes = count_writes(shim, memory, error, scenario, plan, stride)
    print(f"{writes} writes: {scenario}, {plan}, {error or 'kill'}")
    assert writes > (20 if scenario == "merge" else 100)


@pytest.mark.slow
def test_a_file_size_limit(tmp_path):
    """The kernel refuses a write midway (EFBIG); the process exits cleanly and the file is readable."""
    code = """
import resource, signal, sys
sys.path.insert(0, "tests")
import store_faults, store_example
from dfengine import store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
plan = store.Plan(**vars(store_example.SMALL) | {"num_steps": 500, "latent": (1, 16, 16)})
writer = store.Writer.create(sys.argv[1], plan)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    with writer:
        for step in range(500):
            given = store_example.step(plan, 0, 0, step % 3)
            writer.step(0, "rise", step, **given)
except store.StoreError as refused:
    print(refused)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run.h5"], capture_output=True, text=True, cwd=HERE.parent
    )
    part = tmp_path / "run.part.h5"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"cannot write {part}: the file-size limit is reached")
    with store.open(part) as run:
        stored = np.flatnonzero(run[0].done["rise"])
        assert 10 < len(stored) < 500
        for at in stored.tolist():
            np.testing.assert_array_equal(run[0].maps["rise"][at], step(run.plan, 0, 0, at % 3)["saliency"])


def test_an_error_of_the_thread_reaches_the_next_call(tmp_path, monkeypatch):
    writer = store.Writer.create(tmp_path / "run.h5", SMALL)
    monkeypatch.setattr(SWMRFile, "write", lambda self, job: (_ for _ in ()).throw(OSError(errno.EIO, "")))
    writer.finish(0, 1.0)
    writer._queue.put(None)
    writer._thread.join()
    with pytest.raises(store.StoreError, match=r"run.part.h5: the disk reports an input/output error"):
        writer.finish(0, 1.0)
    with pytest.raises(store.StoreError, match="input/output error"):
        writer.close()
    assert os.listdir(tmp_path) == ["run.part.h5"]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 11, 12, 100, 0.5, -1])
def test_a_truncated_file(path, length):
    size = path.stat().st_size
    os.truncate(path, int(size * length) if 0 < length < 1 else length % size)
    with pytest.raises(store.StoreError, match=r"is truncated|is damaged|is not an HDF5 file") as message:
        store.open(path)
    assert ("not an HDF5 file" in str(message.value)) == (length in (0, 1, 7, 8, 9, 11)), message.value


def test_a_damaged_value_is_reported_and_the_others_are_read(path):
    with h5py.File(path) as h5:
        chunk = h5["entry/maps/saliency"].id.get_chunk_info(1)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset + 5)
        file.write(b"\xff\x00\xff")
    with store.open(path) as run:
        np.testing.assert_array_equal(run[0].maps["rise"][0], step(SMALL, 0, 0, 0)["saliency"])
        with pytest.raises(store.StoreError, match=r"run.h5 is damaged: maps/saliency cannot be read at .*'step': 1"):
            run[0].maps["rise"][1]


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(40))
def test_bytes_changed_anywhere_are_reported_or_harmless(path, seed):
    """Reading returns a value that was written, or raises an error of one line."""
    random = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    for place in random.integers(len(content), size=8):
        content[place] ^= int(random.integers(1, 256))
    path.write_bytes(content)
    with contextlib.suppress(store.StoreError), store.open(path) as run:
        run.summary()
        for at in range(2):
            np.testing.assert_array_equal(run[0].maps["rise"][at], step(SMALL, 0, 0, at)["saliency"])


@pytest.mark.parametrize("content", [b"", b"{", b'{"items": 3}', b'"text"'])
def test_a_damaged_plan_is_reported(path, content):
    with h5py.File(path, "r+") as h5:
        h5.attrs["plan"] = content.decode()
    with pytest.raises(store.StoreError, match=r"run.h5 is damaged: its description cannot be read"):
        store.open(path)


def test_other_files_are_refused(path, tmp_path):
    (tmp_path / "text.h5").write_text("not HDF5")
    with h5py.File(tmp_path / "foreign.h5", "w") as h5:
        h5["data"] = [1, 2, 3]
    with h5py.File(path, "r+") as h5:
        h5.attrs["format_version"] = store.FORMAT_VERSION + 1
    with store.Writer.create(tmp_path / "unfinished.h5", SMALL) as writer:
        for name, message in {
            "text.h5": "text.h5 is not an HDF5 file",
            "foreign.h5": "foreign.h5 is an HDF5 file, but dfengine did not write it",
            "run.h5": "run.h5 has format version 3, this dfengine reads up to 2: upgrade dfengine",
            "missing.h5": "missing.h5 does not exist",
            "unfinished.h5": f"unfinished.h5 is not finished: open {tmp_path / 'unfinished.part.h5'}",
            ".": "is not a run folder: it has no run.json",
        }.items():
            with pytest.raises(store.StoreError, match=message) as refused:
                store.open(tmp_path / name)
            assert "\n" not in str(refused.value)
        assert writer.done.sum() == 0


@pytest.mark.slow
def test_a_file_that_another_program_is_writing(path):
    code = "import h5py, sys; h5 = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, path], **pipes) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(store.StoreError, match=r"run.h5 is being written by another program"):
            store.open(path)
        other.stdin.close()
    with store.open(path) as run:
        assert check(run) == total(SMALL)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/run.h5", "cannot write .*run.h5: the folder does not exist: create it first"),
        ("file/run.h5", "a part of its path is a file, not a folder"),
        ("folder.h5", "folder.h5 is a folder: name a file in it"),
    ],
)
def test_unwritable_paths_are_refused(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(store.StoreError, match=message):
        store.Writer.create(tmp_path / name, SMALL)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.h5"]


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.EACCES, "permission denied: its folder must be writable"), (errno.EROFS, "read-only")],
)
def test_a_read_only_folder(tmp_path, monkeypatch, number, message):
    """The error is simulated, since permissions do not restrict root, which tests may run as."""

    def refuse(name, flags, *mode):
        raise OSError(number, os.strerror(number), name)

    monkeypatch.setattr("dfengine.store.file.files.os.open", refuse)
    with pytest.raises(store.StoreError, match=f"cannot write .*run.h5: .*{message}"):
        store.Writer.create(tmp_path / "run.h5", SMALL)


MOUNTED = """
import sys
sys.path.insert(0, "tests")
import store_faults
from store_example import PLANS, check, fill, total
from dfengine import store

plan, path = PLANS["latent64"], sys.argv[1] + "/run.h5"
try:
    with store.Writer.create(path, plan) as writer:
        fill(writer)
except store.StoreError as refused:
    print(refused)
try:
    with store.open(sys.argv[1] + "/run.part.h5") as run:
        print(check(run), total(plan))
except store.StoreError as refused:
    print(refused)
"""


def on_a_mount(folder: Path, mount: str) -> list[str]:
    """The output of a run on a file system that is mounted for its process only."""
    folder.mkdir()
    inside = f'{mount} && exec "$0" -c "$1" "$2"'
    command = ["unshare", *([] if os.geteuid() == 0 else ["-Ur"]), "-m", "sh", "-ec", inside]
    done = subprocess.run(
        [*command, sys.executable, MOUNTED, str(folder)],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        env=os.environ | {"WHERE": str(folder)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_small_disk_that_fills_up(tmp_path):
    refused, marks = on_a_mount(tmp_path / "small", 'mount -t tmpfs -o size=700k none "$WHERE"')
    part = tmp_path / "small/run.part.h5"
    assert refused == f"cannot write {part}: the disk is full: free some space and run the command again to resume"
    stored, planned = map(int, marks.split())
    assert 0 < stored < planned, "only part of it, all of which is verified"


def test_a_file_system_that_is_read_only(tmp_path):
    refused, _ = on_a_mount(tmp_path / "ro", 'mount -t tmpfs none "$WHERE" && mount -o remount,ro "$WHERE"')
    assert refused == f"cannot write {tmp_path}/ro/run.h5: the file system is read-only: choose another folder"
