"""A worker: it has one device to itself, and handles one request after the other."""

from __future__ import annotations

import gc
import logging
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dfengine import store
from dfengine.engine import Engine
from dfengine.plan import Plan
from dfengine.runtime.tuning import device_name
from dfengine.sweep.events import Event, ItemCost, ModelProfile, Note, Refused, UnitBusy, WorkerReady
from dfengine.sweep.spec import ModelSpec, Schedule, SharedSettings
from dfengine.sweep.unit import error_text, explain_unit, make_job
from dfengine.text import printable

#: A model is refused if none of this many prompts is possible.
_MAX_TRIED_PROMPTS = 16
#: A process that was killed may hold its file for a moment: a busy unit is tried this often, once a second.
_MAX_ATTEMPTS = 5


@dataclass(frozen=True)
class WorkerSetup:
    """What all workers of a sweep share."""

    folder: Path
    shared: SharedSettings
    driver: str = ""
    """identifies the driver"""
    device: str | None = None
    batch_size: int | None = None
    attention: str = "auto"
    compile: bool | None = None


@dataclass(frozen=True)
class ProfileRequest:
    """Asks whether a model supports all of these schedules and some of these prompts, and how fast it is."""

    model: ModelSpec
    schedules: tuple[Schedule, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class ExplainRequest:
    """Asks for a unit, the first of about `times` that this worker will do."""

    unit: store.Unit
    times: int = 1


class Worker:
    """Handles requests, with at most one model loaded."""

    def __init__(self, setup: WorkerSetup, *, threads: int | None = None) -> None:
        self._setup = setup
        self._loaded: tuple[ModelSpec, Engine] | None = None
        self._notes: deque[str] = deque()
        if threads is not None:
            torch.set_num_threads(threads)
        _collect_notes(self._notes)

    def handle(self, request: ProfileRequest | ExplainRequest | None) -> Generator[Event, None, None]:
        """Yield the events of a request; the last is `WorkerReady`. Raises nothing: errors are yielded as `Refused`."""
        try:
            if isinstance(request, ProfileRequest):
                yield self._profile(request)
            elif isinstance(request, ExplainRequest):
                for event in self._explain(request):
                    yield from self._take_notes()
                    yield event
        except Exception as error:
            if not isinstance(error, ValueError | OSError):
                traceback.print_exc(file=sys.stderr)
            yield Refused(printable(error_text(error)))
        yield from self._take_notes()
        yield WorkerReady()

    def _take_notes(self) -> Iterator[Note]:
        while self._notes:
            yield Note(self._notes.popleft())

    def _engine(self, model: ModelSpec) -> Engine:
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None
            gc.collect()  # there may not be room for two models
            engine = Engine.from_pretrained(
                **model.model_dump(),
                device=self._setup.device,
                batch_size=self._setup.batch_size,
                attention=self._setup.attention,
                compile=self._setup.compile,
            )
            self._loaded = model, engine
        return self._loaded[1]

    def _explain(self, request: ExplainRequest) -> Iterator[Event]:
        engine = self._engine(ModelSpec(**request.unit.model))
        folder = store.Folder(self._setup.folder)
        for _ in range(_MAX_ATTEMPTS):
            try:
                yield from explain_unit(
                    engine,
                    self._setup.shared,
                    folder,
                    request.unit,
                    times=request.times,
                    driver=self._setup.driver,
                )
                return
            except store.Busy:
                time.sleep(1)
        yield UnitBusy(request.unit.name)

    def _profile(self, request: ProfileRequest) -> ModelProfile:
        """Raises ValueError if the model does not support one of the schedules, or none of the first prompts."""
        engine, shared = self._engine(request.model), self._setup.shared
        plan = _plan_possible_prompt(engine, shared, request)
        costs = []
        for index, planned in enumerate(plan.jobs):
            steps = len(planned.job.timesteps)
            forwards = 2 * steps + sum(planned.num_forwards(explainer, steps) for explainer in shared.explainers)
            file_plan = plan.select([index]).file_plan(engine.denoiser, previews=shared.previews)
            costs.append(ItemCost(steps, forwards, store.nbytes(file_plan)))
        return ModelProfile(device_name(engine.denoiser.device), engine.forward_cost().seconds, tuple(costs))


def _plan_possible_prompt(engine: Engine, shared: SharedSettings, request: ProfileRequest) -> Plan:
    """A job for each schedule, of the first prompt that the model and the explainers accept.

    Raises the first prompt's ValueError if they accept none of the first few.
    """
    first_error: ValueError | None = None
    for prompt in request.prompts[:_MAX_TRIED_PROMPTS]:
        try:
            jobs = [make_job(engine, shared, prompt, schedule) for schedule in request.schedules]
            plan = engine.plan(jobs, shared.explainers)
            with torch.no_grad():
                engine.denoiser.condition(jobs[:1])
                engine.denoiser.condition(jobs[:1], negative=True)
            return plan
        except ValueError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _collect_notes(notes: deque[str]) -> None:
    """From now on, append the package's log messages and all warnings of this process to the notes."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(printable(record.getMessage()))

    log = logging.getLogger("dfengine")
    log.setLevel(logging.INFO)
    log.addHandler(Handler(logging.INFO))
    warnings.showwarning = lambda message, *_: notes.append(printable(message))
