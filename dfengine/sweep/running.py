"""A sweep from its description to its run folder: what the command line and other tools call."""

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
from dfengine.sweep.cluster import Cluster
from dfengine.sweep.driver import Driver, probe
from dfengine.sweep.planning import Estimate, estimate, prepare
from dfengine.sweep.processes import Processes
from dfengine.sweep.records import Begun, Note, Probed, Record
from dfengine.sweep.spec import Shared, Source, Sweep
from dfengine.sweep.worker import Setup


@dataclass(frozen=True)
class Where:
    """What a sweep runs on."""

    workers: int | None = None
    """by default one for each GPU, and one where there is none"""
    device: str | None = None
    """"cpu" or "cuda"; by default a GPU where there is one"""
    threads: int | None = None
    """of each worker on a CPU; by default the cores are shared out"""
    ray_address: str | None = None
    """of a running Ray, whose machines all see the run folder"""
    batch_size: int | None = None
    attention: str = "auto"
    compile: bool | None = None
    stall: float = 1800.0
    """seconds after which a worker that tells nothing is ended"""

    def __post_init__(self) -> None:
        for what, count in (("workers", self.workers), ("threads", self.threads)):
            if count is not None and count < 1:
                raise ValueError(f"{count} {what} are not possible: expected at least 1")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device {self.device!r} is not possible: expected cpu or cuda; each worker has one")
        if not self.stall > 0:
            raise ValueError(f"{self.stall} seconds are not possible: expected more than 0")

    def crew(self, sweep: Sweep, folder: Path, driver: str = "") -> Processes | Cluster:
        """The workers, none of which has begun yet."""
        setup = Setup(
            folder.absolute(),
            Shared.of(sweep.shared),
            driver=driver,
            device=self.device,
            batch_size=self.batch_size,
            attention=self.attention,
            compile=self.compile,
        )
        gpus = [] if self.device == "cpu" else _gpus()
        workers = self.workers or len(gpus) or 1
        if self.ray_address is not None or (min(workers, len(gpus)) > 1 and importlib.util.find_spec("ray")):
            return Cluster(setup, address=self.ray_address, workers=self.workers, threads=self.threads)
        share = None if gpus else max(1, len(os.sched_getaffinity(0)) // workers)
        return Processes(setup, workers=workers, gpus=gpus, threads=self.threads or share)


def run(
    sweep: Sweep,
    out: str | Path,
    where: Where = Where(),  # settings are frozen
    *,
    shard: tuple[int, int] = (1, 1),
    retry_failed: bool = False,
) -> Iterator[tuple[int, Record]]:
    """Do what is left of a sweep in its run folder, telling of it: each record with the number of its worker.

    `shard` (i, n) does the i-th of n parts of the plan, which are always the same. Closing the iterator stops the
    workers cleanly; the same call goes on. Raises ValueError for what is not possible, before anything is begun where
    that can be known; what single items fail of is in the records, and in `outcome`.
    """
    out = Path(out)
    part, parts = shard
    if not 1 <= part <= parts:
        raise ValueError(f"shard {part}/{parts} is not possible: expected 1/{parts} to {parts}/{parts}")
    driver = uuid.uuid4().hex
    with closing(where.crew(sweep, out, driver)) as crew:
        told: list[tuple[int, Record]] = []
        units = prepare(sweep, out, lambda source: _probe(crew, sweep, source, told), retry_failed=retry_failed)
        yield from told
        if parts > 1:
            mine = {unit.name for number, unit in enumerate(store.planned_units(out)) if number % parts == part - 1}
            units = [unit for unit in units if unit.name in mine]
        steps = [len(unit) * unit.schedules[0]["steps"] for unit in units]
        workers = min(crew.workers, len(units))
        yield 0, Begun(sum(map(len, units)), sum(steps) * len(sweep.explainers), len(units), workers)
        yield from Driver(crew, out, units, workers=workers, stall=where.stall, driver=driver).run()


def dry_run(sweep: Sweep, out: str | Path, where: Where = Where()) -> tuple[Estimate, list[str]]:
    """What a sweep would cost, measured by one worker, and the notes on the way; nothing is written."""
    store.check_free(Path(out))
    with closing(where.crew(sweep, Path(out))) as crew:
        told: list[tuple[int, Record]] = []
        probed = {source: _probe(crew, sweep, source, told) for source in sweep.models}
        return estimate(sweep, probed, crew.workers), [one.text for _, one in told if isinstance(one, Note)]


def _probe(crew: Processes | Cluster, sweep: Sweep, source: Source, told: list[tuple[int, Record]]) -> Probed:
    for worker, record in probe(crew, sweep, source):
        if isinstance(record, Probed):
            return record
        told.append((worker, record))
    raise AssertionError("unreachable: the last record is the answer")


@dataclass(frozen=True)
class Outcome:
    """What has become of a sweep."""

    items: int
    units_left: int
    aside: tuple[store.Failure, ...]

    @property
    def finished(self) -> bool:
        """Whether all is done."""
        return not self.units_left and not self.aside


def outcome(out: str | Path) -> Outcome:
    """How much of a run folder's plan is done. Raises StoreError where there is none."""
    path = Path(out)
    if not store.is_folder(path):
        raise store.StoreError(f"{path} is no run folder")
    folder = store.Folder(path)
    return Outcome(
        items=sum(len(unit) for unit in store.planned_units(path) if not unit.retry_of),
        units_left=sum(1 for _ in store.units_left(path, folder.closed())),
        aside=tuple(one for one in store.failures(path) if one.state == "quarantined"),
    )


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else list(map(str, range(count)))
