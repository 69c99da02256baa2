"""What an engine does a second on the device that is there, where its time goes, and what that predicts."""

from __future__ import annotations

import copy
import importlib.util
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import dfkernels
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfengine.diffusion.denoiser import Denoiser, PromptedDenoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.engine import Engine
from dfengine.events import Event, Generated
from dfengine.explain import Rise
from dfengine.explain.masking import RiseForwards
from dfengine.profile.clock import Clock, copy_bandwidth, matmul_ceiling, processor
from dfengine.profile.operations import flops_by_kind, profiled, time_by_kind
from dfengine.runtime.tuning import device_name, synchronize
from dfengine.store import Writer, nbytes

T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """All that `profile` found; `dataclasses.asdict` of it is what `--json` prints. Times are in seconds."""

    model: str
    device: str
    versions: dict[str, str]
    dtype: str
    attention: str
    compiled: bool
    batch_size: int
    gflop_a_mask: dict[str, float]
    """by kind of operation, as executed: what is made once a prompt is not in it"""
    ceiling_tflop_s: float
    """of a large matrix product, measured here and now"""
    copy_gb_s: float
    masks_a_second: float
    """of the whole loop: masks, forwards, scores, maps and file"""
    tflop_s: float
    share_of_ceiling: float
    seconds_a_mask: dict[str, float]
    """`network` in the loop, other stages by themselves, the `rest` of the loop; `file` is another thread's time"""
    network: dict[str, float]
    """share of the network's time by kind of operation"""
    outside_network: float
    """share of the loop's time that is not the network's"""
    peak_gib: float
    curve: list[dict[str, float | None]]
    """the network alone, by batch size: masks a second and, on a GPU, the peak of memory"""
    job: dict[str, float]
    """what was asked about: images, steps, masks, forwards, and the predicted seconds and bytes of the file"""
    missed: list[str]
    """fast paths that this run does not take, and why"""


@torch.no_grad()
def profile(
    engine: Engine,
    rise: Rise,
    job: Job,
    *,
    images: int = 1,
    seconds: float = 3.0,
    tell: Callable[[str], object] = lambda _: None,
) -> Profile:
    """Profile an engine on so many images of a job's kind. `seconds` is what each measurement may take, about."""
    denoiser, steps = engine.denoiser, len(job.timesteps)
    clock = Clock(denoiser.device, seconds)
    tell("finding the batch that fits")
    engine.prepare(engine.plan([job] * images, rise))
    tell("sampling")
    once, twice = (clock.median(partial(trajectories, denoiser, [_shortened(job, n)])) for n in (1, 2))
    (path,) = trajectories(denoiser, [_shortened(job, 1)])
    tell("a batch, stage by stage")
    batch = denoiser.batch_size
    stages = _Stages(denoiser, rise, path, batch)
    alone = {
        "network": clock.median(stages.forward) / batch,
        "masks": clock.median(stages.mask) / batch,
        "scores": clock.median(stages.score) / batch,
        "maps": clock.median(stages.maps) / rise.num_masks,
    }
    tell("the whole loop")
    _reset_peak(denoiser.device)
    loop, alone["network"] = _loop_seconds(engine, rise, job, round(seconds / alone["network"]))
    most = peak(denoiser.device)
    rest = {
        "rest": max(0.0, loop - sum(alone.values())),
        "file": _file_seconds(engine, rise, job, path) / rise.num_masks,
    }
    tell("other batch sizes")
    flops = flops_by_kind(_Stages(_plain(denoiser), rise, path, 1).forward)
    curve = _curve(denoiser, rise, path, clock)
    tell("what the device can do")  # last: its matrices and copies are large
    ceiling, bandwidth = matmul_ceiling(clock, denoiser.dtype), copy_bandwidth(clock)
    done = sum(flops.values()) / loop
    a_step = max(0.0, twice - once)
    return Profile(
        model=denoiser.name,
        device=device_name(denoiser.device) if denoiser.device.type == "cuda" else processor(),
        versions={"torch": torch.__version__, "python": platform.python_version()},
        dtype=str(denoiser.dtype).removeprefix("torch."),
        attention=denoiser.attention_backend,
        compiled=denoiser.compiled,
        batch_size=batch,
        gflop_a_mask={kind: number / 1e9 for kind, number in flops.items()},
        ceiling_tflop_s=ceiling / 1e12,
        copy_gb_s=bandwidth / 1e9,
        masks_a_second=1 / loop,
        tflop_s=done / 1e12,
        share_of_ceiling=done / ceiling,
        seconds_a_mask=alone | rest,
        network=time_by_kind(stages.forward, denoiser.device),
        outside_network=1 - alone["network"] / loop,
        peak_gib=most / 2**30,
        curve=curve,
        job={
            "images": images,
            "steps": steps,
            "masks": rise.num_masks,
            "forwards": images * rise.num_forwards(steps),
            "seconds": images * (once + (steps - 1) * a_step) + _padded(images * steps * rise.num_masks, batch) * loop,
            "bytes": images * nbytes(engine.plan([job], rise).file_plan(engine.denoiser, previews=True)),
        },
        missed=_missed(engine),
    )


