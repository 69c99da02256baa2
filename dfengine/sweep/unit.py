"""One unit of a sweep: its items explained into a segment of their own, whatever becomes of some of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence

import numpy as np

from dfengine import store
from dfengine.diffusion.job import Job
from dfengine.engine import Engine
from dfengine.events import Finished
from dfengine.explain import StepMap
from dfengine.plan import Plan
from dfengine.recorder import Recorder
from dfengine.runtime.grouping import group_size
from dfengine.runtime.tuning import device_name
from dfengine.sweep.records import Closed, Failed, Progress, Record
from dfengine.sweep.spec import Schedule, Shared

#: Seconds between two records of progress.
TELL_SECONDS = 0.5


class _Broken(Exception):
    """An item failed in a way that may have harmed the process."""

    def __init__(self, failures: Sequence[store.Failure]) -> None:
        self.failures = tuple(failures)


def explain_unit(
    engine: Engine, shared: Shared, folder: store.Folder, unit: store.Unit, *, times: int = 1, driver: str = ""
) -> Iterator[Record]:
    """Do what is left of a unit, telling of it; `times` is how many such units are expected of this engine, `driver`
    who asked for it.

    What is wrong with an item is recorded, and the others go on: a ValueError sets it aside at once, anything else at
    the second time, in a fresh process (the last record then asks for one). Closing the iterator stops the work, and
    keeps what is done. Raises Busy where another process is at the unit; StoreError and OSError, which are no item's
    fault.
    """
    with folder.hold(unit.name):
        if unit.name in folder.closed():  # meanwhile, by another driver's worker, or by one that could not say so
            yield Closed(unit.name)
            return
        yield from _explain_held(engine, shared, folder, unit, times, driver)


def _explain_held(
    engine: Engine, shared: Shared, folder: store.Folder, unit: store.Unit, times: int, driver: str
) -> Iterator[Record]:
    troubles = store.FailureLog(folder.path, unit, driver=driver)
    jobs, refused = _jobs(engine, shared, unit, troubles)
    if refused:
        yield Failed(unit.name, tuple(refused))
    if jobs:
        plan = engine.plan(list(jobs.values()), shared.explainers)
        described = plan.file_plan(engine.denoiser, previews=shared.previews, mantissa_bits=shared.mantissa_bits)
        device = device_name(engine.denoiser.device)
        try:
            with folder.segment(unit.name, described, compression=shared.compression, device=device) as writer:
                yield from _Work(
                    engine, shared, unit, dict(zip(jobs, range(len(jobs)), strict=True)), plan, troubles, writer
                ).rest(times)
        except _Broken as error:
            yield Failed(unit.name, error.failures, fresh=True)
            return
    yield Closed(unit.name)


def _jobs(
    engine: Engine, shared: Shared, unit: store.Unit, troubles: store.FailureLog
) -> tuple[dict[int, Job], list[store.Failure]]:
    """The jobs that are possible, by item, and the failures of others that were not known yet."""
    schedules = [Schedule(**one) for one in unit.schedules]
    jobs, refused = {}, []
    for item, (prompt, schedule, seed) in enumerate(unit.items):
        how = schedules[schedule]
        try:
            job = engine.job(
                unit.prompts[prompt],
                negative_prompt=shared.negative_prompt,
                seed=seed,
                num_steps=how.steps,
                sampling=how.sampling,
                gamma=how.gamma,
                guidance=how.guidance,
            )
            engine.plan([job], shared.explainers)
            jobs[item] = job
        except ValueError as error:
            if item not in troubles.quarantined:
                refused += troubles.failed([item], str(error), for_good=True)
    return jobs, refused


class _Work:
    """What is left of a unit's items, group by group."""

    def __init__(
        self,
        engine: Engine,
        shared: Shared,
        unit: store.Unit,
        places: Mapping[int, int],
        plan: Plan,
        troubles: store.FailureLog,
        writer: store.Writer,
    ) -> None:
        self._engine, self._shared, self._unit, self._plan = engine, shared, unit, plan
        self._troubles, self._writer = troubles, writer
        self._places = places
        self._maps, self._finished, self._told = 0, list[tuple[int, float]](), time.monotonic()

    def rest(self, times: int) -> Iterator[Record]:
        """Explain all that is neither finished nor set aside. Raises _Broken."""
        left = [item for item in self._places if np.isnan(self._writer.stored(self._places[item]).seconds)]
        if found := self._troubles.recover(left):
            yield Failed(self._unit.name, tuple(found))
        left = [item for item in left if item not in self._troubles.quarantined]
        self._engine.prepare(self._plan.select([self._places[item] for item in left]), times=times)
        alone = [item for item in self._troubles.suspects if item in left]
        together = [item for item in left if item not in alone]
        size = group_size(self._engine.denoiser)
        groups = deque([*(together[start : start + size] for start in range(0, len(together), size))])
        # Last, so that what they do to the process costs the others nothing.
        groups.extend([item] for item in alone)
        while groups:
            group = groups.popleft()
            found = yield from self._try(group)
            if found and len(group) > 1:
                groups.extend([item] for item in group)
        self._troubles.settle()
        if self._maps or self._finished:
            yield self._progress()

    def _try(self, group: list[int]) -> Generator[Record, None, list[store.Failure]]:
        """Explain a group; returns the failures if there were some that the process is none the worse for."""
        self._troubles.take(group)
        try:
            yield from self._explain(group)
        except (GeneratorExit, store.StoreError, OSError):
            self._troubles.release()
            raise
        except Exception as error:
            is_input = isinstance(error, ValueError)
            told = str(error).strip() or type(error).__name__
            found = self._troubles.failed(
                group, told if is_input else f"{type(error).__name__}: {told}", for_good=is_input
            )
            self._troubles.release()
            if not is_input:
                raise _Broken(found) from error
            yield Failed(self._unit.name, tuple(found))
            return found
        return []

    def _explain(self, group: Sequence[int]) -> Iterator[Progress]:
        shared, engine = self._shared, self._engine
        places = [self._places[item] for item in group]
        plan = self._plan.select(places)
        recorder = Recorder(engine.denoiser, plan, previews=shared.previews, writer=self._writer, items=places)
        for event in engine.run(plan, restored=recorder.restored, done=recorder.done):
            recorder.take(event)
            self._maps += isinstance(event, StepMap)
            if isinstance(event, Finished):
                self._finished.append((group[event.item], event.seconds))
            if time.monotonic() - self._told > TELL_SECONDS:
                yield self._progress()

    def _progress(self) -> Progress:
        """What was done since the last."""
        told = Progress(self._unit.name, self._maps, tuple(self._finished))
        self._maps, self._finished, self._told = 0, [], time.monotonic()
        return told
