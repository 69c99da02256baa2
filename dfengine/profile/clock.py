"""How long work takes on a device, and what that device does at best."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dfengine.runtime.tuning import synchronize

#: Sides of the square matrices whose product is a device's ceiling: the fastest counts.
_SIDES = {"cuda": (4096, 8192), "cpu": (1024, 2048)}
#: Bytes of the copy that is a device's bandwidth: past every cache.
_COPIED = {"cuda": 2**30, "cpu": 2**28}


@dataclass(frozen=True)
class Clock:
    """Times work on a device: repeated until it has had its share of seconds, at most `most` times."""

    device: torch.device
    seconds: float = 3.0
    most: int = 15

    def times(self, work: Callable[[], object]) -> list[float]:
        """Seconds of each repeat, after one that does not count; the only one if it takes very long."""
        first = self._once(work)
        if first > 2 * self.seconds:
            return [first]
        found: list[float] = []
        while len(found) < 3 or (sum(found) < self.seconds and len(found) < self.most):
            found.append(self._once(work))
        return found

    def median(self, work: Callable[[], object]) -> float:
        """The median of `times`."""
        return statistics.median(self.times(work))

    def _once(self, work: Callable[[], object]) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - began


def matmul_ceiling(clock: Clock, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product."""
    best = 0.0
    for side in _SIDES.get(clock.device.type, _SIDES["cpu"]):
        a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        best = max(best, 2 * side**3 / clock.median(partial(torch.matmul, a, b)))
    return best


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second, read and written, of a large copy."""
    size = _COPIED.get(clock.device.type, _COPIED["cpu"])
    source, target = (torch.randn(size // 4, device=clock.device) for _ in range(2))
    return 2 * size / clock.median(lambda: target.copy_(source))


def processor() -> str:
    """The processor's name, and how many threads torch uses of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, threads: {torch.get_num_threads()}"
