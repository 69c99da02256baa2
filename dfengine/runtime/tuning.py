"""How a model runs on the available device: the batch size that fits, and whether compiling pays off.

Decisions are based on measurements, made once and logged.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfengine.diffusion.denoiser import Compiles, Denoiser
from dfengine.runtime.batching import run_or_halve_batch

log = logging.getLogger(__name__)

#: The largest number of elements of a tensor: kernels index with 32-bit integers.
MAX_TENSOR_ELEMENTS = 2**31 - 1
#: Share of the free memory that a batch may take; the rest covers fragmentation.
MEMORY_FRACTION = 0.8
#: A CPU forward of one latent that takes at least this many seconds is not timed again in a batch.
SLOW_FORWARD_SECONDS = 0.25
#: Compile if a job would save at least this many times the expected compile time.
MIN_COMPILE_PAYOFF = 2


class CompileCost(NamedTuple):
    """The expected cost and gain of compiling."""

    seconds: float
    speedup: float


#: By device type. Measured on a CPU with two cores (20 s for the embedded model, 70 s for Stable Diffusion 1.5; a
#: speed-up of 1.04 to 1.06); assumed on a GPU.
COMPILE_COSTS = {"cpu": CompileCost(60, 1.05), "cuda": CompileCost(240, 1.2)}


@dataclass(frozen=True)
class ForwardCost:
    """What an uncompiled forward costs, per latent."""

    elements: int
    """size of its largest tensor"""
    bytes: int | None
    """memory that another latent in a batch takes; None on a CPU, where it is not measured"""
    seconds: float
    """time in a batch"""


@torch.no_grad()
def tune(denoiser: Denoiser, *, keep_batch_size: bool = False) -> ForwardCost:
    """Measure a few forwards, and reduce the batch size to what fits.

    With `keep_batch_size`, for a batch size that the user chose, only the limit on a tensor's elements applies.
    """
    forward = forward_runner(denoiser)
    with _LargestTensor() as largest:
        seconds = _time(denoiser, lambda: forward(1))
    bytes_per_latent = _bytes_per_latent(denoiser, forward) if is_on_gpu(denoiser) else None
    limit = max(1, MAX_TENSOR_ELEMENTS // largest.elements)
    reason = f"a tensor of a forward may have at most {MAX_TENSOR_ELEMENTS} elements"
    if bytes_per_latent is not None and not keep_batch_size:
        by_memory = int(MEMORY_FRACTION * _free_memory(denoiser.device)) // bytes_per_latent
        by_memory = max(1, by_memory - by_memory % 2)  # even, because guidance splits a batch in two
        limit, reason = min((limit, reason), (by_memory, f"a latent takes {bytes_per_latent / 2**20:.0f} MiB"))
    if limit < denoiser.batch_size:
        log.info("batches of %d instead of %d: %s", limit, denoiser.batch_size, reason)
        denoiser.batch_size = limit
    # A GPU selects its kernels here, for the final batch size and with free memory; a CPU is timed on fewer latents.
    count = denoiser.batch_size if is_on_gpu(denoiser) else min(16, denoiser.batch_size)
    if is_on_gpu(denoiser) or seconds < SLOW_FORWARD_SECONDS:
        while not run_or_halve_batch(denoiser, count, partial(forward, count))[0]:
            count = denoiser.batch_size
        # The minimum, because other load on the machine can slow down any single forward.
        seconds = min(_time(denoiser, lambda: forward(count)) for _ in range(3)) / count
    return ForwardCost(elements=largest.elements, bytes=bytes_per_latent, seconds=seconds)


@torch.no_grad()
def maybe_compile(
    denoiser: Denoiser,
    num_forwards: int,
    cost: ForwardCost,
    *,
    enabled: bool | None = None,
    targets: Collection[str] = ("conditional",),
) -> None:
    """Compile the denoiser if `enabled`, or, if that is None, when it pays off for `num_forwards` forwards.

    `targets` are the predictions to be explained; the guided one is compiled separately. Raises ValueError if
    `enabled` and the denoiser cannot be compiled.
    """
    if enabled is False or denoiser.compiled:
        return
    if enabled is None and not _pays_off(denoiser, num_forwards * cost.seconds):
        return
    if not isinstance(denoiser, Compiles):
        raise ValueError(f"{denoiser.name} cannot be compiled: leave compile out")
    try:
        started, fits = time.monotonic(), False
        while not fits:  # compiling takes memory too
            denoiser.compile()
            size = denoiser.batch_size
            fits = all(
                run_or_halve_batch(denoiser, size, partial(forward_runner(denoiser, guided=guided), size))[0]
                for guided in sorted({target == "guided" for target in targets})
            )
        synchronize(denoiser.device)
        log.info("compiled in %s", format_duration(time.monotonic() - started))
    except Exception as error:  # whatever a compiler or its tools raise
        denoiser.compiled = False
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if enabled:
            raise ValueError(f"the network could not be compiled: {reason}; leave compile out") from error
        log.info("continuing without compiling: %s", reason)


def _pays_off(denoiser: Denoiser, uncompiled_seconds: float) -> bool:
    """Whether compiling is supported and saves enough time in a job of this duration."""
    expected = COMPILE_COSTS.get(denoiser.device.type)
    if expected is None or not isinstance(denoiser, Compiles):
        return False
    pays_off = uncompiled_seconds * (1 - 1 / expected.speedup) >= MIN_COMPILE_PAYOFF * expected.seconds
    job, compiling = format_duration(uncompiled_seconds), format_duration(expected.seconds)
    if pays_off:
        log.info("the job takes about %s: compiling, which takes about %s", job, compiling)
    else:
        log.debug("the job takes about %s: not compiling", job)
    return pays_off


def disable_malloc_trim() -> None:
    """Make glibc keep freed memory, so that a forward's activations reuse pages that are already mapped.

    With fresh pages for each activation a CPU forward takes 1.05 to 1.3 times as long, more so in large batches.
    Applies to the entire process, unless a MALLOC_… or GLIBC_TUNABLES environment variable is set.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate large blocks on the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never return memory to the system


