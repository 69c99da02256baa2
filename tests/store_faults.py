"""Writes a run repeatedly, with the disk failing at every single write; run by test_store_faults.

    LD_PRELOAD=shim.so python store_faults.py shim.so FOLDER ERRNO SCENARIO PLAN STRIDE

Each run is a fork. Its process is killed before its Nth write (ERRNO 0), or that write and all later ones fail with
ERRNO, for every STRIDEth N until a run completes. What remains is read and compared, and every eighth run is then
resumed (with a stride, every second). A scenario is a new file, a resumed file, a segment of a run folder (new or
resumed), or a merge.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

# Forking a process without torch is fast, and the store itself does not need torch.
STUBS = {
    "dfengine": {"__path__": ["dfengine"]},
    "dfengine.result": {"Explanation": object, "COMBINED": "combined", "as_call": str},
}
for name, contents in STUBS.items():
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(contents)

from store_example import PLANS, check, curves, fill, half, step, total, trajectory  # noqa: E402  # after the stubs

from dfengine import store  # noqa: E402
from dfengine.store.file import template  # noqa: E402


class Scenario(NamedTuple):
    """The initial state, the operation, the number of marks (−1: nothing to read yet), and the files at the end."""

    prepare: Callable[[Path, store.Plan], None]
    run: Callable[[Path, store.Plan], None]
    marks: Callable[[Path, store.Plan], int]
    end: set[str]


def nothing(folder: Path, plan: store.Plan) -> None:
    pass


def begin(writer: store.Writer) -> None:
    """An interrupted run with a few marks."""
    plan = writer.plan
    writer.trajectory(0, **trajectory(plan, 0))
    writer.step(0, plan.methods[0].name, 1, **step(plan, 0, 0, 1))
    writer.curves(0, 0, **curves(plan, 0, 0))
    writer.close(publish=False)


def write_file(folder: Path, plan: store.Plan) -> None:
    with store.Writer.resume(folder / "run.h5", plan) as writer:
        fill(writer)


def write_segment(folder: Path, plan: store.Plan) -> None:
    with store.Folder(folder / "run").segment("u", plan) as writer:
        fill(writer)


def two_files(folder: Path, plan: store.Plan) -> None:
    for item in range(2):
        with store.Writer.create(folder / f"{item}.h5", half(plan, item)) as writer:
            fill(writer)


def merge(folder: Path, plan: store.Plan) -> None:
    store.merge([folder / "0.h5", folder / "1.h5"], folder / "run.h5")


def marks_of(path: Path) -> int:
    with store.open(path) as run:
        return check(run)


def marks_of_file(folder: Path, plan: store.Plan) -> int:
    files = [path for path in (folder / "run.h5", folder / "run.part.h5") if path.exists()]
    return marks_of(files[0]) if files else -1


def marks_of_folder(folder: Path, plan: store.Plan) -> int:
    if not (folder / "run/run.json").exists():
        return -1
    with store.open(folder / "run") as run:
        marks = [marks_of(folder / "run/segments" / segment.file) for segment in run.segments]
        assert len(run) == (len(plan.items) if marks else 0)
    return max(marks, default=-1)


def marks_of_merge(folder: Path, plan: store.Plan) -> int:
    """None or all, and the sources are unchanged."""
    assert sum(marks_of(folder / f"{item}.h5") for item in range(2)) == total(plan)
    return marks_of(folder / "run.h5") if (folder / "run.h5").exists() else -1


SCENARIOS = {
    "new": Scenario(nothing, write_file, marks_of_file, {"run.h5"}),
    "resumed": Scenario(
        lambda folder, plan: begin(store.Writer.create(folder / "run.h5", plan)), write_file, marks_of_file, {"run.h5"}
    ),
    "segment": Scenario(
        nothing, write_segment, marks_of_folder, {"run", "run/run.json", "run/manifest.jsonl", "run/segments"}
    ),
    "resumed-segment": Scenario(
        lambda folder, plan: begin(store.Folder(folder / "run").segment("u", plan)),
        write_segment,
        marks_of_folder,
        {"run", "run/run.json", "run/manifest.jsonl", "run/segments"},
    ),
    "merge": Scenario(two_files, merge, marks_of_merge, {"0.h5", "1.h5", "run.h5"}),
}


def in_a_fork(shim: ctypes.CDLL, scenario: Scenario, folder: Path, plan: store.Plan, nth: int, error: int) -> int:
    """The exit status of a run in a process of its own: 77 killed, 3 refused with an error, 0 completed."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 0
    shim.shim_arm(nth, error)
    try:
        scenario.run(folder, plan)
    except store.StoreError as refused:
        status = 3 if "the disk is full" in str(refused) else 4
    # Not os._exit: HDF5 cleans up at exit while the disk is still full. Python does, too, but takes longer.
    if nth % 8:
        ctypes.CDLL(None).exit(status)
    sys.exit(status)


def main(shim: ctypes.CDLL, folder: Path, error: int, scenario: Scenario, plan: store.Plan, stride: int) -> None:
    # Built in memory, without a write to the disk: once for each plan is enough.
    built, build_file = {}, template.build_file

    def build_once(plan: store.Plan, **options: Any) -> bytes:
        key = plan.to_json()
        if key not in built:
            built[key] = build_file(plan, **options)
        return built[key]

    template.environment = lambda device: "{}"
    template.build_file = build_once
    start, folder = folder / "start", folder / "run"
    start.mkdir()
    scenario.prepare(start, plan)
    shutil.copytree(start, folder)
    scenario.run(folder, plan)  # which builds the files that all forks use
    before = scenario.marks(start, plan)
    resumed = 8 if stride == 1 else 2  # of so many runs, one
    for run, nth in enumerate(range(1, 1_000_000, stride), 1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        status = in_a_fork(shim, scenario, folder, plan, nth, error)
        marks = scenario.marks(folder, plan)
        assert marks >= before, f"write {nth}: {marks} marks are left, {before} were before"
        before = marks
        if status == 0:
            break
        assert status == (3 if error else 77), f"write {nth}: status {status}"
        if run % resumed == 0 and marks < total(plan):
            scenario.run(folder, plan)
            assert scenario.marks(folder, plan) == total(plan), f"write {nth}: incomplete after resuming"
            left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.parent.name != "segments"}
            assert left == scenario.end, f"write {nth}: {left}"
            segments = [path.name for path in folder.glob("run/segments/*")]
            assert len(segments) == bool("run/segments" in left), f"write {nth}: {segments}"
    assert marks == total(plan)
    print(nth)


if __name__ == "__main__":
    library, where, number, scene, shape, every = sys.argv[1:]
    main(ctypes.CDLL(library), Path(where), int(number), SCENARIOS[scene], PLANS[shape], int(every))
