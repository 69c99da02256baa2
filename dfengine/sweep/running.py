"""Runs a sweep into its run folder: what the command line and other tools call."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from dfengine import store
from dfengine.sweep.driver import Driver, WorkerPool, profile
from dfengine.sweep.events import Event, ModelProfile, Note, SweepStarted
from dfengine.sweep.planning import Estimate, estimate, own_units, prepare
from dfengine.sweep.process_pool import ProcessPool
from dfengine.sweep.ray_pool import RayPool
from dfengine.sweep.spec import ModelSpec, SharedSettings, Sweep
from dfengine.sweep.worker import WorkerSetup


@dataclass(frozen=True)
class Resources:
    """What a sweep runs on."""

    workers: int | None = None
    """by default one for each GPU, or one without any"""
    device: str | None = None
    """"cpu" or "cuda"; by default a GPU if there is one"""
    threads: int | None = None
    """of each worker on a CPU; by default an equal share of the cores"""
    ray_address: str | None = None
    """of a running Ray cluster, whose machines all see the run folder"""
    batch_size: int | None = None
    attention: str = "auto"
    compile: bool | None = None
    stall: float = 1800.0
    """seconds after which a worker that reports nothing is replaced"""

    def __post_init__(self) -> None:
        """Raises ValueError for values that are not possible."""
        for name, count in (("workers", self.workers), ("threads", self.threads)):
            if count is not None and count < 1:
                raise ValueError(f"{count} {name} are not possible: expected at least 1")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(
                f"device {self.device!r} is not possible: expected cpu or cuda; GPUs are distributed among the workers"
            )
        if not self.stall > 0:
            raise ValueError(f"a stall of {self.stall} seconds is not possible: expected more than 0")


def run(
    sweep: Sweep,
    out: str | Path,
    resources: Resources = Resources(),  # settings are frozen
    *,
    shard: tuple[int, int] = (1, 1),
    retry_failed: bool = False,
) -> Iterator[tuple[int, Event]]:
    """Compute what is left of a sweep in its run folder, yielding events, each with the number of its worker.

    `shard` (i, n) restricts the run to the i-th of n fixed parts of the plan. Closing the iterator stops the workers
    cleanly; the same call resumes. Raises ValueError for what is not possible, before anything is written wherever
    that can be known; failures of single items are reported as events and by `outcome`.
    """
    out = Path(out).expanduser()
    part, parts = shard
    if not 1 <= part <= parts:
        raise ValueError(f"shard {part}/{parts} is not possible: expected 1/{parts} to {parts}/{parts}")
    driver = uuid.uuid4().hex
    with closing(_open_pool(resources, sweep, out, driver)) as pool:
        events: list[tuple[int, Event]] = []
        units = prepare(sweep, out, lambda model: _profile(pool, sweep, model, events), retry_failed=retry_failed)
        yield from events
        if parts > 1:
            own = {unit.name for number, unit in enumerate(store.planned_units(out)) if number % parts == part - 1}
            units = [unit for unit in units if unit.name in own]
        steps = [len(unit) * unit.schedules[0]["num_steps"] for unit in units]
        workers = min(pool.workers, len(units))
        yield 0, SweepStarted(sum(map(len, units)), sum(steps) * len(sweep.explainers), len(units), workers)
        yield from Driver(pool, out, units, workers=workers, stall=resources.stall, driver=driver).run()


def dry_run(sweep: Sweep, out: str | Path, resources: Resources = Resources()) -> tuple[Estimate, list[str]]:
    """The expected cost of a sweep, measured by one worker, and the notes logged meanwhile; nothing is written."""
    out = Path(out).expanduser()
    store.check_free(out)
    with closing(_open_pool(resources, sweep, out)) as pool:
        events: list[tuple[int, Event]] = []
        profiles = {model: _profile(pool, sweep, model, events) for model in sweep.models}
        return estimate(sweep, profiles, pool.workers), [event.text for _, event in events if isinstance(event, Note)]


def _open_pool(resources: Resources, sweep: Sweep, folder: Path, driver: str = "") -> WorkerPool:
    """A pool of workers, none of them started. Raises ValueError if Ray cannot be used."""
    setup = WorkerSetup(
        folder.absolute(),
        SharedSettings.from_json(sweep.shared),
        driver=driver,
        device=resources.device,
        batch_size=resources.batch_size,
        attention=resources.attention,
        compile=resources.compile,
    )
    gpus = [] if resources.device == "cpu" else _visible_gpus()
    workers = resources.workers or len(gpus) or 1
    if resources.ray_address is not None or (min(workers, len(gpus)) > 1 and importlib.util.find_spec("ray")):
        return RayPool(setup, address=resources.ray_address, workers=resources.workers, threads=resources.threads)
    share = None if gpus else max(1, len(os.sched_getaffinity(0)) // workers)
    return ProcessPool(setup, workers=workers, gpus=gpus, threads=resources.threads or share)


def _profile(pool: WorkerPool, sweep: Sweep, model: ModelSpec, events: list[tuple[int, Event]]) -> ModelProfile:
    """The profile of a model; other events are appended."""
    for worker, event in profile(pool, sweep, model):
        if isinstance(event, ModelProfile):
            return event
        events.append((worker, event))
    raise AssertionError("unreachable: the profile is the last event")


@dataclass(frozen=True)
class Outcome:
    """How much of a sweep is done."""

    items: int
    units_left: int
    quarantined: tuple[store.Failure, ...]

    @property
    def finished(self) -> bool:
        """Whether every item is done."""
        return not self.units_left and not self.quarantined


def outcome(out: str | Path, sweep: Sweep | None = None) -> Outcome:
    """How much of a run folder's plan is done, or of a sweep's part of it. Raises StoreError if it is no run folder."""
    path = Path(out).expanduser()
    if not store.is_folder(path):
        raise store.StoreError(f"{path} is not a run folder")
    closed = store.Folder(path).closed()
    units = {unit.name: unit for unit in store.planned_units(path)}
    own = set(units) if sweep is None else own_units(sweep, path)
    return Outcome(
        items=sum(len(units[name]) for name in own if not units[name].retry_of),
        units_left=sum(unit.name in own for unit in store.units_left(path, closed)),
        quarantined=tuple(one for one in store.failures(path) if one.state == "quarantined" and one.unit in own),
    )


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else list(map(str, range(count)))
