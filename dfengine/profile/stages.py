"""The stages of DF-RISE's loop, each timed by itself or within the loop."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dfengine.diffusion.denoiser import Denoiser, PromptedDenoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.engine import Engine
from dfengine.events import Event, Generated
from dfengine.explain import Rise
from dfengine.explain.rise_forwards import RiseForwards
from dfengine.runtime.tuning import synchronize
from dfengine.store import Writer

T = TypeVar("T")


class BatchStages:
    """The stages of one batch of masks, to be timed separately."""

    def __init__(self, denoiser: Denoiser, rise: Rise, trajectory: Trajectory, size: int) -> None:
        self._forwards = RiseForwards(rise, denoiser, [trajectory])
        self._forwards.start()
        self._rows = torch.zeros(size, dtype=torch.int64, device=denoiser.device)
        self._indices = torch.arange(size, device=denoiser.device) % rise.num_masks
        self._forwards.scores.uniform_()  # ridge needs numbers, whatever they are
        self._masked = self.mask()

    def mask(self) -> Tensor:
        return self._forwards.mask(self._rows, self._indices)

    def forward(self) -> Tensor:
        return self._forwards.predict(self._masked, self._rows, 0)

    def score(self) -> None:
        # The time does not depend on the values, so the masked latents stand in for the network's output.
        self._forwards.score(self._masked, self._masked, self._rows, self._indices)

    def maps(self) -> None:
        list(self._forwards.step_maps([[0]], self._forwards.num_masks))


class _TimedDenoiser(PromptedDenoiser):
    """A prompted network that appends the start and end of every call to `calls` without synchronising."""

    def __init__(self, network: PromptedDenoiser, calls: list[tuple[Any, Any]]) -> None:
        super().__init__(network.denoiser, network.condition)
        self._network, self._calls = network, calls

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Float[Tensor, "n c h w"]:
        return self._timed(partial(self._network, x_t, timesteps, rows))

    def both(
        self,
        x_t: Float[Tensor, "n c h w"],
        timesteps: Shaped[Tensor, " n"],
        rows: Int[Tensor, "2 n"] | tuple[int, int],
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        return self._timed(partial(self._network.both, x_t, timesteps, rows))

    def _timed(self, forward: Callable[[], T]) -> T:
        started = self._now()
        output = forward()
        self._calls.append((started, self._now()))
        return output

    def _now(self) -> Any:
        if self.denoiser.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.denoiser.device))
        return event


def loop_seconds(engine: Engine, rise: Rise, job: Job, num_masks: int) -> tuple[float, float]:
    """Seconds per mask of the complete loop, including its file, and of the network in it, over about `num_masks`."""
    batch, device = engine.denoiser.batch_size, engine.denoiser.device
    rise = replace(rise, num_masks=batch * max(1, num_masks // (2 * batch)), stop_at_error=None)
    job = first_steps(job, 2)
    calls: list[tuple[Any, Any]] = []
    event_times: list[float] = []

    def on_event(event: Event) -> None:
        synchronize(device)
        event_times.append(time.perf_counter())
        if isinstance(event, Generated):  # discards the calls that sampled the image
            calls.clear()

    timed = copy.copy(engine)
    timed.denoiser = copy.copy(engine.denoiser)
    with_prompts = engine.denoiser.with_prompts
    # Through setattr, because only this instance's method is replaced.
    setattr(timed.denoiser, "with_prompts", lambda condition: _TimedDenoiser(with_prompts(condition), calls))  # noqa: B010
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about too few masks
        timed.explain(
            job.prompt,
            rise,
            negative_prompt=job.negative_prompt,
            seed=job.seed,
            sampling=job.timesteps,
            guidance=job.guidance,
            previews=False,
            out=Path(folder) / "run.h5",
            on_event=on_event,
        )
    on_cuda = device.type == "cuda"
    network = sum(start.elapsed_time(end) / 1e3 if on_cuda else end - start for start, end in calls)
    masks = rise.num_masks * len(job.timesteps)
    return (event_times[-1] - event_times[0]) / masks, network / masks


def file_seconds(engine: Engine, rise: Rise, job: Job, trajectory: Trajectory, steps: int = 8) -> float:
    """Seconds that the writing thread takes per step for its map, errors, scores and flushes."""
    h, w = engine.denoiser.latent_shape[1:]
    job = replace(job, timesteps=tuple(range(steps))[::-1])
    maps = np.random.default_rng(0).standard_normal((2, h, w), np.float32)
    scores = np.zeros(rise.num_masks, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file_plan = engine.plan([job], rise).file_plan(engine.denoiser, previews=False)
        with Writer.create(Path(folder) / "run.h5", file_plan) as writer:
            writer.trajectory(
                0,
                timesteps=np.array(job.timesteps),
                signal=np.zeros(steps, np.float32),
                noise=np.ones(steps, np.float32),
                latents=trajectory.latents[:1].cpu().numpy().repeat(steps, 0),
                epsilon=trajectory.epsilon[:1].cpu().numpy().repeat(steps, 0),
                image=trajectory.image.numpy(),
                previews=None,
            )
            started = time.perf_counter()
            for step in range(steps):
                writer.step(0, rise.name, step, saliency=maps[0], error=maps[1], scores=scores)
            writer.finish(0, 0.0)
        return (time.perf_counter() - started) / steps


def first_steps(job: Job, count: int) -> Job:
    """The job with only its first `count` steps, at least one."""
    return replace(job, timesteps=job.timesteps[: max(1, count)])
