"""Sweeps: many jobs, on one device or many, on one machine or many, into one run folder."""

from dfengine.sweep.planning import Estimate
from dfengine.sweep.records import Begun, Closed, Failed, Gone, Idle, Kind, Note, Probed, Progress, Record, Taken
from dfengine.sweep.running import Outcome, Where, dry_run, outcome, run
from dfengine.sweep.spec import Schedule, Source, Sweep, read

__all__ = [
    "Begun",
    "Closed",
    "Estimate",
    "Failed",
    "Gone",
    "Idle",
    "Kind",
    "Note",
    "Outcome",
    "Probed",
    "Progress",
    "Record",
    "Schedule",
    "Source",
    "Sweep",
    "Taken",
    "Where",
    "dry_run",
    "outcome",
    "read",
    "run",
]
