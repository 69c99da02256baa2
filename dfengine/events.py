"""What the engine reports while it works: each image as it is generated, each map, and the end of each item."""

from __future__ import annotations

from dataclasses import dataclass

from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain import StepMap


@dataclass(frozen=True)
class Generated:
    """A trajectory is finished; its maps follow."""

    item: int
    trajectory: Trajectory


@dataclass(frozen=True)
class Finished:
    """Every map of an item has been computed."""

    item: int
    seconds: float
    """the item's share of its group's wall time"""


Event = Generated | StepMap | Finished
