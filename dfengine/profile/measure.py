"""An engine's speed on the available device, where its time goes, and a prediction for a job."""

from __future__ import annotations

import copy
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import dfkernels
import torch

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.engine import Engine
from dfengine.explain import Rise
from dfengine.profile.clock import (
    Clock,
    copy_bandwidth,
    cpu_description,
    matmul_ceiling,
    peak_memory,
    reset_peak_memory,
)
from dfengine.profile.operations import flops_by_kind, profiled, time_by_kind
from dfengine.profile.stages import BatchStages, file_seconds, first_steps, loop_seconds
from dfengine.runtime.tuning import device_name
from dfengine.store import nbytes


@dataclass(frozen=True)
class Profile:
    """The results of `profile`; `dfengine profile --json` prints its `dataclasses.asdict`. Times are in seconds."""

    model: str
    device: str
    versions: dict[str, str]
    dtype: str
    attention: str
    compiled: bool
    batch_size: int
    gflop_per_mask: dict[str, float]
    """by kind of operation, as executed, without what is computed once per prompt"""
    ceiling_tflop_s: float
    """of a large matrix product on this device"""
    copy_gb_s: float
    masks_per_second: float
    """of the complete loop: masks, forwards, scores, maps and file"""
    tflop_s: float
    share_of_ceiling: float
    seconds_per_mask: dict[str, float]
    """`network` within the loop, the other stages by themselves, `rest` of the loop; `file` runs in another thread"""
    network_shares: dict[str, float]
    """share of the network's time by kind of operation"""
    outside_network: float
    """share of the loop's time that is not spent in the network"""
    peak_gib: float
    curve: list[dict[str, float | None]]
    """the network alone, by batch size: masks per second and, on a GPU, peak memory"""
    job: dict[str, float]
    """the job in question: images, steps, masks, forwards, and the predicted seconds and bytes of its file"""
    suggestions: list[str]
    """fast paths that this run does not take, and why"""


def profile(
    engine: Engine,
    rise: Rise,
    job: Job,
    *,
    images: int = 1,
    seconds: float = 3.0,
    on_progress: Callable[[str], object] = lambda _: None,
) -> Profile:
    """Profile an engine on `images` images of a job's kind, with about `seconds` for each measurement.

    `on_progress` receives the name of each measurement as it starts.
    """
    with engine.denoiser.exclusive():
        return _profile(engine, rise, job, images, seconds, on_progress)


def _profile(
    engine: Engine, rise: Rise, job: Job, images: int, seconds: float, on_progress: Callable[[str], object]
) -> Profile:
    denoiser, steps = engine.denoiser, len(job.timesteps)
    clock = Clock(denoiser.device, seconds)
    on_progress("the batch size that fits")
    engine.prepare(engine.plan([job] * images, rise))
    on_progress("sampling")
    one_step, two_steps = (clock.median(partial(trajectories, denoiser, [first_steps(job, n)])) for n in (1, 2))
    (trajectory,) = trajectories(denoiser, [first_steps(job, 1)])
    on_progress("the stages of a batch")
    batch = denoiser.batch_size
    stages = BatchStages(denoiser, rise, trajectory, batch)
    per_mask = {
        "network": clock.median(stages.forward) / batch,
        "masks": clock.median(stages.mask) / batch,
        "scores": clock.median(stages.score) / batch,
        "maps": clock.median(stages.maps) / rise.num_masks,
    }
    on_progress("the complete loop")
    reset_peak_memory(denoiser.device)
    loop, per_mask["network"] = loop_seconds(engine, rise, job, round(seconds / per_mask["network"]))
    peak = peak_memory(denoiser.device)
    per_mask |= {
        "rest": max(0.0, loop - sum(per_mask.values())),
        "file": file_seconds(engine, rise, job, trajectory) / rise.num_masks,
    }
    on_progress("other batch sizes")
    flops = flops_by_kind(BatchStages(_countable(denoiser), rise, trajectory, 1).forward)
    curve = _curve(denoiser, rise, trajectory, clock)
    on_progress("the device's limits")  # last, because its matrices and copies are large
    ceiling, bandwidth = matmul_ceiling(clock, denoiser.dtype), copy_bandwidth(clock)
    flop_s = sum(flops.values()) / loop
    sampling = one_step + (steps - 1) * max(0.0, two_steps - one_step)
    return Profile(
        model=denoiser.name,
        device=device_name(denoiser.device) if denoiser.device.type == "cuda" else cpu_description(),
        versions={"torch": torch.__version__, "python": platform.python_version()},
        dtype=str(denoiser.dtype).removeprefix("torch."),
        attention=denoiser.attention_backend,
        compiled=denoiser.compiled,
        batch_size=batch,
        gflop_per_mask={kind: number / 1e9 for kind, number in flops.items()},
        ceiling_tflop_s=ceiling / 1e12,
        copy_gb_s=bandwidth / 1e9,
        masks_per_second=1 / loop,
        tflop_s=flop_s / 1e12,
        share_of_ceiling=flop_s / ceiling,
        seconds_per_mask=per_mask,
        network_shares=time_by_kind(stages.forward, denoiser.device),
        outside_network=1 - per_mask["network"] / loop,
        peak_gib=peak / 2**30,
        curve=curve,
        job={
            "images": images,
            "steps": steps,
            "masks": rise.num_masks,
            "forwards": images * rise.num_forwards(steps),
            "seconds": images * sampling + _padded(images * steps * rise.num_masks, batch) * loop,
            "bytes": images * nbytes(engine.plan([job], rise).file_plan(engine.denoiser, previews=True)),
        },
        suggestions=suggestions(engine),
    )


