"""What a worker tells: small values, so that they can come from any process on any machine."""

from __future__ import annotations

from dataclasses import dataclass

from dfengine.store import Failure


@dataclass(frozen=True)
class Kind:
    """What the items of one model and schedule are like."""

    num_steps: int
    forwards: int
    """of one latent, that an item costs"""
    nbytes: int
    """that an item takes in a file, before compression"""


@dataclass(frozen=True)
class Begun:
    """What is left to do, as the first of all records."""

    items: int
    maps: int
    units: int
    workers: int


@dataclass(frozen=True)
class Probed:
    """What a worker measured of a model: a kind for each schedule that was asked about."""

    device: str
    seconds: float
    """of a latent's forward in a batch"""
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Progress:
    """What was done of a unit since its last."""

    unit: str
    maps: int
    items: tuple[tuple[int, float], ...] = ()
    """those finished: each the place in the unit, and its seconds"""


@dataclass(frozen=True)
class Failed:
    """Something went wrong with items of a unit; it is on the disk."""

    unit: str
    failures: tuple[Failure, ...]
    fresh: bool = False
    """whether the unit goes on in a fresh process"""


@dataclass(frozen=True)
class Closed:
    """A unit is done."""

    unit: str


@dataclass(frozen=True)
class Taken:
    """A unit is being written by a process of another run."""

    unit: str


@dataclass(frozen=True)
class Note:
    """What the log would say."""

    text: str


@dataclass(frozen=True)
class Refused:
    """What was asked is not possible, whoever is asked: nobody's fault but the sweep's, or the machine's."""

    error: str


@dataclass(frozen=True)
class Idle:
    """The worker waits to be asked."""


@dataclass(frozen=True)
class Gone:
    """The worker's process has ended."""


Record = Begun | Probed | Progress | Failed | Closed | Taken | Note | Refused | Idle | Gone
