"""Random maps: what every other map has to be better than."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from dfkernels.counters import RANDOM_STREAM, words

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Job, Trajectory
from dfengine.explain.base import OutputSpec, StepMap


@dataclass(frozen=True)
class Random:
    """Saliency uniform in [0, 1), drawn by counter: a function of the seed and the prompt, the step and the pixel."""

    name: str = "random"

    def num_forwards(self, num_steps: int) -> int:
        """None: nothing is asked of the network."""
        return 0

    def contents(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """Maps alone."""
        return OutputSpec()

    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream a map for every step of every trajectory."""
        height, width = denoiser.latent_shape[1:]
        for item, path in enumerate(trajectories):
            for step in path.steps:
                if (item, step) not in done:
                    seed, at, first = (torch.tensor([value]) for value in (path.job.mask_seed, step, 0))
                    drawn = words(seed, at, first, height * width, RANDOM_STREAM).view(height, width)
                    # 24 bits: what float32 holds exactly, so that nothing is rounded up to 1.
                    yield StepMap(item, step, self.name, (drawn >> 8) / 2**24)
