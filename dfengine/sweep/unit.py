"""Explains the items of one unit of a sweep into its own file, whatever happens to some of them."""

from __future__ import annotations

import json
import logging
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
from dfengine.sweep.events import Closed, Event, Failed, Progress
from dfengine.sweep.spec import Schedule, SharedSettings

log = logging.getLogger(__name__)
#: Seconds between two progress events.
PROGRESS_SECONDS = 0.5


class _UnsafeProcess(Exception):
    """An item failed in a way that may have harmed the process."""

    def __init__(self, failures: Sequence[store.Failure]) -> None:
        self.failures = tuple(failures)


def make_job(engine: Engine, shared: SharedSettings, prompt: str, schedule: Schedule, seed: int = 0) -> Job:
    """The job of one item. Raises ValueError if the model does not allow it."""
    return engine.job(
        prompt,
        negative_prompt=shared.negative_prompt,
        seed=seed,
        num_steps=schedule.num_steps,
        sampling=schedule.sampling,
        gamma=schedule.gamma,
        guidance=schedule.guidance,
    )


def explain_unit(
    engine: Engine, shared: SharedSettings, folder: store.Folder, unit: store.Unit, *, times: int = 1, driver: str = ""
) -> Iterator[Event]:
    """Compute what is left of a unit, yielding events.

    `times` is the number of similar units this engine is expected to do, `driver` identifies who asked for this one.

    Failures of items are recorded and the others continue. An item is quarantined at its first ValueError, or when
    anything else fails a second time, in a new process (the last event then asks for one). Closing the iterator stops
    the work and keeps what is done. Raises Busy if another process holds the unit; StoreError and OSError, for which
    no item is responsible.
    """
    with folder.hold(unit.name):
        if unit.name in folder.closed():  # by another driver's worker, or by one that died before reporting it
            yield Closed(unit.name)
            return
        dtype, weights = str(engine.denoiser.dtype).removeprefix("torch."), engine.denoiser.fingerprint()
        if (first := folder.first_weights({**unit.model, "dtype": dtype}, weights)) != weights:
            raise store.StoreError(
                f"{folder.path} was begun with other weights of {engine.denoiser.name} in {dtype} ({first}, now "
                f"{weights}): use those, or a new folder"
            )
        failures = store.FailureLog(folder.path, unit, driver=driver)
        items, plan, refused = _plan_unit(engine, shared, unit, failures, weights)
        if refused:
            yield Failed(unit.name, tuple(refused))
        if items:
            described = plan.file_plan(
                engine.denoiser, previews=shared.previews, mantissa_bits=shared.mantissa_bits, weights=weights
            )
            device = device_name(engine.denoiser.device)
            try:
                with folder.segment(unit.name, described, compression=shared.compression, device=device) as writer:
                    yield from _UnitRun(engine, shared, unit, items, plan, failures, writer).explain_remaining(times)
            except _UnsafeProcess as error:
                yield Failed(unit.name, error.failures, needs_restart=True)
                return
        yield Closed(unit.name)


def _plan_unit(
    engine: Engine, shared: SharedSettings, unit: store.Unit, failures: store.FailureLog, weights: str
) -> tuple[list[int], Plan, list[store.Failure]]:
    """The items that are possible, their plan, and new failures of the others."""
    schedules = [Schedule(**one) for one in unit.schedules]
    jobs: dict[int, Job] = {}
    refused: list[store.Failure] = []

    def refuse(item: int, error: ValueError) -> None:
        if item not in failures.quarantined:
            refused.extend(failures.failed([item], str(error), for_good=True))

    for item, (prompt, schedule, seed) in enumerate(unit.items):
        try:
            jobs[item] = make_job(engine, shared, unit.prompts[prompt], schedules[schedule], seed)
        except ValueError as error:
            refuse(item, error)
    jobs = _distinct(jobs, unit)
    try:
        plan = engine.plan(list(jobs.values()), shared.explainers)
        if jobs:
            plan.file_plan(engine.denoiser, previews=shared.previews, weights=weights)
        return list(jobs), plan, refused
    except ValueError:  # of one item or several: plan each alone to find them
        planned = {}
        for item, job in jobs.items():
            try:
                alone = engine.plan([job], shared.explainers)
                alone.file_plan(engine.denoiser, previews=shared.previews, weights=weights)
                planned[item] = alone.jobs[0]
            except ValueError as error:
                refuse(item, error)
        return list(planned), Plan(tuple(planned.values()), shared.explainers), refused


