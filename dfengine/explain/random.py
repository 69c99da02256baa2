"""Random maps: the baseline that every other map must beat."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from dfkernels.counters import RANDOM_STREAM, random_uint32

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import Explainer, StepMap, option
from dfengine.explain.registry import register


@register("random", label="random", hot="nothing: the values are random numbers.")
@dataclass(frozen=True)
class Random(Explainer):
    """A baseline: uniform random values in [0, 1), determined by seed, prompt, step and pixel."""

    name: str = option("random", "name that the maps are stored under")

    def num_forwards(self, num_steps: int) -> int:
        """None: the network is not evaluated."""
        return 0

    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        height, width = denoiser.latent_shape[1:]
        for item, path in enumerate(trajectories):
            for step in path.steps:
                if (item, step) not in done:
                    seed, counter, first = (torch.tensor([value]) for value in (path.job.mask_seed, step, 0))
                    drawn = random_uint32(seed, counter, first, height * width, RANDOM_STREAM).view(height, width)
                    # 24 bits: what float32 represents exactly, so that nothing is rounded up to 1.
                    yield StepMap(item, step, self.name, (drawn >> 8) / 2**24)
