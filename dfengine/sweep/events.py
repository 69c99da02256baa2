"""What a worker reports: small plain values that can come from any process on any machine."""

from __future__ import annotations

from dataclasses import dataclass

from dfengine.store import Failure


@dataclass(frozen=True)
class ItemCost:
    """What one item of a model and schedule costs."""

    num_steps: int
    forwards: int
    """network evaluations of one latent"""
    nbytes: int
    """size in a file, before compression"""


@dataclass(frozen=True)
class SweepStarted:
    """The remaining work; the first of all events."""

    items: int
    maps: int
    units: int
    workers: int


@dataclass(frozen=True)
class ModelProfile:
    """What a worker measured of a model, with one cost for each schedule."""

    device: str
    seconds: float
    """per latent in a full batch"""
    costs: tuple[ItemCost, ...]


@dataclass(frozen=True)
class Progress:
    """What was done of a unit since its last progress event."""

    unit: str
    maps: int
    items: tuple[tuple[int, float], ...] = ()
    """(index in the unit, seconds) of each finished item"""


@dataclass(frozen=True)
class Failed:
    """Items of a unit failed; the failures are recorded on disk."""

    unit: str
    failures: tuple[Failure, ...]
    needs_restart: bool = False
    """whether the unit must continue in a new process"""


@dataclass(frozen=True)
class Closed:
    """A unit is complete."""

    unit: str


@dataclass(frozen=True)
class UnitBusy:
    """A unit is being written by a process of another run."""

    unit: str


@dataclass(frozen=True)
class Note:
    """A log message or warning."""

    text: str


@dataclass(frozen=True)
class Refused:
    """The request cannot be fulfilled by any worker: the sweep or the machine is at fault, no single item."""

    error: str


@dataclass(frozen=True)
class WorkerReady:
    """The worker waits for a request."""


@dataclass(frozen=True)
class WorkerExited:
    """The worker's process has ended."""


Event = (
    SweepStarted | ModelProfile | Progress | Failed | Closed | UnitBusy | Note | Refused | WorkerReady | WorkerExited
)