def trace(engine: Engine, rise: Rise, job: Job, path: Path) -> None:
    """Write a Chrome trace (chrome://tracing, Perfetto) of two steps of a job, a few batches each."""
    few = replace(rise, num_masks=min(rise.num_masks, 2 * engine.denoiser.batch_size))
    job = _shortened(job, 2)
    engine.prepare(engine.plan([job], few))
    with profiled(engine.denoiser.device) as profiler:
        for _ in engine.stream([job], few):
            pass
    profiler.export_chrome_trace(str(path))


class _Stages:
    """One batch of one step, as the loop makes it, each stage by itself."""

    def __init__(self, denoiser: Denoiser, rise: Rise, path: Trajectory, size: int) -> None:
        self._masking = RiseForwards(rise, denoiser, [path])
        self._masking.start()
        self._rows = torch.zeros(size, dtype=torch.int64, device=denoiser.device)
        self._indices = torch.arange(size, device=denoiser.device) % rise.num_masks
        self._masking.scores.uniform_()  # for ridge, which is not asked to make sense of what is not there
        self._masked = self.mask()

    def mask(self) -> Tensor:
        return self._masking.mask(self._rows, self._indices)

    def forward(self) -> Tensor:
        return self._masking.predict(self._masked, self._rows, 0)

    def score(self) -> None:
        # What is scored takes the same time whatever it is.
        self._masking.score(self._masked, self._rows, self._indices)

    def maps(self) -> None:
        list(self._masking.step_maps([[0]], self._masking.num_masks))


class _Watched(PromptedDenoiser):
    """A bound network with a clock on every call, which nothing waits for."""

    def __init__(self, network: PromptedDenoiser, calls: list[tuple[Any, Any]]) -> None:
        super().__init__(network.denoiser, network.condition)
        self._network, self._calls = network, calls

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Float[Tensor, "n c h w"]:
        return self._timed(partial(self._network, x_t, timesteps, rows))

    def both(
        self,
        x_t: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        rows: Int[Tensor, "2 n"] | tuple[int, int],
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        return self._timed(partial(self._network.both, x_t, timesteps, rows))

    def _timed(self, forward: Callable[[], T]) -> T:
        began = self._now()
        output = forward()
        self._calls.append((began, self._now()))
        return output

    def _now(self) -> Any:
        if self.denoiser.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.denoiser.device))
        return event


