"""A look at a run while it is written: how far it is, and a map that was made lately. Safe against its writers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from dfengine.store.files import part_path
from dfengine.store.folder_reader import RunFolder, open
from dfengine.store.plan import StoreError
from dfengine.store.reader import Run


@dataclass(frozen=True)
class Part:
    """A file that is being written, or was cut off: one worker's."""

    name: str
    items: int
    finished: int
    maps: int
    """those that are stored"""
    planned: int
    """those that there will be"""


@dataclass(frozen=True)
class Latest:
    """A map that was made lately."""

    prompt: str
    seed: int
    method: str
    step: int
    timestep: int
    image: UInt8[np.ndarray, "H W 3"]
    heatmap: Float[np.ndarray, "H W"]


@dataclass(frozen=True)
class Look:
    """How far a run is."""

    path: Path
    items: int
    """all that there will be"""
    done: float
    """items, those that are not finished by the share of their maps"""
    aside: int
    """items that were set aside"""
    finished: bool
    parts: Sequence[Part]
    latest: Latest | None


def look(path: str | os.PathLike[str]) -> Look:
    """How far a file, or a run folder, is. Raises StoreError where there is none, nor a part of it."""
    path = Path(path)
    with open(path if path.exists() or not part_path(path).exists() else part_path(path)) as opened:
        if isinstance(opened, Run):
            whole = _part(opened)
            done = whole.finished + _begun(opened)
            return Look(path, len(opened), done, 0, opened.finished, [whole], _latest(opened))
        return _folder(path, opened)


def _folder(path: Path, opened: RunFolder) -> Look:
    files = [segment for segment in opened.segments if segment.is_part] or opened.segments[-1:]
    runs = []
    for segment in files:
        try:
            runs.append((segment, opened.opened(segment.file)))
        except StoreError:
            continue  # gone on from meanwhile
    # A finished part's items count once, whichever of its files they are in.
    done = opened.num_finished + sum(_begun(run) for segment, run in runs if segment.is_part)
    newest = max((run for _, run in runs), key=_changed, default=None)
    return Look(
        path,
        max(opened.planned, len(opened)),
        done,
        sum(one.state == "aside" for one in opened.failures),
        opened.finished,
        [_part(run) for segment, run in runs if segment.is_part],
        None if newest is None else _latest(newest),
    )


def _changed(run: Run) -> float:
    try:
        return run.path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _part(run: Run) -> Part:
    counts = run.counts()
    maps, planned = (sum(counts[name].values()) for name in ("maps_done", "maps_planned"))
    return Part(run.path.name, counts["items"], counts["items_finished"], maps, planned)


def _begun(run: Run) -> float:
    """Of the items that are not finished, what is done, in items."""
    rest = np.flatnonzero(np.isnan(run.read("items/seconds", {})))
    counts = run.counts(rest.tolist())
    planned = run.plan.num_steps * max(1, len(run.plan.methods))
    return sum(counts["maps_done"].values()) / planned


def _latest(run: Run) -> Latest | None:
    """The last map, in order of steps, of the last item that has one."""
    done = run.marks("done") & run.marks("trajectory_done")[:, None, None]
    if not done.any():
        return None
    place, method, step = (int(index) for index in np.argwhere(done)[-1])
    item, name = run[place], run.plan.methods[method].name
    return Latest(item.prompt, item.seed, name, step, int(item.timesteps[step]), item.image, item.heatmap(name, step))
