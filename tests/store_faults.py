"""Writes a small run again and again with the disk failing at every single write; run by test_store_faults.

    LD_PRELOAD=shim.so python store_faults.py shim.so FOLDER ERRNO new|resumed

Each run, a new one or one that was interrupted and goes on, is a fork. Its process is ended before its Nth write
(ERRNO 0), or that write and all later ones fail with ERRNO, for every N until a run gets through. What is left is read
and compared; every eighth is resumed, too.
"""

import ctypes
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

# A fork of a process without torch is quick; the store itself does not need it.
for name, contents in {"dfengine": {"__path__": ["dfengine"]}, "dfengine.result": {"Explanation": object}}.items():
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(contents)

from store_example import SMALL, check, curves, fill, step, total, trajectory  # noqa: E402  # after the stand-ins

from dfengine import store  # noqa: E402
from dfengine.store import empty  # noqa: E402


def leftover(folder: Path) -> int:
    """The marks in what a fault left in the folder, all of them verified; −1 where there is no file yet."""
    path = next((path for path in (folder / "run.h5", folder / "run.part.h5") if path.exists()), None)
    if path is None:
        return -1
    with store.open(path) as run:
        return check(run)


def write(shim: ctypes.CDLL, path: Path, nth: int, error: int) -> None:
    """A run in a process of its own: status 77 killed, 3 refused with an error, 0 through."""
    status = 0
    shim.shim_arm(nth, error)
    try:
        with store.Writer.resume(path, SMALL) as writer:
            fill(writer)
    except store.StoreError as refused:
        status = 3 if "the disk is full" in str(refused) else 4
    # Not os._exit: HDF5 clears up on leaving, while the disk is still full; and Python, which takes longer.
    if nth % 8:
        ctypes.CDLL(None).exit(status)
    sys.exit(status)


def begin(folder: Path) -> None:
    """An interrupted run, with half of the marks."""
    writer = store.Writer.create(folder / "run.h5", SMALL)
    writer.trajectory(0, **trajectory(SMALL, 0))
    writer.step(0, "rise", 1, **step(SMALL, 0, 0, 1))
    writer.curves(0, 0, **curves(SMALL, 0, 0))
    writer.close(publish=False)


def main(shim: ctypes.CDLL, folder: Path, error: int, resumed: bool) -> None:
    # Made in memory, without a write to the disk: once is enough.
    made = empty.image(SMALL, compression="gzip", attributes={"run_id": "", "unit_id": "", "environment": "{}"})
    empty.image = lambda *_, **__: made
    empty.environment = lambda device: ""
    start, folder = folder / "start", folder / "run"
    start.mkdir()
    if resumed:
        begin(start)
    before = leftover(start)
    for nth in range(1, 100_000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        if (child := os.fork()) == 0:
            write(shim, folder / "run.h5", nth, error)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        marks = leftover(folder)
        assert marks >= before, f"write {nth}: {marks} marks are left, {before} were before"
        before = marks
        if status == 0:
            break
        assert status == (3 if error else 77), f"write {nth}: status {status}"
        if nth % 8:
            continue
        if not (folder / "run.h5").exists():
            with store.Writer.resume(folder / "run.h5", SMALL) as writer:
                assert writer.done.sum() + writer.has_trajectory(0) <= max(marks, 0)
                fill(writer)
        assert leftover(folder) == total(SMALL), f"write {nth}: not whole after resume"
        assert os.listdir(folder) == ["run.h5"], f"write {nth}: {os.listdir(folder)}"
    assert marks == total(SMALL)
    print(nth)


if __name__ == "__main__":
    main(ctypes.CDLL(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "resumed")
