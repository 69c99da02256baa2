"""The overhead of a sweep: per item, with two workers, after a killed worker, and for a million items.

    python bench/sweeps.py           # records bench/results/sweeps.json

The embedded model, workers of one thread. The million items have no model: their segments are closed files of the
real format in which every item is marked as finished, and nothing else; each stage runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import record
import torch

from dfengine import Cam, Engine, Random, Rise, evaluate, store, sweep
from dfengine.store.file import template
from dfengine.store.file.files import append_lines
from dfengine.sweep.events import ItemCost, ModelProfile
from dfengine.sweep.planning import make_units, prepare
from dfengine.sweep.spec import SharedSettings
from dfengine.sweep.unit import explain_unit

ROUNDS = 2
MILLION = 10**6
STAGES = ("plan", "plan again", "grow", "segments", "resume", "open", "read")


def sweep_of(items: int, explainers: list[Any], steps: int, minutes: float) -> sweep.Sweep:
    return sweep.Sweep(
        prompts=tuple(evaluate.captions(items)),
        schedules=[{"num_steps": steps}],
        explainers=explainers,
        unit_minutes=minutes,
    )


def resources(workers: int) -> sweep.Resources:
    return sweep.Resources(workers=workers, device="cpu", threads=1)


def timestamped(records: Iterator[tuple[int, sweep.Event]]) -> list[tuple[float, int, sweep.Event]]:
    """(seconds, worker, record) of every record."""
    return [(time.perf_counter(), worker, one) for worker, one in records]


def check_finished(run: Path) -> None:
    record.check(sweep.outcome(run).finished, f"the sweep in {run.name} is not finished")


# --- an item's overhead -----------------------------------------------------------------------------------------------


def overhead(folder: Path) -> dict[str, Any]:
    """Milliseconds per item of 2 steps with random maps, which cost nearly nothing: computed only, written to a file,
    and by a worker process. Units of 16 items; the first unit of each round is left out; the rounds take turns."""
    described = sweep_of(80, [Random()], 2, 1.0)
    probed = ModelProfile("cpu", 10 / 16, (ItemCost(2, 1, 1),))
    engine, shared = Engine.from_pretrained("shapes", device="cpu"), SharedSettings.from_json(described.shared)
    planned = list(make_units(described, {described.models[0]: probed}))
    record.check([len(unit) for unit in planned] == [16] * 5, "80 items are not planned as 5 units of 16")
    jobs = [[engine.job(unit.prompts[prompt], num_steps=2) for prompt, _, _ in unit.items] for unit in planned]
    seconds: dict[str, list[float]] = {"computed": [], "into a file": [], "by a worker": []}
    for number in range(ROUNDS):
        for group in jobs:
            start = time.perf_counter()
            events = sum(1 for _ in engine.stream(group, Random()))
            seconds["computed"] += [time.perf_counter() - start] if group is not jobs[0] else []
            record.check(events == 16 * 4, f"16 items of 2 steps are {events} events, expected 64")
        run = store.Folder(folder / f"in process {number}", settings=described.shared)
        for unit in planned:
            start = time.perf_counter()
            *_, last = explain_unit(engine, shared, run, unit)
            seconds["into a file"] += [time.perf_counter() - start] if unit is not planned[0] else []
            record.check(isinstance(last, sweep.Closed), f"unit {unit.name} was not closed")
        run = store.Folder(folder / f"worker {number}", settings=described.shared)
        store.plan_units(run.path, planned, spec=described.digest)
        records = timestamped(sweep.run(described, run.path, resources(1)))
        closed = [at for at, _, one in records if isinstance(one, sweep.Closed)]
        seconds["by a worker"] += list(np.diff(closed))
        check_finished(run.path)
    per_item = {name: [1e3 * one / 16 for one in units] for name, units in seconds.items()}
    return {
        "what": "overhead",
        "milliseconds": {name: statistics.median(values) for name, values in per_item.items()},
        "spread": {name: [min(values), max(values)] for name, values in per_item.items()},
    }


# --- a second worker --------------------------------------------------------------------------------------------------


def efficiency(folder: Path) -> dict[str, Any]:
    """Items per minute of one and of two workers of one thread each, on two cores, between the first finished item and
    the last one during which all of them work. The rounds take turns."""
    described = sweep_of(8, [Rise(200), Cam()], 4, 1e-9)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(ROUNDS):
        for workers in rates:
            out = folder / f"{workers} workers {number}"
            records = timestamped(sweep.run(described, out, resources(workers)))
            check_finished(out)
            by_worker: dict[int, list[float]] = {}
            for at, worker, one in records:
                if isinstance(one, sweep.Closed):
                    by_worker.setdefault(worker, []).append(at)
            # Each worker's own rate while all of them work: loading the model is part of the first unit.
            begin, end = max(times[0] for times in by_worker.values()), min(times[-1] for times in by_worker.values())
            within = [[at for at in times if begin <= at <= end] for times in by_worker.values()]
            rates[workers].append(sum(60 * (len(times) - 1) / (times[-1] - times[0]) for times in within))
    one, two = (statistics.median(rates[workers]) for workers in (1, 2))
    shares = [b / a / 2 for a, b in zip(rates[1], rates[2], strict=True)]
    return {
        "what": "efficiency",
        "items a minute": {"1": one, "2": two},
        "rounds": rates,
        "efficiency": statistics.median(shares),
    }


# --- recovery ---------------------------------------------------------------------------------------------------------


def recovery(folder: Path) -> dict[str, Any]:
    """Seconds from a SIGKILL of a worker, in the middle of an item, to the first map that another worker adds to it;
    and how many maps were computed twice."""
    described = sweep_of(2, [Rise(200)], 12, 1e-9)
    seconds, again = [], []
    for number in range(ROUNDS):
        out, killed, resumed, total = folder / f"killed {number}", 0.0, 0.0, 0
        for _, one in sweep.run(described, out, resources(1)):
            if isinstance(one, sweep.Progress):
                total += one.maps
                if not killed and one.maps:
                    (worker,) = map(int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())
                    killed = time.perf_counter()
                    os.kill(worker, signal.SIGKILL)
                elif killed and not resumed and one.maps:
                    resumed = time.perf_counter()
        check_finished(out)
        seconds.append(resumed - killed)
        again.append(total - 2 * 12)
    return {"what": "recovery", "seconds": sorted(seconds), "maps made again": again}


# --- a million items --------------------------------------------------------------------------------------------------


def simulated(prompts: int) -> sweep.Sweep:
    return sweep.Sweep(
        prompts=[f"a photograph of thing number {number} on a table in a room" for number in range(prompts)],
        seeds=5,
        schedules=["uniform", "early"],
        explainers=[Rise(1000), Cam(), Random()],
    )


def stage(name: str, out: Path) -> None:
    """Run one stage of the million; prints its seconds, its peak memory and a count of what it went through as JSON."""
    described = simulated(MILLION // 10 + (10 if name == "grow" else 0))
    probed = ModelProfile("none", 1.0, tuple(ItemCost(30, 1, 1) for _ in described.schedules))
    start, count = time.perf_counter(), 0
    if name in ("plan", "plan again", "grow"):
        count = sum(map(len, prepare(described, out, lambda source: probed)))
    elif name == "segments":
        count = write_segments(out)
    elif name == "resume":
        count = sum(map(len, prepare(simulated(MILLION // 10 + 10), out, lambda source: probed)))
    elif name == "open":
        with store.open(out) as run:
            record.check(not run.finished, "a run whose last 100 items were not computed is finished")
            count = len(run)
    else:
        generator = np.random.default_rng(0)
        with store.open(out) as run:
            start = time.perf_counter()
            count = sum(run[int(number)].seed >= 0 for number in generator.integers(len(run), size=1000))
    measured = {"seconds": time.perf_counter() - start, "found": count}
    print(json.dumps(measured | {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def write_segments(out: Path) -> int:
    """Write a closed segment for each unit of the first million, as if its items were finished."""
    lines, done = [], 0
    for unit in store.planned_units(out):
        if done == MILLION:
            break
        items = tuple(
            store.Item(f"{done + place:064x}", unit.prompts[prompt], seed=seed)
            for place, (prompt, _, seed) in enumerate(unit.items)
        )
        plan = store.Plan(items, (store.Method("random"),), num_steps=1, latent=(1, 1, 1), image=(1, 1))
        path = out / "segments" / f"{unit.name}.1.h5"
        attributes = {"run_id": "simulated", "unit_id": unit.name, "environment": template.environment("none")}
        path.write_bytes(template.build_file(plan, compression="none", attributes=attributes))
        with h5py.File(path, "r+", libver=("v110", "v110")) as h5:
            h5["entry/items/seconds"][...] = 1.0
        segment = {"file": path.name, "unit": unit.name, "attempt": 1, "keys": [item.key for item in items]}
        lines.append(json.dumps(segment | {"finished": [True] * len(items), "marks": [1] * len(items)}))
        done += len(items)
    append_lines(out / "manifest.jsonl", lines)
    return done


def million(folder: Path) -> dict[str, Any]:
    """Each stage, in its own process."""
    out, measured = folder / "million", {}
    expected = dict(zip(STAGES, (MILLION, MILLION, MILLION + 100, MILLION, 100, MILLION, 1000), strict=True))
    for name in STAGES:
        command = [sys.executable, __file__, "--stage", name, "--out", str(out)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        record.check(process.returncode == 0, f"stage '{name}' ended with status {process.returncode}")
        measured[name] = json.loads(process.stdout)
        print(f"  {name}: {measured[name]}")
        count = measured[name]["found"]
        record.check(count == expected[name], f"stage '{name}' went through {count} items, expected {expected[name]}")
    return {"what": "million", **measured}


# --- tables -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[record.Row]) -> str:
    """Both tables and what is said between them, of the four rows."""
    overheads, two, killed, many = rows
    lines = [
        "| milliseconds per item of 2 steps | lowest, **median**, highest | difference from the line above |",
        "|---|---|---|",
    ]
    before = None
    for name, value in overheads["milliseconds"].items():
        low, high = overheads["spread"][name]
        more = "" if before is None else f"{value - before:+.1f}"
        lines.append(f"| {name} | {low:.1f} **{value:.1f}** {high:.1f} | {more} |")
        before = value
    rate = two["items a minute"]
    lines += [
        "",
        f"Two workers compute {rate['2']:.1f} items per minute and one computes {rate['1']:.1f}: "
        f"{two['efficiency']:.0%} of twice as many. After a SIGKILL another worker adds its first map to the same item "
        f"within {killed['seconds'][0]:.1f} to {killed['seconds'][-1]:.1f} s, most of which is the start of Python and "
        f"loading the model; at most {max(killed['maps made again'])} of an item's 12 maps were computed twice.",
        "",
        "| a million items | seconds | peak GiB |",
        "|---|---|---|",
    ]
    labels = {
        "plan": "plan them in units of 256",
        "plan again": "find that all are planned",
        "grow": "add 100 items to the plan",
        "resume": "find the remaining items, with 3907 closed segments",
        "open": "open the run folder and tell whether it is finished",
        "read": "read 1000 random items",
    }
    lines += [f"| {label} | {many[name]['seconds']:.1f} | {many[name]['gib']:.2f} |" for name, label in labels.items()]
    return "\n".join([*lines, "", record.provenance(rows)])


TABLES = {("bench/README.md", "sweeps"): table}


def main() -> None:
    """Measure, record and print; with --stage, run that stage of the million."""
    parser = record.parser(__doc__)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage is not None:
        stage(options.stage, options.out)
        return
    recorder = record.Recorder("sweeps", TABLES, record=not options.no_record)
    torch.set_num_threads(1)
    environment = recorder.environment(torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        for measure in (overhead, efficiency, recovery, million):
            rows.append(measure(Path(folder)) | environment)
            print(json.dumps(rows[-1]))
    recorder.replace(rows)
    print(table(rows), end="")


if __name__ == "__main__":
    main()