def _distinct(jobs: Mapping[int, Job], unit: store.Unit) -> dict[int, Job]:
    """The jobs without those that an earlier one equals: schedules can differ in name and have the same time-steps."""
    first: dict[str, int] = {}
    same: dict[tuple[int, int], None] = {}
    for item, job in jobs.items():
        equal = first.setdefault(json.dumps([job.prompt, job.negative_prompt, job.seed, job.settings]), item)
        if equal != item:
            same[unit.items[equal][1], unit.items[item][1]] = None
    for pair in same:
        names = (unit.schedules[schedule]["sampling"] for schedule in pair)
        log.info("schedules %s and %s are the same on this model: their images are made once", *names)
    return {item: jobs[item] for item in first.values()}


class _UnitRun:
    """The remaining items of a unit, explained group by group."""

    def __init__(
        self,
        engine: Engine,
        shared: SharedSettings,
        unit: store.Unit,
        items: Sequence[int],
        plan: Plan,
        failures: store.FailureLog,
        writer: store.Writer,
    ) -> None:
        """`items` are those of the plan, in its order."""
        self._engine, self._shared, self._unit, self._plan = engine, shared, unit, plan
        self._failures, self._writer = failures, writer
        self._index = {item: index for index, item in enumerate(items)}
        """of each item in the plan and in the file"""
        self._maps, self._finished, self._last_report = 0, list[tuple[int, float]](), time.monotonic()

    def explain_remaining(self, times: int) -> Iterator[Event]:
        """Explain every item that is neither finished nor quarantined. Raises _UnsafeProcess."""
        pending = [item for item in self._index if np.isnan(self._writer.stored(self._index[item]).seconds)]
        if crashed := self._failures.recover(pending):
            yield Failed(self._unit.name, tuple(crashed))
        pending = [item for item in pending if item not in self._failures.quarantined]
        self._engine.prepare(self._plan.select([self._index[item] for item in pending]), times=times)
        suspects = [item for item in self._failures.suspects if item in pending]
        trusted = [item for item in pending if item not in suspects]
        size = group_size(self._engine.denoiser)
        groups = deque([*(trusted[start : start + size] for start in range(0, len(trusted), size))])
        # Suspects run last and alone, so that whatever they do to the process costs no other item.
        groups.extend([item] for item in suspects)
        while groups:
            group = groups.popleft()
            failed = yield from self._try(group)
            if failed and len(group) > 1:
                groups.extend([item] for item in group)
        self._failures.settle()
        if self._maps or self._finished:
            yield self._progress()

    def _try(self, group: list[int]) -> Generator[Event, None, list[store.Failure]]:
        """Explain a group; return its failures if they did the process no harm. Raises _UnsafeProcess otherwise."""
        self._failures.take(group)
        try:
            yield from self._explain(group)
        except (GeneratorExit, store.StoreError, OSError):
            self._failures.release()
            raise
        except Exception as error:
            is_input = isinstance(error, ValueError)
            failed = self._failures.failed(group, error_text(error), for_good=is_input)
            self._failures.release()
            if not is_input:
                raise _UnsafeProcess(failed) from error
            yield Failed(self._unit.name, tuple(failed))
            return failed
        return []

    def _explain(self, group: Sequence[int]) -> Iterator[Progress]:
        denoiser, indices = self._engine.denoiser, [self._index[item] for item in group]
        plan = self._plan.select(indices)
        recorder = Recorder(denoiser, plan, previews=self._shared.previews, writer=self._writer, items=indices)
        for event in self._engine.run(plan, restored=recorder.restored, done=recorder.done):
            recorder.take(event)
            self._maps += isinstance(event, StepMap)
            if isinstance(event, Finished):
                self._finished.append((group[event.item], event.seconds))
            if time.monotonic() - self._last_report > PROGRESS_SECONDS:
                yield self._progress()

    def _progress(self) -> Progress:
        """What was done since the last progress event."""
        progress = Progress(self._unit.name, self._maps, tuple(self._finished))
        self._maps, self._finished, self._last_report = 0, [], time.monotonic()
        return progress


def error_text(error: Exception) -> str:
    """An error in one line: its message, with its type unless it is a ValueError."""
    message = str(error).strip() or type(error).__name__
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"