def device_name(device: torch.device) -> str:
    """The model name of a GPU; otherwise the device type, such as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_on_gpu(denoiser: Denoiser) -> bool:
    """Whether the denoiser runs on a GPU."""
    return denoiser.device.type == "cuda"


def forward_runner(denoiser: Denoiser, *, guided: bool = False) -> Callable[[int], object]:
    """A function that runs a forward of `count` random latents with one prompt, or with a pair of them if `guided`."""
    network = denoiser.with_prompts(denoiser.encode_prompts([""]))
    last = denoiser.schedule.num_train_timesteps - 1
    generator = torch.Generator(denoiser.device).manual_seed(0)  # leaves the global random state alone

    def forward(count: int) -> object:
        x = torch.randn(count, *denoiser.latent_shape, generator=generator, device=denoiser.device)
        timesteps = torch.full((count,), last, device=denoiser.device)
        return network.both(x, timesteps, (0, 0)) if guided else network(x, timesteps, 0)

    return forward


def _time(denoiser: Denoiser, work: Callable[[], object]) -> float:
    """Seconds that `work` takes on the denoiser's device."""
    synchronize(denoiser.device)
    started = time.perf_counter()
    work()
    synchronize(denoiser.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes_per_latent(denoiser: Denoiser, forward: Callable[[int], object]) -> int:
    """The growth of a forward's peak memory with each latent."""

    def peak(count: int) -> int:
        torch.cuda.reset_peak_memory_stats(denoiser.device)
        forward(count)
        return torch.cuda.max_memory_allocated(denoiser.device)

    few, many = 1, min(4, max(2, denoiser.batch_size))
    return max(1, (peak(many) - peak(few)) // (many - few))


def _free_memory(device: torch.device) -> int:
    """Bytes available to new tensors, including what the allocator has reserved."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class _LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for value in returned if isinstance(returned, (tuple, list)) else (returned,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return returned


def format_duration(seconds: float) -> str:
    """A duration as text: "4.2 s", "95 s", "12 min" or "2 h 05 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60:02} min"
