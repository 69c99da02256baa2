"""A worker: the process that has a device to itself, and does what it is asked, one thing after the other."""

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
from dfengine.runtime.tuning import device_name
from dfengine.sweep.records import Idle, Kind, Note, Probed, Record, Refused, Taken
from dfengine.sweep.spec import Schedule, Shared, Source
from dfengine.sweep.unit import explain_unit

#: Prompts of which at least one must be possible, for a model to be.
_TRIED = 16
#: A process that was ended may hold its file for a moment.
_LOOKS = 5


@dataclass(frozen=True)
class Setup:
    """What all workers of a sweep have in common."""

    folder: Path
    shared: Shared
    driver: str = ""
    """tells the sweep's driver from any other"""
    device: str | None = None
    batch_size: int | None = None
    attention: str = "auto"
    compile: bool | None = None


@dataclass(frozen=True)
class Probe:
    """Asks what a model is like: whether it can do these schedules and some of these prompts, and how fast."""

    source: Source
    schedules: tuple[Schedule, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Explain:
    """Asks for a unit, of so many like it that are expected of this worker."""

    unit: store.Unit
    times: int = 1


class Worker:
    """Has one model at a time."""

    def __init__(self, setup: Setup, *, threads: int | None = None) -> None:
        self._setup = setup
        self._loaded: tuple[Source, Engine] | None = None
        self._notes: deque[str] = deque()
        if threads is not None:
            torch.set_num_threads(threads)
        _listen(self._notes)

    def answer(self, request: Probe | Explain | None) -> Generator[Record, None, None]:
        """Do what is asked, telling of it; the last record says that the worker waits for more.

        Raises nothing: what it cannot do it refuses.
        """
        try:
            if isinstance(request, Probe):
                yield self._probe(request)
            elif isinstance(request, Explain):
                for record in self._explain(request):
                    yield from self._noted()
                    yield record
        except Exception as error:
            if not isinstance(error, ValueError | OSError):
                traceback.print_exc(file=sys.stderr)
            told = str(error).strip() or type(error).__name__
            yield Refused(told if isinstance(error, ValueError) else f"{type(error).__name__}: {told}")
        yield from self._noted()
        yield Idle()

    def _noted(self) -> Iterator[Note]:
        while self._notes:
            yield Note(self._notes.popleft())

    def _engine(self, source: Source) -> Engine:
        if self._loaded is None or self._loaded[0] != source:
            self._loaded = None
            gc.collect()  # before the next model comes, of which there may not be room for two
            engine = Engine.from_pretrained(
                **source.model_dump(),
                device=self._setup.device,
                batch_size=self._setup.batch_size,
                attention=self._setup.attention,
                compile=self._setup.compile,
            )
            self._loaded = source, engine
        return self._loaded[1]

    def _explain(self, request: Explain) -> Iterator[Record]:
        engine = self._engine(Source(**request.unit.model))
        folder = store.Folder(self._setup.folder)
        for _ in range(_LOOKS):
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
        yield Taken(request.unit.name)

    def _probe(self, request: Probe) -> Probed:
        """Raises ValueError where the model cannot do one of the schedules, or none of the first prompts."""
        engine, shared = self._engine(request.source), self._setup.shared
        jobs = [
            engine.job(
                request.prompts[0],
                negative_prompt=shared.negative_prompt,
                num_steps=how.steps,
                sampling=how.sampling,
                gamma=how.gamma,
                guidance=how.guidance,
            )
            for how in request.schedules
        ]
        prompt = _possible(engine, shared, request)
        kinds = []
        for how, job in zip(request.schedules, jobs, strict=True):
            job = engine.job(prompt, num_steps=how.steps, sampling=job.timesteps)
            described = engine.plan([job], shared.explainers).file_plan(engine.denoiser, previews=shared.previews)
            steps = len(job.timesteps)
            forwards = 2 * steps + sum(explainer.num_forwards(steps) for explainer in shared.explainers)
            kinds.append(Kind(steps, forwards, store.nbytes(described)))
        return Probed(device_name(engine.denoiser.device), engine.forward_cost().seconds, tuple(kinds))


def _possible(engine: Engine, shared: Shared, request: Probe) -> str:
    """The first prompt that the explainers take. Raises ValueError, the first's, if it is none of the first few."""
    first: ValueError | None = None
    for prompt in request.prompts[:_TRIED]:
        job = engine.job(prompt, num_steps=1)
        try:
            engine.plan([job], shared.explainers)
            engine.denoiser.encode_prompts([prompt, shared.negative_prompt])
            return prompt
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


def _listen(notes: deque[str]) -> None:
    """From now on the package's log and all warnings of this process become notes."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    log = logging.getLogger("dfengine")
    log.setLevel(logging.INFO)
    log.addHandler(Listener(logging.INFO))
    warnings.showwarning = lambda message, *_: notes.append(str(message))
