"""The progress of a run while it is written: how much is done, and one of its latest maps. Safe beside its writers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from dfengine.store.file.files import part_path
from dfengine.store.file.plan import StoreError
from dfengine.store.file.reader import Run
from dfengine.store.run.failures import QUARANTINED
from dfengine.store.run.reader import RunFolder, open


@dataclass(frozen=True)
class Part:
    """A file that one worker is writing, or that was interrupted."""

    name: str
    items: int
    finished: int
    maps: int
    """number of maps stored"""
    planned: int
    """number of maps when it is complete"""


@dataclass(frozen=True)
class LatestMap:
    """One of the maps computed last."""

    prompt: str
    seed: int
    method: str
    step: int
    timestep: float
    image: UInt8[np.ndarray, "H W 3"]
    heatmap: Float[np.ndarray, "H W"]


@dataclass(frozen=True)
class RunProgress:
    """How far a run is."""

    path: Path
    items: int
    """number of items when it is complete"""
    done: float
    """number of items done, where an unfinished item counts as the share of its maps"""
    quarantined: int
    """number of items that failed repeatedly and are not tried again"""
    finished: bool
    parts: Sequence[Part]
    latest: LatestMap | None


def progress(path: str | os.PathLike[str]) -> RunProgress:
    """The progress of a file, its .part, or a run folder. Raises StoreError if none of them exists."""
    path = Path(path)
    with open(path if path.exists() or not part_path(path).exists() else part_path(path)) as opened:
        if isinstance(opened, Run):
            part = _part(opened)
            done = part.finished + _unfinished_share(opened)
            return RunProgress(path, len(opened), done, 0, opened.finished, [part], _latest_map(opened))
        return _folder_progress(path, opened)


def _folder_progress(path: Path, opened: RunFolder) -> RunProgress:
    segments = [segment for segment in opened.segments if segment.is_part] or opened.segments[-1:]
    runs = []
    for segment in segments:
        try:
            runs.append((segment, opened.opened(segment.file)))
        except StoreError:
            continue  # resumed by another attempt meanwhile
    # A finished item of a part is already counted in `num_finished`, whichever segments hold it.
    done = opened.num_finished + sum(_unfinished_share(run) for segment, run in runs if segment.is_part)
    newest = max((run for _, run in runs), key=_modified, default=None)
    return RunProgress(
        path,
        len(opened) if opened.finished else max(opened.planned, len(opened)),
        done,
        sum(failure.state == QUARANTINED for failure in opened.failures),
        opened.finished,
        [_part(run) for segment, run in runs if segment.is_part],
        None if newest is None else _latest_map(newest),
    )


def _modified(run: Run) -> float:
    try:
        return run.path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _part(run: Run) -> Part:
    counts = run.counts()
    maps, planned = (sum(counts[name].values()) for name in ("maps_done", "maps_planned"))
    return Part(run.path.name, counts["items"], counts["items_finished"], maps, planned)


def _unfinished_share(run: Run) -> float:
    """What is done of the unfinished items, in items."""
    unfinished = np.flatnonzero(np.isnan(run.read("items/seconds", {})))
    maps_done = run.counts(unfinished.tolist())["maps_done"]
    return sum(maps_done.values()) / (run.plan.num_steps * max(1, len(run.plan.methods)))


def _latest_map(run: Run) -> LatestMap | None:
    """The last map, in order of method and step, of the last item that has one."""
    done = run.marks("done") & run.marks("trajectory_done")[:, None, None]
    if not done.any():
        return None
    index, method, step = (int(place) for place in np.argwhere(done)[-1])
    item, name = run[index], run.plan.methods[method].name
    if not np.isfinite(item.saliency(name)[step]).any():
        return None
    timestep = item.timesteps[step].item()
    return LatestMap(item.prompt, item.seed, name, step, timestep, item.image, item.heatmap(name, step))