def write_trace(engine: Engine, rise: Rise, job: Job, path: Path) -> None:
    """Write a Chrome trace (chrome://tracing, Perfetto) of two steps of a job, with a few batches each."""
    rise = replace(rise, num_masks=min(rise.num_masks, 2 * engine.denoiser.batch_size))
    job = first_steps(job, 2)
    engine.prepare(engine.plan([job], rise))
    with profiled(engine.denoiser.device) as profiler:
        for _ in engine.stream([job], rise):
            pass
    profiler.export_chrome_trace(str(path))


def _curve(denoiser: Denoiser, rise: Rise, trajectory: Trajectory, clock: Clock) -> list[dict[str, float | None]]:
    """The network's masks per second and peak memory at 1, 2, 4 … latents per forward, up to the batch size.

    Stops after a forward that takes ten times as long as a measurement should.
    """
    sizes = [2**i for i in range(denoiser.batch_size.bit_length()) if 2**i < denoiser.batch_size]
    points: list[dict[str, float | None]] = []
    for size in [*sizes, denoiser.batch_size]:
        stages = BatchStages(denoiser, rise, trajectory, size)
        reset_peak_memory(denoiser.device)
        seconds = clock.median(stages.forward)
        # A process's peak never falls, so on a CPU it says nothing about a batch size.
        peak = peak_memory(denoiser.device) / 2**30 if denoiser.device.type == "cuda" else None
        points.append({"batch": size, "masks_per_second": size / seconds, "peak_gib": peak})
        if seconds > 10 * clock.seconds:
            break
    return points


def suggestions(engine: Engine) -> list[str]:
    """The fast paths that an engine does not take, and how to take them, one line each."""
    denoiser = engine.denoiser
    lines = denoiser.performance_warnings()
    if denoiser.device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            lines.append("masks and scores are computed without Triton kernels: pip install triton")
        elif not dfkernels.runs_fused(denoiser.device):
            lines.append("masks and scores are computed without Triton kernels, which need compute capability 8.0")
        if denoiser.dtype not in (torch.float16, torch.bfloat16):
            lines.append("float32 leaves the half-precision matrix units idle: --dtype float16")
    elif denoiser.dtype == torch.float16:
        lines.append("float16 is slow on a CPU: --dtype float32, or bfloat16 if the processor supports it")
    if not denoiser.compiled:
        lines.append("the network is not compiled: --compile (the default for long jobs)")
    return lines


def _countable(denoiser: Denoiser) -> Denoiser:
    """A copy of the denoiser that uses only operations whose FLOPs can be counted."""
    countable = copy.copy(denoiser)
    countable.compiled = False
    if type(denoiser).use_attention is not Denoiser.use_attention:
        countable.use_attention("sdpa")
    return countable


def _padded(total: int, batch: int) -> int:
    """The number of latents in the batches for `total` masks, including the padding of the last one."""
    return -(-total // batch) * batch if total > batch else total
