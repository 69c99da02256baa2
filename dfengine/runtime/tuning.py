"""How a model is run on the device that is there: the batch that fits, and whether compiling repays itself.

Everything is decided from what is measured, once, and said in the log.
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

#: Kernels count elements in 32 bits; a tensor of more is split rather than trusted.
MOST_ELEMENTS = 2**31 - 1
#: Of the memory that is free, what a batch may take; the rest is for what the allocator cannot use.
SHARE_OF_MEMORY = 0.8
#: A forward of one latent that takes so many seconds on a CPU tells enough of what more of them take.
LONG = 0.25
#: A job is compiled if it would take this many times as long as compiling has to take before it repays itself.
MARGIN = 2


class Compiling(NamedTuple):
    """What compiling is expected to cost and to gain."""

    seconds: float
    speedup: float


#: Measured on two cores (20 s for the embedded model, 70 s for Stable Diffusion 1.5; 1.04 to 1.06 times the speed), on
#: a GPU assumed.
COMPILING = {"cpu": Compiling(60, 1.05), "cuda": Compiling(240, 1.2)}


@dataclass(frozen=True)
class ForwardCost:
    """What was measured of a denoiser before compiling."""

    elements: int
    """of the largest tensor of one latent's forward"""
    bytes: int | None
    """that one more latent in a batch takes; None where it cannot be measured (on a CPU)"""
    seconds: float
    """a latent's forward takes in a batch"""


@torch.no_grad()
def tune(denoiser: Denoiser, *, is_given: bool = False) -> ForwardCost:
    """Measure a few forwards, and set the batch size to what fits: at most what it is.

    `is_given` says that the batch size is the caller's own, which is kept as long as no tensor gets too large.
    """
    forward = forwards(denoiser)
    with _Largest() as largest:
        seconds = _timed(denoiser, lambda: forward(1))
    needs = _bytes_a_latent(denoiser, forward) if on_gpu(denoiser) else None
    most = max(1, MOST_ELEMENTS // largest.elements)
    why = f"no tensor of a forward may have more than {MOST_ELEMENTS} elements"
    if needs is not None and not is_given:
        room = int(SHARE_OF_MEMORY * _free_memory(denoiser.device)) // needs
        room = max(1, room - room % 2)  # a pair of prompts wants halves
        most, why = min((most, why), (room, f"a latent takes {needs / 2**20:.0f} MiB"))
    if most < denoiser.batch_size:
        log.info("batches of %d instead of %d: %s", most, denoiser.batch_size, why)
        denoiser.batch_size = most
    # A GPU's kernels are chosen now, while memory is free, for the size that there will be; a CPU is timed on a few.
    count = denoiser.batch_size if on_gpu(denoiser) else min(16, denoiser.batch_size)
    if on_gpu(denoiser) or seconds < LONG:
        while not run_or_halve_batch(denoiser, count, partial(forward, count))[0]:
            count = denoiser.batch_size
        # The best of a few: whatever else the machine does makes one of them many times as long.
        seconds = min(_timed(denoiser, lambda: forward(count)) for _ in range(3)) / count
    return ForwardCost(elements=largest.elements, bytes=needs, seconds=seconds)


def maybe_compile(
    denoiser: Denoiser,
    num_forwards: int,
    pace: ForwardCost,
    *,
    wanted: bool | None = None,
    targets: Collection[str] = ("conditional",),
) -> None:
    """Compile the denoiser if that is `wanted`, or by default if a job of so many forwards repays it.

    `targets` are what is going to be explained: the guided prediction is compiled apart.
    """
    if wanted is False or denoiser.compiled:
        return
    expected = COMPILING.get(denoiser.device.type)
    if wanted is None:
        if expected is None or not isinstance(denoiser, Compiles):
            return
        uncompiled, cost = num_forwards * pace.seconds, expected.seconds
        if uncompiled * (1 - 1 / expected.speedup) < MARGIN * cost:
            log.debug("about %s for %d forwards: not compiling", duration(uncompiled), num_forwards)
            return
        log.info("about %s for %d forwards: compiling, in %s", duration(uncompiled), num_forwards, duration(cost))
    if not isinstance(denoiser, Compiles):
        raise ValueError(f"{denoiser.name} cannot be compiled: leave compile out")
    try:
        began, whole = time.monotonic(), False
        with torch.no_grad():
            while not whole:  # compiling takes memory, too
                denoiser.compile()
                size = denoiser.batch_size
                for guided in sorted({target == "guided" for target in targets}):
                    whole, _ = run_or_halve_batch(denoiser, size, partial(forwards(denoiser, guided=guided), size))
                    if not whole:
                        break
            synchronize(denoiser.device)
        log.info("compiled in %s", duration(time.monotonic() - began))
    except Exception as error:  # whatever a compiler and its tools may lack
        denoiser.compiled = False
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if wanted:
            raise ValueError(f"the network could not be compiled: {reason}; leave compile out") from error
        log.info("going on without compiling: %s", reason)


def disable_malloc_trim() -> None:
    """Tell glibc to keep what is freed: a forward's activations then come from memory that is already mapped.

    With fresh pages for each of them a CPU's forward takes 1.05 to 1.3 times as long, the more the larger the batch.
    It holds for the whole process. Whoever has set MALLOC_… or GLIBC_TUNABLES is left alone.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another system's library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


def device_name(device: torch.device) -> str:
    """The device's name: of a GPU its model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def on_gpu(denoiser: Denoiser) -> bool:
    """Whether the denoiser's memory and time are a GPU's."""
    return denoiser.device.type == "cuda"


def forwards(denoiser: Denoiser, *, guided: bool = False) -> Callable[[int], object]:
    """Forwards of so many latents of one prompt, or with guidance of a pair, as the explainers make them."""
    network = denoiser.with_prompts(denoiser.encode_prompts([""]))
    last = denoiser.schedule.num_train_timesteps - 1
    noise = torch.Generator(denoiser.device).manual_seed(0)  # of its own: a caller's is left as it was

    def forward(count: int) -> object:
        x = torch.randn(count, *denoiser.latent_shape, generator=noise, device=denoiser.device)
        timesteps = torch.full((count,), last, device=denoiser.device)
        return network.both(x, timesteps, (0, 0)) if guided else network(x, timesteps, 0)

    return forward


def _timed(denoiser: Denoiser, work: Callable[[], object]) -> float:
    synchronize(denoiser.device)
    began = time.perf_counter()
    work()
    synchronize(denoiser.device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes_a_latent(denoiser: Denoiser, forward: Callable[[int], object]) -> int:
    """By how much a forward's peak grows with each latent."""

    def peak(count: int) -> int:
        torch.cuda.reset_peak_memory_stats(denoiser.device)
        forward(count)
        return torch.cuda.max_memory_allocated(denoiser.device)

    few, more = 1, min(4, max(2, denoiser.batch_size))
    return max(1, (peak(more) - peak(few)) // (more - few))


def _free_memory(device: torch.device) -> int:
    """Bytes that tensors could still take, what the allocator holds in reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for value in returned if isinstance(returned, (tuple, list)) else (returned,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return returned


def duration(seconds: float) -> str:
    """As a person would say it."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