def _loop_seconds(engine: Engine, rise: Rise, job: Job, num_masks: int) -> tuple[float, float]:
    """Seconds a mask of the whole loop, its file included, and of the network in it, over about so many masks."""
    batch = engine.denoiser.batch_size
    rise = replace(rise, num_masks=batch * max(1, num_masks // (2 * batch)), stop_at_error=None)
    calls: list[tuple[Any, Any]] = []
    told: list[float] = []

    def on_event(event: Event) -> None:
        synchronize(engine.denoiser.device)
        told.append(time.perf_counter())
        if isinstance(event, Generated):
            calls.clear()

    watched = copy.copy(engine)
    watched.denoiser = copy.copy(engine.denoiser)
    # What is bound is watched; setattr, as it is this one denoiser's and not its class's.
    prompted = engine.denoiser.with_prompts
    setattr(watched.denoiser, "with_prompts", lambda condition: _Watched(prompted(condition), calls))  # noqa: B010
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few masks
        watched.explain(
            job.prompt,
            rise,
            negative_prompt=job.negative_prompt,
            seed=job.seed,
            sampling=_shortened(job, 2).timesteps,
            guidance=job.guidance,
            previews=False,
            out=Path(folder) / "run.h5",
            on_event=on_event,
        )
    on_gpu = engine.denoiser.device.type == "cuda"
    network = sum(began.elapsed_time(ended) / 1e3 if on_gpu else ended - began for began, ended in calls)
    masks = rise.num_masks * len(_shortened(job, 2).timesteps)
    return (told[-1] - told[0]) / masks, network / masks


def _file_seconds(engine: Engine, rise: Rise, job: Job, path: Trajectory, steps: int = 8) -> float:
    """Seconds that the writing thread takes for a step: its map, errors, scores and their flushes."""
    h, w = engine.denoiser.latent_shape[1:]
    job = replace(job, timesteps=tuple(range(steps))[::-1])
    maps = np.random.default_rng(0).standard_normal((2, h, w), np.float32)
    scores = np.zeros(rise.num_masks, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        whole = engine.plan([job], rise).file_plan(engine.denoiser, previews=False)
        with Writer.create(Path(folder) / "run.h5", whole) as writer:
            writer.trajectory(
                0,
                timesteps=np.array(job.timesteps),
                signal=np.zeros(steps, np.float32),
                noise=np.ones(steps, np.float32),
                latents=path.latents[:1].cpu().numpy().repeat(steps, 0),
                epsilon=path.epsilon[:1].cpu().numpy().repeat(steps, 0),
                image=path.image.numpy(),
                previews=None,
            )
            began = time.perf_counter()
            for step in range(steps):
                writer.step(0, rise.name, step, saliency=maps[0], error=maps[1], scores=scores)
            writer.finish(0, 0.0)
        return (time.perf_counter() - began) / steps


def _curve(denoiser: Denoiser, rise: Rise, path: Trajectory, clock: Clock) -> list[dict[str, float | None]]:
    """Masks a second and peak memory of the network at 1, 2, 4 … latents a forward, up to the batch size.

    It ends where one forward takes very long.
    """
    sizes = [2**i for i in range(denoiser.batch_size.bit_length()) if 2**i < denoiser.batch_size]
    points: list[dict[str, float | None]] = []
    for size in [*sizes, denoiser.batch_size]:
        stages = _Stages(denoiser, rise, path, size)
        _reset_peak(denoiser.device)
        seconds = clock.median(stages.forward)
        # A process's peak never falls, so that a CPU's says nothing of one batch.
        most = peak(denoiser.device) / 2**30 if denoiser.device.type == "cuda" else None
        points.append({"batch": size, "masks_a_second": size / seconds, "peak_gib": most})
        if seconds > 10 * clock.seconds:
            break
    return points


def _missed(engine: Engine) -> list[str]:
    """Fast paths not taken, and what to do about it."""
    denoiser = engine.denoiser
    missed = denoiser.performance_warnings()
    half = denoiser.dtype in (torch.float16, torch.bfloat16)
    if denoiser.device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            missed.append("masks and scores run by the reference, without Triton: pip install triton")
        elif not dfkernels.runs_fused(denoiser.device):
            missed.append("masks and scores run by the reference: Triton needs compute capability 8.0 or newer")
        if not half:
            missed.append("float32 leaves the half-precision matrix units idle: --dtype float16")
    elif denoiser.dtype == torch.float16:
        missed.append("float16 is slow on a CPU: --dtype float32, or bfloat16 where the processor has it")
    if not denoiser.compiled:
        missed.append("the network is not compiled: --compile; by default long jobs are")
    return missed


def _shortened(job: Job, steps: int) -> Job:
    """The job with its first few steps only."""
    return replace(job, timesteps=job.timesteps[: max(1, steps)])


def _plain(denoiser: Denoiser) -> Denoiser:
    """The denoiser as its work can be counted: by operations that the counter knows."""
    plain = copy.copy(denoiser)
    plain.compiled = False
    if type(denoiser).use_attention is not Denoiser.use_attention:
        plain.use_attention("sdpa")
    return plain


def _padded(total: int, batch: int) -> int:
    """How many latents go through the network for so many masks: the tail of the last batch is padded."""
    return -(-total // batch) * batch if total > batch else total


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """The most bytes that tensors took since `_reset_peak`; on a CPU the most that this process ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
