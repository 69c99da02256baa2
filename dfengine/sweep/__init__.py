"""Sweeps: many jobs, on any number of devices and machines, into one run folder."""

from dfengine.sweep.events import (
    Closed,
    Event,
    Failed,
    Note,
    Progress,
    SweepStarted,
    UnitBusy,
    WorkerExited,
)
from dfengine.sweep.planning import Estimate
from dfengine.sweep.running import Outcome, Resources, dry_run, outcome, run
from dfengine.sweep.spec import ModelSpec, Schedule, Sweep, read

__all__ = [
    "Closed",
    "Estimate",
    "Event",
    "Failed",
    "ModelSpec",
    "Note",
    "Outcome",
    "Progress",
    "Resources",
    "Schedule",
    "Sweep",
    "SweepStarted",
    "UnitBusy",
    "WorkerExited",
    "dry_run",
    "outcome",
    "read",
    "run",
]
