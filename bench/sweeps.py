"""What a sweep costs beside its work: an item's overhead, a second worker's worth, a million items, a killed worker.

    python bench/sweeps.py           # writes bench/results/sweeps.json and the tables in bench/README.md

The embedded model, workers of one thread. The million items have no model: their segments are closed files of the true
format in which every item is marked as finished, and nothing else; each stage runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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
        schedules=[{"steps": steps}],
        explainers=explainers,
        unit_minutes=minutes,
    )


def resources(workers: int) -> sweep.Resources:
    return sweep.Resources(workers=workers, device="cpu", threads=1)


def timed(events: Iterator[tuple[int, sweep.Event]]) -> list[tuple[float, int, sweep.Event]]:
    return [(time.perf_counter(), worker, one) for worker, one in events]


# --- an item's overhead -----------------------------------------------------------------------------------------------


def overhead(folder: Path) -> dict[str, Any]:
    """Milliseconds an item of 2 steps with random maps, which cost next to nothing: computed alone, into a file, and by
    a worker process; what each adds to the one before. Units of 16, the first left out, rounds in turn."""
    described = sweep_of(80, [Random()], 2, 1.0)
    profile = ModelProfile("cpu", 10 / 16, (ItemCost(2, 1, 1),))
    engine, shared = Engine.from_pretrained("shapes", device="cpu"), SharedSettings.from_json(described.shared)
    planned = list(make_units(described, {described.models[0]: profile}))
    assert [len(unit) for unit in planned] == [16] * 5
    jobs = [[engine.job(unit.prompts[prompt], num_steps=2) for prompt, _, _ in unit.items] for unit in planned]
    found: dict[str, list[float]] = {"computed": [], "into a file": [], "by a worker": []}
    for number in range(ROUNDS):
        for group in jobs:
            began = time.perf_counter()
            assert sum(1 for _ in engine.stream(group, Random())) == 16 * 4
            found["computed"] += [time.perf_counter() - began] if group is not jobs[0] else []
        run = store.Folder(folder / f"in process {number}", settings=described.shared)
        for unit in planned:
            began = time.perf_counter()
            *_, last = explain_unit(engine, shared, run, unit)
            assert isinstance(last, sweep.Closed)
            found["into a file"] += [time.perf_counter() - began] if unit is not planned[0] else []
        run = store.Folder(folder / f"worker {number}", settings=described.shared)
        store.plan_units(run.path, planned, spec=described.digest)
        told = timed(sweep.run(described, run.path, resources(1)))
        closed = [at for at, _, one in told if isinstance(one, sweep.Closed)]
        found["by a worker"] += list(np.diff(closed))
        assert sweep.outcome(run.path).finished
    each = {name: 1e3 * statistics.median(seconds) / 16 for name, seconds in found.items()}
    return {
        "what": "overhead",
        "milliseconds": each,
        "spread": {n: [1e3 * min(s) / 16, 1e3 * max(s) / 16] for n, s in found.items()},
    }


# --- a second worker --------------------------------------------------------------------------------------------------


def efficiency(folder: Path) -> dict[str, Any]:
    """Items a minute of one and of two workers, of one thread each, on two cores; between the first item that is done
    and the last of which both are still at work. Rounds in turn."""
    described = sweep_of(8, [Rise(200), Cam()], 4, 1e-9)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(ROUNDS):
        for workers in rates:
            out = folder / f"{workers} workers {number}"
            told = timed(sweep.run(described, out, resources(workers)))
            assert sweep.outcome(out).finished
            by_worker: dict[int, list[float]] = {}
            for at, worker, one in told:
                if isinstance(one, sweep.Closed):
                    by_worker.setdefault(worker, []).append(at)
            # Each worker's own pace while all are at work: the first unit has the model's loading in it.
            end = min(times[-1] for times in by_worker.values())
            begin = max(times[0] for times in by_worker.values())
            rates[workers].append(
                sum(
                    60 * (len(inside) - 1) / (inside[-1] - inside[0])
                    for times in by_worker.values()
                    for inside in [[at for at in times if begin <= at <= end]]
                )
            )
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
    """Seconds from a worker's death by SIGKILL, in the middle of an item, to the first map that another adds to it; and
    the share of the maps made until then that were made again."""
    described = sweep_of(2, [Rise(200)], 12, 1e-9)
    found, again = [], []
    for number in range(ROUNDS):
        out, killed, begun, total = folder / f"killed {number}", 0.0, 0.0, 0
        for _, one in sweep.run(described, out, resources(1)):
            if isinstance(one, sweep.Progress):
                total += one.maps
                if not killed and one.maps:
                    (worker,) = map(int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())
                    killed = time.perf_counter()
                    os.kill(worker, signal.SIGKILL)
                elif killed and not begun and one.maps:
                    begun = time.perf_counter()
        assert sweep.outcome(out).finished
        found.append(begun - killed)
        again.append(total - 2 * 12)
    return {"what": "recovery", "seconds": sorted(found), "maps made again": again}


# --- a million items --------------------------------------------------------------------------------------------------


def simulated(prompts: int) -> sweep.Sweep:
    return sweep.Sweep(
        prompts=[f"a photograph of thing number {number} on a table in a room" for number in range(prompts)],
        seeds=5,
        schedules=["uniform", "early"],
        explainers=[Rise(1000), Cam(), Random()],
    )


def stage(name: str, out: Path) -> None:
    """One stage of the million, in this process; prints its seconds, its peak memory, and what it found."""
    described = simulated(MILLION // 10 + (10 if name == "grow" else 0))
    profile = ModelProfile("none", 1.0, tuple(ItemCost(30, 1, 1) for _ in described.schedules))
    began, found = time.perf_counter(), 0
    if name in ("plan", "plan again", "grow"):
        found = sum(map(len, prepare(described, out, lambda model: profile)))
    elif name == "segments":
        found = _segments(out)
    elif name == "resume":
        found = sum(map(len, prepare(simulated(MILLION // 10 + 10), out, lambda model: profile)))
    elif name == "open":
        with store.open(out) as run:
            assert not run.finished
            found = len(run)
    else:
        generator = np.random.default_rng(0)
        with store.open(out) as run:
            began = time.perf_counter()
            found = sum(run[int(number)].seed >= 0 for number in generator.integers(len(run), size=1000))
    told = {"seconds": time.perf_counter() - began, "found": found}
    print(json.dumps(told | {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def _segments(out: Path) -> int:
    """A closed segment for each unit of the first million, as if its items were finished."""
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
    """Each stage in a process of its own."""
    out, found = folder / "million", {}
    for name in STAGES:
        command = [sys.executable, __file__, name, str(out)]
        told = subprocess.run(command, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        found[name] = json.loads(told.stdout)
        print(f"  {name}: {found[name]}")
    assert [found[name]["found"] for name in STAGES] == [*[MILLION] * 2, MILLION + 100, MILLION, 100, MILLION, 1000]
    return {"what": "million", **found}


# --- tables -----------------------------------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, Any]]) -> str:
    each, two = rows["overhead"]["milliseconds"], rows["efficiency"]
    killed, many = rows["recovery"], rows["million"]
    spread = rows["overhead"]["spread"]
    lines = [
        "| milliseconds an item of 2 steps | lowest, **median**, highest | more than the one above |",
        "|---|---|---|",
    ]
    before = None
    for name, value in each.items():
        more = "" if before is None else f"{value - before:+.1f}"
        lines.append(f"| {name} | {spread[name][0]:.1f} **{value:.1f}** {spread[name][1]:.1f} | {more} |")
        before = value
    rate = two["items a minute"]
    lines += [
        "",
        f"Two workers do {rate['2']:.1f} items a minute where one does {rate['1']:.1f}: {two['efficiency']:.0%} of "
        "twice as many. "
        f"After a SIGKILL another worker adds its first map to the same item within {killed['seconds'][0]:.1f} to "
        f"{killed['seconds'][-1]:.1f} s, of which most is Python and the model being loaded; of the 12 maps of an item "
        f"{max(killed['maps made again'])} at the most were made twice.",
        "",
        "| a million items | seconds | GiB at the most |",
        "|---|---|---|",
    ]
    words = {
        "plan": "plan them, in units of 256",
        "plan again": "look whether all is planned",
        "grow": "add 100 items to the plan",
        "resume": "find what is left, beside 3907 closed segments",
        "open": "open the run folder, and say whether it is finished",
        "read": "read 1000 of its items, here and there",
    }
    lines += [f"| {text} | {many[name]['seconds']:.1f} | {many[name]['gib']:.2f} |" for name, text in words.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    environment = record.environment(torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        for measure in (overhead, efficiency, recovery, million):
            rows.append(measure(Path(folder)) | environment)
            print(json.dumps(rows[-1]))
    record.write("sweeps", rows)
    told = table({row["what"]: row for row in rows})
    record.place(told, "bench/README.md", "sweeps")
    print(told)


if __name__ == "__main__":
    if sys.argv[1:]:
        stage(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
