"""Time and memory that work takes on a device, and the device's limits."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dfengine.runtime.tuning import synchronize

#: Sides of the square matrices to multiply; the fastest product is the device's ceiling.
_MATRIX_SIDES = {"cuda": (4096, 8192), "cpu": (1024, 2048)}
#: Bytes to copy for the bandwidth, more than any cache holds.
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}


@dataclass(frozen=True)
class Clock:
    """Times work on a device: at least 3 repeats, until `seconds` are spent or `max_repeats` are done."""

    device: torch.device
    seconds: float = 3.0
    max_repeats: int = 15

    def times(self, work: Callable[[], object]) -> list[float]:
        """Seconds of each repeat after a warm-up; only the warm-up's if that takes over twice the time to spend."""
        warm_up = self._time(work)
        if warm_up > 2 * self.seconds:
            return [warm_up]
        times: list[float] = []
        while len(times) < 3 or (sum(times) < self.seconds and len(times) < self.max_repeats):
            times.append(self._time(work))
        return times

    def median(self, work: Callable[[], object]) -> float:
        """The median of `times`."""
        return statistics.median(self.times(work))

    def _time(self, work: Callable[[], object]) -> float:
        synchronize(self.device)
        started = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - started


def matmul_ceiling(clock: Clock, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product."""
    best = 0.0
    for side in _MATRIX_SIDES.get(clock.device.type, _MATRIX_SIDES["cpu"]):
        a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        best = max(best, 2 * side**3 / clock.median(partial(torch.matmul, a, b)))
    return best


def copy_bandwidth(clock: Clock) -> float:
    """Bytes read and written per second by a large copy."""
    size = _COPY_BYTES.get(clock.device.type, _COPY_BYTES["cpu"])
    source, target = (torch.randn(size // 4, device=clock.device) for _ in range(2))
    return 2 * size / clock.median(lambda: target.copy_(source))


def reset_peak_memory(device: torch.device) -> None:
    """Make `peak_memory` count from now on, which only a GPU supports."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The peak in bytes of a GPU's tensors since `reset_peak_memory`; on a CPU, of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_description() -> str:
    """The processor's model name and the number of threads that torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, threads: {torch.get_num_threads()}"
