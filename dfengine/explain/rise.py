"""DF-RISE: which pixels of a noisy latent must be seen for the noise prediction to keep its structure.

Algorithm 1 of the paper: random masks hide latent pixels, the denoiser answers each masked latent, and a pixel's
saliency is how well the answers agree with the unmasked one when that pixel is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Job, Trajectory
from dfengine.explain.base import OutputSpec, StepMap
from dfengine.explain.masking import Masking
from dfengine.explain.rise_settings import RiseSettings


@dataclass(frozen=True)
class Rise(RiseSettings):
    """DF-RISE and its variations [8][9].

    Maps are Σ M·s ("sum", as printed), Σ M·s / Σ M ("coverage"), the mean score with a pixel kept minus the mean with
    it dropped ("contrast"), or the ridge regression of a global score on the masks ("ridge").
    """

    def num_forwards(self, num_steps: int) -> int:
        """Forwards of one latent that so many steps cost, if no step stops early."""
        return num_steps * (self.num_masks + 1) * (2 if self.target == "guided" else 1)

    def contents(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """A score a mask, and errors. Raises ValueError where the similarity needs features, and there are none."""
        self._check_features(denoiser)
        return OutputSpec(num_masks=self.num_masks, has_error=True)

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream a map for every step of every trajectory; batches fill across masks, steps and items.

        Raises ValueError where the similarity needs what the model does not come with.
        """
        self._check_features(denoiser)
        _, height, width = denoiser.latent_shape
        if self.estimates == "ridge" and self.num_masks < 2 * height * width:
            warnings.warn(
                f"{self.num_masks} masks are few for the ridge of a global score on {height}×{width} pixels: "
                f"it wants {2 * height * width} or more",
                stacklevel=2,
            )
        rows = [(i, k) for i, path in enumerate(trajectories) for k in path.steps]
        if set(rows) - set(done):
            yield from Masking(self, denoiser, trajectories, rows, done).run()

    def _check_features(self, denoiser: Denoiser) -> None:
        if self.similarity == "frechet" and denoiser.features is None:
            raise ValueError(
                f"the Fréchet similarity compares image features, and {denoiser.name} comes with no extractor: "
                "set denoiser.features to one"
            )
