"""Sampling many jobs in groups that fit into memory together."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.runtime.batching import is_out_of_memory

log = logging.getLogger(__name__)


def group_size(denoiser: Denoiser) -> int:
    """The number of images to sample together; with guidance a forward has two latents per image."""
    return max(1, denoiser.batch_size // 2)


def sample_groups(
    denoiser: Denoiser, jobs: Sequence[Job], restored: Mapping[int, Trajectory]
) -> Iterator[tuple[float, dict[int, Trajectory]]]:
    """Trajectories by item, in groups of neighbours with equally many steps, and when each group was started.

    Trajectories in `restored` are not sampled again. A group that does not fit into memory is halved.
    """
    for _, neighbours in groupby(enumerate(jobs), key=lambda pair: len(pair[1].timesteps)):
        remaining, size = list(neighbours), group_size(denoiser)
        while remaining:
            group = dict(remaining[:size])
            started = time.monotonic()
            sampled = _sample(denoiser, group, restored)
            if sampled is None:
                size = len(group) // 2
                continue
            remaining = remaining[len(group) :]
            yield started, sampled


def _sample(
    denoiser: Denoiser, group: Mapping[int, Job], restored: Mapping[int, Trajectory]
) -> dict[int, Trajectory] | None:
    """The trajectories of a group, or None if they do not fit into memory together."""
    new = [item for item in group if item not in restored]
    try:
        sampled = trajectories(denoiser, [group[item] for item in new]) if new else []
    except RuntimeError as error:
        if len(group) == 1 or not is_out_of_memory(error):
            raise
        log.info("%d images do not fit into memory together: continuing with %d", len(group), len(group) // 2)
        return None
    by_item = dict(zip(new, sampled, strict=True))
    return {item: restored[item] if item in restored else by_item[item] for item in group}
