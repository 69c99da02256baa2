"""A file can be read by another process while it is written, and has only one writer."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_example import PLANS, SMALL, check, fill, total, trajectory

from dfengine import store
from dfengine.store.file.files import network_storage

READER = """
import sys, time
sys.path.insert(0, "tests")
import store_faults
from store_example import check
from dfengine import store

seen, end = -1, time.monotonic() + 60
with store.open(sys.argv[1]) as run:
    assert not run.finished
    while seen < int(sys.argv[2]) and time.monotonic() < end:
        marks = check(run)
        if marks != seen:
            print(marks, flush=True)
        seen = marks
"""

LOCKED = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests")
import store_faults
from dfengine.store.file.locks import Lock

lock = Lock(Path(sys.argv[1]))
os._exit(0)
"""


@pytest.mark.slow
def test_a_reader_in_another_process_sees_only_complete_maps(tmp_path):
    """The reader polls continuously, and the writer waits until each value has been read."""
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        command = [sys.executable, "-c", READER, str(tmp_path / "run.part.h5"), str(total(SMALL))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdout is not None
            marks = [int(reader.stdout.readline())]
            put = writer._queue.put

            def in_step(job):
                put(job)
                if job and job.marker:
                    marks.append(int(reader.stdout.readline()))

            writer._queue.put = in_step
            fill(writer)
        assert reader.returncode == 0
    assert marks == list(range(total(SMALL) + 1))


def test_stored_values_can_be_read_from_the_writer(tmp_path):
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        arrays = trajectory(SMALL, 0)
        writer.trajectory(0, **arrays)
        while not writer.has_trajectory(0):
            time.sleep(0.001)
        assert (writer.stored(0).image == arrays["image"]).all()
        assert (writer.stored(0).latents[1] == arrays["latents"][1]).all()


def test_a_reader_keeps_its_file_when_it_is_published(tmp_path):
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        run = store.open(tmp_path / "run.part.h5")
        fill(writer)
    with run:
        assert check(run) == total(SMALL)


def test_a_second_writer_is_refused_and_the_first_is_named(tmp_path):
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(
                store.StoreError, match=rf"run.h5 is being written by another run .process {os.getpid()}"
            ):
                store.Writer.create(tmp_path / "run.h5", SMALL, **options)
        with store.Writer.create(tmp_path / "other.h5", SMALL) as other:
            fill(other)
        fill(writer)
    with store.open(tmp_path / "run.h5") as run:
        assert check(run) == total(SMALL)


@pytest.mark.slow
def test_a_lock_whose_owner_died_does_not_hold(tmp_path):
    subprocess.run([sys.executable, "-c", LOCKED, tmp_path / "run.h5"], check=True)
    assert (tmp_path / ".run.h5.lock").exists()
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        fill(writer)
    assert os.listdir(tmp_path) == ["run.h5"]


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A folder that appears to be on NFS, with a local folder for temporary files."""
    (tmp_path / "on nfs").mkdir()
    (tmp_path / "local").mkdir()
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {str(tmp_path / 'on nfs').replace(' ', chr(92) + '040')} nfs4 rw 0 0\n"
    (tmp_path / "mounts").write_text(mounts)
    monkeypatch.setattr("dfengine.store.file.files._MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "local"))
    return tmp_path / "on nfs"


def test_on_network_storage_a_file_is_written_locally_and_published_when_complete(network):
    local, path = network.parent / "local", network / "run.h5"
    with pytest.warns(UserWarning, match=r"run.h5 is on nfs4 storage: it is written as .*local/run\..*\.part\.h5"):
        writer = store.Writer.create(path, SMALL)
    writer.trajectory(0, **trajectory(SMALL, 0))
    writer.close(publish=False)
    assert os.listdir(network) == []
    with pytest.raises(store.StoreError, match=r"run.h5 is not finished: open .*local/run"):
        store.open(path)
    with pytest.warns(UserWarning, match="nfs4"):
        writer = store.Writer.resume(path, SMALL)
    with writer:
        assert writer.has_trajectory(0)
        fill(writer)
    assert (os.listdir(network), os.listdir(local)) == (["run.h5"], [])
    with store.open(path) as run:
        assert check(run) == total(SMALL)


def test_a_unit_on_network_storage_is_resumed(network):
    folder = store.Folder(network / "run")
    with pytest.warns(UserWarning, match="nfs4"):
        writer = folder.segment("u", SMALL)
    writer.trajectory(0, **trajectory(SMALL, 0))
    writer.close(publish=False)
    with pytest.warns(UserWarning, match="nfs4"):
        writer = folder.segment("u", SMALL)
    with writer:
        assert writer.has_trajectory(0)
        fill(writer)
    assert os.listdir(network / "run/segments") == ["u.1.h5"]


def test_a_local_folder_is_written_directly(network, recwarn):
    with store.Writer.create(network.parent / "run.h5", SMALL) as writer:
        assert (network.parent / "run.part.h5").exists()
        fill(writer)
    assert not recwarn.list
    with pytest.raises(store.StoreError, match="the folder does not exist"):
        store.Writer.create(network / "nowhere/run.h5", SMALL)


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "ext4"]
)
def test_which_file_systems_are_network_storage(tmp_path, monkeypatch, kind):
    """The last mount of the deepest folder counts, as for the system."""
    mounts = [f"a / {kind} rw 0 0", f"a {tmp_path} tmpfs rw 0 0", f"b {tmp_path} {kind} rw 0 0", "c /else xfs rw 0 0"]
    (tmp_path / "mounts").write_text("\n".join(mounts))
    monkeypatch.setattr("dfengine.store.file.files._MOUNTS", tmp_path / "mounts")
    assert network_storage(tmp_path / "sub") == ("" if kind == "ext4" else kind)
    (tmp_path / "mounts").unlink()
    assert network_storage(tmp_path) == "", "no such list: not Linux"


@pytest.fixture
def calls(monkeypatch):
    """The files that are synced and renamed, in order."""
    events, fsync, replace = [], os.fsync, Path.replace

    def name_of(handle):
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(("sync", name_of(handle))), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append(("rename", a.name, b.name)), replace(a, b))[1])
    return events


def test_a_file_is_synced_before_it_is_renamed(tmp_path, calls):
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        created = [
            ("sync", ".run.h5.new"),
            ("rename", ".run.h5.new", "run.part.h5"),
            ("sync", tmp_path.name),
        ]
        assert calls == created
        fill(writer)
    closed = [("sync", "run.part.h5"), ("rename", "run.part.h5", "run.h5"), ("sync", tmp_path.name)]
    assert calls == created + closed


def test_values_are_synced_during_a_run(tmp_path, calls, monkeypatch):
    monkeypatch.setattr("dfengine.store.file.swmr.SYNC_SECONDS", 0)
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        calls.clear()
        writer.trajectory(0, **trajectory(SMALL, 0))
        while not writer.has_trajectory(0):
            time.sleep(0.001)
        time.sleep(0.05)
        assert ("sync", "run.part.h5") in calls


def test_lines_of_the_manifest_are_synced(tmp_path, calls):
    with store.Folder(tmp_path / "run").segment("u", SMALL) as writer:
        fill(writer)
    assert calls[-1] == ("sync", "manifest.jsonl")
    assert ("rename", "u.1.part.h5", "u.1.h5") in calls


def test_the_chunk_cache_holds_two_items(tmp_path):
    """A smaller cache would write partly filled chunks repeatedly."""
    with store.Writer.create(tmp_path / "run.h5", PLANS["latent64"]) as writer:
        latents = 4 * 4 * 64 * 64 * 4
        assert writer._file._h5.id.get_access_plist().get_cache()[2] == 2 * latents
